"""One kernel to be computed: its plan and tiling, and the compiled programs for blocks and tiles."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical import features
from initjax.empirical.blocks import Tiling, tiling
from initjax.empirical.network import Network, one_example, signature
from initjax.empirical.program import trace
from initjax.empirical.taps import Plan, find_plan
from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced


class Job:
    """Kernels between inputs of given shapes, for given shapes of the parameters."""

    def __init__(self, network: Network, params, x1, x2, k: int, outputs: str, chosen, tapped: bool, by_leaf: bool):
        self.outputs, self.k, self.by_leaf, self.chosen = outputs, k, by_leaf, chosen
        leaves = [leaf for leaf, keep in zip(jax.tree.leaves(params), chosen, strict=True) if keep]
        wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves)
        self.dtype = np.dtype(np.float64 if wide else np.float32)

        def plan(x, tapped):
            return find_plan(trace(network._call, params, one_example(x)), chosen, tapped, merge=not by_leaf)

        one = plan(x1, tapped)
        self.plans: tuple[Plan, Plan] = one, one
        if x2 is not None and _shapes(x1) != _shapes(x2):
            self.plans = plan(x1, tapped), plan(x2, tapped)
            if _kinds(self.plans[0]) != _kinds(self.plans[1]):  # such as one position beside several
                self.plans = plan(x1, False), plan(x2, False)
        self.names = self.plans[0].program.names
        self._peaks: dict = {}

    def fit(self, params, x1, x2, budget: int) -> Tiling:
        """The tiling with the least work whose compiled programs stay within `budget` bytes.

        Tracers are not compiled by themselves: then the count from the program has to do.
        """
        n1, n2 = (len(jax.tree.leaves(x)[0]) for x in (x1, x1 if x2 is None else x2))
        symmetric, guess = x2 is None, float(budget)
        while True:
            tiles = tiling(self.plans[0], params, n1, n2, self.k, self.outputs, self.dtype, symmetric, guess)
            if is_traced(params, x1, x2):
                return tiles
            tiles = tiles._replace(bytes=self.peak(tiles, params, x1, x2))
            if tiles.bytes <= budget:
                return tiles
            if tiles.rows == tiles.columns == tiles.outputs == 1:
                raise InputError(
                    f"memory={budget:,} bytes",
                    f"at least {tiles.bytes:,} bytes for these parameters",
                    "so much is held while one output of one example is paired with another one",
                    "give more memory, or leave parameters out with params_filter",
                )
            # the next smaller tiling by that count
            guess = min(0.9 * guess, guess * budget / tiles.bytes)

    def peak(self, tiles: Tiling, params, x1, x2) -> int:
        """Bytes that the compiled programs of a tiling hold at once, beside parameters, inputs and the kernel."""
        (features1, features2), contract = self.programs(tiles)
        symmetric = x2 is None
        n1, n2 = (len(jax.tree.leaves(x)[0]) for x in (x1, x1 if symmetric else x2))
        block1 = _abstract_block(x1, tiles.rows)
        block2 = block1 if symmetric else _abstract_block(x2, tiles.columns)
        key = tiles[:4], symmetric, n1 > tiles.rows, signature((params, block1, block2))
        if key in self._peaks:
            return self._peaks[key]
        left, passes = _analyse(features1, params, block1, 0)
        right = left
        if not symmetric:
            right, more = _analyse(features2, params, block2, 0)
            passes = max(passes, more)
        several = not symmetric or n1 > tiles.rows or tiles.outputs < self.k
        tile = [_analyse(contract, left, right, same) for same in {symmetric, not several}]
        held = _bytes(left) + (_bytes(right) if several else 0)
        mirror = 2 if symmetric and several else 1
        most = max(temporary + mirror * _bytes(out) for out, temporary in tile)
        self._peaks[key] = max(_bytes(left) * several + passes + _bytes(right), held + most)
        return self._peaks[key]

    @functools.cache  # noqa: B019  a job lives as long as its network
    def programs(self, tiles: Tiling):
        """`features(side)(params, block, start)` and `contract(left, right, same)`, compiled on their first use."""

        def features_of(side):
            plan = self.plans[side]

            def compute(params, x, start):
                return features.compute(
                    plan,
                    tiles.routes,
                    params,
                    x,
                    start,
                    chunk=tiles.outputs,
                    outputs=self.outputs,
                    dtype=self.dtype,
                    by_leaf=self.by_leaf,
                )

            return jax.jit(compute)

        @functools.partial(jax.jit, static_argnames="same")
        def contract(left, right, same):
            tile = features.contract(self.plans[0], tiles.routes, left, right, self.outputs, same, self.by_leaf)
            if same:
                # the product of a block with itself is symmetric up to rounding only
                tile = (tile + mirrored(tile, self.outputs)) / np.asarray(2, self.dtype)
            return tile / np.asarray(self.k, self.dtype) if self.outputs == "trace" else tile

        return (features_of(0), features_of(0) if self.plans[0] is self.plans[1] else features_of(1)), contract


def mirrored(tile, outputs: str):
    """A tile (..., n, m), (..., n, m, o) or (..., n, m, o, p) with the examples, and outputs, in each other's place."""
    if outputs == "full":
        return tile.swapaxes(-4, -3).swapaxes(-2, -1)
    return tile.swapaxes(-2, -1) if outputs == "trace" else tile.swapaxes(-3, -2)


def _analyse(function, *arguments):
    """Shapes of the results of a jitted function, and the bytes of its temporary values."""
    lowered = function.lower(*arguments)
    return lowered.out_info, lowered.compile().memory_analysis().temp_size_in_bytes


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _abstract_block(x, size):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *np.shape(a)[1:]), jnp.result_type(a)), x)


def _kinds(plan):
    return [(term.leaves, term.how, term.bias is None) for term in (*plan.direct, *plan.pulled)]


def _shapes(x):
    return jax.tree.map(lambda a: np.shape(a)[1:], x)
