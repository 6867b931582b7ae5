r"""c* for many points of the chaotic phase: w(q, c) as a two-dimensional table in (log q, theta), theta = arccos c.

c* solves sigma_w^2 w(q, c*) = 1 (see `correlation.py`). log w is a smooth function of log q and, for smooth and kinked
activations alike, of theta; it is tabulated on Legendre nodes for just those cells of log q in which points lie: by
`gaussian/price.py` where f'' is localised, node by node where the Hermite series is short.
"""

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import recognise
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.gaussian.price import average_slope, curvature_of, graded_edges
from initjax.gaussian.series import series
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
        q = np.exp(Q_CELL * (index + (nodes + 1) / 2))
        moment, slope, _ = raw_moments(act, q)
        quick = recognise(act) is None and not act.kinks and series(act, float(q[-1])).resolved
        if not quick and curvature_of(act).usable:
            self.edges = graded_edges(act, q[-1])
            w = average_slope(act, q, slope, self.edges, DEGREE)[1]
            w = np.einsum("qpt,qa->pat", np.log(np.maximum(w, 1e-300)), legendre_transform(DEGREE))
            self.rows = w @ legendre_transform(DEGREE)
        else:
            self._point_by_point(act, q, moment, slope)
        self.tail = float(max(np.abs(self.rows[:, -1, :]).max(), np.abs(self.rows[:, :, -1]).max()))

    def _point_by_point(self, act: Activation, q, moment, slope):
        levels = 3 + max(0, int(np.ceil(np.log2(np.sqrt(q[-1]) + 1))))
        self.edges = np.concatenate([[0.0], np.pi / 2 * 0.5 ** np.arange(levels - 1, -1, -1)])
        nodes, _ = legendre(DEGREE)
        middle, half = (self.edges[1:] + self.edges[:-1]) / 2, np.diff(self.edges) / 2
        theta = middle[:, None] + half[:, None] * nodes
        share = (1 - np.cos(np.pi * (np.arange(DEGREE - 1) + 0.5) / (DEGREE - 1))) / 2
        first = np.concatenate([[0.0], _GAP + (1 - _GAP) * share])
        theta[0] = first * self.edges[1]
        delta = 2 * np.sin(theta.ravel()[1:] / 2) ** 2
        w = np.stack([width_function(act, float(v), float(m))(delta) for v, m in zip(q, moment, strict=True)])
        w = np.log(np.maximum(np.column_stack([slope, w]), 1e-300)).reshape(DEGREE, levels, DEGREE)
        w = np.einsum("qpt,qa->pat", w, legendre_transform(DEGREE))
        self.rows = w @ legendre_transform(DEGREE)
        self.rows[0] = np.linalg.solve(np.polynomial.legendre.legvander(2 * first - 1, DEGREE - 1), w[0].T).T


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
