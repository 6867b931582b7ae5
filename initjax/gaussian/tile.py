"""Several duals of one tile of a kernel: E[f(u) g(v)] for pairs (f, g) of functions of the same Gaussian pairs (u, v).

A layer asks for E[phi phi] and E[phi' phi'] at once: the correlations, the angle of the arc-cosine kernels and the
tables of Hermite coefficients are shared. A tile is small enough for the cache; the caller has one for each core.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import FORMS, recognise
from initjax.gaussian.dual import SNAP, cross
from initjax.gaussian.matrix import CHUNK, _interpolation, _terms
from initjax.gaussian.series import coefficients, series
from initjax.trace.jaxpr import float64

_SMALL = 4096  # entries up to which NumPy is faster than a compiled pass
_PAD = 128  # sides are padded to multiples, so that few shapes are compiled


def duals(pairs: list[tuple[Any, Any]], q1: np.ndarray, q2: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """E[f(u) g(v)] for every (f, g); Var u = q1, Var v = q2, Cov = k, arrays of one rank that broadcast to k's shape.

    Raises
    ------
    InputError, QuadratureError : as `cross`, which is also the accuracy.
    """
    acts = [(as_activation(f), as_activation(g)) for f, g in pairs]
    c = k * _inverse_root(q1)
    c *= _inverse_root(q2)
    largest = max(float(c.max(initial=0.0)), -float(c.min(initial=0.0)))
    if not (largest <= 1 + 1e-9 and np.all(q1 > 0) and np.all(q2 > 0)):
        return [np.asarray(cross(f, g, q1, q2, k)) for f, g in acts]  # zero variances, or an error
    if largest > 1 - SNAP:
        ends = np.abs(c) > 1 - SNAP
        c[ends] = np.sign(c[ends])
    shared: Any = _Shared()
    s: Any = None
    out = []
    for f, g in acts:
        p, r = recognise(f), recognise(g)
        value = None
        if p is not None and r is not None and p.family == r.family:
            s = np.sqrt((1 - c) * (1 + c)) if s is None else s
            with np.errstate(over="ignore", invalid="ignore"):
                value = np.asarray(FORMS[p.family](shared, p.parameters, r.parameters, q1, q2, c, s))
        else:
            value = _by_series(f, g, q1, q2, c)
        if value is None or not np.isfinite(value.sum()):
            value = np.asarray(cross(f, g, q1, q2, k))
        out.append(value)
    return out


class _Shared:
    """NumPy, with the last arctan2 remembered: all arc-cosine kernels of a tile are functions of one angle."""

    def __init__(self):
        self._last: tuple = (None, None, None)

    def __getattr__(self, name):
        return getattr(np, name)

    def arctan2(self, y, x):
        if self._last[0] is not y or self._last[1] is not x:
            self._last = (y, x, np.arctan2(y, x))
        return self._last[2]


def _inverse_root(q):
    return 1 / np.sqrt(np.where(q > 0, q, 1.0))


# ------------------------------------------------------------------ Mehler's series


def _by_series(f: Activation, g: Activation, q1, q2, c) -> np.ndarray | None:
    ends = [np.log2([q.min(), q.max()]) for q in (q1, q2)]
    low, high = (int(np.floor(min(e[0] for e in ends))), int(np.ceil(max(e[1] for e in ends))))
    left, right = _table(f, low, high), _table(g, low, high)
    if left is None or right is None:
        return None
    terms = max(left.shape[1], right.shape[1])
    if left.shape[1] < terms:
        left = _table(f, low, high, terms)
    if right.shape[1] < terms:
        right = _table(g, low, high, terms)
    if left is None or right is None:
        return None
    a, b = _rows(left, q1, low, high), _rows(right, q2, low, high)
    for odd in (0, 1):  # odd or even f: half the terms, in c^2
        if np.abs(left[:, odd::2]).max() < 1e-16 * np.abs(left).max():
            value = _horner(a[1 - odd :: 2], b[1 - odd :: 2], c * c)
            return value if odd else c * value
    return _horner(a, b, c)


def _table(act: Activation, low: int, high: int, at_least: int = 0) -> np.ndarray | None:
    """Hermite coefficients (nodes, K) at Chebyshev nodes of log2 q between low and high; None where not resolved.

    a_k is smooth in log q: the nodes are doubled until the values between them are right to 13 digits.
    """
    cache = act.__dict__.setdefault("_hermite_tables", {})
    key = (low, high, at_least)
    if key not in cache:
        cache[key] = _tabulated(act, low, high, at_least)
    return cache[key]


def _tabulated(act: Activation, low: int, high: int, at_least: int) -> np.ndarray | None:
    ends = [series(act, 2.0**v) for v in (low, high)]
    if not all(r.resolved for r in ends):
        return None
    terms = max(at_least, *(len(r.a) for r in ends))
    count = 12
    while count <= 200:
        nodes, halfway = (np.cos(np.pi * (np.arange(n) + 0.5) / n) for n in (count, 3))
        at = [coefficients(act, 2.0 ** ((low + high + (high - low) * t) / 2), terms) for t in [*nodes, *halfway]]
        table = np.stack([row for row, _ in at])
        error = np.abs(_interpolation(nodes, halfway) @ table[:count] - table[count:]).max(axis=1)
        if np.all(error < 1e-13 * np.sqrt([square for _, square in at[count:]])):
            return table[:count]
        count *= 2
    return None


def _rows(table: np.ndarray, q: np.ndarray, low: int, high: int) -> np.ndarray:
    """Coefficients (K, *q.shape)."""
    nodes = np.cos(np.pi * (np.arange(len(table)) + 0.5) / len(table))
    place = (2 * np.log2(q.ravel()) - low - high) / max(high - low, 1)
    return np.ascontiguousarray((_interpolation(nodes, place) @ table).T).reshape(-1, *q.shape)


def _horner(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum_k a[k] b[k] x^k, where a[k] and b[k] broadcast to x."""
    n, m = a[0].size, b[0].size
    if x.size <= _SMALL or n * m != x.size:
        total = np.zeros_like(x)
        for row, column in zip(a[::-1], b[::-1], strict=True):
            total *= x
            total += row * column
        return total
    # rows and columns have coefficients of their own: unrolled passes that keep their sums in registers
    pad = -len(a) % CHUNK
    left = np.pad(a.reshape(len(a), n).T, [(0, -n % _PAD), (0, pad)])
    right = np.pad(b.reshape(len(b), m), [(0, pad), (0, -m % _PAD)])
    padded = np.pad(x.reshape(n, m), [(0, -n % _PAD), (0, -m % _PAD)])
    with float64():  # holds for one thread only
        at, total = jnp.asarray(padded), jnp.zeros(padded.shape)
        for start in range(len(right) - CHUNK, -1, -CHUNK):
            chunk = slice(start, start + CHUNK)
            total = _terms(total, left[:, chunk], right[chunk], at)
    return np.asarray(total)[:n, :m].reshape(x.shape)
