"""At which pairs of positions a moment of two bodies is taken, and how such an array is laid out.

A moment M[x, y] is an array of rank(x) + rank(y): the positions of x, then those positions of y that run on their own;
the others stand with x's (p' = p) and have size 1. Carrying same-position moments wherever no layer compares different
positions is what makes a flattened CNN cost N^2 P instead of N^2 P^2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from initjax.trace.domain import Lin
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, Axis, Relayout, extents, xp_of


class Mode(NamedTuple):
    """examples : every example meets every example, else itself alone. sites : the same for all other positions."""

    examples: bool
    sites: bool

    def apart(self, axis: Axis) -> bool:
        """Whether the two sides run over this axis on their own."""
        return self.examples if axis.example else self.sites


PAIRS = Mode(True, True)
SITES = Mode(True, False)
WITHIN = Mode(False, True)
SAME = Mode(False, False)


def _partner(i: int, x: Axes, y: Axes) -> int:
    """The axis of x with which axis i of y runs together."""
    return next(j for j, a in enumerate(x) if a.example) if y[i].example else i


@functools.lru_cache(maxsize=4096)
def shape_of(mode: Mode, x: Axes, y: Axes) -> tuple[int, ...]:
    """The shape of M[x, y]."""
    head, tail = list(extents(x)), list(extents(y))
    for i, a in enumerate(y):
        if not mode.apart(a):  # one side may be the same for all positions
            j = _partner(i, x, y)
            head[j], tail[i] = max(head[j], tail[i]), 1
    return (*head, *tail)


def left(value, rank: int) -> Any:
    """A value over the positions of x, as a factor of M[x, y] with y of this rank."""
    if value is None or isinstance(value, float):
        return value
    return value.reshape(np.shape(value) + (1,) * rank)


def right(value, mode: Mode, y: Axes, x: Axes) -> Any:
    """A value over the positions of y, as a factor of M[x, y]."""
    if value is None or isinstance(value, float):
        return value
    shape = np.shape(value)
    if mode == PAIRS:
        return value.reshape((1,) * len(x) + shape)
    along = {_partner(i, x, y): i for i, a in enumerate(y) if not mode.apart(a)}
    apart = [i for i, a in enumerate(y) if mode.apart(a)]
    head = [shape[along[j]] if j in along else 1 for j in range(len(x))]
    tail = [n if i in apart else 1 for i, n in enumerate(shape)]
    return value.transpose(*(along[j] for j in sorted(along)), *apart).reshape((*head, *tail))


def _labels(x: Axes, y: Axes, shared) -> tuple[list[int], list[int]]:
    ours = list(range(len(x)))
    return ours, [_partner(i, x, y) if shared(a) else len(x) + i for i, a in enumerate(y)]


def taken(value, x: Axes, y: Axes, coarse: Mode, fine: Mode):
    """The entries of M[x, y] in `coarse` that `fine` asks for."""
    if value is None:
        return None
    shape = shape_of(coarse, x, y)
    if np.shape(value) != shape:  # the same for all positions of an axis
        value = xp_of(value).broadcast_to(value, shape)
    ours, theirs = _labels(x, y, lambda a: coarse.apart(a) and not fine.apart(a))
    kept = ours + [j for j in theirs if j >= len(x)]
    picked = xp_of(value).einsum(value, ours + theirs, kept).reshape(shape_of(fine, x, y))
    return picked if is_traced(picked) else np.array(picked)  # a view would keep the large array alive


def with_diagonal(value, exact, mode: Mode, x: Axes):
    """M[x, x] in this mode, with its same-example, same-position entries replaced by `exact`, over x's positions."""
    ours, theirs = _labels(x, x, mode.apart)
    exact = np.zeros(extents(x)) if exact is None else exact
    if not is_traced(value, exact):
        value = value if value.flags.writeable else np.array(value)
        rest = [j for j in theirs if j >= len(x)]
        np.einsum(value, ours + theirs, ours + rest)[...] = left(exact, len(rest))
        return value
    mask: Any = True
    for i, a in enumerate(x):
        if mode.apart(a) and extents(x)[i] > 1:
            line = np.eye(extents(x)[i], dtype=bool)
            shape = [1] * (2 * len(x))
            shape[i] = shape[len(x) + i] = extents(x)[i]
            mask = mask & line.reshape(shape)
    return jnp.where(mask, jnp.asarray(left(exact, len(x)), value.dtype), value)


def moved(value, a: Lin, b: Lin, mode: Mode):
    """M[a, b] of two local maps that are alike, from M of their sources; no two positions apart but examples."""
    value = a.map.apply(value, a.source.axes)
    shape = shape_of(mode, a.axes, b.axes)
    head, tail = value.shape[: len(a.axes)], shape[len(a.axes) :]
    if value.size != math.prod(head) * math.prod(tail):  # the sources are the same for all examples
        tail = (1,) * len(tail)
    return xp_of(value).broadcast_to(value.reshape(head + tail), shape)


def moved_right(value, b: Lin, mode: Mode, x: Axes):
    """M[a, b] from M[a, source of b], a on the axes x."""
    step = b.map
    if not mode.examples and step.kind in ("reshape", "broadcast"):
        step = Relayout(step.kind, tuple(a._replace(size=1) if a.example else a for a in step.parameters))
    if step.kind == "scale":
        return value * right(step.parameters[0].value, mode, b.axes, x)
    return step.apply(value, b.source.axes, len(x))


def alike(a: Relayout, b: Relayout) -> bool:
    """Whether two maps do the same to every example, however many there are."""
    if a.kind != b.kind:
        return False
    if a.kind not in ("reshape", "broadcast"):
        return a.parameters == b.parameters
    one, other = a.parameters, b.parameters
    return len(one) == len(other) and all(p == q or p.example and q.example for p, q in zip(one, other, strict=True))
