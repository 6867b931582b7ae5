"""How many examples and outputs are worked on at once, so that a kernel stays within its memory budget.

What is held is counted from the program: the features of two blocks, the passes through the network for one of them,
and a tile. Among the tilings that fit, the one with the least work is taken: many blocks use the symmetry of the
kernel, few form gradients less often.
"""

import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.routes import CACHE, Route, choose
from initjax.empirical.taps import Plan
from initjax.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# blocks beyond what memory asks for, to save half of a symmetric kernel
MOST_SPLIT = 8
LEAST_ROWS = 32
# a tile's own time, and that of a byte of a layer's values in a pass, in operations of a large product
CALL, PASS = 3e7, 50.0


class Tiling(NamedTuple):
    """`rows` and `columns` of examples in a tile, `outputs` per chunk, the routes, the bytes they should take, and the
    number of pairs of examples that are worked on; `resident` if the features of all blocks are kept."""

    rows: int
    columns: int
    outputs: int
    routes: tuple[Route, ...]
    bytes: int
    pairs: int
    resident: bool


def as_bytes(memory: Any) -> int:
    """A number of bytes from a number, or from text such as "4GiB"; None is half of what the device has free."""
    if memory is None:
        return default_memory()
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", memory.lower())
        value = float(found[1]) * _UNITS[found[2] or ""] if found else 0
    else:
        real = np.ndim(memory) == 0 and not isinstance(memory, bool) and np.isreal(memory)
        value = float(memory) if real else 0
    if not 0 < value < float("inf"):
        raise InputError(
            f"memory={memory!r}",
            'a positive number of bytes, text such as "4GiB" or "500MB", or None',
            "it bounds what is held while the kernel is computed",
            'give "1GiB" or 2**30, or leave it out for half of the free memory',
        )
    return int(value)


def default_memory() -> int:
    """Half of what the default device, or the host, has free, in bytes."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not a POSIX system
            free = 4 * 2**30
    return free // 2


def tiling(
    plan: Plan, params: Any, n1: int, n2: int, k: int, outputs: str, dtype: Any, symmetric: bool, budget: float
) -> Tiling:
    """The tiling with the least work that should fit into `budget` bytes; the smallest one if none does."""
    best, least = None, float("inf")
    for blocks in _block_numbers(max(n1, n2)):
        size = -(-max(n1, n2) // blocks)
        if best is not None and (not symmetric or blocks > MOST_SPLIT or size < LEAST_ROWS):
            break
        found, work = _at(plan, params, n1, n2, k, k, outputs, dtype, symmetric, size, budget)
        if found.bytes <= budget and work < least:
            best, least = found, work
    if best is not None:
        return best
    chunk = k
    while True:
        found, _ = _at(plan, params, n1, n2, k, chunk, outputs, dtype, symmetric, 1, budget)
        if found.bytes <= budget or chunk == 1:
            return found
        chunk = -(-k // (-(-k // chunk) + 1)) if chunk > 2 else 1


def _block_numbers(n):
    number = 1
    while number < n:
        yield number
        number = max(number + 1, int(number * 1.2))
    yield max(n, 1)


def _at(plan, params, n1, n2, k, chunk, outputs, dtype, symmetric, size, budget):
    """The tiling with blocks of `size` examples, and its work."""
    size = max(size, 1)
    rows, columns = min(size, max(n1, 1)), min(size, max(n2, 1))
    blocks = -(-n1 // rows), -(-n2 // columns)
    # the features of all blocks of a symmetric kernel may be kept, where they fit; else they are computed for each tile
    found = []
    for resident in (True, False) if symmetric and chunk == k and 1 < blocks[0] else (False,):
        found.append(
            _with(plan, params, n1, n2, k, chunk, outputs, dtype, symmetric, (rows, columns), blocks, resident)
        )
    fitting = [option for option in found if option[0].bytes <= budget] or found
    return min(fitting, key=lambda option: option[1])


def _with(plan, params, n1, n2, k, chunk, outputs, dtype, symmetric, tile_sizes, blocks, resident):
    (rows, columns), program, bytes_ = tile_sizes, plan.program, dtype.itemsize
    chosen, work = [], 0.0
    for term in plan.direct:
        route, cost = choose(
            term, program.avals[term.weight].size, (n1, n2), blocks, k, chunk, outputs, symmetric, bytes_, resident
        )
        chosen.append(route)
        work += cost
    held = sum(route.entries for route in chosen)
    leaves = jax.tree.leaves(params)
    pulled = sum(np.size(leaves[leaf]) for leaf in plan.pulled_leaves)
    formed = sum(program.avals[term.weight].size for term in plan.pulled)
    held += chunk * pulled
    features = held * bytes_
    avals = [program.avals[n] for step in plan.after for n in step.outputs]
    values = [a.size * a.dtype.itemsize for a in avals if jnp.issubdtype(a.dtype, jnp.inexact)]
    taps = [u for t in (*plan.direct, *plan.pulled) for u in t.uses]
    tapped = chunk * sum(u.groups * u.positions * u.units for u in taps) + chunk * formed * (1 + bool(plan.pulled))
    passes = sum(values) + 3 * chunk * max(values, default=0) + bytes_ * tapped
    cross = {"trace": 1, "diagonal": chunk, "full": chunk * chunk}[outputs]
    tile = bytes_ * rows * columns * (max((r.cells for r in chosen), default=0) + 3 * cross)
    tile += 3 * CACHE * any(route.name == "streamed" for route in chosen)
    weights = sum(np.size(leaf) for leaf in leaves) * bytes_ * any(t.scale for t in plan.direct)
    live = n1 if resident else rows + (0 if symmetric and blocks[0] == 1 else columns)
    need = live * features + max(max(rows, columns) * passes, tile) + weights
    # a call costs some time of its own, and passes are repeated with the features
    calls = blocks[0] * (blocks[0] + 1) / 2 if symmetric else blocks[0] * blocks[1]
    repeats = 1 if resident or calls == 1 else (blocks[0] + 1) / 2 if symmetric else blocks[0]
    work += CALL * calls + PASS * repeats * (n1 if symmetric else n1 + n2) * (1 + k) * sum(values)
    pairs = rows * columns * (blocks[0] * (blocks[0] + 1) // 2 if symmetric else blocks[0] * blocks[1])
    return Tiling(rows, columns, chunk, tuple(chosen), int(need), pairs, resident), work
