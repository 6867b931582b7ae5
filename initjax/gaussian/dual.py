r"""Duals: E[f(u) g(v)] for arrays of Gaussian pairs, each by the cheapest exact route.

Concrete arrays (float64, NumPy), in this order: closed form by fingerprint; |c| = 1 by the one-dimensional rule;
Mehler's series where its cut terms have died out (one row of coefficients a distinct variance, then Horner over the
matrix); for what is left, near |c| = 1 of a kinked function, a table in theta where many correlations share one pair of
variances, or nested quadrature entry by entry.
Traced arrays: closed form, else nested quadrature. Differentiable by Price's theorem,
d/dk E[f(u) g(v)] = E[f'(u) g'(v)], with the delta terms of jumps, so that derivatives are right at c = +-1, at kinks
and for q -> 0.

Sources: Price 1958; Daniely, Frostig, Singer 2016 (arXiv:1602.05897).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, QuadratureError
from initjax.gaussian import bivariate
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import FORMS, recognise
from initjax.gaussian.expect import _expect, check_q, density, host_rule, scalar, traced_rule
from initjax.gaussian.matrix import FEW, WORTH_COMPILING, coefficient_pair, matrix_pair
from initjax.gaussian.nodes import REACH, unit_edges
from initjax.gaussian.series import RESOLVED, aligned, evaluate, series, stacked
from initjax.gaussian.taylor import is_recording, recorded
from initjax.trace.jaxpr import is_traced

SNAP = 4e-15  # a correlation this close to +-1 is rounding: arccos would turn it into 1e-7
_TABLE_FROM = 150  # correlations at one (q1, q2) from which a table pays


def pair(f, g, q1, q2, c):
    """E[f(u) g(v)], Var u = q1, Var v = q2, correlation c in [-1, 1]; see `cross` for covariances."""
    f, g = as_activation(f), as_activation(g)
    if is_traced(q1, q2, c):
        dtype = jnp.result_type(*(a for a in (q1, q2, c) if is_traced(a)))
        q1, q2, c = jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in (q1, q2, c)))
        return _pair(f, g, q1, q2, c)
    q1, q2 = check_q(q1, "q1"), check_q(q2, "q2")
    c = _check_c(c)
    found = _as_matrix(f, g, q1, q2, c)
    if found is not None:
        return found
    q1, q2, c = np.broadcast_arrays(q1, q2, c)
    return scalar(host_pair(f, g, q1, q2, c))


def _as_matrix(f, g, q1, q2, c) -> np.ndarray | None:
    """The compiled route for a large kernel matrix with variances along its rows and columns."""
    shape = c.shape
    rows = q1.shape in ((), (1, 1)) or q1.shape == (*shape[:1], 1)
    columns = q2.shape in ((), (1,), (1, 1)) or q2.shape in ((1, *shape[1:]), shape[1:])
    if c.ndim != 2 or c.size < WORTH_COMPILING or not (rows and columns):
        return None
    x, y = np.broadcast_to(q1.ravel(), shape[:1]), np.broadcast_to(q2.ravel(), shape[1:])
    out = matrix_pair(f, g, x, y, c)
    if out is None or not np.isfinite(out.sum()):
        return None
    row, column = np.nonzero(c == 1)
    equal = x[row] == y[column]
    same = (row[equal], column[equal])
    if same[0].size:
        distinct, back = np.unique(x[same[0]], return_inverse=True)
        out[same] = host_pair(f, g, distinct, distinct, np.ones_like(distinct))[back]
    return out


def cross(f, g, q1, q2, k):
    """E[f(u) g(v)] for centred Gaussian (u, v) with covariance [[q1, k], [k, q2]].

    Parameters
    ----------
    f, g : elementwise JAX callables or `Activation`s (the same object twice costs less).
    q1, q2 : variances >= 0.
    k : covariance, |k| <= sqrt(q1 q2) up to rounding. All three broadcast.

    Returns
    -------
    float64 NumPy array for concrete input; for tracers an array of the tracer's dtype, differentiable.

    Raises
    ------
    InputError : a variance or covariance that is not finite, negative variance, |k| > sqrt(q1 q2).
    QuadratureError : the expectation does not exist or is not resolved to 1e-9.

    Accuracy
    --------
    1e-12 relative to sqrt(E[f^2] E[g^2]).

    Examples
    --------
    >>> import jax, numpy as np
    >>> from initjax.gaussian import cross
    >>> print(f"{cross(jax.nn.relu, jax.nn.relu, 1.0, 1.0, 0.0):.12f}")  # 1 / (2 pi)
    0.159154943092
    """
    f, g = as_activation(f), as_activation(g)
    if is_traced(q1, q2, k):
        dtype = jnp.result_type(*(a for a in (q1, q2, k) if is_traced(a)))
        q1, q2, k = jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in (q1, q2, k)))
        if is_recording():
            return recorded((f, g), q1, q2, k)
        tiny = jnp.asarray(1e-30, dtype)
        raw = k / (jnp.sqrt(jnp.maximum(q1, tiny)) * jnp.sqrt(jnp.maximum(q2, tiny)))
        snap = SNAP if dtype == jnp.float64 else 1e-6
        one = jnp.asarray(1.0, dtype)
        snapped = jnp.where(jnp.abs(raw) > 1 - snap, jnp.sign(raw) * one, raw)
        return _pair(f, g, q1, q2, raw + jax.lax.stop_gradient(snapped - raw))
    q1, q2 = check_q(q1, "q1"), check_q(q2, "q2")
    k = np.asarray(k, np.float64)
    norm = np.sqrt(q1) * np.sqrt(q2)
    k, norm = np.broadcast_arrays(k, norm)
    c = np.divide(k, norm, out=np.zeros(norm.shape), where=norm > 0)
    size = np.abs(c)
    largest = float(size.max(initial=0.0))
    if not (largest <= 1 + 1e-9 and np.all(np.abs(k[norm == 0]) <= 1e-300)):
        raise InputError(
            f"a covariance k is NaN, infinite, or larger than sqrt(q1 q2): largest |k| / sqrt(q1 q2) = {largest:.12g}.",
            "covariances with |k| <= sqrt(q1 q2), up to rounding.",
            "no Gaussian pair has another covariance.",
            "pass the variances and covariance of one positive semidefinite kernel.",
        )
    ends = size > 1 - SNAP
    c[ends] = np.sign(c[ends])  # in place: a kernel matrix may be large
    found = _as_matrix(f, g, q1, q2, c)
    if found is not None:
        return found
    q1, q2, c = np.broadcast_arrays(q1, q2, c)
    return scalar(host_pair(f, g, q1, q2, c))


def _check_c(c) -> np.ndarray:
    value = np.asarray(c)
    if value.dtype.kind in "fiub":
        value = value.astype(np.float64)
        if np.all(np.abs(value) <= 1 + 1e-12):
            return np.asarray(np.clip(value, -1.0, 1.0))
    bad = value[~(np.abs(value) <= 1)].ravel()[0] if value.dtype.kind in "fiub" else c
    raise InputError(
        f"c = {bad}.",
        "real correlations in [-1, 1].",
        "c is the correlation of two Gaussian pre-activations.",
        "divide a covariance by sqrt(q1 q2), or use ij.gaussian.cross, which takes covariances.",
    )


# -- concrete ----------------------------------------------------------------------------------------------------------


def host_pair(f: Activation, g: Activation, q1, q2, c) -> np.ndarray:
    """E[f(u) g(v)] for concrete float64 arrays of one shape."""
    s = np.sqrt((1 - c) * (1 + c))
    p, r = recognise(f), recognise(g)
    if p is not None and r is not None and p.family == r.family:
        with np.errstate(over="ignore", invalid="ignore"):
            value = FORMS[p.family](np, p.parameters, r.parameters, q1, q2, c, s)
        if not np.all(np.isfinite(value)):
            raise QuadratureError(
                f"E[f(u) g(v)] for f = {f.name} overflows float64.",
                "variances at which the expectation is below 1e308.",
                "the expectation of an exponential grows like exp(q).",
                "use smaller variances.",
            )
        return np.asarray(value)
    shape = c.shape
    q1, q2, c, s = (np.ascontiguousarray(a).ravel() for a in (q1, q2, c, s))
    out = np.empty(c.size)
    todo = np.ones(c.size, bool)
    same = (c == 1) & (q1 == q2)
    if same.any():
        distinct, back = np.unique(q1[same], return_inverse=True)
        out[same] = _diagonal(f, g, distinct)[back]
        todo &= ~same
    if todo.any():
        out[todo] = _off_diagonal(f, g, q1[todo], q2[todo], c[todo], s[todo])
    return out.reshape(shape)


def _diagonal(f, g, q):
    if f is g:
        return host_rule(f, lambda u, value, slope: [value * value], q, 1)[0]
    if not f.kinks and not g.kinks:
        try:  # the cells of one function often resolve the other, and the product needs no analysis of its own
            return host_rule(f, lambda u, value, slope: [value * g.values(u)], q, 1)[0]
        except QuadratureError:
            pass
    both = _joined(f, g)
    return host_rule(both, lambda u, value, slope: [value], q, 1)[0]


@functools.lru_cache(maxsize=512)
def _joined(f: Activation, g: Activation) -> Activation:
    return Activation(lambda x: f.fn(x) * g.fn(x), kinks=f.kinks + g.kinks)


def _off_diagonal(f, g, q1, q2, c, s):
    out = np.empty(c.size)
    rows1, back1 = np.unique(q1, return_inverse=True)
    rows2, back2 = np.unique(q2, return_inverse=True)
    if max(rows1.size, rows2.size) > FEW:
        resolved = coefficient_pair(f, g, rows1, rows2)
        if resolved is not None:
            return _sum_series(*resolved, back1, back2, c)
    left = [series(f, float(q)) for q in rows1]
    right = left if f is g and np.array_equal(rows1, rows2) else [series(g, float(q)) for q in rows2]
    if left is not right or len(left) > 1:
        left, right = aligned([(f, rows1, left), (g, rows2, right)])
    a, b = stacked(left), stacked(right)
    terms = a.shape[1]
    # what the cut terms can still contribute: |c|^K times the geometric mean of the two tails
    tails = np.sqrt(np.array([r.tail for r in left])[back1] * np.array([r.tail for r in right])[back2])
    sizes = np.sqrt(np.array([r.square for r in left])[back1] * np.array([r.square for r in right])[back2])
    reached = tails * np.abs(c) ** terms <= RESOLVED * sizes
    todo = np.flatnonzero(reached)
    out[todo] = _sum_series(a, b, back1[todo], back2[todo], c[todo])
    rest = np.flatnonzero(~reached)
    if rest.size:
        out[rest] = _by_quadrature(f, g, q1[rest], q2[rest], c[rest], s[rest])
    return out


def _sum_series(a, b, back1, back2, c):
    if len(a) == len(b) == 1:
        return evaluate(a[0], b[0], c)
    out = np.empty(c.size)
    step = max(1, 2_000_000 // a.shape[1])
    for start in range(0, c.size, step):
        part = slice(start, start + step)
        out[part] = evaluate(a[back1[part]], b[back2[part]], c[part])
    return out


def _by_quadrature(f, g, q1, q2, c, s):
    out = np.empty(c.size)
    pairs, which = np.unique(np.stack([q1, q2], 1), axis=0, return_inverse=True)
    which = which.ravel()
    for index, (x, y) in enumerate(pairs):
        members = np.flatnonzero(which == index)
        distinct, back = np.unique(c[members], return_inverse=True)
        if distinct.size >= _TABLE_FROM:
            out[members] = _table(f, g, float(x), float(y))(np.arctan2(s[members], c[members]))
        else:
            sines = np.sqrt((1 - distinct) * (1 + distinct))
            values = [bivariate.direct(f, g, x, y, ci, si) for ci, si in zip(distinct, sines, strict=True)]
            out[members] = np.asarray(values)[back]
    return out


@functools.lru_cache(maxsize=256)
def _table(f, g, q1, q2) -> bivariate.Table:
    return bivariate.Table(f, g, q1, q2)


# -- traced ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pair(f: Activation, g: Activation, q1: jax.Array, q2: jax.Array, c: jax.Array) -> jax.Array:
    p, r = recognise(f), recognise(g)
    one = jnp.asarray(1.0, c.dtype)
    if p is not None and r is not None and p.family == r.family:
        s = jnp.sqrt(jnp.maximum((one - c) * (one + c), 0 * c))
        return FORMS[p.family](jnp, p.parameters, r.parameters, q1, q2, c, s)
    flat = (jnp.ravel(q1), jnp.ravel(q2), jnp.ravel(c))
    return jnp.reshape(jax.lax.map(lambda args: _traced_nested(f, g, *args), flat), c.shape)


def _traced_nested(f, g, q1, q2, c):
    dtype = c.dtype
    sign = jnp.where(c < 0, jnp.asarray(-1.0, dtype), jnp.asarray(1.0, dtype))
    c = jnp.minimum(jnp.abs(c), jnp.asarray(1.0, dtype))
    s = jnp.sqrt((1 - c) * (1 + c))
    width = jnp.maximum(s, jnp.asarray(1e-9 if dtype == jnp.float64 else 1e-5, dtype))
    # outer nodes: cells of f, cells of g through c, the Gaussian's own, and a ladder of widths s around kinks of g
    root1, root2 = (jnp.sqrt(jnp.maximum(q, jnp.asarray(1e-30, dtype))) for q in (q1, q2))
    from initjax.gaussian.expect import _all_breaks

    own_f = jnp.asarray(_all_breaks(f, REACH), dtype) / root1
    own_g = sign * jnp.asarray(_all_breaks(g, REACH), dtype) / root2
    through = own_g / jnp.maximum(c, jnp.asarray(1e-3, dtype))
    pieces = [jnp.asarray(unit_edges(REACH), dtype), own_f, through]
    if g.kinks:
        kinks = sign * jnp.asarray(g.kinks, dtype) / root2 / jnp.maximum(c, jnp.asarray(1e-3, dtype))
        pieces.append(jnp.ravel(kinks[:, None] + width * jnp.asarray(bivariate._LADDER, dtype)[None, :]))
    edges = jnp.sort(jnp.clip(jnp.concatenate(pieces), -REACH, REACH))
    nodes, weights = (jnp.asarray(a, dtype)[None, :] for a in np.polynomial.legendre.leggauss(16))
    middle, half = ((edges[1:] + edges[:-1]) / 2)[:, None], ((edges[1:] - edges[:-1]) / 2)[:, None]
    z = middle + half * nodes
    w = half * weights * jnp.exp(-z * z / 2) / np.sqrt(2 * np.pi).astype(dtype)

    def panel(args):  # one outer panel at a time bounds the memory
        z, w = args
        mean = sign * root2 * c * z
        v, inner = traced_rule(g, mean, jnp.broadcast_to(q2 * s * s, z.shape), order=16)
        return jnp.sum(w * f.fn(root1 * z) * jnp.sum(g.fn(v) * inner, axis=-1))

    return jnp.sum(jax.lax.map(panel, (z, w)))


@_pair.defjvp
def _pair_jvp(f, g, primals, tangents):
    q1, q2, c = primals
    dq1, dq2, dc = tangents
    floor = jnp.asarray(1e-10 if c.dtype == jnp.float64 else 1e-5, c.dtype)
    p1, p2 = jnp.maximum(q1, floor), jnp.maximum(q2, floor)
    by_c = jnp.sqrt(q1) * jnp.sqrt(q2) * (_pair(f.prime, g.prime, q1, q2, c) + _deltas(f, g, p1, p2, c))
    by_q1 = _scaling(f, g, p1, p2, c)
    by_q2 = _scaling(g, f, p2, p1, c)
    return _pair(f, g, q1, q2, c), by_c * dc + by_q1 * dq1 + by_q2 * dq2


def _scaling(f, g, q1, q2, c):
    """d/dq1 E[f(u) g(v)] at fixed c: E[u f'(u) g(v)] / (2 q1), with kappa f(kappa) jumps."""
    p, r = recognise(f), recognise(g)
    if p is not None and r is not None and p.family == r.family and not f.kinks:
        s = jnp.sqrt(jnp.maximum((1 - c) * (1 + c), 0 * c))
        form = functools.partial(FORMS[p.family], jnp, p.parameters, r.parameters)
        return jax.jvp(lambda q: form(q, q2, c, s), (q1,), (jnp.ones_like(q1),))[1]
    total = _pair(f.euler, g, q1, q2, c)
    for point, jump in f.jumps:
        total = total + point * jump * density(point, q1) * _conditional(g, point, q1, q2, c)
    return total / (2 * q1)


def _deltas(f, g, q1, q2, c):
    """The part of E[f'(u) g'(v)] that the a.e. derivatives of jumping functions miss."""
    total = jnp.zeros_like(c)
    for point, jump in f.jumps:
        total = total + jump * density(point, q1) * _conditional(g.prime, point, q1, q2, c)
    for point, jump in g.jumps:
        total = total + jump * density(point, q2) * _conditional(f.prime, point, q2, q1, c)
    for point, jump in f.jumps:
        for other, step in g.jumps:
            rest = q2 * (1 - c) * (1 + c)
            miss = other - c * jnp.sqrt(q2 / q1) * point
            apart = density(miss, jnp.where(rest > 0, rest, jnp.ones_like(rest)))
            infinite = jnp.where(jnp.abs(miss) < 1e-12, jnp.full_like(rest, jnp.inf), jnp.zeros_like(rest))
            total = total + jump * step * density(point, q1) * jnp.where(rest > 0, apart, infinite)
    return total


def _conditional(g, point, q1, q2, c):
    """E[g(v) | u = point]."""
    mean = c * jnp.sqrt(q2 / q1) * point
    rest = q2 * (1 - c) * (1 + c)
    v, w = traced_rule(g, mean, rest)
    return jnp.sum(g.fn(v) * w, axis=-1)


__all__ = ["cross", "host_pair", "pair", "_expect"]
