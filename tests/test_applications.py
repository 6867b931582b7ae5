"""Applications: gains of linear networks against closed forms and draws, symmetric units against gradient descent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.applications import signal, symmetry


def test_powers_of_n_sigma_squared():
    for gain, depth, value in ((1.1, 100, 13780.6), (0.9, 100, 2.656e-5), (1.5, 50, 6.38e8)):
        found = signal.linear_gain(math.sqrt(gain / 30), [30] * (depth + 1))
        np.testing.assert_allclose([found.forward, found.backward_norm], gain**depth, rtol=1e-12)
        np.testing.assert_allclose(found.forward, value, rtol=1e-3)  # as usually quoted


def test_per_unit_and_norm_gains_differ_where_layers_are_not_square():
    found = signal.linear_gain(50**-0.5, (50, 200))
    values = [found.forward, found.forward_norm, found.backward, found.backward_norm]
    np.testing.assert_allclose(values, [1, 4, 4, 1], rtol=1e-13)
    w = np.random.default_rng(0).normal(size=(400, 50, 200)) / math.sqrt(50)
    ratio = np.sum(np.sum(w, axis=1) ** 2, axis=1) / 50  # of the squared norm of (1, ..., 1)
    assert abs(ratio.mean() - found.forward_norm) < 4 * ratio.std() / 20  # four standard errors
    two = signal.linear_gain([0.1, 0.3], (10, 20, 5))
    np.testing.assert_allclose(two.forward, 10 * 0.01 * 20 * 0.09, rtol=1e-13)


def test_the_typical_network_is_below_the_mean():
    found = signal.linear_gain(64**-0.5, [64] * 65)
    np.testing.assert_allclose(found.log_mean, -1.0052, atol=5e-5)
    np.testing.assert_allclose(found.log_variance, 2.0316, atol=5e-5)
    np.testing.assert_allclose(found.square, (1 + 2 / 64) ** 64, rtol=1e-12)
    assert found.fluctuation == 1.0
    factors = np.random.default_rng(1).chisquare(64, size=(4000, 64)) / 64
    log = np.log(factors).sum(axis=1)
    assert abs(log.mean() - found.log_mean) < 4 * log.std() / math.sqrt(4000)
    assert abs(log.var() / found.log_variance - 1) < 4 * math.sqrt(2 / 4000)


def test_xavier_keeps_neither_side_of_a_rectangular_layer():
    report = signal.xavier_report([256, 64, 64, 64, 64], jax.nn.relu)
    np.testing.assert_allclose(report.forward[0], 1.6, rtol=1e-13)
    np.testing.assert_allclose(report.backward[0], 0.4, rtol=1e-13)
    np.testing.assert_allclose(report.q, 1.6 * 0.5 ** np.arange(4), rtol=1e-12)  # 2^-(L-1) behind the first layer
    np.testing.assert_allclose(report.gradient, 0.5 ** np.arange(3, -1, -1), rtol=1e-12)
    np.testing.assert_allclose(report.limit, math.sqrt(6) / np.sqrt(report.fan_in + report.fan_out), rtol=1e-13)
    linear = signal.xavier_report([64] * 5)
    np.testing.assert_allclose([linear.q, linear.gradient], 1.0, rtol=1e-12)
    kernel = jax.nn.initializers.glorot_uniform()(jax.random.key(0), (256, 64))
    assert float(jnp.abs(kernel).max()) <= report.limit[0] * (1 + 1e-6)
    assert abs(float(kernel.std()) / report.std[0] - 1) < 4 * math.sqrt(0.2 / kernel.size)  # kurtosis 1.8


def test_xavier_tanh_shrinks_like_one_over_twice_the_layer():
    report = signal.xavier_report([32] * 301, jnp.tanh)
    assert abs(2 * 300 * report.q[-1] - 1.0) < 0.01  # the next order is log(l) / l


class Net(nn.Module):
    hidden: object
    readout: object = jax.nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        for _ in range(11):  # Dense_10 comes after Dense_9
            x = jnp.tanh(nn.Dense(8, kernel_init=self.hidden)(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(3, kernel_init=self.readout)(x)


def test_random_networks_are_not_symmetric_and_constant_ones_are():
    x = jnp.ones((2, 4), jnp.float32)
    random = symmetry.report(Net(jax.nn.initializers.lecun_normal()).init(jax.random.key(0), x))
    assert random.flagged == () and [layer.effective_width for layer in random.layers] == [8] * 11 + [3]
    assert [layer.outgoing for layer in random.layers[:-1]] == [layer.name for layer in random.layers[1:]]
    constant = symmetry.report(Net(jax.nn.initializers.constant(0.2)).init(jax.random.key(0), x))
    # the last hidden layer meets a random readout, so that its units part
    assert [layer.effective_width for layer in constant.layers] == [1] * 10 + [8, 3]
    assert len(constant.flagged) == 10 and constant.escape == math.inf
    assert constant.layers[1].stable_rank == pytest.approx(1.0, rel=1e-6)
    assert "1 of 8 units distinct" in repr(constant) and "COPIES" in repr(constant)


def test_a_zero_readout_is_silent_and_no_symmetry():
    found = symmetry.report(
        Net(jax.nn.initializers.lecun_normal(), jax.nn.initializers.zeros).init(
            jax.random.key(0), jnp.ones((2, 4), jnp.float32)
        )
    )
    assert found.flagged == () and [layer.dead for layer in found.layers] == [False] * 10 + [True, False]
    assert math.isnan(found.layers[-1].stable_rank)


def test_convolutions_flattening_and_nnx():
    class Conv(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.out = nnx.Linear(6 * 16, 2, rngs=rngs)

    model = Conv(nnx.Rngs(0))
    kernel = model.conv.kernel[...]
    model.conv.kernel[...] = kernel.at[..., 3].set(kernel[..., 1])
    found = symmetry.report(nnx.state(model, nnx.Param))
    assert found.flagged == () and found.layers[0].outgoing.startswith("out/kernel")  # their readouts differ
    readout = model.out.kernel[...].reshape(16, 6, 2)
    model.out.kernel[...] = readout.at[:, 3].set(readout[:, 1]).reshape(96, 2)
    found = symmetry.report(nnx.state(model, nnx.Param))
    assert found.layers[0].effective_width == 5 and found.layers[0].flagged


def test_models_tell_order_and_gradients():
    x = jnp.ones((3, 4), jnp.float32)
    model = Net(jax.nn.initializers.constant(0.2))
    found = symmetry.report(model, x)
    assert [layer.name for layer in found.layers] == [f"Dense_{i}/kernel" for i in range(12)] and found.dead == ()
    assert len(found.flagged) == 10 and found.escape == math.inf
    # tanh(0) = 0: with zero weights nothing but the output's bias has a gradient
    zero = symmetry.report(Net(jax.nn.initializers.zeros, jax.nn.initializers.zeros), x)
    assert len(zero.dead) == 12
    # sigmoid(0) is not 0: the readout moves, its units in lock step
    sigmoid = nn.Sequential([nn.Dense(6, kernel_init=jax.nn.initializers.zeros), jax.nn.sigmoid, nn.Dense(1)])
    assert symmetry.report(sigmoid, x).dead == ()
    readout = nn.Sequential([nn.Dense(6), jax.nn.sigmoid, nn.Dense(1, kernel_init=jax.nn.initializers.zeros)])
    assert symmetry.report(readout, x).dead == ("layers_0/kernel",)


class Backwards(nnx.Module):
    """Attributes in another order than the computation's."""

    def __init__(self, rngs):
        constant = nnx.initializers.constant(0.5)
        self.a_last = nnx.Linear(8, 2, kernel_init=constant, rngs=rngs)
        self.z_first = nnx.Linear(3, 8, kernel_init=constant, rngs=rngs)

    def __call__(self, x):
        return self.a_last(jnp.tanh(self.z_first(x)))


def test_nnx_factories_and_instances():
    x = jnp.ones((2, 3), jnp.float32)
    for model in (lambda rngs: Backwards(rngs), Backwards(nnx.Rngs(0))):
        assert symmetry.report(model, x).flagged == ("z_first/kernel",)
    assert len(symmetry.report(Backwards(nnx.Rngs(0))).layers) == 2  # an instance alone, in the order of its names


def test_copies_stay_copies_under_training_and_near_copies_part():
    x = jax.random.normal(jax.random.key(1), (32, 4), jnp.float32)
    y = jnp.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(1)])
    shape = jax.eval_shape(model.init, jax.random.key(0), x)
    keys = jax.random.split(jax.random.key(2), 4)

    def near_constant(eps):
        leaves, tree = jax.tree.flatten(shape)
        noisy = [0.3 * (1 + eps * jax.random.normal(k, v.shape, v.dtype)) for k, v in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    @jax.jit
    def train(params, steps):
        loss = lambda p: jnp.mean((model.apply(p, x) - y) ** 2)  # noqa: E731
        return jax.lax.fori_loop(
            0, steps, lambda _, p: jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss)(p)), params
        )

    exact = near_constant(0.0)
    assert symmetry.report(exact).layers[0].effective_width == 1
    # gradients of equal rows are equal but for the order of summation in float32
    assert symmetry.report(train(exact, 300), tolerance=1e-4).layers[0].effective_width == 1
    near = near_constant(1e-3)
    before, after = (symmetry.report(p).layers[0] for p in (near, train(near, 3000)))
    assert before.effective_width == 16 and after.distance > 5 * before.distance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: signal.linear_gain(1.0, [3]), "at least two positive integers"),
        (lambda: signal.linear_gain(1.0, [3.5, 2.0]), "at least two positive integers"),
        (lambda: signal.linear_gain(-1.0, [3, 4]), "one finite positive number"),
        (lambda: signal.linear_gain([1.0, 2.0], [3, 4]), "for 1 layers"),
        (lambda: signal.xavier_report([0, 4]), "at least two positive integers"),
        (lambda: symmetry.report({"bias": jnp.ones(3)}), "without a kernel"),
        (lambda: symmetry.report(nn.Dense(3)), "a model without inputs"),
        (lambda: symmetry.report({"w": jnp.ones((3, 3))}, tolerance=2.0), "a relative distance"),
        (lambda: jax.jit(symmetry.report)({"w": jnp.ones((3, 3))}), "concrete arrays"),
        (lambda: symmetry.report({"w": jnp.full((3, 3), jnp.nan)}), "not finite"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ij.InputError, match=message):
        call()
