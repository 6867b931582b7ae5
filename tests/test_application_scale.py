"""Scales of inputs and heads: closed forms, published numbers, and gradient descent itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.applications import heads, input_scale

GLOROT, HE, LECUN = nn.initializers.glorot_normal(), nn.initializers.he_normal(), nn.initializers.lecun_normal()


def network(widths, phi, init, bias=False):
    layers = []
    for width in widths[:-1]:
        layers += [nn.Dense(width, use_bias=bias, kernel_init=init), phi]
    return nn.Sequential([*layers, nn.Dense(widths[-1], use_bias=bias, kernel_init=init)])


X10 = jnp.ones((1, 10), jnp.float32)  # |x|^2 = d


# ------------------------------------------------------------------ input scales


@pytest.mark.parametrize(("eta", "published"), [(1e-3, 0.98581), (5e-4, 1.39414), (2e-4, 2.20433)])
def test_homogeneous_networks_have_a_closed_form(eta, published):
    found = input_scale.critical(network((1024, 1024, 1), nn.relu, HE), X10, eta, networks=0)
    np.testing.assert_allclose(found.critical, math.sqrt(2 / (eta * (10 + 2048))), rtol=1e-7)  # float32 initializers
    np.testing.assert_allclose(found.critical, published, atol=5e-6)
    np.testing.assert_allclose(found.divergence / found.critical, math.sqrt(2), rtol=1e-12)
    assert found.closed_form and found.exponent == 2 and found.margin == 1 / found.critical
    np.testing.assert_allclose(sum(found.layers.values()), 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("eta", "published"),
    [(1e-3, 453.7), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((5e-4, 1263.0), (2e-4, 3692.0)))],
)
def test_saturating_networks_need_root_finding(eta, published):
    found = input_scale.critical(network((1024, 1024, 1), jnp.tanh, LECUN), X10, eta, networks=0)
    np.testing.assert_allclose(found.critical, published, rtol=3e-4)  # four digits were published
    assert not found.closed_form and 0.5 < found.exponent < 1 and found.layer == "layers_0"
    # the same from the blocks in closed form: d s^2 B_1, 1024 V(q_1) B_2 and 1024 V(q_2)
    s = found.critical
    v, d = (lambda q: float(ij.gaussian.moment(jnp.tanh, q))), (lambda q: float(ij.gaussian.moment_prime(jnp.tanh, q)))
    first, second = s * s, v(s * s)
    blocks = 10 * s * s * d(first) * d(second) + 1024 * v(first) * d(second) + 1024 * v(second)
    np.testing.assert_allclose(eta * blocks, 2.0, rtol=1e-6)


@pytest.mark.slow
def test_the_saturated_regime_is_told():
    with pytest.warns(ij.UnreliableExpansionWarning, match="deviates by .* of its mean between random networks"):
        found = input_scale.critical(network((256, 256, 1), jnp.tanh, LECUN), X10, 1e-3)
    assert found.scatter > 0.5
    wide = input_scale.critical(network((256, 256, 1), nn.relu, HE), X10, 1e-3)  # no warning
    assert 0 < wide.scatter < 0.5


def test_relative_updates_against_theory_and_drawn_networks():
    """[64, 512, 512, 512, 1], eta = 0.01, s = 10: theory 0.354, 1, 1, 22.6."""
    model, x = network((512, 512, 512, 1), nn.relu, HE), jnp.ones((1, 64), jnp.float32)
    found = input_scale.critical(model, x, 0.01, "relative_update")
    np.testing.assert_allclose(found.critical, (0.01 * math.sqrt(512)) ** -0.5, rtol=1e-6)  # the readout fails first
    assert found.layer == "layers_6" and found.closed_form and math.isnan(found.divergence)
    at_ten = np.array(list(found.layers.values())) * (10 / found.critical) ** 2
    np.testing.assert_allclose(at_ten, [math.sqrt(1 / 8), 1, 1, math.sqrt(512)], rtol=1e-6)
    inner = input_scale.critical(network((64, 64), nn.relu, HE), x, 0.01, "relative_update")
    np.testing.assert_allclose(inner.critical, 0.01**-0.5 / 64**0.25, rtol=1e-6)  # eta^-1/2 for one output


@pytest.mark.slow
def test_relative_updates_of_drawn_networks():
    model, x = network((256, 256, 1), nn.relu, HE), 10 * jnp.ones((1, 64), jnp.float32)

    @jax.jit
    @jax.vmap
    def squares(key):
        params = model.init(key, x)
        gradients = jax.grad(lambda p: 0.5 * jnp.sum(model.apply(p, x) ** 2))(params)
        sizes = lambda tree: jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)])  # noqa: E731
        return sizes(gradients), sizes(params)

    gradients, weights = (np.asarray(a) for a in squares(jax.random.split(jax.random.key(0), 400)))
    found = input_scale.critical(model, x, 0.01, "relative_update")
    theory = np.array(list(found.layers.values())) / found.critical**2  # at s = 1 of these inputs
    ratio = 0.01 * np.sqrt(gradients.mean(0) / weights.mean(0))
    error = 0.5 * ratio * gradients.std(0) / gradients.mean(0) / 20
    assert np.all(np.abs(ratio - theory) < 4 * error + 0.05 * theory)  # and a bias of order depth / width


@pytest.mark.slow
def test_residuals_and_biases_leave_the_closed_form():
    model, x = network((64, 64, 1), nn.relu, HE, bias=True), jnp.ones((2, 8), jnp.float32).at[1, :4].set(-1.0)
    found = input_scale.critical(model, x, 1e-3, networks=0)
    assert not found.closed_form
    kernel = ij.kernel_fn(model, x)(np.asarray(x, np.float64) * found.critical).ntk
    np.testing.assert_allclose(1e-3 * np.linalg.eigvalsh(kernel)[-1] / 2, 2.0, rtol=1e-7)
    assert input_scale.critical(model, x, 10.0, networks=0).critical == 0.0  # the biases' part alone is too much
    y = jnp.array([3.0, -1.0])
    plain = network((64, 64, 1), nn.relu, HE)
    shifted = input_scale.critical(plain, x, 1e-2, "relative_update", y=y)
    assert not shifted.closed_form
    assert shifted.critical < input_scale.critical(plain, x, 1e-2, "relative_update").critical


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(10, 256, use_bias=False, kernel_init=HE, rngs=rngs)
        self.last = nnx.Linear(256, 1, use_bias=False, kernel_init=HE, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def test_nnx_and_pairs():
    from_nnx = input_scale.critical(lambda rngs: Net(rngs), X10, 1e-2, networks=0)
    np.testing.assert_allclose(from_nnx.critical, math.sqrt(2 / (1e-2 * 266)), rtol=1e-6)
    assert set(from_nnx.layers) == {"first", "last"}
    model = network((256, 1), nn.relu, HE)
    pair = (lambda key: model.init(key, X10), lambda p, x: model.apply(p, x))
    found = input_scale.critical(pair, X10, 1e-2, networks=0)
    np.testing.assert_allclose(found.critical, from_nnx.critical, rtol=1e-6)


@pytest.mark.slow
def test_between_two_and_four_wide_networks_catapult_and_recover():
    """Linear network: at eta lambda = 3.6 the loss rises and falls again, at 7 it diverges; at 1.6 it never rises."""
    model = network((512, 512, 1), lambda x: x, LECUN)
    x = jax.random.normal(jax.random.key(0), (8, 16), jnp.float32)
    x = x / jnp.sqrt(jnp.mean(x**2, 1, keepdims=True))
    y = jax.random.normal(jax.random.key(1), (8, 1), jnp.float32)
    params = model.init(jax.random.key(2), x)
    kernel = ij.empirical_ntk(model)(params["params"], x)  # this network's own, so that nothing is left to chance
    base = input_scale.critical(model, x, 1e-3, networks=0)
    correction = math.sqrt(
        float(np.linalg.eigvalsh(ij.kernel_fn(model, x)(x).ntk)[-1]) / np.linalg.eigvalsh(kernel)[-1]
    )

    def losses(s):
        loss = lambda p: 0.5 * jnp.mean((model.apply(p, s * x) - y) ** 2)  # noqa: E731

        def step(p, _):
            value, gradient = jax.value_and_grad(loss)(p)
            return jax.tree.map(lambda a, g: a - 1e-3 * g, p, gradient), value

        return jax.lax.scan(step, params, length=60)[1]

    # the share of eta lambda = 2 goes with s^2
    scales = np.array([0.9, 1.3, 2.0], np.float32) * np.float32(base.critical * correction)
    calm, catapult, lost = np.asarray(jax.jit(jax.vmap(losses))(scales))
    assert np.all(np.diff(calm) <= 1e-6)
    assert catapult.max() > 3 * catapult[0] and catapult[-1] < catapult[0]
    assert not np.isfinite(lost[-1]) or lost[-1] > 1e6


# ------------------------------------------------------------------ heads


def relu_features(n=400, d=96, scale=1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 48))
    return scale * np.maximum(x @ rng.normal(size=(48, d)) / math.sqrt(24), 0)


def test_first_cross_entropy_in_closed_form():
    assert heads.cross_entropy(7, 0.0) == pytest.approx(math.log(7), abs=1e-12)
    np.testing.assert_allclose(heads.cross_entropy(10, 0.01), 2.30709, atol=1e-5)
    z, w = np.polynomial.hermite_e.hermegauss(120)  # two classes: E log(1 + exp(sqrt(2 v) z)), smooth
    for v in (0.3, 1.0):
        expected = w @ np.logaddexp(0, math.sqrt(2 * v) * z) / w.sum()
        np.testing.assert_allclose(heads.cross_entropy(2, v), expected, rtol=1e-9)
    # the quadratic form overshoots at v = 2.5
    logits = np.random.default_rng(1).normal(size=(200_000, 10)) * math.sqrt(2.5)
    loss = np.log(np.exp(logits).sum(1)) - logits[:, 0]
    assert abs(loss.mean() - heads.cross_entropy(10, 2.5)) < 4 * loss.std() / math.sqrt(200_000)
    assert math.log(10) + 2.5 * 0.45 - heads.cross_entropy(10, 2.5) > 0.1
    many = heads.cross_entropy(10, np.linspace(0, 9, 1001))  # interpolated
    np.testing.assert_allclose(many[::250], heads.cross_entropy(10, np.linspace(0, 9, 5)), rtol=1e-9)


@pytest.mark.parametrize("scheme", ["xavier", "matched"])
def test_logits_loss_and_feature_gradients_of_drawn_heads(scheme):
    h = relu_features()
    found = heads.transfer(h, 10, scheme=scheme, variance=0.5)
    labels = np.arange(len(h)) % 10
    model = nn.Dense(10, kernel_init=found.head.kernel, bias_init=found.head.bias)
    features = jnp.asarray(h, jnp.float32)

    @jax.jit
    @jax.vmap
    def draw(key):
        params = model.init(key, features)
        loss = lambda h: optax.softmax_cross_entropy_with_integer_labels(model.apply(params, h), labels)  # noqa: E731
        logits = model.apply(params, features)
        return jnp.mean(logits**2), jnp.mean(jnp.var(logits, 0)), jnp.mean(loss(features))

    second, spread, loss = (np.asarray(a) for a in draw(jax.random.split(jax.random.key(0), 300)))
    for measured, theory in (
        (second, found.logit_second_moment),
        (spread, found.logit_variance),
        (loss, found.initial_loss),
    ):
        assert abs(measured.mean() - theory) < 4 * measured.std() / math.sqrt(300)
    mean = h.mean(0)
    np.testing.assert_allclose(found.logit_second_moment, found.std**2 * np.sum(h**2, 1).mean(), rtol=1e-12)
    np.testing.assert_allclose(found.logit_variance, found.std**2 * np.sum((h - mean) ** 2, 1).mean(), rtol=1e-12)
    if scheme == "xavier":
        np.testing.assert_allclose(found.std, math.sqrt(2 / 106), rtol=1e-12)
    else:
        np.testing.assert_allclose(found.logit_second_moment, 0.5, rtol=1e-12)


def test_feature_gradients_and_learning_rates():
    h = relu_features()
    found = heads.transfer(h, 10, variance=1e-4)  # nearly uniform softmax
    np.testing.assert_allclose(found.feature_gradient, 96 * found.std**2 * 0.9, rtol=1e-12)
    rng = np.random.default_rng(3)
    g = np.full(10, 0.1) - np.eye(10)[0]
    w = found.std * rng.normal(size=(2000, 96, 10))
    squares = np.sum((w @ g) ** 2, 1)
    assert abs(squares.mean() - found.feature_gradient) < 4 * squares.std() / math.sqrt(2000)
    gram = h.T @ h / len(h)
    np.testing.assert_allclose(found.max_rate_squared, 2 / np.linalg.eigvalsh(gram)[-1], rtol=1e-10)

    def grows(rate):
        w, direction = np.zeros((96, 1)), np.linalg.eigh(gram)[1][:, -1:]
        for _ in range(200):
            w = w - rate * gram @ (w - direction)
        return np.linalg.norm(w - direction)

    assert grows(0.99 * found.max_rate_squared) < 0.1 and grows(1.01 * found.max_rate_squared) > 5
    # the Hessian of softmax at uniform is (1/C)(1 - 1 1^T / C) x gram, with largest eigenvalue 1/C
    np.testing.assert_allclose(found.max_rate_softmax, 10 * found.max_rate_squared, rtol=1e-12)


def test_centred_heads_and_scales():
    h = relu_features(scale=3.0)
    found = heads.transfer(h, 5, variance=0.2, centered=True)
    np.testing.assert_allclose([found.logit_second_moment, found.logit_variance], 0.2, rtol=1e-10)
    w = found.head.kernel(jax.random.key(0), (96, 5), jnp.float64)
    np.testing.assert_allclose((h @ w).mean(0) + found.head.bias.of(w), 0, atol=1e-12)


def test_heads_of_many_tasks_add_up_in_the_trunk():
    h = relu_features()
    sizes, weights = {"a": 10, "b": 3, "c": 1}, {"a": 1.0, "b": 2.0, "c": 0.5}
    found = heads.multi_task(
        dict.fromkeys(sizes, h), sizes, weights=weights, gradients={"a": 0.4, "b": 1.0, "c": 2.0}, scheme="xavier"
    )
    expected = sum(
        weights[t] ** 2 * 96 * sizes[t] * 2 / (96 + sizes[t]) * {"a": 0.4, "b": 1.0, "c": 2.0}[t] for t in sizes
    )
    np.testing.assert_allclose(found.trunk_gradient, expected, rtol=1e-12)
    rng = np.random.default_rng(4)
    squares = []
    for _ in range(1500):
        total = np.zeros(96)
        for t, square in (("a", 0.4), ("b", 1.0), ("c", 2.0)):
            w = found.tasks[t].std * rng.normal(size=(96, sizes[t]))
            total += weights[t] * w @ (math.sqrt(square) * rng.normal(size=sizes[t]))
        squares.append(total @ total)
    assert abs(np.mean(squares) - expected) < 4 * np.std(squares) / math.sqrt(1500)
    np.testing.assert_allclose(sum(found.shares.values()), 1.0, rtol=1e-12)
    equal = heads.multi_task(dict.fromkeys("abcdefghi", h), dict.fromkeys("abcdefghi", 4))
    np.testing.assert_allclose([equal.growth, equal.normalized["a"]], [3.0, 1 / 3], rtol=1e-12)
    again = heads.multi_task(dict.fromkeys("abcdefghi", h), dict.fromkeys("abcdefghi", 4), weights=equal.normalized)
    np.testing.assert_allclose(again.trunk_gradient, equal.tasks["a"].feature_gradient, rtol=1e-12)
    assert again.tasks["a"].std == equal.tasks["a"].std  # loss weights do not enter the scales


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: input_scale.critical(nn.Dense(1), X10, 0.0), "it is a step size"),
        (lambda: input_scale.critical(nn.Dense(1), X10, 0.1, "norm"), "what a catastrophic update is"),
        (lambda: input_scale.critical(nn.Dense(1), X10, 0.1, y=jnp.ones(1)), "does not depend on the targets"),
        (lambda: input_scale.critical(nn.Dense(1), jnp.ones((1, 3), int), 0.1), "a scale multiplies them"),
        (lambda: input_scale.critical(nn.Dense(1), X10, 0.1, "relative_update", y=jnp.ones(2)), "has its target"),
        (lambda: input_scale.critical(nn.Dense(1), X10, 0.1, networks=1), "needs two values"),
        (
            lambda: input_scale.critical(nn.MultiHeadDotProductAttention(2), jnp.ones((2, 3, 4)), 0.1),
            "the exact infinite-width theory|exact",
        ),
        (lambda: heads.transfer(np.ones(3), 2), "concrete, finite array"),
        (lambda: heads.transfer(np.ones((3, 2)), 0), "number of outputs"),
        (lambda: heads.transfer(np.ones((3, 2)), 2, scheme="he"), "chooses the kernel's scale"),
        (lambda: heads.transfer(np.ones((3, 2)), 2, scheme="xavier", centered=True), "does not look at the features"),
        (lambda: heads.cross_entropy(3, -1.0), "it is a variance"),
        (lambda: heads.multi_task({"a": np.ones((3, 2))}, {"b": 2}), "the same tasks in each"),
        (lambda: heads.multi_task({"a": np.ones((3, 2))}, {"a": 2}, weights={"a": 0.0}), "nothing is learnt"),
    ],
)
def test_requests_that_cannot_be_answered(call, message):
    with pytest.raises(ij.InputError, match=message):
        call()
