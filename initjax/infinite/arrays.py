"""The array work of the moment recursion, the same for NumPy (concrete, float64) and for JAX tracers."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax import gaussian
from initjax.gaussian import tabulated
from initjax.gaussian.tile import duals, product
from initjax.infinite.modes import PAIRS, Mode, left, right, shape_of
from initjax.trace.domain import Base, Sum, Windows
from initjax.trace.expr import VARIABLE, Expr, apply
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, Window, extents, xp_of

Array = Any
_FEW_TERMS = 64
MANY = 64  # variances from which a table of Hermite coefficients is cheaper than a quadrature for each


class Total:
    """A running sum of products, in which a factor None makes the product vanish. Its own arrays are reused."""

    def __init__(self):
        self.value: Any = None
        self._mine = False

    def add(self, *factors) -> None:
        if any(f is None for f in factors):
            return
        product, fresh = factors[0], False
        for factor in factors[1:]:
            if not (isinstance(factor, float) and factor == 1.0):
                product, fresh = _in_place(np.multiply, product, factor, fresh), True
        if self.value is None:
            self.value, self._mine = product, fresh
        else:
            self.value, self._mine = _in_place(np.add, self.value, product, self._mine), True

    def full(self, shape: tuple[int, ...]) -> Array | None:
        return None if self.value is None else full(self.value, shape)


def _in_place(operation, a, b, mine: bool):
    if is_traced(a, b):
        return a * b if operation is np.multiply else a + b
    if mine and isinstance(a, np.ndarray) and np.broadcast_shapes(a.shape, np.shape(b)) == a.shape:
        return operation(a, b, out=a)
    return operation(a, b)


def full(value, shape: tuple[int, ...]):
    return value if np.shape(value) == shape else xp_of(value).broadcast_to(value, shape)


def scale(value, factor: float):
    return value if factor == 1.0 else value * factor


def full_rank(constant, rank: int):
    """A constant as an array of this rank."""
    return np.full((1,) * rank, constant) if isinstance(constant, float) else constant


def filled(value, axes: Axes):
    """The array, or zeros where it is zero by structure."""
    return np.zeros(extents(axes)) if value is None else value


# ------------------------------------------------------------------ sums over contracted axes


def contracted_positions(a: Base) -> list[int]:
    """Contracted axes that carry positions, in the order of the weights' strides: partners on both sides."""
    axes = a.operand.axes
    return [i for i in a.contracted if axes[i].size > 1 and not axes[i].channel]


def sum_matching(inner, a: Base, b: Base, mode: Mode):
    """sum_k M[x, y](p k, p' k) over the positions that both bases contract with one weight index."""
    x, y = a.operand.axes, b.operand.axes
    ours, theirs = list(range(len(x))), list(range(len(x), len(x) + len(y)))
    mine, yours = contracted_positions(a), contracted_positions(b)
    if mine and not mode.sites:  # already at the same position
        inner = inner.sum(axis=tuple(mine), keepdims=True)
    elif mine:
        for i, j in zip(mine, yours, strict=True):
            theirs[j] = ours[i]
        inner = xp_of(inner).einsum(inner, ours + theirs, [ours[i] for i in a.order] + [theirs[j] for j in b.order])
    return inner.reshape(shape_of(mode, a.axes, b.axes))


def contract_constants(a: tuple[Base, ...], b: tuple[Base, ...], mode: Mode):
    """sum_k x(p k) y(p' k) of known arrays, over pairs of bases, as one matrix product for each common position."""
    axes_x, axes_y = a[0].axes, b[0].axes
    x, y = _patches(a), _patches(b)
    apart = [i for i, axis in enumerate(axes_y) if mode.apart(axis)]
    if mode == PAIRS:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return _product(x, y.T).reshape(shape_of(mode, axes_x, axes_y))
    along = [i for i in range(len(axes_x)) if i not in apart]
    if not any(x.shape[i] > 1 for i in apart) and not any(y.shape[i] > 1 for i in apart):
        return _sum_last(x * y).reshape(shape_of(mode, axes_x, axes_y))
    sizes = [tuple(array.shape[i] for i in apart) for array in (x, y)]
    common = tuple(x.shape[i] for i in along)
    stacks = [
        array.transpose(*along, *apart, len(axes_x)).reshape(math.prod(common), math.prod(size), -1)
        for array, size in zip((x, y), sizes, strict=True)
    ]
    out = _product(stacks[0], stacks[1].swapaxes(1, 2)).reshape(common + sizes[0] + sizes[1])
    count = len(axes_x)
    back = [int(i) for i in np.argsort([*along, *apart])]
    return out.transpose(*back, *range(count, out.ndim)).reshape(shape_of(mode, axes_x, axes_y))


def _sum_last(a):
    """Sum over the last axis; of tracers term by term, where XLA's reductions cost more than they add up."""
    if not is_traced(a) or a.shape[-1] > _FEW_TERMS:
        return a.sum(axis=-1)
    return functools.reduce(operator.add, [a[..., i] for i in range(a.shape[-1])])


def _product(a, b):
    return jnp.matmul(a, b) if is_traced(a, b) else product(a, b)


def _patches(bases: tuple[Base, ...]):
    """What known arrays the bases contract, over their positions and (last) the contracted entries of all of them."""
    blocks = []
    for base in bases:
        operand: Sum = base.operand
        constant = full_rank(operand.constant, len(operand.axes))
        array = xp_of(constant).broadcast_to(constant, extents(operand.axes))
        matched = contracted_positions(base)
        rest = [i for i in range(len(operand.axes)) if i not in matched]
        blocks.append(array.transpose(*rest, *matched).reshape(*extents(base.axes), -1))
    return blocks[0] if len(blocks) == 1 else xp_of(*blocks).concatenate(blocks, axis=-1)


def convolved(value, windows: Windows, x: Axes, y: Axes, mode: Mode):
    """Sum over the taps of a convolution of M[x, y], both sides shifted alike: one axis after the other."""
    for axis, steps in windows:
        sides = [axis] + ([len(x) + axis] if mode.apart(y[axis]) else [])
        if is_traced(value):
            shape = tuple(steps[0].size if i in sides else n for i, n in enumerate(value.shape))
            summed = functools.partial(_padded_sum, sides=sides, steps=steps)
            (value,) = tabulated.apart(lambda v, summed=summed: [summed(v)], [shape], value)
        else:
            value = _shifted_sum(value, sides, steps)
    return value


def _shifted_sum(value: np.ndarray, sides: list[int], steps: tuple[Window, ...]) -> np.ndarray:
    shape = [steps[0].size if i in sides else n for i, n in enumerate(value.shape)]
    out = np.zeros(shape, value.dtype)
    for step in steps:
        into, out_of = [slice(None)] * value.ndim, [slice(None)] * value.ndim
        for side in sides:
            into[side] = slice(step.first, step.first + step.count * step.step, step.step)
            out_of[side] = slice(step.start, step.start + step.count * step.stride, step.stride)
        out[tuple(into)] += value[tuple(out_of)]
    return out


def _padded_sum(value, sides: list[int], steps: tuple[Window, ...]):
    """The same for tracers: one padded copy, of which the taps are slices."""
    low = max(max(step.first * step.stride - step.start * step.step, 0) for step in steps)
    if any(step.step > 1 for step in steps):  # a transposed convolution, whose taps have gaps
        return _scattered_sum(value, sides, steps)
    ends = [step.start + (step.size - 1 - step.first) * step.stride + 1 for step in steps]
    high = max(0, *(end - value.shape[sides[0]] for end in ends))
    padded = value
    if low or high:
        edges = [(low, high, 0) if i in sides else (0, 0, 0) for i in range(value.ndim)]
        padded = jax.lax.pad(value, jnp.zeros((), value.dtype), edges)
    out: Any = None
    for step in steps:
        part = padded
        for side in sides:
            start = low + step.start - step.first * step.stride
            stop = start + (step.size - 1) * step.stride + 1
            part = jax.lax.slice_in_dim(part, start, stop, step.stride, side)
        out = part if out is None else out + part
    return out


def _scattered_sum(value, sides: list[int], steps: tuple[Window, ...]):
    out: Any = None
    for step in steps:
        part = value
        gaps = [(0, 0, 0)] * value.ndim
        for side in sides:
            stop = step.start + (step.count - 1) * step.stride + 1
            part = jax.lax.slice_in_dim(part, step.start, stop, step.stride, side)
            end = step.first + (step.count - 1) * step.step + 1
            gaps[side] = (step.first, step.size - end, step.step - 1)
        part = jax.lax.pad(part, jnp.zeros((), value.dtype), gaps)
        out = part if out is None else out + part
    return out


def same_entry(a: Base, b: Base, mode: Mode):
    """1 where two views of one weight leaf show the same entry (channel by channel), else 0; broadcasts to M[a, b]."""
    mine, yours = left(_entries(a), len(b.axes)), right(_entries(b), mode, b.axes, a.axes)
    return (mine == yours).astype(np.float64)


def _entries(a: Base) -> np.ndarray:
    return a.view.indices([i for i, axis in enumerate(a.axes) if not axis.channel])


# ------------------------------------------------------------------ Gaussian expectations of expressions


def expect(f: Expr, q) -> Any:
    """E[f(sqrt(q) z)], or None for the identity."""
    if f is VARIABLE:
        return None
    if f.op == "literal":
        return np.full(np.shape(q), float(f.value))
    if is_traced(q):
        return (tabulated.mean if tabulated.served() else gaussian.expect)(f.fn, q)
    return np.asarray(gaussian.expect(f.fn, q))


def cross(f: Expr, g: Expr, q1, q2, k):
    """E[f(u) g(v)] for Var u = q1, Var v = q2, Cov = k; the three broadcast; k None: independent."""
    if k is None:
        mean_f, mean_g = expect(f, q1), expect(g, q2)
        return None if mean_f is None or mean_g is None else mean_f * mean_g
    if f is VARIABLE and g is VARIABLE:
        return k
    if VARIABLE in (f, g):
        return _stein(g, q2, k) if f is VARIABLE else _stein(f, q1, k)
    if is_traced(q1, q2, k) and tabulated.served():
        return tabulated.duals([(f.fn, g.fn)], q1, q2, k)[0]
    if not is_traced(q1, q2, k):  # the derivative of a clip at its bound is no derivative of the kernel
        bound = np.sqrt(q1) * np.sqrt(q2)
        k = np.clip(k, -bound, bound)
    value = gaussian.cross(f.fn, g.fn, q1, q2, k)
    return value if is_traced(value) else np.asarray(value)


def same(f: Expr, g: Expr, q):
    """E[f(u) g(u)] for Var u = q."""
    if is_traced(q) and VARIABLE not in (f, g) and tabulated.served():
        return tabulated.moment(f.fn, g.fn, q)
    return crosses([(f, g)], q, q, q)[0] if q.size >= MANY and not is_traced(q) else cross(f, g, q, q, q)


def crosses(pairs: list[tuple[Expr, Expr]], q1, q2, k) -> list:
    """`cross` for several pairs of functions of the same Gaussians; what they have in common is computed once."""
    if k is None or any(VARIABLE in pair for pair in pairs):
        return [cross(f, g, q1, q2, k) for f, g in pairs]
    functions = [(f.fn, g.fn) for f, g in pairs]
    if not is_traced(q1, q2, k):
        if not (np.all(q1 > 0) and np.all(q2 > 0)):  # a field that vanishes, up to rounding
            bound = np.sqrt(q1) * np.sqrt(q2)
            k = np.clip(k, -bound, bound)
        return duals(functions, q1, q2, k)
    if tabulated.served():
        return tabulated.duals(functions, q1, q2, k)
    return [cross(f, g, q1, q2, k) for f, g in pairs]


def _stein(g: Expr, q, k):
    """E[u g(v)] = Cov(u, v) E[v g(v)] / Var v."""
    moment = expect(apply(jax.lax.mul_p, {}, [VARIABLE, g]), q)
    xp = xp_of(moment, q, k)
    return k * xp.where(q > 0, moment / xp.where(q > 0, q, xp.ones_like(q)), xp.zeros_like(q))
