"""Fixed points, criticality and phase diagrams against a 200-bit oracle, iteration, and wide random networks."""

import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

import initjax as ij

ORACLE = json.loads((pathlib.Path(__file__).parent / "oracles" / "meanfield.json").read_text())["activations"]


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


REFERENCE = {"tanh": jnp.tanh, "relu": jax.nn.relu, "erf": erf, "gelu": exact_gelu}
POINTS = [(name, i) for name in REFERENCE for i in range(3)]
CRITICAL = [(name, b) for name in REFERENCE for b in ("0", "0.05", "0.3", "1.0")]


@pytest.mark.parametrize("name, i", POINTS)
def test_fixed_points_match_the_200_bit_oracle(name, i):
    row = ORACLE[name]["points"][i]
    (expected,) = row["fixed_points"]
    point = ij.fixed_point(REFERENCE[name], float(row["sigma_w"]), float(row["sigma_b"]))
    assert point.phase == expected["phase"]
    # asked: q 1e-10, chi and c* 1e-8, xi 1e-6; held 100 times tighter where 1 / (1 - chi) does not amplify
    np.testing.assert_allclose(point.q, float(expected["q"]), rtol=1e-12)
    for field, key in (("chi_1", "chi_1"), ("chi_q", "chi_q"), ("c", "c_star"), ("chi_c", "chi_c")):
        np.testing.assert_allclose(getattr(point, field), float(expected[key]), rtol=1e-10)
    for field in ("xi_q", "xi_c", "xi_grad"):
        np.testing.assert_allclose(getattr(point, field), float(expected[field]), rtol=1e-8)


@pytest.mark.parametrize("name, sigma_b", CRITICAL)
def test_critical_points_match_the_200_bit_oracle(name, sigma_b):
    expected = ORACLE[name]["critical"][sigma_b]
    found = ij.critical_points(REFERENCE[name], float(sigma_b))
    positive = [p for p in found if p.kind in ("regular", "half-stable")]
    assert len(positive) == len(expected["roots"])
    for point, root in zip(positive, expected["roots"], strict=True):
        np.testing.assert_allclose(point.q, float(root["q_star"]), rtol=1e-12)
        np.testing.assert_allclose(point.sigma_w, float(root["sigma_w"]), rtol=1e-12)
        np.testing.assert_allclose(point.chi_q, float(root["chi_q"]), rtol=1e-10)
        assert bool(point.stable) == root["stable"]
    zero = expected.get("zero")
    special = [p for p in found if p.kind in ("zero", "scale-invariant")]
    assert len(special) == (zero is not None)
    if zero:
        np.testing.assert_allclose(special[0].sigma_w, float(zero["sigma_w"]), rtol=1e-14)
        assert bool(special[0].stable) == ("unstable" not in zero["kind"])


def test_half_stable_points_of_gelu_and_silu():
    # chi_1 = chi_q = 1: gelu q* = (3 + sqrt 17)/2 in closed form; silu from Roberts, Yaida, Hanin 2021
    for phi, q, variance_b, variance_w in (
        (exact_gelu, (3 + np.sqrt(17)) / 2, 0.172922390756067, 1.983058257437547),
        (jax.nn.silu, 14.32017361802580, 0.55514317072153, 1.98800467826949),
    ):
        (point,) = ij.critical_points(phi, np.sqrt(variance_b))
        # at chi_q = 1 the root is double in the variance map, but simple on the critical line
        np.testing.assert_allclose(point.q, q, rtol=1e-9)
        np.testing.assert_allclose(point.sigma_w**2, variance_w, rtol=1e-10)
        assert abs(point.chi_q - 1) < 1e-8 and point.kind == "half-stable"


def test_small_sigma_b_follows_the_series_of_tanh():
    # f(q) = (4/3) q^3 - ...: q ~ (3 sigma_b^2 / 4)^(1/3), sigma_w^2 - 1 ~ 2 q; next order in q is a few times q
    for sigma_b in (1e-3, 1e-6):
        point = ij.critical(jnp.tanh, sigma_b)
        lead = (0.75 * sigma_b**2) ** (1 / 3)
        assert abs(point.q / lead - 1) < 3 * lead
        assert abs((point.sigma_w**2 - 1) / (2 * point.q) - 1) < 3 * lead


@pytest.mark.parametrize(
    "phi, sigma_w, kind",
    [
        (lambda x: x, 1.0, "scale-invariant"),
        (jax.nn.leaky_relu, np.sqrt(2 / (1 + 0.01**2)), "scale-invariant"),
        (jnp.abs, 1.0, "scale-invariant"),
        (jax.nn.elu, 1.0, "zero"),
        # selu's slopes differ at 0: lambda alpha on the left, lambda on the right
        (jax.nn.selu, np.sqrt(2 / (1.0507009873554805**2 * (1 + 1.6732632423543772**2))), "zero"),
        (jnp.sin, 1.0, "zero"),
    ],
)
def test_criticality_without_bias(phi, sigma_w, kind):
    point = ij.critical(phi)
    np.testing.assert_allclose(point.sigma_w, sigma_w, rtol=1e-7 if phi is jax.nn.selu else 1e-14)  # selu's constants
    assert point.kind == kind and bool(point.stable)


def test_sigmoid_has_its_far_root():
    (point,) = ij.critical_points(jax.nn.sigmoid, 0.0)
    q, w = point.q, point.sigma_w
    np.testing.assert_allclose(w**2 * ij.gaussian.moment_prime(jax.nn.sigmoid, q), 1.0, rtol=1e-12)
    np.testing.assert_allclose(w**2 * ij.gaussian.moment(jax.nn.sigmoid, q), q, rtol=1e-12)
    assert q > 10


@pytest.mark.parametrize(
    "phi, sigma_b, reason",
    [
        (jax.nn.relu, 0.3, "grows by sigma_b"),
        (jax.nn.softplus, 0.1, "negative for every q"),
        (jnp.sign, 0.1, "derivative is zero"),
    ],
)
def test_absence_is_explained(phi, sigma_b, reason):
    assert ij.critical_points(phi, sigma_b) == ()
    with pytest.raises(ij.NoCriticalPointError, match=reason):
        ij.critical(phi, sigma_b)


def test_unstable_roots_warn():
    with pytest.warns(ij.UnstableCriticalPointWarning, match="chi_q = 1.0638"):
        point = ij.critical(exact_gelu, 0.05)
    assert not point.stable
    np.testing.assert_allclose(point.sigma_w, 1.85190, rtol=3e-6)  # five printed digits


def test_a_batch_keeps_the_roots_it_has_and_agrees_with_single_calls():
    sigma_b = np.concatenate([[0.0], np.geomspace(1e-3, 2.0, 24)])
    batch = ij.critical(jnp.tanh, sigma_b)
    single = np.array([[p.sigma_w, p.q] for p in (ij.critical(jnp.tanh, b) for b in sigma_b)])
    np.testing.assert_allclose(np.stack([batch.sigma_w, batch.q], 1), single, rtol=1e-11, atol=1e-300)
    mixed = ij.critical(jax.nn.relu, np.array([0.0, 0.3]))
    assert np.isfinite(mixed.sigma_w[0]) and np.isnan(mixed.sigma_w[1])
    with pytest.raises(ij.NoCriticalPointError):
        ij.critical(jax.nn.relu, np.array([0.1, 0.3]))


def test_critical_is_differentiable_in_sigma_b():
    slope = jax.grad(lambda b: ij.critical(jnp.tanh, b).sigma_w)(0.3)
    h = 1e-5
    numeric = (ij.critical(jnp.tanh, 0.3 + h).sigma_w - ij.critical(jnp.tanh, 0.3 - h).sigma_w) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-8)  # truncation h^2, rounding 1e-15 / h


@pytest.mark.parametrize(
    "family, value, sigma_b",
    [
        (lambda p: lambda x: jnp.where(x > 0, x, p * x), 0.1, 0.0),  # leaky relu's slope: sqrt(2 / (1 + p^2))
        pytest.param(lambda p: lambda x: x * jax.nn.sigmoid(p * x), 1.0, 1.0, marks=pytest.mark.slow),  # swish beta
    ],
)
def test_critical_is_differentiable_in_parameters_of_phi(family, value, sigma_b):
    fields = lambda p: jnp.stack([getattr(ij.critical(family(p), sigma_b), f) for f in ("sigma_w", "chi_q")])  # noqa: E731
    slopes = jax.jacrev(fields)(value)
    h = 1e-5
    numeric = (fields(value + h) - fields(value - h)) / (2 * h)
    np.testing.assert_allclose(slopes, numeric, rtol=1e-7, atol=1e-9)  # truncation h^2, rounding 1e-15 / h
    if sigma_b:
        by_bias = jax.grad(lambda b: ij.critical(family(value), b).sigma_w)(sigma_b)
        both = jax.jacrev(lambda p, b: ij.critical(family(p), b).sigma_w, 1)(value, sigma_b)
        np.testing.assert_allclose(both, by_bias, rtol=1e-9)


@pytest.mark.slow
def test_critical_is_differentiable_in_a_parameter_that_moves_kinks_and_under_jit():
    # clip(x, -p, p) = p clip(x / p, -1, 1): sigma_w(p, b) = sigma_w(1, b / p), the same chi_1 at scaled variances
    sigma_w = lambda p: ij.critical(lambda x: jnp.clip(x, -p, p), 0.3).sigma_w  # noqa: E731
    by_bias = jax.grad(lambda b: ij.critical(jax.nn.hard_tanh, b).sigma_w)(0.25)
    exact = -0.3 / 1.2**2 * by_bias
    # 1e-8: fourth-order differences of expectations that are exact to 1e-14, step 1e-3
    np.testing.assert_allclose(jax.grad(sigma_w)(1.2), exact, rtol=1e-8)
    value, slope = jax.jit(jax.value_and_grad(sigma_w))(1.2)
    np.testing.assert_allclose(value, ij.critical(jax.nn.hard_tanh, 0.25).sigma_w, rtol=1e-12)
    np.testing.assert_allclose(slope, exact, rtol=1e-8)
    slopes = jax.vmap(sigma_w)(jnp.array([1.2, 2.4]))
    np.testing.assert_allclose(slopes[1], ij.critical(jax.nn.hard_tanh, 0.125).sigma_w, rtol=1e-12)
    nothing = jax.jit(lambda p: ij.critical(lambda x: jax.nn.softplus(p * x), 0.1).sigma_w)(1.0)
    assert np.isnan(nothing)


@pytest.mark.x64_off
def test_critical_in_parameters_has_float32_with_64_bit_types_off():
    slope = jax.grad(lambda a: ij.critical(lambda x: jax.nn.leaky_relu(x, a)).sigma_w)(0.1)
    assert slope.dtype == jnp.float32
    np.testing.assert_allclose(slope, -np.sqrt(2) * 0.1 / 1.01**1.5, rtol=1e-6)  # float32


def test_traced_fixed_point_matches_and_is_differentiable():
    value, slope = jax.value_and_grad(lambda w: ij.fixed_point(jax.nn.relu, w, 0.5).q)(1.2)
    np.testing.assert_allclose(value, 0.25 / (1 - 0.72), rtol=1e-10)
    np.testing.assert_allclose(slope, 0.25 * 1.2 / (1 - 0.72) ** 2, rtol=1e-9)  # d/dw of b^2 / (1 - w^2/2)
    traced = jax.jit(lambda w: ij.fixed_point(erf, w, 0.05))(1.3)
    concrete = ij.fixed_point(erf, 1.3, 0.05)
    assert traced.phase is None
    for field in ("q", "c", "chi_1", "chi_q", "chi_c", "xi_q", "xi_c", "xi_grad"):
        np.testing.assert_allclose(getattr(traced, field), getattr(concrete, field), rtol=1e-8)


def test_fixed_points_are_fixed_under_iteration():
    for w, b in ((1.5, 0.05), (0.9, 0.2), (2.5, 0.3)):
        point = ij.fixed_point(jnp.tanh, w, b)
        path = ij.propagate(jnp.tanh, w, b, depth=400, q0=2.0, c0=0.3)
        # after 400 layers, 20 or more depth scales, iteration has arrived to rounding
        np.testing.assert_allclose(path.q[-1], point.q, rtol=1e-12)
        np.testing.assert_allclose(path.c[-1], point.c, rtol=1e-8)
        np.testing.assert_allclose(path.chi[-1], point.chi_1, rtol=1e-12)
        # gradient products: chi_1 per layer once at the fixed point
        np.testing.assert_allclose(path.gradient[-11], point.chi_1**10, rtol=1e-11)


def test_depth_scales_are_the_observed_rates():
    w, b = 1.3, 0.3
    point = ij.fixed_point(jnp.tanh, w, b)
    path = ij.propagate(jnp.tanh, w, b, depth=60, q0=point.q * 1.01, c0=0.9)
    q_rate = -1 / np.log((path.q[11] - point.q) / (path.q[10] - point.q))
    c_rate = -1 / np.log((path.c[60] - point.c) / (path.c[59] - point.c))
    np.testing.assert_allclose(q_rate, point.xi_q, rtol=1e-2)  # second-order terms at 1 % distance
    np.testing.assert_allclose(c_rate, point.xi_c, rtol=1e-2)


def test_power_laws_at_criticality():
    path = ij.propagate(jnp.tanh, 1.0, 0.0, depth=1000)
    # theory: q ~ 1 / (2 l) with log corrections; 1.0023 and .7075 are quoted at l = 1000
    np.testing.assert_allclose(2 * 1000 * path.q[1000], 1.0023, rtol=1e-4)
    np.testing.assert_allclose(1000 * path.gradient[0], 0.7075, rtol=2e-3)
    relu = ij.propagate(jax.nn.relu, np.sqrt(2), 0.0, depth=400)
    growth = ((1 - relu.c[400]) ** -0.5 - (1 - relu.c[300]) ** -0.5) / 100
    # 1 - c ~ (9 pi^2/2) / l^2: its inverse root grows by sqrt(2) / (3 pi) a layer, up to terms of order log(l) / l
    np.testing.assert_allclose(growth, np.sqrt(2) / (3 * np.pi), rtol=1e-2)


def test_bistable_gelu_depends_on_where_it_starts():
    low = ij.fixed_point(jax.nn.gelu, 1.48, 0.1, q0=1.0)
    high = ij.fixed_point(jax.nn.gelu, 1.48, 0.1, q0=100.0)
    assert low.phase == "ordered" and 0 < low.q < 0.1
    assert high.phase == "unbounded" and np.isinf(high.q) and np.isnan(high.c)


def test_all_roots_of_a_bistable_map_and_their_basins():
    roots = ij.variance_roots(jax.nn.gelu, 1.48, 0.1)
    assert list(roots.stable) == [True, False, True] and np.isinf(roots.q[2])
    # each finite root is fixed, and a start on either side of the unstable one ends in its own basin
    for q in roots.q[:2]:
        np.testing.assert_allclose(1.48**2 * ij.gaussian.moment(jax.nn.gelu, q) + 0.01, q, rtol=1e-12)
    below, above = (ij.fixed_point(jax.nn.gelu, 1.48, 0.1, q0=roots.q[1] * f) for f in (0.99, 1.01))
    np.testing.assert_allclose(below.q, roots.q[0], rtol=1e-11)
    assert above.phase == "unbounded"
    assert roots.basin_low[0] == 0 and roots.basin_high[0] == roots.q[1] == roots.basin_low[2]
    dead = ij.variance_roots(jnp.tanh, 1.5)
    assert list(dead.q[:1]) == [0.0] and not dead.stable[0] and dead.stable[1]
    np.testing.assert_allclose(dead.q[1], ij.fixed_point(jnp.tanh, 1.5).q, rtol=1e-12)
    (line,) = ij.variance_roots(jax.nn.relu, 1.0, 0.5).q
    np.testing.assert_allclose(line, 0.5, rtol=1e-12)
    with pytest.raises(ij.InputError, match="scale-invariant"):
        ij.variance_roots(jax.nn.relu, np.sqrt(2))


def test_special_fixed_points():
    dead = ij.fixed_point(jnp.tanh, 0.8)
    assert dead.q == 0 and dead.phase == "ordered" and np.isnan(dead.c)
    np.testing.assert_allclose(dead.chi_1, 0.64, rtol=1e-14)
    he = ij.fixed_point(jax.nn.relu, np.sqrt(2), q0=0.7)
    assert he.q == 0.7 and he.phase == "critical" and np.isinf(he.xi_c)
    growing = ij.fixed_point(jax.nn.relu, np.sqrt(2), 0.1)
    assert growing.phase == "unbounded"


def test_gelu_near_criticality_keeps_its_small_distance():
    # 1 - c* = 6.9e-4: coarse scans of c miss it and report c* = 1
    point = ij.fixed_point(exact_gelu, 1.41, 1.0)
    expected = float(ORACLE["gelu"]["points"][2]["fixed_points"][0]["c_star"])
    np.testing.assert_allclose(1 - point.c, 1 - expected, rtol=1e-9)


def test_diagram_equals_single_fixed_points():
    w, b = np.linspace(0.6, 2.6, 30), np.linspace(0.0, 0.9, 10)
    diagram = ij.phase_diagram(jnp.tanh, w, b)
    assert diagram.q.shape == (30, 10)
    for i, j in ((0, 0), (3, 5), (12, 1), (20, 9), (29, 0), (25, 4)):
        point = ij.fixed_point(jnp.tanh, w[i], b[j])
        assert diagram.phase[i, j] == point.phase
        for field in ("q", "c", "chi_1", "chi_q", "chi_c"):
            # stated: c and chi_c from a two-dimensional table, 1e-8; the others 1e-11
            np.testing.assert_allclose(getattr(diagram, field)[i, j], getattr(point, field), rtol=1e-8, equal_nan=True)
    broadcast = ij.phase_diagram(jnp.tanh, w[:, None], b[None, :])
    np.testing.assert_array_equal(broadcast.q, diagram.q)
    # the line separates the phases
    for j in range(10):
        line = diagram.critical_line[j, 0]
        assert set(diagram.phase[w < line - 1e-6, j]) <= {"ordered"}
        assert set(diagram.phase[w > line + 1e-6, j]) <= {"chaotic"}


def test_large_batches_take_the_compiled_route_and_agree():
    rng = np.random.default_rng(1)
    w, b = rng.uniform(0.3, 1.3, 5000), rng.uniform(0, 1, 5000)
    big = ij.phase_diagram(erf, w.reshape(50, 100), b.reshape(50, 100))
    few = ij.fixed_point(erf, w[:5], b[:5])
    np.testing.assert_allclose(big.q.ravel()[:5], few.q, rtol=1e-11)


def test_a_sweep_over_activations_stacks_their_diagrams():
    w, b = np.linspace(0.8, 2.0, 4), np.linspace(0.0, 0.3, 3)
    slopes = (0.0, 0.3)
    family = [functools.partial(jax.nn.leaky_relu, negative_slope=a) for a in slopes]
    sweep = ij.phase_diagram(family, w, b)
    assert sweep.q.shape == (2, 4, 3) and sweep.critical_line.shape == (2, 3, 3)
    for i, a in enumerate(slopes):
        np.testing.assert_allclose(sweep[i].chi_1[:, 1], w**2 * (1 + a * a) / 2, rtol=1e-14)
        assert sweep[i].phase.shape == (4, 3)


def test_a_diagram_can_be_drawn():
    import matplotlib

    matplotlib.use("Agg")
    axes = ij.phase_diagram(erf, np.linspace(0.5, 2, 12), np.linspace(0, 0.5, 8)).plot()
    assert "sigma_w" in axes.get_xlabel()
    with pytest.raises(ij.InputError, match="two-dimensional"):
        ij.phase_diagram(erf, np.array([1.0]), np.array([0.1])).plot()


def test_results_are_pytrees_with_readable_reprs():
    point = ij.critical(jnp.tanh, 0.05)
    doubled = jax.tree.map(lambda x: 2 * x, point)
    assert doubled.kind == "regular" and doubled.sigma_w == 2 * point.sigma_w
    assert repr(point).startswith("CriticalPoint(sigma_w=1.12253900")
    batch = jax.tree.map(lambda x: x, ij.fixed_point(jnp.tanh, np.array([0.9, 2.0]), 0.1))
    assert list(batch.phase) == ["ordered", "chaotic"]


@pytest.mark.slow
def test_wide_random_networks_follow_the_map():
    """Finite width: 3 tanh layers of 500 units, 200 networks; q and c within 4 standard errors."""
    w, b, width, networks = 1.6, 0.2, 500, 200
    rng = np.random.default_rng(0)
    path = ij.propagate(jnp.tanh, w, b, depth=3, q0=1.0, c0=0.5)
    q, overlap = np.empty((2, networks, 3))
    for n in range(networks):
        x = rng.normal(size=(2, width))
        # two inputs whose sample second moments and correlation are exactly 1 and 0.5
        x[0] /= np.sqrt(np.mean(x[0] ** 2))
        x[1] -= np.mean(x[0] * x[1]) * x[0]
        x[1] /= np.sqrt(np.mean(x[1] ** 2))
        h = np.stack([x[0], 0.5 * x[0] + np.sqrt(0.75) * x[1]])
        for layer in range(3):
            h = np.tanh(h) @ rng.normal(size=(width, width)) * (w / np.sqrt(width)) + b * rng.normal(size=width)
            q[n, layer], overlap[n, layer] = np.mean(h[0] ** 2), np.mean(h[0] * h[1])
    for measured, theory in ((q, path.q[1:]), (overlap, path.c[1:] * path.q[1:])):
        error = measured.std(axis=0, ddof=1) / np.sqrt(networks)
        # the O(1/n) bias of a few layers is below 2 / width, added to 4 standard errors
        assert np.all(np.abs(measured.mean(axis=0) - theory) < 4 * error + 2 / width)


BAD = [
    (lambda: ij.critical(jnp.tanh, -0.1), "sigma_b = -0.1"),
    (lambda: ij.fixed_point(jnp.tanh, -1.0), "sigma_w = -1.0"),
    (lambda: ij.fixed_point(jnp.tanh, np.nan), "sigma_w = nan"),
    (lambda: ij.fixed_point(jnp.tanh, 1.0, np.inf), "sigma_b = inf"),
    (lambda: ij.fixed_point(jnp.tanh, 1j), "sigma_w = 1j"),
    (lambda: ij.fixed_point(jnp.tanh, 1.0, q0=-2.0), "q0 = -2"),
    (lambda: ij.propagate(jnp.tanh, 1.0, 0.0, depth=2.5), "depth = 2.5"),
    (lambda: ij.propagate(jnp.tanh, 1.0, 0.0, depth=3, c0=2.0), "c = 2"),
    (lambda: ij.critical_points(jnp.tanh, np.array([0.1, 0.2])), "one sigma_b"),
]


@pytest.mark.parametrize("call, text", BAD)
def test_bad_input_gets_a_four_part_error(call, text):
    with pytest.raises(ij.InputError, match=text) as caught:
        call()
    assert "Accepted:" in str(caught.value) and "Why:" in str(caught.value) and "Try:" in str(caught.value)


@pytest.mark.x64_off
def test_inside_a_users_jit_with_64_bit_types_off():
    def inner(x):
        point = ij.critical(jnp.tanh, 0.05)  # concrete: float64 at trace time
        assert point.sigma_w.dtype == np.float64
        return x * jnp.float32(point.sigma_w), ij.critical(jnp.tanh, x).q

    scaled, q = jax.jit(inner)(jnp.float32(0.3))
    np.testing.assert_allclose(scaled, 0.3 * 1.1225390047695756, rtol=1e-6)
    assert q.dtype == jnp.float32
    # float32 rounds q - M/D, of size 0.09, at 1e-7
    np.testing.assert_allclose(q, float(ORACLE["tanh"]["critical"]["0.3"]["primary"]["q_star"]), rtol=1e-5)


@pytest.mark.x64_off
def test_warnings_do_not_come_from_types():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = ij.fixed_point(jnp.tanh, jnp.float32(1.5), 0.05)
    assert point.q.dtype == np.float64


def test_activations_that_vanish_around_zero_have_their_critical_points():
    # softshrink: E[u f f'] = q D for slopes 0 and 1, so chi_q = chi_1 = 1 on the whole line
    shrink = lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0.0)  # noqa: E731
    (point,) = ij.critical_points(shrink, 0.5)
    np.testing.assert_allclose(point.sigma_w**2 * ij.gaussian.moment_prime(shrink, point.q), 1, rtol=1e-12)
    np.testing.assert_allclose(point.sigma_w**2 * ij.gaussian.moment(shrink, point.q) + 0.25, point.q, rtol=1e-12)
    np.testing.assert_allclose(point.chi_q, 1, rtol=1e-10)
    # x - tanh(x) is rounding below x = 1e-5, and x^3 / 3 above: the table starts where digits are left
    remainder = lambda x: x - jnp.tanh(x)  # noqa: E731
    for found in ij.critical_points(remainder, 0.5):
        residual = found.sigma_w**2 * ij.gaussian.moment(remainder, found.q) + 0.25 - found.q
        assert abs(residual) < 1e-11 * found.q
