"""Every number of the theory that a paper or a careful derivation states, at the digits that it states.

Facts already held elsewhere: the 200-bit tables (test_meanfield.py, test_gaussian.py), power laws at criticality
(test_universality.py). Here: closed forms, published digits, and the traps that a naive implementation falls into.
"""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

import initjax as ij
from initjax.gaussian import bivariate
from initjax.gaussian.expect import host_rule
from initjax.gaussian.matrix import matrix_pair
from initjax.meanfield.line import bias_variance, critical_line


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def bell(x):
    return x * jnp.exp(-x * x)


REAL_LINE = {"linear": lambda x: x, "abs": jnp.abs, "relu": jax.nn.relu, "leaky": jax.nn.leaky_relu}


# -- duals: one row of the table of closed forms a test, at (q1, q2, c) = (0.7, 1.3, 0.6) ---------------------------

Q1, Q2, C = 0.7, 1.3, 0.6
R, S, THETA = math.sqrt(Q1 * Q2), math.sqrt(1 - C * C), math.acos(C)
K = C * R
PI = math.pi


def gelu_rows():
    a, b = 1 + Q1, 1 + Q2
    delta = a * b - K * K
    p = 1 / (2 * PI * math.sqrt(delta))
    f = 0.25 + math.asin(K / math.sqrt(a * b)) / (2 * PI)
    return (
        K * f + p * (Q1 * Q2 - K * K + K * K / a + K * K / b),
        f + K * p * (1 / a + 1 / b + 1 / delta),
    )


def monomial(n, k, q1, q2):
    def double_factorial(m):
        return math.prod(range(m, 0, -2))

    return sum(
        (math.factorial(n) / double_factorial(n - j)) ** 2 / math.factorial(j) * k**j * (q1 * q2) ** ((n - j) / 2)
        for j in range(n % 2, n + 1, 2)
    )


E_BELL = (1 + 2 * Q1) * (1 + 2 * Q2) - 4 * K * K
E_ERF = (1 + 2 * Q1) * (1 + 2 * Q2)
D_BELL = (1 + Q1) * (1 + Q2) - K * K
RELU = R * (S + (PI - THETA) * C) / (2 * PI)
RELU_PRIME = (PI - THETA) / (2 * PI)
ABS, ABS_PRIME = 2 * R / PI * (S + C * math.asin(C)), 2 / PI * math.asin(C)
WAVE = math.exp(-(Q1 + Q2) / 2)
SUM, DIFFERENCE = ((1 + 0.2) / 2) ** 2, ((1 - 0.2) / 2) ** 2
ROWS = {
    "x": (lambda x: x, K, 1.0),
    "step": (lambda x: jnp.where(x > 0, 1.0, 0.0) + 0 * x, (PI - THETA) / (2 * PI), 0.0),
    "relu": (jax.nn.relu, RELU, RELU_PRIME),
    "relu^2": (
        lambda x: jax.nn.relu(x) ** 2,
        R * R * (3 * S * C + (PI - THETA) * (1 + 2 * C * C)) / (2 * PI),
        4 * RELU,
    ),
    "abs": (jnp.abs, ABS, ABS_PRIME),
    "leaky": (
        lambda x: jax.nn.leaky_relu(x, 0.2),
        SUM * K + DIFFERENCE * ABS,
        SUM + DIFFERENCE * ABS_PRIME,
    ),
    "sign": (jnp.sign, 2 / PI * math.asin(C), 0.0),
    "erf": (erf, 2 / PI * math.asin(2 * K / math.sqrt(E_ERF)), 4 / PI / math.sqrt(E_ERF - 4 * K * K)),
    "sin": (jnp.sin, WAVE * math.sinh(K), WAVE * math.cosh(K)),
    "cos": (jnp.cos, WAVE * math.cosh(K), WAVE * math.sinh(K)),
    "exp": (
        lambda x: jnp.exp(0.5 * x),
        math.exp((Q1 + Q2 + 2 * K) / 8),
        math.exp((Q1 + Q2 + 2 * K) / 8) / 4,
    ),
    "gelu": (exact_gelu, *gelu_rows()),
    "exp(-x^2/2)": (lambda x: jnp.exp(-x * x / 2), D_BELL**-0.5, K * D_BELL**-1.5),
    "x exp(-x^2)": (bell, K * E_BELL**-1.5, E_BELL**-1.5 + 12 * K * K * E_BELL**-2.5),
    "x^2": (lambda x: x**2, monomial(2, K, Q1, Q2), 4 * monomial(1, K, Q1, Q2)),
    "x^3": (lambda x: x**3, monomial(3, K, Q1, Q2), 9 * monomial(2, K, Q1, Q2)),
    "x^5": (lambda x: x**5, monomial(5, K, Q1, Q2), 25 * monomial(4, K, Q1, Q2)),
}


@pytest.mark.parametrize("name", ROWS)
def test_table_of_closed_forms(name):
    phi, dual, dual_prime = ROWS[name]
    # both sides are rounding of float64 sums; the derivative's dual is the a.e. one, 0 for steps
    np.testing.assert_allclose(ij.gaussian.dual(phi, Q1, Q2, C), dual, rtol=1e-12)
    np.testing.assert_allclose(ij.gaussian.dual_prime(phi, Q1, Q2, C), dual_prime, rtol=1e-12, atol=1e-15)
    act = ij.Activation(phi)
    # and by a route that knows no closed form
    np.testing.assert_allclose(bivariate.direct(act, act, Q1, Q2, C, S), dual, rtol=1e-11)


def test_two_gelus_differ_in_the_fourth_digit():
    np.testing.assert_allclose(ij.gaussian.moment(exact_gelu, 1.0), 0.4252215, atol=5e-8)  # seven printed digits
    np.testing.assert_allclose(ij.gaussian.moment(jax.nn.gelu, 1.0), 0.4251937, atol=5e-8)
    exact, tanh = ij.universality(exact_gelu), ij.universality(jax.nn.gelu)
    assert 1e-5 < abs(exact.sigma_w**2 / tanh.sigma_w**2 - 1) < 1e-3


def test_waves_do_not_overflow_at_large_variance():
    # exp(-q) cosh(q c) with cosh alone infinite at q = 1e4: (1 + e^{-2q}) / 2 at c = 1
    assert ij.gaussian.dual(jnp.cos, 1e4, 1e4, 1.0) == 0.5
    np.testing.assert_allclose(ij.gaussian.dual(jnp.sin, 1e4, 1e4, 1 - 1e-4), np.exp(-1.0) / 2, rtol=1e-11)


def test_hermite_coefficients_fall_as_kinks_and_jumps_demand():
    for phi, power in ((jax.nn.relu, 2.5), (jnp.sign, 1.5)):
        a = ij.gaussian.hermite(phi, 1.0, 401)
        size = a[200:].reshape(-1, 2).max(axis=1) ** 2 + a[200:].reshape(-1, 2).min(axis=1) ** 2  # one parity is zero
        slope = np.log(size[-1] / size[0]) / np.log(400 / 200)
        np.testing.assert_allclose(slope, -power, atol=0.05)  # next order 1 / k


# -- traps of quadrature ---------------------------------------------------------------------------------------------


def gauss_hermite(f, q, nodes):
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    with np.errstate(over="ignore"):
        return float(w @ f(np.sqrt(q) * z)) / np.sqrt(2 * np.pi)


def sech4(x):
    return 1 / np.cosh(np.minimum(np.abs(x), 300)) ** 4


def test_gauss_hermite_is_wrong_at_large_q_and_not_exact_at_one():
    np.testing.assert_allclose(ij.gaussian.moment(jnp.tanh, 1e4), 0.992021, atol=5e-7)
    assert gauss_hermite(lambda x: np.tanh(x) ** 2, 1e4, 100) > 0.999999
    np.testing.assert_allclose(ij.gaussian.moment_prime(jnp.tanh, 1e4), 5.32e-3, rtol=1e-3)
    assert gauss_hermite(sech4, 1e4, 50) < 1e-30  # and 1 / D explodes
    ratio = gauss_hermite(sech4, 100.0, 50) / ij.gaussian.moment_prime(jnp.tanh, 100.0)
    assert ratio < 1 / 3 or ratio > 3  # off by four times
    # even at q = 1: 4e-8 on tanh^2, 1e-6 on sech^4
    assert abs(gauss_hermite(lambda x: np.tanh(x) ** 2, 1.0, 50) - ij.gaussian.moment(jnp.tanh, 1.0)) > 1e-8
    assert abs(gauss_hermite(sech4, 1.0, 50) - ij.gaussian.moment_prime(jnp.tanh, 1.0)) > 3e-7
    # relu^2 hides the defect: exact by symmetry
    assert abs(gauss_hermite(lambda x: np.maximum(x, 0) ** 2, 1.0, 50) - 0.5) < 1e-13


def test_second_derivatives_lose_the_kink_and_chi_q_does_not():
    # dM/dq = E[u phi phi'] / q; D + E[phi phi''] without the delta in phi'' is 6 times too large here
    phi, q, h = jax.nn.hard_tanh, 2.0, 1e-5
    point = ij.fixed_point(phi, 1.5, 0.3)
    naive = 1.5**2 * ij.gaussian.moment_prime(phi, point.q)
    step = (ij.gaussian.moment(phi, point.q + h) - ij.gaussian.moment(phi, point.q - h)) / (2 * h)
    np.testing.assert_allclose(point.chi_q, 1.5**2 * step, rtol=1e-8)  # central difference: h^2, 1e-16 / h
    assert naive > 1.3 * point.chi_q
    slope = jax.grad(lambda v: ij.gaussian.moment(phi, v))(q)
    step = (ij.gaussian.moment(phi, q + h) - ij.gaussian.moment(phi, q - h)) / (2 * h)
    np.testing.assert_allclose(slope, step, rtol=1e-8)


def test_the_kink_of_relu_is_lost_by_subtraction_beside_the_diagonal():
    delta = 2.0**-34
    path = ij.propagate(jax.nn.relu, np.sqrt(2), 0.0, 1, c0=1 - delta)
    # 1 - C = delta - (2 sqrt 2 / 3 pi) delta^(3/2) (1 + O(delta))
    kink = 2 * np.sqrt(2) / (3 * np.pi) * delta**1.5
    np.testing.assert_allclose(path.one_minus_c[1], delta - kink, rtol=1e-15)
    c = 1 - delta
    naive = (np.sqrt(1 - c * c) + (np.pi - np.arccos(c)) * c) / np.pi
    assert abs((delta - (1 - naive)) / kink - 1) > 0.1  # no digit left


def test_derivative_of_a_kernel_is_finite_on_its_diagonal():
    def naive(c):
        return (jnp.sqrt(1 - c * c) + (jnp.pi - jnp.arccos(c)) * c) / (2 * jnp.pi)

    assert not np.isfinite(jax.grad(naive)(1.0))
    np.testing.assert_allclose(jax.grad(lambda c: ij.gaussian.dual(jax.nn.relu, 1.0, 1.0, c))(1.0), 0.5, rtol=1e-12)


# -- the variance map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, m", [("linear", 1.0), ("abs", 1.0), ("relu", 0.5), ("leaky", (1 + 1e-4) / 2)])
def test_homogeneous_variance_maps(name, m):
    phi, b = REAL_LINE[name], 0.3
    inside = ij.fixed_point(phi, np.sqrt(0.8 / m), b)
    np.testing.assert_allclose(inside.q, b * b / 0.2, rtol=1e-12)  # 1 / (1 - a) = 5 amplifies rounding
    np.testing.assert_allclose([inside.chi_1, inside.chi_q], 0.8, rtol=1e-14)
    grown = ij.propagate(phi, np.sqrt(1 / m), b, 50, q0=2.0)
    np.testing.assert_allclose(grown.q[-1], 2.0 + 50 * b * b, rtol=1e-12)  # linear growth at a = 1
    assert ij.fixed_point(phi, np.sqrt(1.2 / m), b).phase == "unbounded"


def test_variance_maps_of_superlinear_activations_diverge_from_far_and_may_rest_near():
    assert ij.fixed_point(lambda x: x**2, 0.3, 0.2, q0=0.1).q < 0.1
    assert np.isinf(ij.fixed_point(lambda x: x**2, 0.3, 0.2, q0=100.0).q)


def test_slopes_of_asymptotically_linear_activations_at_infinity():
    for phi, slope in ((exact_gelu, 0.5), (jax.nn.silu, 0.5), (jax.nn.softplus, 0.5), (jax.nn.mish, 0.5)):
        # V / q -> (a_+^2 + a_-^2) / 2; the correction falls like q^(-1/2)
        np.testing.assert_allclose(ij.gaussian.moment(phi, 1e8) / 1e8, slope, rtol=1e-3)


def test_chi_q_can_be_negative():
    for phi, w in ((jnp.cos, 1.5), (bell, 3.0)):
        point = ij.fixed_point(phi, w, 0.2)
        assert point.chi_q < 0
        np.testing.assert_allclose(point.xi_q, -1 / np.log(abs(point.chi_q)), rtol=1e-9)


def test_dead_networks_are_at_zero_and_not_where_iteration_stopped():
    assert ij.fixed_point(jnp.tanh, 1.0, 0.0).q == 0
    # plain iteration until |dq| < tol stops near sqrt(tol / 2): q falls by 2 q^2 a layer
    q, tolerance = 1.0, 1e-7
    while True:
        new = float(ij.propagate(jnp.tanh, 1.0, 0.0, 1, q0=q, c0=1.0).q[1])
        if abs(new - q) < tolerance:
            break
        q = new
    np.testing.assert_allclose(q, np.sqrt(tolerance / 2), rtol=0.05)


# -- the correlation map ---------------------------------------------------------------------------------------------


def test_zero_correlation_is_fixed_exactly_for_odd_activations_without_bias():
    assert ij.fixed_point(jnp.tanh, 2.0).c == 0 and ij.fixed_point(erf, 1.5).c == 0
    assert ij.fixed_point(jnp.tanh, 2.0, 0.1).c > 0
    assert 0 < ij.fixed_point(exact_gelu, 1.41, 1.0).c < 1


def test_slope_off_the_fixed_point_carries_q_over_v():
    w, b, q = 1.5, 0.2, 3.0
    path = ij.propagate(jnp.tanh, w, b, 1, q0=q, c0=1 - 1e-9)
    slope = path.one_minus_c[1] / path.one_minus_c[0]
    true = w * w * ij.gaussian.moment_prime(jnp.tanh, q) * q / path.q[1]
    np.testing.assert_allclose(slope, true, rtol=1e-8)  # C''(1) delta
    assert abs(slope / path.chi[0] - 1) > 0.3  # chi alone is not the slope off the fixed point


def test_coarse_scans_of_c_miss_the_fixed_point_of_gelu():
    point = ij.fixed_point(exact_gelu, 1.41, 1.0)
    c = np.linspace(0, 0.999, 200)
    gap = (1.41**2 * ij.gaussian.dual(exact_gelu, point.q, point.q, c) + 1.0) / point.q - c
    assert np.all(gap > 0)  # no sign change on the scan: "c* = 1"
    np.testing.assert_allclose(1 - point.c, 6.9e-4, rtol=1e-2)  # two printed digits


@pytest.mark.parametrize(
    "depth, value, digits",
    [(1000, 43.13, 5e-3), (10_000, 44.25, 5e-3), pytest.param(100_000, 44.394, 5e-4, marks=pytest.mark.slow)],
)
def test_relu_correlations_at_criticality(depth, value, digits):
    path = ij.propagate(jax.nn.relu, np.sqrt(2), 0.0, depth, c0=0.0)
    # printed digits, from c0 = 0; the start only shifts l by a few layers (1e-5 at the largest depth)
    np.testing.assert_allclose(depth**2 * path.one_minus_c[-1], value, atol=digits + 3 * value / depth)


def test_smooth_correlations_at_criticality():
    law = ij.universality(jnp.tanh, 0.3)
    np.testing.assert_allclose(law.c_amplitude, 4.2827, atol=5e-5)
    path = ij.propagate(jnp.tanh, law.sigma_w, 0.3, 3000, q0=law.q)
    np.testing.assert_allclose(3000 * path.one_minus_c[-1], 4.2985, atol=2e-2)  # from another c0: a shift of l by a few


@pytest.mark.slow
def test_tanh_variance_at_criticality_to_a_hundred_thousand_layers():
    path = ij.propagate(jnp.tanh, 1.0, 0.0, 100_000, c0=1.0)
    for depth, value in ((1000, 0.50116), (100_000, 0.50002)):
        np.testing.assert_allclose(depth * path.q[depth], value, atol=6e-6)  # five printed digits
    assert ij.propagate(jnp.tanh, 1.0, 0.0, 3000).c[-1] == pytest.approx(0.44054, abs=5e-5)  # 0.5 freezes here


def test_elu_variance_at_criticality():
    path = ij.propagate(jax.nn.elu, 1.0, 0.0, 10_000, c0=1.0)
    np.testing.assert_allclose(1e8 * path.q[-1], 6.2938, atol=5e-5)


# -- the edge of chaos -----------------------------------------------------------------------------------------------

TABLE = [
    (jnp.tanh, [(0.0, 1.0, 0.0), (0.05, 1.12254, 0.15369), (0.3, 1.39558, 0.76347), (1.0, 1.85559, 3.0364)]),
    (erf, [(0.0, 0.886227, 0.0), (0.05, 0.993687, 0.14515), (0.3, 1.233673, 0.68877), (1.0, 1.648751, 2.74489)]),
    (exact_gelu, [(0.05, 1.85190, 0.07517), (0.3, 1.45047, 1.42487), (1.0, 1.40594, 82.313)]),
]


@pytest.mark.filterwarnings("ignore::initjax.UnstableCriticalPointWarning")
@pytest.mark.parametrize("phi, rows", TABLE)
def test_printed_table_of_critical_points(phi, rows):
    for sigma_b, sigma_w, q in rows:
        point = ij.critical(phi, sigma_b)
        np.testing.assert_allclose(point.sigma_w, sigma_w, atol=6e-6)  # printed digits
        np.testing.assert_allclose(point.q, q, rtol=7e-5)  # four of them at worst


def test_gelu_is_unstable_below_its_half_stable_bias_and_stable_above():
    special = np.sqrt(0.172922390756067)
    (below,), (above,) = ij.critical_points(exact_gelu, 0.95 * special), ij.critical_points(exact_gelu, 1.05 * special)
    assert below.chi_q > 1 and not below.stable and above.chi_q < 1 and above.stable
    np.testing.assert_allclose(ij.critical_points(exact_gelu, 1.0)[0].chi_q, 0.98858, atol=5e-6)


def test_critical_line_near_zero():
    q = np.array([1e-3, 1e-4])
    # tanh: f = (4/3) q^3 (next order q, 8 times); a general phi: f = (s^2/4) q^2, s^2 = (2 tanh 0.3)^2
    np.testing.assert_allclose(bias_variance(ij.Activation(jnp.tanh), q)[0] / q**3, 4 / 3, rtol=2e-2)
    shifted = ij.Activation(lambda x: jnp.tanh(x + 0.3) - jnp.tanh(0.3))
    s = 2 * np.tanh(0.3)
    np.testing.assert_allclose(bias_variance(shifted, q)[0] / q**2, s * s / 4, rtol=2e-2)


def test_hard_tanh_leaves_zero_only_logarithmically_in_the_bias():
    for sigma_b in (1e-4, 1e-8):
        q = ij.critical(jax.nn.hard_tanh, sigma_b).q
        # f = 2 q^2 p_q(1) (1 + O(q)): 1/q = 4 ln(1/sigma_b) + 3 ln q + ln(2/pi), of which the first term wins slowly
        np.testing.assert_allclose(1 / q, 4 * np.log(1 / sigma_b) + 3 * np.log(q) + np.log(2 / np.pi), rtol=5e-2)


def test_float32_loses_the_critical_line_near_zero_bias():
    q = np.float32(1e-3)
    m, d = np.float32(ij.gaussian.moment(jnp.tanh, q)), np.float32(ij.gaussian.moment_prime(jnp.tanh, q))
    naive = float(q - m / d)  # f = 1.3e-9 beside rounding of 1e-10
    exact = bias_variance(ij.Activation(jnp.tanh), np.array([float(q)]))[0][0]
    assert abs(naive / exact - 1) > 1e-3
    point = ij.critical(jnp.tanh, 1e-7)
    np.testing.assert_allclose(point.q, (0.75e-14) ** (1 / 3), rtol=1e-3)


def test_softplus_is_nowhere_critical_and_sigmoid_is():
    line = critical_line(ij.Activation(jax.nn.softplus))
    assert np.all(line.f < 0)
    assert ij.critical_points(jax.nn.sigmoid, 0.0)[0].q > 10


def test_selu_has_two_slopes_at_zero():
    lam, alpha = 1.0507009873554805, 1.6732632423543772
    point = ij.critical(jax.nn.selu)
    np.testing.assert_allclose(point.sigma_w**2, 2 / (lam**2 * (1 + alpha**2)), rtol=1e-7)  # constants of 7 digits
    assert abs(point.sigma_w - 1 / lam) > 0.2 and abs(point.sigma_w - 1 / (lam * alpha)) > 0.1


# -- means, gains, and what the shapes of other conventions give -----------------------------------------------------


def test_means_and_the_gain_after_centering():
    q = 1.7
    for phi, mean in (
        (jax.nn.relu, np.sqrt(q / (2 * np.pi))),
        (jnp.abs, np.sqrt(2 * q / np.pi)),
        (jax.nn.leaky_relu, 0.99 * np.sqrt(q / (2 * np.pi))),
        (jnp.exp, np.exp(q / 2)),
        (exact_gelu, q / np.sqrt(2 * np.pi * (1 + q))),
    ):
        np.testing.assert_allclose(ij.gaussian.mean(phi, q), mean, rtol=1e-12)
    np.testing.assert_allclose(ij.gaussian.mean(exact_gelu, 1.0), 0.28209, atol=5e-6)
    np.testing.assert_allclose(ij.gain(jax.nn.relu, "centered") ** 2, 2.9339, atol=5e-5)
    # consecutive inputs of a unit share their sign: cosine 1 / pi of unrelated inputs
    path = ij.propagate(jax.nn.relu, np.sqrt(2), 0.0, 1, c0=0.0)
    np.testing.assert_allclose(path.c[1], 1 / np.pi, rtol=1e-13)
    # no finite scalar bias gives relu(x + b) a zero mean
    assert all(ij.gaussian.mean(lambda x: jax.nn.relu(x + b), 1.0) > 0 for b in (-3.0, 0.0))  # noqa: B023


def test_the_library_gain_of_tanh_is_chaotic():
    point = ij.fixed_point(jnp.tanh, 5 / 3)
    assert point.phase == "chaotic"
    np.testing.assert_allclose([point.q, point.chi_1], [1.17848, 1.20983], atol=6e-6)
    # sigma_w = 1, what Xavier gives at equal fans: gradients vanish only like 1 / l
    path = ij.propagate(jnp.tanh, 1.0, 0.0, 1000)
    np.testing.assert_allclose(path.log_gradient[500] / np.log(2), -1.0, rtol=1e-2)  # log(l) / l


def test_deep_linear_networks_are_typically_smaller_than_on_average():
    # |h_L|^2 / |x|^2 is a product of L independent chi^2_n / n: mean 1, median about exp(-L / n)
    n, depth, draws = 20, 10, 20_000
    log = np.log(np.random.default_rng(0).chisquare(n, (draws, depth)) / n).sum(axis=1)
    from scipy.special import psi

    typical = depth * (psi(n / 2) - np.log(n / 2))
    assert abs(log.mean() - typical) < 4 * log.std() / np.sqrt(draws)
    np.testing.assert_allclose(typical, -depth / n, rtol=0.05)  # next order 1 / n
    squares = np.exp(log)
    assert abs(squares.mean() - 1) < 4 * squares.std() / np.sqrt(draws)


def test_scaling_the_variance_scales_gradients_geometrically_only_when_homogeneous():
    depth, alpha = 20, 0.7
    for phi, geometric in ((jax.nn.relu, True), (jnp.tanh, False)):
        one = ij.propagate(phi, 1.3, 0.0, depth, c0=1.0)
        less = ij.propagate(phi, 1.3 * np.sqrt(alpha), 0.0, depth, c0=1.0)
        ratio = (less.log_gradient[0] - one.log_gradient[0]) / (depth * np.log(alpha))
        assert (abs(ratio - 1) < 1e-12) == geometric


def test_truncated_normal_has_its_variance_after_truncation():
    from scipy.stats import truncnorm

    np.testing.assert_allclose(truncnorm(-2, 2).std(), 0.87962566103423978, rtol=1e-12)
    draw = (
        ij.initializers.he_normal()(jax.random.key(0), (2000, 300)) if hasattr(ij.initializers, "he_normal") else None
    )
    if draw is not None:
        # 600,000 draws: relative standard error of the variance 2e-3
        np.testing.assert_allclose(np.var(np.asarray(draw)), 2 / 2000, rtol=1e-2)


def test_hermite_recurrence_stays_finite_where_he_overflows():
    a = ij.gaussian.hermite(jnp.tanh, 4.0, 400)  # He_400 itself is of order 1e430
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(np.sum(a * a), ij.gaussian.moment(jnp.tanh, 4.0), rtol=1e-6)


def test_unequal_variances_at_full_correlation_are_one_dimensional():
    act = ij.Activation(lambda x: jnp.tanh(x) * jnp.tanh(-3 * x))
    value = host_rule(act, lambda u, f, s: [f], np.array([0.5]), 1)[0, 0]
    np.testing.assert_allclose(ij.gaussian.dual(jnp.tanh, 0.5, 4.5, -1.0), value, rtol=1e-11)


def test_series_of_unequal_variances_are_taken_to_one_length():
    act, q, c = ij.Activation(jnp.tanh), np.array([0.05, 4.5]), 0.999
    exact = bivariate.direct(act, act, *q, c, np.sqrt((1 - c) * (1 + c)))
    scale = np.sqrt(np.prod(ij.gaussian.moment(jnp.tanh, q)))
    # each series alone may end at 1e-13 in squared norm; cut to the shorter one, the pair would be 1e-9 off
    assert abs(ij.gaussian.dual(jnp.tanh, *q, c) - exact) < 1e-12 * scale
    matrix = matrix_pair(act, act, q, q, np.full((2, 2), c))
    assert matrix is not None and abs(matrix[0, 1] - exact) < 1e-12 * scale


def test_every_test_that_the_theory_page_names_exists():
    root = pathlib.Path(__file__).parents[1]
    named = re.findall(r"`tests/(\w+\.py)::(\w+)`", (root / "docs" / "theory.md").read_text())
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (root / "tests" / file).read_text(), name
