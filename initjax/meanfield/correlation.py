r"""The correlation map C(c) = [sigma_w^2 E[phi(u) phi(v)] + sigma_b^2] / q and its attracting fixed point c*.

At a fixed point q of the variance map, sigma_b drops out: 1 - C(c) = (sigma_w^2 / q) (M(q) - Gamma(q, c)), so
    c* solves  sigma_w^2 w(q, c) = 1,   w(q, c) = (M - Gamma) / (q (1 - c)),   w(q, 1) = D(q),
and w falls as c does (Gamma is convex on [0, 1]). Solved in log(1 - c), so that gelu's 1 - c* = 7e-4 is not missed.
"""

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import recognise
from initjax.gaussian.dual import host_pair
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.gaussian.price import average_slope, curvature_of, graded_edges
from initjax.gaussian.series import series
from initjax.meanfield.table import raw_moments

_SMALL = 1e-4  # (1 - c) q below which Gamma' is averaged instead of M - Gamma taken
_FEW = 8  # nodes of that average: Gamma' is a polynomial in sqrt(1 - c) there


def width_function(act: Activation, q: float, moment: float):
    """w(q, c) as a function of an array 1 - c, in whichever form keeps the digits of M - Gamma."""
    if recognise(act) is None:
        found = series(act, q)
        square, degree = found.a**2, np.arange(len(found.a))
        cut = 0.0 if found.resolved else found.tail_sum  # of a resolved series the difference is rounding

        def by_series(delta):
            # (1 - c^k) / (1 - c) without subtracting where c is near 1; the cut terms have c^k = 0
            column = delta[:, None]
            near = -np.expm1(degree * np.log1p(-np.minimum(column, 0.5)))
            return (np.where(column < 0.5, near, 1 - (1 - column) ** degree) @ square + cut) / (q * delta)

        if found.resolved:
            return lambda delta: by_series(np.atleast_1d(delta))
        if curvature_of(act).usable:
            return _tabulated(act, q)
        # the cut terms may be taken as c^k = 0 from here on
        series_from = -np.expm1(np.log(1e-13 * found.square / found.tail) / len(found.a))
    else:
        by_series, series_from = (lambda delta: delta), np.inf  # never reached

    nodes, weights = legendre(_FEW)
    root_t = (nodes + 1) / 2  # t = s^2 removes the square root that a kink leaves at c = 1

    def otherwise(delta):
        delta = np.atleast_1d(delta)
        out = np.empty_like(delta)
        far, small = delta >= series_from, delta * q < _SMALL
        if far.any():
            out[far] = by_series(delta[far])
        small &= ~far
        if small.any():  # w = mean of Gamma' over [c, 1]: the difference M - Gamma would lose its digits
            c = 1 - delta[small, None] * root_t**2
            qs = np.full_like(c, q)
            out[small] = host_pair(act.prime, act.prime, qs, qs, c) @ (weights * root_t)
        rest = ~(far | small)
        if rest.any():
            qs = np.full_like(delta[rest], q)
            out[rest] = (moment - host_pair(act, act, qs, qs, 1 - delta[rest])) / (q * delta[rest])
        return out

    return otherwise


def _tabulated(act: Activation, q: float):
    """w(q, c) as a piecewise polynomial in theta = arccos c, from Price's theorem applied twice."""
    edges = graded_edges(act, q)
    slope = raw_moments(act, np.array([q]))[1]
    w = average_slope(act, np.array([q]), slope, edges, 14)[1][0]
    rows = w @ legendre_transform(14)

    def interpolated(delta):
        theta = 2 * np.arcsin(np.sqrt(np.atleast_1d(delta) / 2))
        panel = np.clip(np.searchsorted(edges, theta, side="right") - 1, 0, len(rows) - 1)
        t = (2 * theta - edges[panel] - edges[panel + 1]) / (edges[panel + 1] - edges[panel])
        return np.polynomial.legendre.legval(t, rows[panel].T, tensor=False)

    return interpolated


def attracting_correlation(act: Activation, q: float, moment: float, variance_w: float, variance_b: float):
    """(1 - c*, chi_c) in the chaotic phase, chi_1 > 1."""
    width = width_function(act, q, moment)

    def gap(x):
        return float(variance_w * width(np.exp(x))[0] - 1)

    zero = gap(0.0)
    if zero >= -1e-14:  # c* = 0: no bias and E[phi] = 0
        delta = 1.0
    else:
        low = np.log(1e-15)
        f_low = gap(low)
        delta = float(np.exp(_root(gap, low, 0.0, f_low, zero))) if f_low > 0 else 0.0
    slope = host_pair(act.prime, act.prime, np.array([q]), np.array([q]), np.array([1 - delta]))[0]
    return delta, float(variance_w * slope)


def _root(f, low, high, f_low, f_high):
    """Illinois iteration: superlinear, and never leaves its bracket."""
    for _ in range(200):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        value = f(middle)
        if value == 0 or abs(high - low) < 1e-15 * max(1.0, abs(middle)):
            return middle
        if value * f_high < 0:
            low, f_low = high, f_high
        else:
            f_low *= 0.5
        if abs(middle - high) < 4e-16 * max(1.0, abs(middle)):
            return middle
        high, f_high = middle, value
    return high
