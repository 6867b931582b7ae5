"""Kernels tile by tile: blocks of examples against blocks of examples, on all cores, within a budget of memory.

A small tile stays in the processor's cache through all layers, where a whole matrix goes to main memory and back at
every step. With one batch only the tiles on and below the diagonal are computed. How much memory a tile takes is found
by computing one pair of examples and counting what is alive.
"""

import concurrent.futures
import dataclasses
import math
from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.infinite.blocks import Block, example_axes
from initjax.infinite.compiled import cores
from initjax.infinite.modes import PAIRS, SAME, SITES, WITHIN
from initjax.infinite.moments import Moments, Schedule
from initjax.memory import budget, readable
from initjax.trace.domain import Base, Ew, Sum, Tangent, Taps
from initjax.trace.graph import reachable
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, extents, xp_of
from initjax.trace.walk import INPUTS, Walked

_TILE = 1 << 20  # bytes of the largest array of a tile: it stays in the cache, and steps cost more than their dispatch
_FEW = 128  # positions of all examples up to which a batch is one tile, and nothing need be counted
_ATOM = 4096  # bytes of the objects that stand for one atom in one block
_MARGIN = 1.1  # what the interpreter and XLA hold beside that; measured against tracemalloc in tests/test_tiles.py
_SCRATCH = 4  # arrays of that size that are alive, beside what is remembered, while one moment is computed


@dataclasses.dataclass(frozen=True)
class Side:
    """A block of one batch: its bodies, and its moments with itself."""

    output: Sum
    tangent: Any
    layers: dict[str, Sum]
    tangents: dict[str, Tangent]
    own: Moments
    rows: slice
    plan: Schedule  # of its tiles

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


class Batch:
    """One walk, from which blocks of examples are cut. `at` is None where they cannot be told apart."""

    def __init__(self, walked: Walked, leaves, get):
        self.leaves, self.n, self.draws = leaves, walked.output.shape[0], walked.draws
        self._nngp, self.coupled = "nngp" in get, bool(walked.ranks)
        self._tangent = [walked.tangent.body] if walked.tangent is not None and {"ntk", "leaves"} & set(get) else []
        self._layers = walked.layers if "layers" in get else {}
        self._tangents = walked.tangents if "layers" in get and self._tangent else {}
        self.bodies = [walked.output.body, *self._tangent, *self._layers.values(), *self._tangents.values()]
        outputs = 1 + len(self._tangent)
        self.at = example_axes(self.bodies[:outputs], self.bodies[outputs:])

    def work(self) -> tuple[float, int, int]:
        """For one pair of examples: entries of all moments, and of the largest; and the number of atoms."""
        plan = self.side(0, 1).plan
        sizes = [
            math.prod(extents(atom.axes)) ** (2 if mode.sites else 1)
            for atom in plan.atoms
            for mode in plan.asked.get(id(atom), ())
        ]
        return float(sum(sizes)), max(sizes, default=1), len(plan.atoms)

    def variances(self):
        """Every function in the program, with the variances of its Gaussian over all examples."""
        side = self.side(0, self.n)
        return [(a.expr.fn, side.own.variance(a.leaf)) for a in side.plan.atoms if isinstance(a, Ew)]

    def side(self, start: int, stop: int, counting: bool = False) -> Side:
        """The block, with the same-example moments that its tiles and its layers' statistics will ask for."""
        moved = Block(self.at, start, stop, bool(self._layers)).bodies(self.bodies)
        made = iter(moved)
        output, tangent = next(made), next(made) if self._tangent else None
        layers, tangents = ({name: next(made) for name in group} for group in (self._layers, self._tangents))
        own = Moments(self.leaves)
        own.counting = counting
        asked = [*layers.values(), *tangents.values()] + ([tangent] if layers and tangent is not None else [])
        asked += [atom.leaf for atom in reachable(moved) if isinstance(atom, Ew)]
        plan = Schedule(asked, SAME, WITHIN)
        own.run(plan, plan)
        roots = [output] if self._nngp else []
        roots += ([] if tangent is None else [tangent]) + list(layers.values())
        tiled = Schedule(roots, SITES if self.at is not None else PAIRS, PAIRS)
        return Side(output, tangent, layers, tangents, own, slice(start, stop), tiled)


def evaluate(
    first: Walked, second: Walked | None, leaves, eta, get, memory, dtype, traced: bool, sizes: dict, compiled=None
) -> dict[str, Any]:
    """The parts of a kernel that `get` names, and the statistics of its layers.

    sizes : filled with the bytes that one pair of examples takes, or used if it holds them.
    compiled : asked for a result before the work is done step by step; gives None if it has none.

    Returns "nngp" and "ntk" (n1, n2); "leaves", leaf -> (n1, n2); "layers", name -> "q" (n1,), "q2" (n2,),
    "correlation" (n1, n2), "slope" and "gradient" (n1,) or None.
    """
    one = Batch(first, leaves, get)
    two = one if second is None else Batch(second, leaves, get)
    if one.at is None or two.at is None:
        one.at = two.at = None
    out = _Parts(one, two, leaves, eta, get, dtype)
    found = None if compiled is None else compiled(out)
    if found is not None:
        return found
    block, workers = max(one.n, two.n, 1), 1
    if not traced:
        block, workers = _plan(out, memory, sizes)
    with _pool(workers) as run:
        ours = list(run(lambda start: one.side(start, min(start + block, one.n)), range(0, one.n, block)))
        theirs = ours
        if two is not one:
            theirs = list(run(lambda start: two.side(start, min(start + block, two.n)), range(0, two.n, block)))
        tiles = [(a, b) for i, a in enumerate(ours) for b in (ours[: i + 1] if two is one else theirs)]
        out.statistics(ours, theirs)
        if traced or len(tiles) == 1:
            return out.whole(*tiles[0])
        out.allocate()
        for _ in run(lambda pair: out.put(*pair), tiles):
            pass
    return out.result


class _Parts:
    """The results of one call, filled tile by tile."""

    def __init__(self, one: Batch, two: Batch, leaves, eta, get, dtype):
        self.one, self.two, self.leaves, self.eta, self.get, self.dtype = one, two, leaves, eta, get, dtype
        self.same = one is two
        self.result: dict[str, Any] = {}
        self._q: dict[str, tuple] = {}

    @property
    def count(self) -> int:
        """Matrices (n1, n2) in the result."""
        layers = len(self.one._layers)
        return ("nngp" in self.get) + ("ntk" in self.get) + layers + ("leaves" in self.get) * len(self.leaves)

    def moments(self, a: Side, b: Side, counting: bool = False) -> Moments:
        moments = Moments(self.leaves, (a.own, b.own), None if "leaves" in self.get else self.eta)
        moments.counting = counting
        moments.run(a.plan, b.plan)
        return moments

    def tile(self, a: Side, b: Side) -> dict[Any, Any]:
        """The same parts for two blocks; None where zero by structure."""
        moments = self.moments(a, b)
        out: dict[Any, Any] = {}
        axes = a.output.axes, b.output.axes, a.count, b.count
        if "nngp" in self.get:
            out["nngp"] = _by_examples(moments.moment(a.output, b.output, a.plan.kept), *axes)
        if a.tangent is not None and b.tangent is not None:
            found = moments.tangents(a.tangent, b.tangent, a.plan.kept)
            found: dict[str, Any] = {leaf: _by_examples(value, *axes) for leaf, value in found.items()}
            if "leaves" in self.get:
                out |= {("leaves", leaf): value for leaf, value in found.items()}
                found = {
                    leaf: value if self.eta[leaf] == 1.0 else self.eta[leaf] * value for leaf, value in found.items()
                }
            if "ntk" in self.get and found:
                first, *rest = found.values()
                out["ntk"] = sum(rest, first)
        for name, u in a.layers.items() if "layers" in self.get else ():
            v = b.layers[name]
            value = moments.moment(u, v, a.plan.kept)
            if _free(u, a):
                value = _over_positions(value, u.axes, a.count, b.count)
            else:
                value = _by_examples(value, u.axes, v.axes, a.count, b.count)
            out["layers", name] = self._correlation(name, value, a, b)
        return out

    def _correlation(self, name: str, cov, a: Side, b: Side):
        q1, q2 = self._q[name]
        q1, q2 = q1[a.rows], q2[b.rows]
        xp = xp_of(cov, q1, q2)
        norm = xp.sqrt(q1)[:, None] * xp.sqrt(q2)[None, :]
        value = ratio(np.zeros((1, 1)) if cov is None else cov, norm)
        return xp.where(np.eye(q1.shape[0], dtype=bool) & (norm > 0), 1.0, value) if a is b else value

    def statistics(self, ours: list[Side], theirs: list[Side]) -> None:
        """Per-layer numbers of single examples."""
        if "layers" not in self.get:
            return
        self.result["layers"] = {}
        kernels = {} if self.one.coupled else _single_uses(ours[0], self.leaves)
        for name in ours[0].layers:
            q = _joined([layer_variance(side, name) for side in ours])
            q2 = q if theirs is ours else _joined([layer_variance(side, name) for side in theirs])
            self._q[name] = (q, q2)
            slope = gradient = None
            if name in ours[0].tangents:
                slopes = [layer_slope(side, name) for side in ours]
                slope = None if slopes[0] is None else _joined(slopes)
            if name in kernels:
                found = [_gradient(side, name, self.leaves) for side in ours]
                gradient = None if found[0] is None else _joined(found)
            self.result["layers"][name] = dict(q=q, slope=slope, gradient=gradient)

    # ------------------------------------------------------------------ putting tiles together

    def whole(self, a: Side, b: Side) -> dict[str, Any]:
        """The result of the only tile."""
        out, shape = self.tile(a, b), (self.one.n, self.two.n)
        for key in self._keys():
            value = out.get(key)
            value = np.zeros(shape) if value is None else xp_of(value).broadcast_to(value, shape)
            self._place(key, value if is_traced(value) else np.array(value, self.dtype))
        return self.result

    def allocate(self) -> None:
        shape = (self.one.n, self.two.n)
        for key in self._keys():
            self._place(key, np.zeros(shape, self.dtype))

    def put(self, a: Side, b: Side) -> None:
        for key, value in self.tile(a, b).items():
            target = self._at(key)
            if value is None or target is None:
                continue
            target[a.rows, b.rows] = value
            if self.same and a is not b:
                target[b.rows, a.rows] = value.T

    def _keys(self) -> list:
        keys: list[Any] = [name for name in ("nngp", "ntk") if name in self.get]
        keys += [("leaves", s.name) for s in self.leaves] if "leaves" in self.get else []
        return keys + [("layers", name) for name in self.one._layers]

    def _place(self, key, value) -> None:
        if isinstance(key, str):
            self.result[key] = value
        elif key[0] == "leaves":
            self.result.setdefault("leaves", {})[key[1]] = value
        else:
            self.result["layers"][key[1]]["correlation"] = value

    def _at(self, key):
        if isinstance(key, str):
            return self.result.get(key)
        if key[0] == "leaves":
            return self.result["leaves"].get(key[1])
        return self.result["layers"][key[1]]["correlation"]


# ------------------------------------------------------------------ memory


def _plan(out: _Parts, memory, sizes: dict) -> tuple[int, int]:
    """Examples of a block, and how many tiles are worked on at once."""
    one, two = out.one, out.two
    most = max(one.n, two.n, 1)
    positions = max(math.prod(extents(atom.axes)) for atom in reachable(one.bodies + two.bodies))
    if memory is None and positions <= _FEW:
        return most, 1
    memory = budget(memory)
    results = out.count * one.n * two.n * np.dtype(out.dtype).itemsize
    each = lone = small = widest = 0
    if one.at is not None and one.n and two.n:
        if not sizes:
            a = one.side(0, 1, True)
            b = a if two is one else two.side(0, 1, True)
            pair, own = out.moments(a, b, True), (a.own, b.own)
            sizes["each"], sizes["widest"] = pair.peak + _SCRATCH * pair.largest, pair.widest
            sizes["lone"] = max(m.peak + _SCRATCH * m.largest for m in own)
            sizes["small"] = [m.small for m in own]
        each, lone, widest = sizes["each"], sizes["lone"], sizes["widest"]
        small = one.n * sizes["small"][0] + (two.n * sizes["small"][1] if two is not one else 0)
    if not each:
        if results > memory:
            raise _too_small(memory, one.n, two.n, results, results, small, each)
        return most, 1
    objects = _ATOM * len(reachable(one.bodies)) * (one.n + (two.n if two is not one else 0))

    def needed(block: int, workers: int) -> int:
        return int(_MARGIN * (results + small + workers * (block * block * each + block * lone) + objects / block))

    best = max(1, min(most, math.isqrt(_TILE // max(widest, 8))))
    blocks = [best] + [2**i for i in range(best.bit_length() - 1, -1, -1) if 2**i < best]
    for workers in (cores(), 1):
        for block in blocks:
            if needed(block, workers) <= memory:
                return _balanced(most, block), workers
    raise _too_small(memory, one.n, two.n, min(needed(block, 1) for block in blocks), results, small, each + lone)


def _too_small(memory: int, n1: int, n2: int, least: int, results: int, small: int, pair: int) -> InputError:
    return InputError(
        f"a budget of {readable(memory)} for the kernel of {n1} x {n2} examples",
        f"at least {readable(1.01 * least)}",
        f"the results take {readable(results)}, the moments of single examples {readable(small)}, and one pair of "
        f"examples {readable(pair)} while it is computed",
        'give more with memory=..., ask for less with get=("nngp", "ntk"), or call with fewer examples',
    )


def _balanced(total: int, most: int) -> int:
    return -(-total // -(-total // most))


class _pool:
    """Run a function over items, on several threads: NumPy and XLA let go of the interpreter while they compute."""

    def __init__(self, workers: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else None

    def __enter__(self):
        return map if self._pool is None else self._pool.map

    def __exit__(self, *_):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ from moments to numbers


def _by_examples(value, x: Axes, y: Axes, n1: int, n2: int):
    """(n1, n2) from a moment over positions: the mean over equal positions."""
    if value is None:
        return None
    rank = len(x)
    at = _example(x)
    if at is None:
        count = math.isqrt(value.size // max(n1 * n2, 1))
        if count == 1:
            return value.reshape(n1, n2)
        return xp_of(value).einsum("apbp->ab", value.reshape(n1, count, n2, count)) / count
    value = xp_of(value).moveaxis(value, (at, rank + at), (0, 2 * rank - 1)).reshape(n1, -1, n2)
    return value[:, 0] if value.shape[1] == 1 else value.mean(axis=1)


def _example(axes: Axes) -> int | None:
    return next((i for i, a in enumerate(axes) if a.example), None)


def _free(body, side: "Side") -> bool:
    """Whether a body has no examples: a table of positions, looked up at known places."""
    if _example(body.axes) is not None:
        return False
    return _example(side.output.axes) is not None or not body.axes or body.axes[0].size != side.count


def _over_positions(value, axes: Axes, n1: int, n2: int):
    """(n1, n2) from a moment between the positions of a body without examples: one number, the mean over equal ones."""
    if value is None:
        return None
    count = math.prod(extents(axes))
    if value.size == count * count:
        value = xp_of(value).einsum("pp->p", value.reshape(count, count))
    return xp_of(value).broadcast_to(value.mean(), (n1, n2))


def _each(value, body, side: "Side"):
    """(n,) from a same-position moment: the mean over positions."""
    if value is None:
        return np.zeros(side.count)
    each: Any = side.own.flat(value, body.axes)
    if _free(body, side):
        return xp_of(each).broadcast_to(each.mean(), (side.count,))
    return xp_of(each).moveaxis(each, _example(body.axes) or 0, 0).reshape(side.count, -1).mean(axis=1)


def layer_variance(side: Side, name: str):
    """(n,): q of a layer, the mean over its positions."""
    u = side.layers[name]
    return _each(side.own.moment(u, u, SAME), u, side)


def layer_slope(side: Side, name: str):
    """E of the squared change of a layer's unit under unit perturbations of the input."""
    u = side.tangents[name]
    value = side.own.tangents(u, u, SAME).get(INPUTS)
    return None if value is None else _each(value, u, side)


def _single_uses(side: Side, leaves) -> dict[str, Base]:
    """Layer -> its weight's tangent, for weights used once, at one position an example."""
    found: dict[str, list[Base]] = {}
    for atom in reachable([side.tangent]) if side.tangent is not None else ():
        for base in atom.bases if isinstance(atom, Taps) else [atom] if isinstance(atom, Base) else ():
            if base.view.tangent and base.kind == "dot" and base.view.leaf >= 0:
                found.setdefault(base.layer, []).append(base)
    once = {layer: uses[0] for layer, uses in found.items() if len(uses) == 1}
    return {
        layer: atom
        for layer, atom in once.items()
        if math.prod(a.size for a in atom.axes if not a.channel) == side.count
    }


def _gradient(side: Side, name: str, leaves):
    """E|dy/du|^2: the weight's part of the NTK over the squared norm of its input."""
    atom = _single_uses(side, leaves)[name]
    leaf = leaves[atom.view.leaf].name
    norm = side.own.dot_atoms(atom, atom, SAME).get(leaf)
    value = side.own.tangents(side.tangent, side.tangent, SAME).get(leaf)
    if norm is None or value is None:
        return None
    return ratio(_each(value, side.tangent, side), _each(norm, atom, side))


def _joined(parts: list):
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def ratio(above, below):
    """above / below, NaN where below is zero."""
    xp = xp_of(above, below)
    positive = xp.asarray(below) > 0
    return xp.where(positive, above / xp.where(positive, below, 1.0), xp.nan)
