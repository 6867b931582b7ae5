"""Random numbers that a model draws as it runs: dropout masks and added noise.

A draw is i.i.d. over all its entries, independent of the weights, and every example has its own. A mask takes two
values, so whatever is a nonlinear function of it and of other fields is a sum over the two: with m in {0, 1},
f(x, m) = f(x, 0) + m (f(x, 1) - f(x, 0)). Products with a mask are products of independent factors.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from initjax.trace.domain import Const, Field, Lin, Noise, Product, Sum
from initjax.trace.graph import bases_of
from initjax.trace.jaxpr import float64
from initjax.trace.maps import Axis
from initjax.trace.pointwise import evaluate


@dataclasses.dataclass(frozen=True, eq=False)
class Random:
    """Entries i.i.d. `of(u)`, u uniform on (0, 1); `known` is what this key happens to give. `of` is None for bits."""

    of: Callable[[np.ndarray], np.ndarray] | None
    key: bytes
    known: Const
    own: tuple[bool, ...]  # along which axes entries differ; False where they are repeated

    @property
    def shape(self) -> tuple[int, ...]:
        return self.known.shape


def drawn(walk, operands: list) -> Any:
    """The current equation on draws and known arrays: a draw again, or None where it is something else."""
    equation = walk.equation
    name, given = equation.name, _known(walk, operands)
    if name == "random_bits":
        with float64():  # the key is known, also while the user's function is traced
            data = np.asarray(jax.random.key_data(operands[0].value))
        if walk.shapes_drawn.setdefault(data.tobytes(), given.shape) != given.shape:
            raise walk.refuse(
                "",
                f"one random key draws arrays of shape {walk.shapes_drawn[data.tobytes()]} and {given.shape}: they may "
                "share numbers, so they are neither independent nor the same",
                "split the key, so that every draw has its own",
                what="a second draw with one key",
            )
        return Random(None, data.tobytes(), given, (True,) * len(given.shape))
    draws = [v for v in operands if isinstance(v, Random)]
    first, shape = draws[0], given.shape
    if any(d.key != first.key or d.own != first.own for d in draws):
        return None

    def same(of, own=first.own):
        return Random(of, first.key, given, own)

    if first.of is None and name in ("shift_right_logical", "or"):
        return same(None)
    if name == "bitcast_convert_type":
        return same(lambda u: 1.0 + u) if first.of is None else None
    if first.of is None:
        return None
    if name in ("copy", "copy_p", "stop_gradient", "convert_element_type"):
        return same(first.of)
    if name == "broadcast_in_dim":
        own = [False] * len(shape)
        for axis, target in enumerate(equation.params["broadcast_dimensions"]):
            own[target] = first.own[axis] and first.shape[axis] == shape[target]
        return same(first.of, tuple(o or n == 1 for o, n in zip(own, shape, strict=True)))
    if name in ("reshape", "squeeze", "expand_dims"):
        return same(first.of, (True,) * len(shape)) if all(first.own) else None
    scalars = [v.scalar if isinstance(v, Const) else 0.0 for v in operands]
    if not walk.is_pointwise() or any(s is None for s in scalars):
        return None
    pairs = zip(operands, scalars, strict=True)
    parts: list[Any] = [
        v.of if isinstance(v, Random) else s if np.asarray(s).dtype == bool else float(s) for v, s in pairs
    ]

    def of(u):
        arrays: list[Any] = [p(u) if callable(p) else np.full(u.shape, p) for p in parts]
        return evaluate(equation, arrays)

    return same(of)


def known(value) -> Any:
    """The array that a key gave, where its distribution cannot be followed."""
    return value.known if isinstance(value, Random) else value


def _known(walk, operands: list) -> Const:
    from initjax.trace.align import const_rule

    return const_rule(walk, [known(v) for v in operands])[0]


# ------------------------------------------------------------------ moments of one entry


def moments(draw: Random) -> tuple[float, float, tuple[float, float] | None]:
    """Mean, second moment, and the two values of a draw that takes only two."""
    of = draw.of
    assert of is not None
    u = (np.arange(4096) + 0.5) / 4096
    values = of(u).astype(np.float64)
    levels = np.unique(values)
    if len(levels) <= 2:
        low, high = float(levels[0]), float(levels[-1])
        chance = _chance(lambda u: of(u).astype(np.float64) == high, values == high, u)
        mean, second = low + (high - low) * chance, low**2 + (high**2 - low**2) * chance
        return mean, second, (low, high) if len(levels) == 2 else None
    z, w = _normal_nodes()
    uniform = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    values = of(np.clip(uniform, 0.0, 1 - 2.0**-52)).astype(np.float64)  # as JAX's own uniforms end
    mean = float(w @ values)
    second = float(w @ values**2)
    return (0.0 if abs(mean) < 1e-12 * math.sqrt(second) else mean), second, None


def _chance(holds, at, u) -> float:
    """The length of {u : holds(u)}, its ends found by bisection."""
    total, start = 0.0, 0.0 if at[0] else None
    for i in np.flatnonzero(at[1:] != at[:-1]):
        low, high = u[i], u[i + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(np.array([middle]))[0] == at[i] else (low, middle)
        if start is None:
            start = high
        else:
            total, start = total + high - start, None
    return total + (1.0 - start if start is not None else 0.0)


@functools.cache
def _normal_nodes():
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(-8.2, 8.2, 165)
    half = np.diff(edges)[:, None] / 2
    z = ((edges[:-1, None] + edges[1:, None]) / 2 + half * nodes).ravel()
    w = (half * weights).ravel() * np.exp(-(z**2) / 2)
    return z, w / w.sum()


# ------------------------------------------------------------------ draws as fields


def as_noise(walk, draw: Random, like: Field) -> Field | None:
    """A draw along the axes of `like`; None where one number serves several channels, or several examples."""
    if draw.of is None or len(draw.shape) not in (0, len(like.groups)):
        return None
    axes, at, own = like.body.axes, 0, draw.own
    for i, count in enumerate(like.groups):
        group, at = axes[at : at + count], at + count
        if not own[i] and (i == 0 or any(a.channel and a.size > 1 for a in group)):
            return None
    base: list[Axis] = []
    at = 0
    for i, count in enumerate(like.groups):
        base += axes[at : at + count] if own[i] else [Axis(1, a.channel) for a in axes[at : at + count]]
        at += count
    mean, second, values = moments(draw)
    arena = walk.arena
    atom = arena.atom(
        Noise, (draw.key, tuple(base), mean, second), tuple(base), (draw.key, arena), mean, second, values
    )
    field = Field(arena.sum(tuple(base), [(atom, 1.0)]), like.groups, like.near)
    if tuple(base) != axes:
        from initjax.trace.maps import Relayout

        field = Field(arena.relayout(field.body, Relayout("broadcast", axes)), like.groups, like.near)
    return field


def noise_of(atom) -> Noise | None:
    """The draw an atom shows, directly or through maps that only move entries."""
    while isinstance(atom, Lin) and atom.map.commutes and isinstance(atom.source, Sum) and len(atom.source.terms) == 1:
        atom = atom.source.terms[0][0]
    return atom if isinstance(atom, Noise) else None


def mask_in(sums: list[Sum]) -> Any:
    """An atom that is a two-valued draw, among the terms or the factors of products."""
    for body in sums:
        for atom, _ in body.terms:
            found = _mask(atom)
            if found is not None:
                return found
    return None


def _mask(atom) -> Any:
    noise = noise_of(atom)
    if noise is not None:
        return atom if noise.values is not None else None
    if isinstance(atom, Product):
        return mask_in([atom.left, atom.right])
    return None


def only_draws(body: Sum) -> bool:
    """Whether a body is made of draws alone, independent of every weight."""
    return all(isinstance(b, Noise) for b in bases_of(body))


def depends_on(body: Sum, mask) -> bool:
    """Whether a body is a function of the draw that a mask shows."""
    noise = noise_of(mask)
    return noise is not None and any(isinstance(b, Noise) and b.key == noise.key for b in bases_of(body))


def given(walk, body: Sum, mask, value: float) -> Sum | None:
    """The body where a mask has one of its values; None if the mask hides behind a map."""
    total, terms = walk.arena.sum(body.axes, (), body.constant), []
    extra: list[Sum] = []
    for atom, c in body.terms:
        if atom is mask:
            extra.append(walk.arena.scaled(walk.arena.sum(body.axes, (), value), c))
        elif isinstance(atom, Product) and any(mask is _mask(a) for s in (atom.left, atom.right) for a, _ in s.terms):
            sides = [given(walk, side, mask, value) for side in (atom.left, atom.right)]
            if sides[0] is None or sides[1] is None:
                return None
            from initjax.trace.rules import product

            extra.append(walk.arena.scaled(product(walk, sides[0], sides[1], ""), c))
        elif depends_on(Sum(atom.axes, ((atom, 1.0),)), mask):
            return None
        else:
            terms.append((atom, c))
    bodies = [walk.arena.sum(body.axes, terms, total.constant), *extra]
    constant = bodies[0].constant
    for other in bodies[1:]:
        constant = constant + other.constant
    return walk.arena.fused(walk.arena.sum(body.axes, [t for b in bodies for t in b.terms], constant))
