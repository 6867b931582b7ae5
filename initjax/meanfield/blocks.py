r"""What depth does with any block of layers: trajectories, fixed points, and the weight scale with chi_1 = 1.

The variance map of a block is V(q) = q' of `block.step`, its correlation map C(c) = k'(q, q, c q) / q'. Made of sums,
products with positive numbers and E[phi(u) phi(v)], C has non-negative Taylor coefficients: it is convex and rising on
[0, 1], and Newton's iteration from c = 0 climbs to the smallest fixed point without passing it.

Sources: Poole et al. 2016 (arXiv:1606.05340), eqs. 3-7; Schoenholz et al. 2017 (arXiv:1611.01232), eqs. 5-9, and
Yang and Schoenholz 2017 (arXiv:1712.08969) for residual blocks.
"""

from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.gaussian.expect import check_q
from initjax.meanfield.elementary import BatchNorm
from initjax.meanfield.fixed import CRITICAL_WITHIN, depth_scale
from initjax.meanfield.results import FixedPoint, Trajectory
from initjax.meanfield.state import Layer, State, check_layer, refuse_tracers, state

_STEP = 0.04  # of the eighth-order difference in log q; V is smooth in log q on the scale 1
_STENCIL = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280])
_SCAN = np.exp(np.arange(np.log(1e-18), np.log(1e8), 0.125))
_STILL = 2e-13  # |V(q) / q - 1| below this is rounding: q is a fixed point
_FAR = 1e12


def propagate(block, depth, q0: Any = 1.0, c0: Any = 0.5) -> Trajectory:
    """Second moment, correlation and gradients through `depth` copies of a block with weights of their own.

    Parameters
    ----------
    block : Layer, for example Activation(phi) >> Dense(sigma_w, sigma_b), or a sequence of `depth` Layers.
    depth : number of blocks, an integer >= 0.
    q0, c0 : second moment and correlation of two inputs at the first block; they broadcast. c0=None follows one input
        alone, which is much faster in deep networks whose q keeps changing; c is then nan.

    Returns
    -------
    Trajectory with q, c, chi, gradient, log_gradient, each (depth + 1, *batch). chi[l] is the gradient's second-moment
    factor of block l (nan at l = depth for a sequence), gradient[l] = E|dL/dh_l|^2 / E|dL/dh_depth|^2.

    Raises
    ------
    InputError : depth is no integer >= 0, block is no Layer, q0 or c0 out of range, or traced input.

    Accuracy
    --------
    1e-12 relative a layer. A second moment above 1e12 is called inf, and its correlation nan, from that block on.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> from initjax.layers import Activation, Dense, LayerNorm, Residual
    >>> block = Residual(LayerNorm() >> Activation(jnp.tanh) >> Dense(1.5))  # pre-norm: q grows by a constant
    >>> path = ij.layers.propagate(block, depth=100)
    >>> print(f"{path.q[50] - 1:.5f} {path.q[100] - 1:.5f} {path.gradient[0]:.3f}")
    44.35813 88.71626 184.966

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3, 6; Yang and Schoenholz 2017 (arXiv:1712.08969), section 3.
    """
    refuse_tracers("propagate", depth, q0, c0)
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 0:
        raise InputError(
            f"depth = {depth!r}.",
            "an integer >= 0.",
            "depth counts blocks.",
            "pass the number of blocks, e.g. depth=50.",
        )
    sequence = isinstance(block, (list, tuple))
    blocks = list(block) if sequence else [block] * (depth + 1)
    for one in blocks:
        check_layer(one, "propagate")
    if sequence and len(blocks) != depth:
        raise InputError(
            f"a sequence of {len(blocks)} blocks with depth = {depth}.",
            "one block for every depth, or one block for all.",
            "block l is applied at depth l.",
            "pass depth=len(blocks).",
        )
    now = state(q0, c0)
    qs, cs, chis = (np.full((depth + 1, *np.shape(now.q1)), np.nan) for _ in range(3))
    lost = np.zeros(np.shape(now.q1), bool)
    for layer in range(depth + 1):
        qs[layer] = np.where(lost, np.inf, now.q1)
        cs[layer] = np.nan if now.k is None else np.where(lost, np.nan, now.c)
        if layer == len(blocks):
            break
        with np.errstate(over="ignore"):
            after = blocks[layer].step(_afresh(now))
        chis[layer] = np.where(lost, np.nan, after.chi)
        far = ~(np.asarray(after.q1) <= _FAR)
        lost = lost | far
        if far.any():
            instead = dict(q1=1.0, q2=1.0) if after.k is None else dict(q1=1.0, q2=1.0, k=0.0)
            fill = {n: np.where(far, v, getattr(after, n)) for n, v in instead.items()}
            after = after.replace(**fill, mean1=np.where(far, 0.0, after.mean1), mean2=np.where(far, 0.0, after.mean2))
        now = after
    log_gradient = np.zeros_like(chis)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        log_gradient[:depth] = np.cumsum(np.log(chis[:depth])[::-1], axis=0)[::-1]
        return Trajectory(qs, cs, chis, np.exp(log_gradient), log_gradient=log_gradient)


def _afresh(now: State) -> State:
    one = np.ones(np.shape(now.q1))[()]
    return now.replace(chi=one, chi_k=None)


def variance_map(block: Layer, q):
    """V(q) and the gradient factor at each q of an array, single inputs only."""
    with np.errstate(over="ignore"):
        after = block.step(state(np.asarray(q), None))
    return np.asarray(after.q1), np.asarray(after.chi)


def slope(block: Layer, q: float) -> float:
    """V'(q), by an eighth-order difference in log q: 1e-11."""
    around = q * np.exp(_STEP * np.arange(-4, 5))
    value = float(variance_map(block, around)[0] @ _STENCIL / (_STEP * q))
    nearest = round(value)
    return float(nearest) if nearest in (0, 1) and abs(value - nearest) < 1e-11 else value


def fixed_point(block: Any, q0=1.0) -> FixedPoint:
    """The state that infinitely many copies of a block tend to, its phase and its depth scales, in blocks.

    Parameters
    ----------
    block : Layer that takes Gaussian units to Gaussian units of mean zero, such as
        Activation(phi) >> Dense(sigma_w, sigma_b): begin with what acts on pre-activations and end with the weights.
    q0 : second moment at the first block, > 0: it decides where several fixed points attract, or all q are fixed.

    Returns
    -------
    FixedPoint. chi_1 is the gradient's second-moment factor per block and decides the phase; where merged inputs stay
    merged it is also the slope of the correlation map at c = 1. With dropout or different drives they do not stay
    merged: c < 1 in every phase. q = inf (phase "unbounded") where the second moment grows without end, as in most
    residual networks; `propagate` tells how.

    Raises
    ------
    InputError : the block ends with units that are not Gaussian of mean zero; q0 not positive; traced input.

    Accuracy
    --------
    q 1e-12 / |1 - chi_q| relative, chi 1e-11, c 1e-12 / |1 - chi_c|.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> from initjax.layers import Activation, Dense, LayerNorm, Residual
    >>> block = Residual(Activation(jnp.tanh) >> Dense(1.5), alpha=0.5) >> LayerNorm()  # post-norm
    >>> point = ij.layers.fixed_point(block)
    >>> print(f"{point.q:.1f} {point.chi_1:.6f} {point.phase}")
    1.0 1.032277 chaotic

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3-7; Schoenholz et al. 2017 (arXiv:1611.01232), eqs. 5, 9, 12.
    """
    q0 = check_block(block, q0)
    q = attracting_q(block, q0)
    if not np.isfinite(q) or q == 0:
        far = _SCAN[-1] if q else _SCAN[0]
        chi_1, chi_q = float(variance_map(block, far)[1]), slope(block, far)
        c = chi_c = np.nan
    else:
        chi_q = slope(block, q)
        c, chi_c = attracting_c(block, q)
        chi_1 = float(block.step(state(q, c if _has_batch_norm(block) else 1.0)).chi)
    close = abs(chi_1 - 1) < CRITICAL_WITHIN
    phase = "unbounded" if not np.isfinite(q) else "critical" if close else "ordered" if chi_1 < 1 else "chaotic"
    merged = c == 1
    numbers = dict(
        q=q,
        c=c,
        chi_1=chi_1,
        chi_q=chi_q,
        chi_c=chi_c,
        xi_q=depth_scale(chi_q) if np.isfinite(q) else np.nan,
        xi_c=np.inf if close and merged else depth_scale(chi_c),
        xi_grad=np.inf if close else depth_scale(chi_1),
    )
    return FixedPoint(**{name: np.float64(value) for name, value in numbers.items()}, phase=phase)


def check_block(block, q0) -> float:
    """q0 as a float; refuses what has no fixed point of this kind."""
    check_layer(block, "fixed_point")
    refuse_tracers("fixed_point", q0)
    q0 = check_q(q0, "q0")
    if q0.ndim or q0 == 0:
        raise InputError(
            f"q0 = {q0}.", "one number > 0.", "the iteration starts at one second moment.", "loop over several q0."
        )
    try:
        after = block.step(state(np.array([0.7, 1.3]), None))
        shape = np.shape(after.q1)
    except ValueError as error:
        if isinstance(error, InputError) or "broadcast" not in str(error):
            raise
        after, shape = state(), None
    if shape != (2,):
        raise InputError(
            f"{block!r} has parameters that are arrays.",
            "a block with one value for each parameter.",
            "a fixed point is computed for one block at a time.",
            "loop over the parameter values.",
        )
    if not after.gaussian or np.any(np.abs(after.mean1) > 1e-12):
        raise InputError(
            f"{block!r} ends with units that are not Gaussian of mean zero.",
            "a block that begins at pre-activations and ends at pre-activations.",
            "the state that is fixed is (q, c) of Gaussian units; between an activation and the next weights the "
            "units have another distribution.",
            "move the activation (and dropout) to the front, e.g. Activation(phi) >> Dense(sigma_w); the network "
            "is the same.",
        )
    return float(q0)


def _has_batch_norm(block) -> bool:
    return any(isinstance(part, BatchNorm) for part in block.within())


def attracting_q(block: Layer, q0: float) -> float:
    """The second moment reached from q0: 0 below the scan, inf above it."""
    scan = np.unique(np.append(_SCAN, q0))
    image, _ = variance_map(block, scan)
    if np.min(np.diff(image) + 1e-9 * image[1:]) < 0:  # a falling map can throw q past a crossing: follow it first
        for _ in range(200):
            q0 = float(np.clip(variance_map(block, q0)[0], _SCAN[0], _SCAN[-1]))
        scan = np.unique(np.append(_SCAN, q0))
        image, _ = variance_map(block, scan)
    here = int(np.searchsorted(scan, q0))
    move = image / scan - 1
    if abs(move[here]) < _STILL:
        return q0
    up = move[here] > 0
    ahead = np.flatnonzero(move[here:] <= 0) + here if up else np.flatnonzero(move[: here + 1] >= 0)
    if not ahead.size:
        return np.inf if up else 0.0
    first = int(ahead[0]) if up else int(ahead[-1])
    if abs(move[first]) < _STILL:
        return float(scan[first]) if first > 20 else 0.0
    low, high = (first - 1, first) if up else (first, first + 1)

    def gap(x):
        q = np.exp(x)
        return float(variance_map(block, q)[0] / q - 1)

    return float(np.exp(root(gap, np.log(scan[low]), np.log(scan[high]), move[low], move[high])))


def root(f, low, high, f_low, f_high, steps=200):
    """Illinois iteration: superlinear, and never leaves its bracket."""
    for _ in range(steps):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        value = f(middle)
        if value == 0 or abs(middle - high) < 2e-16 * max(1.0, abs(middle)):
            return middle
        if value * f_high < 0:
            low, f_low = high, f_high
        else:
            f_low *= 0.5
        high, f_high = middle, value
    return high


def attracting_c(block: Layer, q: float) -> tuple[float, float]:
    """c* and the slope of the correlation map there, at second moment q."""

    def image(c):
        after = block.step(state(q, c))
        return float(after.k / after.q1), float(after.chi_k * q / after.q1)

    at_one, chi = image(1.0)
    if abs(at_one - 1) < 1e-12 and not chi > 1 + CRITICAL_WITHIN:  # not: nan stays
        return 1.0, chi
    c = 0.0
    for _ in range(200):
        value, chi = image(c)
        if chi >= 1 or abs(value - c) < 1e-16:
            break
        new = min(c + (value - c) / (1 - chi), 1.0)
        if new <= c:  # the climb has reached rounding
            break
        c = new
    return c, image(c)[1]
