"""Duals of whole kernel matrices, compiled: E[f(u_i) g(v_j)] for rows q1_i, columns q2_j and correlations c_ij.

Large matrices are worked through in tiles that stay in the cache, on all cores: closed forms fused into one pass, and
Mehler's series by Horner's rule with one row of Hermite coefficients for each distinct variance.
"""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import FORMS, Member, recognise
from initjax.gaussian.series import coefficients, series
from initjax.trace.jaxpr import float64

WORTH_COMPILING = 200_000  # entries; below this NumPy is faster than dispatching
_TILE = 1 << 14  # entries of one tile: c, the sum and one term stay in the second-level cache
_PARTS = 4  # independent pieces, which the runtime spreads over the cores
_SIDE = 512  # side of a tile of Horner's rule
CHUNK = 16  # terms of Horner's rule in one compiled pass
FEW = 24  # distinct variances up to which each has its own coefficients
_DISTINCT = 512  # and beyond which, where they cannot be interpolated, the series is given up


@functools.partial(jax.jit, static_argnames=("family",))
def _closed(family, p, r, q1, q2, c):
    def rows(args):
        q1, c = args
        q1, y = q1[:, None], q2[None, :]
        s = jnp.sqrt(jnp.maximum((1 - c) * (1 + c), 0.0))
        return FORMS[family](jnp, p, r, q1, y, c, s)

    return jax.lax.map(rows, (q1, c))


@jax.jit
def _terms(total, a, b, x):
    """total * x^CHUNK plus CHUNK terms of Horner's rule, unrolled: one fused pass that keeps its sum in registers."""
    for k in range(CHUNK - 1, -1, -1):
        total = total * x + a[:, k, None] * b[k, None, :]
    return total


def _horner(a: np.ndarray, b: np.ndarray, c: np.ndarray, symmetric: bool = False) -> np.ndarray:
    """sum_k a[i, k] b[k, j] c[i, j]^k, a (n, K), b (K, m), c (n, m); of a symmetric result only half is computed."""
    n, m = c.shape
    a = np.pad(a, [(0, -n % _SIDE), (0, -a.shape[1] % CHUNK)])
    b = np.pad(b, [(0, -b.shape[0] % CHUNK), (0, -m % _SIDE)])
    out = np.empty_like(c)

    def tile(corner: tuple[int, int]):
        top, left = corner
        part = (slice(top, min(top + _SIDE, n)), slice(left, min(left + _SIDE, m)))
        x = c[part]
        height, width = x.shape
        x = np.pad(x, [(0, _SIDE - height), (0, _SIDE - width)])
        with float64():  # holds for one thread only
            x, total = jnp.asarray(x), jnp.zeros((_SIDE, _SIDE))
            for start in range(b.shape[0] - CHUNK, -1, -CHUNK):
                chunk = slice(start, start + CHUNK)
                total = _terms(total, a[top : top + _SIDE, chunk], b[chunk, left : left + _SIDE], x)
        out[part] = np.asarray(total)[:height, :width]
        if symmetric:
            out[part[1], part[0]] = out[part].T

    corners = [(i, j) for i in range(0, n, _SIDE) for j in range(0, i + 1 if symmetric else m, _SIDE)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(tile, corners))
    return out


def _in_parts(function, row_arrays, columns: int) -> np.ndarray:
    """Apply a tiled function to row blocks, dispatched together so that they run side by side."""
    n = row_arrays[0].shape[0]
    height = max(1, min(n, _TILE // columns))
    tiles = -(-n // height)
    per_part = -(-tiles // _PARTS)
    pieces = []
    with float64():
        for start in range(0, n, per_part * height):
            stop = min(n, start + per_part * height)
            pad = -(stop - start) % height if stop - start >= height else 0
            blocks = []
            for array in row_arrays:
                block = np.pad(array[start:stop], [(0, pad)] + [(0, 0)] * (array.ndim - 1), mode="edge")
                blocks.append(jnp.asarray(block.reshape(-1, min(height, stop - start), *array.shape[1:])))
            pieces.append((start, stop, function(*blocks)))
        out = np.empty((n, columns))
        for start, stop, piece in pieces:
            out[start:stop] = np.asarray(piece).reshape(-1, columns)[: stop - start]
    return out


def matrix_pair(f: Activation, g: Activation, q1: np.ndarray, q2: np.ndarray, c: np.ndarray) -> np.ndarray | None:
    """E[f(u_i) g(v_j)], c (n, m), or None where neither a closed form nor a resolved series covers every entry."""
    p, r = recognise(f), recognise(g)
    columns = q2.size
    if p is not None and r is not None and p.family == r.family:
        return _by_closed_form(p, r, q1, q2, c, columns)
    rows = coefficient_pair(f, g, q1, q2)
    if rows is None:
        return None
    a, b = rows
    symmetric = b is a and np.array_equal(c, c.T)
    b = np.ascontiguousarray(b.T)
    if np.abs(a[:, ::2]).max() < 1e-16 * np.abs(a).max():  # odd f: half the terms, in c^2
        return c * _horner(np.ascontiguousarray(a[:, 1::2]), b[1::2], c * c, symmetric)
    return _horner(a, b, c, symmetric)


def coefficient_pair(f: Activation, g: Activation, q1: np.ndarray, q2: np.ndarray):
    """Resolved Hermite coefficients of f at every q1 and of g at every q2, of one length, or None."""
    a = _coefficient_rows(f, q1)
    b = a if f is g and np.array_equal(q1, q2) else _coefficient_rows(g, q2)
    if a is None or b is None:
        return None
    if a.shape[1] < b.shape[1]:  # what is negligible beside itself is not so beside the row of a larger variance
        a = _coefficient_rows(f, q1, b.shape[1])
    elif b.shape[1] < a.shape[1]:
        b = _coefficient_rows(g, q2, a.shape[1])
    return None if a is None or b is None else (a, b)


def _coefficient_rows(act: Activation, q: np.ndarray, at_least: int = 0) -> np.ndarray | None:
    """Resolved Hermite coefficients for every q, (len(q), K >= at_least), or None.

    a_k is a smooth function of log q, so that many distinct variances are served by interpolation between a few
    Chebyshev nodes, doubled until the values halfway between the nodes are right to 13 digits.
    """
    distinct, back = np.unique(q, return_inverse=True)
    if distinct.size <= FEW or distinct[0] <= 0:
        if distinct.size > _DISTINCT:
            return None
        rows = [series(act, float(v)) for v in distinct]
        if not all(r.resolved for r in rows):
            return None
        terms = max(at_least, *(len(r.a) for r in rows))
        return np.stack([coefficients(act, float(v), terms)[0] for v in distinct])[back]
    low, high = np.log(distinct[0]), np.log(distinct[-1])
    ends = [series(act, float(v)) for v in (distinct[0], distinct[-1])]
    if not all(r.resolved for r in ends):
        return None
    terms = max(at_least, *(len(r.a) for r in ends))  # not cut row by row: a cut coefficient is no smooth function of q
    count = 12
    while count <= 200:
        nodes, halfway = (np.cos(np.pi * (np.arange(n) + 0.5) / n) for n in (count, 3))
        q_at = np.exp((low + high) / 2 + (high - low) / 2 * np.concatenate([nodes, halfway]))
        at = [coefficients(act, float(v), terms) for v in q_at]
        table = np.stack([row for row, _ in at])
        error = np.abs(_interpolation(nodes, halfway) @ table[:count] - table[count:]).max(axis=1)
        if np.all(error < 1e-13 * np.sqrt([square for _, square in at[count:]])):
            place = (2 * np.log(distinct) - low - high) / (high - low)
            return (_interpolation(nodes, place) @ table[:count])[back]
        count *= 2
    return None


def _interpolation(nodes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Matrix from values on Chebyshev nodes to values at `place`, by the barycentric formula."""
    n = len(nodes)
    weight = (-1.0) ** np.arange(n) * np.sin(np.pi * (np.arange(n) + 0.5) / n)
    gap = place[:, None] - nodes
    exact = gap == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = weight / np.where(exact, 1.0, gap)
    hit = exact.any(axis=1)
    ratio[hit] = exact[hit]
    return ratio / ratio.sum(axis=1, keepdims=True)


def _by_closed_form(p: Member, r: Member, q1, q2, c, columns) -> np.ndarray:
    with float64():
        p_, r_, q2_ = (jnp.asarray(np.asarray(v, np.float64)) for v in (p.parameters, r.parameters, q2))
    return _in_parts(lambda q1, c: _closed(p.family, p_, r_, q1, q2_, c), (q1, c), columns)
