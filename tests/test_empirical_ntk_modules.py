"""The empirical NTK of small networks of every kind against the Gram matrix of their full Jacobian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from oracles.jacobian import gram

import initjax as ij
from initjax.empirical.independence import keeps_examples_apart

F = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
dense = functools.partial(nn.Dense, param_dtype=F)
conv = functools.partial(nn.Conv, param_dtype=F, dtype=F)


class Net(nn.Module):
    """A function of a module's own children, as one would write it under `nn.compact`."""

    build: object

    @nn.compact
    def __call__(self, x):
        return self.build(self, x)


def net(build):
    return Net(build)


def after(*layers):
    """Layers one after another, a smooth function, then two outputs of the mean over positions."""

    def build(_, x):
        for layer in layers:
            x = layer(x)
        x = jnp.tanh(x)
        return dense(2)(x.mean(tuple(range(1, x.ndim - 1))))

    return net(lambda m, x: build(m, x))


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape, F)


VECTORS, TOKENS, LINE, IMAGES = normal(3, 4), normal(3, 5, 4), normal(3, 7, 2), normal(3, 5, 5, 2)
IDS = jnp.array([[0, 3, 3, 1], [2, 2, 0, 4], [4, 1, 3, 0]])
randomly = nn.initializers.normal(0.5)


def _tied(_, x):
    layer = dense(4)
    return dense(2)(layer(jnp.tanh(layer(x))))


def _tied_embedding(_, ids):
    embed = nn.Embed(5, 3, param_dtype=F)
    return embed.attend(jnp.tanh(dense(3)(embed(ids).mean(1))))


def _reparametrized(m, x):
    log_scale = m.param("log_scale", randomly, (4,), F)
    w, v = m.param("w", randomly, (4, 3), F), m.param("v", randomly, (2, 3), F)
    a, b = m.param("a", randomly, (4, 1), F), m.param("b", randomly, (1, 3), F)
    h = jnp.tanh((x * jnp.exp(log_scale)[None]) @ (w + 0.3 * a @ b))
    return h @ (v.T / np.sqrt(3.0)) + m.param("unused_row", randomly, (3, 2), F)[0][None]


def _several(_, x):
    h = jnp.tanh(dense(3)(x))
    return {"class": dense(2)(h), "box": dense(2)(h).reshape(-1, 2, 1)}


def _by_position(m, x):
    w = m.param("w", randomly, (5, 4, 3), F)
    return dense(2)(jnp.tanh(jnp.einsum("bti,tij->btj", x, w)).mean(1))


class ScanBody(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(dense(4)(h)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(ScanBody, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return dense(2)(body()(x, None)[0])


class RematBody(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(dense(4)(x))


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, param_dtype=F, dtype=F)(dense(3)(x))
        return dense(2)(jnp.tanh(x))


def attention(x):
    return nn.MultiHeadDotProductAttention(2, param_dtype=F, dtype=F)(x)


LINEN = {
    "dense": (net(lambda m, x: dense(2)(jnp.tanh(dense(5)(x)))), VECTORS),
    "dense on tokens": (after(lambda x: dense(3)(x)), TOKENS),
    "dense general": (
        after(
            lambda x: nn.DenseGeneral((2, 3), axis=(-2, -1), param_dtype=F)(x),
            lambda x: x.reshape(x.shape[0], -1),
        ),
        TOKENS,
    ),
    "a weight for each position": (net(_by_position), TOKENS),
    "einsum": (after(lambda x: nn.Einsum((4, 2, 3), "bti,ihd->bthd", param_dtype=F)(x)), TOKENS),
    "conv strided": (after(lambda x: conv(3, (3, 2), strides=2)(x)), IMAGES),
    "conv circular": (after(lambda x: conv(3, (3,), padding="CIRCULAR")(x)), LINE),
    "conv dilated": (after(lambda x: conv(3, (2, 3), kernel_dilation=2, padding="VALID")(x)), IMAGES),
    "conv grouped": (after(lambda x: conv(4, (2, 2), feature_group_count=2)(x)), IMAGES),
    "conv depthwise": (after(lambda x: conv(4, (3,), feature_group_count=2, padding="CAUSAL")(x)), LINE),
    "conv transposed": (after(lambda x: nn.ConvTranspose(3, (3,), strides=2, param_dtype=F, dtype=F)(x)), LINE),
    "conv local": (after(lambda x: nn.ConvLocal(3, (3,), param_dtype=F, dtype=F)(x)), LINE),
    "conv patches": (after(lambda x: conv(3, (2, 2), strides=2, padding="VALID")(x[:, :4, :4])), IMAGES),
    "pools": (
        after(lambda x: nn.max_pool(conv(3, (2, 2))(x), (2, 2)), lambda x: nn.avg_pool(x, (2, 2), (2, 2))),
        IMAGES,
    ),
    "layer norm": (after(lambda x: nn.LayerNorm(param_dtype=F, dtype=F)(dense(4)(x))), TOKENS),
    "group norm": (after(lambda x: nn.GroupNorm(2, param_dtype=F, dtype=F)(conv(4, (2, 2))(x))), IMAGES),
    "rms norm": (after(lambda x: nn.RMSNorm(param_dtype=F, dtype=F)(dense(4)(x))), TOKENS),
    "instance norm": (after(lambda x: nn.InstanceNorm(param_dtype=F, dtype=F)(conv(2, (2,))(x))), LINE),
    "batch norm, stored statistics": (BatchNorm(), VECTORS),
    "embedding": (after(lambda x: nn.Embed(5, 3, param_dtype=F)(x)), IDS),
    "tied embedding": (net(_tied_embedding), IDS),
    "attention": (after(attention), TOKENS),
    "lstm": (after(lambda x: nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=F, dtype=F))(x)), TOKENS),
    "gru": (after(lambda x: nn.RNN(nn.GRUCell(3, param_dtype=F, dtype=F))(x)), TOKENS),
    "remat": (after(lambda x: nn.remat(RematBody)()(x)), TOKENS),
    "scan over layers": (Scanned(), VECTORS),
    "tied layers": (net(_tied), VECTORS),
    "prelu": (after(lambda x: nn.PReLU(param_dtype=F)(dense(3)(x))), VECTORS),
    "weight norm": (after(lambda x: nn.WeightNorm(dense(3), param_dtype=F)(x)), VECTORS),
    "functions of parameters": (net(_reparametrized), VECTORS),
    "several outputs": (net(_several), VECTORS),
}


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, param_dtype=F, rngs=rngs)
        self.last = nnx.Linear(5, 2, param_dtype=F, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.gelu(self.first(x)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, param_dtype=F, dtype=F, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, param_dtype=F, dtype=F, decode=False, rngs=rngs)
        self.last = nnx.LoRALinear(4, 2, lora_rank=1, lora_param_type=nnx.Param, param_dtype=F, rngs=rngs)

    def __call__(self, x):
        return self.last((x + self.attention(self.norm(x))).mean(1))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), strides=2, param_dtype=F, rngs=rngs)
        self.norm = nnx.GroupNorm(3, 3, param_dtype=F, dtype=F, rngs=rngs)
        self.last = nnx.Linear(3, 2, param_dtype=F, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.conv(x))).mean((1, 2)))


class NnxTable(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, param_dtype=F, rngs=rngs)
        self.cell = nnx.RNN(nnx.GRUCell(3, 3, param_dtype=F, dtype=F, rngs=rngs), rngs=rngs)

    def __call__(self, ids):
        return self.cell(self.embed(ids))[:, -1, :2]


NNX = {"mlp": (NnxMlp, VECTORS), "block": (NnxBlock, TOKENS), "conv": (NnxConv, IMAGES), "table": (NnxTable, IDS)}
# one of each kind runs in the fast suite
FAST = (
    "dense",
    "dense on tokens",
    "a weight for each position",
    "conv grouped",
    "conv depthwise",
    "layer norm",
    "batch norm, stored statistics",
    "embedding",
    "scan over layers",
    "tied layers",
    "functions of parameters",
    "several outputs",
    "nnx mlp",
)


@pytest.fixture(autouse=True)
def promotion():
    """Flax itself mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def functional(name):
    """`(apply, params, x, module)` of a row, with random values for parameters that start at 0 or 1."""
    if name.startswith("nnx "):
        build, x = NNX[name.removeprefix("nnx ")]
        module = build(nnx.Rngs(0))
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        apply = lambda p, x: nnx.merge(graph, p, jax.tree.map(lambda a: a, rest))(x)  # noqa: E731
    else:
        module, x = LINEN[name]
        variables = module.init(jax.random.key(1), x)
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        apply = lambda p, x: module.apply({"params": p, **rest}, x)  # noqa: E731
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), params)
    return apply, params, x, module


NAMES = [*LINEN, *(f"nnx {name}" for name in NNX)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NAMES])
def test_kernel_is_the_gram_matrix_of_the_jacobian(name):
    # sums of at most some thousand products; nnx's attention takes its softmax in float32
    check(name, 1e-6 if name == "nnx block" else 1e-12)


@pytest.mark.x64_off
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kernel_in_float32(name):
    check(name, 1e-5)  # gradients themselves have errors of some 1e-6


def check(name, tolerance):
    apply, params, x, module = functional(name)
    assert keeps_examples_apart(apply, params, x)
    expected = gram(apply, params, x)
    ntk_fn = ij.empirical_ntk(module, outputs="full")
    kernel = ntk_fn(params, x)
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=tolerance * abs(expected).max())
    # every leaf is accounted for, and none twice
    leaves = [leaf for row in ntk_fn.explain(params, x).rows for leaf in row.leaves]
    assert len(leaves) == len(set(leaves)) == len(jax.tree.leaves(params))
