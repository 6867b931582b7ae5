r"""A model's own program with every hidden layer widened, as a differentiable function of the widened weights.

A hidden layer of n channels becomes m layers of n channels, and a weight W that contracts it becomes m_out m_in
independent copies, y_a = m_in^{-1/2} sum_b W_ab x_b: that is the same network at m times its width, in coordinates in
which gradients with respect to the copies give the tangent kernel at the model's own width. As m grows, sums over
channels and copies become expectations. What the program does with whole channels (activations, pooling, masks, splits
into heads) is done on every copy by JAX itself. What happens to a channel axis is told here:

    sum over channels (norms)          the mean over copies as well: the law of large numbers
    product of two fields, summed      sum_j w_j q_j . k_j with sum w = sum w^2 = 1: the mean and the fluctuations that
    over channels (attention scores)   the model has at its own number of channels, Gaussian as m grows
    a nonlinearity across channels     the layer is no width but a finite structure (a gate): it gets no copies, unless
                                       a weight sums over it later, which is refused

Every condition is checked while the program is walked, on shapes alone (`plan`), before anything is drawn.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import UnsupportedLayerError
from initjax.infinite.copies import Cloud, Known, Part, Weight, channel, positions, structural
from initjax.trace.flax import layer_of
from initjax.trace.initstats import LeafStats
from initjax.trace.inline import Equation, call_body, unrolled
from initjax.trace.jaxpr import ClosedJaxpr, Jaxpr, Literal, one_equation
from initjax.trace.names import scope_of

REMEDY = "measure this model at its own width with ij.empirical_ntk and ij.measure"


class Replan(Exception):
    """Leaves whose channels turn out to be a finite structure: the walk starts again."""


@dataclasses.dataclass
class Plan:
    """What the walk over shapes finds.

    Attributes
    ----------
    copies : leaf -> copies of its output channels and of its input channels.
    finite : leaves whose channels stand for themselves.
    roles : (leaf, axis) -> "in", "out" or "vector".
    uses : leaf -> number of uses.
    layers : layer -> number of the site that is its pre-activation.
    sites : site -> shape of the array there.
    linear : uses of which the output is a linear combination, or None.
    narrowest : channels of the narrowest layer, copies included.
    work : multiplications and additions of one forward pass.
    notes : approximations.
    """

    copies: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    finite: set[int] = dataclasses.field(default_factory=set)
    roles: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    uses: dict[int, int] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    sites: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    linear: frozenset | None = None
    narrowest: int = 1 << 30
    work: float = 0.0
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def plan(closed: ClosedJaxpr, leaves: tuple[LeafStats, ...], inputs: list, width: int) -> Plan:
    """Walk the program on shapes; raises UnsupportedLayerError where no limit of infinite width exists."""
    finite: set[int] = set()
    while True:
        found = Plan(finite=set(finite))
        try:
            jax.eval_shape(lambda *xs: Wide(leaves, width, found).run(closed, list(xs)).array, *inputs)  # noqa: B023
            return found
        except Replan:
            assert found.finite != finite
            finite = found.finite


class Wide:
    """One run of the program: on shapes (`copies` None) to make the plan, or on drawn copies to follow it."""

    def __init__(self, leaves, width: int, plan: Plan, copies: dict[int, Any] | None = None, taps: dict | None = None):
        self.leaves, self.width, self.plan = leaves, width, plan
        self.copies, self.taps = copies, taps or {}
        self.layers: dict[str, Any] = {}
        self.eqn: Any = None
        self.scope = ""
        self.averaged = False  # whether some sum over channels was taken at its mean
        self._sites = 0

    # ------------------------------------------------------------------ services for the rules

    def refuse(self, reason: str, remedy: str = REMEDY, what: str = "", near: str = "") -> UnsupportedLayerError:
        """The four-part error for the current equation."""
        name = self.eqn.primitive.name
        scope = scope_of(Equation(self.eqn.primitive, {}, (), (), self.scope))
        near = near or next(reversed(self.plan.layers), "")
        layer = scope or (f"after {near}" if near else "the input")
        place = f"in {layer}" if scope or not near else layer
        return UnsupportedLayerError(
            f"{what or name} {place} (primitive `{name}`), which Monte Carlo does not cover either",
            "models whose layers have a limit of infinite width: weights that sum over wide channels, each in one role",
            reason,
            remedy,
            layer=layer,
            primitive=name,
        )

    def name(self, leaves) -> str:
        return ", ".join(self.leaves[leaf].name for leaf in sorted(leaves))

    def make_finite(self, carriers, otherwise: str):
        """Plan again with these layers as finite structures."""
        new = carriers - self.plan.finite
        if not new or self.copies is not None:
            raise self.refuse(otherwise)
        self.plan.finite |= new
        raise Replan

    def draw(self, weight: Weight, out: int, into: int) -> Any:
        """Copies of a weight, at least `out` of its outputs and (0: any number) `into` of its inputs."""
        if self.copies is None:
            for leaf in weight.leaves:
                have = self.plan.copies.setdefault(leaf, [out, into])
                have[0] = max(have[0], out)
                have[1] = min(filter(None, (have[1], into)), default=0)
            sizes = {leaf: (self.plan.copies[leaf][0], max(1, self.plan.copies[leaf][1])) for leaf in weight.leaves}
            return weight.drawn({k: jnp.zeros((*n, *self.leaves[k].shape)) for k, n in sizes.items()})
        out = min(self.copies[leaf].shape[0] for leaf in weight.leaves)
        into = min(self.copies[leaf].shape[1] for leaf in weight.leaves)
        return weight.drawn({leaf: self.copies[leaf][:out, :into] for leaf in weight.leaves})

    def use(self, weight: Weight, roles: dict[int, str]) -> frozenset:
        """Register one use of the leaves; each axis of a leaf must keep its role over the whole program."""
        for axis, labels in enumerate(weight.labels):
            for label in labels:
                role, before = roles[axis], self.plan.roles.setdefault(label, roles[axis])
                if role != before and self.leaves[label[0]].shape[label[1]] > 1:
                    raise self.refuse(
                        f"the weight {self.leaves[label[0]].name} sums over one of its axes here and over another "
                        "elsewhere: W and its transpose in one forward pass are not independent, and their limit needs "
                        "corrections that are not part of this version",
                        f"untie the two uses; or {REMEDY}",
                        what=f"the weight {self.leaves[label[0]].name} in a second, different role",
                        near=layer_of(self.leaves[label[0]].name),
                    )
        if self.copies is None:
            for leaf in weight.leaves:
                self.plan.uses[leaf] = self.plan.uses.get(leaf, 0) + 1
        return frozenset((leaf, self.plan.uses[leaf]) for leaf in weight.leaves)

    def as_cloud(self, weight: Weight, like: Cloud | None) -> Cloud:
        """A weight as an array of its own: a bias, a scale, a position code."""
        uses = self.use(weight, dict.fromkeys(range(len(weight.shape)), "vector"))
        labelled = [bool(labels) for labels in weight.labels]
        if like is None:
            last = max((i for i, own in enumerate(labelled) if own), default=-1)
            parts = tuple(
                (Part(n, "b" if not own else "c" if i == last else "p"),)
                for i, (n, own) in enumerate(zip(weight.shape, labelled, strict=True))
            )
            copies, count = last >= 0, -(-self.width // max(1, weight.shape[last] if last >= 0 else 1))
        else:
            own = [i for i, group in enumerate(like.parts) if any(p.kind == "c" for p in group)]
            own = [i for i in own if channel(like.parts[i])] or own
            size = [math.prod(p.size for p in group) for group in like.parts]
            copies = like.copies and any(labelled[i] and weight.shape[i] == size[i] for i in own if i < len(labelled))
            count = like.array.shape[0] if like.copies else 1
            parts = tuple(
                group if weight.shape[i] == size[i] and labelled[i] else (Part(weight.shape[i], "b"),)
                for i, group in enumerate(like.parts[: len(labelled)])
            )
        if weight.leaves & self.plan.finite:
            copies = False
        array = self.draw(weight, count if copies else 1, 1)[:, 0]
        array = array[:count] if copies else array[0]
        return Cloud(array, parts if copies else structural(parts), copies, weight.leaves, uses)

    def record(self, layer: str, cloud: Cloud) -> Cloud:
        """Remember the output of a layer, first its contraction, then with its bias; a tap is added to it."""
        site, self._sites = self._sites, self._sites + 1
        if self.copies is None:
            self.plan.layers[layer], self.plan.sites[site] = site, tuple(cloud.array.shape)
        if site in self.taps:
            cloud = dataclasses.replace(cloud, array=cloud.array + self.taps[site])
        if site == self.plan.layers.get(layer):
            self.layers[layer] = cloud.array
        return dataclasses.replace(cloud, layer=layer)

    def each(self, function, operands: list) -> tuple[Any, bool]:
        """`function` of known arrays and clouds, on every copy; and whether there are copies."""
        counts = [v.array.shape[0] for v in operands if isinstance(v, Cloud) and v.copies]
        if not counts:
            return function(*[v.array for v in operands]), False
        arrays = [v.array[: min(counts)] if isinstance(v, Cloud) and v.copies else v.array for v in operands]
        axes = [0 if isinstance(v, Cloud) and v.copies else None for v in operands]
        return jax.vmap(function, axes)(*arrays), True

    # ------------------------------------------------------------------ the walk

    def run(self, closed: ClosedJaxpr, inputs: list) -> Cloud:
        """The model's output on input leaves."""
        weights = []
        for i, leaf in enumerate(self.leaves):
            shape = tuple(leaf.shape)
            labels = tuple(frozenset({(i, axis)}) for axis in range(len(shape)))
            weights.append(Weight(shape, frozenset({i}), labels, lambda get, i=i: get(i)))
        operands = weights + [Known(real(x), True) for x in inputs]
        (output,) = self._jaxpr(closed.jaxpr, operands, [Known(real(c)) for c in closed.consts], "")
        if isinstance(output, Weight):
            output = self.as_cloud(output, None)
        if isinstance(output, Known):
            output = Cloud(output.array, positions(output.shape), False)
        if self.averaged and not output.copies and not output.carriers and output.linear is None:
            raise self.refuse(
                "the output is a mean over channels: at infinite width it is one number for all networks, and its "
                "fluctuations and its tangent kernel are of lower order",
                "put a Dense layer behind the mean; or measure at finite width with ij.monte_carlo_kernels",
            )
        if self.copies is None:
            self.plan.linear = output.linear
        return output

    def _jaxpr(self, jaxpr: Jaxpr, arguments: list, consts: list, scope: str) -> list:
        env = dict(zip(jaxpr.invars, arguments, strict=True)) | dict(zip(jaxpr.constvars, consts, strict=True))
        read = lambda atom: Known(real(atom.val)) if isinstance(atom, Literal) else env[atom]  # noqa: E731
        for eqn in needed(jaxpr):
            operands = [read(atom) for atom in eqn.invars]
            stack = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
            results = self._equation(eqn, operands, stack)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, operands: list, scope: str) -> list:
        from initjax.infinite import wide_products  # noqa: F401  (adds its rules)
        from initjax.infinite.wide_rules import rule_for, whole

        self.eqn, self.scope = eqn, scope
        name = eqn.primitive.name
        if all(isinstance(v, Known) for v in operands):
            out = bind(eqn)(*[v.array for v in operands])
            data = any(v.data for v in operands)
            return [Known(real(x), data) for x in (out if isinstance(out, list | tuple) else [out])]
        body = call_body(eqn)
        if body is not None and name.startswith("custom") and (results := whole(self, operands, body)) is not None:
            return results
        if name == "scan":
            closed = unrolled(eqn)
            if closed is None:
                raise self.refuse("a loop of more than 256 turns is not unrolled", near=near_of(operands))
            body = closed.jaxpr, closed.consts
        if body is not None:
            return self._jaxpr(body[0], operands, [Known(real(c)) for c in body[1]], scope)
        return rule_for(self, eqn)(self, operands)


def needed(jaxpr: Jaxpr) -> list:
    """The equations that the results need: a module may update running averages that nobody reads."""
    wanted, kept = set(v for v in jaxpr.outvars if not isinstance(v, Literal)), []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def near_of(operands) -> str:
    return next((v.layer for v in operands if isinstance(v, Cloud) and v.layer), "")


def bind(eqn):
    """The primitive of an equation as a function, with every floating type as wide as its operands."""
    params = {k: _widened(v) for k, v in eqn.params.items()}
    primitive = eqn.primitive

    def function(*arrays):
        if primitive.name.startswith("custom") or "jaxpr" in params:
            cast = [_like(x, v.aval) for x, v in zip(arrays, eqn.invars, strict=True)]
            return one_equation(eqn)(*cast)
        arrays = [_integer(x, v.aval) for x, v in zip(arrays, eqn.invars, strict=True)]
        if primitive.name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
            return jnp.asarray(arrays[0], real_type())
        return primitive.bind(*arrays, **params)

    return function


def _like(x, aval):
    """An array of numbers in the type that the body of a call was traced with."""
    number = jnp.issubdtype(aval.dtype, jnp.floating) or jnp.issubdtype(aval.dtype, jnp.integer)
    return x.astype(aval.dtype) if number and x.dtype != aval.dtype else x


def _integer(x, aval):
    """An integer array in the type the program was traced with, whatever flag was on when it was made."""
    return x.astype(aval.dtype) if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != aval.dtype else x


def real_type():
    return jnp.result_type(float)


def real(value) -> Any:
    """Floating arrays in the widest type that is on; others as they are."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    value = jnp.asarray(value)
    return value.astype(real_type()) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _widened(value):
    floating = isinstance(value, np.dtype | type) and jnp.issubdtype(value, jnp.floating)
    return np.dtype(real_type()) if floating else value
