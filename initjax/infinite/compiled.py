"""Tiles of a kernel as compiled programs: the moment recursion is traced once for a block of examples, walk included.

XLA then fuses what a layer does to a tile into a few passes that stay in the cache, and no Python is left between them.
There are two programs, for a block with itself (whose diagonal runs by one-dimensional formulas) and for two blocks;
the last block is filled up with its last example. What compiling needs, and what is checked before a result is given
out: blocks of examples that the program tells apart, no random draws in it (they belong to whole batches); every entry
finite, every variance inside its table; and entries that agree with those computed step by step.
"""

import concurrent.futures
import contextlib
import os
from typing import Any

import jax
import numpy as np

from initjax.gaussian.tabulated import Ranges, using
from initjax.memory import budget
from initjax.trace.jaxpr import tracing_float64

ENTRIES = 1 << 16  # of the largest array of a tile: half a megabyte, so that a few of them stay in a core's own cache
SECONDS_AN_ATOM = 0.05  # of compiling, roughly
SECONDS_AN_ENTRY = 8e-9  # of one atom, step by step, roughly
AGREE = 1e-7  # of the largest entry: two routes to the arccos of nearly equal examples differ by 1e-8
_OPTIONS: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}  # reductions that interpret what they sum


class Tiles:
    """The compiled programs of one kind of call.

    function : (x1, x2 or None), blocks of examples as tracers -> the parts of their kernel.
    example : one example's leaves. block : examples of a block. ranges : of the variances that tables have to cover.
    """

    def __init__(self, function, example: list[np.ndarray], block: int, ranges: Ranges):
        self._function, self._example, self.block, self._ranges = function, example, block, ranges
        self._programs: dict[bool, Any] = {}
        self.temporaries = 0  # bytes that one tile takes while it is computed, results included

    def program(self, same: bool):
        """The compiled program for a block with itself, or for two blocks."""
        if same not in self._programs:
            struct = [jax.ShapeDtypeStruct((self.block, *leaf.shape[1:]), np.float64) for leaf in self._example]

            def function(holds, *sides):
                self._ranges.inside.clear()
                self._ranges.holds = holds
                with using(self._ranges):
                    found = self._function(*sides)
                total = sum(jax.numpy.sum(leaf) for leaf in jax.tree.leaves(found))
                fine = jax.numpy.isfinite(total)
                for inside in self._ranges.inside:
                    fine = fine & inside
                return found, fine

            with _settings():
                lowered = jax.jit(function).lower(np.True_, *[struct] * (1 if same else 2))
                try:
                    compiled = lowered.compile(compiler_options=_OPTIONS)
                except Exception:  # options come and go with XLA's version
                    compiled = lowered.compile()
            self._programs[same] = compiled
            sizes: Any = compiled.memory_analysis()
            self.temporaries = max(self.temporaries, sizes.temp_size_in_bytes + sizes.output_size_in_bytes)
        return self._programs[same]

    def needed(self, n1: int, n2: int, workers: int, itemsize: int, same: bool) -> int:
        """Bytes of a call, results included."""
        for kind in (True, False) if same else (False,):
            self.program(kind)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self._programs[same].out_info[0])]
        results = sum(itemsize * n1 * n2 if len(shape) == 2 else 8 * n1 for shape in shapes)
        inputs = 8 * (n1 + n2) * sum(leaf[0].size for leaf in self._example)
        return results + inputs + workers * 2 * self.temporaries

    def run(self, first: list[np.ndarray], second: list[np.ndarray] | None, dtype, workers: int) -> Any:
        """The parts of the kernel, or None where a check failed."""
        n1, n2 = (len(leaves[0]) for leaves in (first, first if second is None else second))
        ours = self._blocks(first)
        theirs = ours if second is None else self._blocks(second)
        tiles = [(i, j) for i in range(len(ours)) for j in range(i + 1 if second is None else len(theirs))]
        shapes, tree = jax.tree.flatten(self.program(False).out_info[0])
        if second is None and jax.tree.structure(self.program(True).out_info[0]) != tree:
            return None
        out = [np.empty((n1, n2), dtype) if len(s.shape) == 2 else np.empty(n1) for s in shapes]

        def put(tile: tuple[int, int]) -> bool:
            i, j = tile
            same = second is None and i == j
            with _settings():
                values, fine = self.program(same)(np.True_, *([ours[i]] if same else [ours[i], theirs[j]]))
                if not bool(fine):
                    return False
                arrays = [np.asarray(value) for value in jax.tree.leaves(values)]
            rows, columns = (slice(k * self.block, (k + 1) * self.block) for k in tile)
            for target, value in zip(out, arrays, strict=True):
                if value.ndim == 1:
                    if j == (i if second is None else 0):
                        target[rows] = value[: n1 - rows.start]
                    continue
                value = value[: n1 - rows.start, : n2 - columns.start]
                target[rows, columns] = value
                if second is None and not same:
                    target[columns, rows] = value.T
            return True

        if workers == 1 or len(tiles) == 1:
            fine = all(map(put, tiles))
        else:
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                fine = all(pool.map(put, tiles))
        return jax.tree.unflatten(tree, out) if fine else None

    def _blocks(self, leaves: list[np.ndarray]) -> list[list]:
        """Blocks of examples on the device, the last one filled up."""
        total, blocks = len(leaves[0]), []
        with _settings():
            for start in range(0, total, self.block):
                parts = [np.asarray(leaf[start : start + self.block], np.float64) for leaf in leaves]
                more = self.block - len(parts[0])
                if more:
                    parts = [np.concatenate([part, np.repeat(part[-1:], more, axis=0)]) for part in parts]
                blocks.append([jax.numpy.asarray(part) for part in parts])
        return blocks


class Route:
    """How calls of one kind are computed: step by step until their work outweighs compiling, then by `Tiles`.

    function : as for `Tiles`. example : leaves of a batch.
    """

    def __init__(self, function, example: list[np.ndarray]):
        self._function, self._example = function, example
        self._work = self._limit = 0.0
        self._entries: tuple[float, int] | None = None
        self._open = all(np.issubdtype(leaf.dtype, np.floating) for leaf in example)
        self.tiles: Tiles | None = None
        self.notes: list[str] = []

    def ready(self, first: list, second: list | None, memory, dtype) -> Any:
        """The parts of a kernel where the tiles are compiled and the budget holds them; else None."""
        return None if self.tiles is None else self._run(first, second, memory, dtype)

    def first(self, parts, batches: list[list], notes: list[str], memory, now: bool) -> Any:
        """Compile if that pays (`now`: in any case), and compute the parts so; None: not to be done, or not yet.

        parts : the call as it is computed step by step.
        """
        one, two = parts.one, parts.two
        if not self._open or one.at is None or two.at is None or not one.n or not two.n or one.draws:
            return None
        if self._entries is None:
            work, widest, atoms = one.work()
            self._entries, self._limit = (work, widest), SECONDS_AN_ATOM * atoms
        work, widest = self._entries
        self._work += SECONDS_AN_ENTRY * work * one.n * two.n / (2 if two is one else 1)
        if not now and self._work < self._limit:
            return None
        self._open = False  # whatever comes of it, it is tried once
        ranges = Ranges()
        try:
            for batch in (one, two):
                for function, q in batch.variances():
                    ranges.meet(function, q)
            tiles = Tiles(self._function, self._example, block_size(widest), ranges)
            tiles.program(False)
            tiles.program(True)
        except Exception:  # a trace may trip over what the steps take, or refuse in better words
            return None
        self.tiles, self.notes = tiles, notes
        second = None if two is one else batches[1]
        found = self._run(batches[0], second, memory, parts.dtype)
        if found is not None and not self._agrees(found, parts):
            self.tiles = found = None
        return found

    def _run(self, first: list, second: list | None, memory, dtype) -> Any:
        assert self.tiles is not None
        n1, n2 = (len(leaves[0]) for leaves in (first, first if second is None else second))
        limit = budget(memory)
        for workers in (cores(), 1):
            if self.tiles.needed(n1, n2, workers, np.dtype(dtype).itemsize, second is None) <= limit:
                return self.tiles.run(first, second, dtype, workers)
        return None

    def _agrees(self, found: dict, parts) -> bool:
        """Whether entries of the first examples with the last agree with those computed step by step."""
        one, two = parts.one, parts.two
        a, b = one.side(0, min(2, one.n)), two.side(max(two.n - 2, 0), two.n)
        want = type(parts)(one, two, parts.leaves, parts.eta, set(parts.get) & {"nngp", "ntk"}, np.float64).tile(a, b)
        for key, value in want.items():
            mine, largest = found[key][a.rows, b.rows], np.abs(found[key]).max()
            if np.abs(mine - (0.0 if value is None else value)).max() > AGREE * largest:
                return False
        return True


def block_size(entries: int) -> int:
    """Examples of a block whose largest array has this many entries for a pair of examples."""
    size = 1
    while (2 * size) ** 2 * entries <= ENTRIES:
        size *= 2
    return size


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _settings():
    """64-bit types on, and tracers that meet NumPy constants of other types; for this thread alone."""
    with tracing_float64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
