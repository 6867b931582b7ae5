"""Models in the style of others: what once was wrong or refused in them stays right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import recursion
from zoo_table import INPUTS

import initjax as ij
from initjax.errors import UnsupportedLayerError

X, SEQUENCE, TOKENS = INPUTS["vectors"], INPUTS["sequences"], INPUTS["tokens"]
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)


class MaskedMean(nn.Module):
    """The mean over the tokens that are there."""

    @nn.compact
    def __call__(self, x, mask):
        h = nn.relu(nn.Dense(64)(x))
        m = mask[..., None].astype(h.dtype)
        return nn.Dense(2)((h * m).sum(axis=1) / m.sum(axis=1))


def test_a_mean_over_a_given_mask():
    """A mask divided by its own sum scales both sides of a tangent moment; against the sums written out."""
    got = ij.kernel_fn(MaskedMean(), {"x": SEQUENCE, "mask": MASK})({"x": SEQUENCE, "mask": MASK})
    flat = SEQUENCE.astype(float).reshape(-1, 6)
    cov, weight = flat @ flat.T / 6, (MASK / MASK.sum(axis=1, keepdims=True)).reshape(-1)
    value, slope = (recursion.on_matrix(d, cov, np.diag(cov), np.diag(cov)) for d in recursion.ACTIVATIONS["relu"])
    pick = lambda m: (m * np.outer(weight, weight)).reshape(3, 3, 3, 3).sum(axis=(1, 3))  # noqa: E731
    np.testing.assert_allclose(got.nngp, pick(value), rtol=1e-10)
    np.testing.assert_allclose(got.ntk, 64 * pick(value) + 1 + pick(slope * (6 * cov + 1)), rtol=1e-10)


def test_a_norm_of_a_stream_with_activations_in_it():
    """x + gelu(W LN(x)): the square of the sum has the mean E x^2 + E gelu^2, for x and W LN(x) are independent."""

    class Stream(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(64)(x)
            x = x + nn.Dense(64)(nn.LayerNorm(epsilon=0.0)(x)) ** 2
            return nn.Dense(1)(nn.RMSNorm(epsilon=0.0)(x))

    got = ij.kernel_fn(Stream(), X)(X).nngp
    cov = X.astype(float) @ X.astype(float).T / 10
    q = np.diag(cov)
    unit = cov / np.sqrt(np.outer(q, q))
    stream = cov + 1 + 2 * unit**2  # E u^2 v^2 of normals
    norm = np.sqrt(np.diag(stream))
    np.testing.assert_allclose(
        got, stream / np.outer(norm, norm), rtol=1e-9
    )  # a mean of the values' size is subtracted


class Cosine(nn.Module):
    """A similarity of two encodings by one encoder."""

    @nn.compact
    def __call__(self, a, b):
        encode = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(128)])
        u, v = encode(a), encode(b)
        return jnp.sum(u * v, -1) / (jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1))


@pytest.mark.parametrize(
    ("model", "x"),
    [(Cosine(), (X, X[::-1])), (nn.Sequential([nn.Dense(128), nn.relu, lambda h: h.mean(-1)]), X)],
    ids=["cosine", "mean"],
)
def test_an_output_that_is_a_mean_over_channels_is_refused(model, x):
    """What acceptance would have returned: no tangent kernel at all, where networks have one of order 1."""
    found = ij.monte_carlo_kernels(model, x, key=jax.random.key(0), draws=32)
    assert np.all(np.diag(found.ntk) > 20 * np.diag(found.ntk_error))
    with pytest.raises(UnsupportedLayerError, match="one number for all networks") as caught:
        ij.kernel_fn(model, x)
    assert "monte_carlo_kernels" in caught.value.remedy
    with pytest.raises(UnsupportedLayerError, match="one number for all networks"):
        ij.kernel_fn(model, x, on_unsupported="monte_carlo")


class ActorCritic(nn.Module):
    """Two outputs by name, and running averages beside the parameters."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(64)(x)))
        return {"policy": nn.Dense(3)(h), "value": nn.Dense(1)(h)}


def test_one_of_several_outputs_by_init_and_apply_of_a_module():
    model = ActorCritic()
    with pytest.raises(UnsupportedLayerError, match=r"\['policy'\]: float32\[4, 3\]") as caught:
        ij.kernel_fn(model, X)
    assert "apply_fn(params, x)['policy']" in caught.value.remedy
    kernel = ij.kernel_fn((model.init, lambda v, x: model.apply(v, x)["policy"]), X)
    assert not any("batch_stats" in leaf.name for leaf in kernel.weights)  # averages are not trained
    plain = ij.kernel_fn(nn.Sequential([nn.Dense(64), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(3)]), X)
    np.testing.assert_allclose(kernel(X).ntk, plain(X).ntk, rtol=1e-12)


def test_a_norm_of_weights_alone_is_refused_by_name():
    """Learned queries, normed before they meet the data."""

    class Queries(nn.Module):
        @nn.compact
        def __call__(self, x):
            queries = self.param("queries", nn.initializers.normal(1.0), (1, 3, 32), x.dtype)
            return nn.Dense(1)((nn.LayerNorm()(queries) + nn.Dense(32)(x)).mean(axis=1))

    with pytest.raises(UnsupportedLayerError, match="nonlinear function of the weight queries alone"):
        ij.kernel_fn(Queries(), SEQUENCE)


def test_a_tiled_class_token_is_a_broadcast():
    class Token(nn.Module):
        tile: bool

        @nn.compact
        def __call__(self, x):
            token = self.param("token", nn.initializers.normal(1.0), (1, 1, 32), x.dtype)
            n = x.shape[0]
            token = jnp.tile(token, (n, 1, 1)) if self.tile else jnp.broadcast_to(token, (n, 1, 32))
            h = jnp.concatenate([token, jnp.tile(nn.Dense(32)(x), (1, 2, 1))], axis=1)
            return nn.Dense(1)(nn.relu(h).mean(axis=1))

    tiled, broadcast = (ij.kernel_fn(Token(tile), SEQUENCE)(SEQUENCE) for tile in (True, False))
    np.testing.assert_allclose(tiled.ntk, broadcast.ntk, rtol=1e-12)
