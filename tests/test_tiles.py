"""Kernels in tiles: the same numbers as in one piece, half of them computed, within a budget of memory."""

import functools
import tracemalloc

import jax
import numpy as np
import pytest
import zoo
from flax import linen as nn

import initjax as ij
from initjax.errors import InputError
from initjax.infinite import tiles
from initjax.memory import budget

RNG = np.random.default_rng(3)
X = RNG.normal(size=(7, 10))
IMAGES = RNG.normal(size=(3, 5, 5, 2))


def model(function):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return Model()


def conv(x, **options):
    return nn.Conv(48, (3, 3), bias_init=zoo.small, **options)(x)


def flat(x):
    return nn.Dense(1)(x.reshape(x.shape[0], -1))


def pooled(x):
    return nn.Dense(1)(x.mean(axis=(1, 2)))


CNNS = {
    "strides": lambda x: flat(nn.relu(conv(nn.relu(conv(x)), strides=2))),
    "dilation": lambda x: flat(nn.relu(conv(nn.relu(conv(x)), kernel_dilation=2))),
    "circular": lambda x: flat(nn.relu(conv(nn.relu(conv(x)), padding="CIRCULAR"))),
    "transposed": lambda x: flat(nn.relu(nn.ConvTranspose(48, (3, 3), strides=(2, 2))(nn.relu(conv(x, strides=2))))),
    "average pool": lambda x: flat(nn.relu(conv(nn.avg_pool(nn.relu(conv(x)), (2, 2), (2, 2))))),
    "norm": lambda x: flat(nn.relu(conv(nn.LayerNorm()(nn.relu(conv(x)))))),
    "residual and global pool": lambda x: pooled((lambda h: h + conv(nn.relu(h), strides=1))(nn.relu(conv(x)))),
}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def kernels(kernel_fn, *batches):
    kernel = kernel_fn(*batches)
    of_layers = [a for layer in kernel.layers for a in (layer.q, layer.correlation, layer.chi, layer.gradient)]
    return [kernel.nngp, kernel.ntk, *kernel.leaves.values(), *of_layers]


def same(mine, yours, rtol=1e-14):
    """Rounding of sums taken in another order; a kernel's entries are compared with its largest."""
    for a, b in zip(mine, yours, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.nanmax(np.abs(b), initial=0.0))


@functools.cache
def network(name):
    """A function of rows or images, and its example inputs; seven examples do not divide into blocks of two."""
    if name in CNNS:
        return ij.kernel_fn(model(CNNS[name]), IMAGES), IMAGES
    if name == "sequence":
        x = RNG.normal(size=(5, 3, 4))
        return ij.kernel_fn(zoo.PooledSequence(), x), x
    return ij.kernel_fn(zoo.MLP(name), X), X


def in_tiles(monkeypatch, size):
    monkeypatch.setattr(tiles, "_FEW", 0)
    monkeypatch.setattr(tiles, "_TILE", size)


@pytest.mark.parametrize("name", ["relu", "sequence", "residual and global pool", *map(slow, ["tanh", "strides"])])
def test_tiles_are_the_matrix_in_one_piece(name, monkeypatch):
    kernel_fn, x = network(name)
    whole, block = kernels(kernel_fn, x), kernels(kernel_fn, x[:2], x)
    for size in (8, 32):  # blocks of one example, and of two or more where an example has one position
        in_tiles(monkeypatch, size)
        tiled = kernels(kernel_fn, x)
        same(tiled, whole)
        same([a.T for a in tiled if a.ndim == 2], [a for a in tiled if a.ndim == 2])
    same(kernels(kernel_fn, x[:2], x), block)
    same([block[0], block[1]], [whole[0][:2], whole[1][:2]], 1e-13)


@pytest.mark.parametrize("name", [name if name in ("strides", "circular") else slow(name) for name in CNNS])
def test_same_positions_alone_give_the_entries_of_all_pairs(name, monkeypatch):
    """Without axes of examples every moment is taken at all pairs of positions: the same numbers the long way."""
    kernel_fn, x = network(name)
    short = kernels(kernel_fn, x)
    monkeypatch.setattr(tiles, "example_axes", lambda *_: None)
    same(short, kernels(kernel_fn, x), 1e-13)


def test_parts_of_a_kernel_are_computed_alone():
    kernel_fn, x = network("relu")
    whole = kernel_fn(x)
    alone = kernel_fn(x, get=("nngp", "ntk"))
    same([alone.nngp, alone.ntk], [whole.nngp, whole.ntk])
    assert alone.leaves == {} and alone.layers == ()
    assert kernel_fn(x, get="nngp").ntk is None
    with pytest.raises(InputError, match="parts of a Kernel"):
        kernel_fn(x, get="ntks")


def test_float32_results_are_the_float64_ones_rounded():
    kernel_fn, x = network("relu")
    half, full = kernel_fn(x, dtype="float32"), kernel_fn(x)
    assert half.ntk.dtype == np.float32 and half.layers[0].correlation.dtype == np.float32
    np.testing.assert_array_equal(half.ntk, full.ntk.astype(np.float32))
    with pytest.raises(InputError, match="float64 or float32"):
        kernel_fn(x, dtype="float16")


def test_a_budget_that_is_too_small_says_what_would_do(monkeypatch):
    kernel_fn, x = network("relu")
    with pytest.raises(InputError, match="at least") as caught:
        kernel_fn(x, memory=2000)
    assert all(caught.value.parts)
    smallest = caught.value.accepted.removeprefix("at least ").replace(" ", "")
    in_tiles(monkeypatch, 2**12)
    same(kernels(functools.partial(kernel_fn, memory=smallest), x), kernels(kernel_fn, x))
    with pytest.raises(InputError, match="number of bytes"):
        kernel_fn(x, memory="much")


@pytest.mark.slow
def test_the_budget_is_kept():
    """What NumPy and Python hold at the peak of a call, at the smallest budget and at twice that."""
    kernel_fn, _ = network("relu")
    x = RNG.normal(size=(200, 10))
    with pytest.raises(InputError) as caught:
        kernel_fn(x, memory=1000)
    least = budget(caught.value.accepted.removeprefix("at least "))
    for size in (least, 2 * least):
        kernel_fn(x, memory=size)  # what is made once and kept is no part of it
        tracemalloc.start()
        kernel_fn(x, memory=size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.3 * size < peak < size  # bounded, and not by a prediction that is far too large


def test_traced_inputs_keep_their_precision():
    """float32 under jit: a relu kernel to 1e-6 of its largest entry, its diagonal as exact as the rest."""
    kernel_fn, x = network("relu")
    exact = kernel_fn(x)
    traced = jax.jit(lambda x: kernel_fn(x, get=("nngp", "ntk")))(x.astype(np.float32))
    assert traced.ntk.dtype == np.float32
    for got, want in ((traced.nngp, exact.nngp), (traced.ntk, exact.ntk)):
        # four layers, each rounding a few times to 6e-8; the derivative of arccos at 1 does not come in
        np.testing.assert_allclose(got, want, atol=2e-6 * want.max())
        np.testing.assert_allclose(np.diag(got), np.diag(want), rtol=2e-6)
