r"""Taylor expansions of Gaussian pair expectations in the covariance, which derivatives of kernels are made of.

With E_ij = E[f^(i)(u) g^(j)(v)], Var u = q1, Var v = q2, Cov(u, v) = k, and smooth f and g, Price's theorem
    dE_ij/dk = E_{i+1,j+1},   dE_ij/dq1 = E_{i+2,j} / 2,   dE_ij/dq2 = E_{i,j+2} / 2
closes: every Taylor coefficient in (q1, q2, k) is one of these numbers, finite at k^2 = q1 q2 and at q = 0, where the
coordinates (q, c) are singular. Piecewise linear f (relu) have E = sqrt(q1 q2) kappa(c) instead, whose derivatives in c
are elementary. Source: Price 1958; the use for derivative kernels is derived here.

A kernel program is recorded with `recording`: pair expectations then stay one opaque call each, named by its place in
the record, for an interpreter to expand.
"""

import contextlib
import contextvars
import functools
import math

import jax
import numpy as np

from initjax.gaussian.activation import Activation

PAIR, MEAN = "initjax_pair_", "initjax_mean_"
_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def recording():
    """Trace pair expectations as opaque calls; yields the list of their functions, (f, g) or (f,)."""
    met: list[tuple[Activation, ...]] = []
    token = _RECORD.set(met)
    try:
        yield met
    finally:
        _RECORD.reset(token)


def is_recording() -> bool:
    """Whether a block `recording` is open."""
    return _RECORD.get() is not None


def recorded(functions: tuple[Activation, ...], *arrays):
    """An opaque call that stands for E[f(u) g(v)] of (q1, q2, k), or for E[f(u)] of q, in a recorded program."""
    met = _RECORD.get()
    assert met is not None

    def stand_in(*values):
        return sum(values[1:], values[0])

    stand_in.__name__ = (PAIR if len(functions) == 2 else MEAN) + str(len(met))
    met.append(functions)
    return jax.jit(stand_in)(*arrays)


def jump_order(f: Activation, highest: int) -> int | None:
    """The order of the first derivative of f that jumps, up to `highest`; None if none does."""
    for order in range(highest + 1):
        if not f.kinks:
            return None
        if f.jumps:
            return order
        f = f.prime
    return None


@functools.lru_cache(maxsize=1024)
def derivative(f: Activation, order: int) -> Activation:
    """The a.e. derivative of f of this order."""
    return f if order == 0 else derivative(f, order - 1).prime


@functools.lru_cache(maxsize=512)
def times_power(f: Activation, power: int) -> Activation:
    """x^power f(x)."""
    return f if power == 0 else Activation(lambda x: x**power * f.fn(x), kinks=f.kinks)


def slope_pair(p: tuple[float, ...], r: tuple[float, ...], order: int, kind: str, c, singular: float) -> list:
    """Derivatives 0..order in c of kappa(c) = E[f(u) g(v)] at unit variances, for two ramps or two steps.

    p, r : value right and left of 0 of f and g, or their slopes. singular : what stands for infinity at |c| = 1.
    """
    s2 = (1 - c) * (1 + c)
    inside = s2 > 0
    safe = np.where(inside, s2, 1.0)
    ramp = kind == "ramp"
    even, odd = (p[0] - p[1]) * (r[0] - r[1]) / 4, (p[0] + p[1]) * (r[0] + r[1]) / 4
    arcsin = np.arctan2(c, np.sqrt(np.maximum(s2, 0.0)))
    jump = even * (2 / np.pi)
    out = [odd * c + jump * (np.sqrt(np.maximum(s2, 0.0)) + c * arcsin), odd + jump * arcsin] if ramp else []
    if not ramp:
        out = [odd + jump * arcsin]
    # d/dc arcsin(c) = s^-1; further ones are polynomials in c over odd powers of s
    polynomial, power = np.array([1.0]), 1
    while len(out) <= order:
        value = np.polynomial.polynomial.polyval(c, polynomial) * safe ** (-power / 2)
        out.append(jump * np.where(inside, value, singular))
        lower = np.polynomial.polynomial.polyder(polynomial)
        first = np.polynomial.polynomial.polymul(lower, [1.0, 0.0, -1.0])
        second = power * np.polynomial.polynomial.polymul(polynomial, [0.0, 1.0])
        polynomial, power = np.polynomial.polynomial.polyadd(first, second), power + 2
    return out[: order + 1]


def factorials(*orders: int) -> float:
    """Product of the factorials."""
    return float(math.prod(math.factorial(n) for n in orders))
