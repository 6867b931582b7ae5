r"""The branch of solutions that begins at the linear limit, followed by arclength.

For alpha -> 0 a layer becomes linear, and Q'(1) = 1 leaves isolated beta: roots of 2 phi' phi''' + phi''^2 for DKS
(tanh: +-artanh(1/2)), and for a kinked phi points from which the kink withdraws into the tail of the Gaussian. From
there the curve balance(log alpha, beta) = 0 is followed until its level (how nonlinear the layer is) stops growing.
Every target below that top has one solution on the curve; solvers that start anywhere find other roots for other
targets.
"""

from typing import Any, NamedTuple

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.shaping.local import REACH, Layer

_START = 0.03  # alpha, in units of phi's own argument, at which the limits are looked for
_LOWEST = 1e-3  # alpha where the curve begins; below, the third moment of r drowns in rounding
_WIDEST = 8.0  # |beta| of the limits looked for
_STEPS, _LONGEST, _SHORTEST = 400, 0.4, 1e-6


class Point(NamedTuple):
    """A point of the curve: x = (log alpha, arsinh beta), its level, and dx/dlevel."""

    x: np.ndarray
    level: float
    slope: np.ndarray


def limits(layer: Layer) -> list[np.ndarray]:
    """Starting points at alpha = 0.03 on the branches that end in the linear limit; the least shifts first."""
    start = np.log(_START)
    beta = np.linspace(-_WIDEST, _WIDEST, 801)
    for kink in layer.act.kinks:
        beta = np.concatenate([beta, kink - _START * np.linspace(-7, 7, 141)])
    beta = np.unique(beta)
    shape = layer.shape(np.stack([np.full_like(beta, start), np.arcsinh(beta)], 1))
    b, level = shape.balance, shape.level
    with np.errstate(invalid="ignore"):
        crosses = (np.sign(b[1:]) != np.sign(b[:-1])) & np.isfinite(level[1:] + level[:-1])
    found: list[np.ndarray] = []
    for i in np.nonzero(crosses)[0]:
        guess = np.array([start, np.arcsinh((beta[i] * b[i + 1] - beta[i + 1] * b[i]) / (b[i + 1] - b[i]))])
        x = _settled(layer, guess, np.arcsinh(beta[i]), np.arcsinh(beta[i + 1]))
        if x is not None and not any(abs(x[1] - y[1]) < 1e-7 for y in found) and _vanishes(layer, x):
            found.append(x)
    height = np.abs(layer.act.values(np.sinh([x[1] for x in found]))) if found else []
    shift = [(round(abs(float(x[1])), 6), round(float(h), 6), -float(x[1])) for x, h in zip(found, height, strict=True)]
    return [found[i] for i in sorted(range(len(found)), key=shift.__getitem__)]


def _settled(layer: Layer, x: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """Newton in beta at fixed alpha, kept in its bracket."""
    for _ in range(30):
        shape, jacobian = layer.at(x[None])
        step = -shape.balance[0] / jacobian[0, 1, 1]
        if not np.isfinite(step):
            return None
        new = x[1] + step
        if not low <= new <= high:
            new = (low + x[1]) / 2 if step < 0 else (high + x[1]) / 2
        step, x = new - x[1], np.array([x[0], new])
        if abs(step) < 1e-11:
            return x if abs(shape.balance[0]) < 1e-6 else None
    return None


def _vanishes(layer: Layer, x: np.ndarray) -> bool:
    """Whether the layer becomes linear along the curve as alpha falls: its level then falls like log alpha^2."""
    points, _ = follow(layer, x, up=False, lowest=_START / 2)
    return len(points) > 1 and points[-1].x[0] < x[0] - 0.2 and points[-1].level < points[0].level - 0.25


def follow(layer: Layer, x: np.ndarray, up: bool, lowest: float = _LOWEST) -> tuple[list[Point], str]:
    """Points along the curve from x, upwards or downwards in level, and why they end.

    "top": the level has a maximum; "steep": alpha leaves the range of the quadrature; "bottom": alpha is below
    `lowest`.
    """
    side = 1.0 if up else -1.0
    highest = np.log(layer.breaks[1] / REACH / 2)
    points: list[Point] = []
    tangent, step = np.array([side, 0.0]), 0.1
    at: Any = (x, *layer.at(x[None]))
    while len(points) < _STEPS:
        x, shape, jacobian = at
        direction = _direction(jacobian[0])
        tangent = direction if direction @ tangent >= 0 else -direction
        rise = jacobian[0, 0] @ tangent
        if not rise * side > 1e-6:
            return points, "top"
        points.append(Point(x, float(shape.level[0]), tangent / rise))
        if up and x[0] > highest:
            return points, "steep"
        if not up and x[0] < np.log(lowest):
            return points, "bottom"
        at = None
        while at is None and step > _SHORTEST:
            at = _corrected(layer, x + step * tangent, tangent)
            if at is not None and abs(tangent @ _direction(at[2][0])) < 0.995:
                at = None
            step *= 1.5 if at is not None else 0.5
        if at is None:
            return points, "top"
        step = min(step, _LONGEST)
    return points, "steep"


def _direction(jacobian: np.ndarray) -> np.ndarray:
    """Unit vector along the curve balance = 0."""
    d = jacobian[1]
    return np.array([-d[1], d[0]]) / np.hypot(*d)


def _corrected(layer: Layer, start: np.ndarray, tangent: np.ndarray):
    """Newton back to the curve, in the plane across the tangent."""
    x = start
    for _ in range(6):
        shape, jacobian = layer.at(x[None])
        system = np.stack([jacobian[0, 1], tangent])
        if not np.all(np.isfinite(system)) or abs(np.linalg.det(system)) < 1e-14:
            return None
        step = -np.linalg.solve(system, np.array([shape.balance[0], tangent @ (x - start)]))
        if np.hypot(*step) > 0.5:
            return None
        x = x + step
        if np.hypot(*step) < 1e-7:  # the next error is its square
            return x, *layer.at(x[None])
    return None


def first_limit(act: Activation, method: str) -> tuple[Layer, np.ndarray] | None:
    """The layer's equations and the starting point of the branch with the least shift |beta|; beta > 0 in a tie."""
    layers = [Layer(act, 0)] if method == "dks" else [Layer(act, 1), Layer(act, -1)]
    starts = [(layer, x) for layer in layers for x in limits(layer)[:1]]
    if not starts:
        return None
    return min(starts, key=lambda s: (round(abs(float(s[1][1])), 6), -float(s[1][1]) if method == "tat" else 0.0))
