r"""Second moments of a walked program: the recursion that is the NNGP and the NTK.

For two bodies X, Y of independent channels, M[X, Y](p, p') = E[X_c(p) Y_c(p')], with

    sums           bilinear
    W.x, W.y       Var(W) * n_channels * sum over contracted positions k of M[x, y](p k, p' k)
    f(u), g(v)     E[f(u) g(v)] of a Gaussian pair with covariance M[u, v]
    tangents       sum_{jk} M[coef_j, coef_k] * M[gdot_j, gdot_k], one array for every weight leaf

Same-example moments (the diagonals) run through a recursion of their own, by one-dimensional formulas: the diagonal of
a kernel carries no arccos(1) noise. Sources: Lee et al. 2018 (arXiv:1711.00165), Jacot et al. 2018 (arXiv:1806.07572),
Yang 2019-2020 (arXiv:1910.12478, 2006.14548); the tangent form is derived in the documentation.
"""

import math
from typing import Any

from initjax.infinite.arrays import (
    Array,
    Total,
    after,
    before,
    constant_contraction,
    cross,
    expect,
    filled,
    full_rank,
    put_diagonal,
    same_entry,
    same_entry_diagonal,
    scale,
    sum_kept,
    sum_matching,
    take_diagonal,
)
from initjax.trace.domain import Atom, Base, Ew, Lin, Product, Sum, Tangent, is_zero
from initjax.trace.expr import VARIABLE, Expr
from initjax.trace.graph import carries, pairing, parts_of, reachable, related, sources
from initjax.trace.initstats import LeafStats
from initjax.trace.maps import extents
from initjax.trace.walk import INPUTS

Leaves = dict[str, Array]  # weight leaf -> its part of a tangent moment


class Moments:
    """Moments between the bodies of one or two walks over the same model.

    Parameters
    ----------
    leaves : distribution of the weight leaves.
    same : whether both sides are one walk; then diagonals are known exactly.
    """

    def __init__(self, leaves: tuple[LeafStats, ...], same: bool):
        self.leaves, self.same = leaves, same
        self._memo: dict[tuple, Any] = {}
        self._wrapped: dict[int, Any] = {}
        self._dies: dict[int, float] = {}
        self._due: dict[float, list[tuple]] = {}

    def run(self, first: list, second: list) -> None:
        """Compute the moments of all atoms behind these bodies, oldest first, and forget what is used up.

        first, second : bodies on either side; what stands in them is kept. Going in order keeps the recursion shallow,
        and at any time only a few layers' matrices are alive.
        """
        ours, theirs = reachable(first), reachable(second)
        for bodies, atoms in ((first, ours), (second, theirs)):
            self._set_lifetimes(bodies, atoms)
        aligned = [type(a) for a in ours] == [type(b) for b in theirs]
        for a, b in zip(ours, theirs, strict=True) if aligned else ():
            for atom in (a,) if a is b else (a, b):
                if isinstance(atom, Product):
                    continue
                if not atom.tangent:
                    self.atoms_diagonal(atom, atom)
                elif not carries(atom):
                    self.dot_atoms(atom, atom, "diagonal")
            if isinstance(a, Product):
                continue
            if not a.tangent:
                self.atoms(a, b)
            elif not carries(a):
                self.dot_atoms(a, b, "leaves")
            for key in self._due.pop(a.number, ()):
                self._memo.pop(key, None)

    def prepare(self, body) -> None:
        """Same-example moments of everything behind a body, oldest first, which keeps the recursion shallow."""
        for atom in reachable([body]):
            if not atom.tangent and not isinstance(atom, Product):
                self.atoms_diagonal(atom, atom)

    def expectation(self, body: Sum):
        """E[body] at every position; None where zero by structure."""
        self.prepare(body)
        return self.mean_of(body)

    def _set_lifetimes(self, bodies: list, atoms: list[Atom]) -> None:
        for atom in atoms:
            for body in sources(atom):
                for thing in parts_of(body):
                    self._dies[id(thing)] = max(self._dies.get(id(thing), 0), atom.number)
        for body in bodies:
            for thing in parts_of(body):
                self._dies[id(thing)] = float("inf")

    # ------------------------------------------------------------------ primal bodies

    def pair(self, x: Sum, y: Sum) -> Array | None:
        """M[x, y], of shape extents(x) + extents(y); None where it is zero by structure."""
        return self._remember("pair", x, y, self._pair)

    def diagonal(self, x: Sum, y: Sum) -> Array | None:
        """E[x(p) y(p)] for two bodies of one walk on the same axes."""
        return self._remember("diagonal", x, y, self._diagonal)

    def _remember(self, kind: str, x, y, compute):
        key = (kind, id(x), id(y))
        if key not in self._memo:
            self._memo[key] = (compute(x, y), x, y)  # the bodies are kept so that their ids stay theirs
            if "diagonal" not in kind and kind != "mean":  # those are small, and kept
                due = min(self._dies.get(id(x), float("inf")), self._dies.get(id(y), float("inf")))
                self._due.setdefault(due, []).append(key)
        return self._memo[key][0]

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

    def _leaf(self, a: Atom) -> tuple[Sum, Expr]:
        """An atom as a function of a Gaussian leaf; a Gaussian atom is the identity of itself."""
        return (a.leaf, a.expr) if isinstance(a, Ew) else (self._single(a), VARIABLE)

    def _pair(self, x: Sum, y: Sum):
        rank_x, rank_y = len(x.axes), len(y.axes)
        total = Total()
        for a, c in x.terms:
            for b, d in y.terms:
                total.add(self.atoms(a, b), before(c, rank_y), after(d, rank_x))
        if not is_zero(y.constant):
            for a, c in x.terms:
                total.add(before(self.mean(a), rank_y), before(c, rank_y), after(y.constant, rank_x))
        if not is_zero(x.constant):
            for b, d in y.terms:
                total.add(after(self.mean(b), rank_x), before(x.constant, rank_y), after(d, rank_x))
            if not is_zero(y.constant):
                total.add(before(full_rank(x.constant, rank_x), rank_y), after(y.constant, rank_x))
        return total.full(extents(x.axes) + extents(y.axes))

    def _diagonal(self, x: Sum, y: Sum):
        total = Total()
        for a, c in x.terms:
            for b, d in y.terms:
                total.add(self.atoms_diagonal(a, b), c, d)
        if not is_zero(y.constant):
            for a, c in x.terms:
                total.add(self.mean(a), c, y.constant)
        if not is_zero(x.constant):
            for b, d in y.terms:
                total.add(self.mean(b), x.constant, d)
            if not is_zero(y.constant):
                total.add(full_rank(x.constant, len(x.axes)), y.constant)
        return total.full(extents(x.axes))

    def atoms(self, a: Atom, b: Atom) -> Array | None:
        """M of two primal atoms."""
        return self._remember("atoms", a, b, self._atoms)

    def atoms_diagonal(self, a: Atom, b: Atom) -> Array | None:
        return self._remember("atoms diagonal", a, b, self._atoms_diagonal)

    def _atoms(self, a: Atom, b: Atom):
        if isinstance(a, Lin):
            inner = self.pair(a.source, self._single(b))
            return None if inner is None else a.map.apply(inner, a.source.axes)
        if isinstance(b, Lin):
            inner = self.pair(self._single(a), b.source)
            return None if inner is None else b.map.apply(inner, b.source.axes, len(a.axes))
        if isinstance(a, Product) or isinstance(b, Product):
            return self._products(a, b, diagonal=False)
        if isinstance(a, Base) and isinstance(b, Base):
            return self._bases(a, b)
        return self._functions(a, b)

    def _atoms_diagonal(self, a: Atom, b: Atom):
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Lin) and one.map.kind == "scale":
                inner = self.diagonal(one.source, self._single(other))
                return None if inner is None else one.map.apply(inner, one.source.axes)
        if isinstance(a, Lin) or isinstance(b, Lin):
            if isinstance(a, Lin) and isinstance(b, Lin) and a.map == b.map and a.map.local:
                inner = self.diagonal(a.source, b.source)
                return None if inner is None else a.map.apply(inner, a.source.axes)
            return take_diagonal(self.atoms(a, b), len(a.axes))
        if isinstance(a, Product) or isinstance(b, Product):
            return self._products(a, b, diagonal=True)
        if isinstance(a, Base) and isinstance(b, Base):
            return self._bases_diagonal(a, b)
        u, f = self._leaf(a)
        v, g = self._leaf(b)
        q1, q2 = (filled(self.diagonal(w, w), w.axes) for w in (u, v))
        return cross(f, g, q1, q2, self.diagonal(u, v))

    def _functions(self, a: Atom, b: Atom):
        """E[f(u) g(v)] at all pairs of positions."""
        (u, f), (v, g) = self._leaf(a), self._leaf(b)
        rank_a, rank_b = len(a.axes), len(b.axes)
        q1 = filled(self.diagonal(u, u), u.axes)
        q2 = filled(self.diagonal(v, v), v.axes)
        value = cross(f, g, before(q1, rank_b), after(q2, rank_a), self.pair(u, v))
        if value is not None and self.same and a.axes == b.axes:
            exact = self.atoms_diagonal(a, b)
            value = put_diagonal(value, exact, rank_a)
        return value

    def _products(self, a: Atom, b: Atom, diagonal: bool):
        """E[l r l' r'] of products of independent factors: factor by factor."""
        ours, theirs = ([x.left, x.right] if isinstance(x, Product) else [self._single(x)] for x in (a, b))
        partners = pairing(ours, theirs)
        assert partners is not None, "the walk has refused products that do not factorise"
        total = Total()
        factors = []
        for i, j in partners:
            if i is not None and j is not None:
                factors.append(self.diagonal(ours[i], theirs[j]) if diagonal else self.pair(ours[i], theirs[j]))
            elif i is not None:
                mean = self.mean_of(ours[i])
                factors.append(mean if diagonal else before(mean, len(b.axes)))
            else:
                assert j is not None
                mean = self.mean_of(theirs[j])
                factors.append(mean if diagonal else after(mean, len(a.axes)))
        total.add(*factors)
        return total.full(extents(a.axes) if diagonal else extents(a.axes) + extents(b.axes))

    def mean(self, a: Atom) -> Array | None:
        """E[a(p)], of rank len(a.axes); None where zero by structure."""
        if isinstance(a, Base):
            return None
        if isinstance(a, Lin):
            inner = self.mean_of(a.source)
            return None if inner is None else a.map.apply(inner, a.source.axes)
        if isinstance(a, Product):
            return self.diagonal(a.left, a.right)
        assert isinstance(a, Ew)
        return self._remember("mean", a, a, lambda a, _: self._mean(a))

    def _mean(self, a: Ew):
        return expect(a.expr, filled(self.diagonal(a.leaf, a.leaf), a.leaf.axes))

    def mean_of(self, x: Sum) -> Array | None:
        """E[x(p)], of shape extents(x)."""
        total = Total()
        for a, c in x.terms:
            total.add(self.mean(a), c)
        if not is_zero(x.constant):
            total.add(full_rank(x.constant, len(x.axes)))
        return total.full(extents(x.axes))

    # ------------------------------------------------------------------ Gaussians made by weights

    def _bases(self, a: Base, b: Base):
        """Primal bases: independent unless they share the weights."""
        if not related(a, b):
            return None
        variance = self.leaves[a.view.leaf].variance
        if a.kind == "vector":
            return scale(same_entry(a, b), variance)
        contracted = self.contraction(a, b)
        return None if contracted is None else scale(contracted, variance * _channels(a))

    def _bases_diagonal(self, a: Base, b: Base):
        if not related(a, b):
            return None
        variance = self.leaves[a.view.leaf].variance
        if a.kind == "vector":
            return scale(same_entry_diagonal(a, b), variance)
        inner = self.diagonal(a.operand, b.operand)
        return None if inner is None else scale(sum_kept(inner, a), variance * _channels(a))

    def contraction(self, a: Base, b: Base):
        """sum_k M[x, y](p k, p' k) over the contracted positions of two bases, on their own axes."""
        x, y = a.operand, b.operand
        if x.is_constant and y.is_constant:
            return constant_contraction(a, b)
        inner = self.pair(x, y)
        return None if inner is None else sum_matching(inner, a, b)

    # ------------------------------------------------------------------ tangents

    def tangents(self, x: Tangent, y: Tangent, mode: str = "leaves") -> Leaves:
        """M[x, y] by weight leaf, without its eta.

        mode : "leaves", all pairs of positions; "diagonal", E[x(p) y(p)], also for perturbations of the input (under
        `INPUTS`); "inputs", all pairs of positions for these alone.
        """
        return self._remember("tangents " + mode, x, y, lambda x, y: self._tangents(x, y, mode))

    def _tangents(self, x: Tangent, y: Tangent, mode: str) -> Leaves:
        (plain_x, maps_x), (plain_y, maps_y) = self._split(x), self._split(y)
        if mode == "diagonal" and len(maps_x) == len(maps_y) == 1 and not plain_x and not plain_y:
            (a, c), (b, d) = maps_x[0], maps_y[0]
            if a.map == b.map and a.map.local:
                inner = self.tangents(self._as_tangent(a.source), self._as_tangent(b.source), mode)
                return {leaf: a.map.apply(value, a.source.axes) * c * d for leaf, value in inner.items()}
        if mode == "diagonal" and (maps_x or maps_y):  # needs the pairs of positions of one example
            full = self.tangents(x, y) | self.tangents(x, y, "inputs")
            return {leaf: take_diagonal(value, len(x.axes)) for leaf, value in full.items()}
        diagonal = mode == "diagonal"
        rank_x, rank_y = (0, 0) if diagonal else (len(x.axes), len(y.axes))
        out: dict[str, Total] = {}
        for c, g in plain_x:
            for d, h in plain_y:
                dots = self._dots(g, h, mode)
                weight = self._coefficients(c, d, rank_x, rank_y, diagonal) if dots else None
                for leaf, value in dots.items():
                    out.setdefault(leaf, Total()).add(value, weight)
        for atom, c in maps_x:
            for leaf, value in self.tangents(self._as_tangent(atom.source), y, mode).items():
                out.setdefault(leaf, Total()).add(atom.map.apply(value, atom.source.axes), before(c, rank_y))
        for part in plain_x if maps_y else ():
            alone = self._part(x, part)
            for atom, d in maps_y:
                for leaf, value in self.tangents(alone, self._as_tangent(atom.source), mode).items():
                    moved = atom.map.apply(value, atom.source.axes, rank_x)
                    out.setdefault(leaf, Total()).add(moved, after(d, rank_x))
        shape = extents(x.axes) if diagonal else extents(x.axes) + extents(y.axes)
        found = {leaf: total.full(shape) for leaf, total in out.items()}
        return {leaf: value for leaf, value in found.items() if value is not None}

    def _split(self, x: Tangent) -> tuple[list, list[tuple[Lin, Any]]]:
        """Parts whose tangent atoms are Gaussian, and maps of tangents that carry coefficients of their own."""

        def split(x: Tangent, _):
            plain, maps = [], []
            for c, g in x.parts:
                kept = [(atom, k) for atom, k in g.terms if not carries(atom)]
                maps += [(atom, k) for atom, k in g.terms if carries(atom)]
                if len(kept) == len(g.terms):
                    plain.append((c, g))
                elif kept:
                    plain.append((c, Sum(g.axes, tuple(kept))))
            return plain, maps

        return self._remember("split diagonal", x, x, split)

    def _part(self, x: Tangent, part) -> Tangent:
        """One part of a tangent, as one object for each part."""
        return self._remember("part diagonal", x, part[1], lambda x, _: Tangent(x.axes, (part,)))

    def _coefficients(self, c: Sum | None, d: Sum | None, rank_x: int, rank_y: int, diagonal: bool):
        if c is None and d is None:
            return 1.0
        if c is not None and d is not None:
            return self.diagonal(c, d) if diagonal else self.pair(c, d)
        mean = self.mean_of(c if c is not None else d)  # type: ignore[arg-type]
        if mean is None or diagonal:
            return mean
        return before(mean, rank_y) if c is not None else after(mean, rank_x)

    def _dots(self, g: Sum, h: Sum, mode: str) -> Leaves:
        out: dict[str, Total] = {}
        diagonal = mode == "diagonal"
        rank_x, rank_y = (0, 0) if diagonal else (len(g.axes), len(h.axes))
        for a, c in g.terms:
            for b, d in h.terms:
                for leaf, value in self.dot_atoms(a, b, mode).items():
                    out.setdefault(leaf, Total()).add(value, before(c, rank_y), after(d, rank_x))
        shape = extents(g.axes) if diagonal else extents(g.axes) + extents(h.axes)
        return {leaf: total.full(shape) for leaf, total in out.items()}

    def dot_atoms(self, a: Atom, b: Atom, mode: str) -> Leaves:
        """Moments of two tangent atoms, by weight leaf."""
        return self._remember("dots " + mode, a, b, lambda a, b: self._dot_atoms(a, b, mode))

    def _dot_atoms(self, a: Atom, b: Atom, mode: str) -> Leaves:
        diagonal = mode == "diagonal"
        if isinstance(a, Lin) or isinstance(b, Lin):
            return self._dot_maps(a, b, mode)
        assert isinstance(a, Base) and isinstance(b, Base)
        if not related(a, b):
            return {}
        if not a.view.tangent:
            factor = self.leaves[a.view.leaf].variance * _channels(a)
            inner = self.tangents(a.operand, b.operand, mode)
            values = {leaf: sum_kept(v, a) if diagonal else sum_matching(v, a, b) for leaf, v in inner.items()}
            return {leaf: scale(value, factor) for leaf, value in values.items()}
        # dW.x or db: one leaf of its own
        leaf = INPUTS if a.view.leaf < 0 else self.leaves[a.view.leaf].name
        if not diagonal and (leaf == INPUTS) != (mode == "inputs"):
            return {}
        if a.kind == "vector":
            return {leaf: same_entry_diagonal(a, b) if diagonal else same_entry(a, b)}
        if diagonal:
            inner = self.diagonal(a.operand, b.operand)
            value = None if inner is None else sum_kept(inner, a)
        else:
            value = self.contraction(a, b)
        return {} if value is None else {leaf: scale(value, float(_channels(a)))}

    def _dot_maps(self, a: Atom, b: Atom, mode: str) -> Leaves:
        """Linear maps over positions, of Gaussian tangents or (both sides, in `_tangents`) of any."""
        if mode == "diagonal":
            for one, other in ((a, b), (b, a)):
                if isinstance(one, Lin) and one.map.kind == "scale":
                    inner = self.tangents(self._as_tangent(one.source), self._as_tangent(self._single(other)), mode)
                    return {leaf: one.map.apply(value, one.source.axes) for leaf, value in inner.items()}
            if isinstance(a, Lin) and isinstance(b, Lin) and a.map == b.map and a.map.local:
                inner = self.tangents(self._as_tangent(a.source), self._as_tangent(b.source), mode)
                return {leaf: a.map.apply(value, a.source.axes) for leaf, value in inner.items()}
            full = self.dot_atoms(a, b, "leaves") | self.dot_atoms(a, b, "inputs")
            return {leaf: take_diagonal(value, len(a.axes)) for leaf, value in full.items()}
        if isinstance(a, Lin):
            inner = self.tangents(self._as_tangent(a.source), self._as_tangent(self._single(b)), mode)
            return {leaf: a.map.apply(value, a.source.axes) for leaf, value in inner.items()}
        assert isinstance(b, Lin)
        inner = self.tangents(self._as_tangent(self._single(a)), self._as_tangent(b.source), mode)
        return {leaf: b.map.apply(value, b.source.axes, len(a.axes)) for leaf, value in inner.items()}


def _channels(a: Base) -> int:
    """How many channels a contraction sums over."""
    sizes = [a.operand.axes[i].size for i in a.contracted if a.operand.axes[i].channel]
    return math.prod(sizes)
