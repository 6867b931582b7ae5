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
        _refuse_numbers(self.plans[0].program, x1)

    def fit(self, params, x1, x2, budget: int, devices: int = 1) -> Tiling:
        """The tiling with the least work whose compiled programs stay within `budget` bytes.

        Tracers are not compiled by themselves, nor are programs of several devices, whose rows it divides: then the
        count from the program has to do.
        """
        n1, n2 = (len(jax.tree.leaves(x)[0]) for x in (x1, x1 if x2 is None else x2))
        symmetric, guess = x2 is None, float(budget)
        n1, n2 = -(-n1 // devices), -(-n2 // devices)
        while True:
            tiles = tiling(self.plans[0], params, n1, n2, self.k, self.outputs, self.dtype, symmetric, guess)
            if is_traced(params, x1, x2) or devices > 1:
                return tiles._replace(resident=False)
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
        (features1, features2), contract, whole = self.programs(tiles._replace(bytes=0))
        symmetric = x2 is None
        n1, n2 = (len(jax.tree.leaves(x)[0]) for x in (x1, x1 if symmetric else x2))
        block1 = _abstract_block(x1, tiles.rows)
        if self.is_single(tiles, n1, n2):
            return whole.prepare(params, block1, None if symmetric else _abstract_block(x2, tiles.columns))[1]
        left, passes = features1.prepare(params, block1, START)
        right = left
        if not symmetric:
            right, more = features2.prepare(params, _abstract_block(x2, tiles.columns), START)
            passes = max(passes, more)
        tile = [contract[same].prepare(left, right) for same in ([True, False] if symmetric else [False])]
        most = max(temporary + 2 * _bytes(out) for out, temporary in tile)
        held = _bytes(left) * -(-n1 // tiles.rows) if tiles.resident else _bytes(left) + _bytes(right)
        return held + max(passes, most)

    def is_single(self, tiles: Tiling, n1: int, n2: int) -> bool:
        """Whether one tile is the whole kernel."""
        return n1 <= tiles.rows and n2 <= tiles.columns and tiles.outputs >= self.k

    @functools.cache  # noqa: B019  a job lives as long as its network
    def programs(self, tiles: Tiling):
        """`features[side](params, block, start)`, `contract[same](left, right)`, and `whole(params, x1, x2)`: both in
        one, which XLA arranges so that less is held."""

        def features_of(plan, params, x, start):
            options: dict = dict(chunk=tiles.outputs, outputs=self.outputs, dtype=self.dtype, by_leaf=self.by_leaf)
            return features.compute(plan, tiles.routes, params, x, start, **options)

        def contract(same, left, right):
            tile = features.contract(self.plans[0], tiles.routes, left, right, self.outputs, same, self.by_leaf)
            if same:
                # the product of a block with itself is symmetric up to rounding only
                tile = (tile + mirrored(tile, self.outputs)) / np.asarray(2, self.dtype)
            return tile / np.asarray(self.k, self.dtype) if self.outputs == "trace" else tile

        def whole(params, x1, x2):
            left = features_of(self.plans[0], params, x1, START)
            right = left if x2 is None else features_of(self.plans[1], params, x2, START)
            return contract(x2 is None, left, right)

        sides = [Compiled(functools.partial(features_of, plan)) for plan in self.plans]
        if self.plans[0] is self.plans[1]:
            sides[1] = sides[0]
        return sides, {same: Compiled(functools.partial(contract, same)) for same in (False, True)}, Compiled(whole)


class Compiled:
    """A jitted function that may be compiled before it runs."""

    def __init__(self, function):
        self._jitted, self._ready = jax.jit(function), {}

    def prepare(self, *arguments):
        """Shapes of the results for arrays or shapes, and the bytes of temporary values."""
        key = signature(arguments)
        if key not in self._ready:
            lowered = self._jitted.lower(*arguments)
            self._ready[key] = lowered.out_info, lowered.compile()
        out, compiled = self._ready[key]
        return out, compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, *arguments):
        ready = None if is_traced(arguments) else self._ready.get(signature(arguments))
        try:
            return self._jitted(*arguments) if ready is None else ready[1](*arguments)
        except (TypeError, ValueError):  # arrays that live elsewhere, or are Python numbers
            return self._jitted(*arguments)


START = np.int32(0)


def mirrored(tile, outputs: str):
    """A tile (..., n, m), (..., n, m, o) or (..., n, m, o, p) with the examples, and outputs, in each other's place."""
    if outputs == "full":
        return tile.swapaxes(-4, -3).swapaxes(-2, -1)
    return tile.swapaxes(-2, -1) if outputs == "trace" else tile.swapaxes(-3, -2)


def _refuse_numbers(program, x):
    """Integers that become floating-point numbers are no indices: raw pixels, most often."""
    integers = [n for n in program.data if jnp.issubdtype(program.avals[n].dtype, jnp.integer)]
    for step in program.steps:
        found = [n for n in step.inputs if n in integers]
        users = [other.name for other in program.steps if step.outputs[0] in other.inputs]
        if users and set(users) <= {"mul", "div", "sub"}:
            continue  # the network scales them itself
        if found and step.name == "convert_element_type" and step.eqn.params["new_dtype"].kind == "f":
            raise InputError(
                f"inputs of dtype {program.avals[found[0]].dtype} that the network takes as numbers",
                "floating-point inputs; integers as indices of rows",
                "integers, such as raw pixels from 0 to 255, are rarely the scale a network is meant for",
                "convert and scale them: x.astype(jnp.float32) / 255",
            )


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _abstract_block(x, size):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *np.shape(a)[1:]), jnp.result_type(a)), x)


def _kinds(plan):
    return [(term.leaves, term.how, term.bias is None) for term in (*plan.direct, *plan.pulled)]


def _shapes(x):
    return jax.tree.map(lambda a: np.shape(a)[1:], x)
