"""Layers inside loops: a scan stays a scan, and its pre-activations are recorded and perturbed at every turn.

The body of a scan is a program of its own. A perturbation ("tap") of a value inside it has the turns as its first axis
and goes into the scan beside its other inputs; the values themselves come out the same way. Loops in loops add an axis
each.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.program import Layer, Program, Step, as_program, kept, named, run_step
from initjax.trace.jaxpr import Literal, scan_parts

SHOWN = 16  # turns of a loop up to which each is a layer of its own; of longer ones 1, 2, 4, ... and the last


class Place(NamedTuple):
    """A pre-activation, in loops or not.

    path : numbers of the scans around it (of their first results), outside in, and of the value itself.
    turns : lengths of these scans.
    aval : shape and dtype at one turn.
    """

    path: tuple[int, ...]
    turns: tuple[int, ...]
    aval: Any


class Row(NamedTuple):
    """One layer at one turn of every loop around it: `index` along the axes of turns."""

    layer: Layer
    place: Place
    index: tuple[int, ...]


def rows(program: Program) -> list[Row]:
    """Every layer, in order of computation; a layer in a loop once for each of its turns that are shown."""
    found = []
    for place, leaf, layer, order in _places(program, (), (), ()):
        # turns of a reversed scan run from the last index to the first
        counts = [range(n) for n in place.turns]
        shown = _shown(int(np.prod(place.turns, dtype=int)))
        for number, times in enumerate(itertools.product(*counts)):
            index = tuple(n - 1 - t if back else t for t, n, (_, back) in zip(times, place.turns, order, strict=False))
            when = tuple(x for (step, _), t in zip(order, (*times, 0), strict=True) for x in (step, t))
            found.append((when, number in shown, leaf, Row(layer, place, index)))
    found.sort(key=lambda item: item[0])
    layers = named(program.names, [(leaf, row.layer) for _, _, leaf, row in found])
    return [row._replace(layer=new) for new, (_, shown, _, row) in zip(layers, found, strict=True) if shown]


def evaluate(program: Program, params: Any, x: Any, taps: dict[tuple[int, ...], Any]) -> tuple[list, dict]:
    """Outputs as flat leaves, and the values at the paths of `taps` before these are added to them."""
    env = program.given(jax.tree.leaves(params), jax.tree.leaves(x))
    env, seen = _run(program, env, taps)
    return program.results(env), seen


def ranks(program: Program) -> dict[int, int]:
    """Number of axes of every parameter leaf; of a stacked one that a scan goes through, at one turn."""
    found = {i: len(program.avals[number].shape) for i, number in enumerate(program.params)}
    for step in program.steps:
        if step.name == "scan":
            body = body_of(program, step)
            for number in (n for n in body.data if n not in body.from_data and len(body.leaves[n]) == 1):
                (leaf,) = body.leaves[number]
                found[leaf] = min(found.get(leaf, 99), len(body.avals[number].shape))
            found |= {leaf: min(found.get(leaf, 99), rank) for leaf, rank in ranks(body).items()}
    return found


def held_bytes(program: Program) -> int:
    """Bytes of the values of all steps, those in loops at every turn."""
    total = 0
    for step in program.steps:
        avals = [program.avals[out] for out in step.outputs]
        total += sum(a.size * a.dtype.itemsize for a in avals if hasattr(a.dtype, "itemsize"))
        if step.name == "scan":
            total += step.eqn.params["length"] * held_bytes(body_of(program, step))
    return total


def body_of(program: Program, step: Step) -> Program:
    """The body of a scan; what a carry depends on is what any turn puts into it."""
    _, carries, closed = scan_parts(step.eqn)
    consts = scan_parts(step.eqn)[0]
    known = [(frozenset(), False) if n is None else _origin(program, n) for n in step.inputs]
    while True:
        body = as_program(closed, known, 0, program.names, program.sizes)
        came = [_origin(body, n) if isinstance(n, int) else (frozenset(), False) for n in body.outputs[:carries]]
        carry = known[consts : consts + carries]
        joined = [(a | b, x or y) for (a, x), (b, y) in zip(carry, came, strict=True)]
        if joined == carry:
            return body
        known[consts : consts + carries] = joined


def _origin(program: Program, number: int) -> tuple[frozenset[int], bool]:
    return program.leaves.get(number, frozenset()), number in program.from_data


def _shown(turns: int) -> set[int]:
    if turns <= SHOWN:
        return set(range(turns))
    return {2**i - 1 for i in range(turns.bit_length()) if 2**i <= turns} | {turns - 1}


def _places(program: Program, path: tuple, turns: tuple, order: tuple):
    """(place, largest leaf, layer, (step, whether its scan runs backwards) of every program around it)."""
    for i, leaf, layer in program.meetings():
        yield Place((*path, layer.value), turns, program.avals[layer.value]), leaf, layer, (*order, (i, False))
    for i, step in enumerate(program.steps):
        if step.name == "scan" and any(program.leaves.get(n) for n in step.inputs if n is not None):
            params = step.eqn.params
            around = (*order, (i, params["reverse"]))
            body = body_of(program, step)
            yield from _places(body, (*path, step.outputs[0]), (*turns, params["length"]), around)


def _run(program: Program, env: dict[int, Any], taps: dict) -> tuple[dict[int, Any], dict]:
    env, seen = dict(env), {}
    for step in program.steps:
        inside = {path[1:]: tap for path, tap in taps.items() if len(path) > 1 and path[0] == step.outputs[0]}
        if inside:
            values, found = _run_scan(program, step, env, inside)
            seen |= {(step.outputs[0], *path): value for path, value in found.items()}
        else:
            values = run_step(step, env)
        for number, value in zip(step.outputs, values, strict=True):
            if (number,) in taps:
                seen[(number,)] = value
                value = value + taps[(number,)]
            env[number] = value
    return env, seen


def _run_scan(program: Program, step: Step, env: dict[Any, Any], taps: dict) -> tuple[list, dict]:
    eqn, body = step.eqn, body_of(program, step)
    consts, carries, _ = scan_parts(eqn)
    atoms = zip(eqn.invars, step.inputs, strict=True)
    operands = [jnp.asarray(atom.val) if isinstance(atom, Literal) else env[n] for atom, n in atoms]
    fixed, carry, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def turn(carry, now):
        xs, taps = now
        given = body.constants | dict(zip(body.data, [*fixed, *carry, *xs], strict=True))
        done, seen = _run(body, given, taps)
        out = body.results(done)
        return out[:carries], (out[carries:], seen)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, seen) = jax.lax.scan(turn, carry, (xs, taps), **options)
    wanted = set(kept(eqn))
    return [value for var, value in zip(eqn.outvars, [*carry, *ys], strict=True) if var in wanted], seen


__all__ = ["Place", "Row", "body_of", "evaluate", "held_bytes", "ranks", "rows"]
