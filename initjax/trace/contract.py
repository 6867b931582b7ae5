"""Contractions with weights: the one place where Gaussians are made.

sum_k W_ik x_k over channels is Gaussian by the central limit theorem when the entries x_k are i.i.d. and W is used in
one role only. Everything else that `dot_general` can express is refused.
"""

import dataclasses
from typing import Any

import numpy as np

from initjax.trace.align import zeros
from initjax.trace.domain import Base, Const, Field, Sum, Tangent
from initjax.trace.flax import layer_of
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axis, xp_of
from initjax.trace.rules import RULES
from initjax.trace.shapes import reshape_to, transposed
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, contraction_pattern, near_of

_POSITIONS = 128  # with weights of their own, one after the other
_MEASURE = "measure this model at finite width with ij.empirical_ntk"


def _dot_general(walk: Walk, operands):
    assert walk.equation is not None
    left, right = operands
    if any(isinstance(v, Const) and v.scalar == 0 for v in operands):
        return [zeros(walk)]
    (lc, rc), (lb, rb) = walk.equation.params["dimension_numbers"]
    fixed = _fixed_matrix(walk, left, right, (lc, rc), lb)
    if fixed is not None:
        return [fixed]
    if isinstance(left, WeightView) == isinstance(right, WeightView):
        raise walk.refuse(near_of(operands), *_no_weight(left, right))
    if lb:
        sides = (right, left, rc, lc, rb, lb) if isinstance(left, WeightView) else (left, right, lc, rc, lb, rb)
        return [_shared(walk, *sides, weight_first=isinstance(left, WeightView))]
    if isinstance(right, WeightView):
        return [contract(walk, left, right, lc, rc, weight_first=False)]
    return [contract(walk, right, left, rc, lc, weight_first=True)]


def _fixed_matrix(walk: Walk, left, right, contracted, batch) -> Field | None:
    """A known matrix along one axis of a field (interpolation, a smoothing): linear in the positions."""
    from initjax.trace.spatial import by_matrix

    kinds = (isinstance(left, Field) and isinstance(right, Const), isinstance(left, Const) and isinstance(right, Field))
    if not any(kinds) or batch or len(contracted[0]) != 1:
        return None
    field: Any = left if kinds[0] else right
    known: Any = right if kinds[0] else left
    axis, row = (c[0] for c in (contracted if kinds[0] else contracted[::-1]))
    if len(known.shape) > 2:
        return None
    matrix: Any = xp_of(known.value).broadcast_to(known.value, known.shape)
    matrix = xp_of(matrix).moveaxis(matrix.reshape(known.shape), row, -1) if len(known.shape) == 2 else matrix[None]
    moved = by_matrix(walk, field, axis, matrix)
    rest = [i for i in range(len(field.shape)) if i != axis]
    if len(known.shape) == 1:
        body, groups = transposed(walk, moved, [axis, *rest])
        shape = tuple(field.shape[i] for i in rest)
        return walk.step("reshape", reshape_to(shape), [Field(body, groups, field.near)], shape)
    body, groups = transposed(walk, moved, [*rest, axis] if kinds[0] else [axis, *rest])
    return Field(body, groups, field.near)


def _shared(
    walk: Walk, data, view: WeightView, data_axes, weight_axes, data_batch, weight_batch, weight_first: bool
) -> Any:
    """One matrix for each group of channels, or for each position (locally connected layers, stacked models)."""
    near, out = near_of([data]), walk.out_shape
    (axis, *more), (row, *rows) = data_batch, weight_batch
    kept = [a for a in range(len(data.shape)) if a not in (axis, *data_axes)]
    free = len(view.shape) - 1 - len(weight_axes)
    if isinstance(data, Field) and any(_is_channel(data, a) for a in data_batch):
        if more:
            raise walk.refuse(near, "weights and data share several batch axes, channels among them", _MEASURE)
        field = contract(walk, data, view, data_axes, weight_axes, False, batch=((axis,), (row,)))
        order = [a for a in range(len(data.shape)) if a not in data_axes]  # then the free axes of the weights
        old, new = [order.index(a) for a in kept], list(range(len(order), len(order) + free))
        layout = [order.index(axis), *(new + old if weight_first else old + new)]
        body, groups = transposed(walk, field, layout)
        return Field(body, groups, field.near)
    count = view.shape[row]
    if count > _POSITIONS:
        raise walk.refuse(near, f"more than {_POSITIONS} positions with weights of their own", _MEASURE)
    parts = []
    for i in range(count):
        one = [slice_at(walk, v, a, i) for v, a in ((data, axis), (view, row))]
        sides = [(data_axes, more, axis), (weight_axes, rows, row)]
        pairs = [[tuple(a - (a > b) for a in axes) for axes, _, b in sides],
                 [tuple(a - (a > b) for a in axes) for _, axes, b in sides]]  # fmt: skip
        numbers = tuple(tuple(pair[::-1] if weight_first else pair) for pair in pairs)
        operands = one[::-1] if weight_first else one
        part = walk.step("dot_general", {"dimension_numbers": numbers}, operands, out[1:])
        parts.append(walk.step("reshape", reshape_to((1, *out[1:])), [part], (1, *out[1:])))
    return walk.step("concatenate", {"dimension": 0}, parts, out)


def _is_channel(field: Field, axis: int) -> bool:
    start = sum(field.groups[:axis])
    return field.groups[axis] == 1 and field.body.axes[start].channel


def slice_at(walk: Walk, value, axis: int, index: int) -> Any:
    """One entry of an axis, and the axis taken away."""
    starts = [index if i == axis else 0 for i in range(len(value.shape))]
    stops = [index + 1 if i == axis else n for i, n in enumerate(value.shape)]
    shape = tuple(n for i, n in enumerate(value.shape) if i != axis)
    params = {"start_indices": tuple(starts), "limit_indices": tuple(stops), "strides": None}
    one = walk.step("slice", params, [value], (*shape[:axis], 1, *shape[axis:]))
    return walk.step("reshape", reshape_to(shape), [one], shape)


def contract(
    walk: Walk,
    data,
    view: WeightView,
    data_axes,
    weight_axes,
    weight_first: bool,
    gaussian: bool = True,
    batch: tuple = ((), ()),
) -> Field:
    """The field sum_k W_k. x_.k over the given program axes of the data; Gaussian unless said otherwise.

    batch : program axes of the data, and of the weights, along which every channel has weights of its own.
    """
    if isinstance(data, Const):
        data = Field(walk.as_sum(data), (1,) * len(data.shape))
    near, body = data.near, data.body
    starts = np.concatenate([[0], np.cumsum(data.groups)])
    pairs = sorted(zip(data_axes, weight_axes, strict=True))
    contracted = [int(a) for d, _ in pairs for a in range(starts[d], starts[d + 1])]
    free = [*batch[1], *(a for a in range(len(view.shape)) if a not in (*weight_axes, *batch[1]))]
    own = [int(starts[d]) for d in batch[0]]
    sizes = tuple(body.axes[a].size for a in contracted)
    moved = view.transposed([w for _, w in pairs] + free).reshaped(sizes + tuple(view.shape[a] for a in free))
    name = walk.leaf_name(view)
    if moved is None or any(s == 0 and n > 1 for n, s in zip(moved.shape, moved.strides, strict=True)):
        raise walk.refuse(near, f"the weight {name} is repeated or permuted inside the contraction", _MEASURE)
    _check_channels(walk, body, contracted, name, near, own)
    walk.check_iid(view, near)
    # the contracted axes in the order of the weights' strides: partners in any other use of these weights
    strides = [abs(s) if n > 1 else 0 for s, n in zip(moved.strides, moved.shape, strict=True)]
    order = sorted(range(len(contracted)), key=lambda i: -strides[i])
    by_stride = tuple(contracted[i] for i in order)
    moved = moved.transposed([*order, *range(len(contracted), len(moved.shape))])
    walk.use("contracted", moved, contraction_pattern(body.axes, by_stride, moved), near)
    _clt_note(walk, view, body, sizes, contracted, gaussian)

    free = free[len(own) :]
    channels = tuple(Axis(view.shape[a], True) for a in free)
    kept = tuple(a for i, a in enumerate(body.axes) if i not in contracted)
    kept_groups = tuple(count for p, count in enumerate(data.groups) if p not in data_axes)
    axes = channels + kept if weight_first else kept + channels
    groups = (1,) * len(free) + kept_groups if weight_first else kept_groups + (1,) * len(free)
    layer = layer_of(name)
    plain = dataclasses.replace(moved, scale=1.0)
    tangent = view.tangent or isinstance(body, Tangent)
    base = walk.arena.atom(
        Base,
        ("dot", id(body), plain, by_stride, axes),
        axes,
        "dot",
        plain,
        body,
        by_stride,
        layer,
        gaussian,
        tangent,
    )
    total = walk.arena.sum(axes, [(base, moved.scale)])
    result = Field(Tangent(axes, ((None, total),)) if tangent else total, groups, layer)
    if not view.tangent:
        walk.record(layer, result)
    return result


def _check_channels(walk: Walk, body, contracted, name: str, near: str, own: list[int]) -> None:
    if isinstance(body, Sum) and body.is_constant:
        return
    channels = [i for i, a in enumerate(body.axes) if a.channel and i not in own]
    if own and all(body.axes[i].size == 1 for i in channels):
        raise walk.refuse(
            near,
            f"the weight {name} meets one channel in each group (a depthwise convolution): no central limit theorem "
            "applies, and its outputs are not Gaussian",
            "use more channels in a group; or " + _MEASURE,
            what="a depthwise layer",
        )
    if all(i in contracted for i in channels):
        if channels or isinstance(body, Tangent):  # of a tangent only the second moment is asked, which needs no CLT
            return
        raise walk.refuse(
            near,
            f"the weight {name} sums over positions of a field that has no channels left: finitely many random "
            "numbers, to which no central limit theorem applies",
            _MEASURE,
        )
    if any(i in contracted for i in channels):
        raise walk.refuse(
            near,
            f"the weight {name} sums over one of several channel axes; such groups have no rule",
            _MEASURE,
        )
    raise walk.refuse(
        near,
        f"the weight {name} sums over positions while channels stay free (token mixing): all channels share the same "
        "finite matrix and are not independent",
        "mix tokens by a sum or a convolution; with as many tokens as channels both would have to be wide, an "
        "approximation that is not made here; or " + _MEASURE,
    )


def _clt_note(walk: Walk, view: WeightView, body, sizes, contracted, gaussian: bool) -> None:
    """Say where the central limit theorem is used on few entries."""
    if view.tangent or isinstance(body, Tangent):
        return
    stats = walk.program.leaves[view.leaf]
    count = int(np.prod(sizes))
    if isinstance(body, Sum) and body.is_constant:
        if not stats.gaussian and gaussian:
            walk.note(
                stats.name,
                f"{stats.name}: its entries are not normally distributed and it sums over the {count} entries of the "
                f"input; its outputs are taken as Gaussian, exact up to O(1/{count})",
            )
        return
    width = int(np.prod([body.axes[i].size for i in contracted if body.axes[i].channel]))
    if width < 32:
        walk.note(
            stats.name,
            f"{stats.name}: it sums over {width} channels only; the theory takes that number as large, and the finite "
            f"network differs by O(1/{width})",
        )


def _no_weight(left, right) -> tuple[str, str]:
    if isinstance(left, WeightView):
        return "two weights are multiplied before they meet the data", "multiply the data by one after the other"
    if isinstance(left, Field) and isinstance(right, Field):
        return (
            "a product of two random fields (attention scores, bilinear layers) is not a Gaussian field, and "
            "has no exact rule",
            _MEASURE,
        )
    if any(len(v.shape) > 2 for v in (left, right) if isinstance(v, Const)):
        return (
            "a known array meets a random field with a matrix of its own for every example (the adjacency of a graph, "
            "a hypernetwork), which has no exact rule",
            _MEASURE,
        )
    return (
        "a fixed matrix acts on random activations: over channels this mixes independent entries with given numbers, "
        "and no central limit theorem applies",
        "make the matrix a random weight, or apply it to the input",
    )


def _picked_positions(walk: Walk, field: Field, indices: Const) -> Field:
    """Positions picked by known indices along one axis (nearest-neighbour resizing, a shuffle)."""
    from initjax.trace.spatial import by_matrix

    assert walk.equation is not None
    numbers, sizes = walk.equation.params["dimension_numbers"], walk.equation.params["slice_sizes"]
    axes, out = tuple(numbers.start_index_map), walk.out_shape
    whole = len(axes) == 1 and tuple(numbers.collapsed_slice_dims) == axes and not numbers.operand_batching_dims
    kept = [n for i, n in enumerate(field.shape) if whole and i != axes[0]]
    if not whole or len(out) != len(field.shape) or [n for i, n in enumerate(sizes) if i != axes[0]] != kept:
        raise walk.refuse(field.near, "entries are picked by index in a way that is not covered", _MEASURE)
    place = [i for i in range(len(out)) if i not in numbers.offset_dims]
    if place != [axes[0]] or is_traced(indices.value):
        raise walk.refuse(field.near, "entries are picked by index in a way that is not covered", _MEASURE)
    picked = np.broadcast_to(np.asarray(indices.value), indices.shape)[..., 0]
    picked = np.clip(picked, 0, field.shape[axes[0]] - 1)
    return by_matrix(walk, field, axes[0], (picked[:, None] == np.arange(field.shape[axes[0]])).astype(np.float64))


def _gather(walk: Walk, operands):
    """Rows of an embedding, picked by known indices: the contraction with a one-hot array."""
    assert walk.equation is not None
    if isinstance(operands[0], Field) and isinstance(operands[1], Const):
        return [_picked_positions(walk, *operands)]
    table, indices = operands
    numbers, sizes = walk.equation.params["dimension_numbers"], walk.equation.params["slice_sizes"]
    shape = walk.program.body.avals[walk.equation.outputs[0]].shape
    rows = (
        isinstance(table, WeightView)
        and isinstance(indices, Const)
        and (numbers.start_index_map, numbers.collapsed_slice_dims) == ((0,), (0,))
        and tuple(sizes) == (1, *table.shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(len(shape) - len(table.shape) + 1, len(shape)))
        and not numbers.operand_batching_dims
    )
    if not rows:
        raise walk.refuse(near_of(operands), "entries are picked by index in a way that is not covered", _MEASURE)
    xp = xp_of(indices.value)
    picked = xp.broadcast_to(indices.value, indices.shape)[..., 0]
    if xp is np and (picked.min() < 0 or picked.max() >= table.shape[0]):
        raise walk.refuse(
            "",
            f"an index {picked.min()} or {picked.max()} lies outside the table of {table.shape[0]} rows",
            "give indices from 0 to the number of embeddings less one",
        )
    one_hot = (picked[..., None] == np.arange(table.shape[0])).astype(np.float64)
    data = Const(one_hot, tuple(one_hot.shape))
    # one entry alone is as Gaussian as its initializer: no sum is taken
    gaussian = table.tangent or walk.program.leaves[table.leaf].gaussian
    return [contract(walk, data, table, (len(one_hot.shape) - 1,), (0,), False, gaussian)]


RULES["dot_general"] = _dot_general
RULES["gather"] = _gather
