"""A walked program for some of its examples: the same atoms, on a block of rows.

Which axis of every atom runs over the examples follows from the output, whose first axis does, by going back through
the program. Where that axis is merged with another, indexed or summed over, there are no blocks, and the whole batch is
worked on at once. On the way, the taps of a convolution, which the walk keeps as separate Gaussians, are joined again.
"""

import dataclasses
from typing import Any

import numpy as np

from initjax.trace.domain import Atom, Base, Ew, Lin, Noise, Product, Sum, Tangent, Taps, Windows, is_zero
from initjax.trace.graph import carries, parts_of, reachable, sources
from initjax.trace.maps import Axes, Box, Relayout, Window


def example_axes(outputs: list, others: list) -> dict[int, int] | None:
    """id of every body and atom -> its axis of examples, or None where that is not to be had.

    outputs : bodies whose first axis runs over examples. others : bodies behind these.
    """
    at: dict[int, int] = {}

    def assign(body, axis: int) -> bool:
        return all(at.setdefault(id(thing), axis) == axis for thing in parts_of(body))

    def back(bodies: list) -> bool:
        for atom in reversed(reachable(bodies)):
            axis = at[id(atom)]
            if atom.axes[axis].channel and atom.axes[axis].size > 1:
                return False
            before = _axis_before(atom, axis)
            if before is None or not all(assign(body, before) for body in sources(atom)):
                return False
        return True

    if not all(body.axes and assign(body, 0) for body in outputs) or not back(outputs):
        return None
    for body in others:
        things = parts_of(body)
        known = [at[id(thing)] for thing in things if id(thing) in at]
        if not known or not assign(body, known[0]) or len(known) < len(things) and not back([body]):
            return None
    return at


def _axis_before(atom: Atom, axis: int) -> int | None:
    """The axis of the examples in what an atom is made of."""
    if isinstance(atom, (Ew, Noise, Product)):
        return axis
    if isinstance(atom, Base):
        if atom.kind == "vector":
            size, stride = atom.view.shape[axis], atom.view.strides[axis]
            return 0 if size == 1 or stride == 0 else None
        kept = atom.order
        offset = (
            0 if atom.axes[: len(kept)] == tuple(atom.operand.axes[i] for i in kept) else len(atom.axes) - len(kept)
        )
        return kept[axis - offset] if 0 <= axis - offset < len(kept) else None
    if not isinstance(atom, Lin):
        return None
    step, old, new = atom.map, atom.source.axes, atom.axes
    if step.kind == "transpose":
        return step.parameters[axis]
    if step.kind == "sum":
        return [i for i in range(len(old)) if i not in step.parameters][axis]
    if step.kind == "index":
        return axis if step.parameters[axis] == (None, None, None) else None
    if step.kind == "window":
        return axis if step.parameters[axis] is None else None
    if step.kind == "matrix":
        return axis if step.parameters[0] != axis else None
    if step.kind == "reshape":
        sizes = [a.size for a in new[:axis] if a.size > 1]
        for i, a in enumerate(old):
            if a.size == new[axis].size and not (a.channel and a.size > 1):
                if np.prod([b.size for b in old[:i]]) == np.prod(sizes, dtype=int):
                    return i
        return None
    return axis


class Block:
    """Translates the bodies of a walk to the examples start .. stop.

    at : from `example_axes`; None: bodies stay on the whole batch. inputs : whether perturbations of the input are
    kept; they have a part in the layers' chi alone.
    """

    def __init__(self, at: dict[int, int] | None, start: int = 0, stop: int = 0, inputs: bool = True):
        self._at, self._rows, self._inputs = at or {}, slice(start, stop), inputs
        self._lost: dict[int, bool] = {}
        self._made: dict[Any, tuple] = {}
        self._number = 0

    def bodies(self, old: list) -> list:
        for atom in reachable(old):  # oldest first, so that nothing below recurses far
            if not self._is_lost(atom):
                self._atom(atom)
        return [self._body(body) for body in old]

    # ------------------------------------------------------------------ arrays and axes

    def _axes(self, axes: Axes, axis: int | None) -> Axes:
        if axis is None:
            return axes
        size = min(axes[axis].size, self._rows.stop - self._rows.start)
        return (*axes[:axis], axes[axis]._replace(size=size, example=True), *axes[axis + 1 :])

    def _array(self, value, axis: int | None):
        if axis is None or isinstance(value, float) or np.shape(value)[axis] == 1:
            return value
        return self._once(value, lambda: value[(slice(None),) * axis + (self._rows,)])

    def _box(self, box: Box, axis: int | None) -> Box:
        return self._once(box, lambda: Box(self._array(box.value, axis)))

    def _once(self, old, make):
        if id(old) not in self._made:
            self._made[id(old)] = (make(), old)
        return self._made[id(old)][0]

    # ------------------------------------------------------------------ bodies and atoms

    def _body(self, body) -> Any:
        if body is None:
            return None
        return self._once(body, lambda: self._tangent(body) if isinstance(body, Tangent) else self._sum(body))

    def _tangent(self, body: Tangent) -> Tangent:
        parts = tuple((self._body(c), self._body(g)) for c, g in body.parts if not self._is_lost(g))
        return Tangent(self._axes(body.axes, self._at.get(id(body))), parts)

    def _sum(self, body: Sum) -> Sum:
        axis = self._at.get(id(body))
        terms = [(self._atom(atom), self._array(c, axis)) for atom, c in body.terms if not self._is_lost(atom)]
        axes = self._axes(body.axes, axis)
        return Sum(axes, tuple(self._joined(terms)), self._array(body.constant, axis))

    def _is_lost(self, thing) -> bool:
        """Whether a tangent is made of perturbations of the input alone, and these are left out."""
        if self._inputs or isinstance(thing, Atom) and not thing.tangent:
            return False
        if id(thing) not in self._lost:
            if isinstance(thing, Tangent):
                lost = all(self._is_lost(g) for _, g in thing.parts)
            elif isinstance(thing, Sum):
                lost = bool(thing.terms) and all(self._is_lost(atom) for atom, _ in thing.terms)
            elif isinstance(thing, Base) and thing.view.tangent:
                lost = thing.view.leaf < 0
            else:
                lost = all(self._is_lost(body) for body in sources(thing))
            self._lost[id(thing)] = lost
        return self._lost[id(thing)]

    def _atom(self, atom: Atom) -> Any:
        return self._once(atom, lambda: self._translated(atom))

    def _translated(self, atom: Atom) -> Atom:
        axis = self._at.get(id(atom))
        new: dict[str, Any] = dict(axes=self._axes(atom.axes, axis))
        if isinstance(atom, Ew):
            new["leaf"] = self._body(atom.leaf)
        elif isinstance(atom, Product):
            new |= dict(left=self._body(atom.left), right=self._body(atom.right))
        elif isinstance(atom, Base):
            new["operand"] = self._body(atom.operand)
            if atom.kind == "vector" and axis is not None:
                shape = list(atom.view.shape)
                shape[axis] = min(shape[axis], new["axes"][axis].size)
                new["view"] = dataclasses.replace(atom.view, shape=tuple(shape))
        elif isinstance(atom, Lin):
            step = atom.map
            if step.kind in ("reshape", "broadcast"):
                step = Relayout(step.kind, new["axes"])
            elif step.kind == "scale":
                step = Relayout("scale", (self._box(step.parameters[0], axis),))
            new |= dict(map=step, source=self._body(atom.source))
        return dataclasses.replace(atom, number=self._next(), **new)  # type: ignore[type-var]

    def _next(self) -> int:
        """Numbers grow from sources to what is made of them."""
        self._number += 1
        return self._number

    # ------------------------------------------------------------------ atoms that belong together

    def _joined(self, terms: list) -> list:
        """Terms with equal relayouts of several atoms as one relayout of their sum, and taps as one convolution."""
        return self._with_taps(self._with_one_map(terms))

    def _with_one_map(self, terms: list) -> list:
        """The walk moves a reshape into every term of a sum; here it is one map again."""
        groups: dict[Any, list] = {}
        for atom, c in terms:
            if isinstance(atom, Lin) and atom.map.commutes and isinstance(atom.source, Sum) and isinstance(c, float):
                if is_zero(atom.source.constant) and all(isinstance(k, float) for _, k in atom.source.terms):
                    kind = atom.tangent and carries(atom)  # statistics of the batch stay apart from other tangents
                    groups.setdefault((atom.map, atom.source.axes, atom.axes, atom.tangent, kind), []).append((atom, c))
        out, done = [], set()
        for (step, inner, axes, tangent, _), members in groups.items():
            if len(members) < 2:
                continue
            key = ("lin", *((id(atom), c) for atom, c in members))
            if key not in self._made:
                parts = [(a, k * c) for atom, c in members for a, k in atom.source.terms]
                source = Sum(inner, tuple(self._joined(parts)))
                gaussian = all(atom.gaussian for atom, _ in members)
                self._made[key] = (Lin(self._next(), axes, step, source, gaussian, tangent), members)
            out.append((self._made[key][0], 1.0))
            done |= {id(atom) for atom, _ in members}
        return [(atom, c) for atom, c in terms if id(atom) not in done] + out

    def _with_taps(self, terms: list) -> list:
        groups: dict[tuple, list] = {}
        for atom, c in terms:
            if isinstance(atom, Base) and atom.kind == "dot" and isinstance(c, float):
                view = atom.view
                key = (view.leaf, view.tangent, view.shape, view.strides, atom.contracted, atom.axes, c)
                groups.setdefault(key, []).append((atom, c))
        out, done = [], set()
        for members in groups.values():
            found = _windows([atom for atom, _ in members]) if len(members) > 1 else None
            if found is None:
                continue
            bases = tuple(atom for atom, _ in members)
            key = ("taps", *map(id, bases))
            if key not in self._made:
                self._made[key] = (Taps(self._next(), bases[0].axes, bases, *found, tangent=bases[0].tangent), bases)
            out.append((self._made[key][0], members[0][1]))
            done |= {id(atom) for atom in bases}
        return [(atom, c) for atom, c in terms if id(atom) not in done] + out


def _windows(bases: list[Base]) -> tuple[Any, tuple, Windows] | None:
    """The common source of the taps and their windows, where these are all combinations of windows along the axes."""
    if len({b.view.offset for b in bases}) < len(bases):  # weights used twice: their Gaussians are correlated
        return None
    if all(isinstance(b.operand, Sum) and b.operand.is_constant for b in bases):
        return None, (), ()
    sources: dict[tuple, Any] = {}
    steps = []
    for base in bases:
        key, source, step = _source(base.operand)
        sources.setdefault(key, source)
        steps.append(step)
    shifted = next((s for s in steps if s is not None), None)
    if len(sources) > 1 or shifted is None:
        return None
    source = next(iter(sources.values()))
    convolved = [i for i, w in enumerate(shifted) if w is not None]
    still = tuple(Window(source.axes[i].size, 0, 1, 0, 1, source.axes[i].size) for i in convolved)
    rows = tuple(still if s is None else tuple(s[i] for i in convolved) for s in steps)
    lists = [tuple(sorted({row[j] for row in rows})) for j in range(len(convolved))]
    if len(set(rows)) < len(rows) or np.prod([len(ws) for ws in lists]) != len(rows):
        return None
    return source, rows, tuple(zip(convolved, lists, strict=True))


def _source(body) -> tuple[tuple, Any, tuple | None]:
    """What a body is a window of: its identity, itself, and the window along each axis (None: unmoved)."""
    if isinstance(body, Sum):
        lin = body.terms[0][0] if len(body.terms) == 1 and body.terms[0][1] == 1.0 and is_zero(body.constant) else None
        if isinstance(lin, Lin) and lin.map.kind == "window" and isinstance(lin.source, Sum):
            return (id(lin.source),), lin.source, lin.map.parameters
        return (id(body),), body, None
    if len(body.parts) == 1 and body.parts[0][0] is None:
        g = body.parts[0][1]
        lin = g.terms[0][0] if len(g.terms) == 1 and g.terms[0][1] == 1.0 else None
        if isinstance(lin, Lin) and lin.map.kind == "window":
            return (id(lin.source),), lin.source, lin.map.parameters
        return (id(g),), g, None
    return (id(body),), body, None
