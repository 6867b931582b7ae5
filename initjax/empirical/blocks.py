"""How many examples and outputs are worked on at once, so that their gradients stay within a memory budget."""

import math
import os
from typing import NamedTuple

import jax

from initjax.errors import InputError

# Beyond this, larger tiles no longer make the products faster.
ENOUGH = 2 * 2**30
# Two blocks of features, one while it is computed, and the copy a product makes of one.
LIVE_COPIES = 4


class Tiles(NamedTuple):
    """`examples` per block and `outputs` per chunk."""

    examples: int
    outputs: int


def default_memory() -> int:
    """Half of what the default device, or the host, has free; 2 GiB at most, in bytes."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not a POSIX system
            free = ENOUGH
    return min(ENOUGH, free // 2)


def tiles(examples: int, outputs: int, row_bytes: int, work_bytes: int, cell_bytes: int, memory: int) -> Tiles:
    """Largest balanced blocks that fit into `memory` bytes; outputs are split only where one example does not fit.

    `row_bytes`: features of one output of one example; `work_bytes`: passes through the network for one example;
    `cell_bytes`: the entries of the kernel for two examples, of which a tile and two temporary copies are held.
    """
    rows = (memory - work_bytes) // (LIVE_COPIES * max(row_bytes, 1))
    if rows < 1:
        needed = LIVE_COPIES * row_bytes + work_bytes
        raise InputError(
            f"memory={memory:,} bytes",
            f"at least {needed:,} bytes for these parameters",
            f"the passes for one example take {work_bytes:,} bytes, the gradients of one of its outputs {row_bytes:,}, "
            f"and {LIVE_COPIES} blocks of those are held at once",
            "give more memory, or leave parameters out with params_filter",
        )
    if rows < outputs:
        return Tiles(1, _balanced(outputs, rows))
    block = memory // (LIVE_COPIES * row_bytes * outputs + work_bytes)
    return Tiles(_balanced(max(examples, 1), max(1, min(block, math.isqrt(memory // (3 * cell_bytes))))), outputs)


def _balanced(total, most):
    """Size of equal blocks of at most `most`: 10 in blocks of at most 9 are two of 5, not 9 and a padded 1."""
    blocks = -(-total // most)
    return -(-total // blocks)
