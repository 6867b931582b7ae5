"""A network as straight-line steps in which it is known where parameters meet data.

Calls are opened only where a parameter and data enter together; everything else, activations above all, stays one step,
so that custom derivatives remain the author's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from initjax.trace.flax import layer_of, leaf_names
from initjax.trace.jaxpr import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

# calls whose body may stand in their place; custom derivatives and control flow may not
_OPEN = ("jit", "pjit", "closed_call", "core_call", "core_closed_call", "remat", "remat2", "checkpoint")
_WEIGHING = ("dot_general", "conv_general_dilated", "gather")
_LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy")


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation on numbered values; literals among its operands are None in `inputs`."""

    eqn: JaxprEqn
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


@dataclasses.dataclass(frozen=True)
class Layer:
    """A place where a weight meets data, up to the bias that is added to it.

    Attributes
    ----------
    name : the module that owns the weight, such as `Dense_0`.
    step : the product, convolution or look-up.
    value : number of the pre-activation: the product, scaled by what is no data, plus the bias if there is one.
    leaves : the parameter leaves that enter.
    """

    name: str
    step: Step
    value: int
    leaves: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps of `apply(params, x)` in order.

    Attributes
    ----------
    params, data : numbers of the leaves of `params` and of `x`.
    constants : number -> array the model closes over.
    outputs : numbers of the leaves of the result, or a literal's value.
    leaves : number -> indices of the parameter leaves it depends on.
    from_data : numbers that depend on `x`.
    avals : number -> shape and dtype.
    names, sizes : paths of the parameter leaves, and their numbers of entries.
    """

    params: tuple[int, ...]
    data: tuple[int, ...]
    constants: dict[int, Any]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    leaves: dict[int, frozenset[int]]
    from_data: frozenset[int]
    avals: dict[int, Any]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def evaluate(self, params: Any, x: Any, change: Callable[[int, Any], Any] = lambda number, value: value):
        """Outputs as flat leaves; every computed value passes through `change(number, value)`."""
        env = self.given(jax.tree.leaves(params), jax.tree.leaves(x))
        return self.results(run_steps(self.steps, env, change))

    def given(self, params: list, x: Sequence = ()) -> dict[int, Any]:
        """Number -> value of constants, parameter leaves and (if any) data leaves."""
        pairs = [*zip(self.params, params, strict=True), *(zip(self.data, x, strict=True) if x else ())]
        return self.constants | dict(pairs)

    def results(self, env: dict[int, Any]) -> list:
        """The outputs as flat leaves, from the values of all steps."""
        return [env[out] if isinstance(out, int) else out.val for out in self.outputs]

    def layers(self) -> list[Layer]:
        """Every product, convolution or look-up of a weight with data, in order of computation; none inside loops."""
        return named(self.names, [found for _, *found in self.meetings()])

    def meetings(self) -> list[tuple[int, int, Layer]]:
        """(index of the step, largest leaf, layer without a name) wherever a weight meets data."""
        consumers: dict[int, list[Step]] = {}
        for step in self.steps:
            for number in step.inputs:
                consumers.setdefault(-1 if number is None else number, []).append(step)
        found = []
        for i, step in enumerate(self.steps):
            weights = [n for n in step.inputs if n is not None and self._is_param(n)]
            if step.name in _WEIGHING and len(weights) == 1 and step.outputs[0] in self.from_data:
                value, leaves = self._pre_activation(step.outputs[0], consumers)
                leaf = max(self.leaves[weights[0]], key=lambda i: self.sizes[i])
                found.append((i, leaf, Layer("", step, value, self.leaves[weights[0]] | leaves)))
        return found

    def _is_param(self, number):
        return number not in self.from_data and bool(self.leaves.get(number))

    def _pre_activation(self, number, consumers):
        """Follow a product through scalings and layouts to the sum with its bias, as long as nothing else uses it."""
        best, leaves = number, frozenset()
        while len(consumers.get(number, ())) == 1:
            (step,) = consumers[number]
            others = [n for n in step.inputs if n != number]
            if any(n is not None and n in self.from_data for n in others) or number in self.outputs:
                break
            if step.name == "add" and self._is_param(others[0]):
                return step.outputs[0], leaves | self.leaves[others[0]]
            if step.name in ("mul", "div") and step.inputs[0] == number:
                best = step.outputs[0]
            elif step.name == "mul":
                best = step.outputs[0]
            elif step.name not in _LAYOUT:
                break
            number = step.outputs[0]
        return best, leaves


def named(names: tuple[str, ...], found: list) -> list[Layer]:
    """Layers with the name of the module that owns their weight; (largest leaf, layer) in order of computation."""
    owners = [layer_of(names[leaf]) for leaf, _ in found]
    weights: dict[str, set[int]] = {}
    for owner, (leaf, _) in zip(owners, found, strict=True):
        weights.setdefault(owner, set()).add(leaf)
    result, seen = [], {}
    for owner, (leaf, layer) in zip(owners, found, strict=True):
        # two weights of one module go by their own names, one weight used twice by a number
        name = owner if len(weights[owner]) == 1 else names[leaf]
        seen[name] = seen.get(name, 0) + 1
        result.append(dataclasses.replace(layer, name=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return result


def run_steps(
    steps: tuple[Step, ...], env: dict[int, Any], change: Callable[[int, Any], Any] = lambda number, value: value
) -> dict[int, Any]:
    """`env`, number -> value, with what the steps compute; each value passes through `change(number, value)`."""
    env = dict(env)
    for step in steps:
        for number, value in zip(step.outputs, run_step(step, env), strict=True):
            env[number] = change(number, value)
    return env


def trace(apply: Callable, params: Any, x: Any) -> Program:
    """The program of `apply` at the shapes of `params` and `x` (arrays or `ShapeDtypeStruct`)."""
    closed = jax.make_jaxpr(apply)(params, x)
    leaves = jax.tree.leaves(params)
    origins = [(frozenset({i}), False) for i in range(len(leaves))]
    origins += [(frozenset(), True)] * (len(closed.jaxpr.invars) - len(leaves))
    return as_program(
        closed, origins, len(leaves), leaf_names(params), tuple(math.prod(np.shape(leaf)) for leaf in leaves)
    )


def as_program(closed: ClosedJaxpr, origins: list, n_params: int, names: tuple[str, ...], sizes: tuple) -> Program:
    """A jaxpr as a program, of whose inputs `origins` says (the leaves that enter, whether data do)."""
    avals: dict[int, Any] = {}
    constants: dict[int, Any] = {}
    leaves: dict[int, frozenset[int]] = {}
    from_data: set[int] = set()
    steps: list[Step] = []

    def new(var) -> int:
        avals[len(avals)] = var.aval
        return len(avals) - 1

    def constant(var, value) -> int:
        constants[number := new(var)] = value
        return number

    def run(jaxpr: Jaxpr, arguments, consts):
        env = dict(zip(jaxpr.invars, arguments, strict=True))
        env.update((var, constant(var, value)) for var, value in zip(jaxpr.constvars, consts, strict=True))
        read = lambda atom: atom if isinstance(atom, Literal) else env[atom]  # noqa: E731
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            numbers = [n for n in operands if isinstance(n, int)]
            mixed = any(leaves.get(n) and n not in from_data for n in numbers) and any(n in from_data for n in numbers)
            body = _body(eqn) if mixed else None
            if body is not None:
                given = [n if isinstance(n, int) else constant(n, n.val) for n in operands]
                results = run(body.jaxpr, given, body.consts)
            else:
                results = [new(var) for var in kept(eqn)]
                steps.append(Step(eqn, tuple(n if isinstance(n, int) else None for n in operands), tuple(results)))
                for result in results:
                    leaves[result] = frozenset().union(*(leaves.get(n, frozenset()) for n in numbers))
                    if any(n in from_data for n in numbers):
                        from_data.add(result)
            env.update(zip(eqn.outvars if body else kept(eqn), results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [new(var) for var in closed.jaxpr.invars]
    leaves.update((number, of) for number, (of, _) in zip(inputs, origins, strict=True))
    from_data.update(number for number, (_, data) in zip(inputs, origins, strict=True) if data)
    outputs = run(closed.jaxpr, inputs, closed.consts)
    return Program(
        params=tuple(inputs[:n_params]),
        data=tuple(inputs[n_params:]),
        constants=constants,
        steps=tuple(_needed(steps, outputs)),
        outputs=tuple(outputs),
        leaves=leaves,
        from_data=frozenset(from_data),
        avals=avals,
        names=names,
        sizes=sizes,
    )


def _needed(steps, outputs):
    needed, kept = {n for n in outputs if isinstance(n, int)}, []
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            kept.append(step)
            needed.update(n for n in step.inputs if n is not None)
    return kept[::-1]


def _body(eqn) -> ClosedJaxpr | None:
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if eqn.primitive.name in _OPEN else None
    if isinstance(body, Jaxpr):
        return ClosedJaxpr(body, ()) if not body.constvars else None
    return body


def run_step(step: Step, env):
    """The values of a step: its equation as a program of one equation, which keeps custom derivatives."""
    eqn = step.eqn
    operands = {var: env[number] for var, number in zip(eqn.invars, step.inputs, strict=True) if number is not None}
    return _one_equation(eqn)(*operands.values())


def _one_equation(eqn):
    variables = list(dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, Literal)))
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    jaxpr = empty.replace(invars=variables, outvars=kept(eqn), eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))


def kept(eqn):
    """The results of an equation but for those that nobody reads, which have no name."""
    return [var for var in eqn.outvars if type(var).__name__ != "DropVar"]
