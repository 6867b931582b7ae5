"""Some channels of a field: followed back to the columns of the weights that make them."""

from typing import Any

from initjax.trace.domain import Atom, Base, Ew, Lin, Noise, Product, Tangent
from initjax.trace.maps import Axes, Axis, Relayout
from initjax.trace.walk import Walk, contraction_pattern

Cut = tuple[int, int, int]


def channels_of(walk: Walk, body, axis: int, cut: Cut) -> Any:
    """The body with channels `start:stop:step` of one axis; None where they cannot be followed to weights."""
    if isinstance(body, Tangent):
        parts = []
        for c, g in body.parts:
            coefficient = None if c is None else channels_of(walk, c, axis, cut)
            dot = channels_of(walk, g, axis, cut)
            if dot is None or (c is not None and coefficient is None):
                return None
            parts.append((coefficient, dot))
        return Tangent(_axes(body.axes, axis, cut), tuple(parts))
    terms = [(_atom(walk, atom, axis, cut), c) for atom, c in body.terms]
    if any(atom is None for atom, _ in terms):
        return None
    return walk.arena.sum(_axes(body.axes, axis, cut), terms, body.constant)


def _axes(axes: Axes, axis: int, cut: Cut) -> Axes:
    return tuple(Axis(len(range(*cut)), a.channel) if i == axis else a for i, a in enumerate(axes))


def _atom(walk: Walk, atom: Atom, axis: int, cut: Cut) -> Atom | None:
    arena, axes = walk.arena, _axes(atom.axes, axis, cut)
    if isinstance(atom, Base):
        return _base(walk, atom, axis, axes, cut)
    if isinstance(atom, Ew):
        leaf = channels_of(walk, atom.leaf, axis, cut)
        return None if leaf is None else arena.atom(Ew, (id(leaf), id(atom.expr)), axes, leaf, atom.expr)
    if isinstance(atom, Product):
        left, right = (channels_of(walk, side, axis, cut) for side in (atom.left, atom.right))
        if left is None or right is None:
            return None
        made = arena.atom(Product, (id(left), id(right)), axes, left, right)
        walk.doubts.setdefault(made.number, walk.doubts[atom.number])
        return made
    if isinstance(atom, Noise):  # some of its entries: draws of the same kind, apart from those of any other cut
        key = atom.key if (cut[0], cut[2]) == (0, 1) else (*atom.key, axis, cut[0], cut[2])
        fields = (key, atom.mean, atom.second, atom.values)
        return arena.atom(Noise, (id(atom), axis, cut), axes, *fields)
    assert isinstance(atom, Lin)
    found = _before(atom, axis)
    if found is None:
        return None
    source = channels_of(walk, atom.source, found, cut)
    if source is None:
        return None
    step = Relayout(atom.map.kind, axes) if atom.map.kind in ("reshape", "broadcast") else atom.map
    return arena.atom(Lin, (id(source), step), axes, step, source, atom.gaussian, atom.tangent)


def _before(atom: Lin, axis: int) -> int | None:
    """Where a channel axis stood before a map."""
    kind, parameters = atom.map.kind, atom.map.parameters
    if kind == "transpose":
        return parameters[axis]
    if kind == "sum":
        return [i for i in range(len(atom.source.axes)) if i not in parameters][axis]
    if kind != "reshape":
        return axis
    ours = [i for i, a in enumerate(atom.axes) if a.channel]
    theirs = [i for i, a in enumerate(atom.source.axes) if a.channel]
    if [atom.axes[i].size for i in ours] != [atom.source.axes[i].size for i in theirs]:
        return None  # channels were split or merged
    return theirs[ours.index(axis)]


def _base(walk: Walk, base: Base, axis: int, axes: Axes, cut: Cut) -> Base | None:
    view = base.view
    if base.kind == "dot":
        contracted = len(base.contracted)
        free = [i for i, a in enumerate(base.axes) if a.channel]
        at = contracted + free.index(axis)
    else:
        at, contracted = axis, 0
    start, stop, step = cut
    starts = [start if i == at else 0 for i in range(len(view.shape))]
    limits = [stop if i == at else n for i, n in enumerate(view.shape)]
    if view.shape[at] != base.axes[axis].size:
        return None
    new = view.sliced(starts, limits, [step if i == at else 1 for i in range(len(view.shape))])
    if base.kind == "dot":
        walk.use("contracted", new, contraction_pattern(base.operand.axes, base.contracted, new), base.layer)
        key = ("dot", id(base.operand), new, base.contracted, axes)
    else:
        key = ("vector", new, axes)
    fields = (base.kind, new, base.operand, base.contracted, base.layer, base.gaussian, base.tangent)
    return walk.arena.atom(Base, key, axes, *fields)
