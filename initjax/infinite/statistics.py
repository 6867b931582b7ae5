r"""Tangents of normalized activations: the variance over the batch moves with the weights.

With v = u - m and the statistic's tangent D = sum_q v_q dv_q, a tangent is sum_j c_j(p) dv(p) + e(p) D with functions
c, e of the Gaussian at p. Of its second moments

    E[c_p c'_p'] M[dv_p, dv_p']            is as everywhere,
    E[e_p e'_p'] M[D, D]                   holds as the effective rank r of the batch grows, up to O(1 / r),
    sum_q E[c_p e'_p' v_q] M[dv_p, dv_q]   is exact: v_q enters linearly, through its regression on the Gaussians of
                                           c and e'.

All are of one order where positions are averaged: together they are the projection that a normalization's derivative
is. Derived here; the chain is Yang et al. 2019 (arXiv:1902.08129), section on gradients.
"""

from typing import Any

import jax
import numpy as np

from initjax.gaussian.activation import as_activation
from initjax.gaussian.tile import duals
from initjax.infinite.arrays import expect, full
from initjax.infinite.modes import SAME, Mode, moved_right, shape_of
from initjax.trace.batch import pieces
from initjax.trace.domain import Ew, Sum, Tangent
from initjax.trace.expr import VARIABLE, Expr, apply, literal
from initjax.trace.graph import carries
from initjax.trace.maps import extents
from initjax.trace.noise import only_draws


def split_parts(x: Tangent) -> list[tuple[Sum | None, Sum, bool]]:
    """(coefficient, tangent, whether it is a statistic of the batch) of every part; others stay as they are."""
    found = []
    for c, g in x.parts:
        carried = tuple(term for term in g.terms if carries(term[0]))
        rest = tuple(term for term in g.terms if not carries(term[0]))
        statistic = Sum(g.axes, carried) if carried and rest else g
        if c is None or not carried or not pieces(statistic):
            assert c is None or not carried or only_draws(c), "the walk has refused products with an average's tangent"
            found.append((c, g, False))
            continue
        found += [(c, statistic, True)] + ([(c, Sum(g.axes, rest), False)] if rest else [])
    return found


def is_map(part) -> bool:
    """Whether a part is a map over positions of tangents with coefficients, such as their average."""
    return part[0] is None and any(carries(atom) for atom, _ in part[1].terms)


def maps_of(moments, x: Tangent, y: Tangent, mode: Mode, ours: list, theirs: list):
    """The moments of all maps in x and y, each taken back to what it maps: (factor, moments by leaf)."""
    rest = moments._remember("rest", SAME, y, y, lambda y, *_: _without_maps(y, theirs))
    for _, h, _ in filter(is_map, theirs):
        for atom, k in h.terms:
            inner = moments.tangents(x, moments._as_tangent(atom.source), mode)
            yield k, {leaf: moved_right(value, atom, mode, x.axes) for leaf, value in inner.items()}
    for _, g, _ in filter(is_map, ours):
        for atom, k in g.terms:
            inner = moments.tangents(moments._as_tangent(atom.source), rest, mode)
            yield k, {leaf: atom.map.apply(value, atom.source.axes) for leaf, value in inner.items()}


def _without_maps(y: Tangent, parts: list) -> Tangent:
    return Tangent(y.axes, tuple((c, h) for c, h, _ in parts if not is_map((c, h))))


def mixed(moments, one, other, mode: Mode) -> dict[str, Any]:
    """sum_q E[c_p e_p' v_q] M[dg_p, dv_q] for a plain part (c, dg) and a statistic (e, D), in either order."""
    flipped = one[2]
    plain, statistic = (other, one) if flipped else (one, other)
    c, g = plain[0], plain[1]
    e, d = statistic[0], statistic[1]
    (u, f, k1), (w, h, k2) = _function(moments, c, g.axes), _function(moments, e, d.axes)
    mine, yours = moments.sides[::-1] if flipped else moments.sides

    def between(x: Sum, y: Sum) -> Any:
        """M[x, y] of the plain side with that of the statistic, positions of either in one axis."""
        value = moments.moment(y, x, mode) if flipped else moments.moment(x, y, mode)
        return _matrix(value, y, x, mode).T if flipped else _matrix(value, x, y, mode)

    dots = [moments._dots(dv, g, mode) if flipped else moments._dots(g, dv, mode) for _, _, dv in pieces(d) or ()]
    out: dict[str, Any] = {}
    if not any(dots):  # tangents of other weights
        return out
    q1, q2 = mine.variance(u).reshape(-1, 1), yours.variance(w).reshape(1, -1)
    by_near, by_far = _slopes(f, h, q1, q2, between(u, w))
    for (factor, v, dv), by_leaf in zip(pieces(d) or (), dots, strict=True):
        near = between(u, v)
        inner = moments.moment(w, v, mode) if moments.same else yours.moment(w, v, yours.coarse)
        far = _matrix(inner, w, v, mode if moments.same else yours.coarse)
        for leaf, value in by_leaf.items():
            theta = _matrix(value, dv, g, mode).T if flipped else _matrix(value, g, dv, mode)
            along, across = (near * theta).sum(1, keepdims=True), theta @ far.T
            moment = (along * by_near + across * by_far) * (k1 * k2 * factor)
            moment = moment.T if flipped else moment
            axes = (d.axes, g.axes) if flipped else (g.axes, d.axes)
            moment = moment.reshape(shape_of(mode, *axes))
            out[leaf] = moment if leaf not in out else out[leaf] + moment
    return out


def _slopes(f: Expr, h: Expr, q1, q2, k) -> tuple[Any, Any]:
    """(a, b) with E[f(u) h(w) v] = a Cov(u, v) + b Cov(w, v), that is E[f' h] and E[f h'] with their deltas (Stein)."""
    safe = np.where(q1 > 0, q1, 1.0)
    if f.op == "literal":
        return 0.0, f.value * expect(_times(h), q2) / np.where(q2 > 0, q2, 1.0)
    if h is VARIABLE:
        mean = np.zeros_like(q1) if f is VARIABLE else expect(f, q1)
        return k * (expect(_times(_times(f)), q1) / safe - mean) / safe, mean
    act = as_activation(h.fn)
    if not act.jumps:
        both, far = duals([(_times(f).fn, h.fn), (f.fn, act.prime)], q1, q2, k)
        return (both - k * far) / safe, far
    first, second = duals([(_times(f).fn, h.fn), (f.fn, _times(h).fn)], q1, q2, k)
    det = q1 * q2 - k * k
    equal = det <= 1e-9 * q1 * q2
    det = np.where(equal, 1.0, det)
    near, far = (q2 * first - k * second) / det, (q1 * second - k * first) / det
    return np.where(equal, first / safe, near), np.where(equal, 0.0, far)


def _function(moments, body: Sum | None, axes) -> tuple[Sum, Expr, float]:
    """A coefficient as a number times a function of one Gaussian."""
    if body is None:
        return Sum(axes, ()), literal(1.0), 1.0
    if body.gaussian:
        return body, VARIABLE, 1.0
    ((atom, factor),) = body.terms
    assert isinstance(atom, Ew)
    return atom.leaf, atom.expr, factor


def _times(f: Expr) -> Expr:
    return apply(jax.lax.mul_p, {}, [VARIABLE, f])


def _matrix(value, x: Sum, y: Sum, mode: Mode):
    """A moment over all positions as a matrix."""
    rows, columns = (int(np.prod(extents(b.axes))) for b in (x, y))
    if value is None:
        return np.zeros((rows, columns))
    return full(value, shape_of(mode, x.axes, y.axes)).reshape(rows, columns)
