"""The kernel tile by tile: blocks of examples, chunks of outputs, one half where it is symmetric."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.blocks import Tiling
from initjax.empirical.devices import Ring
from initjax.empirical.job import Job, mirrored
from initjax.errors import PartialKernelError
from initjax.trace.jaxpr import is_traced


class Run:
    """A kernel of the given shape, ([leaves,] n1, n2[, outputs ...]), and which of its tiles are done."""

    def __init__(self, job: Job, tiles: Tiling, params, x1, x2, shape: tuple[int, ...], ring: Ring | None = None):
        self.job, self.tiles, self.shape, self.ring = job, tiles, shape, ring
        self.params, self.x1, self.x2 = params, x1, x2
        self.traced = is_traced(params, x1, x2)
        self.kernel: Any = None
        self.done: dict = {}

    def finish(self) -> jax.Array:
        """The kernel; what is done already, by an earlier call that failed, is kept."""
        job, tiles, symmetric = self.job, self.tiles, self.x2 is None
        if self.traced:
            return self._fill(jnp.zeros(self.shape, job.dtype))
        n1, n2 = self._examples()
        if job.is_single(tiles, n1, n2) and self.ring is None:
            return job.programs(tiles._replace(bytes=0))[2](self.params, self.x1, self.x2)
        if self.kernel is None:  # tiles are put together on the host
            self.kernel = np.zeros(self.shape, job.dtype)
            self.x1, self.x2 = (None if x is None else jax.tree.map(np.asarray, x) for x in (self.x1, self.x2))
        try:
            return jnp.asarray(self._fill(self.kernel))
        except (Exception, KeyboardInterrupt) as error:
            kernel, (n1, n2) = np.full_like(self.kernel, np.nan), self._examples()
            done, parts = np.zeros((n1, n2), bool), self._parts()
            for corner, count in self.done.items():
                here = self._at(*corner)
                if count == parts:
                    for at in (here, here[::-1]) if symmetric else (here,):
                        index = (slice(None),) * job.by_leaf + at
                        kernel[index], done[at] = self.kernel[index], True
            raise PartialKernelError(kernel, done, self.finish, error) from error

    def _at(self, row, column):
        scale = 1 if self.ring is None else self.ring.size
        return slice(row, row + self.tiles.rows * scale), slice(column, column + self.tiles.columns * scale)

    def _examples(self):
        return self.shape[int(self.job.by_leaf) :][:2]

    def _parts(self):
        chunks = -(-self.job.k // self.tiles.outputs)
        return chunks**2 if self.job.outputs == "full" else chunks

    def _fill(self, kernel):
        outputs, symmetric = self.job.outputs, self.x2 is None
        for corner, at, tile in self._tiles():
            here = self._at(*corner)
            places: list = [(here, at, tile)]
            if symmetric and corner[0] != corner[1]:
                places.append((here[::-1], at[::-1], mirrored(tile, outputs)))
            for where, chunks, values in places:
                index = (slice(None),) * self.job.by_leaf + where + chunks
                within = [slice(0, len(range(*i.indices(n)))) for i, n in zip(index, self.shape, strict=True)]
                values = values[tuple(within)]
                if not self.traced:
                    kernel[index] = kernel[index] + values if outputs == "trace" else values
                elif outputs == "trace":
                    kernel = kernel.at[index].add(values)
                else:
                    kernel = kernel.at[index].set(values)
            self.done[corner] = self.done.get(corner, 0) + 1
        return kernel

    def _tiles(self) -> Iterator:
        """`((first row, first column), output slices, tile)` of each tile and chunk that is not done."""
        job, tiles, symmetric, n1, n2 = self.job, self.tiles, self.x2 is None, *self._examples()
        scale = 1 if self.ring is None else self.ring.size
        size1, size2 = tiles.rows * scale, tiles.columns * scale
        chunks = np.arange(0, job.k, tiles.outputs, dtype=np.int32)
        (features1, features2), contract, _ = job.programs(tiles._replace(bytes=0))
        kept: dict = {}
        seen: dict = {}

        def block(second, start):
            x, n, size = (self.x1, n1, size1) if symmetric or not second else (self.x2, n2, size2)
            return _block(x, n, start, size)

        def rows(start, chunk):
            if (start, chunk) not in kept:
                if not tiles.resident:
                    kept.clear()
                kept[start, chunk] = features1(self.params, block(False, start), chunk)
            return kept[start, chunk]

        def tile(row, column, chunk, other):
            same = bool(symmetric and row == column and chunk == other)
            if self.ring is not None:
                first = block(False, row)
                second = first if symmetric and row == column else block(True, column)
                return self.ring.tile(job, tiles, self.params, first, second, chunk, other, same)
            left = rows(row, chunk)
            if same:
                return contract[True](left, left)
            if tiles.resident and symmetric:
                return contract[False](left, rows(column, other))
            return contract[False](left, features2(self.params, block(True, column), other))

        for a, row in enumerate(range(0, n1, size1)):
            columns = range(0, n2, size2)
            for chunk in chunks:
                for column in columns[: a + 1] if symmetric else columns:
                    here = row, column
                    for other in chunks if job.outputs == "full" else (chunk,):
                        seen[here] = seen.get(here, 0) + 1
                        if seen[here] <= self.done.get(here, 0):
                            continue
                        found = tile(row, column, chunk, other)
                        of = tuple(slice(int(o), int(o) + tiles.outputs) for o in (chunk, other))
                        at = {"trace": (), "diagonal": of[:1], "full": of}[job.outputs]
                        yield here, at, found if self.traced else np.asarray(found)


def _block(x, n, start, size):
    """`size` examples from `start` on; the last block is filled up with the last example."""
    if start == 0 and size == n:
        return x
    index = np.minimum(np.arange(start, start + size), n - 1)
    return jax.tree.map(lambda a: a[index], x)
