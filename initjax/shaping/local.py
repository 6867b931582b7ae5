r"""The conditions that DKS and TAT put on one layer, as two equations in (log alpha, beta).

The shaped activation is gamma (phi(alpha x + beta) + delta). Split F(z) = phi(alpha z + beta) = m + a z + r(z), with
m = E[F], a = E[F'] and a rest r without mean and slope. At q = 1, with V the second moment of F + delta, so that
gamma = 1 / sqrt(V) makes Q(1) = 1, Gaussian integration by parts gives

    DKS, C(0) = 0:   delta = -m,     V = a^2 + E[r^2],    V (C'(1) - 1) = E[r'^2] - E[r^2],
                     V (Q'(1) - 1) = a E[(z^2 - 1) r'] + E[z r r'] - E[r^2],
    TAT, C'(1) = 1:  delta = c - m,  V = a^2 + E[r'^2],   V C''(1) = E[r''^2],   c = +-sqrt(E[r'^2] - E[r^2]),
                     V (Q'(1) - 1) = a E[(z^2 - 1) r'] + E[z r r'] + c E[z r'] - E[r'^2].

gamma and delta are thus eliminated exactly, and every term is small where the layer is nearly linear: no difference of
numbers of order one is taken, and a thousand layers are as easy as ten.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import QuadratureError
from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import legendre
from initjax.trace.jaxpr import float64

REACH = 10.0  # standard deviations: beyond, the Gaussian weight is 2e-22
_MOST_BREAKS = 100
_SIZES = (1, 256)  # batches that are compiled; everything is padded to one of them


class Shape(NamedTuple):
    """One layer at one (log alpha, beta).

    Attributes
    ----------
    level : log(C'(1) - 1) for DKS, log C''(1) for TAT.
    balance : Q'(1) less its target, in units of C'(1) - 1 for DKS and of 1 - a^2 / V for TAT: of order one however
        linear the layer is.
    gamma, delta : output scale and shift.
    linear : a^2 / V, the share of the linear part.
    """

    level: Any
    balance: Any
    gamma: Any
    delta: Any
    linear: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The equations of one activation; `sign` is that of c in TAT, and 0 for DKS."""

    act: Activation
    sign: int

    @functools.cached_property
    def breaks(self) -> tuple[np.ndarray, float]:
        """Cells of phi, and the |u| up to which they reach: as far as is affordable."""
        for reach in (4096.0, 512.0, 128.0, 32.0, 12.0):
            try:
                edges = self.act.breaks(reach)
            except QuadratureError:
                continue
            if edges.size <= _MOST_BREAKS:
                break
        return edges, reach

    @functools.cached_property
    def _moving(self) -> bool:
        """Whether an integrand jumps where the edges are, so that their motion counts."""
        bent = self.act.prime
        return bool(bent.jumps) or bool(self.sign and bent.prime.jumps)

    def shape(self, x, q_slope=1.0) -> Shape:
        """The layer at x = (log alpha, arsinh beta), in x's dtype."""
        fn = self.act.fn
        alpha, beta = jnp.exp(x[0]), jnp.sinh(x[1])
        z, w = _nodes(jnp.asarray(self.breaks[0], x.dtype), alpha, beta, self._moving)
        u = alpha * z + beta
        one = jnp.ones_like(u)

        def slopes(u):
            return jax.jvp(fn, (u,), (one,))

        if self.sign:
            (f, slope), (_, bend) = jax.jvp(slopes, (u,), (one,))
        else:
            (f, slope), bend = slopes(u), one
        base = jax.lax.stop_gradient(fn(beta))  # any constant near m: r is then free of cancellation
        f, slope = f - base, alpha * slope
        mean, a = w @ f, w @ slope
        r, dr = f - mean - a * z, slope - a
        rest, steep = w @ (r * r), w @ (dr * dr)
        excess = steep - rest  # of C'(1), unnormalised
        q_excess = a * (w @ ((z * z - 1) * dr)) + w @ (z * r * dr)
        if not self.sign:
            v = a * a + rest
            balance = (q_excess - rest - (q_slope - 1) * v) / excess
            return Shape(jnp.log(excess / v), balance, jax.lax.rsqrt(v), -(mean + base), a * a / v)
        v = a * a + steep
        c = self.sign * jnp.sqrt(excess)
        balance = (q_excess + c * (w @ (z * dr)) - steep - (q_slope - 1) * v) / steep
        curvature = alpha**4 * (w @ (bend * bend)) / v
        return Shape(jnp.log(curvature), balance, jax.lax.rsqrt(v), c - (mean + base), a * a / v)

    @functools.cached_property
    def _compiled(self):
        def both(x, q_slope):
            def pair(x):
                s = self.shape(x, q_slope)
                return jnp.stack([s.level, s.balance]), s

            jacobian, s = jax.jacfwd(pair, has_aux=True)(x)
            return s, jacobian

        return jax.jit(jax.vmap(both, in_axes=(0, None)))

    def at(self, x: np.ndarray, q_slope: float = 1.0) -> tuple[Shape, np.ndarray]:
        """Float64 values at concrete x of shape (B, 2), and the Jacobian (B, 2, 2) of (level, balance)."""
        parts = []
        for start in range(0, len(x), _SIZES[-1]):
            part = x[start : start + _SIZES[-1]]
            size = next(s for s in _SIZES if s >= len(part))
            padded = np.concatenate([part, np.broadcast_to(part[-1:], (size - len(part), 2))])
            with float64():
                shape, jacobian = self._compiled(jnp.asarray(padded), jnp.asarray(q_slope, jnp.float64))
                parts.append([np.asarray(v)[: len(part)] for v in (*shape, jacobian)])
        *shape, jacobian = (np.concatenate(v) for v in zip(*parts, strict=True))
        return Shape(*shape), jacobian


def _nodes(breaks: jax.Array, alpha, beta, moving: bool) -> tuple[jax.Array, jax.Array]:
    """z and weights for z ~ N(0, 1), panels split where alpha z + beta meets a break; differentiable in both.

    Where an integrand jumps the edges move with alpha and beta, and the nodes with them: so the derivative of E[phi'^2]
    counts the jump of phi' at a moving kink. Elsewhere they are held, which is the same and cheaper.
    """
    dtype = breaks.dtype
    if not moving:
        alpha, beta = jax.lax.stop_gradient((alpha, beta))
    own = jnp.clip((breaks - beta) / alpha, -REACH, REACH)
    edges = jnp.sort(jnp.concatenate([jnp.linspace(-REACH, REACH, 11, dtype=dtype), own]))
    middle, half = ((edges[1:] + edges[:-1]) / 2)[:, None], ((edges[1:] - edges[:-1]) / 2)[:, None]
    nodes, weights = (jnp.asarray(v, dtype)[None, :] for v in legendre(20))
    z = (middle + half * nodes).ravel()
    return z, (half * weights).ravel() * jnp.exp(-z * z / 2) / np.sqrt(2 * np.pi).astype(dtype)
