"""Universality classes: predicted power laws against iteration of the maps, and trajectories of ten thousand layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

import initjax as ij
from initjax.meanfield.taylor import one_sided


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def bell(x):
    return x * jnp.exp(-x * x)


def shifted_tanh(x):
    return jnp.tanh(x + 0.3) - jnp.tanh(0.3)


def quintic(x):
    return x / (1 + x**4)


CLASSES = [
    (lambda x: x, "scale-invariant"),
    (jax.nn.relu, "scale-invariant"),
    (jnp.abs, "scale-invariant"),
    (jnp.tanh, "zero"),
    (shifted_tanh, "zero"),
    (jax.nn.elu, "zero-kinked"),
    (jax.nn.selu, "zero-kinked"),
    (jax.nn.hard_tanh, "zero-flat"),
    (jax.nn.relu6, "zero-flat"),
    (exact_gelu, "half-stable"),
    (jax.nn.mish, "half-stable"),
    (jax.nn.sigmoid, "regular"),
    (jnp.cos, "regular"),
    (jax.nn.softplus, "none"),
    (jnp.sign, "none"),
]


@pytest.mark.parametrize("phi, kind", CLASSES)
def test_classes(phi, kind):
    found = ij.universality(phi)
    assert found.kind == kind and isinstance(found.note, str)
    if kind == "none":
        assert np.isnan(found.sigma_w) and found.note.startswith("No criticality")
    else:
        assert found.sigma_w > 0


@pytest.mark.parametrize("phi, amplitude", [(jnp.tanh, 1 / 2), (erf, 1 / 2), (jnp.sin, 1.0), (bell, 1 / 6)])
def test_odd_smooth_amplitudes_in_closed_form(phi, amplitude):
    # q ~ 1 / (|r| l): r = -2 for tanh and erf, -1 for sin, -6 for x exp(-x^2); derivatives at 0 are exact to rounding
    found = ij.universality(phi)
    np.testing.assert_allclose(found.q_amplitude, amplitude, rtol=1e-13)
    np.testing.assert_allclose([found.q_exponent, found.gradient_exponent], 1, rtol=1e-14)
    assert np.isnan(found.c_limit) and found.c_exponent == 0


def test_kinked_amplitudes_in_closed_form():
    np.testing.assert_allclose(ij.universality(jax.nn.elu).q_amplitude, 2 * np.pi, rtol=1e-13)
    np.testing.assert_allclose(ij.universality(jax.nn.relu).c_amplitude, 9 * np.pi**2 / 2, rtol=1e-13)
    a = 0.2
    leaky = ij.universality(lambda x: jnp.where(x > 0, x, a * x))
    coefficient = 2 * np.sqrt(2) / 3 * (1 - a) ** 2 / (np.pi * (1 + a * a))
    np.testing.assert_allclose(leaky.c_amplitude, 4 / coefficient**2, rtol=1e-13)
    # selu: slopes differ at 0, so its cosines merge as those of leaky relu with the same ratio of slopes, 1.67326
    selu = ij.universality(jax.nn.selu)
    a = 1.6732632423543772
    coefficient = 2 * np.sqrt(2) / 3 * (1 - a) ** 2 / (np.pi * (1 + a * a))
    np.testing.assert_allclose(selu.c_amplitude, 4 / coefficient**2, rtol=1e-6)  # selu's own constants have 7 digits


def test_half_stable_points_are_those_of_roberts_yaida_hanin():
    gelu, silu = ij.universality(exact_gelu), ij.universality(jax.nn.silu)
    # q to 1e-9: chi_q = 1 is known to 1e-13 and is flat there
    np.testing.assert_allclose(gelu.q, (3 + np.sqrt(17)) / 2, rtol=1e-9)
    np.testing.assert_allclose([gelu.sigma_w**2, gelu.sigma_b**2], [1.983058257437547, 0.172922390756067], rtol=1e-9)
    np.testing.assert_allclose([silu.sigma_w**2, silu.sigma_b**2], [1.98800467826949, 0.55514317072153], rtol=1e-9)


def rate(y, depth):
    """Growth of y a layer over the second half: free of the additive constant, log l / l corrections remain."""
    return (y[depth] - y[depth // 2]) / (depth - depth // 2)


LAWS = [
    (jnp.tanh, 4000, 2e-3),
    (bell, 4000, 2e-3),
    (shifted_tanh, 4000, 2e-3),
    (jax.nn.elu, 4000, 1e-2),
    (jax.nn.soft_sign, 4000, 2e-2),
    (jax.nn.selu, 4000, 1e-2),
    (quintic, 4000, 5e-2),  # corrections of order l^(-1/2)
]


@pytest.mark.parametrize("phi, depth, tolerance", LAWS)
def test_variance_and_gradient_at_zero_follow_their_laws(phi, depth, tolerance):
    law = ij.universality(phi)
    path = ij.propagate(phi, law.sigma_w, 0.0, depth, c0=1.0)
    units = path.q  # sigma_w phi'(0) = 1 in every one of these: q is in the units of the law
    found = rate(units ** (-1 / law.q_exponent), depth) ** -law.q_exponent
    np.testing.assert_allclose(found, law.q_amplitude, rtol=3 * tolerance)
    # over the second half the product of chi falls by 2^-p
    fall = -path.log_gradient[depth // 2] / np.log(2)
    np.testing.assert_allclose(fall, law.gradient_exponent, rtol=3 * tolerance)


def test_hard_tanh_falls_like_one_over_two_log_depth():
    path = ij.propagate(jax.nn.hard_tanh, 1.0, 0.0, 10_000, c0=1.0)
    # 2 q ln l = .87, .88, .89 at l = 100, 1000, 10000: the approach is in ln ln l / ln l
    for depth, value in ((100, 0.87), (1000, 0.88), (10_000, 0.89)):
        np.testing.assert_allclose(2 * path.q[depth] * np.log(depth), value, atol=0.006)  # two printed digits
    # 1 / q grows by 2 for each unit of ln l, up to d/d(ln l) of 2 ln ln l = 2 / ln l: 0.2 here
    slope = (1 / path.q[10_000] - 1 / path.q[1000]) / np.log(10)
    assert abs(slope - 2) < 0.3
    assert ij.universality(jax.nn.hard_tanh).q_amplitude == 0.5


def test_half_stable_point_is_approached_from_one_side():
    law = ij.universality(jax.nn.mish)
    assert law.q_amplitude < 0  # from below
    depth = 6000
    path = ij.propagate(jax.nn.mish, law.sigma_w, law.sigma_b, depth, q0=law.q - 0.2, c0=1.0)
    found = -1 / rate(1 / (law.q - path.q), depth)
    np.testing.assert_allclose(
        found, law.q_amplitude, rtol=5e-2
    )  # cubic terms: relative (q - q*)/q* = 0.1 at the start
    # gradients go like l^-p, that is like (q* - q)^p, whatever layer the counting starts from
    fall = np.log(path.chi[depth // 2 : depth]).sum() / np.log((law.q - path.q[depth]) / (law.q - path.q[depth // 2]))
    stated = -float(re.search(r"gradients go like l\^(-?\d+\.?\d*)", law.note)[1])
    np.testing.assert_allclose(fall, stated, rtol=5e-2)  # corrections of relative order (q* - q) / q* = 0.01
    above = ij.propagate(jax.nn.mish, law.sigma_w, law.sigma_b, depth, q0=law.q + 0.2, c0=1.0)
    assert above.q[-1] > above.q[0]


@pytest.mark.parametrize(
    "phi, sigma_b, depth, tolerance",
    [
        (jnp.tanh, 0.3, 3000, 2e-3),
        (jax.nn.sigmoid, 0.0, 1000, 2e-2),
        (jax.nn.hard_tanh, 0.3, 3000, 2e-2),  # kinks away from 0
        (jax.nn.leaky_relu, 0.0, 3000, 1e-2),
        (jax.nn.relu6, 0.0, 1000, 3e-2),
        # 1 - c reaches 3121 / l^2 late
        pytest.param(jax.nn.selu, 0.0, 1500, 6e-2, marks=pytest.mark.slow),
    ],
)
def test_correlations_follow_their_law(phi, sigma_b, depth, tolerance):
    law = ij.universality(phi, sigma_b)
    q0 = law.q if law.q > 0 else 1.0
    path = ij.propagate(phi, law.sigma_w, law.sigma_b, depth, q0=q0, c0=0.9)
    found = rate(path.one_minus_c ** (-1 / law.c_exponent), depth) ** -law.c_exponent
    np.testing.assert_allclose(found, law.c_amplitude, rtol=2 * tolerance)


def test_cosines_freeze_for_odd_and_drift_to_one_half_otherwise():
    tanh = ij.propagate(jnp.tanh, 1.0, 0.0, 2000)
    assert abs(tanh.c[2000] - tanh.c[1000]) < 1e-4 and abs(tanh.c[2000] - 0.44054) < 2e-4  # from 0.5
    law = ij.universality(shifted_tanh)
    assert law.c_limit == 0.5
    path = ij.propagate(shifted_tanh, law.sigma_w, 0.0, 2000, c0=np.array([0.45, 0.55]))
    falls = -np.log((path.c[2000] - 0.5) / (path.c[1000] - 0.5)) / np.log(2)
    # the rate is (s^2/4) q (1 -+ 2 |c - 1/2|): the mean of the two sides is free of that to first order;
    # what remains is a few log(l) / l = 4e-3
    np.testing.assert_allclose(falls.mean(), law.c_exponent, rtol=5e-2)


def test_one_sided_derivatives():
    np.testing.assert_allclose(one_sided(ij.Activation(jnp.tanh)), [[0, 1, 0, -1 / 3, 0, 2 / 15]] * 2, atol=1e-15)
    left, right = one_sided(ij.Activation(jax.nn.elu))
    np.testing.assert_allclose(left, [0, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120], rtol=1e-14, atol=1e-19)
    np.testing.assert_allclose(right, [0, 1, 0, 0, 0, 0], atol=1e-19)


def test_errors_of_universality():
    with pytest.raises(ij.InputError, match="sigma_b = -1"):
        ij.universality(jnp.tanh, -1.0)
    with pytest.raises(ij.InputError, match="one sigma_b"):
        ij.universality(jnp.tanh, np.array([0.1, 0.2]))
    assert "grows by sigma_b" in ij.universality(jax.nn.relu, 0.3).note


# -- ten thousand layers --------------------------------------------------------------------------------------------


def test_ordered_phase_keeps_one_minus_c_to_any_depth():
    w, b, depth = 1.2, 0.3, 10_000
    point = ij.fixed_point(jnp.tanh, w, b)
    path = ij.propagate(jnp.tanh, w, b, depth)
    assert path.c[-1] == 1 and path.one_minus_c[-1] == 0  # below 1e-308, and the logarithm knows by how much
    # once at the fixed point, log(1 - c) falls by log chi_1 a layer; chi_1 is known to 1e-13
    fall = (path.log_one_minus_c[-1] - path.log_one_minus_c[1000]) / (depth - 1000)
    np.testing.assert_allclose(fall, np.log(point.chi_1), rtol=1e-10)
    np.testing.assert_allclose(path.log_gradient[1000] / (depth - 1000), np.log(point.chi_1), rtol=1e-10)
    assert path.gradient[0] == 0 and np.isfinite(path.log_gradient).all()
    # 1 - c where c has no digits left
    layer = int(np.argmax(path.one_minus_c < 1e-20))
    assert path.c[layer] == 1 and 1e-22 < path.one_minus_c[layer] < 1e-20


def test_chaotic_phase_does_not_overflow():
    path = ij.propagate(jnp.tanh, 2.0, 0.3, 10_000)
    point = ij.fixed_point(jnp.tanh, 2.0, 0.3)
    assert np.isinf(path.gradient[0]) and np.isfinite(path.log_gradient).all()
    np.testing.assert_allclose(path.c[-1], point.c, rtol=1e-9)
    np.testing.assert_allclose(path.log_gradient[100] / 9900, np.log(point.chi_1), rtol=1e-10)


@pytest.mark.parametrize("phi", [jax.nn.relu, jnp.tanh, jax.nn.hard_tanh, exact_gelu])
def test_neighbours_part_at_the_rate_of_chi(phi):
    # 1 - c = 1e-14 at the start: the difference of two c would have two digits; the law has chi_1 a layer
    # shrinking from 1 by the kink term A sqrt(1 - c) < 1e-6
    path = ij.propagate(phi, 1.5, 0.2, 5, q0=1.0, c0=1 - 2.0**-47)
    ratio = path.one_minus_c[1:] / path.one_minus_c[:-1]
    slope = path.chi[:-1] * path.q[:-1] / path.q[1:]  # off the fixed point: sigma_w^2 D q / V
    np.testing.assert_allclose(ratio, slope, rtol=2e-6)


@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.hard_tanh, jax.nn.elu, jax.nn.relu, jnp.sign, jnp.cos])
def test_trajectories_equal_one_step_at_a_time(phi):
    c0 = np.array([-1.0, -0.7, 0.0, 0.4, 0.9, 1.0])
    w, b, depth = 1.6, 0.2, 8
    path = ij.propagate(phi, w, b, depth, q0=1.3, c0=c0)
    q, c = 1.3, c0
    for layer in range(1, depth + 1):
        new = w * w * ij.gaussian.moment(phi, q) + b * b
        c = (w * w * ij.gaussian.dual(phi, q, q, c) + b * b) / new
        q = new
        np.testing.assert_allclose(path.q[layer], q, rtol=1e-12)
        # 1e-15 a layer, parted by chi_1 < 3 in each of eight layers
        np.testing.assert_allclose(path.c[layer], c, atol=1e-10)
        c = np.clip(c, -1, 1)


def test_batches_of_networks_equal_single_ones():
    w = np.array([0.8, 1.4, 2.2])
    batch = ij.propagate(jnp.tanh, w[:, None], 0.1, 30, c0=np.array([0.2, 0.9]))
    for i in range(3):
        for j, c0 in enumerate((0.2, 0.9)):
            single = ij.propagate(jnp.tanh, w[i], 0.1, 30, c0=c0)
            for field in ("q", "c", "chi", "log_gradient"):
                # table and quadrature differ by 1e-13, chaos amplifies
                np.testing.assert_allclose(getattr(batch, field)[:, i, j], getattr(single, field), rtol=1e-9)


def test_diverging_and_dying_signals():
    up = ij.propagate(exact_gelu, 1.5, 0.1, 400, q0=1000.0, c0=np.array([0.5, 1.0]))
    assert np.all(np.isinf(up.q[-1])) and np.all(np.isnan(up.c[-1]))
    down = ij.propagate(lambda x: x**2, 0.3, 0.0, 16)
    assert down.q[-1] == 0 and np.all(np.isfinite(down.q))
