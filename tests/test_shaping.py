"""Activation shaping: the conditions of DKS and TAT by independent quadrature, published values, networks, models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.scipy.special import erf

import initjax as ij
from initjax.shaping import dks, per_location_normalization, subnetwork_maximum, tat

DEPTHS = np.array([3, 50, 1000])
FAST = [jnp.tanh, jax.nn.softplus, jax.nn.selu]
REST = [jax.nn.gelu, jax.nn.silu, jax.nn.elu, jax.nn.sigmoid, erf, jnp.sin, jax.nn.soft_sign, jax.nn.mish]
REST += [jnp.arctan, jnp.arcsinh, jax.nn.squareplus, jax.nn.log_sigmoid, lambda x: jnp.exp(-x * x)]


def modified_resnet(x, r, weight=0.6):
    """The subnetwork maximum that users of the authors' package write by hand, for ResNet-101 without norms."""
    branch = r(r(r(x)))
    for blocks in (3, 4, 23, 3):
        for block in range(blocks):
            x = weight**2 * (r(x) if block == 0 else x) + (1 - weight**2) * r(r(r(x)))
    return max(r(x), branch)


@pytest.mark.parametrize("phi", FAST + [pytest.param(f, marks=pytest.mark.slow) for f in REST])
def test_dks_conditions_hold_by_the_quadrature_of_the_shaped_function(phi):
    shaped = dks(phi, depth=DEPTHS)
    for i, depth in enumerate(DEPTHS):
        c = shaped[i].conditions()
        # the table is solved to 4e-12, and gamma (30 to 250) multiplies the rounding of phi
        np.testing.assert_allclose([c.q, c.q_slope, c.c_slope], [1, 1, 1.5 ** (1 / depth)], atol=2e-11)
        assert c.c_zero < 1e-22
        assert abs(c.c_slope**depth - 1.5) < 1e-8


@pytest.mark.parametrize(
    "phi", [jax.nn.softplus, *(pytest.param(f, marks=pytest.mark.slow) for f in (jnp.tanh, *REST))]
)
def test_tat_conditions_hold_by_the_quadrature_of_the_shaped_function(phi):
    shaped = tat(phi, depth=DEPTHS)
    for i, depth in enumerate(DEPTHS):
        c = shaped[i].conditions()
        np.testing.assert_allclose([c.q, c.q_slope, c.c_slope], 1.0, atol=2e-11)
        assert abs(c.c_curvature * depth - 0.3) < 1e-8


def test_values_of_the_authors_package_for_plain_networks():
    # their solver stops at 1.5e-8 of its own residuals, of order 1e-5 in the parameters of nearly linear layers
    rows = [
        (dks(jnp.tanh, depth=3), 0.59053381140, 0.87914846754, 3.01720465918, -0.60495591813, 1e-6),
        (dks(jnp.tanh, depth=1000), 0.02848909931, 0.55039231222, 46.8523679084, -0.50050996627, 1e-5),
        (dks(jax.nn.softplus, depth=10), 0.81027954253, 0.41900040827, 2.04651722204, -0.99817360484, 1e-6),
        (dks(jax.nn.selu, depth=10), 0.30740922386, -0.61307260617, 3.27220346557, 0.76210099314, 3e-4),
        (tat(jax.nn.softplus, depth=50), 0.21210121645, 0.54002507504, 7.45573627220, -0.99704558488, 1e-5),
    ]
    for shaped, alpha, beta, gamma, delta, rtol in rows:
        found = [shaped.alpha, shaped.beta, shaped.gamma, shaped.delta]
        np.testing.assert_allclose(found, [alpha, beta, gamma, delta], rtol=rtol)


def test_values_of_the_authors_package_for_a_resnet():
    kw = dict(maximum=modified_resnet)
    rows = [
        (dks(jax.nn.softplus, zeta=1.2, **kw), 0.18761008168, 0.40688063442, 8.87867254367, -0.92134661514, None),
        (dks(jnp.tanh, zeta=1.2, **kw), 0.07461073058, 0.55669151999, 18.0026359644, -0.50343787687, None),
        (dks(jax.nn.leaky_relu, zeta=1.2, **kw), 1.0, 0.0, 1.06518327027, -0.04941869728, 0.87612570735),
        (dks(jax.nn.relu, zeta=1.2, q_slope=None, **kw), 0.36853600467, 1.0, 2.72172998876, -1.00037385855, 0.0),
        (tat(jax.nn.softplus, tau=0.2, **kw), 0.15011489795, 0.53745999011, 10.5488018788, -0.99648101447, None),
        (tat(jax.nn.leaky_relu, eta=0.75, **kw), 1.0, 0.0, 1.19699654978, 0.0, 0.62918002903),
    ]
    for shaped, alpha, beta, gamma, delta, slope in rows:
        # their relu is off by 2e-5, from a kink inside a panel of their quadrature; the others by 1e-8
        rtol = 4e-5 if slope == 0 else 2e-7
        found = [shaped.alpha, shaped.beta, shaped.gamma, shaped.delta]
        np.testing.assert_allclose(found, [alpha, beta, gamma, delta], rtol=rtol, atol=1e-9)
        assert shaped.negative_slope is None if slope is None else abs(shaped.negative_slope - slope) < 1e-8
    with_q = dks(jnp.tanh, zeta=12.0, q_slope=0.97, **kw)
    np.testing.assert_allclose(with_q(np.array([0.6, -0.6])), [0.69107469688, -0.51223354094], rtol=1e-8)


def test_one_branch_for_all_depths():
    shaped = dks(jax.nn.selu, depth=np.unique(np.geomspace(2, 1000, 60).astype(int)))
    kink = -shaped.beta / shaped.alpha  # withdraws into the tail as layers become linear
    assert np.all(np.diff(kink) > 0) and np.all(np.diff(shaped.alpha) < 0) and np.all(np.diff(shaped.gamma) > 0)
    sine = dks(jnp.sin, depth=100_000)
    assert abs(math.tan(sine.beta) ** 2 - 2) < 1e-4  # sin: 2 phi' phi''' + phi''^2 = 0 where tan^2 = 2, up to alpha^2


@pytest.mark.parametrize("phi", [jax.nn.leaky_relu, jax.nn.relu, lambda x: jnp.where(x > 0, x, 0.3 * x)])
def test_the_relu_family(phi):
    shaped = dks(phi, depth=DEPTHS)
    for i, depth in enumerate(DEPTHS):
        c = shaped[i].conditions()
        np.testing.assert_allclose([c.q, c.q_slope, c.c_slope], [1, 1, 1.5 ** (1 / depth)], atol=1e-12)
        assert c.c_zero < 1e-28
    shaped = tat(phi, depth=DEPTHS[1:])
    for i, depth in enumerate(DEPTHS[1:]):
        one = shaped[i]
        c = one.conditions()
        np.testing.assert_allclose([c.q, c.q_slope, c.c_slope], 1.0, atol=1e-12)
        correlation, share = 0.0, (1 - one.negative_slope) ** 2 / (1 + one.negative_slope**2) / math.pi
        assert abs(float(one.c_map(0.3)) - (0.3 + share * (math.sqrt(0.91) - 0.3 * math.acos(0.3)))) < 1e-12
        for _ in range(depth):
            correlation += share * (math.sqrt(1 - correlation**2) - correlation * math.acos(correlation))
        assert abs(correlation - 0.9) < 1e-11


def test_composed_c_map_has_the_slope_zeta():
    shaped = dks(jax.nn.softplus, depth=5, zeta=1.5)
    c, step = np.array([0.0, 1 - 1e-4]), 1e-4
    for _ in range(5):
        c = shaped.c_map(c)
    assert abs(c[0]) < 1e-10
    assert abs((1 - c[1]) / step - 1.5) < 1e-4  # C_f''(1) step / 2 is left


def test_finite_networks_keep_q_and_the_cosine():
    depth, width, draws = 8, 300, 60
    shaped = dks(jnp.tanh, depth=depth)
    x = np.random.default_rng(0).normal(size=(2, width))
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    x = np.asarray(per_location_normalization(x, "off"))

    def network(key):
        h = jnp.asarray(x)
        for k in jax.random.split(key, depth + 1):
            w = jax.random.normal(k, (width, width)) / math.sqrt(width)
            out = h @ w
            h = shaped(out)
        return jnp.mean(out[0] ** 2), jnp.mean(out[0] * out[1])

    q, cross = (np.asarray(v) for v in jax.jit(jax.vmap(network))(jax.random.split(jax.random.key(0), draws)))
    expected = float(np.mean(x[0] * x[1]))
    for _ in range(depth):
        expected = float(shaped.c_map(expected))
    # four standard errors of the mean over networks, and the finite-width bias, of order depth / width
    assert abs(q.mean() - 1) < 4 * q.std() / math.sqrt(draws) + depth / width * 0.05
    assert abs(cross.mean() - expected) < 4 * cross.std() / math.sqrt(draws) + depth / width * 0.05


def test_inside_jit_vmap_and_grad():
    zetas = jnp.array([1.2, 1.5, 3.0])
    batched = jax.jit(lambda z: dks(jnp.tanh, zeta=z, depth=7))(zetas)
    mapped = jax.vmap(lambda z: dks(jnp.tanh, zeta=z, depth=7))(zetas)
    plain = dks(jnp.tanh, zeta=np.asarray(zetas), depth=7)
    for name in ("alpha", "beta", "gamma", "delta"):
        np.testing.assert_allclose(getattr(batched, name), getattr(plain, name), rtol=1e-12)
        np.testing.assert_allclose(getattr(mapped, name), getattr(plain, name), rtol=1e-12)
        slope = jax.grad(lambda z, n=name: getattr(dks(jnp.tanh, zeta=z, depth=7), n))(1.5)
        around = [getattr(dks(jnp.tanh, zeta=1.5 + h, depth=7), name) for h in (-1e-4, 1e-4)]
        assert abs(slope - (around[1] - around[0]) / 2e-4) < 1e-6 * max(1, abs(slope))  # error of the difference
    slope = jax.grad(lambda e: tat(jax.nn.relu, eta=e, depth=40).negative_slope)(0.9)
    around = [tat(jax.nn.relu, eta=0.9 + h, depth=40).negative_slope for h in (-1e-4, 1e-4)]
    assert abs(slope - (around[1] - around[0]) / 2e-4) < 1e-5 * abs(slope)
    assert np.isnan(jax.jit(lambda z: dks(jax.nn.softplus, zeta=z, depth=1).alpha)(1.5))
    x = jnp.linspace(-2, 2, 5)
    np.testing.assert_allclose(jax.vmap(lambda s: s(x))(plain)[1], plain[1](x), rtol=1e-14)


class Residual(nn.Module):
    act: object = jnp.tanh
    weight: float = 0.6

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for block in (0, 1, 0, 1):
            h = self.act(x)
            short = nn.Dense(16)(h) if block == 0 else x
            for _ in range(2):
                h = self.act(nn.Dense(16)(h))
            x = self.weight * short + math.sqrt(1 - self.weight**2) * nn.Dense(16)(h)
        return nn.Dense(3)(self.act(x))


class Plain(nnx.Module):
    def __init__(self, rngs, act=jnp.tanh, kernel_init=nnx.nn.linear.default_kernel_init):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs, kernel_init=kernel_init) for _ in range(6)])
        self.act = act

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.leaky_relu])
def test_the_subnetwork_maximum_is_read_from_a_residual_model(phi):
    def by_hand(x, r):
        branch = r(r(r(x)))
        for block in (0, 1, 0, 1):
            x = 0.36 * (r(x) if block == 0 else x) + 0.64 * r(r(r(x)))
        return max(r(x), branch)

    found = subnetwork_maximum(Residual(phi), jnp.ones((1, 5)), phi)
    assert found.layers == 13
    for x, r in ((1.0, lambda y: 1.07 * y), (0.0, lambda y: y + 0.2), (0.1, lambda y: y + 0.1 * (1 - y) ** 2)):
        assert abs(found(x, r) - by_hand(x, r)) < 1e-9  # weights of float32, their squares made to add up to 1
    shaped = dks(phi, maximum=found)
    assert abs(by_hand(1.0, lambda y: float(shaped.conditions().c_slope) * y) - 1.5) < 1e-8


def test_branches_that_outgrow_the_network_count():
    model = Residual(weight=0.99)
    maximum = subnetwork_maximum(model, jnp.ones((1, 5)), jnp.tanh)
    shaped = dks(jnp.tanh, model=model, inputs=jnp.ones((1, 5)))
    whole = maximum._through(1.0, lambda y: float(shaped.local) * y, 0, len(maximum.nodes) - 1)
    assert whole < 1.5 - 1e-3 or abs(whole - 1.5) < 1e-9
    assert abs(maximum(1.0, lambda y: float(shaped.local) * y) - 1.5) < 1e-9


def test_a_plain_nnx_model_is_its_depth_and_runs_with_the_shaped_activation():
    model = Plain(nnx.Rngs(0))
    x = per_location_normalization(jax.random.normal(jax.random.key(1), (8, 15), jnp.float32))
    shaped = dks(jnp.tanh, model=model, inputs=x)
    assert abs(shaped.alpha - dks(jnp.tanh, depth=5).alpha) < 1e-12
    out = Plain(nnx.Rngs(0), shaped, shaped.kernel_init)(x)
    assert out.shape == (8, 16)
    linen = Residual(shaped)
    assert linen.apply(linen.init(jax.random.key(0), x), x).shape == (8, 3)


def test_weights_and_inputs_keep_q():
    shaped = tat(jax.nn.relu, depth=30)
    for shape in ((20, 50), (50, 20), (3, 3, 8, 12)):
        w = shaped.kernel_init(jax.random.key(0), shape)
        assert abs(float((w**2).sum()) / shape[-1] - 1) < 1e-5  # float32 QR: mean square 1 / fan_in
    x = jax.random.normal(jax.random.key(0), (4, 7, 7, 3), jnp.float32) * 5
    for mode, features in (("one", 4), ("avg_q", 4), ("off", 3)):
        y = per_location_normalization(x, mode)
        assert y.shape == (4, 7, 7, features)
        np.testing.assert_allclose(jnp.mean(y**2, axis=-1), 1.0, rtol=1e-6)
    assert per_location_normalization(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    y = shaped(jnp.ones(3, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_low_precision_does_not_lose_what_delta_cancels():
    shaped = dks(jnp.tanh, depth=1000)  # gamma 47 against delta 0.5: computed in bfloat16 the error would be 0.1
    x = jnp.linspace(-2, 2, 9)
    error = jnp.abs(shaped(x.astype(jnp.bfloat16)).astype(x.dtype) - shaped(x))
    assert float(error.max()) < 0.01  # rounding of x and of the result


class Other(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(
            16, bias_init=jax.nn.initializers.normal(0.1) if self.kind == "bias" else jax.nn.initializers.zeros
        )(x)
        h = {"other": jax.nn.gelu, "exact": lambda v: jax.nn.gelu(v, approximate=False)}.get(self.kind, jnp.tanh)(x)
        if self.kind == "norm":
            h = nn.LayerNorm()(h)
        if self.kind == "gate":
            h = h * jnp.tanh(nn.Dense(16)(x))
        if self.kind == "sum":
            h = x + nn.Dense(16)(h)
            h = jnp.tanh(h)
        if self.kind == "dependent":
            h = 0.6 * x + 0.8 * h
        return nn.Dense(1)(h)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other", "the function .* where phi = tanh is shaped"),
        ("exact", "the function .* where phi = tanh is shaped"),
        ("bias", "a random bias"),
        ("norm", "a norm or a mean over channels"),
        ("gate", "a product of two activations"),
        ("sum", "squares add up to 2"),
        ("dependent", r"the function add\(mul\(0.6, x\), mul\(0.8, tanh\(x\)\)\)"),
    ],
)
def test_models_outside_the_theory_are_refused(kind, message):
    with pytest.raises(ij.UnsupportedLayerError, match=message):
        dks(jnp.tanh, model=Other(kind), inputs=jnp.ones((1, 5)))


def test_unattainable_targets_say_which_bound_fails_and_what_to_do():
    with pytest.raises(ij.UnattainableTargetError, match=r"reaches C'\(1\) = 1\.46(.|\n)*use depth >= 2") as error:
        dks(jax.nn.softplus, depth=[1, 5])
    assert dks(jax.nn.softplus, depth=1, zeta=error.value.attainable - 1e-5).alpha > 10
    with pytest.raises(
        ij.UnattainableTargetError, match=r"C_f\(0\) = 0\.6048257(.|\n)*eta <= 0\.604825(.|\n)*depth >= 13"
    ):
        tat(jax.nn.relu, depth=3)
    assert tat(jax.nn.relu, depth=3, eta=0.6048).negative_slope < 1e-3
    with pytest.raises(ij.UnattainableTargetError, match=r"infinite at a kink(.|\n)*ij.shaping.dks"):
        tat(jax.nn.selu, depth=10)
    for phi in (jnp.exp, jnp.square, lambda x: 2 * x):
        with pytest.raises(ij.UnattainableTargetError, match=r"the bound Q'\(1\) = 1"):
            dks(phi, depth=10)
    with pytest.raises(ij.UnattainableTargetError, match=r"C'\(1\) = 2.751938"):
        dks(jax.nn.leaky_relu, depth=1, zeta=4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dks(jnp.tanh, depth=5, zeta=1.0), "finite numbers with zeta > 1"),
        (lambda: dks(jnp.tanh, depth=5, zeta=float("nan")), "zeta = nan"),
        (lambda: dks(jnp.tanh, depth=0), "integers >= 1"),
        (lambda: dks(jnp.tanh, depth=2.5), "integers >= 1"),
        (lambda: dks(jnp.tanh), "exactly one of"),
        (lambda: dks(jnp.tanh, depth=3, maximum=modified_resnet), "exactly one of"),
        (lambda: dks(jnp.sign, depth=3), "infinite at a jump"),
        (lambda: dks(jnp.tanh, depth=3, q_slope=None), "for the relu family only"),
        (lambda: dks(jnp.tanh, depth=3, zeta=1 + 1e-11), "of a linear one"),
        (lambda: dks(jnp.tanh, maximum=lambda x, r: x), "applies r at least once"),
        (lambda: tat(jnp.tanh, depth=3, tau=0.0), "tau > 0"),
        (lambda: tat(jax.nn.relu, depth=30, eta=1.0), "0 < eta < 1"),
        (lambda: per_location_normalization(jnp.zeros((2, 3)), "off"), "2 locations that are zero"),
        (lambda: per_location_normalization(jnp.ones((2, 3)), "avg_q"), "without locations"),
        (lambda: dks(jnp.tanh, depth=[3, 4]).conditions(), "one shaped activation"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ij.InputError, match=message):
        call()
