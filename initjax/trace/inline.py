"""A jaxpr as one flat list of equations: nested calls inlined, dead equations removed, every value numbered."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from initjax.trace.jaxpr import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, scan_parts

# calls whose body is simply part of the program; control flow (scan, while, cond) is not among them
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "core_closed_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
_LONGEST = 256  # turns of a scan that are unrolled


@dataclasses.dataclass(frozen=True)
class Equation:
    """One primitive applied to numbered values; `scope` is the author's name stack, such as `MLP/Dense_0`."""

    primitive: Any
    params: dict
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True)
class Straight:
    """A straight-line program over numbered values.

    Attributes
    ----------
    inputs, outputs : numbers of the program's inputs and outputs.
    constants : number -> value, for literals and arrays that the model closes over.
    equations : in order; every one is needed by some output.
    avals : number -> shape and dtype.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]
    equations: tuple[Equation, ...]
    avals: dict[int, Any]


def evaluate(body: Straight, inputs: list, change=lambda number, value: value) -> dict[int, Any]:
    """Number -> value of everything in the program; inputs and results pass through `change(number, value)`."""
    env = {n: jnp.asarray(value, body.avals[n].dtype) for n, value in body.constants.items()}
    env.update((n, change(n, value)) for n, value in zip(body.inputs, inputs, strict=True))
    for equation in body.equations:
        results = equation.primitive.bind(*(env[n] for n in equation.inputs), **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        env.update((n, change(n, value)) for n, value in zip(equation.outputs, results, strict=True))
    return env


def inline(closed: ClosedJaxpr) -> Straight:
    """Flatten a closed jaxpr; `constants` and `equations` hold only what the outputs need."""
    constants: dict[int, Any] = {}
    equations: list[Equation] = []
    avals: dict[int, Any] = {}

    def new(aval) -> int:
        avals[len(avals)] = aval
        return len(avals) - 1

    def constant(value, aval) -> int:
        number = new(aval)
        constants[number] = value
        return number

    def run(jaxpr: Jaxpr, arguments: list[int], consts: list[int], scope: str) -> list[int]:
        env = dict(zip(jaxpr.invars, arguments, strict=True)) | dict(zip(jaxpr.constvars, consts, strict=True))

        def read(atom) -> int:
            return constant(atom.val, atom.aval) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            stack = _join(scope, str(eqn.source_info.name_stack))
            body = call_body(eqn)
            if (plain := unrolled(eqn) or spread(eqn)) is not None:
                values = [constant(v, c.aval) for v, c in zip(plain.consts, plain.jaxpr.constvars, strict=True)]
                results = run(plain.jaxpr, operands, values, stack)
            elif body is None:
                results = [new(var.aval) for var in eqn.outvars]
                equations.append(Equation(eqn.primitive, eqn.params, tuple(operands), tuple(results), stack))
            else:
                inner, values = body
                results = run(
                    inner, operands, [constant(v, c.aval) for v, c in zip(values, inner.constvars, strict=True)], stack
                )
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [new(var.aval) for var in closed.jaxpr.invars]
    consts = [constant(v, c.aval) for v, c in zip(closed.consts, closed.jaxpr.constvars, strict=True)]
    outputs = run(closed.jaxpr, inputs, consts, "")
    return prune(Straight(tuple(inputs), tuple(outputs), constants, tuple(equations), avals))


def prune(program: Straight, outputs: tuple[int, ...] | None = None) -> Straight:
    """Keep the equations and constants that `outputs` (default: all outputs) need."""
    outputs = program.outputs if outputs is None else outputs
    needed = set(outputs)
    kept = []
    for equation in reversed(program.equations):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    constants = {number: value for number, value in program.constants.items() if number in needed}
    return Straight(program.inputs, outputs, constants, tuple(reversed(kept)), program.avals)


def unrolled(eqn) -> ClosedJaxpr | None:
    """A scan as straight-line code: weights used in every turn are then seen to be the same. None for anything else."""
    params = eqn.params
    if eqn.primitive.name != "scan" or params["length"] > _LONGEST:
        return None
    length = params["length"]
    consts, carries, closed = scan_parts(eqn)
    body = jaxpr_as_fun(closed)

    def turns(*arguments):
        fixed, carry, xs = (
            arguments[:consts],
            list(arguments[consts : consts + carries]),
            arguments[consts + carries :],
        )
        collected: list[list] = []
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        for i in order:
            out = body(*fixed, *carry, *[jax.lax.index_in_dim(x, i, 0, keepdims=False) for x in xs])
            carry = out[:carries]
            collected.append(out[carries:])
        if params["reverse"]:
            collected.reverse()
        stacked = [
            jax.lax.concatenate([jax.lax.expand_dims(y, (0,)) for y in ys], 0) for ys in zip(*collected, strict=True)
        ]
        return [*carry, *stacked]

    return jax.make_jaxpr(turns)(*[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars])


def spread(eqn) -> ClosedJaxpr | None:
    """A tile as broadcasts and a reshape, which have rules. None for anything else."""
    if eqn.primitive.name != "tile":
        return None
    (value,), reps = eqn.invars, eqn.params["reps"]

    def steps(x):
        sizes, kept = [], []
        for n, r in zip(x.shape, reps, strict=True):
            sizes += [r, n] if r > 1 and n > 1 else [max(r, n)]
            kept.append(len(sizes) - 1)
        x = jax.lax.broadcast_in_dim(x, sizes, kept)
        shape = tuple(r * n for n, r in zip(value.aval.shape, reps, strict=True))
        return x if x.shape == shape else jax.lax.reshape(x, shape)

    return jax.make_jaxpr(steps)(jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))


def call_body(eqn) -> tuple[Jaxpr, list] | None:
    """The body of a call and its constants; None for an equation that is no call."""
    if eqn.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(name)
        if isinstance(body, ClosedJaxpr):
            return body.jaxpr, list(body.consts)
        if isinstance(body, Jaxpr) and not body.constvars:
            return body, []
    return None


def _join(scope: str, inner: str) -> str:
    return "/".join(part for part in (scope, inner) if part)
