"""The kernel tile by tile: blocks of examples, chunks of outputs, one half where it is symmetric."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.blocks import Tiling
from initjax.empirical.job import Job, mirrored
from initjax.trace.jaxpr import is_traced


def run(job: Job, tiles: Tiling, params: Any, x1: Any, x2: Any, shape: tuple[int, ...]) -> jax.Array:
    """The kernel of the given shape: ([leaves,] n1, n2[, outputs ...])."""
    symmetric = x2 is None
    (features1, features2), contract = job.programs(tiles)
    axis = int(job.by_leaf)
    n1, n2 = shape[axis : axis + 2]
    rows, columns = _starts(n1, tiles.rows), _starts(n2, tiles.columns)
    chunks = range(0, job.k, tiles.outputs)
    traced = is_traced(params, x1, x2)
    if len(rows) == len(columns) == len(chunks) == 1:
        left = features1(params, _block(x1, n1, 0, tiles.rows), 0)
        right = left if symmetric else features2(params, _block(x2, n2, 0, tiles.columns), 0)
        return contract(left, right, symmetric)
    # on the host, unless under a transformation
    kernel: Any = jnp.zeros(shape, job.dtype) if traced else np.zeros(shape, job.dtype)

    def put(tile, index, add):
        nonlocal kernel
        index = (slice(None),) * axis + index
        tile = tile[tuple(slice(0, len(range(*i.indices(n)))) for i, n in zip(index, shape, strict=True))]
        if traced:
            kernel = kernel.at[index].add(tile) if add else kernel.at[index].set(tile)
        elif add:
            kernel[index] += np.asarray(tile)
        else:
            kernel[index] = np.asarray(tile)

    for a, row in enumerate(rows):
        block = _block(x1, n1, row, tiles.rows)
        for start in chunks:
            left = features1(params, block, start)
            for b in range(a + 1) if symmetric else range(len(columns)):
                same, column = symmetric and a == b, columns[b]
                here = slice(row, row + tiles.rows), slice(column, column + tiles.columns)
                for other in chunks if job.outputs == "full" else (start,):
                    one = same and other == start
                    right = left if one else None
                    if right is None:
                        second = (
                            _block(x1, n1, column, tiles.rows) if symmetric else _block(x2, n2, column, tiles.columns)
                        )
                        right = features2(params, second, other)
                    tile = contract(left, right, one)
                    left_outputs, right_outputs = (
                        slice(start, start + tiles.outputs),
                        slice(other, other + tiles.outputs),
                    )
                    at = {"trace": (), "diagonal": (left_outputs,), "full": (left_outputs, right_outputs)}[job.outputs]
                    put(tile, (*here, *at), job.outputs == "trace")
                    if symmetric and a != b:
                        put(mirrored(tile, job.outputs), (*here[::-1], *at[::-1]), job.outputs == "trace")
    return jnp.asarray(kernel)


def _starts(n, size):
    return range(0, n, size)


def _block(x, n, start, size):
    """`size` examples from `start` on; the last block is filled up with the last example."""
    if start == 0 and size == n:
        return x
    index = np.minimum(np.arange(start, start + size), n - 1)
    return jax.tree.map(lambda a: jnp.asarray(a)[index], x)
