"""Kernels averaged over initializations: against a loop over draws, a closed form at finite width, and the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij

X = jax.random.normal(jax.random.key(0), (3, 4))


def small(x, outputs=2):
    return nn.Sequential([nn.Dense(5, param_dtype=x.dtype), jnp.tanh, nn.Dense(outputs, param_dtype=x.dtype)])


def test_means_and_standard_errors_match_a_loop_over_draws():
    model, draws = small(X), 7
    ntk_fn = ij.empirical_ntk(model)
    keys = jax.random.split(jax.random.key(3), draws)
    nngp, ntk = [], []
    for key in keys:
        params = model.init(key, X)["params"]
        out = np.asarray(model.apply({"params": params}, X))
        nngp.append(out @ out[:2].T / 2)
        ntk.append(np.asarray(ntk_fn(params, X, X[:2])))
    # one network at a time, then all at once
    for memory in (20_000, None):
        found = ij.monte_carlo_kernels(model, X, X[:2], key=jax.random.key(3), draws=draws, memory=memory)
        for mean, error, samples in ((found.nngp, found.nngp_error, nngp), (found.ntk, found.ntk_error, ntk)):
            np.testing.assert_allclose(mean, np.mean(samples, 0), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(error, np.std(samples, 0, ddof=1) / np.sqrt(draws), rtol=1e-11)
    assert repr(found) == "KernelEstimate(3x2, 7 draws)"


@pytest.mark.slow
def test_deviation_from_infinite_width_falls_as_one_over_width():
    # phi = x^2 / sqrt 3 at sigma_w = 1 keeps q = 1, and E[q_2^2] = 1 + Var(z^4) / 9 n = 1 + 32 / (3 n) exactly
    square, weights = lambda x: x * x / 3**0.5, nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    x = X[:2] / jnp.linalg.norm(X[:2], axis=1, keepdims=True) * 2
    scaled = []
    for width in (16, 64):
        dense = lambda n: nn.Dense(n, kernel_init=weights, use_bias=False, param_dtype=jnp.float64)  # noqa: E731
        model = nn.Sequential([dense(width), square, dense(width), square, dense(4)])
        found = ij.monte_carlo_kernels(model, x, key=jax.random.key(1), draws=2000)
        limit = ij.kernel_fn(model, x)(x)
        gap, error = (found.nngp / limit.nngp - 1) * width, found.nngp_error / limit.nngp * width
        # four standard errors, here and below
        assert np.all(np.abs(np.diagonal(gap) - 32 / 3) < 4 * np.diagonal(error))
        scaled.append(((found.ntk / limit.ntk - 1) * width, found.ntk_error / limit.ntk * width))
    (narrow, narrow_error), (wide, wide_error) = scaled
    assert np.all(narrow > 4 * narrow_error)
    assert np.all(np.abs(narrow - wide) < 4 * np.hypot(narrow_error, wide_error))


def test_nnx_factories_and_filters():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, param_dtype=jnp.float64, rngs=rngs)
            self.last = nnx.Linear(8, 1, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    factory = lambda rngs: Net(rngs)  # noqa: E731
    found = ij.monte_carlo_kernels(factory, X, key=jax.random.key(0), draws=50, params_filter="last/bias")
    np.testing.assert_allclose(found.ntk, 1, rtol=1e-13)
    np.testing.assert_allclose(found.ntk_error, 0, atol=1e-13)
    with pytest.raises(ij.InputError, match=r"nnx module instance, Net[\s\S]*nothing to average"):
        ij.monte_carlo_kernels(Net(nnx.Rngs(0)), X, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(draws=1), r"draws=1[\s\S]*>= 2"),
        (dict(draws=2.0), r"draws=2.0"),
        (dict(x2=X[:, :3]), r"inputs float64\[3, 3\][\s\S]*check the shape"),
        (dict(params_filter="nothing"), r"params_filter='nothing'"),
    ],
)
def test_bad_requests_get_four_part_errors(change, message):
    with pytest.raises(ij.InputError, match=message) as error:
        ij.monte_carlo_kernels(small(X), X, **(dict(key=jax.random.key(0), draws=4) | change))
    assert all(error.value.parts)


def test_overflowing_draws_and_dependent_examples_are_refused():
    explosive = nn.Sequential([nn.Dense(4, param_dtype=jnp.float64), lambda x: jnp.exp(1000 * jnp.abs(x))])
    with pytest.raises(ij.InputError, match=r"NaN or infinite[\s\S]*ij.inspect"):
        ij.monte_carlo_kernels(explosive, X, key=jax.random.key(0), draws=4)
    normed = nn.Sequential([nn.Dense(4, param_dtype=jnp.float64), lambda x: x - x.mean(0, keepdims=True)])
    with pytest.raises(ij.InputError, match=r"changes with another example"):
        ij.monte_carlo_kernels(normed, X, key=jax.random.key(0), draws=4)
