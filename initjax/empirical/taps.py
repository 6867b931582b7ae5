r"""Where each weight meets data, and which gradients follow from what is recorded there.

Where a weight meets data in a product, y[t, j] = sum_i a[t, i] W[i, j] over positions t (tokens, pixels), the gradient
of an output o is sum_t a[t] g[t]^T with g = d f_o / d y: the cotangent of a zero added to y, a "tap". So a and g hold
the gradient of the weight without its being formed (structured derivatives: Novak, Sohl-Dickstein, Schoenholz 2022,
arXiv:2206.08720, section 3.4). Convolutions are products with patches, look-ups in a table with one-hot rows, batched
products and grouped convolutions are `groups` of products.

A "weight" here is a value that depends on parameters and not on data, at the point where it meets data: often a leaf
itself or a layout of it, otherwise any function of leaves (weight norm, low-rank updates, stacked kernels), through
which gradients of the weight are pulled back to the leaves. A weight that meets data in any other way (biases, gains,
tables added to positions, loops, custom derivatives) has its own per-example gradient taken, and no other's.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from initjax.empirical.program import Program, Step
from initjax.trace.jaxpr import Literal

_LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "rev")
_BROADCAST = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims")


class Use(NamedTuple):
    """One place where a weight meets data in a product, for one example.

    kind : "product", "convolution" or "lookup".
    step : the equation.
    value, operand : numbers of y and of a.
    groups, positions, inputs, units : sizes g, T, I, J of a, (g, T, I), and of the cotangents of y, (g, T, J).
    layout : what must agree for two uses of one weight to have gradients with the same arrangement of entries.
    """

    kind: str
    step: Step
    value: int
    operand: int
    groups: int
    positions: int
    inputs: int
    units: int
    layout: Any


@dataclasses.dataclass(frozen=True)
class Term:
    """A weight whose gradients are worked on together.

    Attributes
    ----------
    weight : its number in the program.
    uses : where it meets data; none if its gradient is taken as it is.
    leaves : the parameter leaves it stands for; of pulled-back weights, those it depends on.
    scale : factors between leaf and weight, (is_divisor, number or value) each.
    bias : number of a bias merged into the one use, its leaf, and its own scale.
    how : what the weight does, in a word, for tables.
    """

    weight: int
    uses: tuple[Use, ...]
    leaves: tuple[int, ...]
    scale: tuple[tuple[bool, Any], ...] = ()
    bias: "tuple[int, int, tuple[tuple[bool, Any], ...]] | None" = None
    how: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How gradients of the chosen leaves are had.

    Attributes
    ----------
    program : the network on one example.
    before, after : steps that are the same for all examples, and those that are not.
    direct : weights that are their leaves, up to layout and scale.
    pulled : weights that are other functions of `pulled_leaves`.
    """

    program: Program
    before: tuple[Step, ...]
    after: tuple[Step, ...]
    direct: tuple[Term, ...]
    pulled: tuple[Term, ...]
    pulled_leaves: tuple[int, ...]


def find_plan(program: Program, chosen: tuple[bool, ...], tapped: bool = True, merge: bool = True) -> Plan:
    """Terms for every chosen leaf that reaches the outputs.

    `tapped` = False takes every gradient as it is; `merge` puts a bias into the product it is added to.
    """
    before, after = _split(program)
    data = {n for step in after for n in step.outputs} | set(program.data)
    consumers: dict[int, list[Step]] = {}
    for step in after:
        for number in dict.fromkeys(step.inputs):
            if number is not None:
                consumers.setdefault(number, []).append(step)
    returned = [out for out in program.outputs if isinstance(out, int)]
    wanted = frozenset(leaf for leaf, keep in enumerate(chosen) if keep)
    depends = {n: program.leaves.get(n, frozenset()) & wanted for n in program.avals}
    met = dict.fromkeys([*consumers, *returned])
    weights = [n for n in met if n not in data and depends[n] and _is_real(program.avals[n])]
    owners: dict[int, list[int]] = {}
    for weight in weights:
        for leaf in depends[weight]:
            owners.setdefault(leaf, []).append(weight)

    makers = {n: step for step in before for n in step.outputs}
    direct, pulled_leaves = {}, set()
    for leaf, its in owners.items():
        scale = _isometry(program, makers, its[0], program.params[leaf]) if len(its) == 1 else None
        if scale is None or depends[its[0]] != {leaf}:
            pulled_leaves.add(leaf)
        else:
            direct[its[0]] = leaf, scale

    def uses(weight) -> tuple[Use, ...]:
        found = [_use(program, step, weight, data) for step in consumers.get(weight, [])]
        return () if weight in returned or None in found or not tapped else tuple(u for u in found if u is not None)

    def term(weight, leaves, scale=()):
        its = uses(weight)
        how = its[0].kind if its else "+".join(sorted({s.name for s in consumers.get(weight, [])})) or "output"
        return Term(weight, its, tuple(sorted(leaves)), scale, how=_WORDS.get(how, how))

    terms = {weight: term(weight, [leaf], scale) for weight, (leaf, scale) in direct.items()}
    for bias, (leaf, scale) in direct.items() if merge else ():
        host = _host(program, terms, consumers, returned, data, bias)
        if host is not None and terms[host].bias is None:
            terms[host] = dataclasses.replace(terms[host], bias=(bias, leaf, scale), leaves=(*terms[host].leaves, leaf))
            del terms[bias]
    pulled = [term(w, depends[w]) for w in weights if w not in direct and depends[w] & pulled_leaves]
    plan = Plan(program, before, after, tuple(terms.values()), tuple(pulled), tuple(sorted(pulled_leaves)))
    reached = sorted({leaf for t in plan.direct for leaf in t.leaves} | pulled_leaves)
    assert reached == sorted(owners), "every leaf that reaches the outputs is tapped or has its gradient taken"
    return plan


_WORDS = {"add": "bias", "mul": "scale", "add_any": "bias"}


def _is_real(aval) -> bool:
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.floating)


def _split(program):
    """Steps without data, and the others; a broadcast that only data see belongs to these, for its operand is less."""
    data, readers = set(program.from_data), {}
    for step in program.steps:
        for number in step.inputs:
            readers.setdefault(number, []).append(step)
    for step in reversed(program.steps):
        out = step.outputs[0]
        if step.name == "broadcast_in_dim" and out not in data and out in readers and program.leaves.get(out):
            larger = program.avals[out].size > program.avals[step.inputs[0]].size
            if larger and all(reader.outputs[0] in data for reader in readers[out]):
                data.add(out)
    before = tuple(s for s in program.steps if not data.intersection(s.outputs))
    return before, tuple(s for s in program.steps if data.intersection(s.outputs))


def _isometry(program, makers, number, leaf):
    """Factors by which `number` is a rearrangement of the leaf numbered `leaf`; None if it is not."""
    scale: list[tuple[bool, Any]] = []
    while number != leaf:
        step = makers.get(number)
        if step is None:
            return None
        sources = [n for n in step.inputs if n is not None and program.leaves.get(n)]
        if len(sources) != 1 or program.avals[sources[0]].size != program.avals[number].size:
            return None
        if step.name in ("mul", "div"):
            side = step.inputs.index(sources[0])
            other = step.inputs[1 - side]
            if (step.name == "div" and side == 1) or step.eqn.invars[1 - side].aval.size != 1:
                return None
            atom = step.eqn.invars[1 - side]
            scale.append((step.name == "div", atom.val if isinstance(atom, Literal) else other))
        elif step.name == "convert_element_type":
            if not (_is_real(program.avals[number]) and _is_real(program.avals[sources[0]])):
                return None
        elif step.name not in (*_LAYOUT, "broadcast_in_dim", "neg"):
            return None
        number = sources[0]
    return tuple(scale)


def _use(program, step, weight, data) -> Use | None:
    """How a step multiplies `weight` with data, or None if it does something else."""
    if step.inputs.count(weight) != 1 or len(step.inputs) != 2 or len(step.outputs) != 1:
        return None
    side = step.inputs.index(weight)
    operand = step.inputs[1 - side]
    if operand not in data or not _is_real(program.avals[step.outputs[0]]):
        return None
    w, a, y = (program.avals[n].shape for n in (weight, operand, step.outputs[0]))
    size = lambda shape, axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    params = step.eqn.params

    def use(kind, groups, positions, inputs, units, layout):
        return Use(kind, step, step.outputs[0], operand, groups, positions, inputs, units, layout)

    if step.name == "dot_general":
        contract, batch = params["dimension_numbers"]
        free_a = [i for i in range(len(a)) if i not in (*contract[1 - side], *batch[1 - side])]
        free_w = [i for i in range(len(w)) if i not in (*contract[side], *batch[side])]
        layout = ("product", tuple(batch[side]), tuple(contract[side]), len(free_w))
        return use(
            "product", size(a, batch[1 - side]), size(a, free_a), size(a, contract[1 - side]), size(w, free_w), layout
        )
    if step.name == "conv_general_dilated" and side == 1 and params["batch_group_count"] == 1:
        groups, spec = params["feature_group_count"], params["dimension_numbers"].rhs_spec
        units = w[spec[0]] // groups
        return use(
            "convolution", groups, math.prod(y) // (groups * units), size(w, spec[1:]), units, ("convolution", spec, w)
        )
    if step.name == "gather" and side == 0:
        numbers, rows = params["dimension_numbers"], (1, *w[1:])
        whole_rows = (
            tuple(params["slice_sizes"]) == rows
            and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
            and not numbers.operand_batching_dims
            and tuple(numbers.offset_dims) == tuple(range(len(y) - len(w) + 1, len(y)))
        )
        if whole_rows:
            return use("lookup", 1, math.prod(a), w[0], math.prod(w[1:]), ("lookup",))
    return None


def _host(program, terms, consumers, returned, data, bias) -> int | None:
    """The weight into whose only product `bias` is added, position by position the same; None if there is none."""
    number, axes = bias, None
    while True:
        steps = consumers.get(number, [])
        if len(steps) != 1 or number in returned:
            return None
        (step,) = steps
        if step.name == "broadcast_in_dim" and number == bias:
            aval, mapped = program.avals[number], step.eqn.params["broadcast_dimensions"]
            axes = {mapped[i] for i, n in enumerate(aval.shape) if n > 1}
            number = step.outputs[0]
            continue
        break
    if step.name not in ("add", "sub") or len(step.inputs) != 2 or step.inputs[0] == step.inputs[1]:
        return None
    y = step.inputs[1 - step.inputs.index(number)]
    if y not in data or program.avals[y].shape != program.avals[step.outputs[0]].shape:
        return None
    if axes is None:
        axes = {i for i, n in enumerate(program.avals[number].shape) if n > 1}
    if len(consumers.get(y, [])) != 1 or y in returned:
        return None
    for weight, term in terms.items():
        if len(term.uses) == 1 and term.uses[0].value == y and term.uses[0].kind != "lookup":
            use, shape = term.uses[0], program.avals[y].shape
            of_units = {i for i in unit_axes(program, use) if shape[i] > 1}
            # entry for entry on the units (or on all of y, if there is one position), the same at each position
            return weight if axes == of_units and np.prod([shape[i] for i in axes]) == use.groups * use.units else None
    return None


def unit_axes(program: Program, use: Use) -> tuple[int, ...]:
    """The axes of y along which weights differ."""
    y = program.avals[use.value].shape
    if use.kind == "convolution":
        return (use.step.eqn.params["dimension_numbers"].out_spec[1],)
    _, batch, _, free = use.layout
    on_left = use.step.inputs.index(use.operand) == 1
    units = range(len(batch), len(batch) + free) if on_left else range(len(y) - free, len(y))
    return (*range(len(batch)), *units)
