"""Fluctuations at finite width against exact laws and against simulation of the layer's random second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import initjax as ij


def simulated(phi, sigma_w, sigma_b, widths, q0, draws, seed):
    """S of every layer for many networks: given S, pre-activations are i.i.d. N(0, S), so no matrix is drawn."""
    rng = np.random.default_rng(seed)
    s = [np.full(draws, q0)]
    for n in widths:
        h = np.sqrt(s[-1])[:, None] * rng.normal(size=(draws, n))
        s.append(sigma_w**2 * np.mean(phi(h) ** 2, axis=1) + sigma_b**2)
    return np.stack(s)


def test_tanh_matches_simulation_in_variance_and_mean_shift():
    w, b, widths, draws = 1.3956, 0.3, [100] * 6, 40_000
    theory = ij.finite_width(jnp.tanh, w, b, widths, q0=0.5)
    s = simulated(np.tanh, w, b, widths, 0.5, draws, 0)
    variance = s.var(axis=1)[1:]
    # sampling error of a variance: sqrt(2 / draws) = 0.7 %, four of them; second order: about the index, 6 %
    np.testing.assert_allclose(theory.variance[1:], variance, rtol=0.08)
    shift = s.mean(axis=1) - theory.q
    error = np.sqrt(s.var(axis=1) / draws)
    assert np.all(np.abs(shift - (theory.mean - theory.q)) <= 4 * error + 0.1 * np.abs(shift))
    assert np.abs(shift[-1]) > 4 * error[-1]  # the shift is seen
    assert theory.reliable.all() and not theory.exact.any()


@pytest.mark.parametrize(
    "phi, numpy_phi, w, kappa", [(lambda x: x, lambda x: x, 1.0, 2), (jax.nn.relu, None, 2**0.5, 5)]
)
def test_homogeneous_laws_are_exact(phi, numpy_phi, w, kappa):
    widths = [20, 50, 10]
    theory = ij.finite_width(phi, w, widths=widths)
    ratio = 1 + theory.variance / theory.mean**2
    # products of four numbers in float64
    np.testing.assert_allclose(ratio, np.concatenate([[1], np.cumprod(1 + kappa / np.array(widths))]), rtol=1e-13)
    np.testing.assert_allclose(theory.kurtosis, 3 * ratio, rtol=1e-13)
    s = simulated(lambda x: x if kappa == 2 else np.maximum(x, 0), w, 0.0, widths, 1.0, 200_000, 1)[-1]
    logs = np.log(s[s > 0])
    assert abs(logs.mean() - theory.log_mean[-1]) < 4 * logs.std() / np.sqrt(logs.size)
    # sampling error of a variance of a nearly normal quantity: sqrt(2 / draws) = 0.3 %, five of them
    np.testing.assert_allclose(logs.var(), theory.log_variance[-1], rtol=0.016)
    assert theory.exact.all()


def test_leaky_relu_interpolates_the_two():
    a, n = 0.2, 40
    ratio = lambda t: 1 + t.variance[-1] / t.mean[-1] ** 2  # noqa: E731
    leaky = ij.finite_width(lambda x: jnp.where(x > 0, x, a * x), 1.0, widths=[n])
    np.testing.assert_allclose(ratio(leaky), 1 + (6 * (1 + a**4) / (1 + a**2) ** 2 - 1) / n, rtol=1e-13)


def test_bistability_is_told():
    gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    # sigma_w^2 = 2.2, sigma_b^2 = 0.01, n = 100: rare networks escape to the divergent branch
    with pytest.warns(ij.UnreliableExpansionWarning, match="unstable fixed point"):
        theory = ij.finite_width(gelu, 2.2**0.5, 0.1, [100] * 10)
    assert not theory.reliable.all()
    s = simulated(lambda h: np.asarray(gelu(h)), 2.2**0.5, 0.1, [100] * 10, 1.0, 4000, 2)
    assert s[-1].var() > 2 * theory.variance[-1]  # and indeed


@pytest.mark.parametrize("widths", [[0], [2.5], [-3], [[4]]])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ij.InputError, match="positive whole numbers"):
        ij.finite_width(jnp.tanh, 1.0, 0.1, widths)
