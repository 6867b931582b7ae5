"""What arithmetic does to the values of the domain.

A rule takes the walk and the operands (Const, WeightView, Field) of the current equation and returns its results, or
raises `UnsupportedLayerError`. Shapes, contractions and steps over positions have files of their own.
"""

from typing import Any

import numpy as np

from initjax.trace import expr as ex
from initjax.trace.align import MEASURE, aligned, name_of, zeros
from initjax.trace.batch import over_examples, pieces, separated
from initjax.trace.domain import Atom, Base, Const, Ew, Field, Lin, Product, Sum, Tangent, is_zero
from initjax.trace.graph import carries
from initjax.trace.noise import depends_on, given, mask_in, noise_of, only_draws
from initjax.trace.views import WeightView
from initjax.trace.walk import Walk, const, near_of


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
    mask = mask_in([left, right])
    if mask is not None:
        one, other = (left, right) if _is_one(left, mask) else (right, left)
        if not _is_one(one, mask) or depends_on(other, mask):
            return _by_mask(walk, mask, jax.lax.mul_p, {}, [left, right], near)
        pieces = [arena.sum(other.axes, [t]) for t in other.terms] if mask_in([other]) is not None else [other]
        if len(pieces) > 1:  # masks of masked sums: term by term
            pieces += [arena.sum(other.axes, (), other.constant)] if not is_zero(other.constant) else []
            return total(walk, [product(walk, one, piece, near) for piece in pieces])
    (left, before), (right, after) = _unit(walk, left), _unit(walk, right)
    if before * after != 1.0:
        return scaled(walk, product(walk, left, right, near), before * after)
    atom = arena.atom(Product, (id(left), id(right)), left.axes, left, right)
    # its mean over channels is exact; whether more is asked of it, and whether that is exact, the end of the walk tells
    walk.doubts.setdefault(atom.number, walk.refuse(near, *_why_no_leaf(walk, [left, right])))
    return arena.sum(left.axes, [(atom, 1.0)])


def _unit(walk: Walk, body: Sum) -> tuple[Sum, float]:
    """A single product without its number in front, and that number."""
    atom, c = body.terms[0] if len(body.terms) == 1 and is_zero(body.constant) else (None, 1.0)
    plain = isinstance(atom, Product) and isinstance(c, float)
    return (walk.arena.sum(body.axes, [(atom, 1.0)]), c) if plain else (body, 1.0)


def _is_one(body: Sum, mask) -> bool:
    """Whether a body is this mask and nothing else."""
    return len(body.terms) == 1 and body.terms[0][0] is mask and is_zero(body.constant)


def _by_mask(walk: Walk, mask, primitive, params: dict, bodies: list, near: str, dtype=None) -> Sum:
    """A function of fields and a two-valued mask: its values under either, weighted by the mask."""
    noise = noise_of(mask)
    assert noise is not None and noise.values is not None
    low, high = noise.values
    found = []
    for value in (low, high):
        cases: list[Any] = [given(walk, b, mask, value) if isinstance(b, Sum) else b for b in bodies]
        if any(c is None for c in cases):
            raise walk.refuse(near, "a dropout mask meets a nonlinearity after a sum or window over positions", MEASURE)
        if primitive.name == "mul":
            found.append(product(walk, cases[0], cases[1], near))
        else:
            found.append(_function(walk, primitive, params, cases, near, dtype, masked=True))
    difference = total(walk, [found[1], scaled(walk, found[0], -1.0)])
    one = walk.arena.sum(found[0].axes, [(mask, 1.0 / (high - low))], -low / (high - low))
    if difference.is_constant:
        return total(walk, [found[0], scaled(walk, one, difference.constant)])
    parts = [scaled(walk, product(walk, walk.arena.sum(one.axes, [(mask, 1.0)]), difference, near), 1.0 / (high - low))]
    parts += [scaled(walk, difference, -low / (high - low))] if low else []
    return total(walk, [found[0], *parts])


def _function(walk: Walk, primitive, params: dict, bodies: list, near: str, dtype=None, masked: bool = False) -> Sum:
    import jax

    arena = walk.arena
    sums = [b for b in bodies if isinstance(b, Sum)]
    mask = mask_in(sums)
    if mask is not None:
        return _by_mask(walk, mask, primitive, params, bodies, near, dtype)
    leaf = arena.common_leaf(sums)
    if leaf is None and all(b.is_constant and isinstance(b.constant, float) for b in sums):
        leaf = arena.sum(sums[0].axes, ())
    if leaf is None:
        raise walk.refuse(near, *_why_no_leaf(walk, sums))
    args = []
    for body in bodies:
        if isinstance(body, Const):
            args.append(ex.literal(body.scalar))
        else:
            args.append(arena.as_expr(body, leaf))
    if primitive.name == "select_n" and args[0].dtype is None:  # a condition that has been weighted by masks
        args[0] = ex.apply(jax.lax.gt_p, {}, [args[0], ex.literal(0.5)], np.dtype(bool))
    result = ex.apply(primitive, params, args, dtype)
    return arena.function(leaf, ex.cast(result, None) if masked else result)


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
    if any(map(over_examples, atoms)):
        return (
            "mean and variance over the batch (BatchNorm in training mode) are random numbers of every channel, and "
            "couple all examples: what follows is a function of as many Gaussians as the batch has positions",
            "take these at their expectation, the limit of a large batch, with on_unsupported='large_batch'; use the "
            "running averages (use_running_average=True); or on_unsupported='monte_carlo', which takes the statistics "
            "of the batch that is given",
        )
    if any(not isinstance(s.constant, float) for s in sums) or any(
        isinstance(a, Ew) and not isinstance(c, float) for s in sums for a, c in s.terms
    ):
        return (
            "a known array that varies over positions enters the nonlinearity, which is then another function at every "
            "position",
            MEASURE,
        )
    return (
        "it is a nonlinear function of several different random fields (a gate, a product, or a nonlinearity after a "
        "sum with activations); only functions of one Gaussian pre-activation are exact here",
        "apply the nonlinearity before the sum (pre-activation residual); or " + MEASURE,
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
        raise walk.refuse(like.near, "a tangent and a value are added, which no derivative does", MEASURE)
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
        if isinstance(one, Const) and one.scalar == 0 and name_of(walk) != "sub":
            return [other]
    views = [v for v in operands if isinstance(v, WeightView)]
    raise walk.refuse(
        "",
        f"the weight {walk.leaf_name(views[0])} is combined with another array before it meets the data",
        "use the weight as it is, and move the change into its initializer",
        what=f"{name_of(walk)} on a weight",
    )


def _mul(walk: Walk, operands):
    left, right = operands
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Const) and one.scalar is not None:
            if one.scalar == 0:
                return [zeros(walk)]
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
        raise walk.refuse(like.near, "second derivatives are not covered", MEASURE)
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
    carried = any(carries(atom) for _, g in tangent.parts for atom, _ in g.terms)
    draws = only_draws(factor) and all(c is None or only_draws(c) for c, _ in tangent.parts)
    refusal = walk.refuse(
        near,
        "the derivative of a nonlinearity after a position average of activations depends on several Gaussians",
        MEASURE,
    )
    if carried and not draws:
        if walk.spread is None:
            raise refusal
        tangent = separated(walk, tangent)
    for c, g in tangent.parts:
        statistic = carried and not draws and any(carries(atom) for atom, _ in g.terms)
        if statistic and pieces(g) is None:
            raise refusal
        # a known factor goes to the coefficient, where the same factor stands in the primal field
        h, known = walk.arena.unscaled(g)
        own = scaled(walk, factor, known)
        coefficient = own if c is None else product(walk, c, own, near)
        if statistic and not (coefficient.gaussian or len(coefficient.terms) == 1 and _is_function(coefficient)):
            raise refusal
        parts.append((coefficient, h))
    return Tangent(tangent.axes, tuple(parts))


def _is_function(body: Sum) -> bool:
    return isinstance(body.terms[0][0], Ew) and is_zero(body.constant)


def _weight_times(walk: Walk, left, right):
    """Weight times known array, without a field: a diagonal scaling of the weight or of an input perturbation."""
    view = left if isinstance(left, WeightView) else right
    known = right if view is left else left
    if isinstance(known, WeightView):
        raise walk.refuse(
            "", "two weights are multiplied before they meet the data", MEASURE, what="a product of weights"
        )
    if not view.tangent:
        raise walk.refuse(
            "",
            f"the weight {walk.leaf_name(view)} is multiplied by a known array, so its entries differ in variance",
            "move the factor into the initializer",
        )
    # the tangent of a scale acting on a known array: one Gaussian an entry, no channels
    bodies, like = aligned(walk, [walk.as_field(view, walk.positions(view.shape), settled=False), known])
    return [Field(_times(walk, bodies, like), like.groups, like.near)]


def _div(walk: Walk, operands):
    import jax

    above, below = operands
    if isinstance(below, Const):
        scalar = below.scalar
        if scalar is not None:
            return _mul(walk, [above, Const(np.full((1,) * len(below.shape), 1.0 / float(scalar)), below.shape)])
        return _mul(walk, [above, Const(1.0 / below.value, below.shape)])
    if isinstance(above, Const) and above.scalar == 0:
        return [zeros(walk)]
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
            like.near, "a nonlinear function of a derivative (a gradient penalty?) is not covered", MEASURE
        )
    dtype = np.dtype(walk.program.body.avals[walk.equation.outputs[0]].dtype)
    dtype = None if np.issubdtype(dtype, np.floating) or dtype.kind == "V" else dtype
    result = _function(walk, walk.equation.primitive, walk.equation.params, bodies, like.near, dtype)
    return [Field(result, like.groups, like.near)]


def _square(walk: Walk, operands):
    """The square of a sum of different fields, whose mean over channels is a second moment (norms of a stream)."""
    assert walk.equation is not None
    if not isinstance(operands[0], Field):
        return nonlinear(walk, operands)
    bodies, like = aligned(walk, operands)
    body, power = bodies[0], walk.equation.params.get("y", 2)
    if power == 2 and isinstance(body, Sum) and body.terms:
        if mask_in([body]) is None and walk.arena.common_leaf([body]) is None:
            return [Field(product(walk, body, body, like.near), like.groups, like.near)]
    return nonlinear(walk, operands)


def _grounded(walk: Walk, value):
    """A weight that meets a nonlinearity without data (softplus of a raw scale) is refused; the rest passes."""
    if isinstance(value, WeightView):
        raise walk.refuse(
            "",
            f"a nonlinear function of the weight {walk.leaf_name(value)} alone: its entries are not Gaussian any more",
            "initialise the transformed weight directly",
            what=f"{name_of(walk)} of a weight",
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
    if isinstance(which, Sum) and len(which.terms) == 1 and noise_of(which.terms[0][0]) is not None:
        return [Field(_select_by(walk, which, bodies, like), like.groups, near)]
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
            raise walk.refuse(near, "a derivative is replaced by a value that is not zero", MEASURE)
        ones = [Const(np.full((1,) * len(like.shape), float(i == number)), like.shape) for i in range(len(bodies))]
        mask = _function(walk, walk.equation.primitive, walk.equation.params, [which, *ones], near)
        parts.append(times_tangent(walk, body, mask, near))
    return [Field(total(walk, parts), like.groups, near)]


def _select_by(walk: Walk, mask: Sum, bodies: list, like: Field) -> Any:
    """Dropout: one of two fields, by a mask of zeros and ones."""
    tangent = any(isinstance(b, Tangent) for b in bodies)
    cases = []
    for body in bodies:
        if isinstance(body, Const):
            body = walk.arena.sum(like.body.axes, (), float(body.scalar))
        zero = isinstance(body, Sum) and body.is_constant and is_zero(body.constant)
        if tangent and isinstance(body, Sum) and not zero:
            raise walk.refuse(like.near, "a derivative is replaced by a value that is not zero", MEASURE)
        cases.append(None if zero else body)
    rest = walk.arena.sum(like.body.axes, mask.terms and [(mask.terms[0][0], -mask.terms[0][1])], 1.0)
    parts = []
    for case, factor in zip(cases, (rest, mask), strict=True):
        if case is None:
            continue
        if isinstance(case, Tangent):
            parts.append(times_tangent(walk, case, factor, like.near))
        elif factor is mask:
            parts.append(product(walk, mask, case, like.near))
        else:
            parts += [case, scaled(walk, product(walk, mask, case, like.near), -1.0)]
    if not parts:
        return walk.arena.sum(like.body.axes, ())
    return total(walk, parts)


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
            MEASURE,
        )
    if isinstance(atom, Ew) and kind is not None:
        body = walk.arena.function(atom.leaf, ex.cast(atom.expr, dtype if dtype.kind in {"i", "u", "b"} else None))
        return [Field(body, value.groups, value.near)]
    return [value]


def _pass(walk: Walk, operands):
    return [operands[0]]


RULES = {
    "add": _add,
    "add_any": _add,
    "sub": lambda walk, operands: _add(walk, operands, -1.0),
    "neg": lambda walk, operands: _mul(walk, [operands[0], const(np.asarray(-1.0))]),
    "mul": _mul,
    "div": _div,
    "square": _square,
    "integer_pow": _square,
    "select_n": _select,
    "convert_element_type": _convert,
    "copy": _pass,
    "copy_p": _pass,
    "stop_gradient": _pass,
    "reduce_precision": _pass,
}
