r"""The subnetwork-maximum function of a Flax model, read from its trace.

The walked program is reduced to three kinds of node: the input, a nonlinear layer r(child), and a normalized sum
sum_i w_i^2 child_i, whose weights are the coefficients in the model's own code; affine layers keep correlations and
vanish. A subnetwork has one entrance and one exit: a dominates b, b post-dominates a, and everything between them
belongs to it (a residual branch, a stage, the whole model). M(x, r) feeds x into the entrance of each and takes the
largest exit. Longer chains dominate shorter ones, as r(c) >= c, so that only those are kept that no other prolongs.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from initjax.errors import UnsupportedLayerError
from initjax.gaussian.activation import as_activation
from initjax.gaussian.closed import recognise
from initjax.shaping.leaky import is_homogeneous
from initjax.trace.domain import Atom, Base, Ew, Lin, Sum, is_zero
from initjax.trace.flax import as_functional
from initjax.trace.graph import bases_of
from initjax.trace.program import read_model, trace_program
from initjax.trace.walk import Walk

_SAME = 1e-5  # two functions are one
_UNIT = 1e-5  # squared weights of a sum add up to 1 within this: constants are float32


@dataclasses.dataclass(frozen=True)
class SubnetworkMaximum:
    """M(x, r), the largest value that a subnetwork of the model makes of x when each nonlinear layer maps y to r(y).

    Attributes
    ----------
    nodes : the reduced graph in order of computation: ("input",), ("layer", child) or ("sum", ((w^2, child), ...)).
    regions : pairs (first node, last node) of the subnetworks that no other prolongs.
    layers : number of nonlinear layers on the longest path.
    """

    nodes: tuple
    regions: tuple[tuple[int, int], ...]
    layers: int

    def __call__(self, x, r):
        """The largest exit value; x and r as in the packages of the papers."""
        return max(self._through(x, r, *region) for region in self.regions)

    def _through(self, x, r, first: int, last: int):
        values: dict[int, Any] = {first: r(x) if self.nodes[first][0] == "layer" else x}
        for n in range(first + 1, last + 1):
            kind, *rest = self.nodes[n]
            if kind == "layer" and rest[0] in values:
                values[n] = r(values[rest[0]])
            elif kind == "sum" and all(child in values for _, child in rest[0]):
                values[n] = sum(weight * values[child] for weight, child in rest[0])
        return values[last]


def subnetwork_maximum(model, inputs, phi, *, apply_kwargs=None, rngs=None) -> SubnetworkMaximum:
    r"""The subnetwork-maximum function M(x, r) of a model, which DKS and TAT distribute their targets with.

    Parameters
    ----------
    model : as in `ij.kernel_fn`; its activation is `phi`, its sums have constant weights whose squares add up to 1.
    inputs : example batch or call arguments; fixes shapes.
    phi : the activation in the model that is going to be shaped. For the relu family every relu and leaky relu counts.
    apply_kwargs, rngs : as in `ij.kernel_fn`.

    Returns
    -------
    SubnetworkMaximum, a callable M(x, r) as `subnet_max_func` of the authors' package takes it.

    Raises
    ------
    UnsupportedLayerError : another nonlinearity than phi, a sum that is not normalized or adds dependent branches,
        random biases, norms, attention; each names the layer.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         x = nn.Dense(64)(x)
    ...         branch = nn.Dense(64)(jnp.tanh(nn.Dense(64)(jnp.tanh(x))))
    ...         return nn.Dense(1)(jnp.tanh(0.8 * x + 0.6 * branch))
    >>> maximum = ij.shaping.subnetwork_maximum(Net(), jnp.ones((1, 8)), jnp.tanh)
    >>> print(f"{maximum(1.0, lambda slope: 1.1 * slope):.4f}")  # 1.1 (0.64 + 0.36 * 1.1^2) = 1.1832, the branch 1.21
    1.2100

    References
    ----------
    Martens et al. 2021 (arXiv:2110.01765), maximal slope function; Zhang, Botev, Martens 2022 (arXiv:2203.08120),
    appendix, subnetwork maximizing function.
    """
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    weights = read_model(functional)
    leaves = [np.zeros(v.shape, v.dtype) + 1 for v in jax.tree.leaves(inputs)]
    shapes = jax.tree.unflatten(jax.tree.structure(inputs), [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves])
    walked = Walk(trace_program(functional, weights, shapes), _no_mean).run(leaves)
    reduction = _Reduction(phi)
    last = reduction.of(walked.output.body, "output")
    return reduction.finished(last)


def _no_mean(body):
    raise _refusal(
        "",
        "a norm or a mean over channels",
        "affine layers, normalized sums and the activation",
        "shaped layers keep second moment 1 and mean 0 by themselves; DKS and TAT replace norms",
        "remove the norm (BatchNorm, LayerNorm) from the model that is shaped",
    )


def _refusal(layer: str, given: str, accepted: str, why: str, remedy: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{given}{f', near layer {layer}' if layer else ''}", accepted, why, remedy, layer=layer
    )


class _Reduction:
    """From the atoms of the trace to nodes; every atom and sum becomes one node."""

    def __init__(self, phi):
        self.act = as_activation(phi)
        self.family = is_homogeneous(self.act)
        self.nodes: list[tuple] = [("input",)]
        self.seen: dict[Any, int] = {}
        self.kept: list[Any] = []  # ids stay unique while their objects live

    def add(self, node: tuple) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def of(self, body, near: str) -> int:
        """The node of a sum or an atom; iterative over deep networks through the order of creation."""
        todo = [body]
        while todo:
            top = todo[-1]
            missing = [c for c in _children(top) if id(c) not in self.seen]
            if missing:
                todo += missing
                continue
            todo.pop()
            if id(top) not in self.seen:
                self.kept.append(top)
                self.seen[id(top)] = self._node(top, near)
        return self.seen[id(body)]

    def _node(self, thing, near: str) -> int:
        if isinstance(thing, Sum):
            return self._sum(thing, 1.0, near)
        if isinstance(thing, Ew):
            return self._layer(thing)
        if isinstance(thing, Base) and thing.kind == "dot":
            return self.seen[id(thing.operand)]
        if isinstance(thing, Lin) and isinstance(thing.source, Sum) and thing.map.kind != "scale":
            return self.seen[id(thing.source)]
        what, why, remedy = _WHY.get(type(thing).__name__, _WHY["Product"])
        raise _refusal(
            getattr(thing, "layer", ""), what, "affine layers, normalized sums and the activation", why, remedy
        )

    def _sum(self, body: Sum, factor: float, near: str) -> int:
        """The node of factor * body."""
        if not body.terms:
            return 0
        layer = next((a.layer for a, _ in body.terms if isinstance(a, Base)), near)
        weights = [_number(c, layer) * factor for _, c in body.terms]
        total = sum(w * w for w in weights)
        if abs(total - 1) > _UNIT or not is_zero(body.constant):
            known = "" if is_zero(body.constant) else ", plus a known array"
            shown = ", ".join(f"{w:.4g}" for w in weights[:6])
            raise _refusal(
                layer,
                f"a sum with weights {shown}{known}: their squares add up to {total:.4g}",
                "sums with constant weights whose squares add up to 1, of outputs of layers",
                "shaping holds every unit at q = 1, of which a branch of weight w carries the share w^2",
                "write w * x + jnp.sqrt(1 - w**2) * branch(x), and put gains into the activation or the initializer",
            )
        self._independent(body, layer)
        if len(weights) == 1:
            return self.seen[id(body.terms[0][0])]
        return self.add(
            ("sum", tuple((w * w / total, self.seen[id(a)]) for w, (a, _) in zip(weights, body.terms, strict=True)))
        )

    def _independent(self, body: Sum, layer: str) -> None:
        """Refuse sums of a Gaussian and a function of it, whose squares do not add up."""
        direct = [a for a, _ in body.terms if isinstance(a, Base)]
        for atom, _ in body.terms:
            if isinstance(atom, Ew) and any(b is d for b in bases_of(atom.leaf) for d in direct):
                raise _refusal(
                    layer,
                    "a sum of a pre-activation and its own activation",
                    "sums of branches that end in affine layers of their own",
                    "the terms are correlated, so that the second moment of the sum is not the sum of theirs",
                    "put a Dense or Conv layer behind the activation of the branch",
                )

    def _layer(self, atom: Ew) -> int:
        layer = next((b.layer for b in bases_of(atom.leaf) if isinstance(b, Base)), "")
        size = np.sqrt(sum(_number(c, layer) ** 2 for _, c in atom.leaf.terms))
        x = np.array([-3.1, -1.3, -0.7, -0.2, 0.3, 0.8, 1.7, 2.9])
        found = as_activation(atom.expr.fn)
        sign, scale = self._matches(found, x, size)
        if scale is None:
            raise _refusal(
                layer,
                f"the function {found.name} where phi = {self.act.name} is shaped",
                "models whose only nonlinearity is phi",
                "the target is divided among nonlinear layers of one kind",
                "make phi the argument of the model; keep softmax, losses and gates out of the module that is shaped",
            )
        child = self._sum(atom.leaf, sign * scale, layer)
        return self.add(("layer", child))

    def _matches(self, found, x, size) -> tuple[float, float | None]:
        """sign and scale with found(x) = phi(sign scale x): first the scale that normalizes the sum, then any."""
        if self.family:
            mine, its = recognise(self.act), recognise(found)
            if mine is None or its is None or not is_homogeneous(found):
                return 1.0, None
            return 1.0, its.parameters[0] / mine.parameters[0]
        value = found.values(x)

        def miss(scale):
            return float(np.max(np.abs(self.act.values(scale * x) - value)) / (1e-3 + np.max(np.abs(value))))

        for sign in (1.0, -1.0):
            if miss(sign / size) < _SAME:
                return sign, 1 / size
            scales = np.geomspace(0.1, 10, 101)
            for _ in range(4):
                best = int(np.argmin([miss(sign * s) for s in scales]))
                near = scales[max(best - 1, 0)], scales[min(best + 1, len(scales) - 1)]
                scales = np.linspace(*near, 41)
            if miss(sign * scales[20]) < _SAME:
                return sign, float(scales[20])
        return 1.0, None

    def finished(self, last: int) -> SubnetworkMaximum:
        """The graph behind the last node, and its subnetworks."""
        used, order = {last}, []
        for n in range(last, -1, -1):
            if n in used:
                order.append(n)
                used.update(self._operands(self.nodes[n]))
        number = {n: i for i, n in enumerate(reversed(order))}
        nodes = []
        for n in reversed(order):
            kind, *rest = self.nodes[n]
            if kind == "layer":
                nodes.append((kind, number[rest[0]]))
            elif kind == "sum":
                nodes.append((kind, tuple((w, number[c]) for w, c in rest[0])))
            else:
                nodes.append((kind,))
        depth = [0] * len(nodes)
        for i, node in enumerate(nodes):
            depth[i] = max((depth[c] for c in self._operands(node)), default=0) + (node[0] == "layer")
        if not any(node[0] == "layer" for node in nodes):
            raise _refusal(
                "output",
                f"a model without phi = {self.act.name}",
                "a model with at least one nonlinear layer of phi",
                "there is nothing to shape",
                "pass the activation that the model uses as phi",
            )
        return SubnetworkMaximum(tuple(nodes), _regions([self._operands(n) for n in nodes]), max(depth))

    @staticmethod
    def _operands(node) -> list[int]:
        if node[0] == "layer":
            return [node[1]]
        return [c for _, c in node[1]] if node[0] == "sum" else []


_WHY = {
    "Base": (
        "a random bias",
        "the shaped network keeps q = 1 with biases of zero; a random bias adds to q and to every correlation",
        "initialize biases with zeros (Flax's default)",
    ),
    "Lin": (
        "a factor that varies over positions",
        "it changes q from position to position",
        "leave the factor out of the shaped model, or apply it to the input before normalization",
    ),
    "Product": (
        "a product of two activations (a gate, attention)",
        "DKS and TAT have no rule for the correlation of a product",
        "shape the parts before and after it on their own, with depth=...",
    ),
}


def _children(thing: Sum | Atom) -> list:
    if isinstance(thing, Sum):
        return [atom for atom, _ in thing.terms]
    if isinstance(thing, Base):
        return [thing.operand] if isinstance(thing.operand, Sum) else []
    if isinstance(thing, Ew):
        return [atom for atom, _ in thing.leaf.terms]
    return [thing.source] if isinstance(thing, Lin) and isinstance(thing.source, Sum) else []


def _number(coefficient, layer: str) -> float:
    if isinstance(coefficient, float):
        return coefficient
    value = np.asarray(coefficient)
    if np.all(value == value.flat[0]):
        return float(value.flat[0])
    raise _refusal(layer, _WHY["Lin"][0], "constant weights", *_WHY["Lin"][1:])


def _regions(operands: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """Pairs (a, b) with one entrance and one exit: a dominates b and b post-dominates a; the longest for each end."""
    count = len(operands)
    consumers: list[list[int]] = [[] for _ in range(count)]
    for n, children in enumerate(operands):
        for c in children:
            consumers[c].append(n)
    before, after = [0] * count, [0] * count  # sets of nodes as bits
    for n in range(count):
        common = -1
        for c in operands[n]:
            common &= before[c]
        before[n] = (common if operands[n] else 0) | 1 << n
    for n in reversed(range(count)):
        common = -1
        for c in consumers[n]:
            common &= after[c]
        after[n] = (common if consumers[n] else 0) | 1 << n
    longest: dict[int, int] = {}
    for a in range(count):
        b = next(b for b in reversed(range(count)) if after[a] >> b & 1 and before[b] >> a & 1)
        longest.setdefault(b, a)  # the earliest entrance
    return tuple((a, b) for b, a in longest.items())
