r"""Signals and gradients layer by layer, from an input that is not at the fixed point."""

import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import as_activation
from initjax.gaussian.dual import _check_c, host_pair
from initjax.gaussian.expect import check_q
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import Trajectory
from initjax.meanfield.table import raw_moments, slope_at_zero
from initjax.trace.jaxpr import is_traced


def propagate(phi, sigma_w, sigma_b, depth, q0=1.0, c0=0.5) -> Trajectory:
    """Second moment, correlation, chi and gradient norm through `depth` layers.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : standard deviations >= 0; they broadcast with q0 and c0.
    depth : number of layers, an integer >= 0.
    q0, c0 : second moment (> 0) and correlation in [-1, 1] of the first pre-activations of two inputs.

    Returns
    -------
    Trajectory with q, c, chi, gradient, each (depth + 1, *batch). gradient[l] = E|dL/dh_l|^2 / E|dL/dh_depth|^2.

    Raises
    ------
    InputError : depth not a non-negative integer; other input out of range; traced input.

    Accuracy
    --------
    1e-12 relative a layer. A diverging variance becomes inf, and its correlation nan, from that layer on.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> path = ij.propagate(jnp.tanh, 1.0, 0.0, depth=1000)
    >>> print(f"{2 * 1000 * path.q[-1]:.4f}")  # q ~ 1 / (2 l) for tanh at criticality
    1.0023

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3, 6; Schoenholz et al. 2017 (arXiv:1611.01232), eq. 12.
    """
    act = as_activation(phi)
    if is_traced(sigma_w, sigma_b, depth, q0, c0):
        raise InputError(
            "propagate got a traced value.",
            "concrete sigma_w, sigma_b, q0, c0 (also inside a jitted function).",
            "each layer chooses its own exact method from the value of q, which a tracer does not have.",
            "call it outside jit, or ij.fixed_point, which accepts tracers.",
        )
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 0:
        raise InputError(
            f"depth = {depth!r}.",
            "an integer >= 0.",
            "depth counts layers.",
            "pass the number of layers, e.g. depth=50.",
        )
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    w, b, q, c = (np.array(a) for a in np.broadcast_arrays(w, b, check_q(q0, "q0"), _check_c(c0)))
    qs, cs, chis = np.empty((3, depth + 1, *q.shape))
    for layer in range(depth + 1):
        qs[layer], cs[layer] = q, c
        live = np.isfinite(q) & (q > 0)
        at = np.where(live, q, 1.0)
        m, d, _ = raw_moments(act, at)
        chis[layer] = np.where(live, w * w * d, np.where(q == 0, w * w * slope_at_zero(act), np.nan))
        if layer == depth:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            m = np.where(live, m, np.where(q == 0, float(act.values(np.zeros(1))[0]) ** 2, np.inf))
            new = w * w * m + b * b
            new = np.where(new > 1e12, np.inf, new)
            overlap = np.full(q.shape, np.nan)
            inner = live & (np.abs(c) < 1) & np.isfinite(c)
            overlap[inner] = host_pair(act, act, at[inner], at[inner], c[inner])
            same = live & (c == 1)
            overlap[same] = m[same]
            mirrored = live & (c == -1)
            if mirrored.any():
                overlap[mirrored] = host_pair(act, act, at[mirrored], at[mirrored], c[mirrored])
            c = np.where(
                c == 1, np.where(np.isfinite(new), 1.0, np.nan), np.clip((w * w * overlap + b * b) / new, -1, 1)
            )
        q = new
    gradient = np.ones_like(chis)
    for layer in range(depth - 1, -1, -1):
        with np.errstate(invalid="ignore", over="ignore"):
            gradient[layer] = gradient[layer + 1] * chis[layer]
    return Trajectory(qs, cs, chis, gradient)
