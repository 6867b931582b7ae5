r"""A million fixed points in one compiled program: q, chi, c* and depth scales from the tables of one activation.

The same mathematics as `fixed.py`, arranged for throughput: the bracket of q is found by comparing with tabulated
moments, both roots by a few Newton steps on polynomials whose coefficients are looked up once a point. The tables are
arguments, so that the program is compiled once for all activations whose tables have the same shape.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation
from initjax.meanfield.chaos import DEGREE as CHAOS_DEGREE
from initjax.meanfield.chaos import Q_CELL, RESOLVED, cells_of
from initjax.meanfield.solve import PER_CELL, grid_of
from initjax.meanfield.table import DEGREE, Table, table_of
from initjax.trace.jaxpr import float64

_CHUNK = 16384
_STEPS = 4


class ChaosTable(NamedTuple):
    """Cells of `chaos.py` stacked and padded: log w as polynomials in (log q, theta)."""

    first: jax.Array  # index of the first cell
    edges: jax.Array  # (cells, panels + 1)
    rows: jax.Array  # (cells, panels, degree, degree), Legendre in log q, monomials in theta
    right: jax.Array  # (cells, panels, degree): value at the right end of each panel


def _horner(row, t):
    """Polynomial and derivative of coefficients (..., k) at t."""
    value, slope = row[..., -1], jnp.zeros_like(row[..., -1])
    for k in range(row.shape[-1] - 2, -1, -1):
        slope = slope * t + value
        value = value * t + row[..., k]
    return value, slope


def _q_star(rows, low, width, power, grid, moments, vw, vb, q0):
    """Attracting q with its cell's coefficients; 0 below the grid, inf above it."""
    size = grid.shape[0]
    step = width / PER_CELL
    x0 = jnp.log(q0)
    start = jnp.clip(jnp.floor((x0 - low) / step), 0, size - 1).astype(jnp.int32)  # grid[start] <= q0

    def scan(j, found):  # one grid value against all points: 20 times faster on a CPU than a points x grid reduction
        above, below = found
        excess = vw * moments[j] + vb - grid[j]
        below = jnp.where((excess >= 0) & (j <= start), j, below)
        return jnp.where((excess <= 0) & (j > start) & (above == size), j, above), below

    none = (jnp.full(vw.shape, size, jnp.int32), jnp.full(vw.shape, -1, jnp.int32))
    above, below = jax.lax.optimization_barrier(jax.lax.fori_loop(0, size, scan, none))

    def gap(x, row):
        cell_t = 2 * ((x - low) / width - cell) - 1
        value, slope = _horner(row, cell_t)
        m = jnp.exp(value + power * x)
        image = vw * m + vb
        return jnp.log(image) - x, vw * m * (slope * 2 / width + power) / image - 1

    cell = jnp.clip(jnp.floor((x0 - low) / width), 0, rows.shape[0] - 1)
    up = gap(x0, rows[cell.astype(jnp.int32), 0])[0] > 0
    x_grid = lambda i: low + step * i.astype(low.dtype)  # noqa: E731
    x_low = jnp.where(up, jnp.maximum(x0, x_grid(above - 1)), x_grid(below))
    x_high = jnp.where(up, x_grid(above), jnp.minimum(x0, x_grid(below + 1)))
    found = jnp.where(up, above < size, below >= 0)
    x_low, x_high = (jnp.where(found, x, x0) for x in (x_low, x_high))
    cell = jnp.clip(jnp.floor(((x_low + x_high) / 2 - low) / width), 0, rows.shape[0] - 1)
    # barriers and loops keep XLA from fusing, and so recomputing, the whole chain in every consumer
    row, x_low, x_high = jax.lax.optimization_barrier((rows[cell.astype(jnp.int32)], x_low, x_high))
    at_low, at_high = gap(x_low, row[:, 0])[0], gap(x_high, row[:, 0])[0]
    spread = at_low - at_high
    x = x_low + (x_high - x_low) * jnp.where(spread > 0, at_low / jnp.where(spread > 0, spread, 1.0), 0.5)

    def step_x(_, x):
        value, slope = gap(x, row[:, 0])
        return jnp.clip(x - value / jnp.where(slope == 0, -1.0, slope), x_low, x_high)

    x = jax.lax.fori_loop(0, _STEPS, step_x, x)
    q = jnp.where(found, jnp.exp(x), jnp.where(up, jnp.inf, 0.0))
    t = 2 * ((x - low) / width - cell) - 1
    m = jnp.exp(_horner(row[:, 0], t)[0] + power * x)
    return q, x, m, jnp.exp(_horner(row[:, 1], t)[0]), _horner(row[:, 2], t)[0]


def _c_star(chaos: ChaosTable, x, log_variance):
    """theta* and chi_c from log w(q, theta) + log sigma_w^2 = 0."""
    position = x / Q_CELL
    cell = jnp.clip(jnp.floor(position) - chaos.first, 0, chaos.rows.shape[0] - 1)
    t = 2 * (position - cell - chaos.first) - 1
    cell = cell.astype(jnp.int32)
    basis = [jnp.ones_like(t), t]
    for k in range(1, CHAOS_DEGREE - 1):
        basis.append(((2 * k + 1) * t * basis[-1] - k * basis[-2]) / (k + 1))
    ends = sum(b[:, None] * chaos.right[cell][:, :, k] for k, b in enumerate(basis)) + log_variance[:, None]
    panels = chaos.rows.shape[1]
    panel = jnp.minimum(jnp.sum(ends > 0, axis=1), panels - 1)
    block = chaos.rows[cell, panel]
    row = jax.lax.optimization_barrier(sum(b[:, None] * block[:, k] for k, b in enumerate(basis)))

    def step(_, state):
        s, low, high = state
        value, slope = _horner(row, s)
        value = value + log_variance
        low, high = jnp.where(value > 0, s, low), jnp.where(value > 0, high, s)
        new = s - value / jnp.where(slope == 0, -1.0, slope)
        return jnp.where((new >= low - 1e-9) & (new <= high + 1e-9), new, (low + high) / 2), low, high

    # near c = 1 of a smooth activation the root is almost double: the first steps only halve the error
    s, _, _ = jax.lax.fori_loop(0, _STEPS + 4, step, (jnp.zeros_like(x), jnp.full_like(x, -1.0), jnp.full_like(x, 1.0)))
    last = jnp.take_along_axis(ends, jnp.full_like(panel, panels - 1)[:, None], axis=1)[:, 0]
    s = jnp.where((panel == panels - 1) & (last > -1e-11), 1.0, s)
    left, right = chaos.edges[cell, panel], chaos.edges[cell, panel + 1]
    theta = (left + right) / 2 + (right - left) / 2 * s
    slope = _horner(row, s)[1] * 2 / jnp.maximum(right - left, 1e-300)
    return jnp.cos(theta), 1 + slope * jnp.tan(theta / 2)


@jax.jit
def _variance(rows, low, width, power, grid, moments, vw, vb, q0):
    def chunk(args):
        vw, vb, q0 = args
        q, _, m, d, r = _q_star(rows, low, width, power, grid, moments, vw, vb, q0)
        return jnp.stack([q, vw * d, vw * m * r / q, m])

    return jax.lax.map(chunk, (vw, vb, q0))


@jax.jit
def _correlation(chaos: ChaosTable, q, vw):
    return jax.lax.map(lambda args: jnp.stack(_c_star(chaos, jnp.log(args[0]), jnp.log(args[1]))), (q, vw))


def _chunked(arrays, fill: float):
    size = arrays[0].size
    chunks = -(-size // _CHUNK)
    return [
        jnp.asarray(np.pad(a, (0, chunks * _CHUNK - size), constant_values=fill).reshape(chunks, _CHUNK))
        for a in arrays
    ]


def _flat(stacked, size: int) -> np.ndarray:
    out = np.asarray(stacked)  # (chunks, k, chunk)
    return np.moveaxis(out, 1, 0).reshape(out.shape[1], -1)[:, :size].copy()  # a jax.Array's own buffer is read-only


@functools.lru_cache(maxsize=64)
def _device_table(act: Activation):
    table: Table = table_of(act)
    grid = grid_of(table)
    return (
        jnp.asarray(table.rows.reshape(-1, 3, DEGREE)),
        jnp.asarray(table.low),
        jnp.asarray(table.width),
        jnp.asarray(table.power),
        jnp.asarray(grid),
        jnp.asarray(table(np, grid).m),
    )


def sweep_variance(act: Activation, vw: np.ndarray, vb: np.ndarray, q0: np.ndarray) -> np.ndarray:
    """q, chi_1, chi_q and M for flat arrays: (4, n). Where q is 0 or inf the other three mean nothing."""
    with float64():
        return _flat(_variance(*_device_table(act), *_chunked([vw, vb, q0], 1.0)), vw.size)


def sweep_correlation(act: Activation, q: np.ndarray, vw: np.ndarray) -> np.ndarray | None:
    """c* and chi_c of chaotic points: (2, n), or None if a cell's table is not resolved."""
    index = np.floor(np.log(q) / Q_CELL).astype(int)
    first, last = int(index.min()), int(index.max())
    cells = cells_of(act, range(first, last + 1), set(np.unique(index).tolist()))
    if any(cell is not None and cell.tail > RESOLVED for cell in cells):
        return None
    with float64():
        out = _correlation(_stack(first, cells), *_chunked([q, vw], 1.0))
        return _flat(out, q.size)


def _stack(first: int, cells) -> ChaosTable:
    """Cells side by side; panels are padded at the right with copies that no point reaches."""
    panels = max(len(c.edges) - 1 for c in cells if c is not None)
    to_monomials = _to_monomials()
    edges, rows, right = [], [], []
    for cell in cells:
        if cell is None:
            edges.append(np.zeros(panels + 1))
            rows.append(np.zeros((panels, CHAOS_DEGREE, CHAOS_DEGREE)))
            right.append(np.zeros((panels, CHAOS_DEGREE)))
            continue
        extra = panels - (len(cell.edges) - 1)
        # pad on the left with empty panels at theta = 0 whose right end is always passed
        edges.append(np.concatenate([np.zeros(extra), cell.edges]))
        padded = np.concatenate([np.zeros((extra, CHAOS_DEGREE, CHAOS_DEGREE)), cell.rows])
        rows.append(padded @ to_monomials)
        ends = padded.sum(axis=2)
        ends[:extra, 0] = 1e6
        right.append(ends)
    return ChaosTable(
        jnp.asarray(float(first)),
        jnp.asarray(np.stack(edges)),
        jnp.asarray(np.stack(rows)),
        jnp.asarray(np.stack(right)),
    )


def _to_monomials() -> np.ndarray:
    rows = [np.polynomial.legendre.leg2poly(np.eye(CHAOS_DEGREE)[k]) for k in range(CHAOS_DEGREE)]
    return np.stack([np.pad(row, (0, CHAOS_DEGREE - row.size)) for row in rows])
