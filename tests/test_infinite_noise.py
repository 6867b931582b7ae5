"""Dropout and added noise: every entry of every example draws for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from oracles import recursion
from test_infinite import IMAGES, X, outputs_of

import initjax as ij

RNGS = {"dropout": jax.random.key(3)}
EXACT = 1e-10  # closed forms and converged quadrature on both sides


def gram():
    x = np.asarray(X, float)
    return x @ x.T, x @ x.T / 10


def on_diagonal(matrix, factor):
    return matrix * (1 + (factor - 1) * np.eye(len(matrix)))


def test_masks_of_different_examples_are_independent():
    """E m m' / keep^2 is 1 between examples and 1/keep within one, for values and for tangents."""
    inner, cov = gram()
    q, keep, width = np.diag(cov), 0.7, 128
    value, slope = (recursion.on_matrix(d, cov, q, q) for d in recursion.ACTIVATIONS["relu"])
    value, slope = on_diagonal(value, 1 / keep), on_diagonal(slope, 1 / keep)
    got = ij.kernel_fn(zoo.DropoutMLP(), X, rngs=RNGS)(X)
    np.testing.assert_allclose(got.nngp, value, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, width * value + 1 + slope * (inner + 1), rtol=EXACT)


def test_dropout_before_the_activation_is_a_mixture():
    """sigmoid(m u / keep): with probability 1 - keep it is sigmoid(0), whatever u."""
    inner, cov = gram()
    keep, width = 0.7, 128
    scaled = cov / keep**2
    q = np.diag(scaled)
    sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731
    both = recursion.on_matrix(recursion.smooth(sigmoid), scaled, q, q)
    slope = recursion.on_matrix(recursion.smooth(lambda u: sigmoid(u) * sigmoid(-u)), scaled, q, q)
    apart = keep**2 * both + (1 - keep**2) / 4  # the mean of sigmoid is 1/2 under either value of the mask
    value = np.where(np.eye(len(q), dtype=bool), keep * both + (1 - keep) / 4, apart)
    got = ij.kernel_fn(zoo.DropoutMLP(before=True), X, rngs=RNGS)(X)
    np.testing.assert_allclose(got.nngp, value, rtol=EXACT)
    expected = width * value + 1 + on_diagonal(slope, 1 / keep) * (inner + 1)
    np.testing.assert_allclose(got.ntk, expected, rtol=EXACT)


def test_two_batches_never_share_masks_and_evaluation_has_none():
    kernel = ij.kernel_fn(zoo.DropoutMLP(), X, rngs=RNGS)
    own, cross = kernel(X), kernel(X, X)
    plain = ij.kernel_fn(zoo.DropoutMLP(), X, apply_kwargs={"train": False})(X)
    np.testing.assert_allclose(cross.nngp, plain.nngp, rtol=1e-13)
    np.testing.assert_allclose(cross.ntk, plain.ntk, rtol=1e-13)
    off = ~np.eye(len(X), dtype=bool)
    np.testing.assert_allclose(own.ntk[off], plain.ntk[off], rtol=1e-13)
    assert np.all(np.diag(own.ntk) > 1.1 * np.diag(plain.ntk))


def test_nnx_twin_with_dropout():
    class Twin(nnx.Module):
        def __init__(self, *, rngs):
            self.first, self.last = nnx.Linear(10, 128, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.first(x))))

    twin = ij.kernel_fn(lambda rngs: Twin(rngs=rngs), X)(X)
    linen = ij.kernel_fn(zoo.DropoutMLP(), X, rngs=RNGS)(X)
    np.testing.assert_allclose(twin.nngp, linen.nngp, rtol=1e-12)
    np.testing.assert_allclose(twin.ntk, linen.ntk, rtol=1e-12)


def test_one_mask_used_twice_is_one_mask():
    """m u + m u is 2 m u; two masks are two."""

    class Model(nn.Module):
        same: bool

        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(64)(x))
            if self.same:
                h = nn.Dropout(0.5, deterministic=False)(h)
                return nn.Dense(1)(h + h)
            return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(h) + nn.Dropout(0.5, deterministic=False)(h))

    _, cov = gram()
    value = np.diag(recursion.on_matrix(recursion.ACTIVATIONS["relu"][0], cov, np.diag(cov), np.diag(cov)))
    same, apart = (ij.kernel_fn(Model(s), X, rngs=RNGS)(X).nngp for s in (True, False))
    np.testing.assert_allclose(np.diag(same), 4 * 2 * value, rtol=EXACT)
    np.testing.assert_allclose(np.diag(apart), (2 * 2 + 2) * value, rtol=EXACT)


def test_added_noise_and_reparameterised_samples():
    """mu + eps exp(s): E eps^2 E exp(2 s) on the diagonal alone."""

    class Sampler(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, spread = nn.Dense(64)(x), nn.Dense(64)(x)
            eps = jax.random.normal(self.make_rng("noise"), mean.shape, mean.dtype)
            return nn.Dense(1)(mean + eps * jnp.exp(0.5 * spread))

    _, cov = gram()
    got = ij.kernel_fn(Sampler(), X, rngs={"noise": jax.random.key(0)})(X).nngp
    np.testing.assert_allclose(got, cov + np.diag(np.exp(np.diag(cov) / 2)), rtol=EXACT)


def test_draws_shared_by_channels_are_taken_as_given_and_say_so():
    """Stochastic depth: one number for all channels of an example makes them dependent."""

    class DropPath(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(64)(x)
            h = h + nn.Dropout(0.5, broadcast_dims=(1,), deterministic=False)(nn.Dense(64)(nn.relu(h)))
            return nn.Dense(1)(h)

    got = ij.kernel_fn(DropPath(), X, rngs=RNGS)(X)
    assert any("as rngs give it" in note for note in got.notes)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "x"), [(zoo.DropoutResNet(), IMAGES), (zoo.DropoutMLP(before=True), X)])
def test_dropout_against_random_networks(model, x):
    networks, x = 1600, jnp.asarray(x)

    def one(key):
        weights, masks = jax.random.split(key)
        params = model.init(weights, x, train=False)
        return model.apply(params, x, rngs={"dropout": masks})[:, 0]

    y = outputs_of(one, networks, 100)
    exact = ij.kernel_fn(model, x, rngs=RNGS)(x).nngp
    q = np.diag(exact)
    # Wick errors at R = 1600; a masked readout has heavier tails than a Gaussian by O(1/width)
    assert np.all(np.abs(y.T @ y / networks - exact) < 4 * np.sqrt((np.outer(q, q) + exact**2) / networks))


@pytest.mark.parametrize("model", [zoo.DropoutMLP(), zoo.Concatenated(nn.LayerNorm)])
def test_traced_inputs(model):
    kernel = ij.kernel_fn(model, X, rngs=RNGS)
    traced = jax.jit(lambda x: kernel(x).ntk)(jnp.asarray(X, jnp.float64))
    np.testing.assert_allclose(traced, kernel(X).ntk, rtol=1e-7)  # closed forms, tables for tanh


def test_one_key_for_draws_of_two_shapes_is_refused():
    """They share random bits, in an order that is the generator's own; with one shape they are one mask."""

    class Twice(nn.Module):
        widths: tuple

        @nn.compact
        def __call__(self, x):
            key = jax.random.key(0)
            for width in self.widths:
                h = nn.Dense(width)(x)
                x = nn.relu(h * jax.random.bernoulli(key, 0.5, h.shape).astype(h.dtype))
            return nn.Dense(1)(x)

    with pytest.raises(ij.UnsupportedLayerError, match="split the key"):
        ij.kernel_fn(Twice((64, 32)), X)
    ij.kernel_fn(Twice((64, 64)), X)
