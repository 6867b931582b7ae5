"""One walk through a model's program with real numbers: signals and perturbations at every layer, weights rescaled on
the way.

A perturbation's energy is the mean square of a directional derivative along random noise on the inputs (for tokens, on
the rows looked up). chi of a layer is that energy at its output over that at its stem: the nearest values behind its
operand that are an output of a layer, a sum, a concatenation or the input. In a plain network chi is sigma_w^2
E[phi'^2]. Everything behind a kernel is linear in it, so a layer is rescaled while the walk goes on, each one once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.reinit.info import Traced
from initjax.trace.inline import Equation
from initjax.trace.uses import CONTRACTIONS, Survey, Use

SUMS = ("add", "add_any", "concatenate")


@dataclasses.dataclass(frozen=True)
class Signal:
    """One layer, or one sum of a residual branch, as the walk has met it; means over draws, inputs, positions, units.

    Attributes
    ----------
    name : path of the weight; for a sum, of the weight that ends the branch.
    kind : "layer", "readout" (the last layer), "embedding" or "branch".
    q : mean square of the output; of the sum, for a branch.
    chi : energy of the perturbation over that in front; nan for embeddings.
    factor : by which the weight was multiplied.
    error : standard error of chi over the draws; nan for one draw.
    variance : of the output, over inputs, positions and units.
    copy : index of the copy in a stacked layer, None elsewhere.
    """

    name: str
    kind: str
    q: float
    chi: float
    factor: float
    copy: int | None = None
    error: float = np.nan
    variance: float = np.nan


Target = Callable[[Signal, float | None], float]


@dataclasses.dataclass
class _Value:
    """A value in every draw: primals, tangents (None: no perturbation arrives)."""

    primal: list
    tangent: list | None


def walk(
    traced: Traced, params: list[list], inputs: Any, key: Any, wanted: Target, adjust: Callable | None = None
) -> list[Signal]:
    """Run the program of `params` (a list of leaves for each draw) and multiply each weight by `wanted`.

    wanted : `wanted(signal, alpha)` gives the factor for a layer (alpha None), or for the end of a branch whose energy
        is alpha times that of its shortcut.
    adjust : `adjust(leaf, output, bias)`, for one draw: the factor and shift of each unit of a layer, whose bias leaf
        (None if there is none) is replaced by the shift.
    """
    return _Walk(traced, params, inputs, key, wanted, adjust).run()


class _Walk:
    def __init__(self, traced: Traced, params, inputs, key, wanted: Target, adjust: Callable | None):
        self.survey: Survey = traced.survey
        self.body = traced.survey.body
        self.branches = {branch.equation: branch for branch in traced.branches}
        self.last = [use.equation for use in self.survey.uses if use.kind in CONTRACTIONS][-1:]
        self.uses: dict[int, list[Use]] = {}
        for use in self.survey.uses:
            self.uses.setdefault(use.equation, []).append(use)
        contracted = {use.leaf for use in self.survey.uses if use.kind in CONTRACTIONS}
        self.tables = {u.equation: u for u in self.survey.uses if u.kind == "lookup" and u.leaf not in contracted}
        self.producer = {out: i for i, e in enumerate(self.body.equations) for out in e.outputs}
        self.wanted, self.draws = wanted, len(params)
        self.key, self.adjust = key, adjust
        self.values: dict[int, _Value] = {}
        self.overridden: dict[int, _Value] = {}
        self.factors: dict[tuple, float] = {}
        self.energies: dict[int, np.ndarray] = {}
        for number, value in self.body.constants.items():
            self.values[number] = _Value([value] * self.draws, None)
        numbers = iter(self.body.inputs)
        for leaf in range(len(self.survey.names)):
            self.values[next(numbers)] = _Value([p[leaf] for p in params], None)
        for i, leaf in enumerate(jax.tree.leaves(inputs)):
            number, leaf = next(numbers), jnp.asarray(leaf)
            real = jnp.issubdtype(leaf.dtype, jnp.floating)
            self.values[number] = _Value([leaf] * self.draws, self._noise(i, leaf.shape, leaf.dtype) if real else None)
        self.keep = {n for i in range(len(self.body.equations)) for n in self._stems_of(i)}
        self.until: dict[int, int] = {}
        for i, equation in enumerate(self.body.equations):
            self.until.update(dict.fromkeys(equation.inputs, i))

    def run(self) -> list[Signal]:
        found = []
        for index, equation in enumerate(self.body.equations):
            signals = []
            if index in self.branches:
                signals += self._branch_before(index, equation)
            results = self._evaluate(equation)
            results = self._seeded(index, results)
            self.values.update(zip(equation.outputs, results, strict=True))
            if any(use.kind in CONTRACTIONS for use in self.uses.get(index, [])):
                signals += self._layer(index, equation)
            elif index in self.tables:
                signals.append(self._table(index, equation))
            if index in self.branches:
                signals = self._branch_after(equation, signals)
            for out in equation.outputs:
                if out in self.keep:
                    self.energies[out] = _energies(self.values[out].tangent)
            found += signals
            for n in set(equation.inputs):
                if self.until[n] == index and n not in self.body.outputs:
                    self.values.pop(n, None)
        return found

    # ------------------------------------------------------------------ layers and branches

    def _layer(self, index: int, equation: Equation) -> list[Signal]:
        (out,) = equation.outputs
        use = next(use for use in self.uses[index] if use.kind in CONTRACTIONS)
        copy = self._copy(equation, use)
        place, value = (use.leaf, copy), self.values[out]
        if place in self.factors:
            self._multiply(out, self.factors[place])
        stems = [self._energy_of(n) for n in self._stems_of(index)]
        stems = [e for e in stems if e.mean() > 0]
        chi, error = np.nan, np.nan
        if stems and value.tangent is not None:
            chi, error = _ratio(_energies(value.tangent), np.mean(stems, axis=0))
        kind = "readout" if index in self.last else "layer"
        variance = float(np.mean([np.var(np.asarray(a, np.float64)) for a in value.primal]))
        signal = Signal(self.survey.names[use.leaf], kind, _energy(value.primal), chi, 1.0, copy, error, variance)
        if place in self.factors:  # used before: its scale is settled
            return [dataclasses.replace(signal, factor=self.factors[place])]
        if self.adjust is not None:
            return self._adjusted(place, out, use, signal)
        factor = self.wanted(signal, None)
        self.factors[place] = factor
        self._multiply(out, factor)
        square = factor**2
        return [dataclasses.replace(signal, q=signal.q * square, chi=chi * square, error=error * square, factor=factor)]

    def _adjusted(self, place, out: int, use: Use, signal: Signal) -> list[Signal]:
        """One draw, each unit on its own; a bias that is added next is put to the shift."""
        assert self.adjust is not None
        later = [u for i in sorted(self.uses) if i > use.equation for u in self.uses[i] if u.kind == "added"]
        bias = next((u for u in later if self._adds_to(u.equation, out)), None)
        factor, shift = self.adjust(use.leaf, self.values[out].primal[0], None if bias is None else bias.leaf)
        value = self.values[out]
        shaped = factor.astype(value.primal[0].dtype).reshape((1,) * (value.primal[0].ndim - 1) + (-1,))
        tangent = None if value.tangent is None else [value.tangent[0] * shaped]
        self.values[out] = _Value([value.primal[0] * shaped], tangent)
        if bias is not None and shift is not None:
            for n in self.body.equations[bias.equation].inputs:
                if n in self.survey.weights:
                    held = self._held(n, shift)
                    self.overridden[n] = held
        self.factors[place] = 1.0
        return [signal]

    def _held(self, number: int, shift: jax.Array) -> _Value:
        aval = self.body.avals[number]
        return _Value([jnp.broadcast_to(shift.astype(aval.dtype), aval.shape)], None)

    def _adds_to(self, index: int, number: int) -> bool:
        """Whether an addition acts on a value directly, or through layout and casts."""
        stack = [n for n in self.body.equations[index].inputs if n in self.survey.data]
        while stack:
            n = stack.pop()
            if n == number:
                return True
            i = self.producer.get(n)
            if i is not None and self.body.equations[i].name in ("convert_element_type", "reshape", "copy", "mul"):
                stack += [m for m in self.body.equations[i].inputs if m in self.survey.data]
        return False

    def _table(self, index: int, equation: Equation) -> Signal:
        """Rows of an embedding: noise of their own size, and a size of their own to be chosen."""
        use, (out,) = self.tables[index], equation.outputs
        signal = Signal(self.survey.names[use.leaf], "embedding", _energy(self.values[out].primal), np.nan, 1.0)
        if (use.leaf, None) not in self.factors:
            self.factors[use.leaf, None] = self.wanted(signal, None)
        factor = self.factors[use.leaf, None]
        self._multiply(out, factor)
        return dataclasses.replace(signal, q=signal.q * factor**2, factor=factor)

    def _branch_before(self, index: int, equation: Equation) -> list[Signal]:
        """Rescale the end of a branch, when its sum is reached: what lies between is linear in it."""
        branch = self.branches[index]
        operands = [n for n in equation.inputs if n in self.survey.data]
        inside = self._reaches(operands, branch)
        if branch.end is None or inside is None:
            return []
        shortcut = next((n for n in operands if n != inside), inside)
        energies = [_energy(self.values[n].tangent) for n in (inside, shortcut)]
        if not energies[1] > 0:
            return []
        alpha = energies[0] / energies[1]
        signal = Signal(self.survey.names[branch.end], "branch", 0.0, 1 + alpha, 1.0, self._branch_copy(index))
        place = (branch.end, signal.copy, "end")
        factor = self.factors.get(place)
        if factor is None:
            quiet = all(not np.any(np.asarray(self.values_of_leaf(leaf))) for leaf in branch.biases)
            factor = self.wanted(signal, alpha) if quiet else 1.0
            self.factors[place] = factor
        self._multiply(inside, factor)
        self._shortcut = shortcut
        return [dataclasses.replace(signal, factor=factor)]

    def _branch_after(self, equation: Equation, signals: list[Signal]) -> list[Signal]:
        value = self.values[equation.outputs[0]]
        done = []
        for signal in signals:
            if signal.kind == "branch":
                chi, error = _ratio(_energies(value.tangent), _energies(self.values[self._shortcut].tangent))
                signal = dataclasses.replace(signal, q=_energy(value.primal), chi=chi, error=error)
            done.append(signal)
        return done

    def _reaches(self, operands: list[int], branch) -> int | None:
        """The operand that the end of the branch reaches without another layer between."""
        for n in operands:
            seen, stack = set(), [n]
            while stack:
                number = stack.pop()
                index = self.producer.get(number)
                if index is None or number in seen:
                    continue
                seen.add(number)
                uses = self.uses.get(index, [])
                if any(use.leaf == branch.end for use in uses):
                    return n
                if not any(use.kind in CONTRACTIONS for use in uses) and index not in self.branches:
                    stack += [m for m in self.body.equations[index].inputs if m in self.survey.data]
        return None

    def values_of_leaf(self, leaf: int):
        held = self.values.get(self.body.inputs[leaf])
        return 0.0 if held is None else held.primal[0]

    # ------------------------------------------------------------------ stems and copies

    def _stems_of(self, index: int) -> list[int]:
        """The nearest values behind a contraction's operand that are a layer's output, a sum, or an input."""
        if not any(use.kind in CONTRACTIONS for use in self.uses.get(index, [])):
            return []
        found: dict[int, None] = {}
        seen: set[int] = set()
        stack = [n for n in self.body.equations[index].inputs if n in self.survey.data]
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            i = self.producer.get(n)
            if i is None or self._is_stem(i):
                found[n] = None
            else:
                stack += [m for m in self.body.equations[i].inputs if m in self.survey.data]
        return list(found)

    def _is_stem(self, index: int) -> bool:
        equation, uses = self.body.equations[index], self.uses.get(index, [])
        if any(use.kind in (*CONTRACTIONS, "lookup") for use in uses) or index in self.branches:
            return True
        data = [n for n in equation.inputs if n in self.survey.data]
        return equation.name == "concatenate" and len(data) > 1

    def _energy_of(self, number: int) -> np.ndarray:
        if number in self.energies:
            return self.energies[number]
        value = self.values.get(number)
        return np.zeros(1) if value is None else _energies(value.tangent)

    def _copy(self, equation: Equation, use: Use) -> int | None:
        """Which copy of a stacked leaf meets the data here: the index that a scan takes."""
        if not use.batch:
            return None
        for n in equation.inputs:
            while n in self.survey.weights and n in self.producer:
                step = self.body.equations[self.producer[n]]
                if step.name == "slice":
                    axis = use.batch[0]
                    start, stop = (step.params[name][axis] for name in ("start_indices", "limit_indices"))
                    if len(step.params["start_indices"]) > axis and stop - start == 1:
                        return int(start)
                n = step.inputs[0]
        return None

    def _branch_copy(self, index: int) -> int | None:
        end = self.branches[index].end
        before = [i for i in self.uses if i < index and any(u.leaf == end for u in self.uses[i])]
        if not before:
            return None
        i = max(before)
        return self._copy(self.body.equations[i], next(u for u in self.uses[i] if u.leaf == end))

    # ------------------------------------------------------------------ numbers

    def _noise(self, tag: int, shape, dtype) -> list:
        key = jax.random.fold_in(self.key, tag)
        return [jax.random.normal(k, shape, dtype) for k in jax.random.split(key, self.draws)]

    def _seeded(self, index: int, results: list[_Value]) -> list[_Value]:
        """Noise on what is looked up by tokens, which have no derivative of their own."""
        if any(use.kind == "lookup" for use in self.uses.get(index, [])) and results[0].tangent is None:
            primal = results[0].primal
            size = jnp.sqrt(_energy(primal))
            noise = self._noise(1000 + index, primal[0].shape, primal[0].dtype)
            return [_Value(primal, [t * size.astype(t.dtype) for t in noise])]
        return results

    def _multiply(self, number: int, factor: float) -> None:
        value = self.values[number]
        times = lambda a: a * jnp.asarray(factor, a.dtype)  # noqa: E731
        self.values[number] = _Value(
            [times(a) for a in value.primal], value.tangent and [times(t) for t in value.tangent]
        )

    def _evaluate(self, equation: Equation) -> list[_Value]:
        operands = [self.overridden.get(n) or self.values[n] for n in equation.inputs]
        moving = [i for i, v in enumerate(operands) if v.tangent is not None and _is_real(v.primal[0])]
        primals, tangents = [], []
        for draw in range(self.draws):
            fixed = [v.primal[draw] for v in operands]

            def run(*moved, fixed=fixed):
                arguments = list(fixed)
                for i, value in zip(moving, moved, strict=True):
                    arguments[i] = value
                out = equation.primitive.bind(*arguments, **equation.params)
                return list(out) if equation.primitive.multiple_results else [out]

            if not moving:
                primals.append(run())
                continue
            out, dot = jax.jvp(run, [fixed[i] for i in moving], [operands[i].tangent[draw] for i in moving])  # type: ignore
            primals.append(out)
            tangents.append(dot)
        values = []
        for i in range(len(equation.outputs)):
            primal = [p[i] for p in primals]
            moves = bool(tangents) and _is_real(primal[0])
            values.append(_Value(primal, [t[i] for t in tangents] if moves else None))
        return values


def _is_real(array) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def _energies(arrays: list | None) -> np.ndarray:
    """Mean square over the entries, of each draw."""
    if arrays is None or not all(_is_real(a) for a in arrays):
        return np.zeros(1)
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]
    return np.array([float(jnp.mean(jnp.square(a))) for a in wide])


def _energy(arrays: list | None) -> np.float64:
    """Mean square over draws and entries."""
    return _energies(arrays).mean()


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Ratio of the means over draws, and its standard error."""
    ratio = above.mean() / below.mean()
    spread = above - ratio * below  # the linearized ratio
    error = spread.std(ddof=1) / np.sqrt(spread.size) / below.mean() if spread.size > 1 else np.nan
    return float(ratio), float(error)
