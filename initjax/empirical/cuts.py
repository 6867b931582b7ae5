"""Where a network can be cut: values through which all of the signal passes, and the maps between them.

A value that depends on the data is a cut if every path from the data to the outputs runs through it: pre-activations
of a plain network, the residual stream behind each sum, and so on. Then the Jacobian of the network is the product of
the Jacobians from one cut to the next. In the order of computation, a value is such a cut exactly if it is the only
one of those computed so far that is still needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from initjax.empirical.program import Program, run_steps


class Piece(NamedTuple):
    """The map from one value of the program to a later one.

    name : the layers within; start, stop : numbers of the two values.
    """

    name: str
    start: int
    stop: int


def cuts(program: Program) -> dict[int, int]:
    """Number of each cut -> index of its step, -1 for the data themselves, in order."""
    smooth = {n for n in program.from_data if jnp.issubdtype(program.avals[n].dtype, jnp.floating)}
    last: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        last.update((n, i) for n in step.inputs if n in smooth)
    last.update((n, len(program.steps)) for n in program.outputs if isinstance(n, int) and n in smooth)
    live = {n for n in program.data if n in last}
    found = {next(iter(live)): -1} if len(live) == 1 else {}
    for i, step in enumerate(program.steps):
        live |= {n for n in step.outputs if n in last}
        live = {n for n in live if last[n] > i}
        if len(live) == 1:
            found.setdefault(next(iter(live)), i)
    return found


def pieces(program: Program) -> list[Piece]:
    """The network as a chain of pieces with at least one layer each, from the data (or the first cut) to the output."""
    at = cuts(program)
    if not at:
        return []
    order = {n: i for i, step in enumerate(program.steps) for n in step.outputs}
    found, inside, start = [], [], next(iter(at))
    layers = program.layers()
    for position, layer in enumerate(layers):
        if order[layer.value] <= at[start]:
            continue  # in front of the first cut, such as a table of tokens
        inside.append(layer.name)
        stop = next((n for n, i in at.items() if i >= order[layer.value]), None)
        following = order[layers[position + 1].value] if position + 1 < len(layers) else len(program.steps)
        if stop is not None and at[stop] < following:
            found.append(Piece(" .. ".join(dict.fromkeys((inside[0], inside[-1]))), start, stop))
            start, inside = stop, []
    end = next(reversed(at))
    if end != start:
        found.append(Piece("output", start, end))
    return found


def piece_map(program: Program, starts: list[int], stops: list[int]) -> Callable[[list, list, list], list]:
    """`map(parameter leaves, data leaves, values at starts) -> values at stops`; starts are data leaves or one cut."""
    wanted, steps = set(stops), []
    for step in reversed(program.steps):
        if wanted.intersection(step.outputs) - set(starts):
            steps.append(step)
            wanted.update(n for n in step.inputs if n is not None)

    def run(params, data, values):
        given = dict(zip(starts, values, strict=True))
        env = run_steps(tuple(steps[::-1]), program.given(params, data) | given, lambda n, v: given.get(n, v))
        return [env[n] for n in stops]

    return run
