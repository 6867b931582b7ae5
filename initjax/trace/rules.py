"""What every primitive does to the values of the domain.

A rule takes the walk and the operands (Const, WeightView, Field) of the current equation and returns its results, or
raises `UnsupportedLayerError`. Equations whose operands are all known arrays are evaluated as they stand.
"""

import math
from typing import Any

import numpy as np

from initjax.trace import expr as ex
from initjax.trace.channels import channels_of
from initjax.trace.domain import Atom, Base, Const, Ew, Field, Lin, Product, Sum, Tangent
from initjax.trace.graph import carries
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axis, Relayout, xp_of
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, const, near_of

_MEASURE = "measure this model at finite width with ij.empirical_ntk; or rewrite this step"
_KEEPS_UNIFORM = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "rev", "copy", "stop_gradient"}


def const_rule(walk: Walk, operands: list[Const]) -> list[Const]:
    """Evaluate an equation of known arrays; what is uniform stays one number."""
    equation = walk.equation
    assert equation is not None
    shapes = [tuple(walk.program.body.avals[n].shape) for n in equation.outputs]
    leaf = operands[0].leaf if len(operands) == 1 else ""
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


# ------------------------------------------------------------------ bringing operands onto common axes


def aligned(walk: Walk, operands: list) -> tuple[list[Any], Field]:
    """Operands of an elementwise equation as bodies on common axes (scalars stay Const), and a field as the pattern."""
    assert walk.equation is not None
    shape = tuple(walk.program.body.avals[walk.equation.outputs[0]].shape)
    fields = [v for v in operands if isinstance(v, Field)]
    # the widest field sets the axes: the one that needs no broadcasting along channels
    like = max(fields, key=lambda f: (math.prod(f.shape), sum(a.channel for a in f.body.axes)))
    if like.shape != shape:
        partner = next((v for v in operands if isinstance(v, (Const, WeightView)) and v.shape == shape), None)
        like = _broadcast(walk, like, shape, "another operand" if partner is None else type(partner).__name__)
    fields = [_match(walk, f, like) for f in fields]
    like = next((f for f in fields if f.body.axes == fields[0].body.axes), like)
    bodies, it = [], iter(fields)
    for value in operands:
        if isinstance(value, Field):
            bodies.append(next(it).body)
        elif isinstance(value, WeightView):
            bodies.append(_match(walk, walk.as_field(value, like), like).body)
        elif value.scalar is not None:
            bodies.append(value)
        else:
            bodies.append(walk.arena.sum(like.body.axes, (), _const_along(walk, value, like)))
    near = near_of(fields)
    return bodies, Field(like.body, like.groups, near)


def _match(walk: Walk, field: Field, like: Field) -> Field:
    """A field on the axes of `like`, broadcast over positions where it has size 1."""
    if field.body.axes == like.body.axes:
        return field
    if field.shape != like.shape:
        field = _broadcast(walk, field, like.shape, like.near or "another field", like)
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
        _MEASURE,
        what=f"{_name(walk)} of a field over channels and one over positions",
    )


def _broadcast(walk: Walk, field: Field, shape: tuple[int, ...], partner: str, like: Field | None = None) -> Field:
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
                    _MEASURE,
                    what=f"{_name(walk)} that repeats a channel of size 1 over the {shape[i]} channels of {partner}",
                )
            target.append(Axis(shape[i], wide))
        at += count
    body = walk.arena.relayout(field.body, Relayout("broadcast", tuple(target)))
    return Field(body, field.groups, field.near)


def _const_along(walk: Walk, value: Const, like: Field):
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
            raise walk.refuse(like.near, "shapes cannot be aligned", _MEASURE)
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
                what=f"{_name(walk)} with a known array along channels",
            )
        array = first
    return array


def _name(walk: Walk) -> str:
    return walk.equation.name if walk.equation is not None else ""


# ------------------------------------------------------------------ arithmetic


def scaled(walk: Walk, body, factor) -> Any:
    """factor * body, for a number or an array over positions."""
    if isinstance(body, Tangent):
        return Tangent(body.axes, tuple((c, walk.arena.scaled(g, factor)) for c, g in body.parts))
    return walk.arena.scaled(body, factor)


def total(walk: Walk, bodies: list) -> Any:
    """The sum of Sums, or of Tangents."""
    arena, axes = walk.arena, bodies[0].axes
    if isinstance(bodies[0], Tangent):
        return Tangent(axes, _collected(walk, [part for body in bodies for part in body.parts]))
    constant = bodies[0].constant
    for body in bodies[1:]:
        constant = constant + body.constant
    return arena.fused(arena.sum(axes, [term for body in bodies for term in body.terms], constant))


def _collected(walk: Walk, parts: list) -> tuple:
    """Parts with one coefficient, or with one tangent up to a factor, become one: phi' is then a single function."""
    arena = walk.arena
    by_coefficient: dict[int, list] = {}
    for c, g in parts:
        by_coefficient.setdefault(id(c), [c, []])[1].append(g)
    by_tangent: dict[int, list] = {}
    for c, gs in by_coefficient.values():
        leaf, factor = arena.leaf_of(total(walk, gs) if len(gs) > 1 else gs[0])
        by_tangent.setdefault(id(leaf), [leaf, []])[1].append((c, factor))
    merged = []
    for leaf, uses in by_tangent.values():
        if all(c is None for c, _ in uses):
            merged.append((None, arena.scaled(leaf, sum(factor for _, factor in uses))))
            continue
        ones = [arena.sum(leaf.axes, (), factor) if c is None else arena.scaled(c, factor) for c, factor in uses]
        merged.append((total(walk, ones) if len(ones) > 1 else ones[0], leaf))
    return tuple(merged)


def product(walk: Walk, left: Sum, right: Sum, near: str) -> Sum:
    """The product of two primal fields: scaling, one function of a common leaf, or a product to be judged later."""
    for one, other in ((left, right), (right, left)):
        if one.is_constant:
            return scaled(walk, other, one.constant)
    import jax

    arena = walk.arena
    if arena.common_leaf([left, right]) is not None:
        return _function(walk, jax.lax.mul_p, {}, [left, right], near)
    atom = arena.atom(Product, (id(left), id(right)), left.axes, left, right)
    # its mean over channels is exact; whether more is asked of it, and whether that is exact, the end of the walk tells
    walk.doubts.setdefault(atom.number, walk.refuse(near, *_why_no_leaf(walk, [left, right])))
    return arena.sum(left.axes, [(atom, 1.0)])


def _function(walk: Walk, primitive, params: dict, bodies: list, near: str, dtype=None) -> Sum:
    arena = walk.arena
    sums = [b for b in bodies if isinstance(b, Sum)]
    leaf = arena.common_leaf(sums)
    if leaf is None:
        raise walk.refuse(near, *_why_no_leaf(walk, sums))
    args = []
    for body in bodies:
        if isinstance(body, Const):
            args.append(ex.literal(body.scalar))
        else:
            args.append(arena.as_expr(body, leaf))
    return arena.function(leaf, ex.apply(primitive, params, args, dtype))


def _why_no_leaf(walk: Walk, sums: list[Sum]) -> tuple[str, str]:
    atoms = [atom for s in sums for atom, _ in s.terms]
    bias = next((found for a in atoms if (found := _odd_bias(a)) is not None), None)
    if bias is not None:
        name = walk.leaf_name(bias.view)
        return (
            f"the weight {name} is random but not Gaussian, and it enters the nonlinearity directly, without a sum "
            "over many entries",
            f"initialise {name} with jax.nn.initializers.normal or with zeros",
        )
    if any(not isinstance(s.constant, float) for s in sums) or any(
        isinstance(a, Ew) and not isinstance(c, float) for s in sums for a, c in s.terms
    ):
        return (
            "a known array that varies over positions enters the nonlinearity, which is then another function at every "
            "position",
            _MEASURE,
        )
    return (
        "it is a nonlinear function of several different random fields (a gate, a product, or a nonlinearity after a "
        "sum with activations); only functions of one Gaussian pre-activation are exact here",
        "apply the nonlinearity before the sum (pre-activation residual); or " + _MEASURE,
    )


def _odd_bias(atom: Atom) -> Base | None:
    """The random bias that is not Gaussian behind an atom, if there is one."""
    if isinstance(atom, Base):
        return None if atom.gaussian else atom
    terms = atom.source.terms if isinstance(atom, Lin) and isinstance(atom.source, Sum) else ()
    return next((found for a, _ in terms if (found := _odd_bias(a)) is not None), None)


def _add(walk: Walk, operands, sign: float = 1.0):
    plain = _weights_only(walk, operands)
    if plain is not None:
        return plain
    bodies, like = aligned(walk, operands)
    axes = like.body.axes
    tangents = [b for b in bodies if isinstance(b, Tangent)]
    signed = []
    for position, body in enumerate(bodies):
        if isinstance(body, Const):
            if tangents and body.scalar == 0:
                continue
            body = walk.arena.sum(axes, (), float(body.scalar))
        if tangents and isinstance(body, Sum) and body.is_constant and _zero(body.constant):
            continue
        signed.append(scaled(walk, body, sign) if position else body)
    if tangents and any(isinstance(b, Sum) for b in signed):
        raise walk.refuse(like.near, "a tangent and a value are added, which no derivative does", _MEASURE)
    result = Field(total(walk, signed), like.groups, like.near)
    _name_bias(walk, operands, result)
    return [result]


def _zero(constant) -> bool:
    return isinstance(constant, float) and constant == 0.0


def _name_bias(walk: Walk, operands, result: Field) -> None:
    """A layer's recorded output includes the bias of the same layer."""
    from initjax.trace.flax import layer_of

    owner = ""
    for value in operands:
        if isinstance(value, WeightView) and not value.tangent:
            owner = layer_of(walk.leaf_name(value))
        elif isinstance(value, Const) and value.leaf:
            owner = layer_of(value.leaf)
    if owner in walk.layers and any(isinstance(v, Field) and v.body is walk.layers[owner] for v in operands):
        walk.record(owner, result)


def _weights_only(walk: Walk, operands):
    """Sums with a known zero, where no field takes part."""
    if any(isinstance(v, Field) for v in operands):
        return None
    for one, other in (operands, operands[::-1]):
        if isinstance(one, Const) and one.scalar == 0 and _name(walk) != "sub":
            return [other]
    views = [v for v in operands if isinstance(v, WeightView)]
    raise walk.refuse(
        "",
        f"the weight {walk.leaf_name(views[0])} is combined with another array before it meets the data",
        "use the weight as it is, and move the change into its initializer",
        what=f"{_name(walk)} on a weight",
    )


def _mul(walk: Walk, operands):
    left, right = operands
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Const) and one.scalar is not None:
            if one.scalar == 0:
                return [_zeros(walk)]
            if isinstance(other, WeightView):
                return [other.scaled(float(one.scalar))]
    if not any(isinstance(v, Field) for v in operands):
        return _weight_times(walk, left, right)
    for value in operands:
        if isinstance(value, WeightView) and not value.tangent:
            raise walk.refuse(
                near_of(operands),
                f"the random weight {walk.leaf_name(value)} multiplies a field entry by entry: the product of two "
                "Gaussians is not Gaussian",
                "initialise scales as constants (ones)",
                what=f"a product with the random weight {walk.leaf_name(value)}",
            )
    bodies, like = aligned(walk, operands)
    return [Field(_times(walk, bodies, like), like.groups, like.near)]


def _times(walk: Walk, bodies, like: Field) -> Any:
    left: Any
    right: Any
    left, right = bodies
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Const):
            return scaled(walk, other, float(one.scalar))
    if isinstance(left, Tangent) and isinstance(right, Tangent):
        raise walk.refuse(like.near, "second derivatives are not covered", _MEASURE)
    if isinstance(right, Tangent):
        left, right = right, left
    if isinstance(left, Tangent):
        return times_tangent(walk, left, right, like.near)
    return product(walk, left, right, like.near)


def times_tangent(walk: Walk, tangent: Tangent, factor: Sum, near: str) -> Tangent:
    """A tangent times a primal field."""
    if factor.is_constant:
        return scaled(walk, tangent, factor.constant)
    parts = []
    for c, g in tangent.parts:
        if any(carries(atom) for atom, _ in g.terms):
            raise walk.refuse(
                near,
                "the derivative of a nonlinearity after a position average of activations depends on several Gaussians",
                _MEASURE,
            )
        # a known factor goes to the coefficient, where the same factor stands in the primal field
        h, known = walk.arena.unscaled(g)
        own = scaled(walk, factor, known)
        parts.append((own if c is None else product(walk, c, own, near), h))
    return Tangent(tangent.axes, tuple(parts))


def _weight_times(walk: Walk, left, right):
    """Weight times known array, without a field: a diagonal scaling of the weight or of an input perturbation."""
    view = left if isinstance(left, WeightView) else right
    known = right if view is left else left
    if isinstance(known, WeightView):
        raise walk.refuse(
            "", "two weights are multiplied before they meet the data", _MEASURE, what="a product of weights"
        )
    if not view.tangent:
        raise walk.refuse(
            "",
            f"the weight {walk.leaf_name(view)} is multiplied by a known array, so its entries differ in variance",
            "move the factor into the initializer",
        )
    # the tangent of a scale acting on a known array: one Gaussian an entry, no channels
    bodies, like = aligned(walk, [walk.as_field(view, walk.positions(view.shape)), known])
    return [Field(_times(walk, bodies, like), like.groups, like.near)]


def _zeros(walk: Walk) -> Const:
    assert walk.equation is not None
    aval = walk.program.body.avals[walk.equation.outputs[0]]
    return Const(np.zeros((1,) * len(aval.shape)), tuple(aval.shape))


def _div(walk: Walk, operands):
    import jax

    above, below = operands
    if isinstance(below, Const):
        scalar = below.scalar
        if scalar is not None:
            return _mul(walk, [above, Const(np.full((1,) * len(below.shape), 1.0 / float(scalar)), below.shape)])
        return _mul(walk, [above, Const(1.0 / below.value, below.shape)])
    if isinstance(above, Const) and above.scalar == 0:
        return [_zeros(walk)]
    bodies, like = aligned(walk, operands)
    near = like.near
    if isinstance(bodies[0], Tangent) and isinstance(bodies[1], Sum):
        one = Const(np.ones((1,) * len(like.shape)), like.shape)
        inverse = _function(walk, jax.lax.div_p, {}, [one, bodies[1]], near)
        return [Field(times_tangent(walk, bodies[0], inverse, near), like.groups, near)]
    return nonlinear(walk, operands)


def nonlinear(walk: Walk, operands):
    """A pointwise primitive of primal fields: one function of their common Gaussian leaf."""
    assert walk.equation is not None
    operands = [_grounded(walk, v) for v in operands]
    bodies, like = aligned(walk, operands)
    if any(isinstance(b, Tangent) for b in bodies):
        raise walk.refuse(
            like.near, "a nonlinear function of a derivative (a gradient penalty?) is not covered", _MEASURE
        )
    dtype = np.dtype(walk.program.body.avals[walk.equation.outputs[0]].dtype)
    dtype = None if np.issubdtype(dtype, np.floating) or dtype.kind == "V" else dtype
    result = _function(walk, walk.equation.primitive, walk.equation.params, bodies, like.near, dtype)
    return [Field(result, like.groups, like.near)]


def _grounded(walk: Walk, value):
    """A weight that meets a nonlinearity without data (softplus of a raw scale) is refused; the rest passes."""
    if isinstance(value, WeightView):
        raise walk.refuse(
            "",
            f"a nonlinear function of the weight {walk.leaf_name(value)} alone: its entries are not Gaussian any more",
            "initialise the transformed weight directly",
            what=f"{_name(walk)} of a weight",
        )
    return value


def _select(walk: Walk, operands):
    which, *cases = operands
    if isinstance(which, Const) and which.scalar is not None:
        return [cases[int(which.scalar)]]
    cases = [_grounded(walk, v) for v in cases]
    bodies, like = aligned(walk, [which, *cases])
    which, *bodies = bodies
    near = like.near
    if isinstance(which, Sum) and which.is_constant:
        # a known mask over positions: a linear combination
        picked = []
        for number, body in enumerate(bodies):
            mask = np.asarray(which.constant == number, np.float64)
            if isinstance(body, Const):
                body = walk.arena.sum(like.body.axes, (), float(body.scalar))
                if any(isinstance(b, Tangent) for b in bodies):
                    continue
            picked.append(scaled(walk, body, mask))
        return [Field(total(walk, picked), like.groups, near)]
    if not any(isinstance(b, Tangent) for b in bodies):
        return nonlinear(walk, operands)
    assert walk.equation is not None
    parts = []
    for number, body in enumerate(bodies):
        if isinstance(body, Const) and body.scalar == 0 or isinstance(body, Sum) and _zero(body.constant):
            continue
        if not isinstance(body, Tangent):
            raise walk.refuse(near, "a derivative is replaced by a value that is not zero", _MEASURE)
        ones = [Const(np.full((1,) * len(like.shape), float(i == number)), like.shape) for i in range(len(bodies))]
        mask = _function(walk, walk.equation.primitive, walk.equation.params, [which, *ones], near)
        parts.append(times_tangent(walk, body, mask, near))
    return [Field(total(walk, parts), like.groups, near)]


def _convert(walk: Walk, operands):
    assert walk.equation is not None
    (value,) = operands
    dtype = np.dtype(walk.equation.params["new_dtype"])
    if not isinstance(value, Field) or not isinstance(value.body, Sum):
        return [value]
    (atom, _) = value.body.terms[0] if len(value.body.terms) == 1 else (None, None)
    kind = atom.expr.dtype if isinstance(atom, Ew) else None
    if dtype.kind in {"i", "u", "b"} and kind is None:
        raise walk.refuse(
            value.near,
            "activations become integers, so derivatives vanish and the result depends on rounding",
            _MEASURE,
        )
    if isinstance(atom, Ew) and kind is not None:
        body = walk.arena.function(atom.leaf, ex.cast(atom.expr, dtype if dtype.kind in {"i", "u", "b"} else None))
        return [Field(body, value.groups, value.near)]
    return [value]


# ------------------------------------------------------------------ shapes


def _pass(walk: Walk, operands):
    return [operands[0]]


def _shape_rule(walk: Walk, operands):
    assert walk.equation is not None
    name, params, value = walk.equation.name, walk.equation.params, operands[0]
    if len(operands) > 1 or name == "reshape" and params.get("dimensions") is not None:
        raise walk.refuse(near_of(operands), "shapes or indices that depend on data", _MEASURE)
    shape = tuple(walk.program.body.avals[walk.equation.outputs[0]].shape)
    if isinstance(value, WeightView):
        return [_weight_shape(walk, value, shape)]
    body, groups = value.body, value.groups
    if name in ("reshape", "squeeze", "expand_dims"):
        body, groups = _reshaped(walk, value, shape)
    elif name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        inserted = [1] * len(shape)
        for axis, target in enumerate(dims):
            inserted[target] = value.shape[axis]
        body, groups = _reshaped(walk, value, tuple(inserted))
        if tuple(inserted) != shape:
            moved = _broadcast(walk, Field(body, groups, value.near), shape, "its new shape")
            body, groups = moved.body, moved.groups
    elif name == "transpose":
        body, groups = _transposed(walk, value, params["permutation"])
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


def _reshaped(walk: Walk, field: Field, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
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
                    raise walk.refuse(field.near, "a reshape cuts across axes of unequal length", _MEASURE)
                queue.insert(0, Axis(axis.size // need, axis.channel))
                axis = Axis(need, axis.channel)
            product *= axis.size
            if group and group[-1].channel == axis.channel:
                group[-1] = Axis(group[-1].size * axis.size, axis.channel)
            else:
                group.append(axis)
        if product != size:
            raise walk.refuse(field.near, "a reshape cuts across axes of unequal length", _MEASURE)
        if not group:
            # an axis of size 1 stays a channel if the old shape ends in one, as in a readout of width 1
            last = field.body.axes[-1] if field.body.axes else Axis(1, False)
            group = [Axis(1, last.channel and last.size == 1 and len(groups) == len(shape) - 1)]
        axes += group
        groups.append(len(group))
    return walk.arena.relayout(field.body, Relayout("reshape", tuple(axes))), tuple(groups)


def _transposed(walk: Walk, field: Field, permutation) -> tuple[Any, tuple[int, ...]]:
    starts = np.concatenate([[0], np.cumsum(field.groups)])
    order = [int(a) for p in permutation for a in range(starts[p], starts[p + 1])]
    channels = [a for a in order if field.body.axes[a].channel and field.body.axes[a].size > 1]
    if channels != sorted(channels):
        raise walk.refuse(
            field.near,
            "two channel axes change places: entry (i, j) becomes entry (j, i), which is another random number",
            _MEASURE,
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
    return _cut(walk, field, cuts)


def _cut(walk: Walk, field: Field, cuts):
    at, per_axis, picks = 0, [], []
    for cut, count in zip(cuts, field.groups, strict=True):
        channel = any(a.channel for a in field.body.axes[at : at + count])
        if cut != (None, None, None) and channel:
            picks.append((at, cut))
            cut = (None, None, None)
        if cut != (None, None, None) and count > 1 or picks and picks[-1][0] == at and count > 1:
            raise walk.refuse(field.near, "it picks from an axis that merges positions and channels", _MEASURE)
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
            results.append(Field(_cut(walk, value, cuts), value.groups, value.near))
        start += size
    return results


def _reduce_sum(walk: Walk, operands):
    assert walk.equation is not None
    (value,) = operands
    if isinstance(value, WeightView):
        raise walk.refuse("", f"a sum over the weight {walk.leaf_name(value)} alone", _MEASURE, what="a sum of weights")
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
        return _zeros(walk)
    count = math.prod(value.body.axes[a].size for a in axes if value.body.axes[a].channel)
    if count < 32:
        walk.note(
            f"mean {value.near}",
            f"after {value.near}: a mean over {count} channels is replaced by its expectation; the finite network "
            f"differs by O(1/{count})",
        )
    mean = walk.mean(value.body)
    if mean is None:
        return _zeros(walk)
    kept = tuple(n if n > 1 else 1 for i, n in enumerate(np.shape(mean)) if i not in axes)
    mean = mean.sum(axis=tuple(axes)).reshape(kept) * float(count)
    if len(kept) != len(shape):  # positions that the program sees as one axis
        groups = [count for p, count in enumerate(value.groups) if p not in walk.equation.params["axes"]]
        full = [a for i, a in enumerate(value.body.axes) if i not in axes]
        xp = xp_of(mean)
        mean = xp.broadcast_to(mean, tuple(a.size for a in full)).reshape(shape) if max(groups) > 1 else mean
    return const(mean, shape) if np.shape(mean) == shape else Const(mean, shape)


RULES = {
    "add": _add,
    "add_any": _add,
    "sub": lambda walk, operands: _add(walk, operands, -1.0),
    "neg": lambda walk, operands: _mul(walk, [operands[0], const(np.asarray(-1.0))]),
    "mul": _mul,
    "div": _div,
    "select_n": _select,
    "convert_element_type": _convert,
    "copy": _pass,
    "copy_p": _pass,
    "stop_gradient": _pass,
    "reduce_precision": _pass,
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
