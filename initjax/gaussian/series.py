r"""Mehler's series: E[f(u) g(v)] = sum_k a_k(q1) b_k(q2) c^k with Hermite coefficients a_k = E[f(sqrt(q) z) he_k(z)].

he_k = He_k / sqrt(k!) are orthonormal under N(0, 1). For a smooth f the coefficients fall like exp(-d sqrt(2 k / q)),
d the distance of the nearest pole, and one row of coefficients for each distinct q serves a whole kernel matrix.
A kink makes them fall only like k^(-5/4): the series then serves |c| < 1 - 30 / K, where c^K has died out.
"""

from typing import NamedTuple

import numpy as np

from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.expect import check_q
from initjax.gaussian.nodes import FAR_REACH, REACH, panel_nodes, unit_edges

LADDER = (32, 128, 512, 2048, 8192)
RESOLVED = 1e-13  # squared norm of the cut tail, relative to E[f^2]; E[f g] is then off by as much at c = 1 only


def coefficients(act: Activation, q: float, terms: int) -> tuple[np.ndarray, float]:
    """Hermite coefficients a_0 .. a_(terms-1) at one q, and E[f^2] from the same nodes."""
    reach = FAR_REACH if act.grows_fast else REACH
    width = min(1.0, 18.0 / np.sqrt(terms))  # he_k oscillates with wavelength 2 pi / sqrt(k)
    root = np.sqrt(max(q, 1e-30))
    own = act.breaks(reach * root) / root
    edges = np.unique(np.concatenate([unit_edges(reach, width), own[np.abs(own) <= reach]]))
    z, w = panel_nodes(edges)
    weight = w * np.exp(-z * z / 4) / np.sqrt(2 * np.pi)
    f = act.values(root * z) * weight
    # carry he_k exp(-z^2/4), which stays of order one where He_k overflows
    previous, current = np.zeros_like(z), np.exp(-z * z / 4)
    a = np.empty(terms)
    for k in range(terms):
        a[k] = f @ current
        previous, current = current, (z * current - np.sqrt(k) * previous) / np.sqrt(k + 1)
    return a, float((act.values(root * z) ** 2 * w * np.exp(-z * z / 2)).sum() / np.sqrt(2 * np.pi))


class Series(NamedTuple):
    """Hermite coefficients at one q, with the squared norm of what was cut, and E[f^2]."""

    a: np.ndarray
    tail: float
    square: float

    @property
    def tail_sum(self) -> float:
        """The squared norm of the cut terms as a difference of totals, not a bound: exact to rounding."""
        return self.square - float(self.a @ self.a)

    @property
    def resolved(self) -> bool:
        return self.tail <= RESOLVED * self.square


def series(act: Activation, q: float) -> Series:
    """The shortest resolved series of the ladder, or the longest worth having (kinks: algebraic tails)."""
    cache = act.__dict__.setdefault("_hermite", {})
    found = cache.get(q)
    if found is None:
        if len(cache) > 20_000:
            cache.clear()
        found = cache[q] = _climb(act, q)
    return found


def _climb(act: Activation, q: float) -> Series:
    found = Series(np.zeros(1), 1.0, 1.0)
    for terms in LADDER:
        a, square = coefficients(act, q, terms)
        square = max(square, 1e-300)
        # the difference of totals is rounding below 1e-15; the last eighth of the terms bounds a decaying tail
        last = float(np.sum(a[-max(4, terms // 8) :] ** 2))
        found = Series(a, max(square - float(a @ a), last), square)
        if found.resolved:
            return _trimmed(found)
        if terms >= 2048 and found.tail > 1e-6 * square:
            break
    return found


def _trimmed(found: Series) -> Series:
    """Without the trailing coefficients whose squares sum to less than a tenth of what may be cut."""
    behind = np.cumsum(found.a[::-1] ** 2)[::-1]
    keep = int(np.count_nonzero(behind > 0.1 * RESOLVED * found.square))
    return Series(found.a[: max(keep, 2)], max(found.tail, 0.1 * RESOLVED * found.square), found.square)


def aligned(sides: list[tuple[Activation, np.ndarray, list[Series]]]) -> list[list[Series]]:
    """The rows of two sides, those that were cut shorter than the longest one recomputed to its length.

    A row cut at 1e-13 in squared norm may lack 3e-7 in a coefficient: harmless against itself, not against a row of a
    larger variance, whose coefficient there is large.
    """
    terms = max(len(r.a) for _, _, rows in sides for r in rows)
    out = []
    for act, q, rows in sides:
        long = act.__dict__.setdefault("_hermite_long", {})
        if len(long) > 20_000:
            long.clear()
        side = []
        for value, row in zip(q.tolist(), rows, strict=True):
            if len(row.a) < terms:
                if (value, terms) not in long:
                    long[value, terms] = Series(coefficients(act, value, terms)[0], row.tail, row.square)
                row = long[value, terms]
            side.append(row)
        out.append(side)
    return out


def stacked(rows: list[Series]) -> np.ndarray:
    """Coefficients of several q as one array, padded with zeros."""
    terms = max(len(r.a) for r in rows)
    return np.stack([np.pad(r.a, (0, terms - len(r.a))) for r in rows])


def evaluate(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """sum_k a[..., k] b[..., k] c^k by Horner; a and b broadcast against c with one more axis."""
    total = np.zeros(np.broadcast_shapes(a.shape[:-1], b.shape[:-1], c.shape))
    for k in range(a.shape[-1] - 1, -1, -1):
        total *= c
        total += a[..., k] * b[..., k]
    return total


def hermite(phi, q, degree: int) -> np.ndarray:
    """Hermite (Mehler) coefficients a_k(q) = E[phi(sqrt(q) z) he_k(z)], k = 0 .. degree.

    Parameters
    ----------
    phi : elementwise JAX callable or `Activation`.
    q : variances >= 0, any shape, concrete.
    degree : highest k.

    Returns
    -------
    float64 array (*q.shape, degree + 1). Then E[phi(u) phi(v)] = sum_k a_k(q1) a_k(q2) c^k.

    Raises
    ------
    InputError : q negative, complex, NaN or infinite.
    QuadratureError : phi is not resolved at this q.

    Accuracy
    --------
    1e-13 relative to the root of E[phi^2].

    Examples
    --------
    >>> import jax
    >>> from initjax.gaussian import hermite
    >>> print([f"{a:.6f}" for a in hermite(jax.nn.relu, 1.0, 2)])  # 1/sqrt(2 pi), 1/2, 1/sqrt(4 pi)
    ['0.398942', '0.500000', '0.282095']

    References
    ----------
    Mehler 1866; Daniely, Frostig, Singer 2016 (arXiv:1602.05897), section 4.
    """
    act = as_activation(phi)
    q = check_q(q)
    rows = [coefficients(act, float(v), degree + 1)[0] for v in q.ravel()]
    return np.asarray(rows).reshape((*q.shape, degree + 1))


__all__ = ["aligned", "coefficients", "evaluate", "hermite", "series", "stacked"]
