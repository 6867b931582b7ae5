r"""One-dimensional Gaussian expectations E[f(m + sqrt(q) z)], z ~ N(0, 1).

Panelled Gauss-Legendre: panel edges are the Gaussian's own (one a standard deviation) and the function's
(`Activation.breaks`: kinks, and wherever it bends), so the same rule is right for q from 1e-8 to 1e8. Gauss-Hermite is
not: 201 nodes miss E[tanh'^2] at q = 1e4 by a factor of 17.

Concrete q: float64 in NumPy, with an error estimate from two orders. Traced q: the same panels in jax.numpy, in q's
dtype. The derivative in q is again an expectation, d/dq E[f] = E[u f'(u)] / (2 q), plus kappa * jump * density for each
jump of f: no second derivative is taken of a kink, and nothing is divided by zero at q = 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, QuadratureError
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import mean_form, recognise
from initjax.gaussian.nodes import FAR_REACH, LOW_ORDER, ORDER, REACH, panel_nodes, unit_edges
from initjax.gaussian.taylor import is_recording, recorded
from initjax.trace.jaxpr import is_traced

TOLERANCE = 1e-9  # an estimated relative error above this is an error, not a result
_SMALLEST_Q = 1e-30
_NOTHING = 1e-280  # an expectation below this is zero to float64
_LARGEST_Q = 1e8
_CHUNK = 4_000_000  # nodes evaluated at once


def check_q(q, name: str = "q") -> np.ndarray:
    """q as float64, refused when negative, complex, NaN or infinite."""
    value = np.asarray(q)
    if value.dtype.kind not in "fiub":
        raise InputError(
            f"{name} = {q!r} has dtype {value.dtype}.",
            "real numbers >= 0.",
            f"{name} is a variance.",
            "take the real part, or the absolute value squared, before calling.",
        )
    value = value.astype(np.float64)
    if not np.all(np.isfinite(value)) or np.any(value < 0):
        bad = value[~(np.isfinite(value) & (value >= 0))].ravel()[0]
        raise InputError(
            f"{name} = {bad} (entry of an array of shape {value.shape})." if value.ndim else f"{name} = {bad}.",
            f"finite numbers >= 0 (checked to full accuracy from 1e-8 to {_LARGEST_Q:g}).",
            f"{name} is the variance of a Gaussian pre-activation.",
            "pass a second moment E[h^2], not a correlation or a logarithm.",
        )
    return value


def gaussian_rule(act: Activation, mean: np.ndarray, q: np.ndarray, order: int = ORDER, reach: float = REACH):
    """Nodes u and weights (B, n) with sum(weights * f(u)) = E[f(mean + sqrt(q) z)], for mean and q of shape (B,)."""
    root = np.sqrt(np.maximum(q, _SMALLEST_Q))
    breaks = act.breaks(float(np.max(np.abs(mean) + reach * root, initial=0.0)))
    own = np.clip((breaks - mean[:, None]) / root[:, None], -reach, reach)
    edges = np.sort(np.concatenate([np.broadcast_to(unit_edges(reach), (q.size, unit_edges(reach).size)), own], axis=1))
    z, w = panel_nodes(edges, order)
    return mean[:, None] + root[:, None] * z, w * np.exp(-z * z / 2) / np.sqrt(2 * np.pi), z


def _panels_per_q(act: Activation, q_max: float) -> int:
    return len(act.breaks(REACH * float(np.sqrt(q_max)))) + unit_edges(REACH).size


def host_rule(act: Activation, functional, q: np.ndarray, outputs: int, mean: np.ndarray | None = None) -> np.ndarray:
    """E[functional(u, f(u), f'(u))] -> (outputs, *q.shape), in float64, with the error checked.

    `functional` maps node arrays (u, f, f') to a list of `outputs` arrays.
    """
    flat = q.ravel()
    shift = np.zeros_like(flat) if mean is None else np.broadcast_to(mean, q.shape).ravel()
    result = np.empty((outputs, flat.size))
    order = np.argsort(flat, kind="stable")
    start = 0
    while start < flat.size:
        # neighbours in q share their cells; a chunk spans at most two decades, so that few empty panels are carried
        q_low = max(float(flat[order[start]]), _SMALLEST_Q)
        stop = int(np.searchsorted(flat[order], 100 * q_low, side="right"))
        stop = max(stop, start + 1)
        nodes = _panels_per_q(act, max(float(flat[order[stop - 1]]), 1e-8)) * ORDER
        stop = min(stop, start + max(1, _CHUNK // nodes))
        part = order[start:stop]
        result[:, part] = _checked(act, functional, shift[part], flat[part])
        start = stop
    return result.reshape((outputs, *q.shape))


def _checked(act, functional, mean, q):
    reach = FAR_REACH if act.grows_fast else REACH
    value, error, lost = _estimated(act, functional, mean, q, reach)
    beyond = ((lost > 1e-12) | (value == 0)).any(axis=0)
    if beyond.any() and reach < FAR_REACH:  # relu(x - 1) at q = 1e-3: all there is lies beyond
        again = _estimated(act, functional, mean[beyond], q[beyond], FAR_REACH)
        value[:, beyond], error[:, beyond], lost[:, beyond] = again
    bad = (~np.isfinite(value) | (error > TOLERANCE) | (lost > 1e-12)).any(axis=0)
    if bad.any():
        worst = float(np.max(np.nan_to_num(np.maximum(error, lost)[:, bad], nan=np.inf)))
        raise QuadratureError(
            f"E[f(sqrt(q) z)] for f = {act.name} at q = {float(q[bad][0]):.6g}: estimated relative error {worst:.1e}.",
            f"expectations that exist and are resolved to {TOLERANCE:g}.",
            "the function grows, oscillates or jumps faster than the quadrature follows at this q, overflows, or is "
            "rounding at arguments of this size.",
            "use a smaller q, declare kinks with ij.Activation(fn, kinks=...), or a numerically stable form.",
        )
    return value


def _estimated(act, functional, mean, q, reach):
    """Values, estimated relative errors (at every sixteenth q, else 0), and the share near the ends."""
    value, magnitude, outside = _sum(act, functional, *gaussian_rule(act, mean, q, reach=reach), reach)
    few = slice(0, q.size, max(1, q.size // 16))
    coarse, _, _ = _sum(act, functional, *gaussian_rule(act, mean[few], q[few], LOW_ORDER, reach), reach)
    magnitude, error = np.maximum(magnitude, _NOTHING), np.zeros_like(value)
    with np.errstate(invalid="ignore"):
        error[:, few] = np.abs(coarse - value[:, few]) / magnitude[:, few]
    return value, error, outside / magnitude


def _sum(act, functional, u, w, z, reach):
    f, slope = act.values_slopes(u)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = functional(u, f, slope)
        value = np.stack([np.einsum("bn,bn->b", t, w) for t in terms])
        magnitude = np.stack([np.einsum("bn,bn->b", np.abs(t), w) for t in terms])
        outer = w * (np.abs(z) > reach - 1)
        outside = np.stack([np.einsum("bn,bn->b", np.abs(t), outer) for t in terms])
    return value, magnitude, outside


# -- traced values ---------------------------------------------------------------------------------------------------


def traced_rule(act: Activation, mean: jax.Array, q: jax.Array, order: int = ORDER) -> tuple[jax.Array, jax.Array]:
    """`gaussian_rule` for traced q and mean of one shape: nodes and weights with one more axis."""
    dtype = q.dtype
    reach = 18.0 if act.grows_fast else REACH
    root = jnp.sqrt(jnp.maximum(q, jnp.asarray(_SMALLEST_Q, dtype)))[..., None]
    breaks = jnp.asarray(_all_breaks(act, reach), dtype)
    unit = jnp.asarray(unit_edges(reach), dtype)
    breaks, unit = (jnp.reshape(b, (1,) * q.ndim + (-1,)) for b in (breaks, unit))
    own = jnp.clip((breaks - mean[..., None]) / root, -reach, reach)
    edges = jnp.sort(jnp.concatenate([jnp.broadcast_to(unit, q.shape + unit.shape[-1:]), own], axis=-1), axis=-1)
    nodes, weights = (jnp.asarray(a, dtype) for a in np.polynomial.legendre.leggauss(order))
    nodes, weights = (jnp.reshape(a, (1,) * (q.ndim + 1) + (-1,)) for a in (nodes, weights))
    middle, half = (
        ((edges[..., 1:] + edges[..., :-1]) / 2)[..., None],
        ((edges[..., 1:] - edges[..., :-1]) / 2)[..., None],
    )
    z = jnp.reshape(middle + half * nodes, q.shape + (-1,))
    w = jnp.reshape(half * weights, q.shape + (-1,)) * jnp.exp(-z * z / 2) / np.sqrt(2 * np.pi).astype(dtype)
    return mean[..., None] + root * z, w


@functools.lru_cache(maxsize=256)
def _all_breaks(act: Activation, reach: float) -> tuple[float, ...]:
    """The cells that any q may need; fewer where the activation overflows or oscillates without end."""
    for q_max in (_LARGEST_Q, 1e6, 1e4, 1e3, 100.0):
        try:
            breaks = act.breaks(reach * np.sqrt(q_max))
        except QuadratureError:
            continue
        if breaks.size <= 1500:
            return tuple(breaks)
    return tuple(act.breaks(reach))


def expect(f, q):
    """E[f(sqrt(q) z)] for z ~ N(0, 1), of the shape of q.

    Parameters
    ----------
    f : elementwise JAX callable or `Activation`.
    q : variances >= 0, any shape. At q = 0 the limit q -> 0+ is returned.

    Returns
    -------
    NumPy float64 for concrete q; for traced q an array in q's dtype, differentiable in q.

    Raises
    ------
    InputError : q negative, complex, NaN or infinite.
    QuadratureError : the expectation does not exist or is not resolved to 1e-9.

    Accuracy
    --------
    1e-13 relative to E|f| for q in [1e-8, 1e8]; float32 tracers: about 1e-6.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from initjax.gaussian import expect
    >>> print(f"{expect(lambda x: jnp.tanh(x) ** 2, 1.0):.12f}")
    0.394294490398
    """
    act = as_activation(f)
    if is_traced(q):
        return recorded((act,), jnp.asarray(q)) if is_recording() else _expect(act, jnp.asarray(q))
    q = check_q(q)
    member = recognise(act)
    if member is not None:
        with np.errstate(over="ignore"):
            value = mean_form(member, np, q)
        if np.all(np.isfinite(value)):
            return scalar(value)
    return scalar(host_rule(act, lambda u, f, slope: [f], q, 1)[0])


def scalar(value):
    """A 0-d array as a NumPy scalar, which prints and formats like a Python float."""
    return np.float64(value) if np.ndim(value) == 0 else value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _expect(act: Activation, q: jax.Array) -> jax.Array:
    member = recognise(act)
    if member is not None:
        return mean_form(member, jnp, q)
    u, w = traced_rule(act, jnp.zeros_like(q), q)
    return jnp.sum(act.fn(u) * w, axis=-1)


@_expect.defjvp
def _expect_jvp(act, primals, tangents):
    (q,), (dq,) = primals, tangents
    # at q = 0 the quotient is taken just beside 0, where it has its limit to rounding
    safe = jnp.maximum(q, jnp.asarray(1e-10 if q.dtype == jnp.float64 else 1e-5, q.dtype))
    slope = _expect(act.euler, safe)
    for point, jump in act.jumps:
        slope = slope + point * jump * density(point, safe)
    return _expect(act, q), dq * slope / (2 * safe)


def density(x, q):
    """Density of N(0, q) at x."""
    return jnp.exp(-(x * x) / (2 * q)) / jnp.sqrt(2 * np.pi * q)
