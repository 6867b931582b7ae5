"""The primary critical point as a function of a traced sigma_b."""

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation
from initjax.meanfield.line import attracts_from_above, critical_line
from initjax.meanfield.results import CriticalPoint
from initjax.meanfield.table import ramp, raw_moments, slope_at_zero, table_of, vanishes_at_zero


def traced_point(act: Activation, sigma_b: jax.Array) -> CriticalPoint:
    """The primary point as a function of a traced sigma_b: interpolated from the line, one implicit-function step."""
    dtype = sigma_b.dtype
    nan = jnp.full(sigma_b.shape, jnp.nan, dtype)
    slopes = ramp(act)
    if slopes is not None:
        sigma_w = jnp.full(sigma_b.shape, 1 / np.sqrt((slopes[0] ** 2 + slopes[1] ** 2) / 2), dtype)
        exists = sigma_b == 0
        return CriticalPoint(
            jnp.where(exists, sigma_w, nan), sigma_b, nan, jnp.where(exists, 1 + 0 * nan, nan), exists, None
        )
    q, stable = _traced_q(act, jax.lax.stop_gradient(sigma_b))
    table = table_of(act)
    safe = jnp.where(q > 0, q, jnp.ones_like(q))
    t = table(jnp, safe)
    slope = safe - t.m / t.d * (t.r - t.dlog_d)  # df / dlog q
    moved = sigma_b * sigma_b - jax.lax.stop_gradient(sigma_b * sigma_b)
    safe = safe * (1 + moved / jax.lax.stop_gradient(slope))
    t = table(jnp, safe)
    at_zero = 1 / np.sqrt(max(slope_at_zero(act), 1e-300))
    return CriticalPoint(
        jnp.where(q > 0, 1 / jnp.sqrt(t.d), jnp.where(q == 0, jnp.asarray(at_zero, dtype), nan)),
        sigma_b,
        jnp.where(q > 0, safe, q),
        jnp.where(q > 0, t.m * t.r / (safe * t.d), jnp.where(q == 0, jnp.ones_like(q), nan)),
        stable,
        None,
    )


def _traced_q(act: Activation, sigma_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Primary q for stopped, traced sigma_b, by bisection of log f on each rising or falling stretch of the line."""
    line = critical_line(act)
    dtype = sigma_b.dtype
    use = np.isfinite(line.f)
    grid, f = np.log(line.q[use]), line.f[use]
    m, d, energy = raw_moments(act, np.exp(grid))
    steady = np.abs(energy / (np.exp(grid) * d)) < 1
    target = jnp.ravel(sigma_b * sigma_b)[:, None]
    row, x = jnp.asarray(f, dtype)[None, :], jnp.asarray(grid, dtype)
    cross = (row[:, :-1] - target) * (row[:, 1:] - target) < 0
    cross = cross & jnp.asarray(np.abs(f[1:]) > 4 * line.noise[use][1:])[None, :]
    good = cross & jnp.asarray(steady[:-1] & steady[1:])[None, :]
    chosen = jnp.where(jnp.any(good, axis=1), jnp.argmax(good, axis=1), jnp.argmax(cross, axis=1))
    left, right = row[0, chosen], row[0, chosen + 1]
    # f is a power of q on each cell to good accuracy where it is positive
    positive = (left > 0) & (right > 0)
    tiny = jnp.asarray(1e-30, dtype)
    log = lambda v: jnp.log(jnp.maximum(v, tiny))  # noqa: E731
    share = jnp.where(
        positive,
        (log(target[:, 0]) - log(left)) / jnp.where(positive, log(right) - log(left), jnp.ones_like(left)),
        (target[:, 0] - left) / (right - left),
    )
    q = jnp.exp(x[chosen] + share * (x[chosen + 1] - x[chosen]))
    table = table_of(act)
    for _ in range(4):
        t = table(jnp, q)
        gap = q - t.m / t.d - target[:, 0]
        slope = q - t.m / t.d * (t.r - t.dlog_d)
        noise = jnp.asarray(4 * np.finfo(dtype).eps, dtype) * q
        step = jnp.clip(gap / slope, -0.05, 0.05)
        q = jnp.where(jnp.abs(gap) > noise, q * jnp.exp(-step), q)
    none = ~jnp.any(cross, axis=1)
    zero = (target[:, 0] == 0) & vanishes_at_zero(act)
    q = jnp.where(none, jnp.where(zero, jnp.zeros_like(q), jnp.full_like(q, jnp.nan)), q)
    stable = jnp.any(good, axis=1) | (zero & bool(vanishes_at_zero(act) and attracts_from_above(act)))
    return jnp.reshape(q, sigma_b.shape), jnp.reshape(stable, sigma_b.shape)
