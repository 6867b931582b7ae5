"""Reshapes, transposes, slices and sums: steps that move entries or add them up."""

import math
from typing import Any

import numpy as np

from initjax.trace.align import MEASURE, broadcast, zeros
from initjax.trace.channels import channels_of
from initjax.trace.domain import Atom, Const, Field, Lin, Sum, Tangent
from initjax.trace.maps import Axis, Relayout, xp_of
from initjax.trace.rules import RULES
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, const, near_of


def _shape_rule(walk: Walk, operands):
    assert walk.equation is not None
    name, params, value = walk.equation.name, walk.equation.params, operands[0]
    if len(operands) > 1 or name == "reshape" and params.get("dimensions") is not None:
        raise walk.refuse(near_of(operands), "shapes or indices that depend on data", MEASURE)
    shape = tuple(walk.program.body.avals[walk.equation.outputs[0]].shape)
    if isinstance(value, WeightView):
        return [_weight_shape(walk, value, shape)]
    body, groups = value.body, value.groups
    if name in ("reshape", "squeeze", "expand_dims"):
        body, groups = reshaped(walk, value, shape)
    elif name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        inserted = [1] * len(shape)
        for axis, target in enumerate(dims):
            inserted[target] = value.shape[axis]
        body, groups = reshaped(walk, value, tuple(inserted))
        if tuple(inserted) != shape:
            moved = broadcast(walk, Field(body, groups, value.near), shape, "its new shape")
            body, groups = moved.body, moved.groups
    elif name == "transpose":
        body, groups = transposed(walk, value, params["permutation"])
    elif name in ("slice", "rev"):
        body = _indexed(walk, value)
    return [Field(body, groups, value.near)]


def _weight_shape(walk: Walk, view: WeightView, shape: tuple[int, ...]) -> WeightView:
    assert walk.equation is not None
    name, params = walk.equation.name, walk.equation.params
    if name in ("reshape", "squeeze", "expand_dims"):
        new = view.reshaped(shape)
        if new is None:
            raise walk.refuse(
                "",
                f"the weight {walk.leaf_name(view)} is reshaped after a transpose",
                "reshape it before",
                what="reshape",
            )
        return new
    if name == "broadcast_in_dim":
        return view.broadcast(shape, params["broadcast_dimensions"])
    if name == "transpose":
        return view.transposed(params["permutation"])
    if name == "rev":
        return view.reversed(params["dimensions"])
    steps = params["strides"] or (1,) * len(shape)
    return view.sliced(params["start_indices"], params["limit_indices"], steps)


def reshaped(walk: Walk, field: Field, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """Regroup the axes: boundaries that fall inside an axis split it, neighbours of one kind merge."""
    queue = [a for a in field.body.axes if a.size != 1]
    axes: list[Axis] = []
    groups: list[int] = []
    for size in shape:
        group: list[Axis] = []
        product = 1
        while product < size:
            axis = queue.pop(0)
            need = size // product
            if axis.size > need:
                if size % product or axis.size % need:
                    raise walk.refuse(field.near, "a reshape cuts across axes of unequal length", MEASURE)
                queue.insert(0, Axis(axis.size // need, axis.channel))
                axis = Axis(need, axis.channel)
            product *= axis.size
            if group and group[-1].channel == axis.channel:
                group[-1] = Axis(group[-1].size * axis.size, axis.channel)
            else:
                group.append(axis)
        if product != size:
            raise walk.refuse(field.near, "a reshape cuts across axes of unequal length", MEASURE)
        if not group:
            # an axis of size 1 stays a channel if the old shape ends in one, as in a readout of width 1
            last = field.body.axes[-1] if field.body.axes else Axis(1, False)
            group = [Axis(1, last.channel and last.size == 1 and len(groups) == len(shape) - 1)]
        axes += group
        groups.append(len(group))
    return walk.arena.relayout(field.body, Relayout("reshape", tuple(axes))), tuple(groups)


def reshape_to(shape: tuple[int, ...]) -> dict:
    """Parameters of a reshape."""
    return {"new_sizes": shape, "dimensions": None, "sharding": None}


def transposed(walk: Walk, field: Field, permutation) -> tuple[Any, tuple[int, ...]]:
    """Body and groups of a field with its program axes permuted; channels keep their order."""
    starts = np.concatenate([[0], np.cumsum(field.groups)])
    order = [int(a) for p in permutation for a in range(starts[p], starts[p + 1])]
    channels = [a for a in order if field.body.axes[a].channel and field.body.axes[a].size > 1]
    if channels != sorted(channels):
        raise walk.refuse(
            field.near,
            "two channel axes change places: entry (i, j) becomes entry (j, i), which is another random number",
            MEASURE,
        )
    return walk.arena.relayout(field.body, Relayout("transpose", tuple(order))), tuple(
        field.groups[p] for p in permutation
    )


def _indexed(walk: Walk, field: Field):
    assert walk.equation is not None
    params, shape = walk.equation.params, field.shape
    if walk.equation.name == "rev":
        cuts = [(None, None, -1) if i in params["dimensions"] else (None, None, None) for i in range(len(shape))]
    else:
        steps = params["strides"] or (1,) * len(shape)
        ranges = zip(params["start_indices"], params["limit_indices"], steps, shape, strict=True)
        cuts = [(None, None, None) if a == 0 and b == n and c == 1 else (a, b, c) for a, b, c, n in ranges]
    return cut(walk, field, cuts)


def cut(walk: Walk, field: Field, cuts):
    at, per_axis, picks = 0, [], []
    for cut, count in zip(cuts, field.groups, strict=True):
        channel = any(a.channel for a in field.body.axes[at : at + count])
        if cut != (None, None, None) and channel:
            picks.append((at, cut))
            cut = (None, None, None)
        if cut != (None, None, None) and count > 1 or picks and picks[-1][0] == at and count > 1:
            raise walk.refuse(field.near, "it picks from an axis that merges positions and channels", MEASURE)
        per_axis += [cut] * count
        at += count
    body = field.body
    if any(cut != (None, None, None) for cut in per_axis):
        body = walk.arena.relayout(body, Relayout("index", tuple(per_axis)))
    for axis, cut in picks:
        body = _picked(walk, field, body, axis, cut)
    return body


def _picked(walk: Walk, field: Field, body, axis: int, cut):
    """Some channels of a field: the same field made by some columns of the weights, independent of the others."""
    start, stop, step = slice(*cut).indices(body.axes[axis].size)
    picked = channels_of(walk, body, axis, (start, stop, step)) if step > 0 else None
    if picked is None:
        raise walk.refuse(
            field.near,
            "it picks some of the channels in a way that cannot be followed to the weights that made them",
            "use one Dense layer for each part",
        )
    return picked


def _split(walk: Walk, operands):
    assert walk.equation is not None
    (value,) = operands
    params = walk.equation.params
    axis, start, results = params["axis"], 0, []
    for size in map(int, params["sizes"]):
        if isinstance(value, WeightView):
            starts = [start if i == axis else 0 for i in range(len(value.shape))]
            limits = [start + size if i == axis else n for i, n in enumerate(value.shape)]
            results.append(value.sliced(starts, limits, (1,) * len(value.shape)))
        else:
            cuts: list[Any] = [(None, None, None)] * len(value.shape)
            cuts[axis] = (start, start + size, 1)
            results.append(Field(cut(walk, value, cuts), value.groups, value.near))
        start += size
    return results


def _reduce_sum(walk: Walk, operands):
    assert walk.equation is not None
    (value,) = operands
    if isinstance(value, WeightView):
        raise walk.refuse("", f"a sum over the weight {walk.leaf_name(value)} alone", MEASURE, what="a sum of weights")
    starts = np.concatenate([[0], np.cumsum(value.groups)])
    axes = [int(a) for p in walk.equation.params["axes"] for a in range(starts[p], starts[p + 1])]
    if any(value.body.axes[a].channel for a in axes):
        return [_mean_over_channels(walk, value, axes)]
    groups = tuple(count for p, count in enumerate(value.groups) if p not in walk.equation.params["axes"])
    return [Field(walk.arena.relayout(value.body, Relayout("sum", tuple(axes))), groups, value.near)]


def _is_shared(atom: Atom) -> bool:
    """Whether a tangent atom is one number for all channels."""
    if not isinstance(atom, Lin):
        return False
    if atom.map.kind == "broadcast":
        pairs = zip(atom.axes, atom.source.axes, strict=True)
        if any(a.channel and a.size > 1 and b.size == 1 for a, b in pairs):
            return True
    sums = [atom.source] if isinstance(atom.source, Sum) else [g for _, g in atom.source.parts]
    return any(_is_shared(a) for s in sums for a, _ in s.terms)


def _mean_over_channels(walk: Walk, value: Field, axes: list[int]) -> Const:
    """A sum over channels is their number times the mean: the law of large numbers."""
    assert walk.equation is not None
    shape = tuple(walk.program.body.avals[walk.equation.outputs[0]].shape)
    if isinstance(value.body, Tangent):  # tangents have mean zero; what is left is O(1 / sqrt(n))
        if any(_is_shared(atom) for _, g in value.body.parts for atom, _ in g.terms):
            raise walk.refuse(
                value.near,
                "a mean over channels follows a trainable number shared by all of them, so the mean's own tangent does "
                "not vanish",
                "let the gain have one entry a channel",
            )
        return zeros(walk)
    count = math.prod(value.body.axes[a].size for a in axes if value.body.axes[a].channel)
    if count < 32:
        walk.note(
            f"mean {value.near}",
            f"after {value.near}: a mean over {count} channels is replaced by its expectation; the finite network "
            f"differs by O(1/{count})",
        )
    walk.averaged = walk.refuse(
        value.near,
        "the output is a mean over channels (a cosine similarity, the mean of the features) and of nothing random "
        "besides: at infinite width it is one number for all networks, and its fluctuations and its tangent kernel are "
        "of lower order, which this theory neglects",
        "put a Dense layer behind the mean; or measure at finite width with ij.monte_carlo_kernels",
        what="an output that is a mean over channels",
    )
    mean = walk.mean(value.body)
    if mean is None:
        if not walk.is_divided(count):
            raise walk.refuse(
                value.near,
                f"a sum over {count} channels with mean zero is not divided by their number: its fluctuations, which "
                "the law of large numbers neglects, are all there is (a scalar product of two branches)",
                "divide by the number of channels; or measure at finite width with ij.empirical_ntk",
                what=f"{walk.equation.name} over channels",
            )
        return zeros(walk)
    kept = tuple(n if n > 1 else 1 for i, n in enumerate(np.shape(mean)) if i not in axes)
    mean = mean.sum(axis=tuple(axes)).reshape(kept) * float(count)
    if len(kept) != len(shape):  # positions that the program sees as one axis
        groups = [count for p, count in enumerate(value.groups) if p not in walk.equation.params["axes"]]
        full = [a for i, a in enumerate(value.body.axes) if i not in axes]
        xp = xp_of(mean)
        mean = xp.broadcast_to(mean, tuple(a.size for a in full)).reshape(shape) if max(groups) > 1 else mean
    return const(mean, shape) if np.shape(mean) == shape else Const(mean, shape)


RULES |= {
    "reshape": _shape_rule,
    "squeeze": _shape_rule,
    "expand_dims": _shape_rule,
    "broadcast_in_dim": _shape_rule,
    "transpose": _shape_rule,
    "slice": _shape_rule,
    "rev": _shape_rule,
    "split": _split,
    "reduce_sum": _reduce_sum,
}
