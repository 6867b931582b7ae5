"""Values of a program whose hidden layers are widened: every channel stands for several independent copies of itself.

`Known`   an array that the weights do not enter.
`Weight`  an array made of weight leaves alone, not yet drawn: a recipe that is applied to every copy of the leaves.
`Cloud`   a random array. With `copies`, its first axis runs over copies of its channels; without, it is one random
          array for each network (attention logits, a gate shared by all channels).

Every axis of the program is made of parts: channels ("c", entries i.i.d. given the layer before), positions ("p"),
channels that stand for themselves alone ("s", attention heads once their features are summed), broadcast axes ("b").
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = Any


class Part(NamedTuple):
    """A factor of one axis of the program."""

    size: int
    kind: str


Parts = tuple[tuple[Part, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """An array free of weights; `data`: whether it depends on the model's inputs."""

    array: Array
    data: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """`build(leaf)` makes one copy of the array from one copy of the leaves.

    labels : for every axis, the (leaf, axis) it runs along; empty where it is broadcast.
    plain : whether it is linear in leaves of mean zero.
    """

    shape: tuple[int, ...]
    leaves: frozenset[int]
    labels: tuple[frozenset, ...]
    build: Callable[[Callable[[int], Array]], Array]
    plain: bool = True

    def drawn(self, copies: dict[int, Array]) -> Array:
        """All copies of the array: two leading axes, over output and input copies."""
        one = lambda leaves: self.build(leaves.__getitem__)  # noqa: E731
        return jax.vmap(jax.vmap(one))({leaf: copies[leaf] for leaf in self.leaves})


@dataclasses.dataclass(frozen=True, eq=False)
class Cloud:
    """A random array.

    array : (copies, *shape) with `copies`, else of the program's shape.
    parts : what every axis is made of.
    carriers : leaves whose independent copies make the copies of this array.
    linear : uses of weights of which it is a linear combination, None where it is not one.
    layer : module whose pre-activation this is, up to shape and scale.
    """

    array: Array
    parts: Parts
    copies: bool
    carriers: frozenset[int] = frozenset()
    linear: frozenset | None = None
    layer: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:] if self.copies else self.array.shape)

    @property
    def wide(self) -> bool:
        """Whether some axis still runs over several channels of which there are copies."""
        return self.copies and any(channel(group) for group in self.parts)


def channel(group: tuple[Part, ...]) -> bool:
    """Whether an axis runs over several channels."""
    return any(part.kind == "c" and part.size > 1 for part in group)


def merged(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbours of one kind as one part; size 1 only where nothing else is left."""
    out: list[Part] = []
    for part in parts:
        if part.size == 1:
            continue
        if out and out[-1].kind == part.kind:
            out[-1] = Part(out[-1].size * part.size, part.kind)
        else:
            out.append(part)
    kinds = [part.kind for part in parts]
    return tuple(out) or (Part(1, "c" if "c" in kinds else kinds[0] if kinds else "p"),)


def regrouped(parts: Parts, shape: tuple[int, ...]) -> Parts | None:
    """The parts of the axes after a reshape; None where it cuts across parts of unequal size."""
    queue = [part for group in parts for part in group if part.size != 1]
    last_single = bool(parts) and parts[-1][-1].size == 1 and parts[-1][-1].kind == "c"
    groups = []
    for i, size in enumerate(shape):
        group: list[Part] = []
        product = 1
        while product < size:
            part, need = queue.pop(0), size // product
            if part.size > need:
                if size % product or part.size % need:
                    return None
                queue.insert(0, Part(part.size // need, part.kind))
                part = Part(need, part.kind)
            product *= part.size
            group.append(part)
        if product != size:
            return None
        groups.append(merged(group) if group else (Part(1, "c" if last_single and i == len(shape) - 1 else "p"),))
    return tuple(groups)


def refined(mine: tuple[Part, ...], yours: tuple[Part, ...]) -> list[tuple[Part, Part]]:
    """Two descriptions of one axis cut at common boundaries; all of it as one pair where that is impossible."""
    left, right, pairs = list(mine), list(yours), []
    while left and right:
        a, b = left.pop(), right.pop()
        size = min(a.size, b.size)
        if max(a.size, b.size) % size:
            total = math.prod(part.size for part in mine)
            kinds = [next((k for k in "csp" if any(p.kind == k for p in side)), "b") for side in (mine, yours)]
            return [(Part(total, kinds[0]), Part(total, kinds[1]))]
        if a.size > size:
            left.append(Part(a.size // size, a.kind))
        if b.size > size:
            right.append(Part(b.size // size, b.kind))
        pairs.append((Part(size, a.kind), Part(size, b.kind)))
    return pairs[::-1]


def structural(parts: Parts) -> Parts:
    """Parts of a value that has lost its copies: the channels that are left stand for themselves."""
    return tuple(merged([Part(p.size, "s" if p.kind == "c" and p.size > 1 else p.kind) for p in g]) for g in parts)


def positions(shape: tuple[int, ...], kind: str = "p") -> Parts:
    return tuple((Part(n, kind),) for n in shape)
