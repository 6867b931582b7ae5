"""Duals by Price's theorem applied twice, against nested quadrature and the Hermite series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import initjax as ij
from initjax.gaussian import bivariate
from initjax.gaussian.price import average_slope, curvature_of, graded_edges
from initjax.meanfield.chaos import Cell

LOCALISED = {"tanh": jnp.tanh, "gelu": jax.nn.gelu, "elu": jax.nn.elu, "hard_tanh": jax.nn.hard_tanh}


@pytest.mark.parametrize("name", LOCALISED)
def test_average_slope_equals_nested_quadrature(name):
    act = ij.gaussian.as_activation(LOCALISED[name])
    for q in (0.01, 2.0, 300.0):
        edges = graded_edges(act, q)
        moment, slope = ij.gaussian.moment(act, q), ij.gaussian.moment_prime(act, q)
        theta, w = average_slope(act, np.array([q]), np.array([slope]), edges, 14)
        for panel, node in ((len(edges) - 2, 7), (len(edges) - 3, 3), (0, 12)):
            t = theta[panel, node]
            delta = 2 * np.sin(t / 2) ** 2
            direct = (moment - bivariate.direct(act, act, q, q, np.cos(t), np.sin(t))) / (q * delta)
            # the reference subtracts two numbers of size M to get q w (1 - c): that is its error, ours is 1e-12
            allowed = 1e-12 + 1e-14 * moment / (q * delta * slope)
            assert abs(w[0, panel, node] / direct - 1) < allowed


def test_functions_without_localised_curvature_are_left_to_other_routes():
    for phi in (jnp.sin, lambda x: x**3, jnp.sign):
        assert not curvature_of(ij.Activation(phi)).usable


def test_both_tables_of_the_correlation_map_agree():
    phi = jnp.tanh
    act, other = ij.Activation(phi), ij.Activation(phi)
    curvature_of(other).usable = True
    by_series = Cell(act, 0)
    other.__dict__["_hermite"] = {}
    q = np.exp(0.5)
    slope = ij.gaussian.moment_prime(phi, q)
    theta, w = average_slope(other, np.array([q]), np.array([slope]), by_series.edges, 14)
    from initjax.meanfield.correlation import width_function

    series = width_function(act, q, ij.gaussian.moment(phi, q))(2 * np.sin(theta.ravel() / 2) ** 2)
    np.testing.assert_allclose(w.ravel(), series, rtol=1e-11)  # both routes 1e-12
