r"""Every fixed point of the variance map, stable or not, with the interval of starting points that it attracts.

`fixed_point` answers where a network ends; this answers where else it could. gelu, silu and mish are bistable: a small
stable q and an unbounded branch, divided by an unstable root.
"""

from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import as_activation
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import result
from initjax.meanfield.solve import grid_of
from initjax.meanfield.table import ramp, raw_moments, slope_at_zero, table_of, vanishes_at_zero


@result
class VarianceRoots:
    """The fixed points of q -> sigma_w^2 E[phi^2] + sigma_b^2, smallest first; every field has shape (roots,).

    Attributes
    ----------
    q : fixed points; 0 and inf are listed where the map stays at 0 or diverges.
    chi_q : slope of the variance map there (at inf: the limit of its growth per layer).
    chi_1 : slope of the correlation map at c = 1 there.
    stable : whether nearby q return (|chi_q| < 1; at chi_q = 1 and at the ends, by the sign of the map beside it).
    basin_low, basin_high : the starting points q0 that end here, for an increasing map; both q for a repelling root.
    """

    q: Any
    chi_q: Any
    chi_1: Any
    stable: Any
    basin_low: Any
    basin_high: Any


def variance_roots(phi, sigma_w, sigma_b=0.0) -> VarianceRoots:
    """All fixed points of the variance map with their slopes and basins.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : one standard deviation each, >= 0.

    Returns
    -------
    VarianceRoots.

    Raises
    ------
    InputError : input out of range or not scalar; a scale-invariant network, of which every q is a fixed point.

    Accuracy
    --------
    q 1e-12 relative where chi_q is not within 1e-3 of 1. Roots are searched from 1e-20 to 1e8.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> roots = ij.variance_roots(jax.nn.gelu, 1.48, 0.1)
    >>> for q, chi_q, stable in zip(roots.q, roots.chi_q, roots.stable):
    ...     print(f"q = {q:.4f}  chi_q = {chi_q:.4f}  {'stable' if stable else 'unstable'}")
    q = 0.0233  chi_q = 0.5936  stable
    q = 1.6957  chi_q = 1.0957  unstable
    q = inf  chi_q = 1.0952  stable

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eq. 3; Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), chapter 5.
    """
    act = as_activation(phi)
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    if w.size != 1 or b.size != 1:
        raise InputError(
            f"sigma_w of shape {w.shape} and sigma_b of shape {b.shape}.",
            "one sigma_w and one sigma_b.",
            "the number of fixed points differs from one pair to the next.",
            "loop over the pairs, or ij.fixed_point for the attractor of each.",
        )
    vw, vb = float(w) ** 2, float(b) ** 2
    slopes = ramp(act)
    if slopes is not None and vb == 0 and abs(vw * (slopes[0] ** 2 + slopes[1] ** 2) / 2 - 1) < 1e-14:
        raise InputError(
            f"{act.name} with sigma_w = {float(w):g} and sigma_b = 0.",
            "a variance map with isolated fixed points.",
            "this network is scale-invariant: every q is a fixed point.",
            "ij.fixed_point(phi, sigma_w, q0=...), which keeps q0.",
        )
    table = table_of(act)
    grid = grid_of(table)
    gap = vw * table(np, grid).m + vb - grid
    sign = np.where(np.abs(gap) > 1e-12 * grid, np.sign(gap), 0.0)
    known = np.flatnonzero(sign)
    cross = known[:-1][sign[known[:-1]] * sign[known[1:]] < 0]
    q = [_refine(act, table, vw, vb, grid[i], grid[known[np.searchsorted(known, i) + 1]]) for i in cross]
    dead = vb == 0 and vanishes_at_zero(act)
    first, last = (sign[known[0]], sign[known[-1]]) if known.size else (0.0, 0.0)
    rows = []
    if dead:
        limit = vw * slope_at_zero(act)
        rows.append((0.0, limit, limit, bool(first < 0)))
    if q:
        m, d, e = raw_moments(act, np.array(q))
        before = sign[cross] > 0  # the map lies above the diagonal below an attractor
        rows += [
            (x, vw * ei / x, vw * di, bool(up and abs(vw * ei / x) < 1))
            for x, di, ei, up in zip(q, d, e, before, strict=True)
        ]
    if last > 0:
        end = table(np, np.array([table.q_high]))
        rows.append((np.inf, float(vw * end.m[0] * end.r[0] / table.q_high), float(vw * end.d[0]), True))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    low, high = _basins(columns[0], columns[3])
    q_all, chi_q, chi_1, stable = columns
    return VarianceRoots(q_all, chi_q, chi_1, stable, low, high)


def _refine(act, table, vw, vb, low, high) -> float:
    """Bisection on the table to its last digits, then Newton on direct expectations."""
    x_low, x_high = np.log(low), np.log(high)
    rising = vw * table(np, np.array([high])).m[0] + vb > high
    for _ in range(60):
        middle = (x_low + x_high) / 2
        value = vw * table(np, np.exp(np.array([middle]))).m[0] + vb - np.exp(middle)
        x_low, x_high = (x_low, middle) if (value > 0) == rising else (middle, x_high)
    q = float(np.exp((x_low + x_high) / 2))
    for _ in range(3):
        m, _, e = raw_moments(act, np.array([q]))[:, 0]
        slope = vw * e / q
        move = (vw * m + vb - q) / (1 - slope) if abs(1 - slope) > 1e-6 else 0.0
        q += float(np.clip(move, -1e-3 * q, 1e-3 * q))
    return q


def _basins(q, stable):
    """Between two neighbouring repelling roots, everything goes to the attractor there."""
    low, high = q.copy(), q.copy()
    for i in np.flatnonzero(stable):
        low[i] = q[i - 1] if i else 0.0
        high[i] = q[i + 1] if i + 1 < q.size else np.inf
    return low, high
