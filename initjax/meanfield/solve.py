r"""The attractor of the variance map q -> sigma_w^2 M(q) + sigma_b^2, for one or a million (sigma_w, sigma_b).

The map is compared with the diagonal on a fixed grid of log q; the first crossing met from q0, in the direction in
which the map moves, is the attractor of a monotone map. It is then refined by Newton steps inside its bracket. Written
once for NumPy and jax.numpy: small batches run in NumPy without compiling, large ones in one jitted function shared by
all activations (the table is its argument).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from initjax.meanfield.table import Table
from initjax.trace.jaxpr import float64

PER_CELL = 4
_NEWTON = 7
_NUMPY_UP_TO = 4096
_CHUNK = 32768


def grid_of(table: Table) -> np.ndarray:
    """Values of q between whose neighbours at most one crossing is expected."""
    cells = table.rows.shape[0]
    return np.exp(table.low + table.width * np.arange(cells * PER_CELL + 1) / PER_CELL)


def attractor(xp, table: Table, grid, moments, variance_w, variance_b, q0):
    """q reached from q0; 0 below the grid, inf above it. All arguments of one shape (n,); grid, moments (g,)."""
    here = variance_w * table(xp, q0).m + variance_b - q0
    excess = variance_w[:, None] * moments[None, :] + variance_b[:, None] - grid[None, :]
    up = here > 0
    wanted = xp.where(
        up[:, None], (excess <= 0) & (grid[None, :] > q0[:, None]), (excess >= 0) & (grid[None, :] < q0[:, None])
    )
    size = moments.shape[0]
    first = xp.argmax(wanted, axis=1)
    last = size - 1 - xp.argmax(wanted[:, ::-1], axis=1)
    found = xp.any(wanted, axis=1)
    high = xp.where(up, grid[first], xp.minimum(q0, grid[xp.clip(last + 1, 0, size - 1)]))
    low = xp.where(up, xp.maximum(q0, grid[xp.clip(first - 1, 0, size - 1)]), grid[last])
    x_low, x_high = xp.log(low), xp.log(high)
    x = (x_low + x_high) / 2
    for _ in range(_NEWTON):
        q = xp.exp(x)
        m = table(xp, q)
        value = variance_w * m.m + variance_b
        gap = xp.log(value) - x  # positive below an attractor
        slope = variance_w * m.m * m.r / value - 1
        x_low, x_high = xp.where(gap > 0, x, x_low), xp.where(gap > 0, x_high, x)
        step = x - gap / xp.where(slope == 0, -1.0 + 0 * slope, slope)
        x = xp.where((step >= x_low - 1e-9) & (step <= x_high + 1e-9), step, (x_low + x_high) / 2)
    q = xp.where(found, xp.exp(x), xp.where(up, np.inf, 0.0))
    return xp.where(here == 0, q0, q)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _jitted(rows, low, width, ends, power, grid, moments, variance_w, variance_b, q0):
    table = Table(rows, low, width, ends[0], ends[1], power)

    def chunk(args):
        return attractor(jnp, table, grid, moments, *args)

    return jax.lax.map(chunk, (variance_w, variance_b, q0))


def attractors(table: Table, variance_w: np.ndarray, variance_b: np.ndarray, q0: np.ndarray) -> np.ndarray:
    """`attractor` for float64 NumPy arrays of one shape, any number of points."""
    shape = variance_w.shape
    flat = [np.ascontiguousarray(a, np.float64).ravel() for a in (variance_w, variance_b, q0)]
    grid, moments = _grid_moments(table.rows.tobytes(), table)
    if flat[0].size <= _NUMPY_UP_TO:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return attractor(np, table, grid, moments, *flat).reshape(shape)
    chunks = -(-flat[0].size // _CHUNK)
    padded = [np.pad(a, (0, chunks * _CHUNK - a.size), mode="edge").reshape(chunks, _CHUNK) for a in flat]
    with float64():
        out = np.asarray(
            _jitted(
                jnp.asarray(table.rows),
                table.low,
                table.width,
                (table.q_low, table.q_high),
                table.power,
                jnp.asarray(grid),
                jnp.asarray(moments),
                *map(jnp.asarray, padded),
            )
        )
    return out.ravel()[: flat[0].size].reshape(shape)


_grids: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _grid_moments(key: bytes, table: Table):
    digest = hash(key)
    if digest not in _grids:
        grid = grid_of(table)
        _grids[digest] = (grid, table(np, grid).m)
    return _grids[digest]
