"""Operands of an elementwise step on common axes; and what is known arrays alone is evaluated as it stands."""

import math
from typing import Any

import numpy as np

from initjax.trace.domain import Const, Field, Sum
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axis, Relayout, xp_of
from initjax.trace.noise import Random, as_noise
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, const, near_of

MEASURE = "measure this model at finite width with ij.empirical_ntk; or rewrite this step"
_KEEPS_UNIFORM = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "rev", "copy", "stop_gradient"}


def const_rule(walk: Walk, operands: list[Const]) -> list[Const]:
    """Evaluate an equation of known arrays; what is uniform stays one number."""
    equation = walk.equation
    assert equation is not None
    shapes = [tuple(walk.program.body.avals[n].shape) for n in equation.outputs]
    leaf = operands[0].leaf if len(operands) == 1 else ""
    if equation.name in ("mul", "div") and is_traced(*(v.value for v in operands)):
        above = operands if equation.name == "mul" else operands[:1]
        if any(v.scalar == 0 for v in above):  # a structural zero stays one, which a tracer would not
            return [zeros(walk)]
    if equation.name in _KEEPS_UNIFORM and operands[0].scalar is not None:
        return [Const(np.asarray(operands[0].value).reshape(-1)[:1].reshape((1,) * len(shapes[0])), shapes[0], leaf)]
    if len(shapes) == 1 and walk.is_pointwise():
        ranks = len(shapes[0])
        values = [v.value.reshape((1,) * (ranks - np.ndim(v.value)) + np.shape(v.value)) for v in operands]
        common = np.broadcast_shapes(*(np.shape(v) for v in values))
        xp = xp_of(*values)
        out = walk.bind([xp.broadcast_to(v, common) for v in values])[0]
        return [Const(out, shapes[0], leaf)]
    xp = xp_of(*(v.value for v in operands))
    values = [v.value if np.shape(v.value) == v.shape else xp.broadcast_to(v.value, v.shape) for v in operands]
    return [const(out, shape, leaf) for out, shape in zip(walk.bind(values), shapes, strict=True)]


def zeros(walk: Walk) -> Const:
    """Known zeros of the shape of the current equation's result."""
    assert walk.equation is not None
    aval = walk.program.body.avals[walk.equation.outputs[0]]
    return Const(np.zeros((1,) * len(aval.shape)), tuple(aval.shape))


def aligned(walk: Walk, operands: list) -> tuple[list[Any], Field]:
    """Operands of an elementwise equation as bodies on common axes (scalars stay Const), and a field as the pattern."""
    assert walk.equation is not None
    shape = tuple(walk.program.body.avals[walk.equation.outputs[0]].shape)
    operands = _with_noise(walk, operands)
    fields = [v for v in operands if isinstance(v, Field)]
    # the widest field sets the axes: the one that needs no broadcasting along channels
    like = max(fields, key=lambda f: (math.prod(f.shape), sum(a.channel for a in f.body.axes)))
    if like.shape != shape:
        partner = next((v for v in operands if isinstance(v, (Const, WeightView)) and v.shape == shape), None)
        like = broadcast(walk, like, shape, "another operand" if partner is None else type(partner).__name__)
    fields = [match(walk, f, like) for f in fields]
    like = next((f for f in fields if f.body.axes == fields[0].body.axes), like)
    bodies, it = [], iter(fields)
    for value in operands:
        if isinstance(value, Field):
            bodies.append(next(it).body)
        elif isinstance(value, WeightView):
            bodies.append(match(walk, walk.as_field(value, like), like).body)
        elif value.scalar is not None:
            bodies.append(value)
        else:
            bodies.append(walk.arena.sum(like.body.axes, (), const_along(walk, value, like)))
    near = near_of(fields)
    return bodies, Field(like.body, like.groups, near)


def _with_noise(walk: Walk, operands: list) -> list:
    """Operands with draws as fields along the axes of their neighbour, or as the array that their key gave."""
    if not any(isinstance(v, Random) for v in operands):
        return operands
    like = next((v for v in operands if isinstance(v, Field)), None)
    found = []
    for value in operands:
        if isinstance(value, Random):
            noise = None if like is None or like.shape != value.shape else as_noise(walk, value, like)
            if noise is None:
                walk.note("draw", "a draw shared by channels or examples (stochastic depth) is taken as rngs give it")
            value = value.known if noise is None else noise
        found.append(value)
    return found


def match(walk: Walk, field: Field, like: Field) -> Field:
    """A field on the axes of `like`, broadcast over positions where it has size 1."""
    if field.body.axes == like.body.axes:
        return field
    if field.shape != like.shape:
        field = broadcast(walk, field, like.shape, like.near or "another field", like)
    mine, yours = field.body.axes, like.body.axes
    if mine == yours:
        return field
    if [a.size for a in mine] == [a.size for a in yours]:
        clash = [(a, b) for a, b in zip(mine, yours, strict=True) if a.channel != b.channel and a.size > 1]
        if not clash:  # axes of size 1 are channel or position alike
            return Field(walk.arena.relayout(field.body, Relayout("reshape", yours)), like.groups, field.near)
        if all(b.channel for _, b in clash):
            body = walk.arena.rechannelled(field.body, yours)  # a weight that met known arrays before it met the field
            if body is not None:
                return Field(body, like.groups, field.near)
    raise walk.refuse(
        field.near or like.near,
        "one operand is independent from channel to channel where the other varies over positions, so their "
        "combination is neither",
        MEASURE,
        what=f"{name_of(walk)} of a field over channels and one over positions",
    )


def broadcast(walk: Walk, field: Field, shape: tuple[int, ...], partner: str, like: Field | None = None) -> Field:
    """A field with its axes of size 1 stretched to `shape`; random numbers are not repeated over channels."""
    axes, at, target = field.body.axes, 0, []
    for i, (size, count) in enumerate(zip(field.shape, field.groups, strict=True)):
        if size == shape[i]:
            target += axes[at : at + count]
        else:
            wide = like is not None and like.groups[i] == 1 and like.body.axes[sum(like.groups[:i])].channel
            random = isinstance(field.body, Sum) and not field.body.is_constant
            if random and (wide or any(a.channel for a in axes[at : at + count])) or count != 1:
                raise walk.refuse(
                    field.near,
                    "one random number is repeated over all channels, so channels are no longer independent",
                    MEASURE,
                    what=f"{name_of(walk)} that repeats a channel of size 1 over the {shape[i]} channels of {partner}",
                )
            target.append(Axis(shape[i], wide))
        at += count
    body = walk.arena.relayout(field.body, Relayout("broadcast", tuple(target)))
    return Field(body, field.groups, field.near)


def const_along(walk: Walk, value: Const, like: Field):
    """A known array on the axes of a field: it may vary over positions, not over channels."""
    array = value.value
    full: list[int] = []
    for i, count in enumerate(like.groups):
        sizes = [a.size for a in like.body.axes[len(full) : len(full) + count]]
        if np.shape(array)[i] == 1:
            full += [1] * count
        elif math.prod(sizes) == np.shape(array)[i]:
            full += sizes
        else:
            raise walk.refuse(like.near, "shapes cannot be aligned", MEASURE)
    array = array.reshape(tuple(full))
    for axis, a in enumerate(like.body.axes):
        if not a.channel or array.shape[axis] == 1:
            continue
        first = array[(slice(None),) * axis + (slice(0, 1),)]
        if is_traced(array) or not bool((array == first).all()):
            raise walk.refuse(
                like.near,
                "a known array that varies along channels (raw inputs, a position code, a dropout mask, trained "
                "values) makes channels differently distributed",
                "put a Dense layer between the input and this step; use zeros or ones as initial value; pass "
                "apply_kwargs that switch dropout off",
                what=f"{name_of(walk)} with a known array along channels",
            )
        array = first
    return array


def name_of(walk: Walk) -> str:
    """The primitive of the current equation."""
    return walk.equation.name if walk.equation is not None else ""
