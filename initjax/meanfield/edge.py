r"""The edge of chaos of a block: the weight scale at which its gradient factor chi_1 is 1 at a fixed point of its own.

For every q, the weight scale w(q) with chi(q, w) = 1 is found by bisection in log w, all q at once; then fixed points
are the roots of V(q, w(q)) - q. So unstable points are found too, and where none exists it is known why.
For a plain network this is the parametrization of `criticality.py`, where w(q) and the bias are explicit.
"""

import warnings

import numpy as np

from initjax.errors import InputError, NoCriticalPointError, UnstableCriticalPointWarning
from initjax.meanfield.blocks import _SCAN, _has_batch_norm, check_block, fixed_point, root, slope, variance_map
from initjax.meanfield.criticality import _primary
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import CriticalPoint
from initjax.meanfield.state import refuse_tracers

_W = (1e-6, 1e6)  # weight scales searched
_NOISE = 2e-11  # of V / q - 1
_PROBE = np.array([1e-6, 1e-3, 1.0, 1e3])


def critical(make_block, sigma_b=0.0) -> CriticalPoint:
    """The weight scale that puts a block on the edge: chi_1 = 1 at a fixed point of the block itself.

    Parameters
    ----------
    make_block : function of (sigma_w, sigma_b) that returns a Layer, Gaussian units to Gaussian units, e.g.
        lambda w, b: Activation(phi) >> Dense(w, b). It is called with arrays of sigma_w: pass w on as it comes.
    sigma_b : bias standard deviation >= 0, one number, passed on to make_block.

    Returns
    -------
    CriticalPoint with the smallest q at which the variance map is stable; if every one is unstable, the smallest of
    those, with stable = False. kind "zero": q = 0; kind "scale-invariant": every q is fixed, q = nan. With dropout or
    uncommon drives gradients are critical here, while correlations still forget at the finite xi_c of `fixed_point`.

    Raises
    ------
    NoCriticalPointError : no weight scale does it, with the reason.
    InputError : the block does not map pre-activations to pre-activations; sigma_b out of range; traced input.

    Warns
    -----
    UnstableCriticalPointWarning : the variance map leaves the returned point (chi_q > 1).

    Accuracy
    --------
    sigma_w, q: 1e-9 relative, for q above 1e-4; q is searched from 1e-18 to 1e8, sigma_w from 1e-6 to 1e6.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> from initjax.layers import Activation, Dense, Drive
    >>> rnn = lambda w, b: Activation(jnp.tanh) >> Dense(w, b) >> Drive(0.25)
    >>> print(f"{ij.layers.critical(rnn).sigma_w ** 2:.5f}")  # inputs suppress chaos: without them 1
    2.40149

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232), section 3; Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394).
    """
    refuse_tracers("critical", sigma_b)
    b = check_sigma(sigma_b, "sigma_b")
    if b.ndim:
        raise InputError(
            f"sigma_b of shape {b.shape}.",
            "one sigma_b.",
            "each block is solved on its own.",
            "loop over sigma_b.",
        )
    b = float(b)
    plain = make_block(1.0, b)
    check_block(plain, 1.0)
    if _has_batch_norm(plain):
        raise _without_scale(plain, float(fixed_point(plain).chi_1), float(fixed_point(make_block(2.0, b)).chi_1))
    _check_dependence(make_block, b, plain)

    w = scale_of(make_block, b, _SCAN)
    live = np.isfinite(w)
    if not live.any():
        raise _unreachable(make_block, b, plain)
    q, w = _SCAN[live], w[live]
    excess = variance_map(make_block(w, b), q)[0] / q - 1
    known = np.abs(excess) > _NOISE
    if not known.any():
        return _point(w[np.argmin(np.abs(np.log(q)))], b, np.nan, 1.0, True, "scale-invariant")
    points = []
    if np.all(~known[:8]) and live[0]:  # V / q -> 1 as q -> 0
        away = variance_map(make_block(np.full_like(q, w[0]), b), q)[0] / q - 1
        clear = np.flatnonzero(np.abs(away) > _NOISE)
        points.append(_point(w[0], b, 0.0, 1.0, bool(clear.size and away[clear[0]] < 0), "zero"))
    q_known, e_known = q[known], excess[known]
    for i in np.flatnonzero(np.sign(e_known[1:]) * np.sign(e_known[:-1]) < 0):
        if q_known[i + 1] / q_known[i] > 2 and not np.any((q > q_known[i]) & (q < q_known[i + 1])):
            continue  # between the two no weight scale has chi = 1
        found = _refine(make_block, b, q_known[i], q_known[i + 1], e_known[i], e_known[i + 1])
        if found is not None:
            points.append(found)
    best = _primary(points)
    if best is None:
        raise _unbalanced(plain, b, q_known, e_known)
    if not best.stable:
        warnings.warn(
            f"{plain!r} with its weight scale tuned has chi_1 = 1 only at q = {best.q:.6g}, where chi_q = "
            f"{best.chi_q:.6g}: the variance map leaves this point, so a deep network will not stay there.",
            UnstableCriticalPointWarning,
            stacklevel=2,
        )
    return best


def scale_of(make_block, b: float, q: np.ndarray, steps: int = 64) -> np.ndarray:
    """w with chi(q, w) = 1 at each q; nan where chi - 1 has one sign for all w searched."""
    low, high = (np.full(q.shape, np.log(end)) for end in _W)

    def gap(x):
        with np.errstate(over="ignore", under="ignore"):
            return np.broadcast_to(variance_map(make_block(np.exp(x), b), q)[1] - 1, q.shape)

    at_low, at_high = gap(low), gap(high)
    crosses = (at_low < -1e-12) & (at_high > 1e-12) & np.isfinite(at_high)
    for _ in range(steps):
        middle = (low + high) / 2
        above = gap(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(crosses, np.exp((low + high) / 2), np.nan)


def _refine(make_block, b, q_low, q_high, e_low, e_high):
    def gap(x):
        q = np.exp(np.array([x]))
        w = scale_of(make_block, b, q)
        return float(variance_map(make_block(w, b), q)[0][0] / q[0] - 1) if np.isfinite(w[0]) else np.nan

    q = float(np.exp(root(gap, np.log(q_low), np.log(q_high), e_low, e_high)))
    if not np.isfinite(q):
        return None
    w = float(scale_of(make_block, b, np.array([q]))[0])
    chi_q = slope(make_block(w, b), q)
    half = abs(chi_q - 1) < 1e-7
    return _point(w, b, q, chi_q, abs(chi_q) < 1, "half-stable" if half else "regular")


def _point(w, b, q, chi_q, stable, kind) -> CriticalPoint:
    return CriticalPoint(np.float64(w), np.float64(b), np.float64(q), np.float64(chi_q), np.bool_(stable), kind)


def _check_dependence(make_block, b, plain):
    chis = np.stack([variance_map(make_block(np.full(4, w), b), _PROBE)[1] for w in (0.5, 1.0, 3.0)])
    if np.max(np.abs(chis)) < 1e-200:
        raise _refusal(
            plain, "its activation has no slope: chi_1 = 0 for every sigma_w.", "an activation with a slope."
        )
    points = [float(fixed_point(make_block(w, b)).chi_1) for w in (0.5, 3.0)]
    if np.ptp(chis, axis=0).max() < 1e-10 * np.abs(chis).max() or (
        # a normalization behind the weights: chi at a fixed point is the same although chi at a given q is not
        all(np.isfinite(points)) and abs(points[0] - points[1]) < 1e-10 and _scales_out(make_block, b)
    ):
        raise _without_scale(plain, *points)


def _scales_out(make_block, b) -> bool:
    return abs(float(fixed_point(make_block(1.7, b)).chi_1 - fixed_point(make_block(0.3, b)).chi_1)) < 1e-10


def _without_scale(plain, chi, other) -> NoCriticalPointError:
    value = f"chi_1 = {chi:.6g}" if abs(chi - other) < 1e-9 * abs(chi) else f"chi_1 = {chi:.6g} and {other:.6g}"
    normalised = " For batch normalization it is E[phi'^2] / Var(phi) >= 1, and 1 only if phi is linear."
    return _refusal(
        plain,
        f"the gradient factor at the fixed point does not depend on the weight scale: {value} at two of them, because "
        "the weights are normalized away." + (normalised if _has_batch_norm(plain) else ""),
        "another activation, biases (sigma_b > 0), or a skip connection with a small alpha.",
    )


def _unreachable(make_block, b, plain) -> NoCriticalPointError:
    low, high = (variance_map(make_block(np.full(4, w), b), _PROBE)[1] for w in _W)
    if np.all(low >= 1 - 1e-9):
        why = (
            f"chi is at least {np.min(low):.6g} for every weight scale and q: the skip connection alone carries that "
            "much, and every branch adds to it."
        )
        remedy = "alpha = 0 (chi_1 = 1 exactly), a small alpha such as depth**-0.5, or skip < 1."
    else:
        why = (
            f"chi lies between {np.nanmin(low):.3g} and {np.nanmax(high):.6g} for sigma_w from {_W[0]:g} to {_W[1]:g}, "
            "and does not cross 1 at any q."
        )
        remedy = "another activation; a step function, for example, has no gradient at all."
    return _refusal(plain, why, remedy)


def _unbalanced(plain, b, q, excess) -> NoCriticalPointError:
    best = int(np.argmin(np.abs(excess)))
    sign = "grows" if excess[best] > 0 else "shrinks"
    return _refusal(
        plain,
        f"where chi = 1 the second moment is not fixed: it {sign} in every block at every q from {q[0]:.0e} to "
        f"{q[-1]:.0e} (V(q) / q - 1 = {excess[best]:.3g} at best, at q = {q[best]:.3g}).",
        "sigma_b = 0, a normalization layer, or another activation."
        if b
        else "a normalization layer or another activation.",
    )


def _refusal(plain, why, remedy) -> NoCriticalPointError:
    return NoCriticalPointError(
        f"no sigma_w puts the block {plain!r} on the edge of chaos.",
        "a block whose gradient factor chi_1 is 1 at one of its fixed points for some sigma_w.",
        why,
        remedy,
    )
