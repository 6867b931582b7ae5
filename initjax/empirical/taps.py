r"""Gradients of dense layers without forming them: what is recorded at a layer gives the inner product of two
gradients.

Where a weight meets one data vector, y_j = sum_i a_i W_ij, the gradient of an output o is the outer product a g^T with
g = d f_o / d y, and two examples have <a g^T, a' g'^T> = (a . a')(g . g'). So a layer of I inputs and J units costs I
+ J numbers for an example and output instead of I J. g is the cotangent of a zero added to y, a "tap"; a bias on the
same y appends a 1 to a. (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720, section 3.4, structured
derivatives for matrix multiplication.) Parameters that are used otherwise (twice, in loops, convolutions, through
other functions) keep their ordinary gradients.
"""

import dataclasses
import math

from initjax.empirical.program import Program, Step

_LAYOUT = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose")


@dataclasses.dataclass(frozen=True)
class Tap:
    """A zero to be added to the value numbered `value`.

    `operand` is the number of the data a that meets the kernel there (None for a bias alone), `bias` tells whether a
    bias is added on the same y.
    """

    value: int
    operand: int | None
    bias: bool


def find_taps(program: Program, chosen: tuple[bool, ...]) -> tuple[list[Tap], tuple[bool, ...]]:
    """Taps for the chosen parameters where they can be had, and which of the chosen ones are left without."""
    uses: dict[int, list[Step]] = {}
    for step in program.steps:
        for number in step.inputs:
            if number is not None:
                uses.setdefault(number, []).append(step)

    def only_use(number) -> Step | None:
        steps = uses.get(number, [])
        return steps[0] if len(steps) == 1 and number not in program.outputs else None

    kernels: dict[int, tuple[int, Step]] = {}
    biases: dict[int, Step] = {}
    for leaf, (number, keep) in enumerate(zip(program.params, chosen, strict=True)):
        if not keep:
            continue
        step = only_use(number)
        if step is not None and (operand := _dense_operand(program, step, number)) is not None:
            kernels[leaf] = operand, step
            continue
        size = program.avals[number].size
        while step is not None and step.name in _LAYOUT and program.avals[step.outputs[0]].size == size:
            number = step.outputs[0]
            step = only_use(number)
        if step is not None and _adds_to_data(program, step, number, size):
            biases[leaf] = step

    taps, merged = [], set()
    for operand, step in kernels.values():
        after = only_use(step.outputs[0])
        bias = next((leaf for leaf, add in biases.items() if add is after), None)
        if bias is None:
            taps.append(Tap(step.outputs[0], operand, False))
        else:
            merged.add(bias)
            taps.append(Tap(biases[bias].outputs[0], operand, True))
    taps += [Tap(step.outputs[0], None, True) for leaf, step in biases.items() if leaf not in merged]
    left = tuple(keep and i not in kernels and i not in biases for i, keep in enumerate(chosen))
    return taps, left


def _dense_operand(program, step, weight) -> int | None:
    """The single data vector that a product contracts with `weight`, or None if the step is something else."""
    if step.name != "dot_general" or None in step.inputs or len(set(step.inputs)) != 2:
        return None
    side = step.inputs.index(weight)
    data = step.inputs[1 - side]
    contracted, batched = step.eqn.params["dimension_numbers"]
    aval, out = program.avals[data], program.avals[step.outputs[0]]
    free = aval.size // max(1, math.prod(aval.shape[axis] for axis in contracted[1 - side]))
    same = aval.dtype == program.avals[weight].dtype == out.dtype
    return data if data in program.from_data and free == 1 and same and not any(batched) else None


def _adds_to_data(program, step, number, size) -> bool:
    if step.name not in ("add", "sub") or None in step.inputs:
        return False
    others = [n for n in step.inputs if n != number]
    out = program.avals[step.outputs[0]]
    # of one entry each: a bias shared by several positions collects all their cotangents
    return len(others) == 1 and others[0] in program.from_data and out.size == size
