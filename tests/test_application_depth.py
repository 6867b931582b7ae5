"""Condition numbers by depth, recurrent cells and residual networks: published numbers, other routes, real networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.applications import conditioning, recurrent, residual

EDGE_B = 0.05**0.5
EDGE_W = 1.3270096611  # ij.critical(tanh, EDGE_B), sigma_w^2 = 1.76095


def hard_tanh(x):
    return jnp.clip(x, -1, 1)


# ------------------------------------------------------------------ condition numbers


def test_condition_numbers_at_the_edge_of_chaos():
    """Figures to the digits in which they were published; the limits are (M + 2) / 2 and (M + 3) / 3."""
    tanh = conditioning.by_depth(jnp.tanh, EDGE_W, EDGE_B, depth=256)
    np.testing.assert_allclose(tanh.ntk[[15, 63, 255]], [7.857, 6.355, 5.978], atol=5e-4)
    relu = conditioning.by_depth(jax.nn.relu, math.sqrt(2), depth=256)
    np.testing.assert_allclose(relu.ntk[[15, 63, 255]], [6.418, 5.079, 4.562], atol=6e-4)
    np.testing.assert_allclose(relu.nngp[[15, 255]], [145.7, 16383], rtol=4e-4)
    assert (tanh.ntk_law.limit, relu.ntk_law.limit) == (6.0, 13 / 3)
    assert (tanh.nngp_law.power, relu.nngp_law.power) == (1.0, 2.0)  # smooth phi: l, kinked: l^2
    pooled = dict(depth=256, architecture="pooled", positions=16)
    found = conditioning.by_depth(jax.nn.relu, math.sqrt(2), **pooled)
    np.testing.assert_allclose(found.ntk[-1], 57.997, atol=6e-4)
    assert found.ntk_law.limit == pytest.approx(163 / 3)
    found = conditioning.by_depth(jnp.tanh, EDGE_W, EDGE_B, **pooled)
    np.testing.assert_allclose(found.ntk[-1], 80.655, atol=6e-4)
    assert found.ntk_law.limit == 81.0


@pytest.mark.slow
def test_limits_are_approached():
    """To/Td -> 1/3 and 1/4, with corrections that fall like log(l) / l."""
    for phi, w, b, limit in ((jnp.tanh, EDGE_W, EDGE_B, 6.0), (jax.nn.relu, 1.0, 0.0, 13 / 3)):
        found = conditioning.by_depth(phi, w, b, depth=2000)
        gap = np.abs(found.ntk[[499, 1999]] - limit)
        assert gap[1] < 0.01 * limit and gap[1] < 0.7 * gap[0]


def test_ordered_phase_has_no_last_depth():
    found = conditioning.by_depth(jnp.tanh, 0.8**0.5, EDGE_B, depth=2000)
    np.testing.assert_allclose(found.chi, 0.64684, atol=5e-6)
    np.testing.assert_allclose(np.exp(found.log_ntk[31] - found.log_ntk[15]), 527.8, atol=0.05)
    assert 0 < found.ntk[127] < math.inf and np.all(np.diff(found.log_ntk) > 0)  # double precision fails here
    growth = np.diff(found.log_ntk)  # log of chi^-l / l
    layer = np.array([200, 1000, 1998])
    np.testing.assert_allclose(growth[layer], -math.log(found.chi) - 1 / (layer + 1), atol=2 / (layer.min() ** 2))
    assert found.ntk[-1] == math.inf and found.log_ntk[-1] > 860  # beyond float64, still known
    np.testing.assert_allclose(np.diff(found.log_nngp)[-1], found.nngp_law.rate, rtol=1e-10)


def test_ordered_phase_of_a_kinked_activation_grows_with_half_the_rate():
    """Gamma'(1) - Gamma'(c) ~ sqrt(1 - c) where phi' jumps, so that kappa ~ chi^(-l/2)."""
    for phi, w, b in ((jax.nn.relu, 1.2, 0.3), (hard_tanh, 0.8, 0.3)):
        found = conditioning.by_depth(phi, w, b, depth=400)
        assert found.ntk_law.rate == pytest.approx(-math.log(found.chi) / 2)
        np.testing.assert_allclose(np.diff(found.log_ntk)[[100, 300, 398]], found.ntk_law.rate, rtol=1e-5)
        np.testing.assert_allclose(np.diff(found.log_nngp)[-1], -math.log(found.chi), rtol=1e-6)


def test_chaotic_phase_tends_to_one():
    found = conditioning.by_depth(jnp.tanh, 2.5**0.5, EDGE_B, depth=64)
    np.testing.assert_allclose(found.chi, 1.13352, atol=5e-6)
    excess = np.expm1(found.log_ntk)
    np.testing.assert_allclose(excess[31] / excess[63], 55.3, atol=0.05)
    np.testing.assert_allclose(found.chi**32, 55.2, atol=0.05)  # which is the law, up to the transient
    deep = conditioning.by_depth(jnp.tanh, 2.5**0.5, EDGE_B, depth=2600)  # Theta's diagonal is 1e141 there
    slope = np.diff(np.log(deep.log_ntk[999:1001]))  # log kappa is kappa - 1 there, 1e-54
    np.testing.assert_allclose(slope, deep.ntk_law.rate, rtol=1e-8)
    c = float(ij.fixed_point(jnp.tanh, 2.5**0.5, EDGE_B).c)
    np.testing.assert_allclose(deep.nngp[-1], (1 + 9 * c) / (1 - c), rtol=1e-9)
    without = conditioning.by_depth(jnp.tanh, 2.0, depth=300)  # c* = 0
    slope = np.diff(np.log(without.log_ntk))[250]
    assert abs(slope - without.ntk_law.rate) < 2 / 250 and without.nngp_law.limit == 1.0


def test_relu_without_biases_does_not_depend_on_the_weight_scale():
    values = [conditioning.by_depth(jax.nn.relu, w, depth=40).log_ntk for w in (0.3, 1.0, 9.0)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])


def test_frozen_correlations_at_a_vanishing_fixed_point():
    found = conditioning.by_depth(jnp.tanh, 1.0, depth=400)  # q* = 0: the cosine stops at 0.44054 on its way
    c = ij.propagate(jnp.tanh, 1.0, 0.0, 399).c[-1]
    assert found.ntk_law.limit == pytest.approx((1 + 9 * c) / (1 - c))
    assert abs(found.ntk[-1] / found.ntk_law.limit - 1) < 0.02
    linear = conditioning.by_depth(lambda x: x, 1.3, depth=30, correlation=0.2)
    np.testing.assert_allclose(linear.ntk, 2.8 / 0.8, rtol=1e-12)


class Convolutional(nn.Module):
    pooled: bool

    @nn.compact
    def __call__(self, x):
        scaled = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        for _ in range(2):
            x = nn.relu(nn.Conv(64, (3,), padding="CIRCULAR", use_bias=False, kernel_init=scaled)(x))
        x = x.mean(1) if self.pooled else x.reshape(len(x), -1)
        return nn.Dense(1, use_bias=False, kernel_init=scaled)(x)


@pytest.mark.parametrize("pooled", [True, False])
def test_against_the_kernels_of_a_convolutional_model(pooled):
    """Three inputs of four positions whose correlations are all 0.3, through the infinite-width kernels of a model."""
    n, d, c = 3, 4, 0.3
    gram = np.full((n * d, n * d), c) + (1 - c) * np.eye(n * d)
    x = (np.linalg.cholesky(gram) * math.sqrt(n * d)).reshape(n, d, n * d)
    kernel = ij.kernel_fn(Convolutional(pooled), x, parameterization="ntk")(x)
    # the first convolution averages three positions: q = (1 + 2 (1/3) ... ) stays equal, and so do the correlations
    shape = dict(architecture="pooled", positions=d) if pooled else dict(architecture="cnn")
    found = conditioning.by_depth(jax.nn.relu, 1.0, depth=3, n=n, correlation=c, **shape)
    np.testing.assert_allclose(ij.condition_number(kernel.nngp), found.nngp[2], rtol=1e-9)
    np.testing.assert_allclose(ij.condition_number(kernel.ntk), found.ntk[2], rtol=1e-9)


def test_against_the_kernels_of_a_dense_model_with_biases():
    x = np.linalg.cholesky(np.full((4, 4), 0.5) + 0.5 * np.eye(4)) * 2  # |x|^2 / 4 = 1
    layer = lambda: nn.Dense(32, kernel_init=nn.initializers.variance_scaling(1.3**2, "fan_in", "normal"))  # noqa: E731
    model = nn.Sequential([layer(), jnp.tanh, layer(), jnp.tanh, layer(), jnp.tanh, layer()])
    weights = ij.kernel_fn(model, x, parameterization={"kernel": 1.0, "bias": 0.0})(x)
    kernel = sum(
        leaf * 1.3**2 / (4 if "layers_0" in name else 32) for name, leaf in weights.leaves.items() if "kernel" in name
    )
    found = conditioning.by_depth(jnp.tanh, 1.3, depth=4, n=4, q0=1.3**2)
    np.testing.assert_allclose(ij.condition_number(kernel), found.ntk[3], rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conditioning.by_depth(jax.nn.relu, 2.0, 0.1, depth=200), "second moment stays finite"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, correlation=1.0), "equal inputs a singular one"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, n=10, correlation=-0.5), "no kernel below that"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, n=1), "n = 1"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, depth=0), "counts weight layers"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, positions=4), "a vector has no positions"),
        (lambda: conditioning.by_depth(jnp.tanh, 1.0, architecture="rnn"), "the readout decides"),
        (lambda: conditioning.by_depth(jnp.tanh, np.nan), "one finite, concrete number"),
        (lambda: conditioning.by_depth(jnp.tanh, 0.0), "same output"),
        (lambda: recurrent.critical(jax.nn.relu, 0.1), "no recurrent weight scale puts relu"),
        (lambda: recurrent.critical(jnp.tanh, -0.1), "input_variance"),
        (lambda: recurrent.memory(jnp.tanh), "two ways to say how strong the input is"),
        (lambda: recurrent.memory(jnp.tanh, input_variance=0.1, hidden=3, inputs=4), "two ways"),
        (lambda: recurrent.memory(jnp.tanh, hidden=0, inputs=4), "number of units"),
        (lambda: recurrent.memory(jnp.tanh, input_variance=0.1, steps=-1), "counts time steps"),
        (lambda: residual.growth(-1), "every block multiplies"),
        (lambda: residual.report(nn.Dense(3), jnp.ones((1, 3)), key=jax.random.key(0)), "no residual branch"),
    ],
)
def test_requests_that_cannot_be_answered(call, message):
    with pytest.raises(ij.InputError, match=message):
        call()


# ------------------------------------------------------------------ recurrent cells


def test_critical_recurrent_variance_with_inputs():
    for v, variance in ((0.01, 1.42421), (0.1, 1.98607), (0.25, 2.40149), (0.5, 2.84317), (1.0, 3.44321)):
        point = recurrent.critical(jnp.tanh, v)
        np.testing.assert_allclose(point.variance, variance, atol=5e-6)  # published to five decimals
        # another route: the slope at the fixed point of the cell that has these weights
        np.testing.assert_allclose(recurrent.memory(jnp.tanh, point.sigma_w, input_variance=v).gain, 1.0, rtol=1e-9)
        assert point.xi_c == math.inf and point.c == 1
    assert recurrent.critical(jnp.tanh, 0.0).variance == 1.0


def test_sequences_with_partly_correlated_inputs():
    found = recurrent.memory(jnp.tanh, 1.0, input_variance=0.25, input_correlation=0.5)
    np.testing.assert_allclose([found.q, found.correlation], [0.53465, 0.48314], atol=5e-6)
    above = recurrent.memory(jnp.tanh, math.sqrt(2.5), input_variance=0.25, input_correlation=0.5)
    np.testing.assert_allclose(above.correlation, 0.3671, atol=5e-5)  # at n = 1000, tied weights: 0.3335
    assert 0 < recurrent.critical(jnp.tanh, 0.25, 0.5).xi_c < 10


def test_one_kernel_for_input_and_state_keeps_the_scale_and_forgets():
    found = recurrent.memory(lambda x: x, hidden=192, inputs=64, steps=10)
    np.testing.assert_allclose([found.q, found.rho, found.kept], [1.0, 0.75, 0.75**10], rtol=1e-9)
    np.testing.assert_allclose(found.kept, 0.05631, atol=5e-6)
    equal = recurrent.memory(lambda x: x, hidden=100, inputs=100, steps=7)
    np.testing.assert_allclose(equal.kept, 2.0**-7, rtol=1e-9)
    cell = recurrent.memory(jnp.tanh, 1.2, hidden=30, inputs=10)
    apart = recurrent.memory(jnp.tanh, 1.2 * math.sqrt(0.75), input_variance=1.44 * 0.25)
    np.testing.assert_allclose([cell.q, cell.gain], [apart.q, apart.gain], rtol=1e-12)
    np.testing.assert_allclose(cell.second_moment, ij.gaussian.moment(jnp.tanh, cell.q), rtol=1e-12)


def test_gradients_of_a_linear_cell_shrink_as_rho_to_the_steps():
    """64 inputs, 192 linear units, ten steps with tied weights, as one kernel on [x, h] is drawn."""

    def one(key):
        first, second, third = jax.random.split(key, 3)
        w = jax.random.normal(first, (256, 192)) / 16.0
        x = jax.random.normal(second, (40, 64))
        step = lambda h, x: (jnp.concatenate([x, h]) @ w, None)  # noqa: E731
        run = lambda h: jax.lax.scan(step, h, x[:10])[0]  # noqa: E731
        settled = jax.lax.scan(step, jnp.zeros(192), x)[0]
        v = jax.random.normal(third, (192,))
        gradient = jax.vjp(run, settled)[1](v)[0]
        return jnp.mean(settled**2), jnp.sum(gradient**2) / jnp.sum(v**2)

    q, kept = (np.asarray(a) for a in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200)))
    found = recurrent.memory(lambda x: x, hidden=192, inputs=64, steps=10)
    assert abs(q.mean() - found.q) < 4 * q.std() / math.sqrt(200)
    # tied weights deviate by powers of T^2 / n, here below 1 %
    assert abs(kept.mean() - found.kept) < 4 * kept.std() / math.sqrt(200) + 0.01 * found.kept


# ------------------------------------------------------------------ residual networks


class Plain(nn.Module):
    alpha: float = 1.0
    blocks: int = 10
    width: int = 128
    gamma: bool = False
    after: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(self.blocks):
            h = nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.he_normal(), name=f"branch{i}")(
                nn.relu(x)
            )
            if self.gamma:
                h = h * self.param(f"gamma{i}", nn.initializers.zeros, (1, self.width), jnp.float32)
            x = x + (h if self.alpha == 1 else self.alpha * h)
            x = nn.relu(x) if self.after else x
        return nn.Dense(1, name="head")(x)


def test_growth_in_closed_form():
    assert residual.growth(10, 1.0) == pytest.approx(1024, rel=1e-13)
    assert residual.growth(10, 10**-0.5) == pytest.approx(2.594, abs=5e-4)
    assert residual.growth(10, 0.0) == 1.0 and residual.growth(10**6, 1.0) == math.inf
    assert residual.growth(10**6, 1e-3) == pytest.approx(math.e, rel=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 10**-0.5])
def test_growth_is_measured_in_signals_and_gradients(alpha):
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.float32)
    found = residual.report(Plain(alpha), x, key=jax.random.key(1), seeds=24)
    expected = residual.growth(10, alpha)
    for mean, error in (found.growth_measured, found.gradient_growth_measured):
        assert abs(mean - expected) < 4 * error
    assert abs(found.growth - expected) < 0.1 * expected  # product of ten measured factors
    assert not found.shortcut_only and found.silent == ()
    assert [block.end for block in found.blocks] == [f"branch{i}/kernel" for i in range(10)]
    for block in found.blocks:
        assert abs(block.alpha2[0] - alpha**2) < 5 * block.alpha2[1] and block.shortcut == "identity"


def test_zero_gamma_is_the_identity_and_silences_the_branches():
    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.float32)
    model = Plain(blocks=3, width=16, gamma=True)
    found = residual.report(model, x, key=jax.random.key(1), seeds=2)
    assert found.shortcut_only and found.identity_trunk and found.growth == 1.0
    assert found.silent == ("branch0/kernel", "branch1/kernel", "branch2/kernel")
    assert found.moving == ("gamma0", "gamma1", "gamma2")
    assert found.gradient_growth_measured == pytest.approx((1.0, 0.0), abs=1e-5)  # squares in float32
    params = model.init(jax.random.key(2), x)
    y = jnp.ones((3, 1), jnp.float32)
    loss = lambda p: jnp.mean((model.apply(p, x) - y) ** 2)  # noqa: E731
    biggest = []
    for _ in range(3):
        gradients = jax.grad(loss)(params)
        biggest.append(float(jnp.abs(gradients["params"]["branch1"]["kernel"]).max()))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    assert biggest[0] == 0 < min(biggest[1:])  # the first step moves gamma alone


def test_a_relu_after_the_sum_is_no_identity():
    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.float32)
    found = residual.report(Plain(blocks=3, width=16, gamma=True, after=True), x, key=jax.random.key(1), seeds=2)
    assert found.shortcut_only and not found.identity_trunk
    assert [block.shortcut for block in found.blocks] == ["identity", "transformed", "transformed"]


def test_a_shortcut_through_a_cast_is_one():
    init = lambda key: {"w": jnp.ones((4, 4), jnp.float32), "v": jnp.zeros((4, 4), jnp.float64)}  # noqa: E731
    apply = lambda p, x: x.astype(jnp.float64) + jnp.tanh(x @ p["w"]).astype(jnp.float64) @ p["v"]  # noqa: E731
    found = residual.report((init, apply), jnp.ones((2, 4), jnp.float32), key=jax.random.key(0), seeds=1)
    assert found.identity_trunk and found.silent == ("w",) and found.moving == ("v",)


class Projected(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 8, rngs=rngs)
        self.first, self.second = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 12, rngs=rngs)
        self.skip = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, use_running_average=False, rngs=rngs, scale_init=nnx.initializers.zeros)
        self.head = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        return self.head(self.skip(x) + self.norm(self.second(nnx.relu(self.first(x)))))


def test_nnx_with_a_projection_shortcut_and_zero_gamma():
    x = jax.random.normal(jax.random.key(0), (5, 6), jnp.float32)
    found = residual.report(lambda rngs: Projected(rngs), x, key=jax.random.key(1), seeds=2)
    (block,) = found.blocks
    assert (block.end, block.shortcut, block.zero) == ("norm/scale", "projection", True)
    assert found.shortcut_only and not found.identity_trunk
    assert {"first/kernel", "second/kernel"} <= set(found.silent) and "skip/kernel" not in found.silent
    assert "norm/scale" in found.moving
    instance = residual.report(Projected(nnx.Rngs(0)), x, key=jax.random.key(1))
    assert instance.networks == 1 and instance.shortcut_only


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            h = nn.BatchNorm(use_running_average=False)(x)
            x = x + nn.Dense(128, use_bias=False, kernel_init=nn.initializers.he_normal())(nn.relu(h))
        return nn.Dense(1)(x)


def test_a_norm_in_the_branch_makes_the_growth_linear():
    x = jax.random.normal(jax.random.key(0), (64, 128), jnp.float32)
    found = residual.report(Normed(), x, key=jax.random.key(1), seeds=8)
    mean, error = found.growth_measured
    assert abs(mean - 9) < 4 * error + 0.3  # 1 + l; batches of 64 deviate by a few percent
