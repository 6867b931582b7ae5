r"""One layer's action on two inputs, fast for thousands of layers: w(q, c) = (M - Gamma) / (q (1 - c)) and Gamma.

A trajectory asks for them at a new q in every layer until q has converged, and then at one q for ever. Where q moves,
Hermite coefficients (smooth phi) or log w (kinked phi, `chaos.Cell`) are interpolated in cells of log q; a q that comes
back gets its own exact width function. Close to c = 1 the leading terms are used, so that 1 - c may be 1e-300.
"""

from collections.abc import Callable

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import recognise
from initjax.gaussian.dual import host_pair
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.gaussian.series import coefficients
from initjax.meanfield.chaos import Q_CELL, Cell
from initjax.meanfield.correlation import width_function
from initjax.meanfield.table import ramp

_NEAR = 1e-13  # q (1 - c) below which w is its expansion at c = 1; what is left out is of this size
_DEGREE = 14
_WIDTH = 0.25  # cells of log q
_LONGEST, _CUT = 512, 1e-24  # terms of a series worth interpolating, and the squared norm at which it is cut
_RESOLVED, _CELL_RESOLVED = 1e-12, 1e-9
_CELL_FROM = {"smooth": 6, "kinked": 2}  # values of q asked for in a cell before it is built
_TERMS = 64  # of Mehler's series for |c| <= 1/2: 2^-64 is left


class LayerMap:
    """w and Gamma of one activation at one q and arrays of correlations, with caches for many calls."""

    def __init__(self, act: Activation):
        self.act = act
        self.slopes = ramp(act)
        self.member = recognise(act)
        self._seen: dict[float, int] = {}
        self._asked: dict[tuple[str, int], int] = {}
        self._exact: dict[float, Callable[[np.ndarray], np.ndarray]] = {}
        self._rows: dict[float, np.ndarray] = {}
        self._cells = act.__dict__.setdefault("_mehler_cells", {})
        self._chaos = act.__dict__.setdefault("_chaos", {})
        self._bends = [(k, j * j) for k, j in act.prime.jumps]

    def width(self, q: float, moment: float, slope: float, delta: np.ndarray) -> np.ndarray:
        """w at 1 - c = delta <= 1/2; `moment` is M(q), `slope` is D(q)."""
        theta = 2 * np.arcsin(np.sqrt(delta / 2))
        if self.slopes is not None:
            right, left = self.slopes
            half = (right**2 + left**2) / 2
            share = (right - left) ** 2 / (np.pi * (right**2 + left**2))
            return half * (1 - share * _sine_excess(theta) / np.maximum(delta, 1e-300))
        if self.member is not None and self.member.family == "step":
            jump = self.member.parameters[0] - self.member.parameters[1]
            return jump**2 * theta / (2 * np.pi * q * delta)
        out = np.empty_like(delta)
        if self.act.jumps:
            overlap = host_pair(self.act, self.act, *np.broadcast_arrays(q, q, 1 - delta))
            return (moment - overlap) / (q * delta)
        near = q * delta < _NEAR
        if near.any():
            lost = sum(j2 * np.exp(-k * k / (2 * q)) for k, j2 in self._bends) * np.sqrt(delta[near] / 2) / np.pi
            out[near] = slope - 2 / 3 * lost
        if not near.all():
            out[~near] = self._away(q, moment, delta[~near], theta[~near])
        return out

    def _away(self, q, moment, delta, theta):
        act = self.act
        exact = self._exact.get(q)
        if exact is None:
            self._seen[q] = self._seen.get(q, 0) + 1
            if self.member is None and self._seen[q] < 3:
                value = self._kinked(q, theta) if act.kinks else self._smooth(q, moment, delta)
                if value is not None:
                    return value
            exact = self._exact[q] = width_function(act, q, moment)
            if self.member is not None and len(self._exact) > 64:
                self._exact.clear()
        return exact(delta)

    def _smooth(self, q, moment, delta):
        share = self._shares(q)
        if share is None:
            return None
        degree = np.arange(share.size)
        return moment / q * (-np.expm1(degree * np.log1p(-delta[:, None])) @ share) / delta

    def _shares(self, q: float) -> np.ndarray | None:
        """a_k^2 / M at q, interpolated in log q; None where the series is not resolved."""
        position = np.log(q) / _WIDTH
        index = int(np.floor(position))
        if index not in self._cells:
            if self._too_early(("smooth", index)):
                return None
            self._cells[index] = _mehler_cell(self.act, index)
        rows = self._cells[index]
        if rows is None:
            return None
        square = (np.polynomial.legendre.legvander(np.array([2 * (position - index) - 1]), _DEGREE - 1)[0] @ rows) ** 2
        return square / square.sum()

    def _too_early(self, cell) -> bool:
        """A cell costs as much as some single values of q: a trajectory that passes through quickly needs none."""
        self._asked[cell] = self._asked.get(cell, 0) + 1
        return self._asked[cell] < _CELL_FROM[cell[0]]

    def _kinked(self, q, theta):
        position = np.log(q) / Q_CELL
        index = int(np.floor(position))
        if index not in self._chaos:
            if self._too_early(("kinked", index)):
                return None
            self._chaos[index] = Cell(self.act, index)
        cell = self._chaos[index]
        if cell.tail > _CELL_RESOLVED:
            return None
        panel = np.clip(np.searchsorted(cell.edges, theta) - 1, 0, cell.edges.size - 2)
        low, high = cell.edges[panel], cell.edges[panel + 1]
        by_q = np.polynomial.legendre.legvander(np.array([2 * (position - index) - 1]), cell.rows.shape[1] - 1)[0]
        by_theta = np.polynomial.legendre.legvander(2 * (theta - low) / (high - low) - 1, cell.rows.shape[2] - 1)
        return np.exp(np.einsum("a,nab,nb->n", by_q, cell.rows[panel], by_theta))

    def overlap(self, q: float, moment: float, c: np.ndarray) -> np.ndarray:
        """Gamma at -1 <= c < 1/2, with its relative digits also near 0."""
        act = self.act
        if self.member is not None or act.jumps:
            return host_pair(act, act, *np.broadcast_arrays(q, q, c))
        if not act.kinks and q not in self._exact:
            share = self._shares(q)
            if share is not None:
                return moment * (c[:, None] ** np.arange(share.size) @ share)
        out = np.empty_like(c)
        inner = np.abs(c) <= 0.5
        if inner.any():
            if q not in self._rows:
                if len(self._rows) > 1000:
                    self._rows.clear()
                self._rows[q] = coefficients(act, q, _TERMS)[0] ** 2
            out[inner] = c[inner, None] ** np.arange(_TERMS) @ self._rows[q]
        if not inner.all():
            out[~inner] = host_pair(act, act, *np.broadcast_arrays(q, q, c[~inner]))
        return out


def _mehler_cell(act: Activation, index: int) -> np.ndarray | None:
    """Legendre coefficients in log q of a_k / sqrt(M): (_DEGREE, terms)."""
    nodes, _ = legendre(_DEGREE)
    top, square = coefficients(act, float(np.exp(_WIDTH * (index + 1))), _LONGEST)
    behind = np.cumsum(top[::-1] ** 2)[::-1]
    if behind[-_LONGEST // 8] > _CUT * square:
        return None
    terms = max(8, int(np.count_nonzero(behind > _CUT * square)))  # one length: a cut coefficient is not smooth in q
    values = np.zeros((_DEGREE, terms))
    for i, x in enumerate(nodes):
        a, square = coefficients(act, float(np.exp(_WIDTH * (index + (x + 1) / 2))), terms)
        values[i] = a / np.sqrt(square)
    rows = legendre_transform(_DEGREE).T @ values
    return rows if np.abs(rows[-2:]).max() < _RESOLVED else None


def _sine_excess(theta: np.ndarray) -> np.ndarray:
    """sin(theta) - theta cos(theta) without cancellation."""
    t2 = theta * theta
    small = theta * t2 * (1 / 3 - t2 * (1 / 30 - t2 * (1 / 840 - t2 * (1 / 45360 - t2 / 3991680))))
    return np.where(theta < 0.2, small, np.sin(theta) - theta * np.cos(theta))
