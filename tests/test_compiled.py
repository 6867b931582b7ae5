"""Compiled tiles give the numbers of the steps, and step back where they cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from test_tiles import CNNS, model, same

import initjax as ij
from initjax.infinite import compiled

RNG = np.random.default_rng(5)
X = RNG.normal(size=(7, 10))
FAST = ("strides", "residual and global pool")
IMAGES = RNG.normal(size=(3, 5, 5, 2))


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles, of which the last is filled up."""
    monkeypatch.setattr(compiled, "block_size", lambda entries: 4 if entries == 1 else 2)


def tiles_of(kernel_fn):
    """What has been compiled, once for each kind of call."""
    return [route.tiles for route in kernel_fn._routes.values() if route.tiles is not None]


def kernels(kernel_fn, *batches, **options):
    kernel = kernel_fn(*batches, **options)
    of_layers = [a for layer in kernel.layers for a in (layer.q, layer.correlation, layer.chi, layer.gradient)]
    return [kernel.nngp, kernel.ntk, *kernel.leaves.values(), *of_layers]


def test_every_part_is_that_of_the_steps():
    """Closed forms and arithmetic in another order: 1e-13 of the largest entry."""
    kernel_fn = ij.kernel_fn(zoo.MLP("relu"), X)
    for batches in ((X,), (X[:3], X)):
        steps = kernels(kernel_fn, *batches, compiled=False)
        assert len(tiles_of(kernel_fn)) == (len(batches) == 2)
        same(kernels(kernel_fn, *batches, compiled=True), steps, 1e-13)
        assert len(tiles_of(kernel_fn)) == 1  # both calls by the same programs
    half = kernel_fn(X, dtype="float32", compiled=True)
    np.testing.assert_array_equal(half.ntk, kernel_fn(X, compiled=True).ntk.astype(np.float32))


def test_relu_diagonals_are_exact():
    """K = q / 2 on the diagonal, layer by layer, and Theta with it: no arccos(1) noise (1e-8) comes in."""
    kernel_fn = ij.kernel_fn(model(lambda x: nn.Dense(1)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x)))))), X)
    kernel = kernel_fn(X, get=("nngp", "ntk"), compiled=True)
    assert tiles_of(kernel_fn)
    q = (X * X).sum(axis=1) / 10
    np.testing.assert_allclose(np.diag(kernel.nngp), q / 4, rtol=1e-14)
    inner = (10 + 1 / q) * q  # kernel and bias of the first layer: |x|^2 + 1
    want = 64 * q / 4 + 1 + (64 * q / 2 + 1 + inner / 2) / 2  # fan-in weights, bias variance 0, eta = 1
    np.testing.assert_allclose(np.diag(kernel.ntk), want, rtol=1e-14)


@pytest.mark.parametrize("name", ["silu", *map(slow, ["tanh", "gelu", "erf"])])
def test_tables_of_coefficients(name):
    """1e-12 of the largest entry; variances outside the tables are given back to the steps."""
    function = nn.silu if name == "silu" else zoo.ACTIVATIONS[name]
    layer = functools.partial(nn.Dense, 64, bias_init=zoo.small)
    first = (lambda x: x) if name == "silu" else lambda x: function(layer()(x))  # compiling is what takes the time
    kernel_fn = ij.kernel_fn(model(lambda x: nn.Dense(1)(function(layer()(first(x))))), X)
    steps = kernel_fn(X, get=("nngp", "ntk"), compiled=False)
    found = kernel_fn(X, get=("nngp", "ntk"), compiled=True)
    (tiles,) = tiles_of(kernel_fn)
    same([found.nngp, found.ntk], [steps.nngp, steps.ntk], 1e-12)
    outside = kernel_fn(30 * X, get=("nngp", "ntk"))
    again = kernel_fn(30 * X, get=("nngp", "ntk"), compiled=False)
    if name in ("silu", "tanh"):
        assert tiles.run([30 * X], None, np.float64, 1) is None
        np.testing.assert_array_equal(outside.ntk, again.ntk)
    else:
        same([outside.ntk], [again.ntk], 1e-12)


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CNNS])
def test_convolutions(name):
    kernel_fn = ij.kernel_fn(model(CNNS[name]), IMAGES)
    steps = kernel_fn(IMAGES, get=("nngp", "ntk"), compiled=False)
    found = kernel_fn(IMAGES, get=("nngp", "ntk"), compiled=True)
    assert tiles_of(kernel_fn)
    same([found.nngp, found.ntk], [steps.nngp, steps.ntk], 1e-13)


def test_work_decides(monkeypatch):
    """A few small calls are not worth compiling; what outweighs it is."""
    kernel_fn = ij.kernel_fn(zoo.MLP("relu"), X)
    kernel_fn(X, get="nngp")
    assert not tiles_of(kernel_fn)
    monkeypatch.setattr(compiled, "SECONDS_AN_ENTRY", 1.0)
    want = kernel_fn(X, get="nngp", compiled=False)
    found = kernel_fn(X, get="nngp")
    (tiles,) = tiles_of(kernel_fn)
    same([found.nngp], [want.nngp], 1e-13)
    tiles.temporaries = 2**40  # no budget holds these: left to the steps
    np.testing.assert_array_equal(kernel_fn(X, get="nngp").nngp, want.nngp)


class ByNumber(nn.Module):
    """Every example is scaled by its place in the batch."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(64)(x * (1.0 + jnp.arange(x.shape[0], dtype=x.dtype))[:, None])))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Embed(5, 64)(x)).mean(axis=1))


def test_what_does_not_compile_runs_step_by_step():
    """Blocks that know their place are found out; draws and integers are left alone; kinks have no series."""
    dropout = ij.kernel_fn(_dropped(), X, rngs={"dropout": jax.random.key(0)})
    tokens = np.arange(12).reshape(4, 3) % 5
    cases = [
        (ij.kernel_fn(ByNumber(), X), X),
        (dropout, X),
        (ij.kernel_fn(Tokens(), tokens), tokens),
        (ij.kernel_fn(model(lambda x: nn.Dense(1)(jnp.clip(nn.Dense(64)(x), -0.3, 1.0))), X), X),
    ]
    for kernel_fn, x in cases:
        found = kernel_fn(x, get="nngp", compiled=True)
        assert not tiles_of(kernel_fn)
        np.testing.assert_array_equal(found.nngp, kernel_fn(x, get="nngp", compiled=False).nngp)


def _dropped():
    return model(lambda x: nn.Dense(1)(nn.Dropout(0.2, deterministic=False)(nn.relu(nn.Dense(64)(x)))))


def test_an_example_of_zeros():
    """Variance 0: correlations are 0 / 0, and the kernel is not."""
    kernel_fn = ij.kernel_fn(model(lambda x: nn.Dense(1)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x)))))), X)
    x = np.concatenate([np.zeros((1, 10)), X])
    steps, found = (kernel_fn(x, get=("nngp", "ntk"), compiled=c) for c in (False, True))
    same([found.nngp, found.ntk], [steps.nngp, steps.ntk], 1e-13)
