r"""c* for many points of the chaotic phase: w(q, c) as a two-dimensional table in (log q, theta), theta = arccos c.

c* solves sigma_w^2 w(q, c*) = 1 (see `correlation.py`). log w is a smooth function of log q and, for smooth and kinked
activations alike, of theta; it is tabulated on Legendre nodes for just those cells of log q in which points lie.
"""

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.meanfield.correlation import attracting_correlation, width_function
from initjax.meanfield.table import raw_moments

_Q_DEGREE, _THETA_DEGREE = 14, 14
_GAP = (
    0.2  # share of the first panel in which only theta = 0 is sampled: there w needs quadrature, and w(0) = D is known
)
_Q_CELL = 1.0
_RESOLVED = 1e-8
_NEWTON = 9


class Cell:
    """log w on one unit of log q: coefficients (panels in theta, q degree, theta degree)."""

    def __init__(self, act: Activation, index: int):
        nodes, _ = legendre(_Q_DEGREE)
        x = _Q_CELL * (index + (nodes + 1) / 2)
        q = np.exp(x)
        levels = 3 + max(0, int(np.ceil(np.log2(np.sqrt(q[-1]) + 1))))
        self.edges = np.concatenate([[0.0], np.pi / 2 * 0.5 ** np.arange(levels - 1, -1, -1)])
        theta_nodes, _ = legendre(_THETA_DEGREE)
        middle, half = (self.edges[1:] + self.edges[:-1]) / 2, np.diff(self.edges) / 2
        theta = middle[:, None] + half[:, None] * theta_nodes
        share = (1 - np.cos(np.pi * (np.arange(_THETA_DEGREE - 1) + 0.5) / (_THETA_DEGREE - 1))) / 2
        first = np.concatenate([[0.0], _GAP + (1 - _GAP) * share])
        theta[0] = first * self.edges[1]
        delta = 2 * np.sin(theta.ravel()[1:] / 2) ** 2
        moment, slope, _ = raw_moments(act, q)
        w = [
            np.append(d, width_function(act, float(v), float(m))(delta))
            for v, m, d in zip(q, moment, slope, strict=True)
        ]
        w = np.log(np.maximum(np.stack(w), 1e-300)).reshape(_Q_DEGREE, levels, _THETA_DEGREE)
        w = np.einsum("qpt,qa->pat", w, legendre_transform(_Q_DEGREE))
        rows = w @ legendre_transform(_THETA_DEGREE)
        rows[0] = np.linalg.solve(np.polynomial.legendre.legvander(2 * first - 1, _THETA_DEGREE - 1), w[0].T).T
        self.rows = rows
        self.tail = float(max(np.abs(rows[:, -1, :]).max(), np.abs(rows[:, :, -1]).max()))

    def solve(self, x: np.ndarray, index: int, log_variance: np.ndarray) -> np.ndarray:
        """theta* in (0, pi/2] for points log q = x in this cell."""
        t = 2 * (x / _Q_CELL - index) - 1
        basis = np.polynomial.legendre.legvander(t, _Q_DEGREE - 1)
        rows = np.einsum("na,pab->npb", basis, self.rows)  # theta coefficients of each point
        right = rows.sum(axis=2) + log_variance[:, None]  # value at the right end of each panel: P_k(1) = 1
        panel = np.minimum((right > 0).sum(axis=1), rows.shape[1] - 1)  # log w falls with theta
        row = np.take_along_axis(rows, panel[:, None, None], axis=1)[:, 0]
        low, high = np.full(x.shape, -1.0), np.full(x.shape, 1.0)
        s = np.zeros(x.shape)
        slope_row = np.polynomial.legendre.legder(row, axis=1)
        for _ in range(_NEWTON):
            gap = np.polynomial.legendre.legval(s, row.T, tensor=False) + log_variance
            slope = np.polynomial.legendre.legval(s, slope_row.T, tensor=False)
            low, high = np.where(gap > 0, s, low), np.where(gap > 0, high, s)
            with np.errstate(divide="ignore", invalid="ignore"):
                new = s - gap / slope
            s = np.where((new >= low - 1e-9) & (new <= high + 1e-9), new, (low + high) / 2)
        # no bias and E[phi] = 0: c* = 0 is the end of the last panel, which rounding may leave on either side
        s = np.where((panel == rows.shape[1] - 1) & (right[:, -1] > -1e-11), 1.0, s)
        return (self.edges[panel] + self.edges[panel + 1]) / 2 + np.diff(self.edges)[panel] / 2 * s


def chaotic_correlations(act: Activation, q, moment, variance_w, variance_b) -> tuple[np.ndarray, np.ndarray]:
    """(c*, chi_c) for flat arrays of chaotic points."""
    if q.size < 200:
        pairs = [
            attracting_correlation(act, *map(float, row)) for row in zip(q, moment, variance_w, variance_b, strict=True)
        ]
        return np.array([1 - d for d, _ in pairs]), np.array([chi for _, chi in pairs])
    cells = act.__dict__.setdefault("_chaos", {})
    x = np.log(q)
    index = np.floor(x / _Q_CELL).astype(int)
    theta, chi_c = np.empty(q.size), np.empty(q.size)
    for i in np.unique(index).tolist():
        here = np.flatnonzero(index == i)
        cell = cells.get(i)
        if cell is None:
            cell = cells[i] = Cell(act, i)
        if cell.tail > _RESOLVED:
            for j in here:
                delta, chi_c[j] = attracting_correlation(act, q[j], moment[j], variance_w[j], variance_b[j])
                theta[j] = 2 * np.arcsin(np.sqrt(delta / 2))
            continue
        for part in np.array_split(here, max(1, here.size // 20_000)):
            theta[part] = cell.solve(x[part], i, np.log(variance_w[part]))
            chi_c[part] = _slope(cell, x[part], i, theta[part], variance_w[part])
    return np.cos(theta), chi_c


def _slope(cell: Cell, x, index, theta, variance_w):
    """chi_c = dC/dc at c* from 1 - C = sigma_w^2 w (1 - c): chi_c = 1 - (1 - c) d log w / dc."""
    panel = np.clip(np.searchsorted(cell.edges, theta, side="left") - 1, 0, cell.rows.shape[0] - 1)
    basis = np.polynomial.legendre.legvander(2 * (x / _Q_CELL - index) - 1, _Q_DEGREE - 1)
    row = np.einsum("na,nab->nb", basis, cell.rows[panel])
    low, high = cell.edges[panel], cell.edges[panel + 1]
    s = (2 * theta - low - high) / (high - low)
    slope = (
        np.polynomial.legendre.legval(s, np.polynomial.legendre.legder(row, axis=1).T, tensor=False) * 2 / (high - low)
    )
    # d/dc = -d/dtheta / sin theta, and (1 - c) / sin theta = tan(theta / 2)
    return 1 + slope * np.tan(theta / 2)
