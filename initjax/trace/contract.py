"""Contractions with weights: the one place where Gaussians are made.

sum_k W_ik x_k over channels is Gaussian by the central limit theorem when the entries x_k are i.i.d. and W is used in
one role only. Everything else that `dot_general` can express is refused.
"""

import dataclasses

import numpy as np

from initjax.trace.align import zeros
from initjax.trace.domain import Base, Const, Field, Sum, Tangent
from initjax.trace.flax import layer_of
from initjax.trace.maps import Axis, xp_of
from initjax.trace.rules import RULES
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, contraction_pattern, near_of

_MEASURE = "measure this model at finite width with ij.empirical_ntk"


def _dot_general(walk: Walk, operands):
    assert walk.equation is not None
    left, right = operands
    if any(isinstance(v, Const) and v.scalar == 0 for v in operands):
        return [zeros(walk)]
    (lc, rc), (lb, rb) = walk.equation.params["dimension_numbers"]
    if isinstance(left, WeightView) == isinstance(right, WeightView):
        raise walk.refuse(near_of(operands), *_no_weight(left, right))
    if lb:
        raise walk.refuse(
            near_of(operands),
            "a contraction in which weights and data share a batch axis (one matrix for each position or head) is not "
            "covered yet",
            _MEASURE,
        )
    if isinstance(right, WeightView):
        return [contract(walk, left, right, lc, rc, weight_first=False)]
    return [contract(walk, right, left, rc, lc, weight_first=True)]


def contract(
    walk: Walk, data, view: WeightView, data_axes, weight_axes, weight_first: bool, gaussian: bool = True
) -> Field:
    """The field sum_k W_k. x_.k over the given program axes of the data; Gaussian unless said otherwise."""
    if isinstance(data, Const):
        data = Field(walk.as_sum(data), (1,) * len(data.shape))
    near, body = data.near, data.body
    starts = np.concatenate([[0], np.cumsum(data.groups)])
    pairs = sorted(zip(data_axes, weight_axes, strict=True))
    contracted = [int(a) for d, _ in pairs for a in range(starts[d], starts[d + 1])]
    free = [a for a in range(len(view.shape)) if a not in weight_axes]
    sizes = tuple(body.axes[a].size for a in contracted)
    moved = view.transposed([w for _, w in pairs] + free).reshaped(sizes + tuple(view.shape[a] for a in free))
    name = walk.leaf_name(view)
    if moved is None or any(s == 0 and n > 1 for n, s in zip(moved.shape, moved.strides, strict=True)):
        raise walk.refuse(near, f"the weight {name} is repeated or permuted inside the contraction", _MEASURE)
    _check_channels(walk, body, contracted, name, near)
    walk.check_iid(view, near)
    # the contracted axes in the order of the weights' strides: partners in any other use of these weights
    strides = [abs(s) if n > 1 else 0 for s, n in zip(moved.strides, moved.shape, strict=True)]
    order = sorted(range(len(contracted)), key=lambda i: -strides[i])
    by_stride = tuple(contracted[i] for i in order)
    moved = moved.transposed([*order, *range(len(contracted), len(moved.shape))])
    walk.use("contracted", moved, contraction_pattern(body.axes, by_stride, moved), near)
    _clt_note(walk, view, body, sizes, contracted, gaussian)

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


def _check_channels(walk: Walk, body, contracted, name: str, near: str) -> None:
    if isinstance(body, Sum) and body.is_constant:
        return
    channels = [i for i, a in enumerate(body.axes) if a.channel]
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
            f"the weight {name} sums over one of several channel axes; grouped layers are not covered yet",
            _MEASURE,
        )
    raise walk.refuse(
        near,
        f"the weight {name} sums over positions while channels stay free (token mixing): all channels share the same "
        "finite matrix and are not independent",
        _MEASURE,
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
            "a product of two random fields (attention scores, bilinear layers) is not a Gaussian field; it is not "
            "covered yet",
            _MEASURE,
        )
    return (
        "a fixed matrix acts on random activations: over channels this mixes independent entries with given numbers, "
        "and no central limit theorem applies",
        "make the matrix a random weight, or apply it to the input",
    )


def _gather(walk: Walk, operands):
    """Rows of an embedding, picked by known indices: the contraction with a one-hot array."""
    assert walk.equation is not None
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
