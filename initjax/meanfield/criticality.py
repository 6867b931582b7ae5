r"""The edge of chaos: (sigma_w, q) with chi_1 = 1 at a fixed point of the variance map, for given sigma_b.

No two-dimensional root finding: every q > 0 lies on the critical line of exactly one pair
    sigma_w(q)^2 = 1 / D(q),    sigma_b(q)^2 = f(q) = q - M(q) / D(q)     (where f >= 0),
so the line is read off as a curve (line.py), and a given sigma_b^2 is looked up on it: all roots, each with chi_q =
M'(q) / D(q). A traced sigma_b is looked up by interpolation (tracedpoint.py).

Sources: Poole et al. 2016 (arXiv:1606.05340); Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), chapter 5, for the
classes; Hayou, Doucet, Rousseau 2019 (arXiv:1902.06853) for the edge of chaos.
"""

import warnings

import jax.numpy as jnp
import numpy as np

from initjax.errors import NoCriticalPointError, TracedParameterError, UnstableCriticalPointWarning
from initjax.gaussian.activation import Activation, as_activation
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.implicit import critical_in_parameters
from initjax.meanfield.line import SMOOTH_BELOW, attracts_from_above, bias_variance, critical_line
from initjax.meanfield.results import CriticalPoint
from initjax.meanfield.table import ramp, raw_moments, slope_at_zero, table_of, vanishes_at_zero
from initjax.meanfield.tracedpoint import traced_point
from initjax.trace.jaxpr import is_traced

_HALF_STABLE_WITHIN = 1e-7
_STABLE = 1 - 2e-14  # with slopes 0 and 1 (softshrink), chi_q = chi_1 = 1 up to rounding, and nothing attracts


def _roots(act: Activation, variance_b: float) -> np.ndarray:
    """Every q > 0 with f(q) = variance_b, increasing."""
    line = critical_line(act)
    gap = line.f - variance_b
    known = np.abs(gap) > 4 * line.noise  # where the sign is not rounding
    q, gap = line.q[known], gap[known]
    cross = np.flatnonzero(np.sign(gap[1:]) * np.sign(gap[:-1]) < 0)
    roots = []
    for i in cross:
        if not (np.isfinite(gap[i]) and np.isfinite(gap[i + 1])):
            continue
        roots.append(_refine(act, variance_b, q[i], q[i + 1]))
    return np.array(roots)


def _refine(act: Activation, variance_b: float, low: float, high: float) -> float:
    """Bracketed Newton in log q on the directly computed f."""
    table = table_of(act)
    x_low, x_high = np.log(low), np.log(high)
    rising = bias_variance(act, np.array([high]))[0][0] > variance_b
    x = (x_low + x_high) / 2
    for _ in range(60):
        q = np.exp(np.array([x]))
        f = bias_variance(act, q)[0][0] - variance_b
        t = table(np, q)
        slope = float((q - t.m / t.d * (t.r - t.dlog_d))[0])  # df / dlog q
        if (f > 0) == rising:
            x_high = x
        else:
            x_low = x
        move = -f / slope if slope else 0.0
        new = x + move
        if not x_low < new < x_high:
            new = (x_low + x_high) / 2
        if abs(new - x) < 2e-15 * max(1.0, abs(x)) or x_high - x_low < 1e-15:
            return float(np.exp(new))
        x = new
    return float(np.exp(x))


def _at(act: Activation, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sigma_w and chi_q on the critical line at q > 0."""
    m, d, energy = raw_moments(act, q)
    return 1 / np.sqrt(d), energy / (q * d)


def _points(act: Activation, sigma_b: float) -> list[CriticalPoint]:
    """All critical points at one sigma_b, smallest q first."""
    out = []
    at_zero = slope_at_zero(act)
    if sigma_b == 0 and vanishes_at_zero(act) and at_zero > 1e-30:
        sigma_w = np.float64(1 / np.sqrt(at_zero))
        if ramp(act) is not None:
            return [_point(sigma_w, 0.0, np.nan, 1.0, True, "scale-invariant")]
        out.append(_point(sigma_w, 0.0, 0.0, 1.0, attracts_from_above(act), "zero"))
    if ramp(act) is None:
        q = _roots(act, sigma_b**2)
        if q.size:
            for root, w, slope in zip(q, *_at(act, q), strict=True):
                half = abs(slope - 1) < _HALF_STABLE_WITHIN
                out.append(_point(w, sigma_b, root, slope, abs(slope) < _STABLE, "half-stable" if half else "regular"))
    return out


def _point(sigma_w, sigma_b, q, chi_q, stable, kind) -> CriticalPoint:
    return CriticalPoint(
        np.float64(sigma_w), np.float64(sigma_b), np.float64(q), np.float64(chi_q), np.bool_(stable), kind
    )


def _refusal(act: Activation, sigma_b: float) -> NoCriticalPointError:
    slopes = ramp(act)
    if slopes is not None:
        half = (slopes[0] ** 2 + slopes[1] ** 2) / 2
        why = (
            f"for a positively homogeneous activation chi_1 = {half:.6g} sigma_w^2 does not depend on q, and at "
            f"chi_1 = 1 the variance grows by sigma_b^2 = {sigma_b**2:.3g} in every layer, so no fixed point exists."
        )
        remedy = (
            f"sigma_b = 0, where every q is fixed at sigma_w = {1 / np.sqrt(half):.6g}." if half else "another phi."
        )
    else:
        line = critical_line(act)
        if not np.isfinite(line.f).any():
            why = "its derivative is zero almost everywhere, so chi_1 = 0 for every sigma_w."
            remedy = "an activation with a slope."
        else:
            best = int(np.argmax(line.f))
            if line.f[best] <= 4 * line.noise[best]:
                why = (
                    "on the line chi_1 = 1 the bias variance must be q - E[phi^2]/E[phi'^2], and that is negative for "
                    f"every q from {line.q[0]:.0e} to {line.q[-1]:.0e}: no sigma_b >= 0 is critical."
                )
                remedy = "a shifted or scaled activation, or normalization layers."
            else:
                why = (
                    "on the line chi_1 = 1 the bias variance is q - E[phi^2]/E[phi'^2], which never takes the value "
                    f"{sigma_b**2:.6g} for q from {line.q[0]:.0e} to {line.q[-1]:.0e}; its maximum there is "
                    f"{line.f[best]:.6g} at q = {line.q[best]:.3g}."
                )
                remedy = f"sigma_b below {np.sqrt(line.f[best]):.6g} but not 0, or ij.phase_diagram to see the line."
    return NoCriticalPointError(
        f"no sigma_w puts {act.name} on the edge of chaos at sigma_b = {sigma_b:g}.",
        "an activation and a sigma_b for which chi_1 = 1 at a fixed point of the variance map.",
        why,
        remedy,
    )


def critical_points(phi, sigma_b=0.0) -> tuple[CriticalPoint, ...]:
    """Every critical point at sigma_b, smallest q first (an unstable q = 0 included).

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_b : one bias standard deviation >= 0.

    Returns
    -------
    Tuple of CriticalPoint; empty if there is none.

    Raises
    ------
    InputError : sigma_b negative, NaN, infinite or not a scalar; phi not elementwise.

    Accuracy
    --------
    q and sigma_w 1e-12 relative; roots are searched for q from 1e-16 to 1e8.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> gelu = lambda x: jax.nn.gelu(x, approximate=False)
    >>> for p in ij.critical_points(gelu, 0.3):
    ...     print(f"sigma_w={p.sigma_w:.5f} q={p.q:.5f} chi_q={p.chi_q:.3f} stable={p.stable}")
    sigma_w=1.45047 q=1.42487 chi_q=1.046 stable=False

    References
    ----------
    Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), section 5.3.
    """
    act = as_activation(phi)
    b = check_sigma(sigma_b, "sigma_b")
    return tuple(_points(act, float(b.reshape(())))) if b.size == 1 else tuple(_refuse_batch(b))


def _refuse_batch(b):
    from initjax.errors import InputError

    raise InputError(
        f"sigma_b of shape {b.shape}.",
        "one sigma_b: the number of critical points differs from one sigma_b to the next.",
        "a ragged answer is no array.",
        "loop over sigma_b, or ij.critical for the primary point of each.",
    )


def _primary(points: list[CriticalPoint]) -> CriticalPoint | None:
    stable = [p for p in points if p.stable]
    return (stable or points or [None])[0]


def critical(phi, sigma_b=0.0) -> CriticalPoint:
    """The weight standard deviation that puts an infinitely wide network on the edge of chaos.

    Solves for (sigma_w, q):  q = sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2  and  sigma_w^2 E[phi'(sqrt(q) z)^2] = 1.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_b : bias standard deviation >= 0, any shape.

    Returns
    -------
    CriticalPoint with sigma_w, sigma_b, q, chi_q, stable, kind, each of the shape of sigma_b: the smallest stable root;
    where only unstable ones exist, the smallest of those, with stable = False.

    Raises
    ------
    NoCriticalPointError : no root exists, with the reason. In a batch, missing entries are nan (kind "none"), and the
        error is raised only if all are missing.
    InputError : sigma_b negative, complex, NaN or infinite; phi not elementwise.

    Warns
    -----
    UnstableCriticalPointWarning : the returned point repels the variance map (chi_q > 1).

    Accuracy
    --------
    sigma_w, q: 1e-12 relative. Differentiable in sigma_b and in parameters that phi closes over (implicit function
    theorem; 1e-9), also under jit and vmap; under a trace the result has the tracer's dtype (float32: 1e-5), nan where
    nothing exists, and kind None.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> point = ij.critical(jnp.tanh, sigma_b=0.05)
    >>> print(f"{point.sigma_w:.10f} {point.q:.10f} {point.kind}")
    1.1225390048 0.1536919358 regular

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232), section 3; Roberts, Yaida, Hanin
    2021 (arXiv:2106.10165), chapter 5.
    """
    try:
        act = as_activation(phi)
    except TracedParameterError:
        return critical_in_parameters(phi, sigma_b, critical)
    if is_traced(sigma_b):
        return traced_point(act, jnp.asarray(sigma_b))
    b = check_sigma(sigma_b, "sigma_b")
    if b.ndim == 0:
        found = _primary(_points(act, float(b)))
        if found is None:
            raise _refusal(act, float(b))
    else:
        fields = primary_arrays(act, b.ravel())
        if b.size and np.all(fields["kind"] == "none"):
            raise _refusal(act, float(b.ravel()[0]))
        shaped = {name: value.reshape(b.shape) for name, value in fields.items()}
        found = CriticalPoint(sigma_b=b.copy(), **shaped)
    repelling = np.flatnonzero(~np.ravel(found.stable) & np.isfinite(np.ravel(found.q)))
    if repelling.size:
        at = repelling[0]
        warnings.warn(
            f"{act.name} at sigma_b = {np.ravel(found.sigma_b)[at]:g} has chi_1 = 1 only at "
            f"q = {np.ravel(found.q)[at]:.6g}, where chi_q = {np.ravel(found.chi_q)[at]:.6g}: the variance map leaves "
            "this point, so a deep network will not stay there. A larger sigma_b may have a stable one; see "
            "ij.critical_points.",
            UnstableCriticalPointWarning,
            stacklevel=2,
        )
    return found


def primary_arrays(act: Activation, sigma_b: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of the primary points of a flat array of sigma_b; nan and kind "none" where there is none."""
    size = sigma_b.size
    out = {name: np.full(size, np.nan) for name in ("sigma_w", "q", "chi_q")}
    out["stable"], out["kind"] = np.zeros(size, bool), np.full(size, "none", "<U15")
    row, q, sigma_w, chi_q, alone = _table_roots(act, sigma_b)
    stable = np.abs(chi_q) < _STABLE
    order = np.lexsort((q, ~stable, row))
    chosen = order[np.unique(row[order], return_index=True)[1]]
    for name, values in (("sigma_w", sigma_w), ("q", q), ("chi_q", chi_q), ("stable", stable)):
        out[name][row[chosen]] = values[chosen]
    out["kind"][row[chosen]] = np.where(np.abs(chi_q[chosen] - 1) < _HALF_STABLE_WITHIN, "half-stable", "regular")
    for i in alone:
        point = _primary(_points(act, float(sigma_b[i])))
        if point is not None:
            for name in out:
                out[name][i] = getattr(point, name)
    return out


def _table_roots(act: Activation, sigma_b: np.ndarray):
    """Roots q > 0 of many sigma_b from the table: (row, q, sigma_w, chi_q), and the rows it leaves to `_points`."""
    nothing = np.zeros(0)
    everything = np.arange(sigma_b.size)
    if sigma_b.size < 16 or ramp(act) is not None:
        return nothing.astype(int), nothing, nothing, nothing, everything
    line, table = critical_line(act), table_of(act)
    order = np.argsort(sigma_b, kind="stable")
    ranked = sigma_b[order] ** 2
    known = np.isfinite(line.f)
    q, f, noise = line.q[known], line.f[known], 4 * line.noise[known]
    # each interval of the line is crossed by those sigma_b^2 that lie between its two ends: a slice of the ranked array
    first = np.searchsorted(ranked, np.minimum(f[:-1], f[1:]), side="right")
    count = np.maximum(np.searchsorted(ranked, np.maximum(f[:-1], f[1:]), side="left") - first, 0)
    column = np.repeat(np.arange(count.size), count)
    row = order[np.arange(column.size) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)]
    # near q = 0 the table loses the digits of f; where a sign is rounding, a root may hide
    marks = np.zeros(sigma_b.size + 1, int)
    large = q >= SMOOTH_BELOW
    np.add.at(marks, np.searchsorted(ranked, (f - noise)[large], side="left"), 1)
    np.add.at(marks, np.searchsorted(ranked, (f + noise)[large], side="right"), -1)
    left = np.empty(sigma_b.size, bool)
    left[order] = np.cumsum(marks)[:-1] > 0
    left |= sigma_b == 0
    left[row[q[column] < SMOOTH_BELOW]] = True
    keep = ~left[row]
    row, column = row[keep], column[keep]
    x_low, x_high = np.log(q[column]), np.log(q[column + 1])
    rising = f[column + 1] > f[column]
    target = sigma_b[row] ** 2
    x = (x_low + x_high) / 2
    for _ in range(6):
        q = np.exp(x)
        t = table(np, q)
        f = q - t.m / t.d - target
        upper = (f > 0) == rising
        x_low, x_high = np.where(upper, x_low, x), np.where(upper, x, x_high)
        new = x - f / (q - t.m / t.d * (t.r - t.dlog_d))
        x = np.where((new >= x_low - 1e-9) & (new <= x_high + 1e-9), new, (x_low + x_high) / 2)
    q = np.exp(x)
    t = table(np, q)
    return row, q, 1 / np.sqrt(t.d), t.m * t.r / (q * t.d), everything[left]
