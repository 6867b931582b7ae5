"""What primitives do to the values of a widened program: entry by entry, along positions, over channels."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from initjax.infinite.copies import (
    Cloud,
    Known,
    Part,
    Weight,
    channel,
    merged,
    positions,
    refined,
    regrouped,
    structural,
)
from initjax.infinite.wide import Wide, bind, near_of
from initjax.trace.flax import layer_of
from initjax.trace.inline import Equation
from initjax.trace.pointwise import is_pointwise

_SHAPES = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "slice", "rev"}
_LINEAR = {"neg", "convert_element_type", "copy", "copy_p", "reduce_precision"}
FEW = 4  # a sum over this many channels beside many more is a finite sum, not a law of large numbers


def rule_for(wide: Wide, eqn) -> Any:
    """The rule of an equation."""
    name = eqn.primitive.name
    if name in RULES:
        return RULES[name]
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    inner = Equation(eqn.primitive, eqn.params, tuple(range(len(shapes))), tuple(range(len(eqn.outvars))), "")
    if name in _LINEAR or len(eqn.outvars) == 1 and is_pointwise(inner, shapes, tuple(eqn.outvars[0].aval.shape)):
        return elementwise
    return _unknown


def _unknown(wide: Wide, operands):
    reasons = {
        "while": "the number of turns of a data-dependent loop is not known when the model is traced",
        "cond": "which branch is taken depends on data",
    }
    reason = reasons.get(wide.eqn.primitive.name, "it is not known what it does to channels")
    raise wide.refuse(reason, near=near_of(operands))


# ------------------------------------------------------------------ entry by entry


def elementwise(wide: Wide, operands):
    """A pointwise primitive, on every copy."""
    eqn = wide.eqn
    name, shape = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)
    if not any(isinstance(v, Cloud) for v in operands):
        made = _of_weights(wide, operands, shape)
        if made is not None:
            return [made]
    operands = _clouds(wide, operands, shape)
    clouds = [v for v in operands if isinstance(v, Cloud)]
    parts, carriers = _combined(wide, clouds, shape)
    array, copies = wide.each(bind(eqn), operands)
    layer = next((v.layer for v in clouds if v.layer), "")
    result = Cloud(array, parts, copies, carriers, _linear(wide, name, operands), layer)
    if name in ("add", "sub") and len(clouds) == 2:
        result = _biased(wide, result, clouds)
    elif len(clouds) > 1 or not (name in _LINEAR or name in ("mul", "div")):
        result = dataclasses.replace(result, layer=result.layer if result.linear else "")
    return [result]


def whole(wide: Wide, operands, body) -> list | None:
    """A call with a derivative of its own, kept as it is if all it does is entry by entry; None otherwise."""
    eqn = wide.eqn
    shape = tuple(eqn.outvars[0].aval.shape)
    if len(eqn.outvars) != 1 or not _only_pointwise(body[0], shape) or not any(isinstance(v, Cloud) for v in operands):
        return None
    operands = _clouds(wide, operands, shape)
    parts, carriers = _combined(wide, [v for v in operands if isinstance(v, Cloud)], shape)
    array, copies = wide.each(lambda *xs: bind(eqn)(*xs)[0], operands)
    return [Cloud(array, parts, copies, carriers)]


def _only_pointwise(jaxpr, shape) -> bool:
    from initjax.trace.inline import call_body

    if any(tuple(v.aval.shape) not in ((), shape) for v in jaxpr.invars):
        return False
    for eqn in jaxpr.eqns:
        body = call_body(eqn)
        if body is not None:
            if not _only_pointwise(body[0], shape):
                return False
            continue
        shapes = [tuple(v.aval.shape) for v in eqn.invars]
        inner = Equation(eqn.primitive, eqn.params, tuple(range(len(shapes))), tuple(range(len(eqn.outvars))), "")
        if eqn.primitive.name == "broadcast_in_dim" and shapes[0] == ():
            continue
        if len(eqn.outvars) != 1 or not is_pointwise(inner, shapes, tuple(eqn.outvars[0].aval.shape)):
            return False
    return True


def _of_weights(wide: Wide, operands, shape) -> Weight | None:
    """Weights and fixed arrays alone: still a recipe."""
    if any(isinstance(v, Known) and v.data for v in operands):
        return None
    weights = [v for v in operands if isinstance(v, Weight)]
    labels = []
    for axis, size in enumerate(shape):
        own = [w.labels[axis] for w in weights if len(w.shape) == len(shape) and w.shape[axis] == size]
        labels.append(frozenset().union(*own))
    known = {i: v.array for i, v in enumerate(operands) if isinstance(v, Known)}
    function = bind(wide.eqn)

    def build(get):
        return function(*[known[i] if i in known else v.build(get) for i, v in enumerate(operands)])

    made = Weight(shape, frozenset().union(*(w.leaves for w in weights)), tuple(labels), build)
    if wide.eqn.primitive.name not in _LINEAR | {"mul", "div", "add", "sub"}:
        return dataclasses.replace(made, plain=False)
    if wide.eqn.primitive.name == "mul" and len(weights) > 1 or not all(w.plain for w in weights):
        return dataclasses.replace(made, plain=False)
    if wide.eqn.primitive.name in ("add", "sub") and len(weights) == 1:
        return dataclasses.replace(made, plain=False)
    return made


def _clouds(wide: Wide, operands, shape) -> list:
    """Operands with every weight drawn beside the field that it meets."""
    clouds = [v for v in operands if isinstance(v, Cloud)]
    like = max(clouds, key=lambda v: (v.wide, v.copies, math.prod(v.shape)), default=None)
    if like is not None and like.shape != shape:
        like = dataclasses.replace(like, parts=_stretched(like, shape))
    return [wide.as_cloud(v, like) if isinstance(v, Weight) else v for v in operands]


def _stretched(v: Cloud, shape):
    """Parts of an operand that is broadcast to `shape`."""
    if len(v.shape) != len(shape):
        return positions(shape, "b")
    return tuple(g if n == m else (Part(m, "b"),) for g, n, m in zip(v.parts, v.shape, shape, strict=True))


def _combined(wide: Wide, clouds: list[Cloud], shape):
    """Parts and carriers of an elementwise result; channels must stand beside channels."""
    copied = [v for v in clouds if v.copies]
    wides = [v for v in copied if v.wide]
    for v in copied:
        if wides and not v.wide:
            wide.make_finite(v.carriers, "one random number for all channels stands beside a value for each channel")
    groups = []
    described = [_stretched(v, shape) for v in clouds]
    for axis in range(len(shape)):
        current, owner = list(described[0][axis]), clouds[0]
        for v, own in zip(clouds[1:], described[1:], strict=True):
            pairs, out = refined(tuple(current), own[axis]), []
            for a, b in pairs:
                out.append(Part(a.size, _kind(wide, a, b, owner, v)))
            current, owner = list(merged(out)), v if v.wide or not owner.copies else owner
        groups.append(merged(current))
    _no_outer(wide, wides, groups)
    if not copied:
        groups = list(structural(tuple(groups)))
    return tuple(groups), frozenset().union(*(v.carriers for v in copied)) if copied else frozenset()


def _channel_axes(v: Cloud) -> list[int]:
    return [i for i, group in enumerate(v.parts) if channel(group)]


def _kind(wide: Wide, a: Part, b: Part, x: Cloud, y: Cloud) -> str:
    """Which kind an axis has where two arrays meet."""
    if a.kind == b.kind or a.size == 1:
        return a.kind if a.kind != "b" else b.kind
    kinds = {a.kind, b.kind}
    if "b" in kinds:
        return (kinds - {"b"}).pop()
    if "c" not in kinds:
        return "s"
    own, other = (x, y) if a.kind == "c" else (y, x)
    if not other.copies:  # an array without copies along the channels of one with copies, as heads beside features
        if "s" in kinds and len(_channel_axes(own)) == 1 and other.carriers != own.carriers:
            wide.make_finite(own.carriers, "channels of which there are copies stand beside a finite structure")
        return "c"
    wide.make_finite(own.carriers, "channels of one field stand beside positions of another")
    return "c"


def _no_outer(wide: Wide, wides: list[Cloud], groups) -> None:
    axes = [set(_channel_axes(v)) for v in wides]
    for mine in axes:
        for yours in axes:
            if mine - yours and yours - mine:
                raise wide.refuse("every channel of one field meets every channel of another (an outer product)")


def all_linear(operands) -> frozenset | None:
    """Uses of weights of which a sum or a joining of the operands is a linear combination."""
    uses: frozenset = frozenset()
    for v in operands:
        if not isinstance(v, Cloud) or v.linear is None:
            return None
        uses |= v.linear
    return uses


def _linear(wide: Wide, name: str, operands) -> frozenset | None:
    clouds = [v for v in operands if isinstance(v, Cloud)]
    if any(v.linear is None for v in clouds):
        return None
    if name in ("add", "sub"):
        return all_linear(operands)
    if name in _LINEAR or name == "mul" and len(clouds) == 1 or name == "div" and isinstance(operands[1], Known):
        return clouds[0].linear
    return None


def _biased(wide: Wide, result: Cloud, clouds: list[Cloud]) -> Cloud:
    """A bias of the same module completes the pre-activation."""
    for value, bias in (clouds, clouds[::-1]):
        own = {layer_of(wide.leaves[leaf].name) for leaf in bias.carriers | {u[0] for u in bias.linear or ()}}
        if value.layer and not bias.layer and own == {value.layer}:
            return wide.record(value.layer, result)
    return dataclasses.replace(result, layer="")


# ------------------------------------------------------------------ shapes and positions


def _shape(wide: Wide, operands):
    eqn, value = wide.eqn, operands[0]
    name, params, shape = eqn.primitive.name, eqn.params, tuple(eqn.outvars[0].aval.shape)
    if len(operands) > 1:
        raise wide.refuse("shapes or indices that depend on data", near=near_of(operands))
    function = bind(eqn)
    if isinstance(value, Weight):
        labels = _moved_labels(name, params, value, shape)
        return [dataclasses.replace(value, shape=shape, labels=labels, build=lambda get: function(value.build(get)))]
    parts = _moved_parts(name, params, value.parts, shape)
    if parts is None:
        raise wide.refuse("a reshape cuts across axes of unequal length", near=value.layer)
    array, copies = wide.each(function, [value])
    return [dataclasses.replace(value, array=array, parts=parts, copies=copies)]


def _moved_labels(name: str, params, value: Weight, shape) -> tuple[frozenset, ...]:
    none: frozenset = frozenset()
    if name == "transpose":
        return tuple(value.labels[p] for p in params["permutation"])
    if name == "broadcast_in_dim":
        labels = [none] * len(shape)
        for axis, target in enumerate(params["broadcast_dimensions"]):
            labels[target] = value.labels[axis] if value.shape[axis] == shape[target] else none
        return tuple(labels)
    if name in ("slice", "rev"):
        return value.labels
    # reshapes: axes of the old shape spread over, or collected by, those of the new one
    old = [(n, own) for n, own in zip(value.shape, value.labels, strict=True) if n != 1]
    out: list[frozenset] = []
    left, own = 1, none
    for size in shape:
        found, product = none, 1
        while product < size and (old or left > 1):
            if left == 1:
                left, own = old.pop(0)
            take = min(left, size // product)
            product, found, left = product * take, found | own, left // take
        out.append(found)
    if not any(out) and math.prod(shape) == 1 and shape:
        out[-1] = frozenset().union(*value.labels)
    return tuple(out)


def _moved_parts(name: str, params, parts, shape):
    if name in ("reshape", "squeeze", "expand_dims"):
        return regrouped(parts, shape)
    if name == "transpose":
        return tuple(parts[p] for p in params["permutation"])
    if name == "broadcast_in_dim":
        groups = list(positions(shape, "b"))
        for axis, target in enumerate(params["broadcast_dimensions"]):
            if math.prod(p.size for p in parts[axis]) == shape[target]:
                groups[target] = parts[axis]
        return tuple(groups)
    return resized(parts, shape)


def resized(parts, shape):
    """Parts of axes whose lengths have changed: slices, padding, windows."""
    groups = []
    for group, size in zip(parts, shape, strict=True):
        if math.prod(p.size for p in group) == size:
            groups.append(group)
        elif len(group) == 1:
            groups.append((Part(size, group[0].kind),))
        else:
            groups.append((Part(size, "c" if channel(group) else "p"),))
    return tuple(groups)


def _along(wide: Wide, operands):
    """Steps that keep the rank and act along some axes: windows, padding, sorting, cumulative sums."""
    eqn = wide.eqn
    operands = [wide.as_cloud(v, None) if isinstance(v, Weight) else v for v in operands]
    value = next(v for v in operands if isinstance(v, Cloud))
    out = tuple(eqn.outvars[0].aval.shape)
    for axis in _touched(eqn, value.shape, out):
        if value.copies and channel(value.parts[axis]):
            _across_channels(wide, value, [axis])
    function = bind(eqn)
    multiple = eqn.primitive.multiple_results

    results, copies = wide.each(function, operands)
    results = list(results) if multiple else [results]
    linear = value.linear if eqn.primitive.name in ("pad", "reduce_window_sum", "cumsum") else None
    if eqn.primitive.name == "pad" and not isinstance(operands[1], Known):
        linear = None
    return [
        dataclasses.replace(value, array=r, parts=resized(value.parts, v.aval.shape), copies=copies, linear=linear,
                            layer="")
        for r, v in zip(results, eqn.outvars, strict=True)
    ]  # fmt: skip


def _touched(eqn, shape, out) -> list[int]:
    params = eqn.params
    for key in ("axis", "dimension"):
        if key in params:
            return [params[key]]
    if "window_dimensions" in params:
        return [i for i, n in enumerate(params["window_dimensions"]) if n > 1 or shape[i] != out[i]]
    if eqn.primitive.name == "top_k":
        return [len(shape) - 1]
    return [i for i, n in enumerate(shape) if n != out[i]] if eqn.primitive.name != "pad" else []


def _across_channels(wide: Wide, value: Cloud, axes: list[int]) -> bool:
    """A nonlinear step over channels: fine beside other channels, else the layer is a finite structure."""
    if all(i in axes for i in _channel_axes(value)):
        wide.make_finite(value.carriers, "a nonlinear function of all channels at once has no limit of infinite width")
    return True


def _reduce(wide: Wide, operands):
    """Sums, maxima and their like over axes."""
    eqn = wide.eqn
    value = operands[0]
    if isinstance(value, Weight):
        value = wide.as_cloud(value, None)
    axes = list(eqn.params["axes"])
    channels = [i for i in _channel_axes(value)] if value.copies else []
    hit, left = [i for i in channels if i in axes], [i for i in channels if i not in axes]
    array, copies = wide.each(bind(eqn), [value, *operands[1:]])
    parts = tuple(group for i, group in enumerate(value.parts) if i not in axes)
    linear = value.linear if eqn.primitive.name == "reduce_sum" else None
    layer = value.layer if linear else ""
    if hit and eqn.primitive.name == "reduce_sum" and _law_of_large_numbers(wide, value, hit, left):
        count = math.prod(value.shape[i] for i in hit)
        if count < 32:
            wide.plan.notes.setdefault(
                f"mean {value.layer}",
                f"a mean over {count} channels{' after ' + value.layer if value.layer else ''} is replaced by its "
                f"expectation; the finite network differs by O(1/{count})",
            )
        wide.averaged = True
        return [Cloud(array.mean(0), structural(parts), False, frozenset(), None)]
    if hit and not left and eqn.primitive.name != "reduce_sum":
        _across_channels(wide, value, axes)
    if not copies:
        parts = structural(parts)
    return [Cloud(array, parts, copies, value.carriers if copies else frozenset(), linear, layer)]


def _law_of_large_numbers(wide: Wide, value: Cloud, hit, left) -> bool:
    """Whether a sum over some channel axes runs over the wide one: the innermost, unless it is much the smaller."""
    if not left:
        return True
    count, rest = (math.prod(value.shape[i] for i in axes) for axes in (hit, left))
    return max(hit) > max(left) and not (count <= FEW and rest >= FEW * count)


def _concatenate(wide: Wide, operands):
    eqn = wide.eqn
    axis, shape = eqn.params["dimension"], tuple(eqn.outvars[0].aval.shape)
    clouds = [v for v in operands if isinstance(v, Cloud)]
    if all(isinstance(v, Weight) for v in operands):
        labels = tuple(frozenset().union(*(w.labels[i] for w in operands)) for i in range(len(shape)))
        return [_joined(wide, operands, shape, labels)]
    like = max(clouds, key=lambda v: v.wide, default=None)
    operands = [_beside(wide, v, like, axis) if isinstance(v, Weight) else v for v in operands]
    clouds = [v for v in operands if isinstance(v, Cloud)]
    groups = []
    for i, size in enumerate(shape):
        if i == axis:
            kinds = {p.kind for v in clouds for p in v.parts[i] if v.copies or p.kind != "c"}
            kind = next((k for k in "cspb" if k in kinds), "p")
            groups.append((Part(size, kind),))
        else:
            ranked = sorted(clouds, key=lambda v, i=i: (v.wide, v.parts[i][0].kind != "b"))
            groups.append(ranked[-1].parts[i])
    copied = [v for v in clouds if v.copies]
    wides = [v for v in copied if v.wide]
    for v in copied:
        if wides and not v.wide and all(not channel(w.parts[axis]) for w in wides):
            wide.make_finite(v.carriers, "one random number for all channels stands beside a value for each channel")
    array, copies = wide.each(bind(eqn), operands)
    total = all_linear(operands)
    parts = tuple(groups) if copies else structural(tuple(groups))
    return [Cloud(array, parts, copies, frozenset().union(*(v.carriers for v in copied)), total)]


def _joined(wide: Wide, weights: list[Weight], shape, labels) -> Weight:
    """Weights side by side: still a recipe."""
    function = bind(wide.eqn)
    leaves = frozenset().union(*(w.leaves for w in weights))
    plain = all(w.plain for w in weights)
    return Weight(shape, leaves, labels, lambda get: function(*[w.build(get) for w in weights]), plain)


def _tile(wide: Wide, operands):
    (value,), eqn = operands, wide.eqn
    function, shape = bind(eqn), tuple(eqn.outvars[0].aval.shape)
    if isinstance(value, Weight):
        labels = tuple(own if n == 1 else frozenset() for own, n in zip(value.labels, eqn.params["reps"], strict=True))
        return [dataclasses.replace(value, shape=shape, labels=labels, build=lambda get: function(value.build(get)))]
    array, copies = wide.each(function, [value])
    parts = tuple(merged([Part(n, "b"), *group]) for n, group in zip(eqn.params["reps"], value.parts, strict=True))
    return [dataclasses.replace(value, array=array, parts=parts, copies=copies)]


def _stack(wide: Wide, operands):
    """Arrays side by side along a new axis of positions, such as experts."""
    eqn, axis = wide.eqn, wide.eqn.params["axis"]
    if all(isinstance(v, Weight) for v in operands):
        shape = tuple(eqn.outvars[0].aval.shape)
        labels = [frozenset().union(*(w.labels[i] for w in operands)) for i in range(len(shape) - 1)]
        labels.insert(axis, frozenset())
        return [_joined(wide, operands, shape, tuple(labels))]
    operands = _clouds(wide, operands, operands[0].shape)
    clouds = [v for v in operands if isinstance(v, Cloud)]
    groups, carriers = _combined(wide, clouds, clouds[0].shape)
    array, copies = wide.each(bind(eqn), operands)
    parts = (*groups[:axis], (Part(len(operands), "p"),), *groups[axis:])
    total = all_linear(operands)
    return [Cloud(array, parts if copies else structural(parts), copies, carriers, total)]


def _beside(wide: Wide, weight: Weight, like: Cloud | None, axis: int) -> Cloud:
    """A weight set beside a field along one axis, such as a class token beside patches."""
    if like is None:
        return wide.as_cloud(weight, None)
    group = (Part(weight.shape[axis], "c" if channel(like.parts[axis]) else "p"),)
    parts = tuple(group if i == axis else g for i, g in enumerate(like.parts))
    count = like.array.shape[0] if like.copies else 1
    shape = tuple(weight.shape[axis] if i == axis else n for i, n in enumerate(like.shape))
    stand = Cloud(jnp.zeros((count, *shape) if like.copies else shape), parts, like.copies)
    return wide.as_cloud(weight, stand)


def _split(wide: Wide, operands):
    eqn, value = wide.eqn, operands[0]
    function = bind(eqn)
    if isinstance(value, Weight):
        return [
            dataclasses.replace(value, shape=tuple(v.aval.shape), build=lambda get, i=i: function(value.build(get))[i])
            for i, v in enumerate(eqn.outvars)
        ]
    arrays, copies = wide.each(function, [value])
    return [
        dataclasses.replace(value, array=a, parts=resized(value.parts, v.aval.shape), copies=copies, layer="")
        for a, v in zip(arrays, eqn.outvars, strict=True)
    ]


def _gather(wide: Wide, operands):
    """Entries picked by known indices: rows of an embedding, or positions of a field."""
    eqn = wide.eqn
    table, indices = operands
    numbers, shape = eqn.params["dimension_numbers"], tuple(eqn.outvars[0].aval.shape)
    if not isinstance(indices, Known):
        raise wide.refuse("the indices depend on weights (routing, beam search)", near=near_of(operands))
    function = bind(eqn)
    gone = set(numbers.collapsed_slice_dims) | set(numbers.operand_batching_dims)
    kept = [i for i in range(len(table.shape)) if i not in gone]
    if isinstance(table, Known):
        raise wide.refuse("it is not known what it does to channels")
    if isinstance(table, Weight):
        picked = set(numbers.start_index_map)
        roles = {
            i: "in" if i in picked and eqn.params["slice_sizes"][i] == 1 else "out" for i in range(len(table.shape))
        }
        uses = wide.use(table, roles)
        copies = not table.leaves & wide.plan.finite
        last = max(kept, default=0)
        count = -(-wide.width // max(1, table.shape[last])) if copies else 1
        drawn = wide.draw(table, count, 1)[:, 0]
        array = jax.vmap(lambda one: function(one, indices.array))(drawn)
        groups = list(positions(shape))
        features = max(numbers.offset_dims, default=len(shape) - 1)
        groups[features] = (Part(shape[features], "c"),)
        parts = tuple(groups) if copies else structural(tuple(groups))
        cloud = Cloud(array[:count] if copies else array[0], parts, copies, table.leaves, uses)
        return [wide.record(layer_of(wide.name(table.leaves)), cloud)]
    array, copies = wide.each(function, operands)
    groups: list[tuple[Part, ...]] = list(positions(shape))
    for target, source in zip(sorted(numbers.offset_dims), kept, strict=True):
        (groups[target],) = resized((table.parts[source],), (shape[target],))
    return [dataclasses.replace(table, array=array, parts=tuple(groups), copies=copies)]


def _dynamic_slice(wide: Wide, operands):
    value, *starts = operands
    if not all(isinstance(s, Known) for s in starts):
        raise wide.refuse("the indices depend on weights (routing, beam search)", near=near_of(operands))
    eqn = wide.eqn
    function, shape = bind(eqn), tuple(eqn.outvars[0].aval.shape)
    if isinstance(value, Weight):
        at = [s.array for s in starts]
        return [dataclasses.replace(value, shape=shape, build=lambda get: function(value.build(get), *at))]
    array, copies = wide.each(function, operands)
    return [dataclasses.replace(value, array=array, parts=resized(value.parts, shape), copies=copies)]


def _stop(wide: Wide, operands):
    (value,) = operands
    if isinstance(value, Weight):
        return [dataclasses.replace(value, build=lambda get: jax.lax.stop_gradient(value.build(get)), plain=False)]
    return [dataclasses.replace(value, array=jax.lax.stop_gradient(value.array), linear=None)]


RULES: dict[str, Any] = dict.fromkeys(_SHAPES, _shape)
RULES |= dict.fromkeys(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split(), _reduce
)
RULES |= dict.fromkeys(
    "pad sort top_k cumsum cumprod cummax cummin cumlogsumexp reduce_window_sum reduce_window_max reduce_window_min "
    "reduce_window".split(),
    _along,
)
RULES |= {
    "concatenate": _concatenate,
    "split": _split,
    "unstack": _split,
    "stack": _stack,
    "tile": _tile,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "stop_gradient": _stop,
}
