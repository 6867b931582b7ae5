"""Whether a program treats each example alone, read from its equations: the examples' axis is followed to the outputs.

A proof costs a trace and no compilation. Where a step is not known to keep examples apart (batch statistics, loops,
sorting by examples) there is no proof, and the caller has to measure.
"""

import math
from typing import Any

import jax

from initjax.trace.inline import Equation, inline
from initjax.trace.pointwise import is_pointwise

_SAME_SHAPE = frozenset("copy convert_element_type stop_gradient reduce_precision copy_p optimization_barrier".split())
_ALONG = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())


class _Mixed(Exception):
    """Examples meet, or may meet."""


def keeps_examples_apart(fn: Any, params: Any, x: Any) -> bool:
    """Whether no output of `fn(params, x)` depends on two examples, for sure; examples along the first axes of x."""
    try:
        body = inline(jax.make_jaxpr(fn)(params, x))
    except Exception:  # the measurement that follows meets it again, and explains it
        return False
    count = len(jax.tree.leaves(params))
    # number -> axis of the examples; what is not in here does not depend on them
    at = {n: 0 for n in body.inputs[count:]}
    size = {n: tuple(aval.shape) for n, aval in body.avals.items()}
    try:
        for equation in body.equations:
            if any(n in at for n in equation.inputs):
                axis = _after(equation, at, size)
                at.update(dict.fromkeys(equation.outputs, axis))
    except (_Mixed, ValueError, KeyError, IndexError):
        return False
    return all(at.get(n, 0) == 0 for n in body.outputs)


def _after(equation: Equation, at: dict[int, int], size: dict[int, tuple]) -> int:
    """The axis of the examples in an equation's results."""
    name, params = equation.name, equation.params
    shapes, out = [size[n] for n in equation.inputs], size[equation.outputs[0]]
    moving = [(i, at[n]) for i, n in enumerate(equation.inputs) if n in at]
    first, axis = moving[0]
    shape = shapes[first]
    alone = len(moving) == 1
    if is_pointwise(equation, shapes, out) or name in _SAME_SHAPE:
        # axes of size 1 are repeated
        return _one(a if len(shapes[i]) == len(out) and shapes[i][a] == out[a] else None for i, a in moving)
    if name == "concatenate":
        return _one(a if a != params["dimension"] else None for _, a in moving)
    if name == "dot_general":
        return _dot(params["dimension_numbers"], moving, [len(s) for s in shapes])
    if name == "gather":
        return _gather(params, moving, shapes)
    if name == "sort":
        return _one(a if a != params["dimension"] else None for _, a in moving)
    if not alone:
        raise _Mixed
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][axis])  # NumPy's integers, where a model has computed them
    if name == "reshape":
        before = math.prod(shape[:axis])
        places = [b for b in range(len(out)) if out[b] == shape[axis] and math.prod(out[:b]) == before]
        if params.get("dimensions") is not None or not places:
            raise _Mixed
        return places[-1]  # axes of size 1 in front hold nothing
    if name == "transpose":
        return list(map(int, params["permutation"])).index(axis)
    if name == "squeeze":
        return _without(axis, [int(d) % len(shape) for d in params["dimensions"]])
    if name == "expand_dims":
        return next(b for b in range(axis, len(out)) if b - sum(d <= b for d in params["dimensions"]) == axis)
    if name.startswith("reduce_window") or name in ("cumred", "select_and_gather_add"):
        trivial = params["window_dimensions"][axis] == 1 == params.get("window_strides", (1,) * 9)[axis]
        return axis if trivial and out[axis] == shape[axis] else _refuse()
    if name.startswith("reduce_") or name in ("argmax", "argmin"):
        return _without(axis, [int(d) for d in params["axes"]])
    if name in _ALONG:
        return axis if params["axis"] != axis else _refuse()
    if name == "rev":
        return axis if axis not in params["dimensions"] else _refuse()
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        whole = params["start_indices"][axis] == 0 and params["limit_indices"][axis] == shape[axis]
        return axis if whole and strides[axis] == 1 else _refuse()
    if name == "pad":
        return axis if first == 0 and tuple(params["padding_config"][axis]) == (0, 0, 0) else _refuse()
    if name == "split":
        return axis if params["axis"] != axis else _refuse()
    if name == "dynamic_slice":
        return axis if first == 0 and params["slice_sizes"][axis] == shape[axis] else _refuse()
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        fine = first == 0 and numbers.lhs_spec[0] == axis and params["batch_group_count"] == 1
        return numbers.out_spec[0] if fine else _refuse()
    raise _Mixed


def _refuse() -> int:
    raise _Mixed


def _one(axes) -> int:
    """The one axis that all operands agree on."""
    found = set(axes)
    if len(found) != 1 or None in found:
        raise _Mixed
    return found.pop()


def _without(axis: int, removed: list[int]) -> int:
    return axis - sum(d < axis for d in removed) if axis not in removed else _refuse()


def _dot(numbers, moving, ranks) -> int:
    (contracted, batch), places = numbers, []
    for side, axis in moving:
        if axis in batch[side]:
            places.append(list(batch[side]).index(axis))
            continue
        if axis in contracted[side] or len(moving) > 1:
            raise _Mixed
        taken = {*contracted[side], *batch[side]}
        offset = len(batch[0]) + (ranks[0] - len(contracted[0]) - len(batch[0])) * side
        places.append(offset + sum(d not in taken for d in range(axis)))
    return _one(places)


def _gather(params, moving, shapes) -> int:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    rank = len(shapes[1]) - 1 + len(numbers.offset_dims)
    between = [d for d in range(rank) if d not in numbers.offset_dims]  # of the result, running over the indices
    paired = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    places = []
    for side, axis in moving:
        if side == 1:
            places.append(between[axis] if axis < len(shapes[1]) - 1 else None)
        elif axis in paired:
            places.append(between[paired[axis]])
        else:
            gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
            whole = sizes[axis] == shapes[0][axis] and axis not in numbers.start_index_map and axis not in gone
            # with indices that follow the examples, an operand that does so elsewhere would be paired across them
            kept = [d for d in range(len(shapes[0])) if d not in gone]
            places.append(numbers.offset_dims[kept.index(axis)] if whole and len(moving) == 1 else None)
    return _one(places)
