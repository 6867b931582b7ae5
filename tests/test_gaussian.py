"""Gaussian expectations against a 200-bit oracle, closed forms, mpmath, finite differences and each other."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import erf

import initjax as ij
from initjax.gaussian import bivariate
from initjax.gaussian.closed import recognise
from initjax.gaussian.expect import host_rule

ORACLE = json.loads((pathlib.Path(__file__).parent / "oracles" / "meanfield.json").read_text())["activations"]


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


REFERENCE = {"tanh": jnp.tanh, "relu": jax.nn.relu, "erf": erf, "gelu": exact_gelu}
# one of each kind: smooth, kink at 0, kinks elsewhere, jump, smooth kink, growth, oscillation
ZOO = {
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "hard_tanh": jax.nn.hard_tanh,
    "shifted relu": lambda x: jax.nn.relu(x - 0.7),
    "sign": jnp.sign,
    "cube": lambda x: x**3,
    "x sin x": lambda x: x * jnp.sin(x),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_moments_match_the_200_bit_oracle(name):
    phi = REFERENCE[name]
    for row in ORACLE[name]["moments"]:
        q = float(row["q"])
        # 1e-12: rounding of some thousand float64 terms; the oracle has 28 digits
        np.testing.assert_allclose(ij.gaussian.moment(phi, q), float(row["E_phi2"]), rtol=1e-12)
        np.testing.assert_allclose(ij.gaussian.moment_prime(phi, q), float(row["E_dphi2"]), rtol=1e-12)
        np.testing.assert_allclose(ij.gaussian.mean(phi, q), float(row["E_phi"]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", REFERENCE)
def test_duals_match_the_200_bit_oracle_by_every_route(name):
    phi = REFERENCE[name]
    act = ij.gaussian.as_activation(phi)
    for row in ORACLE[name]["duals"]:
        q1, q2, c = (float(row[k]) for k in ("q1", "q2", "c"))
        gamma, gamma_prime = float(row["gamma"]), float(row["gamma_prime"])
        scale = np.sqrt(ij.gaussian.moment(phi, q1) * ij.gaussian.moment(phi, q2))
        # the error is relative to sqrt(E phi(u)^2 E phi(v)^2): at c = 0 an odd phi has dual 0
        assert abs(ij.gaussian.dual(phi, q1, q2, c) - gamma) < 1e-12 * scale
        assert abs(bivariate.direct(act, act, q1, q2, c, np.sqrt((1 - c) * (1 + c))) - gamma) < 1e-12 * scale
        assert abs(ij.gaussian.dual_prime(phi, q1, q2, c) - gamma_prime) < 1e-12 * max(1.0, abs(gamma_prime))


def test_quadrature_agrees_with_mpmath_at_the_ends_of_the_range():
    with mpmath.workdps(30):
        for q in (1e-8, 1e8):
            edges = [k * 12 / 400 for k in range(401)] if q < 1 else [0] + [10 ** (k / 4 - 6) for k in range(29)]
            f = lambda z: mpmath.tanh(mpmath.sqrt(q) * z) ** 2 * mpmath.exp(-z * z / 2)  # noqa: B023, E731
            value = 2 * mpmath.quad(f, edges) / mpmath.sqrt(2 * mpmath.pi)
            # 1e-12: rounding in float64
            np.testing.assert_allclose(ij.gaussian.moment(jnp.tanh, q), float(value), rtol=1e-12)


def test_gauss_hermite_would_be_wrong_here():
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    naive = weights @ np.cosh(np.clip(100 * nodes, -300, 300)) ** -4.0 / np.sqrt(2 * np.pi)
    truth = ij.gaussian.moment_prime(jnp.tanh, 1e4)
    assert naive / truth > 10  # the trap this quadrature avoids: 17 times too large
    np.testing.assert_allclose(truth, float(ORACLE["tanh"]["moments"][-1]["E_dphi2"]), rtol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_limits_of_the_dual(name):
    phi = ZOO[name]
    q = np.array([1e-8, 0.3, 40.0])
    moment, mean = ij.gaussian.moment(phi, q), ij.gaussian.mean(phi, q)
    # c = 1 is the second moment, c = 0 the squared mean; 1e-11 covers the series' tail of 1e-13 in norm squared
    np.testing.assert_allclose(ij.gaussian.dual(phi, q, q, 1.0), moment, rtol=1e-11)
    np.testing.assert_allclose(ij.gaussian.dual(phi, q, q, 0.0), mean**2, rtol=1e-11, atol=1e-13 * moment.max())
    # unequal variances at c = 1 are a legal one-dimensional integral
    both = host_rule(ij.Activation(lambda x: phi(x) * phi(2 * x)), lambda u, f, s: [f], q, 1)[0]
    scale = np.sqrt(moment * ij.gaussian.moment(phi, 4 * q))
    assert np.all(np.abs(ij.gaussian.dual(phi, q, 4 * q, 1.0) - both) <= 1e-11 * scale)


@pytest.mark.parametrize(
    "fn, kinks",
    [
        (jax.nn.relu, (0.0,)),
        (jax.nn.relu6, (0.0, 6.0)),
        (jax.nn.hard_swish, (-3.0, 3.0)),
        (lambda x: jnp.abs(x + 1), (-1.0,)),
        (lambda x: jnp.where(x > 0.7, x, 0.0), (0.7,)),
        (lambda x: jnp.maximum(x * x, 1.0), (-1.0, 1.0)),
        (jnp.tanh, ()),
    ],
)
def test_kinks_are_read_from_the_program(fn, kinks):
    np.testing.assert_allclose(ij.Activation(fn).kinks, kinks, rtol=1e-14, atol=1e-14)


def test_a_kink_that_no_comparison_shows_is_found_by_bisection():
    hidden = lambda x: jnp.sqrt((x - 0.31) ** 2)  # noqa: E731  |x - 0.31| without an abs
    act = ij.Activation(hidden, kinks=())
    assert act.kinks == ()
    # |x - m|: folded normal second moment 1 + m^2; first moment sqrt(2/pi) e^{-m^2/2} + m erf(m/sqrt 2)
    m = 0.31
    exact = np.sqrt(2 / np.pi) * np.exp(-m * m / 2) + m * float(erf(m / np.sqrt(2)))
    np.testing.assert_allclose(ij.gaussian.mean(act, 1.0), exact, rtol=1e-10)  # kink isolated to 1e-11


@pytest.mark.parametrize(
    "fn, family",
    [
        (lambda x: 0.2 * jnp.maximum(x, 0), "ramp"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x), "ramp"),
        (jnp.sign, "step"),
        (lambda x: 1.3 * erf(0.7 * x), "erf"),
        (exact_gelu, "gelu"),
        (lambda x: jnp.sin(30 * x), "wave"),
        (lambda x: jnp.cos(1.7 * x + 0.3) + 2.0, "wave"),
        (lambda x: jax.nn.relu(x) ** 2, "quadratic"),
        (lambda x: jnp.exp(-0.3 * x), "exp"),
        (lambda x: x * jnp.exp(-x * x), "odd_bell"),
        (lambda x: jax.nn.relu(-x) ** 5 / 3, "power5"),
        (lambda x: x**3, "power3"),
        (lambda x: x**4 - 6 * x**2 + 3, "polynomial"),
        (lambda x: 1e-3 * x**10 - x**9 + x, None),  # its low coefficients would be rounding beside the high ones
        (jnp.tanh, None),
        (jax.nn.gelu, None),  # the tanh form differs from erf's in the fourth digit
        (lambda x: jnp.where(x > 0, x, 1e-9 * jnp.sin(x)), None),
    ],
)
def test_closed_forms_are_chosen_by_what_the_function_does(fn, family):
    member = recognise(ij.Activation(fn))
    assert (member.family if member else None) == family


@pytest.mark.parametrize(
    "fn",
    [
        erf,
        exact_gelu,
        lambda x: jnp.cos(1.7 * x + 0.3) + 2.0,
        lambda x: jax.nn.leaky_relu(x) ** 2,
        lambda x: jnp.where(x > 0, x**5, 0.2 * x**5),
        lambda x: x**3 - 2 * x + 0.5,
    ],
)
def test_closed_forms_equal_quadrature(fn):
    act = ij.Activation(fn)
    for q1, q2, c in ((0.7, 1.3, 0.6), (2.0, 0.4, -0.9), (1.0, 1.0, 0.9999)):
        s = np.sqrt((1 - c) * (1 + c))
        for f in (act, act.prime):
            scale = np.sqrt(ij.gaussian.expect(f.square, q1) * ij.gaussian.expect(f.square, q2))
            # 1e-12: both routes are accurate to rounding
            assert abs(ij.gaussian.pair(f, f, q1, q2, c) - bivariate.direct(f, f, q1, q2, c, s)) < 1e-12 * scale


def test_powers_and_polynomials_equal_their_exact_moments():
    for n in range(3, 9):
        cube = lambda x: x**n  # noqa: B023, E731
        # Isserlis: E u^n v^n at unit variance by Mehler's finite sum, in integers
        he = [math.sqrt(math.factorial(k)) * math.comb(n, k) * math.prod(range(n - k - 1, 0, -2)) for k in range(n + 1)]
        exact = sum(h * h * 0.3**k for k, h in enumerate(he) if (n - k) % 2 == 0)
        # 1e-14: a dozen products in float64
        np.testing.assert_allclose(ij.gaussian.dual(cube, 1.0, 1.0, 0.3), exact, rtol=1e-14)
        rectified = lambda x: jax.nn.relu(x) ** n  # noqa: B023, E731
        half = math.prod(range(2 * n - 1, 0, -2)) / 2  # E z_+^(2n)
        np.testing.assert_allclose(ij.gaussian.moment(rectified, 1.0), half, rtol=1e-14)
    hermite3 = lambda x: x**3 - 3 * x  # noqa: E731
    for c in (-1.0, 0.2, 1.0):
        np.testing.assert_allclose(ij.gaussian.dual(hermite3, 1.0, 1.0, c), 6 * c**3, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(ij.gaussian.mean(lambda x: x**4 - 6 * x**2 + 3, 2.0), 12 - 12 + 3, rtol=1e-14)


def test_oscillation_is_exact_at_every_q():
    wave = lambda x: jnp.sin(30 * x)  # noqa: E731
    for q in (1e-8, 1e-2, 1.0, 1e8):
        # E sin^2(w sqrt(q) z) = (1 - e^{-2 w^2 q}) / 2
        np.testing.assert_allclose(ij.gaussian.moment(wave, q), -np.expm1(-1800 * q) / 2, rtol=1e-13)


def central(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


@pytest.mark.parametrize("name", ["tanh", "hard_tanh", "cube"])
def test_derivatives_match_finite_differences(name):
    phi = ZOO[name]
    g = ij.gaussian
    for f in (g.mean, g.moment, g.moment_prime):
        slope = jax.grad(lambda q: f(phi, q))(0.7)  # noqa: B023
        # a central difference with h = 1e-5 has truncation 1e-10 and rounding 1e-11
        np.testing.assert_allclose(slope, central(lambda q: f(phi, q), 0.7), rtol=1e-7, atol=1e-9)  # noqa: B023
    for f in (g.dual, g.dual_prime):  # phi' of hard_tanh jumps: its deltas count
        slopes = jax.grad(lambda *a: f(phi, *a), (0, 1, 2))(0.7, 1.3, 0.6)  # noqa: B023
        expected = [
            central(lambda a: f(phi, a, 1.3, 0.6), 0.7),  # noqa: B023
            central(lambda a: f(phi, 0.7, a, 0.6), 1.3),  # noqa: B023
            central(lambda a: f(phi, 0.7, 1.3, a), 0.6),  # noqa: B023
        ]
        np.testing.assert_allclose(slopes, expected, rtol=1e-7, atol=1e-9)


def test_derivatives_of_closed_forms_in_the_variances():
    slopes = jax.jit(jax.grad(lambda *a: ij.gaussian.dual(jnp.cos, *a), (0, 1, 2)))(0.7, 1.3, 0.6)
    q1, q2, c = 0.7, 1.3, 0.6
    r, damp = np.sqrt(q1 * q2), np.exp(-(q1 + q2) / 2)  # E cos u cos v = damp cosh(c r)
    k = c * r
    exact = [damp * (np.sinh(k) * k / (2 * q) - np.cosh(k) / 2) for q in (q1, q2)] + [damp * np.sinh(k) * r]
    np.testing.assert_allclose(slopes, exact, rtol=1e-13)


@pytest.mark.parametrize("phi", [jax.nn.relu, jnp.tanh])
def test_prices_theorem_holds_at_the_ends(phi):
    for c in (1.0, -1.0):
        slope = jax.grad(lambda c: ij.gaussian.dual(phi, 1.0, 1.0, c))(c)
        # d/dc dual = q dual_prime at q = 1, where arccos and sqrt have infinite derivatives
        np.testing.assert_allclose(slope, ij.gaussian.dual_prime(phi, 1.0, 1.0, c), rtol=1e-12, atol=1e-15)
    slope = jax.grad(lambda q: ij.gaussian.moment(phi, q))(0.0)
    np.testing.assert_allclose(slope, ij.gaussian.moment_prime(phi, 0.0), rtol=1e-8)  # dM/dq(0) = D(0)


def test_vmap_and_jit_agree_with_concrete_values():
    q = jnp.array([0.2, 3.0])
    c = jnp.array([0.3, -0.8])
    mapped = jax.jit(jax.vmap(lambda q, c: ij.gaussian.dual(jnp.tanh, q, 1.0, c)))(q, c)
    # nested quadrature in jax.numpy against the Hermite series
    np.testing.assert_allclose(mapped, ij.gaussian.dual(jnp.tanh, np.asarray(q), 1.0, np.asarray(c)), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["tanh", "silu", "shifted relu"]),
    st.floats(1e-3, 50.0),
    st.floats(1e-3, 50.0),
    st.floats(-1.0, 1.0),
)
def test_duals_are_positive_semidefinite(name, q1, q2, c):
    phi = ZOO[name]
    k12 = ij.gaussian.dual(phi, q1, q2, c)
    # Cauchy-Schwarz, with room for the series' tail of 1e-13
    assert k12**2 <= ij.gaussian.moment(phi, q1) * ij.gaussian.moment(phi, q2) * (1 + 1e-11) + 1e-300


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["relu", "leaky"]), st.floats(1e-6, 1e6), st.floats(-1.0, 1.0))
def test_homogeneous_duals_scale(name, scale, c):
    phi = {"relu": jax.nn.relu, "leaky": jax.nn.leaky_relu}[name]
    one = ij.gaussian.dual(phi, 1.0, 2.0, c)
    np.testing.assert_allclose(ij.gaussian.dual(phi, scale, 2 * scale, c), scale * one, rtol=1e-12, atol=1e-15 * scale)


def test_cross_takes_covariances_and_keeps_diagonals_exact():
    q = np.array([0.3, 2.0, 17.0])
    k = np.sqrt(np.outer(q, q))  # correlation 1 up to rounding
    got = ij.gaussian.cross(jax.nn.relu, jax.nn.relu, q[:, None], q[None, :], k)
    np.testing.assert_allclose(got, k / 2, rtol=1e-15)  # no 1e-8 from arccos(1 - 1e-16)
    with pytest.raises(ij.InputError, match="no Gaussian pair"):
        ij.gaussian.cross(jnp.tanh, jnp.tanh, 1.0, 1.0, 1.1)


def test_a_matrix_of_unequal_variances_equals_single_entries():
    rng = np.random.default_rng(0)
    q = rng.uniform(0.1, 5.0, 6)
    c = rng.uniform(-1, 1, (6, 6))
    for phi in (jnp.tanh, jax.nn.elu):
        matrix = ij.gaussian.dual(phi, q[:, None], q[None, :], c)
        act = ij.gaussian.as_activation(phi)
        for i, j in ((0, 1), (2, 5), (4, 3)):
            single = bivariate.direct(act, act, q[i], q[j], c[i, j], np.sqrt(1 - c[i, j] ** 2))
            np.testing.assert_allclose(matrix[i, j], single, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.silu, exact_gelu, jax.nn.relu])
def test_large_matrices_take_the_compiled_route_and_agree(phi):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(460, 12))
    k = x @ x.T / 12
    q = np.diagonal(k).copy()
    large = ij.gaussian.cross(phi, phi, q[:, None], q[None, :], k)
    act = ij.gaussian.as_activation(phi)
    for i, j in ((0, 1), (17, 400), (459, 3)):
        c = k[i, j] / np.sqrt(q[i] * q[j])
        single = bivariate.direct(act, act, q[i], q[j], c, np.sqrt((1 - c) * (1 + c)))
        np.testing.assert_allclose(large[i, j], single, rtol=1e-11, atol=1e-13)  # the series' tail
    np.testing.assert_allclose(np.diagonal(large), ij.gaussian.moment(phi, q), rtol=1e-13)


def test_hermite_coefficients_sum_to_the_dual():
    a = ij.gaussian.hermite(jnp.tanh, np.array([0.5, 2.0]), 150)
    # d = pi/2 from the pole of tanh: a_k^2 ~ exp(-pi sqrt(k)) < 1e-16 at k = 150, q = 2
    np.testing.assert_allclose(
        np.sum(a[0] * a[1] * 0.7 ** np.arange(151)), ij.gaussian.dual(jnp.tanh, 0.5, 2.0, 0.7), rtol=1e-13
    )
    np.testing.assert_allclose(a[:, ::2], 0.0, atol=1e-15)  # tanh is odd


@pytest.mark.parametrize("kind, value", [("forward", 2.0), ("chi", 2.0), ("centered", 2 * np.pi / (np.pi - 1))])
def test_gain_of_relu(kind, value):
    np.testing.assert_allclose(ij.gain(jax.nn.relu, kind) ** 2, value, rtol=1e-13)


BAD = [
    (lambda: ij.gaussian.moment(jnp.tanh, -1.0), ij.InputError, r"q = -1.0.*\n.*finite numbers >= 0"),
    (lambda: ij.gaussian.moment(jnp.tanh, float("nan")), ij.InputError, "q = nan"),
    (lambda: ij.gaussian.moment(jnp.tanh, 1j), ij.InputError, "complex128"),
    (lambda: ij.gaussian.dual(jnp.tanh, 1.0, 1.0, 1.5), ij.InputError, "c = 1.5"),
    (lambda: ij.gaussian.dual(jnp.tanh, 1.0, 1.0, np.nan), ij.InputError, "c = nan"),
    (lambda: ij.Activation(jax.nn.softmax), ij.NotElementwiseError, "softmax"),
    (lambda: ij.Activation(jnp.cumsum), ij.NotElementwiseError, "maps shape"),
    (lambda: ij.Activation(lambda x: x - jnp.mean(x)), ij.NotElementwiseError, "depends on the other entries"),
    (lambda: ij.Activation(lambda x: x > 0), ij.NotElementwiseError, "bool"),
    (lambda: ij.Activation(lambda x: x + 1j), ij.NotElementwiseError, "complex"),
    (lambda: ij.Activation(jnp.log), ij.InputError, "finite, with a finite derivative"),
    (lambda: ij.Activation(jnp.sqrt), ij.InputError, "finite"),
    (lambda: ij.Activation("tanh"), ij.InputError, "not callable"),  # type: ignore[arg-type]
    (lambda: ij.Activation(jnp.tanh, kinks=(np.inf,)), ij.InputError, "kinks"),
    (lambda: ij.gain(jnp.tanh, "backward"), ij.InputError, "forward"),  # type: ignore[arg-type]
    (lambda: ij.gaussian.moment(lambda x: x * jnp.exp(x), 1e4), ij.QuadratureError, "NaN or infinite at x = 709"),
    (lambda: ij.gaussian.moment(lambda x: jnp.sin(x * x), 1e6), ij.QuadratureError, "oscillates"),
    (lambda: ij.gaussian.moment(lambda x: jnp.exp(x) / (1 + jnp.exp(x)), 1e5), ij.QuadratureError, "NaN or infinite"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_gets_a_four_part_error(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    for part in ("Accepted:", "Why:", "Try:"):
        assert part in str(caught.value)


@pytest.mark.x64_off
def test_concrete_results_are_float64_with_64_bit_types_off():
    assert not jax.config.jax_enable_x64
    value = ij.gaussian.moment(jnp.tanh, jnp.float32(1.0))
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, float(ORACLE["tanh"]["moments"][2]["E_phi2"]), rtol=1e-12)


@pytest.mark.x64_off
def test_inside_a_users_jit_concrete_values_stay_exact_and_traced_ones_are_float32():
    def inner(x):
        factor = ij.gain(jnp.tanh)  # concrete: evaluated in float64 while tracing
        return x * jnp.float32(factor), ij.gaussian.dual(jax.nn.gelu, x, 1.0, 0.5)

    scaled, traced = jax.jit(inner)(jnp.float32(0.8))
    np.testing.assert_allclose(scaled / 0.8, ij.gain(jnp.tanh), rtol=2e-7)  # one float32 rounding
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(
        traced, ij.gaussian.dual(jax.nn.gelu, 0.8, 1.0, 0.5), rtol=1e-5
    )  # stated float32 accuracy


def test_what_lies_beyond_twelve_deviations_is_not_lost():
    for q in (0.05, 2e-3, 1e-3):
        with mpmath.workdps(30):
            edge = 0.5 / mpmath.sqrt(q)
            # E softshrink(u)^2 = 2 q int_edge^inf (z - edge)^2 density
            exact = 2 * q * ((1 + edge**2) * mpmath.ncdf(-edge) - edge * mpmath.npdf(edge))
            slope = 2 * mpmath.ncdf(-edge)
        shrink = lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0.0)  # noqa: E731
        np.testing.assert_allclose(ij.gaussian.moment(shrink, q), float(exact), rtol=1e-11)  # e^-edge^2/2 in float64
        np.testing.assert_allclose(ij.gaussian.moment_prime(shrink, q), float(slope), rtol=1e-11)
    assert ij.gaussian.moment(shrink, 1e-6) == 0.0  # exp(-125000)


def test_zero_over_zero_in_a_derivative_is_no_jump():
    assert ij.Activation(jnp.sinc).prime.jumps == ()
    assert ij.Activation(jnp.abs).prime.jumps == ((0.0, 2.0),)


def test_rounding_where_a_function_is_negligible_is_not_oscillation():
    # written out, gelu' carries x^3 eps = 1e-13 at x = -20 where it should vanish
    def slope(x):
        t = jnp.tanh(0.7978845608028654 * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x**2)

    q = np.array([0.5, 4.0, 40.0])
    # both are resolved to 13 digits
    np.testing.assert_allclose(ij.gaussian.moment(slope, q), ij.gaussian.moment_prime(jax.nn.gelu, q), rtol=1e-12)


@pytest.mark.parametrize("phi", [jax.scipy.special.erf, lambda x: jax.nn.gelu(x, approximate=False)])
def test_mixed_second_derivatives_of_closed_forms_are_finite_at_correlation_one(phi):
    def k(x, y):
        return ij.gaussian.cross(phi, phi, x * x + 0.5, y * y + 0.5, x * y + 0.5)

    mixed = jax.jit(jax.grad(jax.grad(k), 1))
    # symmetric about x = y, so that the value between neighbours is that at their middle up to the distance squared
    np.testing.assert_allclose(mixed(0.7, 0.7), mixed(0.7 - 1e-5, 0.7 + 1e-5), rtol=1e-6)
    slope = jax.grad(lambda c: ij.gaussian.dual_prime(jax.nn.relu, 1.0, 1.0, c))
    assert slope(1.0) == jnp.inf
