r"""c* for many points of the chaotic phase: w(q, c) as a two-dimensional table in (log q, theta), theta = arccos c.

c* solves sigma_w^2 w(q, c*) = 1 (see `correlation.py`). log w is a smooth function of log q and, for smooth and kinked
activations alike, of theta; it is tabulated on Legendre nodes for just those cells of log q in which points lie.
"""

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.meanfield.correlation import attracting_correlation, width_function
from initjax.meanfield.table import raw_moments

DEGREE = 14
_GAP = (
    0.2  # share of the first panel in which only theta = 0 is sampled: there w needs quadrature, and w(0) = D is known
)
Q_CELL = 1.0
RESOLVED = 1e-8


class Cell:
    """log w on one unit of log q: coefficients (panels in theta, q degree, theta degree)."""

    def __init__(self, act: Activation, index: int):
        nodes, _ = legendre(DEGREE)
        x = Q_CELL * (index + (nodes + 1) / 2)
        q = np.exp(x)
        levels = 3 + max(0, int(np.ceil(np.log2(np.sqrt(q[-1]) + 1))))
        self.edges = np.concatenate([[0.0], np.pi / 2 * 0.5 ** np.arange(levels - 1, -1, -1)])
        theta_nodes, _ = legendre(DEGREE)
        middle, half = (self.edges[1:] + self.edges[:-1]) / 2, np.diff(self.edges) / 2
        theta = middle[:, None] + half[:, None] * theta_nodes
        share = (1 - np.cos(np.pi * (np.arange(DEGREE - 1) + 0.5) / (DEGREE - 1))) / 2
        first = np.concatenate([[0.0], _GAP + (1 - _GAP) * share])
        theta[0] = first * self.edges[1]
        delta = 2 * np.sin(theta.ravel()[1:] / 2) ** 2
        moment, slope, _ = raw_moments(act, q)
        w = [
            np.append(d, width_function(act, float(v), float(m))(delta))
            for v, m, d in zip(q, moment, slope, strict=True)
        ]
        w = np.log(np.maximum(np.stack(w), 1e-300)).reshape(DEGREE, levels, DEGREE)
        w = np.einsum("qpt,qa->pat", w, legendre_transform(DEGREE))
        rows = w @ legendre_transform(DEGREE)
        rows[0] = np.linalg.solve(np.polynomial.legendre.legvander(2 * first - 1, DEGREE - 1), w[0].T).T
        self.rows = rows
        self.tail = float(max(np.abs(rows[:, -1, :]).max(), np.abs(rows[:, :, -1]).max()))


def cells_of(act: Activation, indices, wanted) -> list[Cell | None]:
    """The cells with these indices, built where wanted, None elsewhere."""
    known = act.__dict__.setdefault("_chaos", {})
    for i in wanted:
        if i not in known:
            known[i] = Cell(act, i)
    return [known.get(i) if i in wanted else None for i in indices]


def one_by_one(act: Activation, q, moment, variance_w, variance_b) -> np.ndarray:
    """c* and chi_c for flat arrays of chaotic points, each solved on its own: (2, n)."""
    rows = zip(q, moment, variance_w, variance_b, strict=True)
    pairs = [attracting_correlation(act, *map(float, row)) for row in rows]
    return np.array([[1 - delta for delta, _ in pairs], [chi for _, chi in pairs]])
