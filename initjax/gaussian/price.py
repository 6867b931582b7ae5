r"""Duals at one variance from Price's theorem applied twice, for functions whose second derivative is localised.

Along c = cos theta the dual of f obeys  dE[f'f']/dtheta = -q sin(theta) E[f''(u) f''(v)],  and the density's own
1/(2 pi q sin theta) cancels the sine:
    dE[f'f']/dtheta = -(1/2 pi) iint f''(u) f''(v) exp(-(u + v)^2 / (4 q (1 + c)) - (u - v)^2 / (4 q (1 - c))) du dv.
With u, v = x +- t/2 this is a one-dimensional Gaussian transform of
    R(t; Q) = int f''(x + t/2) f''(x - t/2) e^{-x^2/Q} dx,   Q = q (1 + c),
so no two-dimensional quadrature is left: R is tabulated once, and two integrations in theta give E[f'f'] and E[ff].
For tanh, gelu, silu, softplus, elu, hard_tanh, ... f'' decays and kinks are deltas in it, which add terms in closed
form; the method is at its best where Mehler's series is at its worst: large q, kinks, c near 1.
Derived here from Price 1958.
"""

import numpy as np

from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import legendre, legendre_transform, panel_nodes

_ORDER = 14
_DEEPEST = -22  # finest dyadic panel edge, 2^-22, near 0 of x and t
_Q_NODES = 22  # Chebyshev nodes in log Q for one cell of log q
_LARGEST_SUPPORT = 60.0


class Curvature:
    """f'' as a localised function plus slope jumps, with the products that R(t; Q) needs."""

    def __init__(self, act: Activation):
        self.prime, self.second = act.prime, act.prime.prime
        self.support = _support(self.second)
        self.usable = bool(self.support) and not act.jumps and len(act.kinks) <= 4
        self.slope_jumps = act.prime.jumps if self.usable else ()
        if self.usable:
            self._tabulate(act)

    def _tabulate(self, act: Activation):
        self.finest = width = min(1.0, max(0.05, float(np.min(np.diff(self.prime.breaks(self.support))))))
        dyadic = 2.0 ** np.arange(_DEEPEST, 0)
        reach = 2 * self.support
        coarse = np.arange(0.0, reach + width, width)
        t_edges = np.unique(np.concatenate([[0.0], dyadic, coarse[1:]]))
        self.t, self.t_weight = panel_nodes(t_edges, _ORDER)
        half = np.arange(0.0, self.support + width, width)
        x_edges = np.unique(np.concatenate([-half, -dyadic, [0.0], dyadic, half]))
        limit = np.maximum(self.support - self.t / 2, 0.0)[:, None]
        kinks = np.asarray(act.kinks)
        shifted = np.concatenate([kinks + self.t[:, None] / 2, kinks - self.t[:, None] / 2], axis=1)
        edges = np.concatenate([np.broadcast_to(x_edges, (self.t.size, x_edges.size)), shifted], axis=1)
        x, weight = panel_nodes(np.sort(np.clip(edges, -limit, limit), axis=1), _ORDER)
        shift = self.t[:, None] / 2
        product = self.second.values(x + shift) * self.second.values(x - shift) * weight
        keep = np.abs(product).max(axis=0) > 0
        self.square, self.product = x[:, keep] ** 2, product[:, keep]

    def correlation(self, big_q: np.ndarray) -> np.ndarray:
        """R(t; Q): (len(big_q), len(t))."""
        return np.stack([np.einsum("tx,tx->t", self.product, np.exp(-self.square / v)) for v in big_q])

    def rate(self, q: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """-dE[f'f']/dtheta for every q and theta in (0, pi): (len(q), len(theta))."""
        c, one_minus = np.cos(theta), 2 * np.sin(theta / 2) ** 2
        big = q[:, None] * (1 + c)
        low, high = np.log(big.min()) - 1e-9, np.log(big.max()) + 1e-9
        nodes = np.cos(np.pi * (np.arange(_Q_NODES) + 0.5) / _Q_NODES)
        table = self.correlation(np.exp((low + high) / 2 + (high - low) / 2 * nodes))
        place = (2 * np.log(big).ravel() - low - high) / (high - low)
        between = _chebyshev_matrix(place)
        out = np.zeros(place.size)
        spread = (4 * q[:, None] * one_minus).ravel()
        for start in range(0, place.size, 256):
            part = slice(start, start + 256)
            bell = np.exp(-(self.t**2) / spread[part, None]) * self.t_weight
            out[part] = 2 * np.einsum("nt,nt->n", between[part] @ table, bell)  # R is even in t
        return (out.reshape(big.shape) + self._deltas(q, theta, c, one_minus)) / (2 * np.pi)

    def _deltas(self, q, theta, c, one_minus):
        """What slope jumps J at kappa add, E being the energy in the exponent of the density:
        2 sum_m J_m int f''(v) e^{-E(kappa_m, v)} dv + sum_mn J_m J_n e^{-E(kappa_m, kappa_n)}."""
        if not self.slope_jumps:
            return 0.0
        total = np.zeros((q.size, theta.size))
        column, sine = q[:, None], np.sin(theta)
        for kappa, jump in self.slope_jumps:
            for other, step in self.slope_jumps:
                energy = (kappa + other) ** 2 / (4 * column * (1 + c)) + (kappa - other) ** 2 / (4 * column * one_minus)
                total += jump * step * np.exp(-energy)
            # v = c kappa + sqrt(q) sin(theta) w is Gaussian given u = kappa
            middle, scale = (c * kappa)[None, :] + 0 * column, np.sqrt(column) * sine
            breaks = self.prime.breaks(self.support)
            base = np.arange(-12.0, 12.5, 1.0)
            own = np.clip((breaks - middle[..., None]) / scale[..., None], -12, 12)
            edges = np.concatenate([np.broadcast_to(base, (*middle.shape, base.size)), own], axis=-1)
            w, weight = panel_nodes(np.sort(edges, axis=-1), _ORDER)
            values = self.second.values(middle[..., None] + scale[..., None] * w)
            inner = np.sum(values * weight * np.exp(-w * w / 2), axis=-1) * scale
            total += 2 * jump * np.exp(-(kappa**2) / (2 * column)) * inner
        return total


def _support(second: Activation) -> float:
    """Radius outside which f'' is below 1e-17 of its maximum; 0 if it does not decay within reach."""
    x = np.linspace(-4 * _LARGEST_SUPPORT, 4 * _LARGEST_SUPPORT, 9601)
    with np.errstate(all="ignore"):
        size = np.abs(second.values(x))
    if not np.all(np.isfinite(size)) or size.max() > 1e6:
        return 0.0
    large = np.flatnonzero(size > 1e-17 * max(size.max(), 1e-300))
    if not large.size or size.max() < 1e-12:
        return 1.0  # piecewise linear: only kinks
    radius = float(np.abs(x[large]).max()) + 0.05
    return radius if radius <= _LARGEST_SUPPORT else 0.0


def _chebyshev_matrix(place: np.ndarray) -> np.ndarray:
    """Interpolation from the Chebyshev nodes to `place` in [-1, 1]."""
    k = np.arange(_Q_NODES)
    nodes = np.pi * (k + 0.5) / _Q_NODES
    forward = np.cos(np.outer(k, nodes)) * (2 / _Q_NODES)
    forward[0] /= 2
    return np.cos(np.outer(np.arccos(np.clip(place, -1, 1)), k)) @ forward


def curvature_of(act: Activation) -> Curvature:
    """The curvature table of one activation, made once."""
    found = act.__dict__.get("_curvature")
    if found is None:
        found = act.__dict__["_curvature"] = Curvature(act)
    return found


def average_slope(act: Activation, q: np.ndarray, slope: np.ndarray, edges: np.ndarray, order: int):
    """w(q, theta) = (E[f(u)^2] - E[f(u) f(v)]) / (q (1 - c)) on Legendre nodes of panels `edges` of theta in [0, pi].

    `slope` is E[f'^2] at each q. Returns (theta nodes (panels, order), w (len(q), panels, order)).
    """
    nodes, _ = legendre(order)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    theta = middle[:, None] + half[:, None] * nodes
    rate = curvature_of(act).rate(q, theta.ravel()).reshape(q.size, *theta.shape)
    dual_prime = slope[:, None, None] - _running_integral(rate, half, order)
    gap = _running_integral(dual_prime * np.sin(theta), half, order)
    return theta, gap / (2 * np.sin(theta / 2) ** 2)


def _running_integral(values: np.ndarray, half: np.ndarray, order: int) -> np.ndarray:
    """Integral from the first edge to every node, of functions given on Legendre nodes: (..., panels, order)."""
    nodes, weights = legendre(order)
    vander = np.polynomial.legendre.legvander(nodes, order)
    coefficient = values @ legendre_transform(order)
    # int_{-1}^t P_k = (P_{k+1} - P_{k-1}) / (2 k + 1), and t + 1 for k = 0
    primitive = np.empty((order, order))
    primitive[0] = nodes + 1
    for k in range(1, order):
        primitive[k] = (vander[:, k + 1] - vander[:, k - 1]) / (2 * k + 1)
    inside = (coefficient @ primitive) * half[:, None]
    whole = (values @ weights) * half
    before = np.cumsum(whole, axis=-1) - whole
    return inside + before[..., None]


def graded_edges(act: Activation, q_max: float) -> np.ndarray:
    """Panels of theta in [0, pi/2], halving towards 0 until they resolve the finest feature of f at this variance."""
    finest = curvature_of(act).finest
    levels = 3 + max(0, int(np.ceil(np.log2(np.sqrt(q_max) / finest + 1))))
    return np.concatenate([[0.0], np.pi / 2 * 0.5 ** np.arange(levels - 1, -1, -1)])
