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
from typing import NamedTuple

import numpy as np

from initjax.errors import QuadratureError
from initjax.gaussian.activation import Activation
from initjax.gaussian.nodes import panel_nodes

REACH = 10.0  # standard deviations: beyond, the Gaussian weight is 2e-22
_MOST_BREAKS = 100
_STEP = 3e-5  # of the Jacobian's central differences: 1e-9 is left, and Newton squares its error all the same
_CHUNK = 600_000  # nodes evaluated at once


class Shape(NamedTuple):
    """Layers at some (log alpha, beta); arrays (B,).

    Attributes
    ----------
    level : log(C'(1) - 1) for DKS, log C''(1) for TAT.
    balance : Q'(1) less its target, in units of C'(1) - 1 for DKS and of 1 - a^2 / V for TAT: of order one however
        linear the layer is.
    gamma, delta : output scale and shift.
    """

    level: np.ndarray
    balance: np.ndarray
    gamma: np.ndarray
    delta: np.ndarray


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

    def shape(self, x: np.ndarray, q_slope: float = 1.0) -> Shape:
        """The layers at x of shape (B, 2), columns log alpha and arsinh beta."""
        most = max(1, _CHUNK // (20 * (len(self.breaks[0]) + 10)))
        parts = [self._shape(x[i : i + most], q_slope) for i in range(0, len(x), most)]
        return Shape(*(np.concatenate(v) for v in zip(*parts, strict=True)))

    def at(self, x: np.ndarray, q_slope: float = 1.0) -> tuple[Shape, np.ndarray]:
        """The same, and the Jacobian (B, 2, 2) of (level, balance) in x."""
        steps = _STEP * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
        all_ = self.shape((x[None] + steps[:, None]).reshape(-1, 2), q_slope)
        level, balance = (v.reshape(5, -1) for v in (all_.level, all_.balance))
        slopes = [[(v[k] - v[k + 1]) / (2 * _STEP) for k in (1, 3)] for v in (level, balance)]
        return Shape(*(v[: len(x)] for v in all_)), np.moveaxis(np.array(slopes), 2, 0)

    def _shape(self, x, q_slope) -> tuple[np.ndarray, ...]:
        alpha, beta = np.exp(x[:, :1]), np.sinh(x[:, 1:])
        z, w = _nodes(self.breaks[0], alpha, beta)
        f, slope = self.act.values_slopes(alpha * z + beta)
        base = self.act.values(beta)  # any constant near m: r is then free of cancellation
        f, slope = f - base, alpha * slope

        def mean_of(v):
            return np.einsum("bn,bn->b", w, v)

        mean, a = mean_of(f), mean_of(slope)
        r, dr = f - mean[:, None] - a[:, None] * z, slope - a[:, None]
        rest, steep = mean_of(r * r), mean_of(dr * dr)
        excess = steep - rest  # of C'(1), unnormalised
        q_excess = a * mean_of((z * z - 1) * dr) + mean_of(z * r * dr)
        shift = mean + base[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            if not self.sign:
                v = a * a + rest
                balance = (q_excess - rest - (q_slope - 1) * v) / excess
                return np.log(excess / v), balance, 1 / np.sqrt(v), -shift
            v = a * a + steep
            c = self.sign * np.sqrt(excess)
            balance = (q_excess + c * mean_of(z * dr) - steep - (q_slope - 1) * v) / steep
            _, bend = self.act.prime.values_slopes(alpha * z + beta)
            return np.log(alpha[:, 0] ** 4 * mean_of(bend * bend) / v), balance, 1 / np.sqrt(v), c - shift


def _nodes(breaks: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and weights (B, n) for z ~ N(0, 1), panels split where alpha z + beta meets a break."""
    own = np.clip((breaks[None] - beta) / alpha, -REACH, REACH)
    unit = np.broadcast_to(np.linspace(-REACH, REACH, 11), (len(own), 11))
    edges = np.sort(np.concatenate([unit, own], axis=1), axis=1)
    used = np.any(np.diff(edges, axis=1) > 0, axis=0)  # most breaks lie beyond the reach of a small alpha
    edges = edges[:, np.concatenate([used, [True]])] if not used.all() else edges
    z, w = panel_nodes(edges)
    return z, w * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
