r"""The critical line as a curve: sigma_b(q)^2 = f(q) = q - M(q) / D(q).

Near q = 0, f is a difference of nearly equal numbers; there q D - M = sum_k (k - 1) a_k^2 in Hermite coefficients keeps
its digits.
"""

import functools
from typing import NamedTuple

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.series import coefficients
from initjax.meanfield.table import raw_moments, slope_at_zero, table_of

SMOOTH_BELOW = 0.02  # q under which the Hermite form of f is tried


class Line(NamedTuple):
    """f(q) on a grid of q, with the part of it that is rounding."""

    q: np.ndarray
    f: np.ndarray
    noise: np.ndarray


def bias_variance(act: Activation, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f(q) = q - M/D and an estimate of its rounding error, from direct expectations (not the table)."""
    m, d, _ = raw_moments(act, q)
    safe = np.maximum(d, 1e-300)
    f, noise = q - m / safe, 4e-16 * (q + m / safe)
    if not act.kinks:
        for i in np.flatnonzero((q < SMOOTH_BELOW) & (np.abs(f) < 1e-3 * q)):
            a, _ = coefficients(act, float(q[i]), 32)
            terms = (np.arange(32) - 1.0) * a * a
            if np.abs(terms[-4:]).max() < 1e-20 * q[i]:
                f[i] = terms.sum() / safe[i]
                # a_k carries an absolute error of eps sqrt(q)
                noise[i] = (
                    2e-16 * np.sqrt(q[i]) * np.abs((np.arange(32) - 1.0) * a)[[0, 2, 3]].max() / safe[i] + 1e-31 * q[i]
                )
    return f, noise


@functools.lru_cache(maxsize=256)
def critical_line(act: Activation) -> Line:
    """The curve sigma_b^2 = f(q), finely sampled from q = 1e-16 to the end of the table."""
    table = table_of(act)
    q = np.exp(np.arange(np.log(max(1e-16, table.q_low)), np.log(table.q_high), 0.0625))
    t = table(np, q)
    f, noise = q - t.m / np.maximum(t.d, 1e-300), 3e-13 * (q + t.m / np.maximum(t.d, 1e-300))
    small = q < SMOOTH_BELOW
    exact, rounding = bias_variance(act, q[small])
    f[small], noise[small] = exact, rounding
    flat = t.d < 1e-250  # a step function has no gradient: chi_1 = 0 everywhere
    f[flat], noise[flat] = -np.inf, 0.0
    return Line(q, f, noise)


def attracts_from_above(act: Activation) -> bool:
    """Whether q = 0 attracts at sigma_w^2 = 1 / D(0): V(q) < q just above 0, i.e. M(q) / D(0) < q."""
    q = np.exp(np.arange(np.log(1e-12), np.log(10.0), 0.25))
    if not act.kinks:
        # V - q = (sum_{k != 1} a_k^2 + a_1^2) / D0 - q, with a_1 = sqrt(q) E[phi']: compare without cancelling
        for value in q:
            a, _ = coefficients(act, float(value), 32)
            slope = float(np.mean(act.prime.values(np.array([-1e-20, 1e-20]))))
            shortfall = (a[1] / np.sqrt(value) - slope) * (a[1] / np.sqrt(value) + slope) * value
            excess = shortfall + a[0] ** 2 + float(np.sum(a[2:] ** 2))
            if abs(excess) > 1e-10 * value * slope**2:
                return bool(excess < 0)
    m = raw_moments(act, q)[0]
    excess = m / slope_at_zero(act) / q - 1
    clear = np.flatnonzero(np.abs(excess) > 1e-9)
    return bool(clear.size and excess[clear[0]] < 0)
