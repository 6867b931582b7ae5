r"""The values a model's program computes, at infinite width.

`Const`       a known array.
`WeightView`  entries of a weight leaf (views.py).
`Field`       random numbers, i.i.d. along its channel axes: a `Sum` (linear combination of atoms plus a constant) or a
              `Tangent` (sum of coefficient times tangent atom), together with the program's own grouping of axes.
`Cat`         fields of different origin side by side along a channel axis (concat.py).

Atoms: `Base`, a Gaussian made by weights (W x, or a bias); `Ew`, a function of one Gaussian leaf; `Lin`, a linear map
over positions. Every axis is a channel axis (numbers there are i.i.d.) or a position. Numerical arrays keep size 1
along channel axes.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from initjax.trace.expr import VARIABLE, Expr, added, literal, scaled
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import Axes, Axis, Box, Relayout, Window, extents, xp_of
from initjax.trace.views import WeightView


@dataclasses.dataclass(frozen=True, eq=False)
class Const:
    """A known array; `value` has the rank of `shape`, with size 1 along axes where it does not vary.

    `leaf` names the constant weight leaf it came from, if any.
    """

    value: Any
    shape: tuple[int, ...]
    leaf: str = ""

    @property
    def scalar(self) -> Any:
        """The one number (or boolean) the array is full of, else None."""
        if is_traced(self.value) or self.value.size == 0:
            return None
        first = self.value.flat[0]
        return first if self.value.size == 1 or bool((self.value == first).all()) else None


class Atom:
    """A random field that is not further decomposed. `number` orders atoms by creation."""

    number: int
    axes: Axes
    gaussian: bool
    tangent: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Base(Atom):
    """A Gaussian made by weights.

    kind "dot": sum over `contracted` axes of `operand` (a Sum or Tangent) times weights; the operand's remaining axes
    come in order, the weights' free axes are channels. kind "vector": the weights themselves, one entry an index.
    """

    number: int
    axes: Axes
    kind: Literal["dot", "vector"]
    view: WeightView
    operand: Any
    contracted: tuple[int, ...]
    layer: str
    gaussian: bool = True
    tangent: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """For "dot": the axes of the operand that are kept, in order."""
        return tuple(a for a in range(len(self.operand.axes)) if a not in self.contracted)


Windows = tuple[tuple[int, tuple[Window, ...]], ...]  # for each convolved axis its windows, in order


@dataclasses.dataclass(frozen=True, eq=False)
class Taps(Atom):
    """The sum of the Gaussians that the taps of one convolution make; joined from `bases` after the walk.

    rows : the windows that make each base's operand out of `source`; None where the operands are known arrays.
    windows : the same as lists along the axes, of which the rows are all combinations.
    """

    number: int
    axes: Axes
    bases: tuple[Base, ...]
    source: Any
    rows: tuple[tuple[Window, ...], ...]
    windows: Windows
    tangent: bool = False
    gaussian: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Ew(Atom):
    """`expr` applied entry by entry to a Gaussian leaf."""

    number: int
    axes: Axes
    leaf: "Sum"
    expr: Expr
    gaussian: bool = False
    tangent: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Lin(Atom):
    """A linear map over the positions of a Sum or Tangent."""

    number: int
    axes: Axes
    map: Relayout
    source: Any
    gaussian: bool
    tangent: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Product(Atom):
    """The product of two primal fields that are not functions of one Gaussian."""

    number: int
    axes: Axes
    left: "Sum"
    right: "Sum"
    gaussian: bool = False
    tangent: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Noise(Atom):
    """Numbers that the model draws as it runs, i.i.d. over all entries; `values` if they are only two."""

    number: int
    axes: Axes
    key: tuple
    mean: float
    second: float
    values: tuple[float, float] | None
    gaussian: bool = False
    tangent: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """sum_i coefficient_i * atom_i + constant.

    Coefficients and constant are Python floats, or arrays of the field's rank that do not vary along channels.
    """

    axes: Axes
    terms: tuple[tuple[Atom, Any], ...]
    constant: Any = 0.0

    @property
    def gaussian(self) -> bool:
        """Whether it is a linear combination of Gaussians (plus a constant)."""
        return all(atom.gaussian for atom, _ in self.terms)

    @property
    def is_constant(self) -> bool:
        return not self.terms


@dataclasses.dataclass(frozen=True, eq=False)
class Tangent:
    """sum_j coefficient_j * gdot_j: coefficients primal (None: 1), gdot_j sums of tangent atoms with mean zero."""

    axes: Axes
    parts: tuple[tuple[Sum | None, Sum], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """A Sum or Tangent as the program sees it: `groups[i]` of its axes make up the program's axis i.

    `near` is the last layer it went through, for messages.
    """

    body: Any  # Sum or Tangent
    groups: tuple[int, ...]
    near: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        shape, at = [], 0
        for count in self.groups:
            shape.append(math.prod(axis.size for axis in self.body.axes[at : at + count]))
            at += count
        return tuple(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Cat:
    """Parts side by side along a channel axis, each with channels of its own distribution.

    All parts have one shape but for `axis`; `groups[i]` of their axes make up the program's axis i.
    """

    parts: tuple[Any, ...]  # Field, Const, WeightView or Cat
    axis: int
    groups: tuple[int, ...]
    near: str = ""

    @property
    def fine(self) -> tuple[int, ...]:
        """The shape of the whole on the axes of the parts."""
        width = sum(part.shape[self.axis] for part in self.parts)
        return tuple(width if i == self.axis else n for i, n in enumerate(self.parts[0].shape))

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = iter(self.fine)
        return tuple(math.prod(next(sizes) for _ in range(count)) for count in self.groups)


def compact(array: np.ndarray) -> np.ndarray:
    """The array with size 1 along every axis where it does not vary."""
    for axis, size in enumerate(array.shape):
        first = array[(slice(None),) * axis + (slice(0, 1),)]
        if size > 1 and (array == first).all():
            array = first
    return array


def is_zero(coefficient) -> bool:
    """Whether a coefficient or constant is a known zero."""
    if is_traced(coefficient):
        return False
    return not np.any(coefficient)


class Arena:
    """Makes atoms and sums; equal ones with plain coefficients are one object, so that moments are computed once."""

    def __init__(self):
        self._atoms: dict[tuple, Atom] = {}
        self._sums: dict[tuple, Sum] = {}
        self._boxes: dict[tuple, Box] = {}
        self._count = 0

    def atom(self, kind, key: tuple, *fields, **named) -> Any:
        """The atom with this identity; `key` must hold only hashables and ids of objects kept alive by the atom."""
        key = (kind, *key)
        if key not in self._atoms:
            self._count += 1
            self._atoms[key] = kind(self._count, *fields, **named)
        return self._atoms[key]

    def sum(self, axes: Axes, terms, constant: Any = 0.0) -> Sum:
        """Collect terms: equal atoms are added, zeros dropped, the order is that of creation."""
        collected: dict[int, list] = {}
        for atom, coefficient in terms:
            if atom.number in collected:
                collected[atom.number][1] = collected[atom.number][1] + coefficient
            else:
                collected[atom.number] = [atom, coefficient]
        kept = tuple((atom, c) for _, (atom, c) in sorted(collected.items()) if not is_zero(c))
        if is_zero(constant):
            constant = 0.0
        if all(isinstance(c, float) for c in (constant, *(c for _, c in kept))):
            key = (axes, tuple((atom.number, c) for atom, c in kept), constant)
            return self._sums.setdefault(key, Sum(axes, kept, constant))
        return Sum(axes, kept, constant)

    # ------------------------------------------------------------------ functions of one Gaussian

    def leaf_of(self, gaussian: Sum) -> tuple[Sum, float]:
        """The canonical leaf (first coefficient 1, no constant) of which a Gaussian sum is a multiple."""
        first = gaussian.terms[0][1] if gaussian.terms else 1.0
        if isinstance(first, float) and first != 1.0:
            terms = [(atom, 1.0 if c is first else c / first) for atom, c in gaussian.terms]
            return self.sum(gaussian.axes, terms), first
        return self.sum(gaussian.axes, gaussian.terms), 1.0

    def common_leaf(self, sums: list[Sum]) -> Sum | None:
        """The one Gaussian leaf of which all the sums are functions, if there is one."""
        leaf = next((atom.leaf for s in sums for atom, _ in s.terms if isinstance(atom, Ew)), None)
        if leaf is None:
            leaf = next((self.leaf_of(s)[0] for s in sums if s.terms and s.gaussian), None)
        if leaf is None or any(self.as_expr(s, leaf) is None for s in sums):
            return None
        return leaf

    def as_expr(self, s: Sum, leaf: Sum) -> Expr | None:
        """The sum as an expression in the leaf, or None where it is not one."""
        if not isinstance(s.constant, float):
            return None
        gaussian = [(atom, c) for atom, c in s.terms if atom.gaussian]
        total = literal(s.constant) if s.constant != 0.0 else None
        pieces = []
        if gaussian:
            ratio = _ratio(gaussian, leaf.terms)
            if ratio is None:
                return None
            pieces.append(scaled(ratio, VARIABLE))
        for atom, c in s.terms:
            if atom.gaussian:
                continue
            if not isinstance(atom, Ew) or atom.leaf is not leaf or not isinstance(c, float):
                return None
            pieces.append(scaled(c, atom.expr))
        if total is not None:
            pieces.append(total)
        if not pieces:
            return literal(0.0)
        result = pieces[0]
        for piece in pieces[1:]:
            result = added(result, piece)
        return result

    def function(self, leaf: Sum, expr: Expr) -> Sum:
        """`expr` of the leaf as a sum; constants and multiples of the leaf itself are recognised."""
        if expr.op == "literal" and expr.dtype is None:
            return self.sum(leaf.axes, (), expr.value)
        if expr is VARIABLE:
            return leaf
        atom = self.atom(Ew, (id(leaf), id(expr)), leaf.axes, leaf, expr)
        return self.sum(leaf.axes, [(atom, 1.0)])

    def fused(self, s: Sum) -> Sum:
        """A sum of several functions of one leaf as one function."""
        if s.gaussian or len(s.terms) + (not isinstance(s.constant, float) or s.constant != 0.0) == 1:
            return s
        leaf = self.common_leaf([s])
        if leaf is None:
            return s
        expr = self.as_expr(s, leaf)
        return s if expr is None else self.function(leaf, expr)

    # ------------------------------------------------------------------ linear maps over positions

    def _box(self, array) -> Box:
        """Equal known arrays are one object, so that a field scaled twice alike is one field."""
        if is_traced(array):
            return self._boxes.setdefault(("traced", id(array)), Box(array))
        array = compact(np.asarray(array))
        return self._boxes.setdefault((np.shape(array), np.asarray(array).tobytes()), Box(array))

    def unscaled(self, g: Sum) -> tuple[Sum, Any]:
        """(h, factor) with g = factor * h, where a factor that varies over positions stands in front; else (g, 1.0)."""
        atom, c = g.terms[0] if len(g.terms) == 1 and is_zero(g.constant) else (None, 1.0)
        if not isinstance(atom, Lin) or atom.map.kind != "scale" or not isinstance(atom.source, Sum):
            return g, 1.0
        return self.scaled(atom.source, c), atom.map.parameters[0].value

    def scaled(self, body: Sum, factor) -> Sum:
        """factor * body; a factor that varies over positions makes a new atom, so that coefficients stay numbers."""
        if isinstance(factor, float) or not body.terms:
            terms = [(atom, c * factor) for atom, c in body.terms]
            return self.sum(body.axes, terms, body.constant * factor)
        random = self.sum(body.axes, body.terms)
        step = Relayout("scale", (self._box(factor),))
        tangent = any(atom.tangent for atom, _ in body.terms)
        atom = self._lin(step, random, body.axes, body.gaussian, tangent)
        return self.sum(body.axes, [(atom, 1.0)], body.constant * factor)

    def relayout(self, body: Sum | Tangent, step: Relayout) -> Any:
        """Apply a linear map over positions to a Sum or Tangent."""
        axes = step.axes(body.axes)
        if axes == body.axes and step.kind in ("reshape", "broadcast"):
            return body
        if isinstance(body, Tangent):
            if step.commutes:
                moved = [(None if c is None else self.relayout(c, step), self.relayout(g, step)) for c, g in body.parts]
                return Tangent(axes, tuple(moved))
            if any(c is not None for c, _ in body.parts):
                atom = self.atom(Lin, (id(body), step), axes, step, body, False, True)
                return Tangent(axes, ((None, self.sum(axes, [(atom, 1.0)])),))
            return Tangent(axes, tuple((None, self._mapped(g, step)) for _, g in body.parts))
        if not step.commutes:
            return self._mapped(body, step)
        terms = []
        for atom, c in body.terms:
            moved = self._moved(atom, step)
            terms.append((moved, c if isinstance(c, float) else self._moved_array(c, body.axes, step)))
        constant = body.constant
        if not isinstance(constant, float):
            constant = self._moved_array(constant, body.axes, step)
        return self.sum(axes, terms, constant)

    def rechannelled(self, body, axes: Axes) -> Any:
        """A field of weights alone, whose features stood as positions, with channels as in `axes`; else None."""
        axes = tuple(Axis(a.size, b.channel and a.size == b.size) for a, b in zip(body.axes, axes, strict=True))
        if isinstance(body, Tangent):
            parts = [(c, self.rechannelled(g, axes)) for c, g in body.parts]
            if any(c is not None or g is None for c, g in parts):
                return None
            return Tangent(axes, tuple(parts))
        if not is_zero(body.constant):
            return None
        terms = [(self._rechannelled_atom(atom, axes), c) for atom, c in body.terms]
        if any(atom is None or not isinstance(c, float) for atom, c in terms):
            return None
        return self.sum(axes, terms)

    def _rechannelled_atom(self, atom: Atom, axes: Axes) -> Atom | None:
        if isinstance(atom, Base) and atom.kind == "vector":
            key = ("vector", atom.view, axes)
            fields = (atom.kind, atom.view, None, (), atom.layer, atom.gaussian, atom.tangent)
            return self.atom(Base, key, axes, *fields)
        if not isinstance(atom, Lin) or atom.map.kind not in ("scale", "broadcast") or isinstance(atom.source, Tangent):
            return None
        source = self.rechannelled(atom.source, axes)
        if source is None:
            return None
        step = atom.map
        if step.kind == "broadcast":
            step = Relayout("broadcast", axes)
        else:
            factor = step.parameters[0].value
            for axis, a in enumerate(axes):
                if a.channel and np.shape(factor)[axis] > 1:
                    first = factor[(slice(None),) * axis + (slice(0, 1),)]
                    if is_traced(factor) or not bool((factor == first).all()):
                        return None
                    factor = first
            step = Relayout("scale", (self._box(factor),))
        return self._lin(step, source, step.axes(source.axes), atom.gaussian, atom.tangent)

    def _moved_array(self, array, axes: Axes, step: Relayout):
        full = xp_of(array).broadcast_to(array, extents(axes))
        return step.apply(full, axes)

    def _moved(self, atom: Atom, step: Relayout) -> Atom:
        axes = step.axes(atom.axes)
        if isinstance(atom, Ew):
            leaf = self.relayout(atom.leaf, step)
            return self.atom(Ew, (id(leaf), id(atom.expr)), axes, leaf, atom.expr)
        if isinstance(atom, Product):
            left, right = self.relayout(atom.left, step), self.relayout(atom.right, step)
            return self.atom(Product, (id(left), id(right)), axes, left, right)
        if isinstance(atom, Lin) and atom.map.kind == "scale" and isinstance(atom.source, Sum):
            # known factors stay outermost, where `unscaled` finds them
            factor = self._moved_factor(atom.map.parameters[0].value, atom.axes, step)
            source = self.relayout(atom.source, step)
            return self._lin(Relayout("scale", (self._box(factor),)), source, axes, atom.gaussian, atom.tangent)
        return self._lin(step, self.sum(atom.axes, [(atom, 1.0)]), axes, atom.gaussian, atom.tangent)

    def _moved_factor(self, array, axes: Axes, step: Relayout):
        """A factor after a map that commutes, with size 1 kept where it does not vary."""
        if step.kind == "transpose":
            return array.transpose(step.parameters)
        if step.kind == "broadcast" and len(step.parameters) == len(axes):
            return array
        if step.kind == "index":
            cuts = zip(np.shape(array), step.parameters, strict=True)
            return array[tuple(slice(*cut) if n > 1 else slice(None) for n, cut in cuts)]
        if math.prod(np.shape(array)) == 1:
            return array.reshape((1,) * len(step.axes(axes)))
        return self._moved_array(array, axes, step)

    def _mapped(self, body: Sum, step: Relayout) -> Sum:
        """A map that does not commute with functions: one atom for the random part."""
        axes = step.axes(body.axes)
        constant = body.constant
        if not is_zero(constant):
            full = np.full((1,) * len(body.axes), constant) if isinstance(constant, float) else constant
            constant = self._moved_array(full, body.axes, step)
        if not body.terms:
            return self.sum(axes, (), constant)
        random = self.sum(body.axes, body.terms)
        tangent = any(atom.tangent for atom, _ in body.terms)
        return self.sum(axes, [(self._lin(step, random, axes, body.gaussian, tangent), 1.0)], constant)

    def _lin(self, step: Relayout, source, axes: Axes, gaussian: bool, tangent: bool) -> Lin:
        return self.atom(Lin, (id(source), step), axes, step, source, gaussian, tangent)


def _ratio(terms, reference) -> float | None:
    """The factor between two Gaussian sums over the same atoms, or None."""
    if len(terms) != len(reference) or any(a is not b for (a, _), (b, _) in zip(terms, reference, strict=True)):
        return None
    ratio = None
    for (_, c), (_, r) in zip(terms, reference, strict=True):
        if c is r:
            this = 1.0
        elif isinstance(c, float) and isinstance(r, float):
            this = c / r
        else:
            return None
        if ratio is None:
            ratio = this
        elif abs(this - ratio) > 1e-14 * abs(ratio):
            return None
    return ratio
