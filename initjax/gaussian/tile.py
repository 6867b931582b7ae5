"""Several duals of one tile of a kernel: E[f(u) g(v)] for pairs (f, g) of functions of the same Gaussian pairs (u, v).

A layer asks for E[phi phi] and E[phi' phi'] at once: closed forms are fused into one pass over the tile, which shares
correlations and angles; tables of Hermite coefficients are shared between tiles. A tile is small enough for the cache;
the caller has one for each core.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import FORMS, recognise
from initjax.gaussian.dual import SNAP, cross
from initjax.gaussian.matrix import CHUNK, _interpolation, _terms
from initjax.gaussian.series import RESOLVED, coefficients, series
from initjax.trace.jaxpr import float64

_SMALL = 4096  # entries up to which NumPy is faster than a compiled pass
_NEAR, _RARE = 0.97, 0.02  # above this |c| are so few entries of a tile that they are summed on their own
CUT = 1e-15  # of what may be left out of a sum, relative to sqrt(E[f^2] E[g^2])
_TALLEST = 1024  # terms of a table
_PAD = 128  # sides are padded to multiples, so that few shapes are compiled


def duals(pairs: list[tuple[Any, Any]], q1: np.ndarray, q2: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """E[f(u) g(v)] for every (f, g); Var u = q1, Var v = q2, Cov = k, arrays of one rank that broadcast to k's shape.

    Raises
    ------
    InputError, QuadratureError : as `cross`, which is also the accuracy.
    """
    acts = [(as_activation(f), as_activation(g)) for f, g in pairs]
    forms = [closed_form(f, g) for f, g in acts]
    if not (np.all(q1 > 0) and np.all(q2 > 0)):
        return [np.asarray(cross(f, g, q1, q2, k)) for f, g in acts]
    out: list[Any] = [None] * len(pairs)
    closed = {i: form for i, form in enumerate(forms) if form is not None}
    if closed and k.size > _SMALL:
        families = tuple(form[0] for form in closed.values())
        with float64():  # holds for one thread only
            parameters = [tuple(map(np.asarray, form[1:])) for form in closed.values()]
            values, largest = _fused(families, parameters, q1, q2, k)
        if float(largest) <= 1 + 1e-9:
            for i, value in zip(closed, values, strict=True):
                out[i] = np.asarray(value)
    rest = [i for i in range(len(pairs)) if out[i] is None and forms[i] is None]
    if rest:
        c = k * _inverse_root(q1)
        c *= _inverse_root(q2)
        largest = max(float(c.max(initial=0.0)), -float(c.min(initial=0.0)))
        if largest <= 1 + 1e-9:
            if largest > 1 - SNAP:
                ends = np.abs(c) > 1 - SNAP
                c[ends] = np.sign(c[ends])
            for i in rest:
                out[i] = _by_series(*acts[i], q1, q2, c)
    for i, (f, g) in enumerate(acts):
        if out[i] is None or not np.isfinite(out[i].sum()):
            out[i] = np.asarray(cross(f, g, q1, q2, k))  # small, not resolved, or an error
    return out


def closed_form(f: Activation, g: Activation):
    """The family of both functions and their parameters, or None."""
    p, r = recognise(f), recognise(g)
    if p is None or r is None or p.family != r.family:
        return None
    return p.family, p.parameters, r.parameters


@functools.partial(jax.jit, static_argnames=("families",))
def _fused(families, parameters, q1, q2, k):
    """Closed forms of several families in one pass, and the largest |correlation| met."""
    raw = k / (jnp.sqrt(q1) * jnp.sqrt(q2))
    size = jnp.abs(raw)
    c = jnp.where(size > 1 - SNAP, jnp.sign(raw), raw)
    s = jnp.sqrt((1 - c) * (1 + c))
    forms = [FORMS[family](jnp, p, r, q1, q2, c, s) for family, (p, r) in zip(families, parameters, strict=True)]
    return [jnp.broadcast_to(form, k.shape) for form in forms], jnp.max(size)


def _inverse_root(q):
    return 1 / np.sqrt(np.where(q > 0, q, 1.0))


_matmul = jax.jit(jnp.matmul)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b in float64, for use on several threads at once.

    BLAS has threads of its own, which wait for each other by spinning: a product of a few microseconds took fifty
    milliseconds where the cores were taken. Below its threshold BLAS is quiet; above, XLA shares its threads.
    """
    if a.size * b.shape[-1] <= 1 << 18:
        return np.matmul(a, b)
    with float64():
        return np.asarray(_matmul(a, b))


# ------------------------------------------------------------------ Mehler's series


def _by_series(f: Activation, g: Activation, q1, q2, c) -> np.ndarray | None:
    ends = [np.log2([q.min(), q.max()]) for q in (q1, q2)]
    low, high = (int(np.floor(min(e[0] for e in ends))), int(np.ceil(max(e[1] for e in ends))))
    left, right = table_of(f, low, high), table_of(g, low, high)
    if left is None or right is None:
        return None
    terms = max(left.shape[1], right.shape[1])
    if left.shape[1] < terms:
        left = table_of(f, low, high, terms)
    if right.shape[1] < terms:
        right = table_of(g, low, high, terms)
    if left is None or right is None:
        return None
    a, b = _rows(left, q1, low, high), _rows(right, q2, low, high)
    weight = np.abs(a).reshape(len(a), -1).max(axis=1) * np.abs(b).reshape(len(b), -1).max(axis=1)
    allowed = CUT * float(np.sqrt((a * a).sum(axis=0).min() * (b * b).sum(axis=0).min()))
    size = np.abs(c)
    near = size > _NEAR
    if np.count_nonzero(near) > _RARE * c.size:
        return _summed(a, b, c, weight, float(size.max()), allowed)
    # few pairs are nearly equal, and they alone need every term
    out = _summed(a, b, c, weight, min(_NEAR, float(size.max(initial=0.0))), allowed)
    if near.any():
        where = np.nonzero(near)
        rows, columns = ([i if n > 1 else 0 * i for i, n in zip(where, q.shape, strict=True)] for q in (q1, q2))
        powers = c[near] ** np.arange(len(a))[:, None]
        out = np.array(out)
        out[near] = (a[:, *rows] * b[:, *columns] * powers).sum(axis=0)
    return out


def _summed(a, b, c, weight, largest: float, allowed: float) -> np.ndarray:
    """sum_k a[k] b[k] c^k for |c| <= largest, even and odd powers apart, each as far as it reaches `allowed`.

    weight : bounds of |a[k] b[k]|. silu, with all even powers but one odd, costs half of what its length says.
    """
    reach = weight * largest ** np.arange(len(weight))
    square, out = c * c, None
    for start in (0, 1):
        tail = np.cumsum(reach[start::2][::-1])[::-1]
        terms = int(np.count_nonzero(tail > allowed))
        if terms:
            part = _horner(a[start::2][:terms], b[start::2][:terms], square)
            part = part * c if start else part
            out = part if out is None else out + part
    return np.zeros_like(c) if out is None else out


def table_of(act: Activation, low: float, high: float, at_least: int = 0) -> np.ndarray | None:
    """Hermite coefficients (nodes, K) at Chebyshev nodes of log2 q between low and high; None where not resolved.

    a_k is smooth in log q: the nodes are doubled until the values between them are right to 13 digits.
    """
    cache = act.__dict__.setdefault("_hermite_tables", {})
    key = (low, high, at_least)
    if key not in cache:
        cache[key] = _tabulated(act, low, high, at_least)
    return cache[key]


def _tabulated(act: Activation, low: float, high: float, at_least: int) -> np.ndarray | None:
    # wide Gaussians see a smooth function as a kink (gelu at q = 100 has 9000 terms): a table of some hundred such rows
    # takes minutes, the quadrature of all pairs seconds
    probe, square = coefficients(act, 2.0**high, _TALLEST)
    if float(np.sum(probe[-_TALLEST // 8 :] ** 2)) > RESOLVED * square:
        return None
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
    return np.ascontiguousarray(product(_interpolation(nodes, place), table).T).reshape(-1, *q.shape)


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
        at, total = jnp.asarray(padded), np.zeros(padded.shape)
        for start in range(len(right) - CHUNK, -1, -CHUNK):
            chunk = slice(start, start + CHUNK)
            total = _terms(total, left[:, chunk], right[chunk], at)
    return np.asarray(total)[:n, :m].reshape(x.shape)
