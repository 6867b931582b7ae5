"""How far a model's predicted kernels can be trusted at its own widths: the standard deviation of every layer's q.

The infinite-width program of the model (trace/walk.py) tells which layer feeds which, through which activation and how
many units. Along every chain of dense layers the four-point recursion of meanfield/finite.py gives the variance over
networks of S, the second moment of a layer's pre-activations given the layers before, and which width adds how much to
it. Where a layer has several sources (residual sums, norms), positions (convolutions) or weights that are not i.i.d.
(orthogonal), the recursion has no answer and none is given.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from initjax.gaussian.activation import as_activation
from initjax.meanfield.finite import LARGE, reaches_unstable, step
from initjax.meanfield.table import ramp
from initjax.trace.domain import Base, Ew, Lin, Sum
from initjax.trace.expr import VARIABLE, Expr, added, literal, scaled
from initjax.trace.maps import extents


class WidthEffect(NamedTuple):
    """Of one layer: the standard deviation of its S over networks, and whether first order in 1/width is small there.

    parts : layer before -> its units' part of the variance; units : layer before -> their number.
    """

    q_std: float
    reliable: bool
    parts: dict[str, float]
    units: dict[str, int]


def with_widths(layers: tuple, function: Any, predicted: Any, inputs: Any) -> tuple[tuple, list[str]]:
    """A list of `LayerReport` with what their widths do, and notes on where that is unknown or not small."""
    effects, missing = width_effects(function, predicted, inputs)
    last = effects[list(effects)[-1]] if effects else WidthEffect(0.0, True, {}, {})
    total = sum(last.parts.values())
    result = []
    for layer in layers:
        name = layer.name.partition("#")[0]
        effect = effects.get(name)
        result.append(
            dataclasses.replace(
                layer,
                q_std=effect.q_std if effect else None,
                units=last.units.get(name),
                width_share=last.parts[name] / total if name in last.parts and total > 0 else None,
            )
        )
    notes = [
        f"{name}: the spread of q over networks is not predicted (residual sums, norms, positions, or weights that are "
        "not i.i.d.)"
        for name in missing
    ]
    lost = next((name for name, effect in effects.items() if not effect.reliable), None)
    if lost is not None:
        notes.append(
            f"{lost}: from here on the standard deviation of q is not small beside q, or reaches an unstable fixed "
            "point: first order in 1/width is no estimate, and predictions at infinite width describe no single network"
        )
    return tuple(result), notes


class _Link(NamedTuple):
    source: str | None  # the layer before, None for the inputs
    phi: Expr
    units: int
    sigma_w: float
    biased: bool


def width_effects(function: Any, predicted: Any, inputs: Any) -> tuple[dict[str, WidthEffect], list[str]]:
    """Layer -> effect, and the names of the layers without one; from a KernelFunction and its Kernel."""
    walked = function.walk(inputs)
    count = len(jax.tree.leaves(inputs)[0])
    q = {layer.name: float(np.mean(layer.q)) for layer in predicted.layers}
    found: dict[str, WidthEffect] = {}
    names = {id(body): name for name, body in walked.layers.items()}
    for name, body in walked.layers.items():
        link = _link(body, names, walked.layers, function.weights, count)
        if link is None or (link.source is not None and link.source not in found) or not q.get(name, 0) > 0:
            continue
        if link.source is None:
            found[name] = WidthEffect(0.0, True, {}, {})
        else:
            found[name] = _through(link, q[link.source], q[name], found[link.source])
    return found, [name for name in walked.layers if name not in found]


def _through(link: _Link, k: float, after: float, before: WidthEffect) -> WidthEffect:
    act = as_activation(link.phi.fn)
    exact = ramp(act) is not None and not link.biased
    variance, new, factor = step(act, link.sigma_w, k, before.q_std**2, link.units, exact)
    source = str(link.source)
    parts = {name: factor * part for name, part in before.parts.items()} | {source: new}
    reliable = before.reliable
    if not exact and reliable:
        sigma_b = math.sqrt(max(after - link.sigma_w**2 * float(_second(act, k)), 0.0))
        far = reaches_unstable(act, link.sigma_w, sigma_b, np.array([after]), math.sqrt(variance))
        reliable = variance <= LARGE * after**2 and not far.any()
    return WidthEffect(math.sqrt(variance), bool(reliable), parts, before.units | {source: link.units})


def _second(act, k):
    from initjax.gaussian import moment

    return moment(act, k)


def _link(body: Sum, names, layers, weights, count: int) -> _Link | None:
    """The one source of a layer, or None where it is no plain dense layer with i.i.d. weights."""
    dots = [(atom, c) for atom, c in body.terms if isinstance(atom, Base) and atom.kind == "dot"]
    others = [atom for atom, _ in body.terms if not (isinstance(atom, Base) and atom.kind == "dot")]
    if len(dots) != 1 or not all(map(_is_bias, others)) or _number(body.constant) != 0:
        return None
    dot, c = dots[0][0], _number(dots[0][1])
    stats = weights[dot.view.leaf] if dot.view.leaf >= 0 else None
    axes = [dot.operand.axes[i] for i in dot.contracted]
    plain = math.prod(extents(body.axes)) == count
    if c is None or not plain or stats is None or stats.kind != "random" or stats.mean != 0 or stats.variance == 0:
        return None
    units = math.prod(axis.size for axis in axes)
    sigma_w = abs(c * dot.view.scale) * math.sqrt(units * stats.variance)
    if dot.operand.is_constant:
        return _Link(None, VARIABLE, units, sigma_w, bool(others))
    if not all(axis.channel for axis in axes):
        return None
    source = _function(dot.operand, names, layers)
    return None if source is None else _Link(*source, units, sigma_w, bool(others))


def _function(operand: Sum, names, layers) -> tuple[str, Expr] | None:
    """The layer whose pre-activations the operand is a function of, and the function."""
    constant = _number(operand.constant)
    leaves = {id(atom.leaf): atom.leaf for atom, _ in operand.terms if isinstance(atom, Ew)}
    linear = [(atom, c) for atom, c in operand.terms if not isinstance(atom, Ew)]
    if constant is None or len(leaves) > 1:
        return None
    total = literal(constant)
    if leaves:
        (leaf,) = leaves.values()
        if id(leaf) not in names:
            return None
        name = names[id(leaf)]
    else:
        name = next((n for n, body in layers.items() if _ratio(linear, body) is not None), None)
        if name is None:
            return None
    if linear:
        ratio = _ratio(linear, layers[name])
        if ratio is None:
            return None
        total = added(total, scaled(ratio, VARIABLE))
    for atom, c in operand.terms:
        if isinstance(atom, Ew):
            c = _number(c)
            if c is None:
                return None
            total = added(total, scaled(c, atom.expr))
    return name, total


def _ratio(terms, body: Sum) -> float | None:
    """The number by which the terms are those of a layer, if they are."""
    mine = {atom.number: _number(c) for atom, c in terms}
    theirs = {atom.number: _number(c) for atom, c in body.terms}
    if mine.keys() != theirs.keys() or _number(body.constant) != 0:
        return None
    pairs = [(mine[n], b) for n, b in theirs.items()]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    if len(ratios) < len(pairs):
        return None
    return ratios[0] if ratios and max(ratios) - min(ratios) <= 1e-12 * abs(ratios[0]) else None


def _is_bias(atom) -> bool:
    if isinstance(atom, Lin):
        return isinstance(atom.source, Sum) and all(_is_bias(inner) for inner, _ in atom.source.terms)
    return isinstance(atom, Base) and atom.kind == "vector"


def _number(coefficient) -> float | None:
    """A coefficient as one number, or None if it varies."""
    array = np.asarray(coefficient)
    first = float(array.flat[0]) if array.size else 0.0
    return first if np.all(array == first) else None
