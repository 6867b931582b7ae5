r"""V(q) and its derivatives for one activation, as piecewise polynomials in log q.

Everything that mean-field theory asks of an activation at equal inputs depends on one number, q:
    M(q) = E[phi^2],  D(q) = E[phi'^2],  r(q) = d log M / d log q = E[u phi phi'] / M.
They are computed once on Legendre nodes in cells of log q (a few hundred thousand evaluations of phi), to 13 digits,
and every fixed point, critical point and phase diagram then costs polynomial evaluations, in NumPy or inside jit.
"""

import functools
from typing import NamedTuple

import numpy as np

from initjax.errors import QuadratureError
from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import FORMS, recognise
from initjax.gaussian.expect import host_rule
from initjax.gaussian.nodes import legendre, legendre_transform

DEGREE = 14
_CELL = 0.5
_Q_LOW, _Q_HIGH = 1e-20, 1e9
_RESOLVED = 3e-12
_UNDERFLOW = 1e-250
_AFFORDABLE = 1500  # panels of phi beyond which the table stops: fast oscillation at large q


class Moments(NamedTuple):
    """M, D, r and their derivatives in log q, at one array of q."""

    m: np.ndarray
    d: np.ndarray
    r: np.ndarray
    dlog_d: np.ndarray
    dr: np.ndarray


class Table(NamedTuple):
    """Coefficients of log M, log D and r: (cells, 3, DEGREE) in log q from `low`, cells `width` wide."""

    rows: np.ndarray
    low: float
    width: float
    q_low: float
    q_high: float
    power: float  # M = q^power exp(row): keeps the logarithm, and with it the rounding, small

    def __call__(self, xp, q) -> Moments:
        """Evaluate at q (NumPy or jax.numpy); outside [q_low, q_high] the end cell continues linearly in log q."""
        rows = xp.asarray(self.rows, dtype=q.dtype)
        x = xp.log(xp.clip(q, self.q_low, self.q_high))
        position = (x - self.low) / self.width
        cell = xp.clip(xp.floor(position), 0, self.rows.shape[0] - 1).astype(np.int32)
        t = 2 * (position - cell.astype(q.dtype)) - 1
        row = rows[cell]  # (..., 3, DEGREE)
        t = t[..., None]
        # Clenshaw in the Legendre basis would need divisions; rows are stored as monomials on [-1, 1]
        value, slope = row[..., -1], 0 * row[..., -1]
        for k in range(self.rows.shape[-1] - 2, -1, -1):
            slope = slope * t + value
            value = value * t + row[..., k]
        slope = slope * (2 / self.width)
        over = xp.log(xp.maximum(q, 1e-300 if q.dtype == np.float64 else 1e-37)) - x
        return Moments(
            xp.exp(value[..., 0] + over * (value[..., 2] - self.power)) * xp.maximum(q, 0.0 * q) ** self.power,
            xp.exp(value[..., 1]),
            value[..., 2],
            slope[..., 1],
            slope[..., 2],
        )


def raw_moments(act: Activation, q: np.ndarray) -> np.ndarray:
    """E[phi^2], E[phi'^2], E[u phi phi'] at each q, accurate to rounding: (3, *q.shape)."""
    member = recognise(act)
    if member is not None and member.family in ("wave", "exp"):  # no quadrature follows these to q = 1e8
        return _closed_moments(act, member, q)
    return host_rule(act, lambda u, f, slope: [f * f, slope * slope, u * f * slope], q, 3)


def _closed_moments(act, member, q):
    prime = recognise(act.prime)
    assert prime is not None  # derivatives of waves and exponentials are waves and exponentials
    one, zero = np.ones_like(q), np.zeros_like(q)
    with np.errstate(over="ignore", invalid="ignore"):
        m = FORMS[member.family](np, member.parameters, member.parameters, q, q, one, zero)
        d = FORMS[prime.family](np, prime.parameters, prime.parameters, q, q, one, zero)
        if member.family == "exp":
            return np.stack([m, d, 2 * q * d])
        w, a, b, mean = member.parameters
        # M = (a^2 + b^2)/2 + m^2 + (b^2 - a^2)/2 e^{-2 w^2 q} + 2 m b e^{-w^2 q / 2}; E[u phi phi'] = q dM/dq
        x = w * w * q
        return np.stack([m, d, x * ((a * a - b * b) * np.exp(-2 * x) - mean * b * np.exp(-x / 2))])


def _monomials(degree: int) -> np.ndarray:
    """Legendre coefficients @ this = monomial coefficients."""
    return np.stack(
        [np.pad(np.polynomial.legendre.leg2poly(np.eye(degree)[k]), (0, degree - 1 - k)) for k in range(degree)]
    )


@functools.lru_cache(maxsize=256)
def table_of(act: Activation) -> Table:
    """The table of one activation; about half a second, once.

    Raises
    ------
    QuadratureError : the moments are not resolved (fast oscillation, growth beyond exponential).
    """
    nodes, _ = legendre(DEGREE)
    transform = legendre_transform(DEGREE)
    q_low, q_high, power = _lowest(act), _Q_HIGH, 1.0 if vanishes_at_zero(act) else 0.0
    oscillates = (recognise(act) or ("",))[0] in ("wave", "exp")
    while not oscillates and q_high > 1e3 and _cells(act, q_high) > _AFFORDABLE:
        q_high /= 10.0
    for width in (_CELL, _CELL / 2, _CELL / 4):
        while True:
            low = np.log(q_low)
            cells = int(np.floor((np.log(q_high) - low) / width))
            q = np.exp(low + width * (np.arange(cells)[:, None] + (nodes + 1) / 2))
            try:
                moments = raw_moments(act, q)
                if not np.all(np.isfinite(moments)):
                    raise QuadratureError(f"the moments of {act.name} overflow at q = {q_high:g}", "", "", "")
                break
            except QuadratureError:
                q_high /= 10.0
                if q_high < 1.0:
                    raise
        m, d, e = moments
        floor = 1e-300
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.where(m > floor, e / np.maximum(m, floor), 0.0)
        data = np.stack(
            [np.log(np.maximum(m, floor) / q**power), np.log(np.maximum(d, floor)), r], 1
        )  # (cells, 3, nodes)
        rows = data @ transform
        tail = np.abs(rows[..., -2:]).max(axis=(0, 2)) / np.maximum(
            1.0, np.abs(data[..., :, :]).max(axis=(0, 2)) * 1e-3
        )
        if tail.max() < _RESOLVED:
            break
    else:
        if tail.max() > 1e-9:
            raise QuadratureError(
                f"the moments of {act.name} as functions of log q are resolved only to {tail.max():.1e}.",
                "activations whose moments vary smoothly with log q.",
                "fixed points would be less accurate than promised.",
                "use ij.gaussian.moment at single values of q.",
            )
    return Table(rows @ _monomials(DEGREE), low, width, q_low, float(np.exp(low + width * cells)), power)


def _lowest(act: Activation) -> float:
    """The smallest q whose moments are neither rounding (tanh(x + b) - tanh(b) carries 1e-17 beside x, x - tanh(x)
    beside x^3) nor underflow (relu(x - 1) has exp(-1 / 2q))."""
    nodes, _ = legendre(DEGREE)
    for q_low in (_Q_LOW, 1e-16, 1e-13, 1e-10, 1e-7, 1e-5, 1e-4, *np.geomspace(5e-4, 5e-2, 7)):
        q = q_low * np.exp(_CELL * (nodes + 1) / 2)
        try:
            m, d, _ = raw_moments(act, q)
        except QuadratureError:
            continue
        dead = (0 < m) & (m < _UNDERFLOW) | (0 < d) & (d < _UNDERFLOW)
        with np.errstate(all="ignore"):
            rows = np.log(np.maximum(np.stack([m / q, d]), 1e-300)) @ legendre_transform(DEGREE)
        rounding = 4e-15 * np.abs(rows).max()
        if not dead.any() and not _empty(act, m, d) and np.abs(rows[:, -4:]).max() < _RESOLVED / 10 + rounding:
            return q_low
    return _Q_LOW


def _empty(act, m, d) -> bool:
    """Whether moments vanish at this q that do not at q = 1: what there is lies beyond the reach of the Gaussian."""
    at_one = raw_moments(act, np.ones(1))
    return bool((m == 0).any() and at_one[0, 0] > 0 or (d == 0).any() and at_one[1, 0] > 0)


def _cells(act: Activation, q: float) -> float:
    try:
        return act.breaks(12 * np.sqrt(q)).size
    except QuadratureError:
        return np.inf


def slope_at_zero(act: Activation) -> float:
    """D(0+) = (phi'(0-)^2 + phi'(0+)^2) / 2."""
    return float(np.mean(act.prime.values(np.array([-1e-20, 1e-20])) ** 2))


def vanishes_at_zero(act: Activation) -> bool:
    """Whether phi(0-) = phi(0+) = 0, so that q = 0 is fixed without biases."""
    return bool(np.all(np.abs(act.values(np.array([-1e-20, 0.0, 1e-20]))) < 1e-15))


def ramp(act: Activation) -> tuple[float, float] | None:
    """Slopes (right, left) of a positively homogeneous activation (linear, relu, leaky relu, abs), else None."""
    member = recognise(act)
    if member is None or member.family not in ("ramp",):
        return None
    return member.parameters[0], member.parameters[1]


__all__ = ["Moments", "Table", "ramp", "raw_moments", "slope_at_zero", "table_of", "vanishes_at_zero"]
