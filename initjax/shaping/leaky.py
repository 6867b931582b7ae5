r"""The relu family: the slope on the negative side is what is solved for.

A homogeneous phi has no scale to shape with alpha, and keeps Q'(1) = 1 by itself at beta = 0. With negative slope s,
    k = (1 - s)^2 / (1 + s^2),
    TAT, gamma^2 = 2 / (1 + s^2), delta = 0:   C(c) = c + (k / pi) (sqrt(1 - c^2) - c arccos c),
    DKS, the mean removed:                     C'(1) = 1 / (1 - k / pi).
Martens et al. 2021 (arXiv:2110.01765); Zhang, Botev, Martens 2022 (arXiv:2203.08120), section 4.2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import recognise
from initjax.trace.jaxpr import float64, is_traced

STEEPEST = 2 * math.pi / (2 * math.pi - 4)  # C'(1) of |x| less its mean, slope -1: pi / (pi - 2)
RELU_SLOPE = math.pi / (math.pi - 1)  # C'(1) of relu less its mean


def is_homogeneous(act: Activation) -> bool:
    """Whether phi is a relu or leaky relu of some slopes (not linear)."""
    member = recognise(act)
    return member is not None and member.family == "ramp" and member.parameters[0] != member.parameters[1]


def slope_of(xp, k):
    """Negative slope s in [-1, 1] with (1 - s)^2 / (1 + s^2) = k in [0, 2]."""
    rest = 1 - k
    return rest / (1 + xp.sqrt(k * (2 - k)))


def shaped_dks(xp, c_slope):
    """negative slope, gamma and delta with C(0) = 0, Q(1) = Q'(1) = 1 and C'(1) = c_slope; nan beyond slope -1."""
    k = math.pi * (1 - 1 / c_slope)
    s = slope_of(xp, xp.where(k <= 2, k, xp.full_like(k, np.nan)))
    variance = (1 + s * s) / 2 - (1 - s) ** 2 / (2 * math.pi)
    return s, 1 / xp.sqrt(variance), (s - 1) / math.sqrt(2 * math.pi)


def shaped_tat(xp, k):
    """negative slope, gamma and delta with Q(1) = C'(1) = 1."""
    s = slope_of(xp, k)
    return s, xp.sqrt(2 / (1 + s * s)), xp.zeros_like(s)


def c_map(xp, c, k):
    """The correlation map at Q(1) = C'(1) = 1."""
    inside = xp.clip(c, -1.0, 1.0)
    return c + k / math.pi * (xp.sqrt((1 - inside) * (1 + inside)) - inside * xp.arccos(inside))


def solve_depth(eta, depth):
    """k such that C composed `depth` times takes 0 to eta; nan where relu itself (k = 1) stays below.

    NumPy arrays are solved in float64, tracers in their dtype; differentiable in eta.
    """
    if is_traced(eta, depth):
        return _solve(eta, depth)
    with float64():
        return np.asarray(_compiled(jnp.asarray(eta), jnp.asarray(depth)))


def _solve(eta, depth):
    deepest = jnp.max(depth).astype(jnp.int32)
    dtype = eta.dtype

    def composed(k):
        """C composed and its derivative in k."""

        def layer(i, carry):
            c, dc = carry
            inside = jnp.clip(c, 0, 1)
            angle = jnp.arccos(inside)
            bend = jnp.sqrt((1 - inside) * (1 + inside)) - inside * angle
            new = c + k / math.pi * bend, dc + (bend - k * angle * dc) / math.pi
            return jax.tree.map(lambda a, b: jnp.where(i.astype(dtype) < depth, a, b), new, carry)

        return jax.lax.fori_loop(0, deepest, layer, (jnp.zeros_like(k), jnp.zeros_like(k)))

    def step(state):
        k, low, high, _, turn = state
        value, slope = composed(k)
        low, high = jnp.where(value < held, k, low), jnp.where(value < held, high, k)
        new = k - (value - held) / slope
        new = jnp.where((new > low) & (new < high), new, (low + high) / 2)
        return new, low, high, jnp.abs(new - k), turn + 1

    held = jax.lax.stop_gradient(eta)
    one = jnp.ones_like(held)
    reached = composed(one)[0] >= held
    small = 4 * jnp.finfo(dtype).eps
    start = (jnp.minimum(one / 2, 6 * one / depth), 0 * one, one, one, 0)
    k = jax.lax.while_loop(lambda s: (s[4] < 60) & jnp.any(s[3] > small * s[0]), step, start)[0]
    value, slope = composed(k)
    k = k - (value - eta) / slope  # one more step, which carries the derivative in eta
    return jnp.where(reached, jnp.clip(k, 0, 1), jnp.full_like(k, jnp.nan))


_compiled = jax.jit(_solve)


def relu_c_zero(depth: int) -> float:
    """C(0) of `depth` layers of relu, the most that the family reaches under TAT."""
    c = 0.0
    for _ in range(depth):
        c = float(c_map(np, np.float64(c), 1.0))
    return c


def solve_relu(c_slope):
    """alpha and beta of gamma (relu(alpha x + beta) + delta) with C(0) = 0, Q(1) = 1 and C'(1) = c_slope, beta = +-1.

    relu has no parameter left for Q'(1) = 1. With the kink at -t, t = beta / alpha, C'(1) falls from
    infinity (t -> -inf) over pi / (pi - 1) at t = 0 to 1.
    """
    flat = np.ravel(np.asarray(c_slope))
    low, high = np.full(flat.shape, -30.0), np.full(flat.shape, 8.0)
    for _ in range(100):
        middle = (low + high) / 2
        above = np.array([_relu_slope(float(t)) for t in middle]) > flat
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    t = ((low + high) / 2).reshape(np.shape(c_slope))
    return 1 / np.abs(t), np.sign(t)


def _relu_slope(t: float) -> float:
    """C'(1) of relu(x + t) less its mean."""
    below = 0.5 * math.erfc(-t / math.sqrt(2))
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    mean = t * below + density
    variance = (1 + t * t) * below + t * density - mean * mean
    return below / variance if variance > 0 else math.inf
