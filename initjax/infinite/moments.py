r"""Second moments of a walked program: the recursion that is the NNGP and the NTK.

For two bodies X, Y of independent channels, M[X, Y](p, p') = E[X_c(p) Y_c(p')], with

    sums           bilinear
    W.x, W.y       Var(W) * n_channels * sum over contracted positions k of M[x, y](p k, p' k)
    f(u), g(v)     E[f(u) g(v)] of a Gaussian pair with covariance M[u, v]
    tangents       sum_{jk} M[coef_j, coef_k] * M[gdot_j, gdot_k], one array for every weight leaf

One recursion serves four sets of position pairs (modes.py). Same-example, same-position moments run by one-dimensional
formulas: the diagonal of a kernel carries no arccos(1) noise. A fine set is taken from a coarse one only where a step
mixes positions. Sources: Lee et al. 2018 (arXiv:1711.00165), Jacot et al. 2018 (arXiv:1806.07572), Yang 2019-2020
(arXiv:1910.12478, 2006.14548); the tangent form is derived in the documentation.
"""

import functools
import math
from typing import Any

import numpy as np

from initjax.infinite.arrays import (
    MANY,
    Array,
    Total,
    contract_constants,
    contracted_positions,
    convolved,
    cross,
    crosses,
    expect,
    filled,
    full,
    full_rank,
    same,
    same_entry,
    scale,
    sum_matching,
)
from initjax.infinite.blocks import Block, example_axes
from initjax.infinite.modes import (
    PAIRS,
    SAME,
    SITES,
    WITHIN,
    Mode,
    alike,
    left,
    moved,
    moved_right,
    right,
    shape_of,
    taken,
    with_diagonal,
)
from initjax.infinite.statistics import is_map, maps_of, mixed, split_parts
from initjax.trace.domain import Atom, Base, Ew, Lin, Noise, Product, Sum, Tangent, Taps, is_zero
from initjax.trace.expr import VARIABLE, Expr
from initjax.trace.graph import carries, factors_of, pairing, parts_of, reachable, related, sources
from initjax.trace.initstats import LeafStats
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, extents
from initjax.trace.walk import INPUTS

Leaves = dict[str, Array]  # weight leaf -> its part of a tangent moment
EVERYTHING = "<all leaves>"  # the one entry of tangent moments that are added up as they come


class Moments:
    """Moments between the bodies of one block of a walk with itself (`own`), or of two blocks.

    Parameters
    ----------
    leaves : distribution of the weight leaves.
    sides : the own moments of the two blocks, which know the variances; None: these are own moments.
    eta : leaf -> factor, to add the leaves up as they come, under `EVERYTHING`; None: keep them apart.
    """

    def __init__(self, leaves: tuple[LeafStats, ...], sides: "tuple[Moments, Moments] | None" = None, eta=None):
        self.leaves, self.eta, self.own = leaves, eta, sides is None
        self.sides = (self, self) if sides is None else sides
        self.same = self.sides[0] is self.sides[1]
        self.fine, self.coarse = (SAME, WITHIN) if self.own else (SITES, PAIRS)
        self.kept = SAME
        self._first = self._second = Schedule([], SAME, WITHIN)
        self.counting = False
        self.live = self.peak = self.largest = self.widest = self.small = (
            0  # bytes of what is remembered, for one position of each
        )
        self._memo: dict[tuple, Any] = {}
        self._wrapped: dict[int, Any] = {}
        self._due: dict[float, list[tuple]] = {}

    # ------------------------------------------------------------------ in order

    def run(self, first: "Schedule", second: "Schedule") -> None:
        """Compute the moments of all atoms behind two sides' bodies, oldest first, and forget what is used up.

        Going in order keeps the recursion shallow, and at any time only a few layers' matrices are alive.
        """
        self.kept, self._first, self._second = first.kept, first, second
        if first.types != second.types:
            return
        for a, b in zip(first.atoms, second.atoms, strict=True):
            for mode in first.asked.get(id(a), ()):
                if isinstance(a, Product):
                    continue
                if not a.tangent:
                    self.atoms(a, b, mode)
                elif id(a) not in first.carrying:
                    self.dot_atoms(a, b, mode)
            for key in self._due.pop(a.number, ()):
                self._forget(key)

    def expectation(self, body: Sum):
        """E[body] at every position; None where zero by structure."""
        plan = Schedule([body], SAME, WITHIN)
        if any(WITHIN in modes for modes in plan.asked.values()):  # pairs of positions, of each example alone
            at = example_axes([body], [])
            if at is not None:
                block = Moments(self.leaves)
                (moved,) = Block(at, 0, body.axes[0].size).bodies([body])
                plan = Schedule([moved], SAME, WITHIN)
                block.run(plan, plan)
                return block.mean_of(moved)
        self.run(plan, plan)
        return self.mean_of(body)

    def spread(self, body: Sum) -> tuple[Any, Any]:
        """E[body] and its variance, for a body with one position."""
        mean = self.expectation(body)
        second = self.variance(body)
        return mean, second if mean is None else second - mean**2

    def _remember(self, kind, mode: Mode, x, y, compute):
        key = (kind, mode, id(x), id(y))
        found = self._memo.get(key)
        if found is None:
            found = self._store(key, compute(x, y, mode), x, y)
        return found[0]

    def _store(self, key, value, x, y):
        """The bodies are kept with the value so that their ids stay theirs."""
        found = self._memo[key] = (value, x, y)
        if self.counting:
            self._count(key, value)
        if key[1] != SAME:  # those are small, and kept
            due = float("inf")
            if key[1] != self.kept or id(x) not in self._first.roots or id(y) not in self._second.roots:
                due = min(self._first.dies.get(id(x), 0), self._second.dies.get(id(y), 0))
            self._due.setdefault(due, []).append(key)
        return found

    @property
    def remembered(self):
        """Keys of what has been computed."""
        return self._memo.keys()

    def forget(self, keys) -> None:
        """Compute these anew when they are asked for again."""
        for key in keys:
            self._memo.pop(key, None)

    def _forget(self, key) -> None:
        found = self._memo.pop(key, None)
        if self.counting and found is not None:
            self.live -= _bytes(found[0])

    def _count(self, key, value) -> None:
        size = _bytes(value)
        if key[1] == SAME:
            self.small += size
            return
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        self.widest = max(self.widest, 0 if isinstance(value, dict) else size)

    # ------------------------------------------------------------------ objects that stand for one thing

    def _single(self, a: Atom) -> Sum:
        """An atom as a sum, one object for each atom."""
        if id(a) not in self._wrapped:
            self._wrapped[id(a)] = (Sum(a.axes, ((a, 1.0),)), a)
        return self._wrapped[id(a)][0]

    def _as_tangent(self, body) -> Tangent:
        """A sum of tangent atoms as a tangent, one object for each sum."""
        if isinstance(body, Tangent):
            return body
        if id(body) not in self._wrapped:
            self._wrapped[id(body)] = (Tangent(body.axes, ((None, body),)), body)
        return self._wrapped[id(body)][0]

    def _factors(self, a: Atom) -> list[Sum]:
        """The factors of a product, one object for each."""
        if not isinstance(a, Product):
            return [self._single(a)]
        return self._remember("factors", SAME, a, a, lambda a, *_: factors_of(a))

    def _leaf(self, a: Atom) -> tuple[Sum, Expr]:
        """An atom as a function of a Gaussian leaf; a Gaussian atom is the identity of itself."""
        return (a.leaf, a.expr) if isinstance(a, Ew) else (self._single(a), VARIABLE)

    # ------------------------------------------------------------------ sets of pairs

    def _taken(self, remembered, compute, a, b, mode: Mode) -> Any:
        """What `mode` asks for out of the coarse set of pairs; where that is no larger it is not remembered."""
        larger = canonical(self.coarse, a.axes, b.axes) == self.coarse
        value = (remembered if larger else compute)(a, b, self.coarse)
        if isinstance(value, dict):
            return {leaf: taken(v, a.axes, b.axes, self.coarse, mode) for leaf, v in value.items()}
        return taken(value, a.axes, b.axes, self.coarse, mode)

    # ------------------------------------------------------------------ primal bodies

    def moment(self, x: Sum, y: Sum, mode: Mode) -> Array | None:
        """M[x, y] at the pairs of positions of `mode`; None where it is zero by structure."""
        return self._remember("sum", canonical(mode, x.axes, y.axes), x, y, self._sum)

    def variance(self, u: Sum):
        """E[u(p)^2] over the positions of u; own moments only."""
        value = filled(self.flat(self.moment(u, u, SAME), u.axes), u.axes)
        return value if is_traced(value) else np.maximum(value, 0.0)  # rounding, where a mean is subtracted twice

    def flat(self, value, axes: Axes):
        """A same-position moment over the positions of its body."""
        return None if value is None else value.reshape(extents(axes))

    def _sum(self, x: Sum, y: Sum, mode: Mode):
        rank_x, rank_y = len(x.axes), len(y.axes)
        total = Total()
        for a, c in x.terms:
            for b, d in y.terms:
                if _unrelated(a, b):
                    continue
                total.add(self.atoms(a, b, mode), left(c, rank_y), right(d, mode, y.axes, x.axes))
        if not is_zero(y.constant):
            for a, c in x.terms:
                mean = left(self.sides[0].mean(a), rank_y)
                total.add(mean, left(c, rank_y), right(full_rank(y.constant, rank_y), mode, y.axes, x.axes))
        if not is_zero(x.constant):
            for b, d in y.terms:
                mean = right(self.sides[1].mean(b), mode, y.axes, x.axes)
                total.add(mean, left(full_rank(x.constant, rank_x), rank_y), right(d, mode, y.axes, x.axes))
            if not is_zero(y.constant):
                known = left(full_rank(x.constant, rank_x), rank_y)
                total.add(known, right(full_rank(y.constant, rank_y), mode, y.axes, x.axes))
        return total.full(shape_of(mode, x.axes, y.axes))

    def atoms(self, a: Atom, b: Atom, mode: Mode) -> Array | None:
        """M of two primal atoms."""
        return self._remember("atoms", canonical(mode, a.axes, b.axes), a, b, self._atoms)

    def _atoms(self, a: Atom, b: Atom, mode: Mode):
        if isinstance(a, Lin) or isinstance(b, Lin):
            return self._maps(a, b, mode)
        if isinstance(a, Product) or isinstance(b, Product):
            return self._products(a, b, mode)
        if isinstance(a, Noise) or isinstance(b, Noise):
            return self._noises(a, b, mode)
        if isinstance(a, (Base, Taps)) and isinstance(b, (Base, Taps)):
            return self._bases(a, b, mode)
        return self._functions(a, b, mode)

    def _maps(self, a: Atom, b: Atom, mode: Mode):
        if not mode.sites and not (_is_scale(a) or _is_scale(b)):
            if isinstance(a, Lin) and isinstance(b, Lin) and alike(a.map, b.map) and a.map.local:
                inner = self.moment(a.source, b.source, mode)
                return None if inner is None else moved(inner, a, b, mode)
            return self._taken(self.atoms, self._maps, a, b, mode)
        if isinstance(a, Lin) and (mode.sites or _is_scale(a)):
            inner = self.moment(a.source, self._single(b), mode)
            return None if inner is None else a.map.apply(inner, a.source.axes)
        assert isinstance(b, Lin)
        inner = self.moment(self._single(a), b.source, mode)
        return None if inner is None else moved_right(inner, b, mode, a.axes)

    def _functions(self, a: Atom, b: Atom, mode: Mode):
        """E[f(u) g(v)]; all functions of one pair of leaves at once."""
        (u, f), (v, g) = self._leaf(a), self._leaf(b)
        k = self.moment(u, v, mode)
        if mode == SAME and u is v and k is not None:
            return left(same(f, g, self.variance(u)), len(b.axes))
        q1 = left(self.sides[0].variance(u), len(b.axes))
        q2 = right(self.sides[1].variance(v), mode, b.axes, a.axes)
        if mode == SAME:
            return crosses([(f, g)], q1, q2, k)[0] if q1.size >= MANY else cross(f, g, q1, q2, k)
        if self._is_exact(a, b, mode) and is_traced(k):
            k = with_diagonal(k, None, mode, u.axes)  # replaced below; correlations of one would ask for long series
        siblings = zip(self._first.functions.get(id(u), ()), self._second.functions.get(id(v), ()), strict=False)
        members = [(a, b)] + [(p, q) for p, q in siblings if self._waits(p, q, a, mode)]
        found = crosses([(self._leaf(p)[1], self._leaf(q)[1]) for p, q in members], q1, q2, k)
        for (p, q), value in zip(members[1:], found[1:], strict=True):
            self._store(("atoms", mode, id(p), id(q)), self._exact(value, p, q, mode), p, q)
        return self._exact(found[0], a, b, mode)

    def _waits(self, p: Ew, q: Ew, current: Atom, mode: Mode) -> bool:
        """Whether the moment of two functions will be asked for, and is not known yet."""
        known = p is current or ("atoms", mode, id(p), id(q)) in self._memo
        return not known and mode in self._first.asked.get(id(p), ())

    def _is_exact(self, a: Atom, b: Atom, mode: Mode) -> bool:
        """Whether this moment has same-example, same-position entries, which are known from one dimension."""
        return self.same and mode != SAME and a.axes == b.axes

    def _exact(self, value, a: Atom, b: Atom, mode: Mode):
        if value is None:
            return None
        value = full(value, shape_of(mode, a.axes, b.axes))
        if self._is_exact(a, b, mode):
            own = self.sides[0]
            value = with_diagonal(value, own.flat(own.atoms(a, b, SAME), a.axes), mode, a.axes)
        return value

    def _noises(self, a: Atom, b: Atom, mode: Mode):
        """A draw is independent of everything but itself: the same entry of the same example."""
        total = Total()
        total.add(left(self.sides[0].mean(a), len(b.axes)), right(self.sides[1].mean(b), mode, b.axes, a.axes))
        value = total.full(shape_of(mode, a.axes, b.axes))
        if not (isinstance(a, Noise) and isinstance(b, Noise) and a.key == b.key and self.same):
            return value
        value = np.zeros(shape_of(mode, a.axes, b.axes)) if value is None else np.array(value)
        return with_diagonal(value, np.full(extents(a.axes), a.second), mode, a.axes)

    def _products(self, a: Atom, b: Atom, mode: Mode):
        """E[l r l' r'] of products of independent factors: factor by factor."""
        ours, theirs = (self._factors(x) for x in (a, b))
        partners = pairing(ours, theirs)
        assert partners is not None, "the walk has refused products that do not factorise"
        factors = []
        for i, j in partners:
            if i is not None and j is not None:
                factors.append(self.moment(ours[i], theirs[j], mode))
            elif i is not None:
                factors.append(left(self.sides[0].mean_of(ours[i]), len(b.axes)))
            else:
                assert j is not None
                factors.append(right(self.sides[1].mean_of(theirs[j]), mode, b.axes, a.axes))
        total = Total()
        total.add(*factors)
        return total.full(shape_of(mode, a.axes, b.axes))

    def mean(self, a: Atom) -> Array | None:
        """E[a(p)], of rank len(a.axes); None where zero by structure. Own moments only."""
        if isinstance(a, (Base, Taps)):
            return None
        if isinstance(a, Noise):
            return np.full(extents(a.axes), a.mean) if a.mean else None
        if isinstance(a, Lin):
            inner = self.mean_of(a.source)
            return None if inner is None else a.map.apply(inner, a.source.axes)
        if isinstance(a, Product):
            return self.flat(self.moment(a.left, a.right, SAME), a.axes)
        assert isinstance(a, Ew)
        return self._remember("mean", SAME, a, a, lambda a, *_: expect(a.expr, self.variance(a.leaf)))

    def mean_of(self, x: Sum) -> Array | None:
        """E[x(p)], of shape extents(x)."""
        total = Total()
        for a, c in x.terms:
            total.add(self.mean(a), c)
        if not is_zero(x.constant):
            total.add(full_rank(x.constant, len(x.axes)))
        return total.full(extents(x.axes))

    # ------------------------------------------------------------------ Gaussians made by weights

    def _bases(self, a: Base | Taps, b: Base | Taps, mode: Mode):
        """Primal Gaussians: independent unless they share the weights."""
        if isinstance(a, Taps) or isinstance(b, Taps):
            if not _same_taps(a, b):
                total = Total()
                for p in _taps(a):
                    for q in _taps(b):
                        total.add(None if _unrelated(p, q) else self.atoms(p, q, mode))
                return total.full(shape_of(mode, a.axes, b.axes))
            first, inner = _taps(a)[0], self.patches(a, b, mode)
        else:
            first, inner = a, None
            if not related(a, b):
                return None
            if a.kind == "vector":
                return scale(same_entry(a, b, mode), self.leaves[a.view.leaf].variance)
            inner = self.contraction(a, b, mode)
        return None if inner is None else scale(inner, self.leaves[first.view.leaf].variance * _channels(first))

    def contraction(self, a: Base, b: Base, mode: Mode):
        """sum_k M[x, y](p k, p' k) over the contracted positions of two bases, on their own axes."""
        x, y = a.operand, b.operand
        if not mode.sites and not _parallel(a, b):
            return self._taken(self.contraction, self.contraction, a, b, mode)
        if x.is_constant and y.is_constant:
            kind = ("known", a.axes, a.contracted)
            return self._remember(kind, mode, x.constant, y.constant, lambda *_: contract_constants((a,), (b,), mode))
        below = operand_mode(a, b, mode)
        inner = self.moment(x, y, below)
        return None if inner is None else sum_matching(inner, a, b, below)

    def patches(self, a, b, mode: Mode):
        """The sum of the taps' contractions; the same for a convolution and for the tangents of its weights."""
        if a.source is None:
            key = (a.bases[0].operand.constant, b.bases[0].operand.constant)
            kind = ("patches", a.axes)
            return self._remember(kind, mode, *key, lambda *_: contract_constants(a.bases, b.bases, mode))
        kind = ("patches", a.windows, a.axes, a.bases[0].contracted)
        return self._remember(kind, mode, a.source, b.source, lambda *_: self._patches(a, b, mode))

    def _patches(self, a: Taps, b: Taps, mode: Mode):
        inner = self.moment(a.source, b.source, mode)
        return None if inner is None else self._convolved(inner, a, b, mode)

    def _convolved(self, inner, a: Taps, b: Taps, mode: Mode):
        spread = convolved(inner, a.windows, a.source.axes, b.source.axes, mode)
        return sum_matching(spread, a.bases[0], b.bases[0], mode)

    # ------------------------------------------------------------------ tangents

    def tangents(self, x: Tangent, y: Tangent, mode: Mode) -> Leaves:
        """M[x, y] by weight leaf, without its eta; own moments also know perturbations of the input, under `INPUTS`."""
        return self._remember("tangents", canonical(mode, x.axes, y.axes), x, y, self._tangents)

    def _tangents(self, x: Tangent, y: Tangent, mode: Mode) -> Leaves:
        if _is_masked(x) or _is_masked(y):
            return self._masked(x, y, mode)
        (plain_x, maps_x), (plain_y, maps_y) = self._split(x), self._split(y)
        # a scale acts on each side by its own factor, whatever the mode; other maps may change positions
        if not mode.sites and not all(_is_scale(a) for a, _ in maps_x + maps_y):
            if len(maps_x) == len(maps_y) == 1 and not plain_x and not plain_y:
                (a, c), (b, d) = maps_x[0], maps_y[0]
                if alike(a.map, b.map) and a.map.local:
                    inner = self.tangents(self._as_tangent(a.source), self._as_tangent(b.source), mode)
                    factors = left(c, len(y.axes)), right(d, mode, y.axes, x.axes)
                    return {leaf: moved(v, a, b, mode) * factors[0] * factors[1] for leaf, v in inner.items()}
            return self._taken(self.tangents, self._tangents, x, y, mode)
        out: dict[str, Total] = {}
        for c, g in plain_x:
            for d, h in plain_y:
                dots = self._dots(g, h, mode)
                weight = self._coefficients(c, d, x, y, mode) if dots else None
                for leaf, value in dots.items():
                    out.setdefault(leaf, Total()).add(value, weight)
        for atom, c in maps_x:
            for leaf, value in self.tangents(self._as_tangent(atom.source), y, mode).items():
                out.setdefault(leaf, Total()).add(atom.map.apply(value, atom.source.axes), left(c, len(y.axes)))
        for part in plain_x if maps_y else ():
            alone = self._part(x, part)
            for atom, d in maps_y:
                for leaf, value in self.tangents(alone, self._as_tangent(atom.source), mode).items():
                    shifted = moved_right(value, atom, mode, x.axes)
                    out.setdefault(leaf, Total()).add(shifted, right(d, mode, y.axes, x.axes))
        shape = shape_of(mode, x.axes, y.axes)
        found = {leaf: total.full(shape) for leaf, total in out.items()}
        return {leaf: value for leaf, value in found.items() if value is not None}

    def _masked(self, x: Tangent, y: Tangent, mode: Mode) -> Leaves:
        """Tangents with draws in front, or statistics of the batch: independent of all the rest, or as good as."""
        ours, theirs = (self._remember("apart", SAME, z, z, lambda z, *_: split_parts(z)) for z in (x, y))
        out: dict[str, Total] = {}
        if any(statistic for _, _, statistic in ours + theirs):
            if not mode.sites:
                return self._taken(self.tangents, self._tangents, x, y, mode)
            for k, values in maps_of(self, x, y, mode, ours, theirs):
                for leaf, value in values.items():
                    out.setdefault(leaf, Total()).add(value, k)
            ours, theirs = ([part for part in parts if not is_map(part)] for parts in (ours, theirs))
        for one in ours:
            for other in theirs:
                (c, g, statistic), (d, h, _) = one, other
                if statistic != other[2]:
                    for leaf, value in mixed(self, one, other, mode).items():
                        out.setdefault(leaf, Total()).add(value)
                    continue
                found = self.tangents(self._as_tangent(g), self._as_tangent(h), mode)
                weight = self._coefficients(c, d, x, y, mode) if found else None
                for leaf, value in found.items():
                    out.setdefault(leaf, Total()).add(value, weight)
        shape = shape_of(mode, x.axes, y.axes)
        found = {leaf: total.full(shape) for leaf, total in out.items()}
        return {leaf: value for leaf, value in found.items() if value is not None}

    def _split(self, x: Tangent) -> tuple[list, list[tuple[Lin, Any]]]:
        """Parts whose tangent atoms are Gaussian, and maps of tangents that carry coefficients of their own."""

        def split(x: Tangent, *_):
            plain, maps = [], []
            for c, g in x.parts:
                kept = [(atom, k) for atom, k in g.terms if not carries(atom)]
                maps += [(atom, k) for atom, k in g.terms if carries(atom)]
                if len(kept) == len(g.terms):
                    plain.append((c, g))
                elif kept:
                    plain.append((c, Sum(g.axes, tuple(kept))))
            return plain, maps

        return self._remember("split", SAME, x, x, split)

    def _part(self, x: Tangent, part) -> Tangent:
        """One part of a tangent, as one object for each part."""
        return self._remember("part", SAME, x, part[1], lambda x, *_: Tangent(x.axes, (part,)))

    def _coefficients(self, c: Sum | None, d: Sum | None, x: Tangent, y: Tangent, mode: Mode):
        if c is None and d is None:
            return 1.0
        if c is not None and d is not None:
            return self.moment(c, d, mode)
        if c is not None:
            return left(self.sides[0].mean_of(c), len(y.axes))
        assert d is not None
        return right(self.sides[1].mean_of(d), mode, y.axes, x.axes)

    def _dots(self, g: Sum, h: Sum, mode: Mode) -> Leaves:
        out: dict[str, Total] = {}
        for a, c in g.terms:
            for b, d in h.terms:
                if _unrelated(a, b):
                    continue
                for leaf, value in self.dot_atoms(a, b, mode).items():
                    coefficients = left(c, len(h.axes)), right(d, mode, h.axes, g.axes)
                    out.setdefault(leaf, Total()).add(value, *coefficients)
        shape = shape_of(mode, g.axes, h.axes)
        return {leaf: total.full(shape) for leaf, total in out.items()}

    def dot_atoms(self, a: Atom, b: Atom, mode: Mode) -> Leaves:
        """Moments of two tangent atoms, by weight leaf."""
        return self._remember("dots", canonical(mode, a.axes, b.axes), a, b, self._dot_atoms)

    def _dot_atoms(self, a: Atom, b: Atom, mode: Mode) -> Leaves:
        if isinstance(a, Lin) or isinstance(b, Lin):
            return self._dot_maps(a, b, mode)
        assert isinstance(a, (Base, Taps)) and isinstance(b, (Base, Taps))
        if (isinstance(a, Taps) or isinstance(b, Taps)) and not _same_taps(a, b):
            out: dict[str, Total] = {}
            for p in _taps(a):
                for q in _taps(b):
                    for leaf, value in ({} if _unrelated(p, q) else self.dot_atoms(p, q, mode)).items():
                        out.setdefault(leaf, Total()).add(value)
            return {leaf: total.full(shape_of(mode, a.axes, b.axes)) for leaf, total in out.items()}
        first, other = _taps(a)[0], _taps(b)[0]
        if not related(first, other):
            return {}
        view = first.view
        if not view.tangent:
            factor = self.leaves[view.leaf].variance * _channels(first)
            return {leaf: scale(value, factor) for leaf, value in self._through(a, b, mode).items()}
        # dW.x or db: one leaf of its own
        leaf = INPUTS if view.leaf < 0 else self.leaves[view.leaf].name
        if leaf == INPUTS and not self.own:
            return {}
        if first.kind == "vector":
            value, factor = same_entry(first, other, mode), 1.0
        else:
            value = self.patches(a, b, mode) if isinstance(a, Taps) else self.contraction(first, other, mode)
            factor = float(_channels(first))
        if self.eta is not None:
            factor, leaf = factor * self.eta[leaf], EVERYTHING
        return {} if value is None or factor == 0.0 else {leaf: scale(value, factor)}

    def _through(self, a: Base | Taps, b: Base | Taps, mode: Mode) -> Leaves:
        """Tangents of the operands, contracted with the weights."""
        if isinstance(a, Taps):
            assert isinstance(b, Taps)
            inner = self.tangents(self._as_tangent(a.source), self._as_tangent(b.source), mode)
            return {leaf: self._convolved(value, a, b, mode) for leaf, value in inner.items()}
        assert isinstance(b, Base)
        if not mode.sites and not _parallel(a, b):
            return self._taken(self._through, self._through, a, b, mode)
        below = operand_mode(a, b, mode)
        inner = self.tangents(a.operand, b.operand, below)
        return {leaf: sum_matching(value, a, b, below) for leaf, value in inner.items()}

    def _dot_maps(self, a: Atom, b: Atom, mode: Mode) -> Leaves:
        """Linear maps over positions, of Gaussian tangents or (both sides, in `_tangents`) of any."""
        if not mode.sites and not (_is_scale(a) or _is_scale(b)):
            if isinstance(a, Lin) and isinstance(b, Lin) and alike(a.map, b.map) and a.map.local:
                inner = self.tangents(self._as_tangent(a.source), self._as_tangent(b.source), mode)
                return {leaf: moved(value, a, b, mode) for leaf, value in inner.items()}
            return self._taken(self.dot_atoms, self._dot_maps, a, b, mode)
        if isinstance(a, Lin) and (mode.sites or _is_scale(a)):
            inner = self.tangents(self._as_tangent(a.source), self._as_tangent(self._single(b)), mode)
            return {leaf: a.map.apply(value, a.source.axes) for leaf, value in inner.items()}
        assert isinstance(b, Lin)
        inner = self.tangents(self._as_tangent(self._single(a)), self._as_tangent(b.source), mode)
        return {leaf: moved_right(value, b, mode, a.axes) for leaf, value in inner.items()}


class Schedule:
    """The atoms behind one side's bodies, oldest first; in which modes they are asked for, and when they are used up.

    What will be asked for follows from the bodies back to the inputs; a wrong guess costs memory, never a digit.

    bodies : what results are read from. kept : in this mode. coarse : what a step that mixes positions asks for.
    """

    def __init__(self, bodies: list, kept: Mode, coarse: Mode):
        self.kept, self.coarse = kept, coarse
        self.atoms = reachable(bodies)
        self.types = [type(a) for a in self.atoms]
        self.roots = {id(thing) for body in bodies for thing in parts_of(body)}
        self.carrying = {id(a) for a in self.atoms if a.tangent and carries(a)}
        self.dies: dict[int, float] = {}
        self.functions: dict[int, list[Ew]] = {}
        self.asked: dict[int, set[Mode]] = {}
        for atom in self.atoms:
            if isinstance(atom, Ew):
                self.functions.setdefault(id(atom.leaf), []).append(atom)
        for atom in reversed(self.atoms):
            # a map of tangents with coefficients has no moment of its own: what it is made of serves those who use it
            end = self.dies.get(id(atom), float("inf")) if id(atom) in self.carrying else atom.number
            for body in sources(atom):
                known = [body.constant] if isinstance(body, Sum) else []
                for thing in parts_of(body) + known:
                    self.dies[id(thing)] = max(self.dies.get(id(thing), 0), end)
        for body in bodies:
            self._ask(body, kept)
        for atom in reversed(self.atoms):
            for mode in list(self.asked.get(id(atom), ())):
                for body in sources(atom):
                    self._ask(body, self._below(atom, mode))

    def _below(self, atom: Atom, mode: Mode) -> Mode:
        if isinstance(atom, Base) and atom.kind == "dot":
            return operand_mode(atom, atom, mode)
        return self.coarse if isinstance(atom, Lin) and not atom.map.local else mode

    def _ask(self, body, mode: Mode) -> None:
        for thing in parts_of(body):
            if isinstance(thing, Atom):
                self.asked.setdefault(id(thing), set()).add(canonical(mode, thing.axes, thing.axes))


@functools.lru_cache(maxsize=4096)
def canonical(mode: Mode, x: Axes, y: Axes) -> Mode:
    """Without positions beside the examples all pairs are all pairs of examples."""
    if not mode.sites or not _corresponding(x, y):
        return mode
    trivial = all(a.example or n == 1 for axes in (x, y) for a, n in zip(axes, extents(axes), strict=True))
    return mode._replace(sites=False) if trivial else mode


def operand_mode(a: Base, b: Base, mode: Mode) -> Mode:
    """What a contraction asks of its operands: positions that are all contracted meet themselves alone."""
    alone = mode.sites and all(n == 1 or c.example for c, n in zip(a.axes, extents(a.axes), strict=True))
    return mode._replace(sites=False) if alone and _parallel(a, b) else mode


def _channels(a: Base) -> int:
    """How many channels a contraction sums over."""
    sizes = [a.operand.axes[i].size for i in a.contracted if a.operand.axes[i].channel]
    return math.prod(sizes)


def _is_masked(x: Tangent) -> bool:
    """Whether a draw stands before a map of tangents with coefficients (dropout after pooling)."""
    return any(c is not None and any(carries(atom) for atom, _ in g.terms) for c, g in x.parts)


def _is_scale(a: Atom) -> bool:
    return isinstance(a, Lin) and a.map.kind == "scale"


def _taps(a: Atom) -> tuple[Base, ...]:
    if isinstance(a, Taps):
        return a.bases
    assert isinstance(a, Base)
    return (a,)


def _same_taps(a: Atom, b: Atom) -> bool:
    """Whether two convolutions have the same weights and windows, tap by tap."""
    if not (isinstance(a, Taps) and isinstance(b, Taps)) or len(a.bases) != len(b.bases) or a.rows != b.rows:
        return False
    return (a.source is None) == (b.source is None) and all(map(related, a.bases, b.bases))


def _unrelated(a: Atom, b: Atom) -> bool:
    """Whether two atoms are Gaussians of different weights."""
    if not isinstance(a, (Base, Taps)) or not isinstance(b, (Base, Taps)):
        return False
    mine, yours = _taps(a), _taps(b)
    if (mine[0].view.leaf, mine[0].view.tangent) != (yours[0].view.leaf, yours[0].view.tangent):
        return True
    return not any(related(p, q) for p in mine for q in yours)


@functools.lru_cache(maxsize=4096)
def _corresponding(x: Axes, y: Axes) -> bool:
    """Whether the axes of two bodies are the same, whatever the number of examples."""
    return len(x) == len(y) and all(
        p.example == q.example and (p.example or p.size == q.size) for p, q in zip(x, y, strict=True)
    )


def _parallel(a: Base, b: Base) -> bool:
    """Whether two contractions treat the axes of their operands alike, so that same positions make same positions."""
    alike = _corresponding(a.operand.axes, b.operand.axes) and a.order == b.order
    return alike and contracted_positions(a) == contracted_positions(b) and _corresponding(a.axes, b.axes)


def _bytes(value) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return int(getattr(value, "nbytes", 0))
