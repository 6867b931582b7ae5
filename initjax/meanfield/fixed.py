r"""Fixed points of the variance and correlation maps of one fully connected layer.

    q -> sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2,    c -> [sigma_w^2 E[phi(u) phi(v)] + sigma_b^2] / q
Sources: Poole et al. 2016 (arXiv:1606.05340), eqs. 3-7; Schoenholz et al. 2017 (arXiv:1611.01232), eqs. 5-9.
"""

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.dual import _pair
from initjax.gaussian.expect import check_q, scalar
from initjax.meanfield.correlation import attracting_correlation
from initjax.meanfield.results import FixedPoint
from initjax.meanfield.solve import attractor, attractors, grid_of
from initjax.meanfield.table import ramp, raw_moments, slope_at_zero, table_of, vanishes_at_zero
from initjax.trace.jaxpr import is_traced

_SWEEP_FROM = 4096  # points from which one compiled sweep is faster than NumPy
_LARGEST_SIGMA = 1e50  # variances, and their products with q, stay finite
CRITICAL_WITHIN = 1e-9  # |chi_1 - 1| below this is called critical; chi_1 itself is accurate to about 1e-12


def check_sigma(value, name: str) -> np.ndarray:
    """A standard deviation as float64, refused when negative, complex, NaN or infinite."""
    array = np.asarray(value)
    if array.dtype.kind in "fiub":
        array = array.astype(np.float64)  # before comparing: 1e50 is no float32
    if array.dtype != np.float64 or not np.all(array <= _LARGEST_SIGMA) or np.any(array < 0):
        raise InputError(
            f"{name} = {value}.",
            f"finite real numbers >= 0, at most {_LARGEST_SIGMA:g}.",
            f"{name} is a standard deviation: Var "
            + ("W = sigma_w^2 / fan_in." if name == "sigma_w" else "b = sigma_b^2."),
            f"pass the standard deviation, not its logarithm; a variance v enters as {name} = v**0.5.",
        )
    return array


def fixed_point(phi, sigma_w, sigma_b=0.0, q0=1.0) -> FixedPoint:
    """The state an infinitely deep network tends to, its phase and its depth scales.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : standard deviations >= 0 (Var W = sigma_w^2 / fan_in, Var b = sigma_b^2); they broadcast.
    q0 : second moment of the first pre-activations, > 0. It matters where several fixed points attract (bistable
        gelu, silu) and for scale-invariant networks.

    Returns
    -------
    FixedPoint with q, c, chi_1, chi_q, chi_c, xi_q, xi_c, xi_grad (depths in layers) and phase.

    Raises
    ------
    InputError : negative, complex, NaN or infinite input; phi not elementwise.
    QuadratureError : the moments of phi are not resolved.

    Accuracy
    --------
    q 1e-12, chi 1e-11, c 1e-10 relative for concrete input; about 1e-5 for float32 tracers. Traced results are
    differentiable, and their phase is None.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> point = ij.fixed_point(jnp.tanh, 1.5, 0.05)
    >>> print(f"{point.q:.8f} {point.c:.8f} {point.chi_1:.8f} {point.phase}")
    0.79838711 0.05208624 1.13670778 chaotic

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3-7; Schoenholz et al. 2017 (arXiv:1611.01232), eqs. 5, 9, 12.
    """
    act = as_activation(phi)
    if is_traced(sigma_w, sigma_b, q0):
        return _traced(act, sigma_w, sigma_b, q0)
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    q0 = check_q(q0, "q0")
    w, b, q0 = np.broadcast_arrays(w, b, q0)
    point = _concrete(act, w.ravel(), b.ravel(), q0.ravel())
    point["c"], point["chi_c"] = _correlations(act, w.ravel(), b.ravel(), point)
    return _assemble(point, w.shape)


def variance_part(act: Activation, w: np.ndarray, b: np.ndarray, q0: np.ndarray) -> dict:
    """q, chi_1, chi_q, M and phase for flat arrays; everything but the correlations."""
    return _concrete(act, w, b, q0)


def _concrete(act, w, b, q0) -> dict:
    table = table_of(act)
    vw, vb = w * w, b * b
    slopes = ramp(act)
    dead = (vb == 0) & vanishes_at_zero(act)
    if slopes is not None:
        half = (slopes[0] ** 2 + slopes[1] ** 2) / 2
        a = vw * half
        neutral = np.abs(a - 1) < 1e-14  # sqrt(2)^2 is 1 + 4e-16 times 2
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(neutral, np.where(vb == 0, q0, np.inf), np.where(a < 1, vb / (1 - a), np.inf))
        q = np.where(dead & (q0 == 0), 0.0, q)
        one = np.where(neutral, 1.0, a)
        return dict(q=q, chi_1=one, chi_q=one, m=half * q, phase=_phase(one, q), homogeneous=True)
    start = np.where(q0 == 0, np.where(dead, 1e-300, 1e-19), q0)
    if np.min(table.rows[:, 2, 0]) < 0:  # a falling variance map can throw q past a crossing: follow it first
        for _ in range(200):
            start = np.clip(vw * table(np, start).m + vb, table.q_low, table.q_high)
    if w.size > _SWEEP_FROM:
        from initjax.meanfield.sweep import sweep_variance

        q, chi_1, chi_q, m = sweep_variance(act, vw, vb, start)
        q = np.where((q == 0) & ~dead, vb + vw * table(np, np.array([table.q_low])).m, q)
        inside = (q > 0) & np.isfinite(q)
        safe, d = np.where(inside, q, 1.0), chi_1 / np.maximum(vw, 1e-300)
        return _finish(act, table, vw, vb, dead, q, safe, inside, m, d, chi_q)
    q = attractors(table, vw, vb, start)
    q = np.where((q == 0) & ~dead, vb + vw * table(np, np.array([table.q_low])).m, q)
    inside = (q > 0) & np.isfinite(q)
    safe = np.where(inside, q, 1.0)
    t = table(np, safe)
    m, d, chi_q = t.m, t.d, vw * t.m * t.r / safe
    return _finish(act, table, vw, vb, dead, q, safe, inside, m, d, chi_q)


def _finish(act, table, vw, vb, dead, q, safe, inside, m, d, chi_q) -> dict:
    """Polish where the table's rounding is amplified, fill in q = 0 and q = inf, name the phases."""
    # at sigma_w^2 D(0) = 1 itself, V - q is of higher order in q, and a root this small is its rounding
    marginal = dead & (q < 1e-8) & (np.abs(vw * slope_at_zero(act) - 1) < 1e-14)
    q, inside = np.where(marginal, 0.0, q), inside & ~marginal
    weak = inside & (np.abs(1 - chi_q) < 0.01)
    if weak.any() and weak.sum() <= 20_000:  # the table's 1e-13 is amplified by 1 / (1 - chi_q)
        for _ in range(2):
            exact = raw_moments(act, safe[weak])
            slope = vw[weak] * exact[2] / safe[weak]
            move = (vw[weak] * exact[0] + vb[weak] - safe[weak]) / np.where(slope == 1, np.inf, 1 - slope)
            safe[weak] = np.where(np.abs(move) < 0.01 * safe[weak], safe[weak] + move, safe[weak])
            safe[weak] = exact_q = np.maximum(safe[weak], 1e-30)
        m[weak], d[weak], energy = raw_moments(act, exact_q)
        chi_q[weak] = vw[weak] * energy / exact_q
        q = np.where(weak, safe, q)
    zero = q == 0
    far = ~np.isfinite(q)
    end = table(np, np.array([table.q_high]))
    at_zero = slope_at_zero(act)
    chi_1 = np.where(zero, vw * at_zero, np.where(far, vw * end.d[0], vw * d))
    chi_q = np.where(zero, vw * at_zero, np.where(far, vw * (end.m * end.r)[0] / table.q_high, chi_q))
    return dict(q=q, chi_1=chi_1, chi_q=chi_q, m=np.where(zero, 0.0, m), phase=_phase(chi_1, q), homogeneous=False)


def _phase(chi_1, q):
    phase = np.where(chi_1 < 1, "ordered", "chaotic").astype("<U15")
    phase[np.abs(chi_1 - 1) < CRITICAL_WITHIN] = "critical"
    phase[~np.isfinite(q)] = "unbounded"
    return phase


def _correlations(act, w, b, point):
    c, chi_c = np.ones_like(w), np.array(point["chi_1"], copy=True)
    for i in np.flatnonzero((point["phase"] == "chaotic") & (point["q"] > 0)):
        delta, chi_c[i] = attracting_correlation(act, point["q"][i], point["m"][i], w[i] ** 2, b[i] ** 2)
        c[i] = 1 - delta
    return without_attractor(point, c, chi_c)


def without_attractor(point, c, chi_c):
    """nan where no correlation attracts: q = inf, and q = 0, where every cosine is kept."""
    lost = ~np.isfinite(point["q"]) | (point["q"] == 0)
    return np.where(lost, np.nan, c), np.where(lost, np.nan, chi_c)


def depth_scale(chi):
    """-1 / ln|chi| in layers: inf at |chi| = 1 (within rounding), 0 at chi = 0."""
    size = np.abs(chi)
    with np.errstate(divide="ignore", invalid="ignore"):
        xi = -1 / np.log(size)
    return np.where(np.abs(size - 1) < 1e-13, np.inf, np.where(size == 0, 0.0, xi))


def _assemble(point, shape) -> FixedPoint:
    critical = point["phase"] == "critical"
    numbers = dict(
        q=point["q"],
        c=point["c"],
        chi_1=point["chi_1"],
        chi_q=point["chi_q"],
        chi_c=point["chi_c"],
        xi_q=np.where(np.isfinite(point["q"]), depth_scale(point["chi_q"]), np.nan),
        xi_c=np.where(critical & np.isfinite(point["c"]), np.inf, depth_scale(point["chi_c"])),
        xi_grad=np.where(critical, np.inf, depth_scale(point["chi_1"])),
    )
    phase = point["phase"].reshape(shape)
    return FixedPoint(
        **{k: scalar(np.asarray(v).reshape(shape)) for k, v in numbers.items()},
        phase=str(phase) if phase.ndim == 0 else phase,
    )


def _traced(act, sigma_w, sigma_b, q0) -> FixedPoint:
    """The same in jax.numpy and the tracers' dtype; one Newton step outside the solver carries the derivative."""
    dtype = jnp.result_type(*(a for a in (sigma_w, sigma_b, q0) if is_traced(a)))
    w, b, q0 = jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in (sigma_w, sigma_b, q0)))
    vw, vb = w * w, b * b
    table = table_of(act)
    grid = grid_of(table)
    low = np.finfo(np.float32).tiny * 1e4 if dtype != jnp.float64 else 0.0
    moments, grid = table(np, grid).m[grid > low], grid[grid > low]
    stop = jax.lax.stop_gradient
    flat = [jnp.ravel(stop(a)) for a in (vw, vb, jnp.maximum(q0, jnp.asarray(1e-18, dtype)))]
    root = attractor(jnp, table, jnp.asarray(grid, dtype), jnp.asarray(moments, dtype), *flat)
    root = jnp.reshape(root, w.shape)
    inside = (root > 0) & jnp.isfinite(root)
    safe = jnp.where(inside, root, jnp.ones_like(root))
    t = table(jnp, safe)
    slope = stop(vw) * t.m * t.r / safe
    q = safe + (vw * t.m + vb - stop(vw * t.m + vb)) / (1 - slope)
    t = table(jnp, q)
    chi_1, chi_q = vw * t.d, vw * t.m * t.r / q

    def bisect(_, bounds):
        x_low, x_high = bounds
        x = (x_low + x_high) / 2
        delta = jnp.exp(x)
        gap = stop(vw) * (stop(t.m) - _pair(act, act, stop(q), stop(q), 1 - delta)) / (stop(q) * delta) - 1
        return jnp.where(gap > 0, x, x_low), jnp.where(gap > 0, x_high, x)

    bounds = (jnp.full_like(q, -30.0 if dtype == jnp.float64 else -13.0), jnp.zeros_like(q))
    low_x, high_x = jax.lax.fori_loop(0, 50 if dtype == jnp.float64 else 26, bisect, bounds)
    c0 = jnp.where(stop(chi_1) > 1, 1 - jnp.exp((low_x + high_x) / 2), jnp.ones_like(q))
    chi_c = vw * _pair(act.prime, act.prime, q, q, c0)
    image = (vw * _pair(act, act, q, q, c0) + vb) / q
    c = jnp.where(stop(chi_1) > 1, c0 + (image - stop(image)) / (1 - stop(chi_c)), c0)
    nan = jnp.full_like(q, jnp.nan)
    keep = lambda x, other: jnp.where(inside, x, other)  # noqa: E731
    xi = lambda chi: -1 / jnp.log(jnp.abs(chi))  # noqa: E731
    return FixedPoint(
        q=keep(q, root),
        c=keep(c, nan),
        chi_1=chi_1,
        chi_q=chi_q,
        chi_c=keep(chi_c, nan),
        xi_q=keep(xi(chi_q), nan),
        xi_c=keep(xi(chi_c), nan),
        xi_grad=xi(chi_1),
        phase=None,
    )
