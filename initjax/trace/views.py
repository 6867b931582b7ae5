"""Views of a weight leaf as strides into its entries, like NumPy's, so that every entry keeps its identity.

Reshapes, transposes, slices and broadcasts of a weight are followed without an index array; tied and stacked weights,
and W beside W^T, are then recognised by comparing strides.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class WeightView:
    """Entries `offset + sum_i strides[i] * index_i` of leaf number `leaf`, times `scale`.

    `tangent` marks the leaf's independent perturbation rather than the weight itself.
    """

    leaf: int
    tangent: bool
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: float = 1.0

    @classmethod
    def of(cls, leaf: int, tangent: bool, shape: tuple[int, ...]) -> "WeightView":
        return cls(leaf, tangent, 0, tuple(shape), _contiguous(shape))

    @property
    def single(self) -> bool:
        """Whether it shows one entry alone."""
        return all(n == 1 or s == 0 for n, s in zip(self.shape, self.strides, strict=True))

    def transposed(self, permutation) -> "WeightView":
        return self._with(tuple(self.shape[p] for p in permutation), tuple(self.strides[p] for p in permutation))

    def broadcast(self, shape: tuple[int, ...], dimensions: tuple[int, ...]) -> "WeightView":
        strides = [0] * len(shape)
        for axis, target in enumerate(dimensions):
            strides[target] = self.strides[axis] if self.shape[axis] == shape[target] else 0
        return self._with(tuple(shape), tuple(strides))

    def sliced(self, starts, limits, steps) -> "WeightView":
        offset = self.offset + sum(a * s for a, s in zip(starts, self.strides, strict=True))
        shape = tuple(-(-(b - a) // c) for a, b, c in zip(starts, limits, steps, strict=True))
        strides = tuple(s * c for s, c in zip(self.strides, steps, strict=True))
        return dataclasses.replace(self, offset=offset, shape=shape, strides=strides)

    def reversed(self, axes) -> "WeightView":
        offset, strides = self.offset, list(self.strides)
        for axis in axes:
            offset += strides[axis] * (self.shape[axis] - 1)
            strides[axis] = -strides[axis]
        return dataclasses.replace(self, offset=offset, strides=tuple(strides))

    def scaled(self, factor: float) -> "WeightView":
        return dataclasses.replace(self, scale=self.scale * factor)

    def reshaped(self, shape: tuple[int, ...]) -> "WeightView | None":
        """The view under a new shape, or None where that is not a strided view."""
        shape = tuple(shape)
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides, position = [], 0
        pending: tuple[int, int] = (1, 0)  # what is left of the axis being split: size, stride of its last axis
        for size in reversed(shape):
            if size == 1:
                strides.append(0)
                continue
            while pending[0] < size:
                if position == len(old):
                    return None
                n, s = old[len(old) - 1 - position]
                position += 1
                if pending[0] == 1:
                    pending = (n, s)
                elif s == pending[1] * pending[0]:
                    pending = (pending[0] * n, pending[1])
                else:
                    return None
            if pending[0] % size:
                return None
            strides.append(pending[1])
            pending = (pending[0] // size, pending[1] * size)
        return self._with(shape, tuple(reversed(strides)))

    def indices(self, axes) -> np.ndarray:
        """Entry numbers over the given axes, the other axes at index 0, as an array of `len(shape)` axes."""
        total = np.full((1,) * len(self.shape), self.offset, np.int64)
        for axis in axes:
            steps = np.arange(self.shape[axis], dtype=np.int64) * self.strides[axis]
            total = total + steps.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
        return total

    def pattern(self, axes) -> tuple[tuple[int, int], ...]:
        """(size, stride) of the given axes, in order, without axes of size 1 and with contiguous neighbours merged."""
        merged: list[tuple[int, int]] = []
        for size, stride in ((self.shape[a], self.strides[a]) for a in axes if self.shape[a] != 1):
            if merged and merged[-1][1] == stride * size:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        return tuple(merged)

    def overlaps(self, other: "WeightView") -> bool:
        """Whether the two views share an entry; exact up to a million entries, else by their ranges."""
        if self.leaf != other.leaf:
            return False
        if self.range()[0] > other.range()[1] or other.range()[0] > self.range()[1]:
            return False
        if math.prod(self.shape) + math.prod(other.shape) <= 1_000_000:
            mine, yours = (np.unique(v.indices(range(len(v.shape)))) for v in (self, other))
            return bool(np.intersect1d(mine, yours, assume_unique=True).size)
        return not self._apart_within_rows(other)

    def _apart_within_rows(self, other: "WeightView") -> bool:
        """Whether two large views use disjoint columns of rows that both step through with one stride."""
        step = max(abs(s) for s in self.strides + other.strides)
        columns = []
        for view in (self, other):
            inner = [a for a in range(len(view.shape)) if abs(view.strides[a]) != step]
            if math.prod(view.shape[a] for a in inner) > 1_000_000:
                return False
            columns.append(np.unique(view.indices(inner) % step))
        return not np.intersect1d(*columns, assume_unique=True).size

    def range(self) -> tuple[int, int]:
        steps = [s * (n - 1) for n, s in zip(self.shape, self.strides, strict=True)]
        return self.offset + sum(min(0, s) for s in steps), self.offset + sum(max(0, s) for s in steps)

    def _with(self, shape, strides) -> "WeightView":
        return dataclasses.replace(self, shape=shape, strides=strides)


def _contiguous(shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
