r"""The four parameters of one activation as piecewise polynomials of the level: a solution costs microseconds.

The level is log(C'(1) - 1) for DKS and log C''(1) for TAT. On each cell of it the equations are solved by damped
Newton at Legendre nodes, all nodes at once; log alpha, beta, log(gamma alpha) and delta are then interpolated, and the
conditions are checked between the nodes. The same table answers inside jit, vmap and grad, in NumPy or jax.numpy.
"""

import dataclasses
import functools

import numpy as np

from initjax.errors import UnattainableTargetError
from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.shaping.branch import Point, first_limit, follow
from initjax.shaping.local import Layer

_DEGREE = 14
_WIDTH, _NARROWEST = 1.0, 2.0**-9
_MET, _ROUNDING = 4e-12, 2e-14  # conditions between the nodes, absolute; gamma * delta is rounded to 1e-16 / alpha


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Solutions of one activation.

    Attributes
    ----------
    layer : the equations.
    edges : (cells + 1,), of the level; targets beyond the last are out of reach.
    rows : (cells, 4, degree), monomial coefficients in [-1, 1] on each cell of log alpha, beta, log(gamma alpha),
        delta.
    ends : why the branch ends there: "top", the level has a maximum, or "steep", alpha leaves the quadrature's range.
    """

    layer: Layer
    edges: np.ndarray
    rows: np.ndarray
    ends: str

    @property
    def bottom(self) -> float:
        return float(self.edges[0])

    @property
    def top(self) -> float:
        return float(self.edges[-1])

    def __call__(self, xp, level):
        """alpha, beta, gamma, delta at the levels, in their dtype; nan where a level is out of reach.

        Below the bottom alpha continues as exp(level / 2), its law in the linear limit.
        """
        dtype = level.dtype
        edges = xp.asarray(self.edges, dtype=dtype)
        clipped = xp.clip(level, edges[0], edges[-1])
        cell = xp.clip(xp.searchsorted(edges, clipped, side="right") - 1, 0, len(self.rows) - 1)
        low, high = edges[cell], edges[cell + 1]
        t = ((2 * clipped - low - high) / (high - low))[..., None]
        row = xp.asarray(self.rows, dtype=dtype)[cell]
        value = row[..., -1]
        for k in range(self.rows.shape[-1] - 2, -1, -1):
            value = value * t + row[..., k]
        log_alpha = value[..., 0] + (level - clipped) / 2
        reached = xp.where(level <= edges[-1], xp.ones_like(level), xp.full_like(level, np.nan))
        alpha = xp.exp(log_alpha) * reached
        return alpha, value[..., 1], xp.exp(value[..., 2] - log_alpha) * reached, value[..., 3]


@functools.lru_cache(maxsize=256)
def table_of(act: Activation, method: str) -> Table:
    """The table of one activation for "dks" or "tat"; a second or two, once."""
    start = first_limit(act, method)
    if start is None:
        raise _no_limit(act, method)
    layer, x = start
    down, _ = follow(layer, x, up=False)
    up, ends = follow(layer, x, up=True)
    curve = down[:0:-1] + up
    low, high = curve[0].level, curve[-1].level
    cells = np.linspace(low, high, max(2, int(np.ceil((high - low) / _WIDTH)) + 1))
    todo = list(zip(cells[:-1], cells[1:], strict=True))
    done: dict[float, tuple[float, np.ndarray]] = {}
    while todo:
        rows, met = _fitted(layer, curve, np.array(todo))
        for cell, row, good in zip(todo, rows, met, strict=True):
            if good:
                done[cell[0]] = (cell[1], row)
        split = [c for c, good in zip(todo, met, strict=True) if not good and c[1] - c[0] > _NARROWEST]
        todo = [half for a, b in split for half in ((a, (a + b) / 2), ((a + b) / 2, b))]
    edges, kept = [low], []
    while edges[-1] in done:  # the sliver at a maximum of the level, where the curve turns, stays out
        right, row = done[edges[-1]]
        edges.append(right)
        kept.append(row)
    return Table(layer, np.array(edges), np.array(kept), ends if edges[-1] == high else "top")


def _fitted(layer: Layer, curve: list[Point], cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Monomial coefficients (cells, 4, degree), and whether the conditions are met between the nodes."""
    nodes, _ = legendre(_DEGREE)
    level = cells[:, :1] + (cells[:, 1:] - cells[:, :1]) * (nodes[None, :] + 1) / 2
    x, shape = newton(layer, level.ravel(), guess(curve, level.ravel()))
    columns = np.stack([x[:, 0], np.sinh(x[:, 1]), np.log(shape.gamma) + x[:, 0], shape.delta])
    columns = columns.reshape(4, *level.shape).transpose(1, 0, 2)
    rows = columns @ legendre_transform(_DEGREE) @ _monomials()
    between = np.array([-0.97, -0.4, 0.1, 0.75, 0.98])
    powers = between[:, None] ** np.arange(_DEGREE)
    found = np.einsum("ckd,pd->cpk", rows, powers)
    wanted = cells[:, :1] + (cells[:, 1:] - cells[:, :1]) * (between[None, :] + 1) / 2
    there = layer.shape(np.stack([found[..., 0].ravel(), np.arcsinh(found[..., 1].ravel())], 1))
    scale = np.exp(np.minimum(wanted.ravel(), 0.0))  # of C'(1) - 1
    miss = np.abs(there.level - wanted.ravel()) * scale + np.abs(there.balance) * scale
    miss += np.abs(np.log(there.gamma) + found[..., 0].ravel() - found[..., 2].ravel())
    miss += np.abs(there.gamma * (there.delta - found[..., 3].ravel()))
    allowed = _MET + _ROUNDING * np.exp(-found[..., 0])
    return rows, np.all(miss.reshape(wanted.shape) < allowed, axis=1)


def guess(curve: list[Point], level: np.ndarray) -> np.ndarray:
    """x at the levels by cubic Hermite interpolation between the points of the curve."""
    levels = np.array([p.level for p in curve])
    at = np.clip(np.searchsorted(levels, level) - 1, 0, len(curve) - 2)
    width = (levels[at + 1] - levels[at])[:, None]
    t = (level[:, None] - levels[at][:, None]) / width
    x, slope = np.stack([p.x for p in curve]), np.stack([p.slope for p in curve]) * 1.0
    left, right = x[at], x[at + 1]
    bend = (1 - t) * (slope[at] * width - (right - left)) + t * ((right - left) - slope[at + 1] * width)
    return left + t * (right - left) + t * (1 - t) * bend


def newton(layer: Layer, level: np.ndarray, x: np.ndarray, q_slope: float = 1.0):
    """Damped Newton for level and balance from x (B, 2): the solutions, and the layer there."""
    for _ in range(25):
        shape, jacobian = layer.at(x, q_slope)
        error = np.stack([shape.level - level, shape.balance], 1)
        step = -np.linalg.solve(jacobian, error[..., None])[..., 0]
        size = np.max(np.abs(step), axis=1, keepdims=True)
        x = x + step * np.minimum(1.0, 0.3 / np.maximum(size, 1e-300))
        if np.all(size < 1e-8 + 1e-14 * np.exp(-2 * x[:, :1])):
            break
    return x, layer.shape(x, q_slope)


@functools.cache
def _monomials() -> np.ndarray:
    """Legendre coefficients @ this = monomial coefficients."""
    rows = [np.polynomial.legendre.leg2poly(np.eye(_DEGREE)[k]) for k in range(_DEGREE)]
    return np.stack([np.pad(r, (0, _DEGREE - len(r))) for r in rows])


def _no_limit(act: Activation, method: str) -> UnattainableTargetError:
    return UnattainableTargetError(
        f"phi = {act.name} with method {method!r}: no alpha, beta, gamma, delta near the linear limit satisfy the "
        "conditions.",
        "activations that bend both ways: 2 phi' phi''' + phi''^2 changes sign, or a kink whose slope falls.",
        "the bound Q'(1) = 1: the cubic part of the shaped activation must balance its quadratic part, and for exp, "
        "x^2 and hard_tanh it does only in a linear layer.",
        "use a relative that bends both ways (softplus, gelu, tanh), or jax.nn.leaky_relu, whose slope is solved for.",
    )
