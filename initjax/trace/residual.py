"""The residual branches of a model, found in its traced program by what is added to what.

Where two values are added, and one of them (or of the terms it is itself the sum of) is what the other was computed
from through weights, the other is a branch. With a weighted shortcut the branch is the side with more contractions
behind the fork. The last weight of a branch is the scale or kernel behind which only biases and layout come.
"""

import dataclasses

from initjax.trace.uses import CONTRACTIONS, LAYOUT, Survey

_PASSING = LAYOUT | {"reduce_sum", "reduce_window_sum", "pad", "select_n", "real"}


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch, leaves by number.

    Attributes
    ----------
    end : the last scale or kernel; None where a nonlinearity ends the branch.
    kind : "scaled", "product" or "convolution", how the end acts.
    biases : biases added behind the end.
    kernels : weights of the contractions inside, in program order.
    equation : number of the addition.
    value : number of the branch's value, one operand of the addition; the other is the shortcut.
    """

    end: int | None
    kind: str
    biases: tuple[int, ...]
    kernels: tuple[int, ...]
    equation: int
    value: int


def branches(survey: Survey) -> tuple[Branch, ...]:
    """Every residual branch of the model, in program order.

    Parameters
    ----------
    survey : from `initjax.trace.uses.survey`.

    Returns
    -------
    One `Branch` for each addition of a branch; a scanned block counts once for each turn.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.trace.flax import as_functional
    >>> from initjax.trace.uses import survey
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x + nn.Dense(4)(nn.relu(nn.Dense(8)(x)))
    >>> found = survey(as_functional(Block(), jnp.ones((1, 4))))
    >>> (branch,) = branches(found)
    >>> [found.names[leaf] for leaf in (branch.end, *branch.biases, *branch.kernels)]
    ['Dense_0/kernel', 'Dense_0/bias', 'Dense_1/kernel', 'Dense_0/kernel']
    """
    return tuple(_Search(survey).run())


class _Search:
    def __init__(self, survey: Survey):
        self.survey = survey
        equations = survey.body.equations
        self.producer = {out: i for i, equation in enumerate(equations) for out in equation.outputs}
        self.uses: dict[int, list] = {}
        for use in survey.uses:
            self.uses.setdefault(use.equation, []).append(use)
        self.terms: dict[int, tuple[int, ...]] = {}

    def run(self):
        found = []
        for index, equation in enumerate(self.survey.body.equations):
            operands = [n for n in equation.inputs if n in self.survey.data]
            if equation.name not in ("add", "add_any") or len(operands) != 2 or operands[0] == operands[1]:
                continue
            avals = self.survey.body.avals
            if avals[operands[0]].shape != avals[operands[1]].shape:
                continue
            new = self._at(index, *operands)
            found += new
            if new:
                self.terms[equation.outputs[0]] = (*self._terms(operands[0]), *self._terms(operands[1]))
        return found

    def _terms(self, number: int) -> tuple[int, ...]:
        """A sum's terms, seen through casts and reshapes."""
        seen = number
        while seen not in self.terms and seen in self.producer:
            equation = self.survey.body.equations[self.producer[seen]]
            if equation.name not in ("convert_element_type", "reshape", "copy", "optimization_barrier"):
                break
            seen = equation.inputs[0]
        return tuple(dict.fromkeys((number, seen, *self.terms.get(seen, ()))))

    def _at(self, index: int, a: int, b: int) -> list[Branch]:
        for shortcut, branch in ((a, b), (b, a)):
            behind = self._behind(branch)
            starts = [s for s in self._terms(shortcut) if s in behind]
            # reached through weights only: x + 0.04 x^3 inside an activation is no branch
            starts = [s for s in starts if not self._weightless(branch, s)]
            if starts:
                return [self._branch(index, branch, set(starts))]
        return self._with_projection(index, a, b)

    def _with_projection(self, index: int, a: int, b: int) -> list[Branch]:
        """A weighted (or pooled) shortcut: one contraction at most beside a branch of more."""
        behind = {n: self._behind(n) | {n} for n in (a, b)}
        fork = behind[a] & behind[b]
        if not any(self.uses.get(self.producer.get(n, -1)) for n in fork):
            return []  # they meet at the raw input alone
        own = {n: behind[n] - fork for n in (a, b)}
        count = {n: len(self._kernels(own[n])) for n in (a, b)}
        shortcut, branch = sorted((a, b), key=lambda n: count[n])
        if count[shortcut] > 1 or count[branch] < 1 + count[shortcut] or any(map(self._is_step, own[a] | own[b])):
            return []
        found = self._branch(index, branch, fork)
        return [found] if found.end is not None else []

    def _is_step(self, number: int) -> bool:
        """Whether the value is one index out of an axis: the turns of a loop, whose sums are no residual ones."""
        equation = self.survey.body.equations[self.producer[number]] if number in self.producer else None
        if equation is None or equation.name not in ("slice", "dynamic_slice"):
            return False
        shapes = [self.survey.body.avals[n].shape for n in (equation.inputs[0], number)]
        return any(new == 1 < old for old, new in zip(*shapes, strict=True))

    def _parents(self, number: int) -> list[int]:
        if number not in self.producer:
            return []
        return [n for n in self.survey.body.equations[self.producer[number]].inputs if n in self.survey.data]

    def _behind(self, number: int, stop: frozenset | set = frozenset()) -> set[int]:
        """Every data value that this one was computed from, not going past `stop`."""
        found: set[int] = set()
        stack = [] if number in stop else self._parents(number)
        while stack:
            n = stack.pop()
            if n not in found:
                found.add(n)
                if n not in stop:
                    stack += self._parents(n)
        return found

    def _weightless(self, number: int, start: int) -> bool:
        """Whether `start` is reached from `number` without a weight on the way."""
        stack, seen = [number], set()
        while stack:
            n = stack.pop()
            if n == start:
                return True
            if n in seen or self.uses.get(self.producer.get(n, -1)):
                continue
            seen.add(n)
            stack += self._parents(n)
        return False

    def _kernels(self, values: set[int]) -> list[int]:
        equations = sorted({self.producer[n] for n in values if n in self.producer})
        uses = [use for i in equations for use in self.uses.get(i, [])]
        return [use.leaf for use in uses if use.kind in CONTRACTIONS]

    def _branch(self, index: int, value: int, stop: set[int]) -> Branch:
        inside = (self._behind(value, stop) | {value}) - stop
        end, kind, biases = self._end(value)
        return Branch(end, kind, tuple(biases), tuple(self._kernels(inside)), index, value)

    def _end(self, value: int) -> tuple[int | None, str, list[int]]:
        biases: list[int] = []
        while value in self.producer:
            index = self.producer[value]
            equation = self.survey.body.equations[index]
            uses, parents = self.uses.get(index, []), self._parents(value)
            for use in uses:
                if use.kind in (*CONTRACTIONS, "scaled"):
                    return use.leaf, use.kind, biases
            if uses and all(use.kind == "added" for use in uses):
                biases += [use.leaf for use in uses]
            elif equation.name == "mul" and len(parents) == 2:
                scales = [leaf for parent in parents for leaf in self._factors(parent)]
                return (scales[0], "scaled", biases) if scales else (None, "", biases)
            elif uses or len(parents) != 1 or not self._passes(equation, parents[0]):
                return None, "", biases
            value = parents[0]
        return None, "", biases

    def _passes(self, equation, parent: int) -> bool:
        """Layout, averages, and factors that are no data: all linear in the parent."""
        if equation.name in ("mul", "neg", "div"):
            return equation.name != "div" or equation.inputs[0] == parent
        return equation.name in _PASSING

    def _factors(self, value: int) -> list[int]:
        """Weights that multiply a value from outside, such as the scale beside 1/std in a norm."""
        while value in self.producer:
            index = self.producer[value]
            scaled = [use.leaf for use in self.uses.get(index, []) if use.kind == "scaled"]
            parents = self._parents(value)
            if scaled:
                return scaled
            if self.survey.body.equations[index].name not in (*_PASSING, "mul") or not parents:
                return []
            if len(parents) == 2:
                return [leaf for parent in parents for leaf in self._factors(parent)]
            value = parents[0]
        return []
