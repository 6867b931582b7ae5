"""The array work of the moment recursion, the same for NumPy (concrete, float64) and for JAX tracers."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax import gaussian
from initjax.trace.domain import Base, Sum
from initjax.trace.expr import VARIABLE, Expr, apply
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, extents, xp_of

Array = Any


class Total:
    """A running sum of products, in which a factor None makes the product vanish."""

    def __init__(self):
        self.value: Any = None

    def add(self, *factors) -> None:
        if any(f is None for f in factors):
            return
        product = factors[0]
        for factor in factors[1:]:
            if not (isinstance(factor, float) and factor == 1.0):
                product = product * factor
        self.value = product if self.value is None else self.value + product

    def full(self, shape: tuple[int, ...]) -> Array | None:
        if self.value is None:
            return None
        return self.value if np.shape(self.value) == shape else xp_of(self.value).broadcast_to(self.value, shape)


def before(value, rank: int):
    """Append `rank` axes of size 1: a value that depends on the first side's positions only."""
    if value is None or isinstance(value, float):
        return value
    return value.reshape(np.shape(value) + (1,) * rank)


def after(value, rank: int):
    """Prepend `rank` axes of size 1: a value that depends on the second side's positions only."""
    if value is None or isinstance(value, float):
        return value
    return value.reshape((1,) * rank + np.shape(value))


def scale(value, factor: float):
    return value if factor == 1.0 else value * factor


def full_rank(constant, rank: int):
    """A constant as an array of this rank."""
    return np.full((1,) * rank, constant) if isinstance(constant, float) else constant


def filled(value, axes: Axes):
    """The array, or zeros where it is zero by structure."""
    return np.zeros(extents(axes)) if value is None else value


def put_diagonal(value, exact, rank: int):
    """A (P, P) moment with its diagonal replaced; positions are the first and the last `rank` axes."""
    shape = np.shape(value)
    count = math.prod(shape[:rank])
    exact = np.zeros(count) if exact is None else exact.reshape(count)
    if is_traced(value, exact):
        index = jnp.arange(count)
        flat = jnp.reshape(value, (count, count))
        return flat.at[index, index].set(jnp.asarray(exact, flat.dtype)).reshape(shape)
    flat = np.array(value).reshape(count, count)
    np.fill_diagonal(flat, exact)
    return flat.reshape(shape)


def take_diagonal(value, rank: int):
    """Same-position entries of a (P, P) moment."""
    if value is None:
        return None
    shape = np.shape(value)
    count = math.prod(shape[:rank])
    return xp_of(value).diagonal(value.reshape(count, count)).reshape(shape[:rank])


# ------------------------------------------------------------------ sums over contracted axes


def _matched(a: Base) -> list[int]:
    """Contracted axes that carry positions, in the order of the weights' strides: partners on both sides."""
    axes = a.operand.axes
    return [i for i in a.contracted if axes[i].size > 1 and not axes[i].channel]


def sum_matching(inner, a: Base, b: Base):
    """sum_k M[x, y](p k, p' k) over the positions that both bases contract with one weight index."""
    x, y = a.operand.axes, b.operand.axes
    labels_x, labels_y = list(range(len(x))), list(range(len(x), len(x) + len(y)))
    for i, j in zip(_matched(a), _matched(b), strict=True):
        labels_y[j] = labels_x[i]
    kept = [labels_x[i] for i in a.order] + [labels_y[j] for j in b.order]
    shape = extents(a.axes) + extents(b.axes)
    if not _matched(a):
        return inner.reshape(shape)
    return xp_of(inner).einsum(inner, labels_x + labels_y, kept).reshape(shape)


def sum_kept(inner, a: Base):
    """Sum a same-example moment over the contracted axes of a base."""
    axes = tuple(i for i in a.contracted if np.shape(inner)[i] > 1)
    return (inner.sum(axis=axes) if axes else inner).reshape(extents(a.axes))


def constant_contraction(a: Base, b: Base):
    """sum_k x(p k) y(p' k) of two known arrays, as one matrix product."""
    sides = []
    for base in (a, b):
        operand: Sum = base.operand
        xp = xp_of(operand.constant)
        array = xp.broadcast_to(operand.constant, extents(operand.axes))
        matched = _matched(base)
        rest = [i for i in range(len(operand.axes)) if i not in matched]
        array = array.transpose(*rest, *matched)
        kept = math.prod(np.shape(array)[: len(rest)])
        sides.append(array.reshape(kept, -1))
    return xp_of(*sides).matmul(sides[0], sides[1].T).reshape(extents(a.axes) + extents(b.axes))


def same_entry(a: Base, b: Base):
    """1 where two views of one weight leaf show the same entry (channel by channel), else 0."""
    mine, yours = _entries(a), _entries(b)
    return (before(mine, len(b.axes)) == after(yours, len(a.axes))).astype(np.float64)


def same_entry_diagonal(a: Base, b: Base):
    return (_entries(a) == _entries(b)).astype(np.float64)


def _entries(a: Base) -> np.ndarray:
    entries = a.view.indices([i for i, axis in enumerate(a.axes) if not axis.channel])
    return np.broadcast_to(entries, extents(a.axes))


# ------------------------------------------------------------------ Gaussian expectations of expressions


def expect(f: Expr, q) -> Any:
    """E[f(sqrt(q) z)], or None for the identity."""
    if f is VARIABLE:
        return None
    if f.op == "literal":
        return np.full(np.shape(q), float(f.value))
    return gaussian.expect(f.fn, q) if is_traced(q) else np.asarray(gaussian.expect(f.fn, q))


def cross(f: Expr, g: Expr, q1, q2, k):
    """E[f(u) g(v)] for Var u = q1, Var v = q2, Cov = k; the three broadcast; k None: independent."""
    if k is None:
        mean_f, mean_g = expect(f, q1), expect(g, q2)
        return None if mean_f is None or mean_g is None else mean_f * mean_g
    if f is VARIABLE and g is VARIABLE:
        return k
    if f is VARIABLE:
        return _stein(g, q2, k)
    if g is VARIABLE:
        return _stein(f, q1, k)
    xp = xp_of(q1, q2, k)
    bound = xp.sqrt(q1) * xp.sqrt(q2)
    k = xp.clip(k, -bound, bound)
    value = gaussian.cross(f.fn, g.fn, q1, q2, k)
    return value if is_traced(value) else np.asarray(value)


def _stein(g: Expr, q, k):
    """E[u g(v)] = Cov(u, v) E[v g(v)] / Var v."""
    import jax

    moment = expect(apply(jax.lax.mul_p, {}, [VARIABLE, g]), q)
    xp = xp_of(moment, q, k)
    return k * xp.where(q > 0, moment / xp.where(q > 0, q, xp.ones_like(q)), xp.zeros_like(q))
