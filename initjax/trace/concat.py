"""Channels of different origin side by side: a `Cat` keeps the parts, and every step is taken part by part.

Each part has i.i.d. channels of its own distribution. A contraction sums over the parts with disjoint rows of the
weights, hence independent Gaussians; a mean over channels adds the parts' means; what is elementwise cuts its other
operands at the same places. A cut through a part is followed to the columns of the weights that made it.
"""

import math
from typing import Any

import numpy as np

from initjax.trace.align import MEASURE, const_rule, zeros
from initjax.trace.domain import Cat, Const, Field, Sum, Tangent
from initjax.trace.maps import Axis, Relayout, Window, xp_of
from initjax.trace.noise import Random
from initjax.trace.noise import known as as_given
from initjax.trace.rules import scaled, total
from initjax.trace.shapes import cut, reshape_to, reshaped
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, const, is_perturbation, near_of

_BY_PART = frozenset("copy copy_p rev pad reduce_window_sum reduce_window_max reduce_max reduce_min cumsum".split())


def cat_rule(walk: Walk, operands: list) -> list:
    """The current equation, at least one of whose operands is a `Cat`."""
    assert walk.equation is not None
    name = walk.equation.name
    if not walk.is_pointwise():
        operands = [as_given(v) for v in operands]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [_reshaped(walk, operands[0], walk.out_shape)]
    if name in _SHAPES:
        return _SHAPES[name](walk, *operands)
    if name == "concatenate":
        return [concatenated(walk, operands)]
    if name in ("dot_general", "conv_general_dilated"):
        return [_contracted(walk, operands)]
    if walk.is_pointwise() or name in ("convert_element_type", "stop_gradient", "reduce_precision", "select_n"):
        return [_pointwise(walk, operands)]
    if name in _BY_PART and not all(map(is_known, operands)):
        return [_each(walk, operands)]
    if all(map(is_known, operands)):
        return const_rule(walk, [known(v) if isinstance(v, Cat) else v for v in operands])
    raise walk.refuse(
        near_of(operands), "a step for which channels of different layers side by side are not tracked", MEASURE
    )


# ------------------------------------------------------------------ making and cutting


def joined(walk: Walk, parts: list, axis: int, groups: tuple[int, ...], near: str = "") -> Any:
    """Parts side by side as one value: known arrays become one array, a single part itself."""
    near = near or near_of(parts)
    flat: list[Any] = []
    for part in parts:
        same = isinstance(part, Cat) and part.axis == axis and all(g == 1 for g in part.groups)
        flat += part.parts if same else [part]
    merged: list[Any] = []
    for part in flat:
        last = merged[-1] if merged else None
        if (
            isinstance(part, Const)
            and isinstance(last, Const)
            and part.scalar is not None
            and part.scalar == last.scalar
        ):
            shape = tuple(n + part.shape[axis] if i == axis else n for i, n in enumerate(last.shape))
            merged[-1] = Const(np.asarray(last.scalar).reshape((1,) * len(shape)), shape)
        else:
            merged.append(part)
    if len(merged) == 1 and all(g == 1 for g in groups):
        return merged[0]
    value = Cat(tuple(merged), axis, groups, near)
    return known(value) if len(merged) == 1 and isinstance(merged[0], Const) else value


def known(value: Cat) -> Const:
    """A `Cat` of known arrays as one known array."""
    parts = [known(p) if isinstance(p, Cat) else p for p in value.parts]
    if len(parts) == 1 and parts[0].scalar is not None:
        return Const(np.asarray(parts[0].scalar).reshape((1,) * len(value.groups)), value.shape)
    xp = xp_of(*(p.value for p in parts))
    array = xp.concatenate([xp.broadcast_to(p.value, p.shape) for p in parts], value.axis)
    return const(array.reshape(value.shape))


def is_known(value) -> bool:
    """Whether a value is a known array, in one piece or in several."""
    return all(map(is_known, value.parts)) if isinstance(value, Cat) else isinstance(value, Const)


def _piece(walk: Walk, value, axis: int, start: int, stop: int) -> Any:
    """Entries start:stop of one axis of any value."""
    size = value.shape[axis]
    if (start, stop) == (0, size) or size == 1:
        return value
    if isinstance(value, Cat):
        if value.axis == axis:
            return _picked(walk, value, axis, start, stop, 1)
        parts = [_piece(walk, p, axis, start, stop) for p in value.parts]
        return joined(walk, parts, value.axis, value.groups, value.near)
    shape = tuple(stop - start if i == axis else n for i, n in enumerate(value.shape))
    if isinstance(value, Const):
        array = value.value
        if np.shape(array)[axis] > 1:
            array = array[(slice(None),) * axis + (slice(start, stop),)]
        return Const(array, shape, value.leaf)
    if isinstance(value, Random):  # other entries of one draw are independent of these
        key = value.key if start == 0 else value.key + f"{axis}@{start}".encode()
        return Random(value.of, key, _piece(walk, value.known, axis, start, stop), value.own)
    if isinstance(value, WeightView):
        starts = [start if i == axis else 0 for i in range(len(shape))]
        stops = [stop if i == axis else n for i, n in enumerate(value.shape)]
        return value.sliced(starts, stops, (1,) * len(shape))
    cuts: list[Any] = [(None, None, None)] * len(shape)
    cuts[axis] = (start, stop, 1)
    channels = _on_channels(walk, value, axis)
    body = cut(walk, channels, cuts)
    if channels is not value:  # weights over positions are cut as weights, so that they may become channels later
        axes = tuple(Axis(a.size, b.channel) for a, b in zip(body.axes, value.body.axes, strict=True))
        body = walk.arena.rechannelled(body, axes)
    return Field(body, value.groups, value.near)


def _picked(walk: Walk, value: Cat, axis: int, start: int, stop: int, step: int) -> Any:
    """Entries start:stop:step of the axis along which parts stand side by side."""
    parts, offset = [], 0
    for part in value.parts:
        size = part.shape[axis]
        first = max(start, offset)
        first += (start - first) % step
        last = min(stop, offset + size)
        if first < last:
            piece = _piece(walk, part, axis, first - offset, last - offset)
            parts.append(_strided(walk, piece, axis, step) if step > 1 else piece)
        offset += size
    return joined(walk, parts, axis, value.groups, value.near)


def _strided(walk: Walk, value, axis: int, step: int) -> Any:
    size = value.shape[axis]
    shape = tuple(-(-size // step) if i == axis else n for i, n in enumerate(value.shape))
    params = {
        "start_indices": (0,) * len(shape),
        "limit_indices": value.shape,
        "strides": tuple(step if i == axis else 1 for i in range(len(shape))),
    }
    return walk.step("slice", params, [value], shape)


def _boundaries(value: Cat) -> set[int]:
    return set(np.cumsum([p.shape[value.axis] for p in value.parts]).tolist())


def _fine(walk: Walk, value, like: Cat) -> Any:
    """A value with the program shape of a `Cat`, or broadcastable to it, on the axes of the Cat's parts."""
    if not value.shape or all(g == 1 for g in like.groups) and not isinstance(value, Cat):
        return value
    if isinstance(value, Cat):
        if (value.groups, value.axis) != (like.groups, like.axis) and any(g > 1 for g in value.groups + like.groups):
            raise walk.refuse(value.near, "channels of several layers merge with positions in two ways", MEASURE)
        return Cat(value.parts, value.axis, (1,) * len(value.parts[0].shape), value.near)
    sizes, at = [], 0
    for size, count in zip(value.shape, like.groups, strict=True):
        whole = [sum(p.shape[a] for p in like.parts) if a == like.axis else like.parts[0].shape[a]
                 for a in range(at, at + count)]  # fmt: skip
        sizes += whole if size != 1 or math.prod(whole) == 1 else [1] * count
        at += count
    if isinstance(value, Const):
        array, shape, at = value.value, [], 0
        for axis, count in enumerate(like.groups):
            shape += sizes[at : at + count] if np.shape(array)[axis] > 1 else [1] * count
            at += count
        return Const(array.reshape(tuple(shape)), tuple(sizes), value.leaf)
    if isinstance(value, Random):
        if not all(value.own):
            return _fine(walk, value.known, like)
        given = walk.step("reshape", reshape_to(tuple(sizes)), [value.known], tuple(sizes))
        return Random(value.of, value.key, given, (True,) * len(sizes))
    if isinstance(value, WeightView):
        view = value.reshaped(tuple(sizes))
        if view is None:
            raise walk.refuse(like.near, f"the weight {walk.leaf_name(value)} is reshaped after a transpose", MEASURE)
        return view
    body, groups = reshaped(walk, value, tuple(sizes))
    return Field(body, groups, value.near)


# ------------------------------------------------------------------ part by part


def _pointwise(walk: Walk, operands: list) -> Any:
    """An elementwise step: all operands are cut where one of them changes."""
    equation = walk.equation
    assert equation is not None
    like = next(v for v in operands if isinstance(v, Cat))
    fine = [_fine(walk, v, like) for v in operands]
    axis = like.axis
    ends = sorted(set().union(*(_boundaries(v) for v in fine if isinstance(v, Cat) and v.axis == axis)))
    results, start = [], 0
    for stop in ends:
        pieces = [_piece(walk, v, axis, start, stop) if v.shape else v for v in fine]
        if any(isinstance(p, Field) and _is_channel(p, axis) for p in pieces):
            pieces = [_on_channels(walk, p, axis) if isinstance(p, Field) else p for p in pieces]
        shape = np.broadcast_shapes(*(p.shape for p in pieces))
        results.append(walk.step(equation.primitive, equation.params, pieces, shape))
        start = stop
    return joined(walk, results, axis, like.groups, near_of(operands))


def _is_channel(field: Field, axis: int) -> bool:
    start = sum(field.groups[:axis])
    return any(a.channel for a in field.body.axes[start : start + field.groups[axis]])


def _on_channels(walk: Walk, field: Field, axis: int) -> Field:
    """A field of weights alone, which met known arrays first, with its features as channels."""
    start = sum(field.groups[:axis])
    if field.groups[axis] != 1 or field.body.axes[start].channel:
        return field
    axes = tuple(Axis(a.size, True) if i == start else a for i, a in enumerate(field.body.axes))
    body = walk.arena.rechannelled(field.body, axes)
    return field if body is None else Field(body, field.groups, field.near)


def _each(walk: Walk, operands: list) -> Any:
    """A step that leaves the cut axis alone."""
    equation, (value, *rest) = walk.equation, operands
    assert equation is not None
    out = walk.out_shape
    blocked = any(g != 1 for g in value.groups) or len(out) != len(value.shape)
    if blocked or out[value.axis] != value.shape[value.axis] or any(isinstance(v, Cat) for v in rest):
        raise walk.refuse(value.near, "a step along the channels of different layers side by side", MEASURE)
    parts = []
    for part in value.parts:
        shape = tuple(part.shape[value.axis] if i == value.axis else n for i, n in enumerate(out))
        parts.append(walk.step(equation.primitive, equation.params, [part, *rest], shape))
    if equation.name == "rev" and value.axis in equation.params["dimensions"]:
        parts.reverse()
    return joined(walk, parts, value.axis, value.groups, value.near)


# ------------------------------------------------------------------ shapes


def _starts(groups) -> list[int]:
    return np.concatenate([[0], np.cumsum(groups)]).astype(int).tolist()


def _reshaped(walk: Walk, value: Cat, shape: tuple[int, ...]) -> Any:
    """Axes left and right of the cut one regroup freely; the cut one may be split where its parts allow it."""
    fine, axis = value.fine, value.axis
    left, size, right = math.prod(fine[:axis]), fine[axis], math.prod(fine[axis + 1 :])
    refusal = walk.refuse(value.near, "a reshape cuts across channels of different layers", MEASURE)
    done, at = 1, 0
    while at < len(shape) and left % (done * shape[at]) == 0 and (done < left or shape[at] == 1):
        done *= shape[at]
        at += 1
    extra = left // done
    if at == len(shape) or shape[at] % extra:
        raise refusal
    here = shape[at] // extra
    head, tail = shape[:at] + ((extra,) if extra > 1 else ()), shape[at + 1 :]
    axis_now, outer = len(head), (extra > 1) + 1
    parts: list[Any] = []
    if here % size == 0 and right % (here // size) == 0:
        for part in value.parts:
            new = (*head, part.shape[axis] * here // size, *tail)
            parts.append(walk.step("reshape", reshape_to(new), [part], new))
        groups = (1,) * at + (outer,) + (1,) * len(tail)
        return joined(walk, parts, axis_now, groups, value.near)
    if size % here:
        raise refusal
    width = size // here  # the cut axis becomes (here, width): whole groups, or groups with parts of their own
    ends, start = _boundaries(value), 0
    for stop in sorted({end // width * width for end in ends} | {-(-end // width) * width for end in ends}):
        piece = _picked(walk, value, axis, start, stop, 1) if stop > start else None
        if piece is None:
            continue
        new = (*head, (stop - start) // width, *tail)
        if isinstance(piece, Cat) and stop - start == width:
            whole = Cat(piece.parts, piece.axis, (1,) * len(fine), piece.near)
            parts.append(_within_group(walk, whole, head, width, tail))
        else:
            parts.append(walk.step("reshape", reshape_to(new), [piece], new))
        start = stop
    groups = (1,) * at + (outer,) + (1,) * len(tail)
    return joined(walk, parts, axis_now, groups, value.near)


def _within_group(walk: Walk, value: Cat, head: tuple, width: int, tail: tuple) -> Any:
    """One group of channels with parts of its own: (..., width, ...) as (..., 1, width, ...)."""
    kept, groups = (*head, 1), (1,) * len(head) + (1,)
    inner = _reshaped(walk, value, (*head, *tail)) if tail[:1] == (width,) else None
    if not isinstance(inner, Cat):
        raise walk.refuse(value.near, "groups of channels are cut inside a layer and then regrouped", MEASURE)
    parts = []
    for part in inner.parts:
        shape = part.shape[: len(head)] + (1,) + part.shape[len(head) :]
        parts.append(walk.step("reshape", reshape_to(shape), [part], shape))
    return joined(walk, parts, len(kept), groups + inner.groups[len(head) :], value.near)


def _transpose(walk: Walk, value: Cat) -> list:
    assert walk.equation is not None
    permutation, starts = walk.equation.params["permutation"], _starts(value.groups)
    order = tuple(a for p in permutation for a in range(starts[p], starts[p + 1]))
    parts = [walk.step("transpose", {"permutation": order}, [p], tuple(p.shape[a] for a in order)) for p in value.parts]
    return [joined(walk, parts, order.index(value.axis), tuple(value.groups[p] for p in permutation), value.near)]


def _broadcast(walk: Walk, value: Cat) -> list:
    assert walk.equation is not None
    out, dims, starts = walk.out_shape, walk.equation.params["broadcast_dimensions"], _starts(value.groups)
    target, groups, moved = [], [], {}
    for i, n in enumerate(out):
        fine = range(starts[dims.index(i)], starts[dims.index(i) + 1]) if i in dims else ()
        if len(fine) > 1 or value.axis in fine:
            moved.update({a: len(target) + k for k, a in enumerate(fine)})
            target += [value.fine[a] for a in fine]
            groups.append(len(fine))
        else:
            moved.update(dict.fromkeys(fine, len(target)))
            target.append(n)
            groups.append(1)
    axis, parts = moved[value.axis], []
    for part in value.parts:
        shape = tuple(part.shape[value.axis] if i == axis else n for i, n in enumerate(target))
        params = {"shape": shape, "broadcast_dimensions": tuple(moved[a] for a in range(len(part.shape)))}
        parts.append(walk.step("broadcast_in_dim", params | {"sharding": None}, [part], shape))
    return [joined(walk, parts, axis, tuple(groups), value.near)]


def _slice(walk: Walk, value: Cat) -> list:
    assert walk.equation is not None
    params = walk.equation.params
    steps = params["strides"] or (1,) * len(value.shape)
    result: Any = value
    for dim, (start, stop, step) in enumerate(
        zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    ):
        if (start, stop, step) != (0, value.shape[dim], 1):
            result = _range(walk, result, dim, start, stop, step)
    return [result]


def _range(walk: Walk, value, dim: int, start: int, stop: int, step: int) -> Any:
    if not isinstance(value, Cat) or all(g == 1 for g in value.groups) and value.axis != dim:
        piece = _piece(walk, value, dim, start, stop)
        return _strided(walk, piece, dim, step) if step > 1 else piece
    axis = _starts(value.groups)[dim]
    if value.groups[dim] != 1:
        raise walk.refuse(value.near, "it picks from an axis that merges positions with channels", MEASURE)
    if axis == value.axis:
        return _picked(walk, value, axis, start, stop, step)
    parts = [_piece(walk, p, axis, start, stop) for p in value.parts]
    parts = [_strided(walk, p, axis, step) for p in parts] if step > 1 else parts
    return joined(walk, parts, value.axis, value.groups, value.near)


def _split(walk: Walk, value: Cat) -> list:
    assert walk.equation is not None
    axis, start, results = walk.equation.params["axis"], 0, []
    for size in map(int, walk.equation.params["sizes"]):
        results.append(_range(walk, value, axis, start, start + size, 1))
        start += size
    return results


def _reduce_sum(walk: Walk, value: Cat) -> list:
    assert walk.equation is not None
    starts, out = _starts(value.groups), walk.out_shape
    fine = tuple(a for d in walk.equation.params["axes"] for a in range(starts[d], starts[d + 1]))
    groups = tuple(g for d, g in enumerate(value.groups) if d not in walk.equation.params["axes"])
    params, sums = walk.equation.params | {"axes": fine}, []
    for part in value.parts:
        shape = tuple(n for i, n in enumerate(part.shape) if i not in fine)
        sums.append(walk.step("reduce_sum", params, [part], shape))
    if value.axis not in fine:
        return [joined(walk, sums, value.axis - sum(a < value.axis for a in fine), groups, value.near)]
    if any(isinstance(v, Field) and _perturbs(v) for v in sums) and value.axis in fine:
        # one perturbed input among many channels moves a mean by O(1/n), as any other tangent does
        sums = [v for v in sums if not (isinstance(v, Field) and _perturbs(v))] or [zeros(walk)]
    whole = _added(walk, sums)
    return [whole if whole.shape == out else walk.step("reshape", reshape_to(out), [whole], out)]


# ------------------------------------------------------------------ contractions, concatenation


def _contracted(walk: Walk, operands: list) -> Any:
    """Dense and convolution: the parts meet disjoint rows of the weights."""
    equation = walk.equation
    assert equation is not None
    which = next(i for i, v in enumerate(operands) if isinstance(v, Cat))
    if all(isinstance(p, WeightView) for p in operands[which].parts) and equation.name == "dot_general":
        return _by_weights(walk, operands, which)
    value, weight = operands[which], operands[1 - which]
    if not isinstance(weight, WeightView):
        raise walk.refuse(
            value.near,
            "activations meet something else than a random weight here (attention scores, a bilinear form, a fixed "
            "matrix): not a Gaussian field",
            MEASURE,
        )
    if equation.name == "dot_general":
        (contract, batch) = equation.params["dimension_numbers"]
        mine, theirs = list(contract[which]), list(contract[1 - which])
        if batch[0]:
            raise walk.refuse(value.near, "weights and data share a batch axis", MEASURE)
    else:
        numbers = equation.params["dimension_numbers"]
        mine, theirs = [numbers.lhs_spec[1]], [numbers.rhs_spec[1]]
        if any(equation.params[k] != 1 for k in ("feature_group_count", "batch_group_count")):
            raise walk.refuse(value.near, "a grouped convolution over channels of different layers", MEASURE)
    starts = _starts(value.groups)
    dim = next(d for d in range(len(value.groups)) if starts[d] <= value.axis < starts[d + 1])
    if dim not in mine or equation.name != "dot_general" and value.groups[dim] != 1:
        raise walk.refuse(
            value.near,
            "the weight sums over positions while channels of different layers stay free (token mixing)",
            MEASURE,
        )
    row = theirs[mine.index(dim)]
    rows = value.fine[starts[dim] : starts[dim + 1]]
    view = weight.reshaped((*weight.shape[:row], *rows, *weight.shape[row + 1 :]))
    if view is None:
        raise walk.refuse(value.near, f"{walk.leaf_name(weight)} is permuted inside the contraction", MEASURE)
    cut_row, more = row + value.axis - starts[dim], len(rows) - 1
    fine_mine = [a for d in mine for a in range(starts[d], starts[d + 1])]
    fine_theirs = [
        a for w in theirs for a in (range(row, row + len(rows)) if w == row else [w + more * (w > row)])
    ]  # fmt: skip
    results, start = [], 0
    over_channels = any(isinstance(p, Field) and _is_channel(p, value.axis) for p in value.parts)
    for part in value.parts:
        stop = start + part.shape[value.axis]
        if over_channels and isinstance(part, Field) and not _is_channel(part, value.axis):
            # features of a known part that met weights of their own (the tangent of a norm's scale)
            part = _on_channels(walk, part, value.axis)
        one, start = _piece(walk, view, cut_row, start, stop), stop
        params = equation.params
        if equation.name == "dot_general":
            pair = (tuple(fine_mine), tuple(fine_theirs))
            params = params | {"dimension_numbers": (pair if which == 0 else pair[::-1], ((), ()))}
        pieces = [part, one] if which == 0 else [one, part]
        results.append(walk.step(equation.primitive, params, pieces, walk.out_shape))
    whole = _added(walk, results)
    if isinstance(whole, Field) and not weight.tangent:
        walk.record(whole.near, whole)
    return whole


def _perturbs(field: Field) -> bool:
    return is_perturbation(field.body)


def _by_weights(walk: Walk, operands: list, which: int) -> Any:
    """Weights side by side (a fused projection): one layer for each, or one for each part of the channels."""
    assert walk.equation is not None
    weights, data = operands[which], operands[1 - which]
    contract, batch = walk.equation.params["dimension_numbers"]
    axis, mine, theirs = weights.axis, contract[which], contract[1 - which]
    if batch[0] or any(g != 1 for g in weights.groups) or isinstance(data, Cat):
        raise walk.refuse(near_of(operands), "weights side by side in a contraction of several kinds", MEASURE)
    before = sum(a not in mine for a in range(axis))
    place = before if which == 0 else before + len(data.shape) - len(theirs)
    results, start = [], 0
    for part in weights.parts:
        stop = start + part.shape[axis]
        pieces = [part, data if axis not in mine else _piece(walk, data, theirs[mine.index(axis)], start, stop)]
        shape = walk.out_shape
        if axis not in mine:
            shape = tuple(part.shape[axis] if i == place else n for i, n in enumerate(shape))
        pieces = pieces if which == 0 else pieces[::-1]
        results.append(walk.step(walk.equation.primitive, walk.equation.params, pieces, shape))
        start = stop
    return _added(walk, results) if axis in mine else joined(walk, results, place, (1,) * len(walk.out_shape))


def _added(walk: Walk, values: list) -> Any:
    whole = values[0]
    for other in values[1:]:
        whole = walk.step("add", {}, [whole, other], whole.shape)
    return whole


def concatenated(walk: Walk, operands: list) -> Any:
    """Along channels: a `Cat`. Along positions, where some operands already are `Cat`s: part by part."""
    assert walk.equation is not None
    dim, params = walk.equation.params["dimension"], walk.equation.params
    cats = [v for v in operands if isinstance(v, Cat)]
    if any(g != 1 for v in cats for g in v.groups) and not all(_ends_at(v, dim) for v in cats):
        raise walk.refuse(near_of(operands), "parts that merge positions with channels of several layers", MEASURE)
    axis = next((v.axis for v in cats if v.axis != dim and all(g == 1 for g in v.groups)), None)
    if axis is None:
        parts = [_as_part(walk, v, operands) for v in operands]
        return joined(walk, parts, dim, (1,) * len(operands[0].shape), near_of(operands))
    ends = sorted(set().union(*(_boundaries(v) for v in cats if v.axis == axis)))
    results, start = [], 0
    for stop in ends:
        pieces = [_piece(walk, v, axis, start, stop) for v in operands]
        shape = tuple(stop - start if i == axis else n for i, n in enumerate(walk.out_shape))
        results.append(walk.step("concatenate", params, pieces, shape))
        start = stop
    return joined(walk, results, axis, (1,) * len(walk.out_shape), near_of(operands))


def _ends_at(value: Cat, dim: int) -> bool:
    starts = _starts(value.groups)
    return starts[dim] <= value.axis < starts[dim + 1]


def _as_part(walk: Walk, value, operands: list) -> Any:
    """A weight among the parts of a concatenation is a field with channels as its neighbours have."""
    like = next((v for v in operands if isinstance(v, Field)), None)
    if not isinstance(value, WeightView) or like is None:
        return value
    axes = tuple(Axis(n, a.channel) for n, a in zip(value.shape, like.body.axes, strict=False))
    if like.groups != (1,) * len(value.shape):
        raise walk.refuse(like.near, f"the weight {walk.leaf_name(value)} is concatenated with merged axes", MEASURE)
    return walk.as_field(value, Field(walk.arena.sum(axes, ()), like.groups, like.near))


_SHAPES = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "reduce_sum": _reduce_sum,
}


# ------------------------------------------------------------------ the output of a model


def as_positions(walk: Walk, value: Cat) -> Field | None:
    """Output units of several kinds as positions, weighted so that their mean is the mean over all units."""
    fields, slots = [], 0
    for part in value.parts:
        field = walk.finished(part)
        at = sum(field.groups[: value.axis])
        axes = field.body.axes[at : at + field.groups[value.axis]]
        places = math.prod(a.size for a in axes if not a.channel)
        fields.append((field, at, places, math.prod(a.size for a in axes if a.channel)))
        slots += places
    bodies, offset = [], 0
    for field, at, places, units in fields:
        axes, count = field.body.axes, field.groups[value.axis]
        body = walk.arena.relayout(
            field.body, Relayout("reshape", (*axes[:at], Axis(places, False), *axes[at + count :]))
        )
        windows = [None] * at + [Window(slots, offset, 1, 0, 1, places)] + [None] * (len(axes) - at - count)
        body = walk.arena.relayout(body, Relayout("window", tuple(windows)))
        bodies.append(scaled(walk, body, math.sqrt(units * slots / value.fine[value.axis])))
        offset += places
    kinds = {type(b) for b in bodies}
    if kinds == {Sum, Tangent}:  # the tangent of a part that is a known zero
        bodies = [b for b in bodies if isinstance(b, Tangent)]
    walk.note("outputs", "the outputs are units of several kinds side by side: the kernels are means over all units")
    groups = tuple(1 if i == value.axis else g for i, g in enumerate(fields[0][0].groups))
    return Field(total(walk, bodies) if len(bodies) > 1 else bodies[0], groups, value.near)
