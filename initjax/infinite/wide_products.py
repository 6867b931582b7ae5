"""Sums of products in a widened program: weights with data, and data with data."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from initjax.infinite.copies import Cloud, Known, Part, Weight, channel, merged, structural
from initjax.infinite.wide import Wide, bind, near_of
from initjax.infinite.wide_rules import RULES
from initjax.trace.flax import layer_of


def _dot_general(wide: Wide, operands):
    left, right = operands
    (lc, rc), (lb, rb) = wide.eqn.params["dimension_numbers"]
    lc, rc, lb, rb = map(tuple, (lc, rc, lb, rb))
    if isinstance(left, Weight) and isinstance(right, Weight):
        # the side with broadcast axes is data: learned tokens that go through a layer
        if all(left.labels) == all(right.labels):
            raise wide.refuse("two weights are multiplied before they meet the data", what="a product of weights")
        if not all(left.labels):
            left = wide.as_cloud(left, None)
        else:
            right = wide.as_cloud(right, None)
    if isinstance(right, Weight):
        return [_weighted(wide, left, right, lc, rc, lb, rb, weight_first=False)]
    if isinstance(left, Weight):
        return [_weighted(wide, right, left, rc, lc, rb, lb, weight_first=True)]
    return [_fields(wide, left, right, (lc, rc), (lb, rb))]


def _checked(wide: Wide, data, weight: Weight, contracted) -> None:
    """Whether a weight may sum over these axes of the data."""
    if not weight.plain:
        raise wide.refuse(
            f"a nonlinear function of the weight {wide.name(weight.leaves)} sums over channels, with unknown variance",
            near=near_of([data]),
        )
    for leaf in weight.leaves:
        stats = wide.leaves[leaf]
        if stats.kind == "structured":
            raise wide.refuse(f"the entries of {stats.name} are not identically distributed ({stats.note})")
        if stats.kind != "constant" and stats.mean != 0.0:
            raise wide.refuse(
                f"the entries of {stats.name} have mean {stats.mean:.6g}, not zero: sums over channels then grow like "
                "the width instead of its root",
                "use a centred initializer",
            )
        if stats.kind == "constant" and np.any(stats.value) and isinstance(data, Cloud):
            raise wide.refuse(f"the weight {stats.name} starts at known values: a fixed matrix acts on channels")
    if not isinstance(data, Cloud):
        return
    name = wide.name(weight.leaves)
    if not data.copies:
        raise wide.refuse(
            f"the weight {name} sums over finitely many random numbers that have no limit of infinite width (heads, "
            "gates, units that a nonlinearity has coupled)",
            near=data.layer,
        )
    channels = [i for i, group in enumerate(data.parts) if channel(group)]
    if channels and not any(i in contracted for i in channels):
        raise wide.refuse(
            f"the weight {name} sums over positions while channels stay free (token mixing): all channels share the "
            "same finite matrix and are not independent",
            near=data.layer,
            what="token mixing",
        )
    if channels and max(channels) not in contracted:
        size = math.prod(data.shape[i] for i in contracted if i in channels)
        if size < math.prod(data.shape[i] for i in channels if i not in contracted):
            raise wide.refuse(
                f"the weight {name} sums over the smaller of several channel axes: a finite structure", near=data.layer
            )


def _inputs(wide: Wide, data, weight: Weight):
    """Data and drawn weights with equal numbers of input copies: (copies of data, copies of weights)."""
    return data.array.shape[0] if isinstance(data, Cloud) and data.copies else 0


def _weighted(wide: Wide, data, weight: Weight, dc, wc, db, wb, weight_first: bool) -> Cloud:
    """y = m^{-1/2} sum over copies and channels of W x."""
    _checked(wide, data, weight, dc)
    roles = {i: "in" if i in wc else "out" for i in range(len(weight.shape))}
    uses = wide.use(weight, roles)
    free_w = [i for i in range(len(weight.shape)) if i not in wc and i not in wb]
    free_d = [i for i in range(len(data.shape)) if i not in dc and i not in db]
    finite = bool(weight.leaves & wide.plan.finite)
    count = 1 if finite else -(-wide.width // max(1, math.prod(weight.shape[i] for i in free_w)))
    drawn = wide.draw(weight, count, _inputs(wide, data, weight))[:count]
    x, drawn = matched(data, drawn)
    dims_x = ((0, *(i + 1 for i in dc)), tuple(i + 1 for i in db))
    dims_w = ((1, *(i + 2 for i in wc)), tuple(i + 2 for i in wb))
    if weight_first:
        numbers = ((dims_w[0], dims_x[0]), (dims_w[1], dims_x[1]))
        y = jax.lax.dot_general(drawn, x, numbers)
        at = len(db)
    else:
        numbers = ((dims_x[0], dims_w[0]), (dims_x[1], dims_w[1]))
        y = jax.lax.dot_general(x, drawn, numbers)
        at = len(db) + len(free_d)
    y = jnp.moveaxis(y, at, 0) / math.sqrt(x.shape[0])
    wide.plan.work += 2.0 * y.size * math.prod(drawn.shape[i] for i in dims_w[0])
    rest = lambda axes: [_kept(data, i) for i in axes]  # noqa: E731
    channels = [(Part(weight.shape[i], "c"),) for i in free_w]
    parts = tuple(rest(db) + (channels + rest(free_d) if weight_first else rest(free_d) + channels))
    return finished(wide, y, parts, finite, weight, uses)


def matched(data, drawn):
    """Data with a leading axis of copies, as many as the weights have for their inputs; known data is repeated."""
    if isinstance(data, Cloud) and data.copies:
        into = min(data.array.shape[0], drawn.shape[1])
        return data.array[:into], drawn[:, :into]
    return jnp.broadcast_to(data.array, (drawn.shape[1], *data.array.shape)), drawn


def finished(wide: Wide, y, parts, finite: bool, weight: Weight, uses) -> Cloud:
    """The output of a weight, recorded under the module that owns it."""
    cloud = (
        Cloud(y[0], structural(parts), False, weight.leaves, uses)
        if finite
        else Cloud(y, parts, True, weight.leaves, uses)
    )
    if not finite:
        channels = math.prod(p.size for group in parts for p in group if p.kind == "c")
        wide.plan.narrowest = min(wide.plan.narrowest, channels * y.shape[0])
    owners = {layer_of(wide.leaves[leaf].name) for leaf in weight.leaves}
    layer = owners.pop() if len(owners) == 1 else _common(sorted(owners))
    return wide.record(layer, cloud)


def _common(owners: list[str]) -> str:
    """The innermost module that owns all of several, such as the cell of stacked gates."""
    paths = [owner.split("/") for owner in owners]
    same = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
    return "/".join(same) or owners[0]


def _kept(data, axis: int):
    """What an axis of the data that is not summed becomes: channels of other axes stand for themselves from now on."""
    if isinstance(data, Known):
        return (Part(data.shape[axis], "p"),)
    return merged([Part(p.size, "p" if p.kind == "c" else p.kind) for p in data.parts[axis]])


# ------------------------------------------------------------------ data with data


def _fields(wide: Wide, left, right, contracted, batch) -> Cloud:
    sides = [v for v in (left, right)]
    channels = [
        set(i for i, g in enumerate(v.parts) if channel(g)) if isinstance(v, Cloud) and v.copies else set()
        for v in sides
    ]
    copied = [isinstance(v, Cloud) and v.copies for v in sides]
    hit = [channels[k] & set(contracted[k]) for k in (0, 1)]
    free = [channels[k] - set(contracted[k]) - set(batch[k]) for k in (0, 1)]
    near = near_of(sides)
    function = bind(wide.eqn)
    if all(copied):
        for k in (0, 1):
            paired = {contracted[1 - k][contracted[k].index(i)] for i in hit[k]}
            if paired - hit[1 - k]:
                wide.make_finite(sides[k].carriers, "channels of one field are summed with positions of another")
        if any(hit):
            if any(free):
                raise wide.refuse("some channels are summed and others stay free on one side of a product", near=near)
            array, _ = wide.each(function, sides)
            scores = jnp.tensordot(mixing(array.shape[0]), array, 1)
            wide.plan.work += 2.0 * array.size
            return Cloud(scores, structural(_outcome(sides, contracted, batch)), False)
        for k in (0, 1):
            if free[k] and not channels[1 - k]:
                wide.make_finite(sides[1 - k].carriers, "one random number for all channels meets each of them")
        if all(free):
            raise wide.refuse("every channel of one field meets every channel of another (an outer product)", near=near)
    elif any(copied):
        k = copied.index(True)
        left_over = channels[k] - set(contracted[k])
        if hit[k] and (not left_over or max(hit[k]) > max(left_over)):
            raise wide.refuse(
                "a fixed matrix acts on random activations: over channels this mixes independent entries with given "
                "numbers, and no central limit theorem applies",
                "make the matrix a random weight, or apply it to the input",
                near=near,
            )
    array, copies = wide.each(function, sides)
    wide.plan.work += 2.0 * array.size * math.prod(sides[0].shape[i] for i in contracted[0])
    parts = _outcome(sides, contracted, batch)
    carriers = frozenset().union(*(v.carriers for v in sides if isinstance(v, Cloud) and v.copies))
    linear = [v.linear for v in sides if isinstance(v, Cloud)]
    return Cloud(
        array, parts if copies else structural(parts), copies, carriers, linear[0] if len(linear) == 1 else None
    )


def mixing(count: int):
    """Weights w of the copies with sum w = sum w^2 = 1."""
    if count == 1:
        return jnp.ones(1)
    if count == 2:
        return jnp.asarray([1.0, 0.0])
    wave = np.cos(2 * np.pi * np.arange(count) / count + 1.0)
    wave -= wave.mean()
    return jnp.asarray(1 / count + wave / np.linalg.norm(wave) * math.sqrt(1 - 1 / count))


def _outcome(sides, contracted, batch):
    """Parts of a product: batch axes, then free axes of either side."""
    groups = [v.parts if isinstance(v, Cloud) else tuple((Part(n, "b"),) for n in v.shape) for v in sides]
    ranked = [1 if isinstance(v, Cloud) and v.wide else 0 for v in sides]
    lead = ranked.index(max(ranked))
    out = [groups[lead][i] for i in batch[lead]]
    for k in (0, 1):
        out += [groups[k][i] for i in range(len(sides[k].shape)) if i not in contracted[k] and i not in batch[k]]
    return tuple(merged([Part(p.size, "p" if p.kind == "b" else p.kind) for p in group]) for group in out)


# ------------------------------------------------------------------ convolutions


def _convolution(wide: Wide, operands):
    data, kernel = operands
    params = wide.eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    feature = numbers.lhs_spec[1]
    if params["batch_group_count"] != 1 or isinstance(data, Weight) or isinstance(kernel, Cloud):
        raise wide.refuse("a convolution whose kernel is data, or in groups of the batch", near=near_of(operands))
    depthwise = isinstance(data, Cloud) and data.copies and groups > 1 and data.shape[feature] // groups < groups
    if isinstance(kernel, Known):
        if not isinstance(data, Cloud) or groups != data.shape[feature]:
            raise wide.refuse(
                "a convolution with a known kernel (a blur) acts on random activations: over channels no central limit "
                "theorem applies",
                what="a convolution with a fixed kernel",
                near=near_of(operands),
            )
        array, copies = wide.each(bind(wide.eqn), operands)
        return [dataclasses.replace(data, array=array, parts=_spatial(wide, data), copies=copies, layer="")]
    out_axis, in_axis = numbers.rhs_spec[:2]
    if isinstance(data, Cloud) and data.copies and not channel(data.parts[feature]) and data.shape[feature] > 1:
        raise wide.refuse(
            f"the weight {wide.name(kernel.leaves)} sums over positions while channels stay free (token mixing): all "
            "channels share the same finite matrix and are not independent",
            near=data.layer,
            what="token mixing",
        )
    if not depthwise:
        _checked(wide, data, kernel, (feature,))
    roles = {i: "out" for i in range(len(kernel.shape))} | ({} if depthwise else {in_axis: "in"})
    uses = wide.use(kernel, roles)
    finite = bool(kernel.leaves & wide.plan.finite)
    outputs = kernel.shape[out_axis]
    if depthwise:
        count = data.array.shape[0]
        drawn = wide.draw(kernel, count, 1)[:count, 0]
        y, _ = wide.each(bind(wide.eqn), [data, Cloud(drawn, (), True)])
    else:
        count = 1 if finite else -(-wide.width // outputs)
        drawn = wide.draw(kernel, count, _inputs(wide, data, kernel))[:count]
        x, drawn = matched(data, drawn)
        y = _folded(wide, x, drawn, groups)
    wide.plan.work += 2.0 * y.size * math.prod(drawn.shape) / max(1, drawn.shape[0] * outputs)
    return [finished(wide, y, _spatial(wide, data), finite, kernel, uses)]


def _folded(wide: Wide, x, kernel, groups: int):
    """A convolution with input copies as channels of every group, and output copies likewise."""
    params = wide.eqn.params
    numbers = params["dimension_numbers"]
    feature, (out_axis, in_axis) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
    into, count = x.shape[0], kernel.shape[0]
    x = _fold(x, feature, groups)
    kernel = _fold(jnp.moveaxis(kernel, 1, 0), in_axis + 1, 1)  # (input copies, output copies, ...)
    kernel = _fold(kernel, out_axis, groups)
    params = {**params, "preferred_element_type": None}
    y = wide.eqn.primitive.bind(x, kernel, **params) / math.sqrt(into)
    feature = numbers.out_spec[1]
    shape = y.shape
    per_group = shape[feature] // (groups * count)
    y = y.reshape(*shape[:feature], groups, count, per_group, *shape[feature + 1 :])
    y = jnp.moveaxis(y, feature + 1, 0)
    return y.reshape(count, *shape[:feature], groups * per_group, *shape[feature + 1 :])


def _fold(array, axis: int, groups: int):
    """(copies, ..., groups * n, ...) -> (..., groups * copies * n, ...), the program's axis `axis`."""
    copies, shape = array.shape[0], array.shape[1:]
    array = array.reshape(copies, *shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    array = jnp.moveaxis(array, 0, axis + 1)
    return array.reshape(*shape[:axis], copies * shape[axis], *shape[axis + 1 :])


def _spatial(wide: Wide, data):
    """Axes of the output: the batch as it was, windows over positions, channels."""
    numbers = wide.eqn.params["dimension_numbers"]
    shape = tuple(wide.eqn.outvars[0].aval.shape)
    parts: list[tuple[Part, ...]] = [(Part(n, "p"),) for n in shape]
    if isinstance(data, Cloud):
        parts[numbers.out_spec[0]] = _kept(data, numbers.lhs_spec[0])
    parts[numbers.out_spec[1]] = (Part(shape[numbers.out_spec[1]], "c"),)
    return tuple(parts)


RULES |= {"dot_general": _dot_general, "conv_general_dilated": _convolution}
