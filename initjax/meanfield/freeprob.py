r"""The spectrum of a free product of random layers, traced as a curve.

J J^T of L independent layers W D has the S-transform (S_W S_{D^2})^L. With z = M(w) = E[x / (w - x)], x = phi'^2, and
Var W = sigma^2 / n its eigenvalues lambda satisfy
    log lambda = log((1 + z) / z) + L log(sigma^2 z w)   [- L log(1 + z) for orthogonal W],
and the density is -Im(1 + z) / (pi lambda) where w is the solution in the upper half plane. The equation is not solved
for w at given lambda: the curve of all solutions is followed from the upper edge (w real) to lambda = 0, by Newton's
method from one node of alpha = -arg z in (0, pi) to the next. In alpha everything is analytic up to both ends, so that
Gauss-Legendre nodes integrate the density to rounding, square-root edge and power at zero included.
A density at given lambda is found by continuation in Im log lambda, then in lambda: slower, but alpha need not grow.

Sources: Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735) and 2018 (arXiv:1802.09979), for the S-transforms; the
parametrization by arg z is derived here.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.nodes import panel_nodes
from initjax.trace.jaxpr import float64

_NEWTON = 3
_ORDER = 32  # nodes of one panel of the curve
_HEIGHT, _FLOOR, _STEPS = 3.0, 1e-11, 90  # Im log lambda, from where the solution is unique to where it is read off


class Law(NamedTuple):
    """A batch of products: the measure of x = phi'^2 (rows sum to 1), log sigma^2, layers, and 1 for orthogonal."""

    x: Any
    weight: Any
    log_variance: Any
    depth: Any
    orthogonal: Any


class Curve(NamedTuple):
    """log lambda, lambda * density and mass at the nodes, (batch, points), largest lambda first; residual of Newton."""

    log_eigenvalue: np.ndarray
    scaled_density: np.ndarray
    mass: np.ndarray
    residual: np.ndarray


@contextlib.contextmanager
def _plain():
    """float64, and complex numbers beside real ones whatever the user's promotion rules."""
    with float64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _parts(law: Law, w):
    """log z, log(1 + z) and their derivatives in w; 1 + z = w E[1 / (w - x)] loses nothing near z = -1."""
    r = 1 / (w[..., None] - law.x)
    z, z_w = jnp.sum(law.weight * law.x * r, -1), -jnp.sum(law.weight * law.x * r * r, -1)
    one = w * jnp.sum(law.weight * r, -1)
    return jnp.log(z), jnp.log(one), z_w / z, z_w / one


def _log_lambda(law: Law, w):
    """log lambda(w) and its derivative, log z and its derivative, log(1 + z)."""
    log_z, log_one, dz, done = _parts(law, w)
    rest = 1 - law.orthogonal * law.depth
    value = rest * log_one - log_z + law.depth * (law.log_variance + log_z + jnp.log(w))
    return value, rest * done - dz + law.depth * (dz + 1 / w), log_z, dz, log_one


def _step(imaginary, angle, a, b):
    """dw with Im(a dw) = -imaginary and Im(b dw) = -angle."""
    determinant = a.imag * b.real - a.real * b.imag
    real = (angle * a.real - imaginary * b.real) / determinant
    return real + 1j * (imaginary * b.imag - angle * a.imag) / determinant


def _inside(w, dw):
    """w + dw, or nine tenths of the way to the real axis if it would cross it."""
    reach = jnp.where(dw.imag < 0, 0.9 * w.imag / jnp.where(dw.imag < 0, -dw.imag, 1.0), jnp.inf)
    return w + jnp.minimum(1.0, reach) * dw


def _angles(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of alpha on (0, pi), in panels that halve towards pi, where log lambda diverges."""
    panels = max(1, points // _ORDER)
    edges = np.pi * np.concatenate([1 - 0.5 ** np.arange(panels), [1.0]])
    orders = np.full(panels, points // panels)
    orders[: points % panels] += 1
    pieces = [panel_nodes(edges[i : i + 2], int(order)) for i, order in enumerate(orders)]
    return tuple(np.concatenate(v) for v in zip(*pieces, strict=True))  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames=("points",))
def _traced(law: Law, edge, points: int):
    alpha, weights = (jnp.asarray(v) for v in _angles(points))

    def node(w, a):
        for _ in range(_NEWTON):
            value, slope, log_z, dz, _ = _log_lambda(law, w)
            w = _inside(w, _step(value.imag, log_z.imag + a, slope, dz))
        value, slope, log_z, dz, log_one = _log_lambda(law, w)
        along = (slope * _step(jnp.zeros_like(a), jnp.ones_like(a), slope, dz)).real  # d log lambda / d alpha
        scaled = -jnp.exp(log_one).imag / jnp.pi
        residual = jnp.abs(value.imag) + jnp.abs(log_z.imag + a)
        return w, (value.real, scaled, -along * scaled, residual)

    start = edge + 0j
    start = start - 1j * alpha[0] / _parts(law, start)[2].real
    _, (log_eigenvalue, scaled, mass, residual) = jax.lax.scan(node, start, alpha)
    return log_eigenvalue.T, scaled.T, (mass * weights[:, None]).T, residual.T


@jax.jit
def _edges(law: Law):
    """The real w beyond max x at which log lambda is least, and whether there is one."""
    top = jnp.max(jnp.where(law.weight > 0, law.x, 0.0), -1)

    def slope(s):
        return _log_lambda(law, top * (1 + jnp.exp(s)) + 0j)[1].real

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        falls = slope(middle) < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    low, high = jnp.full_like(top, -30.0), jnp.full_like(top, 12.0)
    found = (slope(low) < 0) & (slope(high) > 0)
    s = jax.lax.fori_loop(0, 60, halve, (low, high))[0]
    w = top * (1 + jnp.exp(s))
    return w, _log_lambda(law, w + 0j)[0].real, found


def edges(law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Upper edge: w, log lambda_max, and whether the largest eigenvalues form an edge (else an atom)."""
    with _plain():
        return tuple(np.asarray(v) for v in _edges(_on_device(law)))  # pyright: ignore[reportReturnType]


def traced(law: Law, edge: np.ndarray, points: int) -> Curve:
    """The density on `points` nodes for every product of the batch."""
    with _plain():
        return Curve(*(np.asarray(v) for v in _traced(_on_device(law), jnp.asarray(edge), points)))


def _newton(law, target, steps):
    def step(w, _):
        value, slope, *_ = _log_lambda(law, w)
        dw = -(value - target) / slope
        return _inside(w, dw * jnp.minimum(1.0, 0.5 * jnp.abs(w) / jnp.maximum(jnp.abs(dw), 1e-300))), None

    return lambda w: jax.lax.scan(step, w, None, length=steps)[0]


@jax.jit
def _lowered(law: Law, log_eigenvalue):
    """w at Im log lambda = 0+, from where the solution is unique."""
    heights = jnp.geomspace(_HEIGHT, _FLOOR, _STEPS)
    top = jnp.max(jnp.where(law.weight > 0, law.x, 0.0), -1)
    start = jnp.exp((log_eigenvalue + 1j * _HEIGHT) / (1 + law.depth)) * top
    return jax.lax.scan(lambda w, h: (_newton(law, log_eigenvalue + 1j * h, 8)(w), None), start, heights)[0]


@jax.jit
def _followed(law: Law, w, log_eigenvalue):
    def node(w, s):
        w = _newton(law, s + 1j * _FLOOR, 12)(w)
        value, _, _, _, log_one = _log_lambda(law, w)
        return w, (-jnp.exp(log_one).imag / jnp.pi, jnp.abs(value - s - 1j * _FLOOR))

    return jax.lax.scan(node, w, log_eigenvalue)[1]


def followed(law: Law, log_eigenvalue: np.ndarray, edge=None) -> tuple[np.ndarray, np.ndarray]:
    """lambda * density and residual of one product at given log lambda, largest first; `edge` = (w, log lambda_max)."""
    with _plain():
        law, s = _on_device(law), jnp.asarray(log_eigenvalue)[:, None]
        if edge is None:
            start = _lowered(law, s[0])
        else:  # log lambda = log lambda_max + curvature (w - w_max)^2 / 2
            w, log_edge = (jnp.asarray(v) + 0j for v in edge)
            rise = (_log_lambda(law, w * 1.0001)[1] - _log_lambda(law, w * 0.9999)[1]) / (2e-4 * w)
            start = w + 1j * jnp.sqrt(2 * (log_edge - s[0]) / rise)
        scaled, residual = _followed(law, start, s)
        return np.asarray(scaled)[:, 0], np.asarray(residual)[:, 0]


def density_at(law: Law, log_eigenvalue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same at each log lambda on its own, from high above the real axis."""
    with _plain():
        law = Law(*(jnp.repeat(v, len(log_eigenvalue), axis=0) for v in _on_device(law)))
        s = jnp.asarray(log_eigenvalue)
        scaled, residual = _followed(law, _lowered(law, s), s[None])
        return np.asarray(scaled)[0], np.asarray(residual)[0]


def _on_device(law: Law) -> Law:
    return Law(*(jnp.asarray(v, jnp.float64) for v in law))
