r"""Two-dimensional Gaussian expectations E[f(u) g(v)], Var u = q1, Var v = q2, correlation c.

By quadrature: u = sqrt(q1) z and v = sqrt(q2) (c z + s w), s = sqrt(1 - c^2), with nested panels. The inner sum smooths
g over a width s, so the outer panels are cut at the cells of f, at those of g seen through c, and on a ladder of widths
s / c around every kink of g; at |c| = 1 the formula is the one-dimensional one. Carrying s beside c keeps 1 - |c|.

For many correlations at one (q1, q2): a table in theta = arccos c, in which the dual is smooth up to both ends.
"""

import numpy as np

from initjax.errors import QuadratureError
from initjax.gaussian.activation import Activation
from initjax.gaussian.expect import TOLERANCE
from initjax.gaussian.nodes import (
    FAR_REACH,
    LOW_ORDER,
    ORDER,
    REACH,
    legendre,
    legendre_transform,
    panel_nodes,
    unit_edges,
)

_INNER_REACH = 9.5
_LADDER = np.array([-12.0, -9.0, -6.5, -4.5, -3.0, -1.5, 0.0, 1.5, 3.0, 4.5, 6.5, 9.0, 12.0])
_CHUNK = 4_000_000
_TABLE_TAIL = 1e-12


def direct(f: Activation, g: Activation, q1: float, q2: float, c: float, s: float) -> float:
    """E[f(u) g(v)] for one (q1, q2, c), s = sqrt(1 - c^2); refuses when two orders disagree by 1e-9."""
    value, size = _nested(f, g, q1, q2, c, s, ORDER)
    coarse, _ = _nested(f, g, q1, q2, c, s, LOW_ORDER)
    if not np.isfinite(value) or abs(value - coarse) > TOLERANCE * size:
        raise QuadratureError(
            f"E[f(u) g(v)] for f = {f.name}, g = {g.name} at q1 = {q1:.6g}, q2 = {q2:.6g}, c = {c:.9g}: two quadrature "
            f"orders differ by {abs(value - coarse) / max(size, 1e-300):.1e} relative.",
            f"expectations that exist and are resolved to {TOLERANCE:g}.",
            "the functions grow, oscillate or jump faster than the quadrature follows.",
            "use smaller variances, declare kinks with ij.Activation(fn, kinks=...), or a numerically stable form.",
        )
    return value


def _nested(f, g, q1, q2, c, s, order) -> tuple[float, float]:
    sign = 1.0 if c >= 0 else -1.0  # v -> -v makes c >= 0
    c = abs(c)
    root1, root2 = np.sqrt(max(q1, 1e-30)), np.sqrt(max(q2, 1e-30))
    reach = FAR_REACH if (f.grows_fast or g.grows_fast) else REACH
    inner_reach = reach if reach > REACH else _INNER_REACH
    own_f = f.breaks(reach * root1) / root1
    own_g = np.sort(sign * g.breaks((reach + inner_reach) * root2) / root2)
    edges = [unit_edges(reach), own_f]
    if c > 0:
        edges.append(own_g / c)
        if s / c < 0.6 and g.kinks and s > 0:
            kinks = sign * np.asarray(g.kinks) / root2 / c
            edges.append((kinks[:, None] + (s / c) * _LADDER).ravel())
    edges = np.unique(np.concatenate(edges))
    edges = edges[np.abs(edges) <= reach]
    z, weight = panel_nodes(edges[np.concatenate([[True], np.diff(edges) > 1e-15])], order)
    weight = weight * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    outer = f.values(root1 * z) * weight
    keep = np.abs(outer) > 0
    z, outer = z[keep], outer[keep]
    if s == 0:
        inner = g.values(sign * root2 * z)
        return float(outer @ inner), float(np.abs(outer) @ np.abs(inner))
    first = np.searchsorted(own_g, c * z - inner_reach * s)
    count = int(np.max(np.searchsorted(own_g, c * z + inner_reach * s) - first, initial=0))
    unit = unit_edges(inner_reach, 1.5)
    inner, magnitude = np.empty_like(z), np.empty_like(z)
    step = max(1, _CHUNK // ((unit.size + count) * order))
    for start in range(0, z.size, step):
        part = slice(start, start + step)
        near = (
            own_g[np.minimum(first[part, None] + np.arange(count), own_g.size - 1)]
            if count
            else np.zeros((z[part].size, 0))
        )
        near = np.clip((near - c * z[part, None]) / s, -inner_reach, inner_reach)
        w, inner_weight = panel_nodes(
            np.sort(np.concatenate([np.broadcast_to(unit, (near.shape[0], unit.size)), near], axis=1)), order
        )
        inner_weight = inner_weight * np.exp(-w * w / 2) / np.sqrt(2 * np.pi)
        values = g.values(sign * root2 * (c * z[part, None] + s * w))
        inner[part] = np.einsum("zw,zw->z", values, inner_weight)
        magnitude[part] = np.einsum("zw,zw->z", np.abs(values), inner_weight)
    return float(outer @ inner), float(np.abs(outer) @ magnitude)


class Table:
    """E[f(u) g(v)] at one (q1, q2) as a piecewise polynomial in theta = arccos c, on [0, pi]."""

    def __init__(self, f: Activation, g: Activation, q1: float, q2: float):
        cells = [(0.0, np.pi / 4), (np.pi / 4, np.pi / 2), (np.pi / 2, 3 * np.pi / 4), (3 * np.pi / 4, np.pi)]
        degree = 14
        nodes, _ = legendre(degree)
        transform = legendre_transform(degree)
        edges, rows, size = [], [], 0.0
        while cells:
            low, high = cells.pop()
            theta = (low + high) / 2 + (high - low) / 2 * nodes
            values = np.array([direct(f, g, q1, q2, np.cos(t), np.sin(t)) for t in theta])
            size = max(size, float(np.abs(values).max()))
            row = values @ transform
            if np.abs(row[-3:]).max() > _TABLE_TAIL * max(size, 1e-300) and high - low > 1e-7:
                middle = (low + high) / 2
                cells += [(low, middle), (middle, high)]
            else:
                edges.append(low)
                rows.append(row)
        order = np.argsort(edges)
        self.edges = np.append(np.asarray(edges)[order], np.pi)
        self.rows = np.asarray(rows)[order]

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        cell = np.clip(np.searchsorted(self.edges, theta, side="right") - 1, 0, len(self.rows) - 1)
        low, high = self.edges[cell], self.edges[cell + 1]
        x = (2 * theta - low - high) / (high - low)
        return np.polynomial.legendre.legval(x, self.rows[cell].T, tensor=False)
