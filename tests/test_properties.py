"""Properties that hold for every activation, drawn by hypothesis: the shape of the maps, slopes, batching, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.scipy.special import erf

import initjax as ij


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def shifted_relu(x):
    return jax.nn.relu(x - 0.7)


# smooth, kink at 0, kinks elsewhere, growth; with closed form and without
ZOO = {
    "tanh": jnp.tanh,
    "erf": erf,
    "gelu": exact_gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "hard_tanh": jax.nn.hard_tanh,
    "shifted relu": shifted_relu,
    "elu": jax.nn.elu,
    "cube": lambda x: x**3,
    "cos": jnp.cos,
}
NAMES = st.sampled_from(sorted(ZOO))
# few second moments: each new one costs a table or a series
MOMENTS = st.sampled_from([0.05, 0.2, 1.0, 7.5])
CLOSED = st.sampled_from(["relu", "erf", "gelu", "cos"])  # these may be asked at any q cheaply
few = settings(max_examples=25, deadline=None, derandomize=True)


def c_map(phi, q, c, sigma_b=0.3):
    """C(c) with sigma_w such that q is a fixed point of the variance map."""
    variance_w = (q - sigma_b**2 * q) / ij.gaussian.moment(phi, q)  # bias variance: the share sigma_b^2 of q
    return (variance_w * ij.gaussian.dual(phi, q, q, c) + sigma_b**2 * q) / q


@few
@given(NAMES, MOMENTS, st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=8))
@example("tanh", 1.0, [-1.0, 1.0])
@example("cos", 7.5, [-1.0, 0.0, 1.0])
def test_the_correlation_map_stays_within_one(name, q, c):
    image = c_map(ZOO[name], q, np.array(c))
    # Cauchy-Schwarz; 1e-11 is the room of the series' cut tail
    assert np.all(np.abs(image) <= 1 + 1e-11)
    np.testing.assert_allclose(c_map(ZOO[name], q, 1.0), 1.0, rtol=1e-12)


@few
@given(NAMES, MOMENTS, st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3, unique=True))
def test_the_correlation_map_rises_and_is_convex_on_positive_correlations(name, q, c):
    low, middle, high = sorted(c)
    image = c_map(ZOO[name], q, np.array([low, middle, high]))
    # Mehler: all coefficients are non-negative. 1e-11: accuracy of the dual
    assert image[0] <= image[1] + 1e-11 and image[1] <= image[2] + 1e-11
    share = (middle - low) / (high - low)
    assert image[1] <= (1 - share) * image[0] + share * image[2] + 1e-11


@few
@given(CLOSED, st.floats(0.05, 20.0), st.floats(0.3, 3.0))
def test_chi_is_the_slope_of_the_correlation_map_at_one(name, q, sigma_w):
    phi = ZOO[name]
    path = ij.propagate(phi, sigma_w, 0.2, 1, q0=q, c0=1 - 2.0**-40)
    # off the fixed point C'(1) = chi q / V(q); a kink bends C by A sqrt(1 - c) < 1e-6
    slope = path.one_minus_c[1] / path.one_minus_c[0]
    np.testing.assert_allclose(slope, path.chi[0] * q / path.q[1], rtol=3e-6)


@pytest.mark.parametrize("name", ["tanh", "relu", "hard_tanh", "elu"])
def test_chi_is_the_derivative_that_jax_takes(name):
    phi, q = ZOO[name], 1.3
    slope = jax.grad(lambda c: ij.gaussian.dual(phi, q, q, c))(1.0)
    # d/dc dual = q dual'(c) by Price, and dual'(1) = E[phi'^2]; nested quadrature against one-dimensional: 1e-9
    np.testing.assert_allclose(slope, q * ij.gaussian.moment_prime(phi, q), rtol=1e-9)


@few
@given(NAMES, MOMENTS, st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=5))
def test_batches_equal_loops(name, q, c):
    phi, c = ZOO[name], np.array(c)
    together = ij.gaussian.dual(phi, q, 2 * q, c)
    alone = np.array([ij.gaussian.dual(phi, q, 2 * q, float(v)) for v in c])
    scale = np.sqrt(ij.gaussian.moment(phi, q) * ij.gaussian.moment(phi, 2 * q))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu"])
def test_vmapped_equals_looped(name):
    phi = ZOO[name]
    w = np.array([0.9, 1.3, 1.7])
    mapped = jax.vmap(lambda s: ij.fixed_point(phi, s, 0.4).q)(jnp.asarray(w))
    looped = np.array([ij.fixed_point(phi, s, 0.4).q for s in w])
    # Newton on the same table in jax.numpy; 1e-9 is the amplification by 1 / (1 - chi_q) near criticality
    np.testing.assert_allclose(mapped, looped, rtol=1e-9)
    q = jnp.array([0.3, 1.0, 4.0])
    mapped = jax.vmap(lambda v: ij.gaussian.moment(phi, v))(q)
    np.testing.assert_allclose(mapped, [ij.gaussian.moment(phi, float(v)) for v in q], rtol=1e-12)


@few
@given(CLOSED, st.floats(0.1, 10.0), st.floats(-0.99, 0.99))
def test_duals_are_symmetric_and_scale_with_the_output(name, q, c):
    phi = ZOO[name]
    one = ij.gaussian.dual(phi, q, 3.0, c)
    np.testing.assert_allclose(ij.gaussian.dual(phi, 3.0, q, c), one, rtol=1e-12, atol=1e-14)


@few
@given(st.sampled_from(["relu", "abs", "leaky"]), st.floats(1e-6, 1e6), st.floats(0.2, 1.3))
def test_homogeneous_networks_only_rescale(name, scale, sigma_w):
    phi = {"relu": jax.nn.relu, "abs": jnp.abs, "leaky": jax.nn.leaky_relu}[name]
    one = ij.propagate(phi, sigma_w, 0.0, 5, q0=1.0, c0=0.3)
    many = ij.propagate(phi, sigma_w, 0.0, 5, q0=scale, c0=0.3)
    np.testing.assert_allclose(many.q, scale * one.q, rtol=1e-13)
    np.testing.assert_allclose(many.c, one.c, rtol=1e-12)


ANYTHING = st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=3), st.complex_numbers())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ANYTHING)
@example(float("nan"))
@example(-0.0)
@example(1e308)
@example("1.0")
@example(None)
def test_any_sigma_is_answered_or_refused_in_four_parts(value):
    try:
        point = ij.fixed_point(jax.nn.relu, value, 0.1)
    except ij.InputError as error:
        for part in ("Accepted:", "Why:", "Try:"):
            assert part in str(error)
    else:
        assert isinstance(value, (int, float)) and value >= 0
        assert point.q > 0 and not np.isnan(point.q)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ANYTHING)
@example(1 + 1e-9)
@example(float("-inf"))
def test_any_correlation_is_answered_or_refused_in_four_parts(value):
    try:
        dual = ij.gaussian.dual(jax.nn.relu, 1.0, 1.0, value)
    except ij.InputError as error:
        for part in ("Accepted:", "Why:", "Try:"):
            assert part in str(error)
    else:
        assert isinstance(value, (int, float)) and abs(value) <= 1 + 1e-12
        assert 0 <= dual <= 0.5 + 1e-15


@pytest.mark.x64_off
@pytest.mark.parametrize("name", ["tanh", "gelu", "relu", "hard_tanh"])
def test_float32_stays_within_its_stated_accuracy(name):
    phi = ZOO[name]
    q = jnp.asarray([1e-3, 0.5, 2.0, 30.0], jnp.float32)
    for function, stated in ((ij.gaussian.moment, 3e-6), (ij.gaussian.moment_prime, 3e-6)):
        single = jax.jit(lambda v: function(phi, v))(q)  # noqa: B023
        assert single.dtype == jnp.float32
        # stated "about 1e-6": a few float32 roundings of a sum of some hundred terms
        np.testing.assert_allclose(single, function(phi, np.asarray(q, np.float64)), rtol=stated)


@pytest.mark.x64_off
def test_float32_fixed_points_and_duals_stay_within_their_stated_accuracy():
    point = jax.jit(lambda w: ij.fixed_point(erf, w, 0.3))(jnp.float32(1.5))
    exact = ij.fixed_point(erf, 1.5, 0.3)
    assert point.q.dtype == jnp.float32
    for field in ("q", "c", "chi_1", "chi_q"):
        np.testing.assert_allclose(getattr(point, field), getattr(exact, field), rtol=5e-5)  # stated: about 1e-5
    c = jnp.asarray([-1.0, -0.3, 0.8, 1.0], jnp.float32)
    got = jax.vmap(lambda v: ij.gaussian.dual(jax.nn.relu, jnp.float32(2.0), jnp.float32(2.0), v))(c)
    np.testing.assert_allclose(got, ij.gaussian.dual(jax.nn.relu, 2.0, 2.0, np.asarray(c, np.float64)), atol=2e-6)
