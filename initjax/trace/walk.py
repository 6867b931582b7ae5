"""The walk over a model's program: every equation becomes a value of the domain, or is refused here and now.

All conditions under which the infinite-width theory holds are checked during this walk, over the whole program, before
a single moment is computed: evaluation is lazy, and a lazy check that is never reached protects nobody.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import UnsupportedLayerError
from initjax.trace.domain import Arena, Base, Cat, Const, Field, Lin, Product, Sum, Tangent
from initjax.trace.flax import layer_of
from initjax.trace.graph import independent, reachable, separable
from initjax.trace.inline import Equation
from initjax.trace.jaxpr import float64, is_traced
from initjax.trace.maps import Axis
from initjax.trace.names import refusal
from initjax.trace.noise import Random, drawn, known
from initjax.trace.pointwise import is_pointwise
from initjax.trace.program import Program
from initjax.trace.views import WeightView

INPUTS = "<inputs>"  # the pseudo-leaf of independent perturbations of the input, which carries chi


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight leaf: in which role, which entries stand at which contraction and output index."""

    role: str
    view: WeightView
    pattern: tuple
    place: str

    def agrees(self, other: "Use") -> bool:
        """Whether every shared entry stands at the same contraction index in both uses.

        Views of equal rows may show different columns: channels of one layer are independent of each other.
        """
        if (self.role, self.pattern, self.view.offset) == (other.role, other.pattern, other.view.offset):
            return True
        if self.role != other.role:
            return False
        if self.role == "added":
            mine, yours = (tuple(stride for _, stride in use.pattern[0]) for use in (self, other))
            return mine == yours or self.view.single or other.view.single
        if self.pattern[0] != other.pattern[0]:
            return False
        strides = [tuple(stride for _, stride in use.pattern[1]) for use in (self, other)]
        strides = [s for s in strides if s] or [()]  # a single column has no stride of its own
        rows = [abs(stride) for _, _, stride in self.pattern[0]]
        shift = abs(self.view.offset - other.view.offset)
        return bool(rows) and len(set(strides)) == 1 and shift < min(rows)


@dataclasses.dataclass
class Walked:
    """The outcome of a walk.

    Attributes
    ----------
    output, tangent : the model's output and its tangent (None: identically zero).
    layers : name of every layer with weights -> its output, in program order.
    tangents : name of the layer -> the tangent of that output.
    notes : approximations that the user should know of.
    draws : whether the program draws random numbers as it runs.
    ranks : for each set of batch statistics taken at their expectation, the layer before it -> effective rank.
    """

    output: Field
    tangent: Field | None
    layers: dict[str, Sum]
    tangents: dict[str, Tangent]
    notes: list[str]
    draws: bool = False
    ranks: dict[str, Any] = dataclasses.field(default_factory=dict)


class Walk:
    """State of one walk: values by number, uses of every weight leaf, layers met.

    mean : expectation of a primal body at every position: sums over channels become numbers.
    spread : expectation and variance of a body at its one position, to take the statistics of a large batch at their
        expectation; None: these are refused. judges : whether batches of low effective rank are refused.
    """

    def __init__(self, program: Program, mean: Callable[[Sum], Any], spread: Callable | None = None, judges=True):
        body = dataclasses.replace(program.body, avals=dict(program.body.avals))  # steps add values of their own
        self.program = dataclasses.replace(program, body=body)
        self.mean, self.spread, self.judges = mean, spread, judges
        self.ranks: dict[str, Any] = {}
        self.shapes_drawn: dict[bytes, tuple[int, ...]] = {}  # random key -> shape of what it draws
        self.settled: dict[int, tuple] = {}  # statistics of the batch at their expectation
        self.arena = Arena()
        self.doubts: dict[int, UnsupportedLayerError] = {}
        self.averaged: UnsupportedLayerError | None = (
            None  # the last mean over channels, should it be all of the output
        )
        self.uses: dict[int, list[Use]] = {}
        self.layers: dict[str, Sum] = {}
        self.tangents: dict[str, Tangent] = {}
        self.notes: dict[str, str] = {}
        self.values: dict[int, Any] = {}
        self.equation: Equation | None = None
        self._place: Equation | None = None  # the equation of the program that the current one stands in for

    # ------------------------------------------------------------------ services for the rules

    def refuse(self, near: str, reason: str, remedy: str, what: str = "") -> UnsupportedLayerError:
        assert self.equation is not None
        return refusal(self.equation, near or next(reversed(self.layers), ""), reason, remedy, what)

    def leaf_name(self, view: WeightView) -> str:
        return INPUTS if view.leaf < 0 else self.program.leaves[view.leaf].name

    def use(self, role: str, view: WeightView, pattern: tuple, near: str) -> None:
        """Register a use of a weight and refuse it where it contradicts an earlier one."""
        if view.leaf < 0:
            return
        mine = Use(role, dataclasses.replace(view, tangent=False, scale=1.0), pattern, near)
        for other in self.uses.setdefault(view.leaf, []):
            if mine.agrees(other) or not mine.view.overlaps(other.view):
                continue
            name = self.leaf_name(view)
            if mine.role == other.role == "contracted" and mine.pattern[0] == other.pattern[0]:
                raise self.refuse(
                    near,
                    f"some channels made by the weight {name} are taken out (rotary codes, heads cut in halves) beside "
                    "others of them, in an arrangement that cannot be followed to its columns",
                    "make the parts by layers of their own",
                    what=f"overlapping parts of the weight {name}",
                )
            raise self.refuse(
                near,
                f"the weight {name} is {other.role} along one axis and then {role} along another, or in overlapping "
                "parts: W and its transpose in one forward pass are not independent, and neglecting their correlation "
                "gives a wrong kernel without a warning",
                "untie the two uses; or measure this model at finite width with ij.empirical_ntk",
                what=f"the weight {name} in a second, different role",
            )
        if mine not in self.uses[view.leaf]:
            self.uses[view.leaf].append(mine)

    def use_vector(self, view: WeightView, axes, near: str) -> None:
        """Register weights that are added entry by entry: which entry stands at which channel."""
        self.use("added", view, (view.pattern([i for i, a in enumerate(axes) if a.channel]),), near)

    def note(self, key: str, text: str) -> None:
        self.notes.setdefault(key, text)

    def record(self, layer: str, value: Field) -> None:
        """Remember the output of a layer: first its contraction, then with its bias."""
        if isinstance(value.body, Sum):
            self.layers[layer] = value.body
        else:
            self.tangents[layer] = value.body

    def is_divided(self, count: int) -> bool:
        """Whether whatever takes the current result up first divides it by about the number of summed channels."""
        assert self._place is not None
        body, waiting = self.program.body, list(self._place.outputs)
        while waiting:
            number = waiting.pop()
            users = [e for e in body.equations if number in e.inputs]
            if number in body.outputs or not users:
                return False
            for user in users:
                known = [self.values[n] for n in user.inputs if isinstance(self.values.get(n), Const)]
                scalar = next((float(v.scalar) for v in known if v.scalar is not None), None)
                if user.name in ("div", "mul") and scalar is not None:
                    factor = scalar if user.name == "mul" else 1 / scalar if scalar else np.inf
                    if abs(factor) * count > 4.0:
                        return False
                elif user.name in ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type"):
                    waiting += user.outputs
                else:
                    return False
        return True

    def is_pointwise(self) -> bool:
        """Whether the current equation acts entry by entry."""
        assert self.equation is not None
        avals = self.program.body.avals
        inputs = [tuple(avals[n].shape) for n in self.equation.inputs]
        return is_pointwise(self.equation, inputs, tuple(avals[self.equation.outputs[0]].shape))

    def bind(self, values: list[Any], params: dict | None = None) -> list[Any]:
        """Evaluate the current equation on known arrays: eagerly in float64, or with tracers in their dtype."""
        assert self.equation is not None
        primitive = self.equation.primitive
        params = self.equation.params if params is None else params
        avals = [self.program.body.avals[n] for n in self.equation.inputs]

        def run(real, params):
            arrays = []
            for v, aval in zip(values, avals, strict=True):
                is_real = jnp.issubdtype(aval.dtype, jnp.floating)
                arrays.append(v if _is_key(v) else jnp.asarray(v, real if is_real else aval.dtype))
            out = primitive.bind(*arrays, **params)
            return out if primitive.multiple_results else [out]

        tracers = [v for v in values if is_traced(v) and jnp.issubdtype(v.dtype, jnp.floating)]
        if any(is_traced(v) for v in values):  # the program was traced in float64; tracers keep their precision
            real = tracers[0].dtype if tracers else jnp.result_type(jnp.float32)
            return run(real, _in_precision(params, real))
        with float64():
            return [o if _is_key(o) else np.asarray(o) for o in run(jnp.float64, _in_precision(params, jnp.float64))]

    # ------------------------------------------------------------------ the walk

    def run(self, inputs: list[Any]) -> Walked:
        """Walk the program on concrete or traced input leaves."""
        from initjax.trace import spatial  # noqa: F401  (adds its rules, and those of contract)

        values = self.values = self._start(inputs)
        body = self.program.body
        for equation in body.equations:
            self.equation = self._place = equation
            results = self._results([values[n] for n in equation.inputs])
            values.update(zip(equation.outputs, results, strict=True))
        output, tangent = (self._finished(values[n], n == body.outputs[1]) for n in body.outputs)
        if self.averaged is not None and tangent is None and isinstance(output.body, Sum) and output.body.is_constant:
            raise self.averaged
        atoms = reachable([v.body for v in (output, tangent) if v is not None])
        self._settle_doubts(atoms)
        for atom in atoms:  # weights that met known arrays before they met a field
            if isinstance(atom, Base) and atom.kind == "vector":
                self.use_vector(atom.view, atom.axes, atom.layer)
        draws = any(equation.name == "random_bits" for equation in body.equations)
        return Walked(output, tangent, self.layers, self.tangents, list(self.notes.values()), draws, self.ranks)

    def _results(self, operands: list) -> list:
        """What the current equation makes of its operands, or its refusal."""
        from initjax.trace.align import const_rule
        from initjax.trace.batch import averaged
        from initjax.trace.concat import cat_rule
        from initjax.trace.rules import RULES, nonlinear

        equation = self.equation
        assert equation is not None
        if equation.name == "random_bits" or any(isinstance(v, Random) for v in operands):
            draw = drawn(self, operands) if all(isinstance(v, (Const, Random)) for v in operands) else None
            if draw is not None:
                return [draw]
            if all(isinstance(v, (Const, Random)) for v in operands) or not self.is_pointwise():
                operands = [known(v) for v in operands]
                self.note(
                    "given draw", "a draw that meets known arrays (dropout on the inputs) is taken as rngs give it"
                )
        if self.spread is not None:
            operands = averaged(self, operands)
        if all(isinstance(v, Const) for v in operands):
            return const_rule(self, operands)
        rule: Callable | None = RULES.get(equation.name) or (nonlinear if self.is_pointwise() else None)
        if any(isinstance(v, Cat) for v in operands):
            rule = cat_rule
        try:
            if rule is None:
                raise self.refuse(near_of(operands), *_reason(equation.name))
            return rule(self, operands)
        except UnsupportedLayerError:
            # perturbations of the input serve chi alone: where they cannot be followed, chi is missing
            if not any(isinstance(v, (Field, Cat)) for v in operands) or not all(map(_spare, operands)):
                raise
            return [const(np.zeros(self.program.body.avals[n].shape)) for n in equation.outputs]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the current equation's (first) result."""
        assert self.equation is not None
        return tuple(self.program.body.avals[self.equation.outputs[0]].shape)

    def step(self, primitive, params: dict, operands: list, shape: tuple[int, ...]) -> Any:
        """One primitive (or its name) in the place of the current equation, on operands of other shapes."""
        outer, avals = self.equation, self.program.body.avals
        assert outer is not None
        primitive = getattr(jax.lax, f"{primitive}_p") if isinstance(primitive, str) else primitive
        dtype = avals[outer.outputs[0]].dtype
        numbers = tuple(range(len(avals), len(avals) + len(operands) + 1))
        for i, (number, value) in enumerate(zip(numbers, operands, strict=False)):
            kind = avals[outer.inputs[i]].dtype if i < len(outer.inputs) else dtype
            avals[number] = jax.ShapeDtypeStruct(value.shape, kind)
        avals[numbers[-1]] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        self.equation = dataclasses.replace(
            outer, primitive=primitive, params=params, inputs=numbers[:-1], outputs=numbers[-1:]
        )
        try:
            (result,) = self._results(operands)
        finally:
            self.equation = outer
        return result

    def _settle_doubts(self, atoms: list) -> None:
        """Refuse products that reach the output, unless every moment they take part in factorises."""
        # a map over positions asks for the moments of what it maps, which are in the list themselves
        atoms = [atom for atom in atoms if not atom.tangent and not isinstance(atom, (Base, Lin))]
        for atom in atoms:
            if isinstance(atom, Product) and not (
                independent(atom.left, atom.right) and all(separable(atom, other) for other in atoms)
            ):
                raise self.doubts[atom.number]

    def _start(self, inputs) -> dict[int, Any]:
        program, body = self.program, self.program.body
        values: dict[int, Any] = {}
        for number, value in body.constants.items():
            values[number] = const(value)
        numbers = iter(body.inputs)
        for tangent in (False, True):
            for index, leaf in enumerate(program.leaves):
                if not tangent and leaf.kind == "constant":
                    assert leaf.value is not None
                    value = np.asarray(leaf.value, np.float64)
                    values[next(numbers)] = const(value, leaf.shape, leaf.name)
                else:
                    values[next(numbers)] = WeightView.of(index, tangent, leaf.shape)
        for value in inputs:
            number = next(numbers)
            if not is_traced(value):
                value = np.asarray(value, body.avals[number].dtype)
            values[number] = Const(value, tuple(value.shape))
        offset = 0
        for shape, real in zip(program.input_shapes, program.floating, strict=True):
            if not real:
                continue
            # one perturbation per feature, the same for every example: only same-example moments are used; where the
            # examples are coupled every one has its own
            strides = [0] * len(shape)
            step = 1
            for axis in range(len(shape) - 1, 0 if self.spread is None else -1, -1):
                strides[axis], step = step, step * shape[axis]
            view = WeightView(-1, True, offset, tuple(shape), tuple(strides))
            values[next(numbers)] = self.as_field(view, self.positions(shape))
            offset += step
        return values

    def _finished(self, value, tangent: bool) -> Any:
        """The output as a field; None for a tangent that vanishes."""
        from initjax.trace.concat import as_positions

        if isinstance(value, Cat):
            return as_positions(self, value)
        return None if tangent and isinstance(value, Const) and value.scalar == 0 else self.finished(value)

    def finished(self, value) -> Field:
        """A weight or a known array as a field without channels."""
        value = known(value)
        if isinstance(value, WeightView):
            return self.as_field(value, self.positions(value.shape))
        if isinstance(value, Const):
            return Field(self.as_sum(value), (1,) * len(value.shape))
        return value

    # ------------------------------------------------------------------ constants and weights as fields

    def as_sum(self, value: Const) -> Sum:
        """A known array as a field of positions only."""
        axes = tuple(Axis(n, False) for n in value.shape)
        scalar = value.scalar
        return self.arena.sum(axes, (), float(scalar) if scalar is not None else value.value)

    def positions(self, shape: tuple[int, ...]) -> Field:
        """The zero field of this shape, without channels: a pattern for `as_field`."""
        return Field(self.arena.sum(tuple(Axis(n, False) for n in shape), ()), (1,) * len(shape))

    def as_field(self, view: WeightView, like: Field, settled: bool = True) -> Field:
        """A weight as a Gaussian field along the axes of `like`; not `settled`: these may still become channels."""
        axes, near = like.body.axes, like.near
        fitted = _fit(view, like)
        if fitted is None:
            raise self.refuse(
                near,
                f"the weight {self.leaf_name(view)} of shape {view.shape} cannot be aligned with {like.shape}",
                "give the weight the shape of the features it is added to",
            )
        view = fitted
        shared = any(a.channel and a.size > 1 and s == 0 for a, s in zip(axes, view.strides, strict=True))
        if shared and not view.tangent:  # the tangent of a scalar gain enters linearly, and has no part in any mean
            raise self.refuse(
                near,
                f"the weight {self.leaf_name(view)} is one number for all channels, so channels are not independent",
                "initialise it as a constant, or give it one entry a channel",
            )
        axes = tuple(
            Axis(n, a.channel and a.size == n) if n != 1 else Axis(1, a.channel and a.size == 1)
            for a, n in zip(axes, view.shape, strict=True)
        )
        self.check_iid(view, near)
        if settled:
            self.use_vector(view, axes, near)
        stats = self.program.leaves[view.leaf] if view.leaf >= 0 else None
        gaussian = view.tangent or stats is None or stats.gaussian
        name = self.leaf_name(view)
        plain = dataclasses.replace(view, scale=1.0)
        key = ("vector", plain, axes)
        base = self.arena.atom(Base, key, axes, "vector", plain, None, (), layer_of(name), gaussian, view.tangent)
        total = self.arena.sum(axes, [(base, view.scale)])
        body = Tangent(axes, ((None, total),)) if view.tangent else total
        return Field(body, like.groups, near)

    def check_iid(self, view: WeightView, near: str) -> None:
        """Refuse weights whose entries are not identically distributed with mean zero."""
        if view.leaf < 0 or view.tangent:
            return
        stats = self.program.leaves[view.leaf]
        if stats.kind == "structured":
            raise self.refuse(
                near,
                f"the entries of {stats.name} are not identically distributed ({stats.note})",
                "use an initializer with i.i.d. entries, or measure at finite width with ij.empirical_ntk",
                what=f"the weight {stats.name}",
            )
        if stats.mean != 0.0:
            raise self.refuse(
                near,
                f"the entries of {stats.name} have mean {stats.mean:.6g}, not zero: sums over channels then grow like "
                "the width instead of its root",
                "use a centred initializer (jax.nn.initializers.uniform draws from [0, scale); subtract scale / 2)",
                what=f"the weight {stats.name}",
            )


def const(value, shape: tuple[int, ...] | None = None, leaf: str = "") -> Const:
    """A known array, stored with size 1 along every axis if it is uniform."""
    shape = tuple(np.shape(value)) if shape is None else tuple(shape)
    if not is_traced(value) and not _is_key(value):
        value = np.asarray(value)
        if value.size and (value == value.flat[0]).all():
            value = value.reshape(-1)[:1].reshape((1,) * len(shape))
    return Const(value, shape, leaf)


def is_perturbation(body) -> bool:
    """Whether a body is a perturbation of the input that has met no weight yet."""
    sums = [g for _, g in body.parts] if isinstance(body, Tangent) else []
    return bool(sums) and all(_perturbs(atom) for g in sums for atom, _ in g.terms)


def _perturbs(atom) -> bool:
    if isinstance(atom, Base):
        return atom.view.leaf < 0
    source = getattr(atom, "source", None)
    return is_perturbation(source) or isinstance(source, Sum) and all(_perturbs(a) for a, _ in source.terms)


def _spare(value) -> bool:
    if isinstance(value, Cat):
        return all(map(_spare, value.parts))
    return isinstance(value, Const) or isinstance(value, Field) and is_perturbation(value.body)


def _in_precision(params: dict, real) -> dict:
    """Parameters of a primitive with every floating dtype replaced by the one the values are in."""

    def changed(value):
        floating = isinstance(value, (np.dtype, type)) and jnp.issubdtype(value, jnp.floating)
        return np.dtype(real) if floating else value

    return {name: changed(value) for name, value in params.items()}


def _is_key(value) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended)


def contraction_pattern(axes, contracted: tuple[int, ...], view: WeightView) -> tuple:
    """Which weight stands at which contraction index (size, channel or not, stride), and the pattern of the rest."""
    count = len(contracted)
    rows = zip(contracted, view.shape[:count], view.strides[:count], strict=True)
    kept = tuple((size, axes[i].channel, stride) for i, size, stride in rows if size > 1)
    return (kept, view.pattern(range(count, len(view.shape))))


def near_of(operands) -> str:
    """The last layer that any operand went through."""
    return next((v.near for v in operands if isinstance(v, (Field, Cat)) and v.near), "")


def _fit(view: WeightView, like: Field) -> WeightView | None:
    """The view with one axis for each axis of a field, size 1 where it is broadcast."""
    if not view.shape:
        view = view.broadcast((1,) * len(like.groups), ())
    if len(view.shape) != len(like.groups):
        return None
    target: list[int] = []
    for size, total, count in zip(view.shape, like.shape, like.groups, strict=True):
        parts = [axis.size for axis in like.body.axes[len(target) : len(target) + count]]
        if size not in (1, total):
            return None
        target += parts if size == total else [1] * count
    return view.reshaped(tuple(target))


def _reason(name: str) -> tuple[str, str]:
    known = {
        "custom_lin": "its derivative is a custom_vjp rule, which has no forward form; ignoring the rule would give "
        "the kernel of another gradient (write it as jax.custom_jvp)",
        "scan": "a loop whose body mixes weights and activations is not covered yet",
        "while": "the number of turns of a data-dependent loop is not known when the model is traced",
        "cond": "which branch is taken depends on data",
        "reduce_max": "a maximum over positions or channels (a softmax begins with one) is not a function of one "
        "Gaussian",
        "reduce_window_max": "a maximum over positions (max-pooling) is not a function of one Gaussian",
        "argmax": "it depends on the order of the entries, not on Gaussian moments",
        "sort": "it depends on the order of the entries, not on Gaussian moments",
    }
    reason = known.get(name, "no exact infinite-width rule is known to this version for it")
    return reason, "measure this model at finite width with ij.empirical_ntk; or replace the layer"
