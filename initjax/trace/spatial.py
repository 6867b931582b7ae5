"""Convolutions, pooling, padding and concatenation: steps over positions.

A convolution is a sum over the taps of its window: tap o shifts the field and contracts its channels with W[o]. Taps
have disjoint weights, so they are independent Gaussians; stride, dilation, padding and transposed convolutions are only
different shifts.
"""

import itertools
from typing import Any

import numpy as np

from initjax.trace.align import const_along, match, zeros
from initjax.trace.concat import concatenated
from initjax.trace.contract import contract
from initjax.trace.domain import Const, Field, Sum, Tangent
from initjax.trace.maps import Axis, Box, Relayout, Window
from initjax.trace.rules import RULES, total
from initjax.trace.shapes import reshape_to, reshaped, transposed
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, near_of

_MEASURE = "measure this model at finite width with ij.empirical_ntk"


def _convolution(walk: Walk, operands):
    assert walk.equation is not None
    data, kernel = operands
    params = walk.equation.params
    if any(isinstance(v, Const) and v.scalar == 0 for v in operands):
        return [zeros(walk)]
    if isinstance(kernel, Const) or isinstance(data, WeightView):
        raise walk.refuse(
            near_of(operands),
            "a convolution with a known kernel (a blur) acts on random activations"
            if isinstance(kernel, Const)
            else "a weight is convolved before it meets the data",
            _MEASURE,
            what="a convolution with a fixed kernel" if isinstance(kernel, Const) else "",
        )
    if not isinstance(kernel, WeightView):
        raise walk.refuse(near_of(operands), "the kernel of the convolution is itself a random field", _MEASURE)
    numbers, count = params["dimension_numbers"], params["feature_group_count"]
    if isinstance(data, Const):
        data = Field(walk.as_sum(data), (1,) * len(data.shape))
    feature = numbers.lhs_spec[1]
    if params["batch_group_count"] != 1 or count != 1 and isinstance(data.body, Sum) and data.body.is_constant:
        raise walk.refuse(
            data.near,
            "a grouped convolution of the input gives every group of channels another distribution",
            "put a Conv over all channels first; or " + _MEASURE,
            what="a grouped convolution",
        )
    split = ()
    if count != 1:  # the features as (groups, channels of a group)
        split = (count, data.shape[feature] // count)
        body, groups = reshaped(walk, data, (*data.shape[:feature], *split, *data.shape[feature + 1 :]))
        data = Field(body, groups, data.near)
    spatial, out_spatial = numbers.lhs_spec[2:], numbers.out_spec[2:]
    spatial = tuple(a + (count != 1 and a > feature) for a in spatial)
    out_shape = walk.program.body.avals[walk.equation.outputs[0]].shape
    if any(data.groups[a] != 1 for a in spatial):
        raise walk.refuse(data.near, "positions and channels were merged into one axis before", _MEASURE)
    starts = np.concatenate([[0], np.cumsum(data.groups)])
    weights = kernel.transposed((*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    window = weights.shape[:-2]
    bodies, result = [], None
    for taps in itertools.product(*map(range, window)):
        windows: list[Window | None] = [None] * len(data.body.axes)
        for i, tap in enumerate(taps):
            axis = int(starts[spatial[i]])
            shift = tap * params["rhs_dilation"][i] - params["padding"][i][0]
            windows[axis] = Window.tap(
                data.body.axes[axis].size,
                out_shape[out_spatial[i]],
                params["window_strides"][i],
                shift,
                params["lhs_dilation"][i],
            )
        if any(w is not None and w.count == 0 for w in windows):
            continue  # the tap only ever meets padding
        body = data.body
        if any(w is not None and not w.is_identity(a.size) for w, a in zip(windows, body.axes, strict=True)):
            body = walk.arena.relayout(body, Relayout("window", tuple(windows)))
        ends = tuple(t + 1 for t in taps)
        one = weights.sliced((*taps, 0, 0), (*ends, *weights.shape[-2:]), (1,) * len(weights.shape))
        one = one.reshaped(weights.shape[-2:])
        assert one is not None
        tap = Field(body, data.groups, data.near)
        if split:
            one = one.reshaped((one.shape[0], count, one.shape[1] // count))
            assert one is not None
            result = contract(walk, tap, one, (feature + 1,), (0,), False, batch=((feature,), (1,)))
        else:
            result = contract(walk, tap, one, (feature,), (0,), False)
        bodies.append(result.body)
    if result is None:
        return [zeros(walk)]
    field = Field(total(walk, bodies) if len(bodies) > 1 else bodies[0], result.groups, result.near)
    if split:  # the groups beside the channels that each of them makes, as one axis
        last = len(field.shape) - 1
        moved, groups = transposed(walk, field, [i for i in range(last) if i != feature] + [feature, last])
        field = Field(moved, groups, field.near)
        body, groups = reshaped(walk, field, (*field.shape[:-2], field.shape[-2] * field.shape[-1]))
        field = Field(body, groups, field.near)
    # contract leaves the kept axes in the data's order and the channels last
    order = [axis for axis in range(len(out_shape)) if axis != numbers.lhs_spec[1]]
    names = {axis: numbers.out_spec[numbers.lhs_spec.index(axis)] for axis in order}
    layout = [names[axis] for axis in order] + [numbers.out_spec[1]]
    if layout != sorted(layout):
        moved, groups = transposed(walk, field, [layout.index(i) for i in range(len(layout))])
        field = Field(moved, groups, field.near)
    if not kernel.tangent:
        walk.record(field.near, field)
    return [field]


def _window_sum(walk: Walk, operands):
    assert walk.equation is not None
    params, (value,) = walk.equation.params, operands
    if not isinstance(value, Field):
        raise walk.refuse("", "a window over a weight", _MEASURE)
    body = value.body
    at = 0
    for i, count in enumerate(value.groups):
        size, stride, (low, high) = params["window_dimensions"][i], params["window_strides"][i], params["padding"][i]
        base, dilation = params["base_dilation"][i], params["window_dilation"][i]
        if (size, stride, low, high, base) != (1, 1, 0, 0, 1):
            axis = body.axes[at]
            if count != 1 or axis.channel or base != 1:
                raise walk.refuse(value.near, "a window over channels mixes independent entries", _MEASURE)
            out = walk.program.body.avals[walk.equation.outputs[0]].shape[i]
            matrix = np.zeros((out, axis.size))
            for j, k in itertools.product(range(out), range(size)):
                source = j * stride + k * dilation - low
                if 0 <= source < axis.size:
                    matrix[j, source] += 1.0
            body = walk.arena.relayout(body, Relayout("matrix", (at, Box(matrix))))
        at += count
    return [Field(body, value.groups, value.near)]


def _pad(walk: Walk, operands):
    assert walk.equation is not None
    value, filler = operands
    if not isinstance(value, Field) or not isinstance(filler, Const) or filler.scalar != 0:
        raise walk.refuse(near_of(operands), "padding with values that are not zero", _MEASURE)
    windows: list[Window | None] = []
    for size, count, (low, high, interior) in zip(
        value.shape, value.groups, walk.equation.params["padding_config"], strict=True
    ):
        if (low, high, interior) == (0, 0, 0):
            windows += [None] * count
            continue
        if count != 1 or value.body.axes[len(windows)].channel:
            raise walk.refuse(
                value.near, "channels are padded: the new ones are not distributed as the others", _MEASURE
            )
        out = low + high + size + (size - 1) * interior
        windows.append(Window.tap(size, out, 1, -low, interior + 1))
    body = walk.arena.relayout(value.body, Relayout("window", tuple(windows)))
    return [Field(body, value.groups, value.near)]


def _concatenate(walk: Walk, operands):
    """Along positions: every part is padded to the whole length, and the parts are added. Along channels: a `Cat`."""
    assert walk.equation is not None
    axis = walk.equation.params["dimension"]
    fields = [v for v in operands if isinstance(v, Field)]
    like = next((f for f in fields if isinstance(f.body, Tangent)), fields[0] if fields else None)
    if like is None or any(any(a.channel for a in _axes_at(f, axis)) or f.groups[axis] != 1 for f in fields):
        return [concatenated(walk, operands)]
    at, length = sum(like.groups[:axis]), sum(v.shape[axis] for v in operands)
    bodies, before = [], 0
    for value in operands:
        size = value.shape[axis]
        if not (isinstance(value, Const) and value.scalar == 0):
            body = _beside(walk, value, like, axis)
            windows: list[Any] = [None] * len(body.axes)
            windows[at] = Window(length, before, 1, 0, 1, size)
            bodies.append(walk.arena.relayout(body, Relayout("window", tuple(windows))))
        before += size
    return [Field(total(walk, bodies) if len(bodies) > 1 else bodies[0], like.groups, near_of(operands))]


def _stack(walk: Walk, operands):
    """Along a new axis: each operand gets an axis of size 1, then they are concatenated."""
    assert walk.equation is not None
    axis, out = walk.equation.params.get("axis", 0), walk.out_shape
    one = (*out[:axis], 1, *out[axis + 1 :])
    parts = [walk.step("reshape", reshape_to(one), [v], one) for v in operands]
    return [walk.step("concatenate", {"dimension": axis}, parts, out)]


def by_matrix(walk: Walk, value: Field, axis: int, matrix: np.ndarray) -> Field:
    """A known matrix (out, in) along positions; over channels it is refused."""
    at = sum(value.groups[:axis])
    if value.groups[axis] != 1 or value.body.axes[at].channel:
        raise walk.refuse(
            value.near,
            "a fixed matrix acts on random activations: over channels this mixes independent entries with given "
            "numbers, and no central limit theorem applies",
            "make the matrix a random weight, or apply it to the input",
        )
    body = walk.arena.relayout(value.body, Relayout("matrix", (at, Box(matrix))))
    return Field(body, value.groups, value.near)


def _cumulative(walk: Walk, operands):
    assert walk.equation is not None
    (value,), params = operands, walk.equation.params
    if not isinstance(value, Field):
        raise walk.refuse("", "a cumulative sum of a weight", _MEASURE)
    size = value.shape[params["axis"]]
    matrix = np.tri(size).T if params["reverse"] else np.tri(size)
    return [by_matrix(walk, value, params["axis"], matrix)]


def _axes_at(field: Field, axis: int):
    start = sum(field.groups[:axis])
    return field.body.axes[start : start + field.groups[axis]]


def _beside(walk: Walk, value, like: Field, axis: int) -> Any:
    """A part of a concatenation on the axes of its neighbour."""
    at = sum(like.groups[:axis])
    axes = tuple(Axis(value.shape[axis], a.channel) if i == at else a for i, a in enumerate(like.body.axes))
    pattern = Field(walk.arena.sum(axes, ()), like.groups, like.near)
    if isinstance(value, WeightView):
        value = walk.as_field(value, pattern)
    elif isinstance(value, Const):
        value = Field(walk.arena.sum(axes, (), const_along(walk, value, pattern)), like.groups, like.near)
    if type(value.body) is not type(like.body):
        raise walk.refuse(like.near, "a value and a derivative are concatenated", _MEASURE)
    return match(walk, value, pattern).body


RULES |= {
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _window_sum,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "cumsum": _cumulative,
}
