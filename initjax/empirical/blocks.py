"""How many examples and outputs are worked on at once, so that per-example Jacobians stay within a memory budget."""

import os
from typing import NamedTuple

import jax

from initjax.errors import InputError

# Beyond this, larger tiles no longer make the products faster.
ENOUGH = 2 * 2**30
# Two blocks of Jacobian rows, the rows while they are computed, and the copy the product makes of them.
LIVE_COPIES = 4


class Tiles(NamedTuple):
    """`examples` per block and `outputs` per chunk: one block of Jacobian rows has examples x outputs x P entries."""

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


def tiles(examples: int, outputs: int, row_bytes: int, memory: int) -> Tiles:
    """Largest balanced blocks with LIVE_COPIES blocks of rows of `row_bytes` bytes within `memory` bytes.

    Outputs are split only where the rows of one example do not fit together.
    """
    rows = memory // (LIVE_COPIES * max(row_bytes, 1))
    if rows < 1:
        raise InputError(
            f"memory={memory:,} bytes",
            f"at least {LIVE_COPIES * row_bytes:,} bytes for these parameters",
            f"the gradient of one output for one example alone has {row_bytes:,} bytes, "
            f"and {LIVE_COPIES} blocks of such rows are held at once",
            "give more memory, or leave parameters out with params_filter",
        )
    if rows < outputs:
        return Tiles(1, _balanced(outputs, rows))
    return Tiles(_balanced(max(examples, 1), rows // outputs), outputs)


def _balanced(total, most):
    """Size of equal blocks of at most `most`: 10 in blocks of at most 9 are two of 5, not 9 and a padded 1."""
    blocks = -(-total // most)
    return -(-total // blocks)
