"""Grouped and local weights, fixed linear maps over positions, stacks: each against a model that says the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from test_infinite import IMAGES, SEQUENCE, X, outputs_of

import initjax as ij
from initjax.errors import UnsupportedLayerError

EXACT = 1e-10  # the same closed forms in another order of summation


def test_groups_of_many_channels_are_an_ordinary_convolution():
    """Var W times fan-in is 1 with and without groups; only the standard NTK of the leaf knows the fan-in."""
    grouped, whole = (
        ij.kernel_fn(zoo.GroupedConvolution(groups), IMAGES, parameterization="ntk")(IMAGES) for groups in (2, 1)
    )
    np.testing.assert_allclose(grouped.nngp, whole.nngp, rtol=EXACT)
    np.testing.assert_allclose(grouped.ntk, whole.ntk, rtol=EXACT)
    np.testing.assert_allclose(2 * grouped.leaves["Conv_1/kernel"], whole.leaves["Conv_1/kernel"], rtol=EXACT)


def test_local_weights_are_independent_from_position_to_position():
    """Pooling an odd function over P positions: only the P equal pairs of positions are correlated."""
    local = ij.kernel_fn(zoo.LocallyConnected(), IMAGES)(IMAGES)
    flat = ij.kernel_fn(zoo.LocallyConnected(local=False, flat=True), IMAGES)(IMAGES)
    np.testing.assert_allclose(local.nngp, flat.nngp / 9, rtol=EXACT)


def test_a_stacked_model_has_weights_of_its_own_for_every_member():
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
            h = dense(16)(nn.relu(nn.Dense(96)(x)).reshape(-1, 3, 32))
            return nn.Dense(1)(nn.relu(h).reshape(x.shape[0], -1))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(48)(nn.relu(nn.Dense(96)(x)))))

    members, plain = (ij.kernel_fn(model, X)(X).nngp for model in (Members(), Plain()))
    np.testing.assert_allclose(members, plain, rtol=EXACT)


class Mapped(nn.Module):
    """A linear map over positions between two layers."""

    kind: str

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(32)(x))
        if self.kind == "cumsum":
            h = jnp.cumsum(h, axis=1)[:, -1:]
        if self.kind == "sum":
            h = h.sum(axis=1, keepdims=True)
        if self.kind == "nearest":
            h = jax.image.resize(h, (h.shape[0], 10, 32), "nearest")
        if self.kind == "smooth":
            h = jnp.einsum("btc,st->bsc", h, jnp.full((2, 5), 0.2, h.dtype))
        if self.kind == "stack":
            h = jnp.stack([h[:, t] for t in range(5)], axis=1)
        if self.kind == "take":
            h = jnp.take(h, jnp.array([4, 2, 0, 1, 3]), axis=1)
        return nn.Dense(1)(h.mean(axis=1))


@pytest.mark.parametrize(
    ("kind", "same"),
    [("cumsum", "sum"), ("nearest", "mean"), ("smooth", "mean"), ("stack", "mean"), ("take", "mean")],
)
def test_fixed_maps_over_positions(kind, same):
    got, expected = (ij.kernel_fn(Mapped(k), SEQUENCE)(SEQUENCE) for k in (kind, same))
    np.testing.assert_allclose(got.nngp, expected.nngp, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, expected.ntk, rtol=EXACT)


def test_single_channels_of_a_readout():
    class Split(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, spread = jnp.split(nn.Dense(2)(nn.relu(nn.Dense(64)(x))), 2, axis=-1)
            return mean + spread

    one = ij.kernel_fn(nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(1)]), X)(X)
    np.testing.assert_allclose(ij.kernel_fn(Split(), X)(X).nngp, 2 * one.nngp, rtol=EXACT)


def test_a_scalar_product_would_have_been_zero():
    """The law of large numbers says n E[b t] = 0; the sum is Gaussian with n E[b^2] E[t^2]."""
    model, x = zoo.ScalarProduct(), jnp.asarray(X)
    y = outputs_of(lambda key: model.apply(model.init(key, x), x)[:, 0], 400, 200)
    q = np.sum(X.astype(float) ** 2, axis=1) / 10
    # the variance of a mean of 400 squares of nearly Gaussian numbers: 7 %; four of these
    np.testing.assert_allclose(np.mean(y**2, axis=0), 64 * q**2, rtol=0.3)
    with pytest.raises(UnsupportedLayerError, match="fluctuations"):
        ij.kernel_fn(model, X)


def test_depthwise_outputs_are_not_gaussian():
    """w u of one channel each: E[y^4] / E[y^2]^2 is 9 for a product of two normals, 3 for what CLT would give."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_000) * rng.normal(size=100_000)
    assert np.mean(y**4) / np.mean(y**2) ** 2 > 6  # its error is about 0.5
    with pytest.raises(UnsupportedLayerError, match="one channel in each group"):
        ij.kernel_fn(zoo.Depthwise(), IMAGES)


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_gelu_of_large_inputs(scale):
    """Inputs that nobody has normalised: for large q gelu is relu, up to O(1/q)."""
    x = scale * X
    gelu, relu = (ij.kernel_fn(nn.Sequential([nn.Dense(32), phi, nn.Dense(1)]), x)(x) for phi in (nn.gelu, nn.relu))
    q = np.sum(x.astype(float) ** 2, axis=1) / 10
    error = np.abs(np.diag(gelu.nngp) / np.diag(relu.nngp) - 1)
    assert np.all(error < 1 / q) and np.all(np.isfinite(gelu.ntk))


def test_batch_statistics_are_random_in_every_channel():
    """What acceptance would return: the variance over a batch of four taken as its mean; its spread is not small."""
    cov = X.astype(float) @ X.astype(float).T / 10
    centre = np.eye(4) - 1 / 4
    a = centre @ cov @ centre / 4
    spread = np.sqrt(2 * np.trace(a @ a)) / np.trace(a)  # of a quadratic form of Gaussians, relative
    assert spread > 0.5
    with pytest.raises(UnsupportedLayerError, match="running averages"):
        ij.kernel_fn(zoo.BatchNormTraining(), X)


def test_a_table_of_positions_looked_up_at_known_places_has_layer_statistics():
    class Positions(nn.Module):
        table: bool

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(64)(x)
            init = nn.initializers.normal(0.125)
            if self.table:
                h = h + nn.Embed(4, 64, embedding_init=init)(jnp.arange(4))
            else:
                h = h + self.param("table", init, (4, 64))
            return nn.Dense(1)(nn.relu(h).mean(1))

    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    looked_up, added = (ij.kernel_fn(Positions(table), x)(x) for table in (True, False))
    # one Gaussian table either way; the initializer's variance is read to 1e-12
    np.testing.assert_allclose(looked_up.nngp, added.nngp, rtol=1e-11)
    np.testing.assert_allclose(looked_up.ntk, added.ntk, rtol=1e-11)
    (table,) = [layer for layer in looked_up.layers if "Embed" in layer.name]
    np.testing.assert_allclose(table.q, 0.125**2, rtol=1e-11)
    np.testing.assert_allclose(table.correlation, 1.0, rtol=1e-11)  # the same for every example
