"""Ready sets on real Flax models: what they promise, exactly, and the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax import rules as R

KEY = jax.random.key(3)
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.float32)


class Block(nn.Module):
    """A bottleneck as in ResNet-50: three convolutions, a norm behind each, relu behind the sum."""

    features: int
    stride: int = 1
    branch: bool = True

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=False, name=name)

        shortcut = x
        if x.shape[-1] != 4 * self.features or self.stride > 1:
            shortcut = nn.Conv(4 * self.features, (1, 1), (self.stride,) * 2, use_bias=False, name="projection")(x)
            shortcut = norm("norm of projection")(shortcut)
        if not self.branch:
            return nn.relu(shortcut)
        y = nn.relu(norm("norm1")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv1")(x)))
        y = nn.Conv(self.features, (3, 3), (self.stride,) * 2, use_bias=False, name="conv2")(y)
        y = nn.Conv(4 * self.features, (1, 1), use_bias=False, name="conv3")(nn.relu(norm("norm2")(y)))
        return nn.relu(shortcut + norm("norm3")(y))


class ResNet(nn.Module):
    branch: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for stage in range(2):
            for i in range(2 - stage):
                stride = 2 if stage and not i else 1
                x = Block(4 * 2**stage, stride, self.branch, name=f"block{stage}{i}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def apply(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])[0]


def subtree(tree, names):
    return {k: subtree(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in names.items()}


@pytest.mark.slow
def test_zero_gamma_resnet_is_its_shortcuts_bit_for_bit_and_only_gamma_moves():
    model, shortcuts = ResNet(), ResNet(branch=False)
    variables = jax.jit(model.init)(KEY, IMAGES)
    new = ij.reinitialize(variables, R.zero_gamma(), KEY, model=model, inputs=IMAGES)
    alone = subtree(new, jax.eval_shape(shortcuts.init, KEY, IMAGES))
    np.testing.assert_array_equal(apply(model, new, IMAGES), apply(shortcuts, alone, IMAGES))

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: (apply(model, {**new, "params": p}, IMAGES) ** 2).sum())(params)

    first = gradient(new["params"])
    for name in ("block00", "block01", "block10"):
        inside = [first[name][k] for k in ("conv1", "conv2", "conv3", "norm1", "norm2")]
        assert not any(leaf.any() for leaf in jax.tree.leaves(inside))
        assert first[name]["norm3"]["scale"].any()
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, new["params"], first)
    assert gradient(moved)["block01"]["conv1"]["kernel"].any()


class TransformerNNX(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(4)])
        self.attention = nnx.List([nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs) for _ in range(2)])
        self.up = nnx.List([nnx.Linear(16, 64, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(64, 16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.down[i](nnx.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x)


def test_zero_gamma_and_gpt2_on_an_nnx_transformer():
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    model = TransformerNNX(rngs=nnx.Rngs(0))
    rows = {r.path: r.new_std for r in ij.plan(model, R.gpt2(), model=model, inputs=tokens).rows}
    for path, std in {"attention/1/out/kernel": 0.01, "down/0/kernel": 0.01, "up/0/kernel": 0.02,
                      "attention/0/query/kernel": 0.02, "embed/embedding": 0.02, "norms/1/scale": 1.0,
                      "head/kernel": 0.02, "head/bias": 0.0}.items():  # fmt: skip
        np.testing.assert_allclose(rows[path], std, rtol=1e-12)  # four branches: 0.02 / sqrt(4)
    assert ij.reinitialize(model, R.zero_gamma(), KEY, model=model, inputs=tokens) is model
    np.testing.assert_array_equal(model(tokens), model.head(model.embed(tokens)))
    assert model.up[0].kernel[...].any() and not model.down[0].kernel[...].any()


class NormFree(nn.Module):
    """Six residual branches of two kernels, three of three; no norms."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="stem")(x)
        for i in range(9):
            y = x
            for j in range(2 + (i >= 6)):
                y = nn.Dense(32, name=f"b{i}{j}")(nn.relu(y))
            x = x + y
        return nn.Dense(4, name="head")(x)


def test_fixup_formula():
    x = jnp.ones((1, 8), jnp.float32)
    variables = NormFree().init(KEY, x)
    rows = {r.path: r.new_std for r in ij.plan(variables, R.fixup(), model=NormFree(), inputs=x).rows}
    for name, expected in {
        "stem": math.sqrt(2 / 8), "b00": 9**-0.5 * math.sqrt(2 / 32), "b01": 0.0,
        "b60": 9**-0.25 * math.sqrt(2 / 32), "b61": 9**-0.25 * math.sqrt(2 / 32), "b62": 0.0, "head": 0.0,
    }.items():  # fmt: skip
        np.testing.assert_allclose(rows[f"{name}/kernel"], expected, rtol=1e-12)
    assert "head" in str(ij.plan(variables, R.fixup(classifier="keep"), model=NormFree(), inputs=x))
    new = ij.reinitialize(variables, R.fixup(), KEY, model=NormFree(), inputs=x)
    assert not NormFree().apply(new, x).any()


def test_rezero_sets_the_gains():
    def apply_fn(params, x):
        for w, alpha in zip(params["w"], params["alpha"], strict=True):
            x = x + alpha * jnp.tanh(x @ w)
        return x

    params = {"w": jnp.ones((3, 4, 4)), "alpha": jnp.ones(3)}
    model = (lambda key: params, apply_fn)
    x = jax.random.normal(KEY, (2, 4))
    new = ij.reinitialize(params, R.rezero(), KEY, model=model, inputs=x)
    assert not new["alpha"].any() and new["w"].all()
    np.testing.assert_array_equal(apply_fn(new, x), x)


def attention_params(depth):
    block = {"attention": {k: {"kernel": jnp.ones((48, 48))} for k in ("query", "key", "value", "out")},
             "mlp": {"up": {"kernel": jnp.ones((48, 192)), "bias": jnp.ones(192)}}}  # fmt: skip
    return {f"layer{i}": block for i in range(depth)}


@pytest.mark.parametrize(
    ("rules", "encoder", "decoder"),
    [
        (R.deepnorm(6, 4), 0.87 * (6**4 * 4) ** (-1 / 16), (12 * 4) ** -0.25),
        (R.t_fixup(6, 4), 0.67 * 6**-0.25, (9 * 4) ** -0.25),
    ],
)
def test_deepnorm_and_t_fixup_formulas(rules, encoder, decoder):
    params = {"encoder": attention_params(1), "decoder": attention_params(1), "lm": {"kernel": jnp.ones((48, 48))}}
    rows = {r.path: r.new_std for r in ij.plan(params, rules).rows}
    square, wide = math.sqrt(2 / 96), math.sqrt(2 / 240)
    for part, gain in (("encoder", encoder), ("decoder", decoder)):
        for name, std in (("attention/query", square), ("attention/key", square), ("attention/value", gain * square),
                          ("attention/out", gain * square), ("mlp/up", gain * wide)):  # fmt: skip
            np.testing.assert_allclose(rows[f"{part}/layer0/{name}/kernel"], std, rtol=1e-12)
    assert rows["encoder/layer0/mlp/up/bias"] == 0
    np.testing.assert_allclose(rows["lm/kernel"], square, rtol=1e-12)


def test_t_fixup_embeddings():
    rows = ij.plan(
        {"embed": {"embedding": jnp.ones((30, 16))}, "o": {"kernel": jnp.ones((4, 4))}}, R.t_fixup(2, 5)
    ).rows
    np.testing.assert_allclose(rows[0].new_std, 45**-0.25 / 4, rtol=1e-12)


@pytest.mark.slow
def test_siren_keeps_every_sine_standard_normal():
    """Sitzmann et al., supplement 1.5: pre-activations of variance 1 from the second layer on."""
    omega = 30.0
    layers = []
    for _ in range(5):
        layers += [nn.Dense(256), lambda x: jnp.sin(omega * x)]
    model = nn.Sequential([*layers, nn.Dense(1)])
    x = jax.random.uniform(KEY, (256, 2), jnp.float32, -1, 1)
    params = ij.reinitialize(model.init(KEY, x)["params"], R.siren(omega), KEY, model=model, inputs=x)
    for i in range(2, 10, 2):
        h = nn.Sequential(layers[: i + 1]).apply({"params": {k: params[k] for k in list(params) if int(k[7:]) <= i}}, x)
        # the bias adds 30^2 / (3 * 256) = 1.17; sines are arcsine distributed: E sin^2 = 1/2
        expected = 1.0 + omega**2 / (3 * 256)
        assert abs(float(((omega * h) ** 2).mean()) / expected - 1) < 0.1  # 256 units of correlated inputs


def test_torch_default_biases_follow_their_kernels():
    model, x = nn.Conv(400, (3, 3)), jnp.ones((1, 5, 5, 7), jnp.float32)
    new = ij.reinitialize(model.init(KEY, x), R.torch_default(), KEY, model=model, inputs=x)["params"]
    for leaf in (new["kernel"], new["bias"]):
        assert float(abs(leaf).max()) < 63**-0.5
        assert abs(float((leaf**2).mean()) * 3 * 63 - 1) < 5 * math.sqrt(0.8 / leaf.size)  # uniform: kurtosis 1.8


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell"])
def test_lstm_cells_of_both_apis(cell):
    x = jnp.ones((1, 4, 3), jnp.float32)
    linen = nn.RNN(getattr(nn, cell)(6))
    params = ij.reinitialize(linen.init(KEY, x), R.lstm(2.0), KEY)["params"]["cell"]
    assert (params["hf"]["bias"] == 2).all() and not params["hi"]["bias"].any()
    module = ij.reinitialize(getattr(nnx, cell)(3, 6, rngs=nnx.Rngs(0)), R.lstm(2.0), KEY)
    if cell == "OptimizedLSTMCell":
        np.testing.assert_array_equal(module.dense_h.bias[...], np.repeat([0, 2, 0, 0], 6))
        gates = np.asarray(module.dense_h.kernel[...], float).reshape(6, 4, 6).swapaxes(0, 1)
    else:
        assert (module.hf.bias[...] == 2).all() and not module.ho.bias[...].any()
        gates = [np.asarray(getattr(module, f"h{g}").kernel[...], float) for g in "ifgo"]
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(6), atol=1e-5)
    # the forget gate is the one named: with a large bias the cell is kept, with a small one it is lost
    cells = ij.reinitialize(module, R.lstm(50.0), KEY)
    carry = (3.0 * jnp.ones((1, 6), jnp.float32), jnp.zeros((1, 6), jnp.float32))
    (kept, _), _ = cells(carry, jnp.zeros((1, 3), jnp.float32))
    np.testing.assert_allclose(kept, 3.0, atol=1e-5)


def test_rules_on_a_model_without_branches_say_so():
    model, x = nn.Dense(3), jnp.ones((1, 4), jnp.float32)
    with pytest.raises(ij.InputError, match="no residual branch is found"):
        ij.reinitialize(model.init(KEY, x), R.zero_gamma(), KEY, model=model, inputs=x)

    class Dead(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.relu(nn.Dense(4)(x))

    with pytest.raises(ij.InputError, match="ends in a nonlinearity[\\s\\S]*no gradient"):
        ij.reinitialize(Dead().init(KEY, x), R.zero_gamma(), KEY, model=Dead(), inputs=x)


WIDTHS = (64, 256, 1024)


@pytest.mark.slow
def test_mup_coordinate_check_is_flat_and_standard_is_not():
    """Change of the hidden and output activations after three steps of Adam, against the width."""
    x = jax.random.normal(jax.random.key(1), (16, 8), jnp.float32)
    y = jnp.sign(x[:, :1])

    def make(n):
        return nn.Sequential([nn.Dense(n), nn.relu, nn.Dense(n), nn.relu, nn.Dense(1)])

    def init(n):
        return jax.eval_shape(make(n).init, KEY, x)["params"]

    def changes(n, rules, rates):
        model = make(n)
        optimizer = optax.multi_transform({k: optax.adam(r) for k, r in rates[0].items()}, rates[1])

        def run(key):
            params = ij.reinitialize(init_params, rules, key)

            def loss(p):
                return jnp.mean((model.apply({"params": p}, x) - y) ** 2)

            state, now = optimizer.init(params), params
            for _ in range(3):
                updates, state = optimizer.update(jax.grad(loss)(now), state, now)
                now = optax.apply_updates(now, updates)
            hidden = nn.Sequential(model.layers[:3])
            pick = lambda p: {k: p[k] for k in ("layers_0", "layers_2")}  # noqa: E731
            before, after = (hidden.apply({"params": pick(p)}, x) for p in (params, now))
            out = [model.apply({"params": p}, x) for p in (params, now)]
            return jnp.stack([jnp.mean((after - before) ** 2), jnp.mean((out[1] - out[0]) ** 2)])

        init_params = model.init(KEY, x)["params"]
        with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to integer powers
            return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 6))).mean(0) ** 0.5

    mup = R.mup(init(64), sigma_w=2**0.5)
    slopes = {}
    for name in ("mup", "standard"):
        found = []
        for n in WIDTHS:
            labels = ij.labels(init(n), mup)
            rates = R.mup_rates(labels, 1e-3)
            if name == "standard":
                rates = dict.fromkeys(rates, 1e-3)
            found.append(changes(n, mup if name == "mup" else R.he(), (rates, labels)))
        slopes[name] = np.polyfit(np.log(WIDTHS), np.log(found), 1)[0]
    # muP: flat up to corrections at width 64; standard: sqrt(n) to n, since Adam's updates add up coherently
    assert np.abs(slopes["mup"]).max() < 0.15, slopes
    assert slopes["standard"].min() > 0.4, slopes


def test_mup_laws_and_rates():
    shapes = lambda n: {"embed": {"embedding": jnp.ones((11, n))}, "a": {"kernel": jnp.ones((n, 2 * n)), "bias": jnp.ones(2 * n)},  # noqa: E501,E731
                        "out": {"kernel": jnp.ones((2 * n, 5))}}  # fmt: skip
    rules = R.mup(shapes(8))
    rows = {r.path: (r.label, r.new_std) for r in ij.plan(shapes(32), rules).rows}
    assert {p: label for p, (label, _) in rows.items()} == {
        "embed/embedding": "input x4", "a/kernel": "hidden x4", "a/bias": "vector x4", "out/kernel": "output x4",
    }  # fmt: skip
    np.testing.assert_allclose(rows["embed/embedding"][1], 8**-0.5, rtol=1e-12)  # constant in the width
    np.testing.assert_allclose(rows["a/kernel"][1], 32**-0.5, rtol=1e-12)
    np.testing.assert_allclose(rows["out/kernel"][1], math.sqrt(16) / 64, rtol=1e-12)  # base fan 16 over fan 64 squared
    labels = ij.labels(shapes(32), rules)
    sgd = R.mup_rates(labels, 1.0, "sgd")
    assert sgd == {"input x4": 4.0, "hidden x4": 1.0, "vector x4": 4.0, "output x4": 0.25}
    with pytest.raises(ij.InputError, match="in the base None"):
        ij.plan({"new": {"kernel": jnp.ones((3, 3))}}, rules)
