"""Linear maps over the positions of a field, and the axes they act on."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from initjax.trace.jaxpr import is_traced


class Axis(NamedTuple):
    """One axis of a field; `example`: it is known to run over independent examples, which no step mixes."""

    size: int
    channel: bool
    example: bool = False


Axes = tuple[Axis, ...]


def extents(axes: Axes) -> tuple[int, ...]:
    """The shape of the numerical arrays of a field: positions in full, channels as 1."""
    return tuple(1 if axis.channel else axis.size for axis in axes)


def xp_of(*values):
    """numpy, or jax.numpy if a tracer takes part."""
    return jnp if any(is_traced(v) for v in values) else np


@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """An array as part of a hashable key: equal to itself alone."""

    value: Any


class Window(NamedTuple):
    """Where the entries of one axis go: `out[first + i * step] = in[start + i * stride]` for i < count, else 0."""

    size: int
    first: int
    step: int
    start: int
    stride: int
    count: int

    @classmethod
    def tap(cls, size: int, out: int, stride: int, shift: int, dilation: int = 1) -> "Window":
        """One tap of a convolution: out[j] = in_dilated[j * stride + shift], entries outside being zero."""
        step = dilation // math.gcd(stride, dilation)
        hits = [j for j in range(out) if (j * stride + shift) % dilation == 0 and 0 <= j * stride + shift]
        hits = [j for j in hits if (j * stride + shift) // dilation < size]
        if not hits:
            return cls(out, 0, 1, 0, 1, 0)
        start = (hits[0] * stride + shift) // dilation
        return cls(out, hits[0], step, start, stride // math.gcd(stride, dilation), len(hits))

    def is_identity(self, size: int) -> bool:
        """Whether it leaves an axis of this size as it is."""
        return self == (size, 0, 1, 0, 1, size)


class Relayout(NamedTuple):
    """A linear map on the positions of a field, applied to numerical arrays.

    kind : "reshape", "transpose", "broadcast", "index" commute with elementwise functions; "sum", "scale", "window" and
        "matrix" do not.
    parameters : hashable. Target axes for reshape and broadcast; the permutation; slices; the summed axes; a `Box` with
        the factor at every position; for each axis a `Window` or None; an axis and a `Box` with a matrix (out, in).
    """

    kind: Literal["reshape", "transpose", "broadcast", "index", "sum", "scale", "window", "matrix"]
    parameters: tuple

    @property
    def commutes(self) -> bool:
        """Whether it can be taken before or after an elementwise function."""
        return self.kind in ("reshape", "transpose", "broadcast", "index")

    @property
    def local(self) -> bool:
        """Whether every output position depends on one input position, so that same-position moments suffice."""
        return self.kind not in ("sum", "matrix")

    def axes(self, axes: Axes) -> Axes:
        if self.kind in ("reshape", "broadcast"):
            return self.parameters
        if self.kind == "scale":
            return axes
        if self.kind == "transpose":
            return tuple(axes[p] for p in self.parameters)
        if self.kind == "sum":
            return tuple(a for i, a in enumerate(axes) if i not in self.parameters)
        if self.kind == "window":
            return tuple(
                a if w is None else a._replace(size=w.size) for a, w in zip(axes, self.parameters, strict=True)
            )
        if self.kind == "matrix":
            at, box = self.parameters
            return tuple(Axis(box.value.shape[0], False) if i == at else a for i, a in enumerate(axes))
        return tuple(
            a._replace(size=len(range(*slice(*s).indices(a.size)))) for a, s in zip(axes, self.parameters, strict=True)
        )

    def apply(self, array, source: Axes, offset: int = 0):
        """Apply to the axes `offset : offset + len(source)` of an array that has full extents there."""
        rank = len(source)
        head, tail = array.shape[:offset], array.shape[offset + rank :]
        if self.kind == "reshape":
            return array.reshape(head + extents(self.parameters) + tail)
        if self.kind == "broadcast":
            return xp_of(array).broadcast_to(array, head + extents(self.parameters) + tail)
        if self.kind == "transpose":
            middle = [offset + p for p in self.parameters]
            return array.transpose(*range(offset), *middle, *range(offset + rank, offset + rank + len(tail)))
        if self.kind == "sum":
            return array.sum(axis=tuple(offset + p for p in self.parameters))
        if self.kind == "scale":
            factor = self.parameters[0].value
            return array * factor.reshape((1,) * offset + np.shape(factor) + (1,) * len(tail))
        if self.kind == "matrix":
            at, box = self.parameters
            xp: Any = xp_of(array)
            return xp.moveaxis(xp.tensordot(box.value, array, axes=(1, offset + at)), 0, offset + at)
        if self.kind == "window":
            return self._windowed(array, offset)
        pick = tuple(
            slice(None) if axis.channel else slice(*s) for axis, s in zip(source, self.parameters, strict=True)
        )
        return array[(slice(None),) * offset + pick]

    def _windowed(self, array, offset: int):
        shape, into, out_of = list(array.shape), [slice(None)] * array.ndim, [slice(None)] * array.ndim
        for i, window in enumerate(self.parameters):
            if window is None:
                continue
            shape[offset + i] = window.size
            into[offset + i] = slice(window.first, window.first + window.count * window.step, window.step)
            out_of[offset + i] = slice(window.start, window.start + window.count * window.stride, window.stride)
        taken = array[tuple(out_of)]
        if is_traced(array):
            return jnp.zeros(tuple(shape), array.dtype).at[tuple(into)].set(taken)
        result = np.zeros(shape, array.dtype)
        result[tuple(into)] = taken
        return result
