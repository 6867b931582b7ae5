"""One-sided Taylor coefficients of an activation at 0, and what they make of V(q) and D(q) near q = 0."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation
from initjax.trace.jaxpr import float64

ORDER = 5  # derivatives taken: V is then known up to q^3
_BESIDE = 1e-20  # a point of each branch so near 0 that its derivatives are those at 0


def one_sided(act: Activation) -> np.ndarray:
    """Coefficients of x^0 .. x^ORDER in phi for x < 0 (row 0) and x > 0 (row 1), exact to rounding; nan if unknown."""
    known = act.__dict__.get("_taylor")
    if known is None:
        chain = [act.fn]
        for _ in range(ORDER):
            chain.append(_derivative(chain[-1]))

        def all_orders(x):
            return jnp.stack([f(x) for f in chain])

        with float64():
            derivatives = np.asarray(jax.jit(all_orders)(jnp.asarray([-_BESIDE, _BESIDE])))
        known = derivatives.T / np.array([math.factorial(k) for k in range(ORDER + 1)])
        # an nth derivative that automatic differentiation gets wrong (0/0 at 0) shows up in the values nearby
        x = np.array([-(2.0**-7), 2.0**-7])
        remainder = np.abs(act.values(x) - np.array([np.polyval(r[::-1], v) for r, v in zip(known, x, strict=True)]))
        nonlinear = np.abs(known[:, 2:]).max(axis=1) + np.abs(known[:, 1])
        ok = remainder <= 1e3 * np.abs(x) ** (ORDER + 1) * nonlinear + 1e-14 * nonlinear
        known = np.where(ok[:, None], known, np.nan)
        act.__dict__["_taylor"] = known
    return known


def _derivative(fn):
    return lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]


def absolute_moment(n: int) -> float:
    """E|z|^n."""
    return 2 ** (n / 2) * math.gamma((n + 1) / 2) / math.sqrt(math.pi)


def second_moments(act: Activation) -> tuple[np.ndarray, np.ndarray]:
    """V and D as series in sqrt(q) at phi(0) = 0: coefficients of q^(n/2), n = 0 .. ORDER + 1 and 0 .. ORDER - 1."""
    rows = one_sided(act)
    signs = np.array([-1.0, 1.0])
    m, d = np.zeros(ORDER + 2), np.zeros(ORDER)
    for row, sign in zip(rows, signs, strict=True):
        square = np.convolve(row, row)[: ORDER + 2]
        slope = row[1:] * np.arange(1, ORDER + 1)
        slope_square = np.convolve(slope, slope)[:ORDER]
        # with phi(0) = 0, x^6 of phi^2 and x^4 of phi'^2 need no coefficient beyond x^5
        m += [0.5 * sign**n * c * absolute_moment(n) for n, c in enumerate(square)]
        d += [0.5 * sign**n * c * absolute_moment(n) for n, c in enumerate(slope_square)]
    return m, d
