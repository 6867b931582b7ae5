r"""Signals and gradients layer by layer, from an input that is not at the fixed point.

Deep trajectories keep their digits: near c = 1 the recursion is one for log(1 - c),
    1 - c' = (1 - c) sigma_w^2 q w(q, c) / V(q),    w = (M - Gamma) / (q (1 - c)),
in which sigma_b has dropped out and nothing is subtracted; gradients are sums of log chi.
"""

import numpy as np

from initjax.errors import InputError, QuadratureError
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.dual import _check_c
from initjax.gaussian.expect import check_q
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.layermap import LayerMap
from initjax.meanfield.results import Trajectory
from initjax.meanfield.table import ramp, raw_moments, slope_at_zero, table_of
from initjax.trace.jaxpr import is_traced

_HALF, _LOG_2 = float(np.log(0.5)), float(np.log(2.0))


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
    Trajectory with q, c, chi, gradient, one_minus_c, log_one_minus_c, log_gradient, each (depth + 1, *batch).
    gradient[l] = E|dL/dh_l|^2 / E|dL/dh_depth|^2.

    Raises
    ------
    InputError : depth not a non-negative integer; other input out of range; traced input.

    Accuracy
    --------
    1e-12 relative a layer, also of 1 - c and of the gradient's logarithm at any depth; 1e-10 of 1 - c for kinked phi
    without closed form while q moves. A diverging variance becomes inf, and its correlation nan, from that layer on.

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
    shape = (depth + 1, *q.shape)
    w, b, q, c = (a.ravel() for a in (w, b, q, c))
    qs, moments, slopes = _variances(act, w * w, b * b, q, int(depth))
    cs, log_delta = _correlations(act, w * w, b * b, qs, moments, slopes, c)
    chis = w * w * slopes
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        log_gradient = np.zeros_like(chis)
        log_gradient[:-1] = np.cumsum(np.log(chis[-2::-1]), axis=0)[::-1]
        gradient, delta = np.exp(log_gradient), np.exp(log_delta)
    fields = (qs, cs, chis, gradient, delta, log_delta, log_gradient)
    return Trajectory(*(a.reshape(shape) for a in fields))


def _variances(act: Activation, variance_w, variance_b, q, depth: int):
    """q, M(q) and D(q) at every layer: three arrays (depth + 1, n)."""
    qs, moments, slopes = np.empty((3, depth + 1, q.size))
    at = _Moments(act)
    for layer in range(depth + 1):
        qs[layer] = q
        moments[layer], slopes[layer] = at(q)
        if layer == depth:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            new = variance_w * moments[layer] + variance_b
            new = np.where(new > 1e12, np.inf, new)
        if np.array_equal(new, q):  # every layer from here on is the same
            qs[layer + 1 :], moments[layer + 1 :], slopes[layer + 1 :] = q, moments[layer], slopes[layer]
            break
        q = new
    return qs, moments, slopes


class _Moments:
    """M and D at an array of q: from the table while q moves, from quadrature once it has nearly stopped."""

    def __init__(self, act: Activation):
        self.act, self.slopes, self.known, self.previous = act, ramp(act), {}, None
        self.at_zero = float(act.values(np.zeros(1))[0]) ** 2, slope_at_zero(act)
        try:
            self.table = table_of(act)
        except QuadratureError:
            self.table = None

    def __call__(self, q):
        live = np.isfinite(q) & (q > 0)
        at = np.where(live, q, 1.0)
        if self.slopes is not None:
            half = (self.slopes[0] ** 2 + self.slopes[1] ** 2) / 2
            m, d = np.asarray(half * at), np.full_like(at, half)
        elif self.table is None:
            m, d, _ = raw_moments(self.act, at)
        else:
            t = self.table(np, at)
            m, d = t.m, t.d
            with np.errstate(invalid="ignore"):
                # the table's error of 1e-13 would be amplified by 1 / (1 - chi_q)
                still = np.zeros(q.shape, bool) if self.previous is None else np.abs(q - self.previous) < 1e-11 * q
            for i in np.flatnonzero(live & ((still & (at > self.table.q_low)) | (at > self.table.q_high))):
                if at[i] not in self.known:
                    self.known[at[i]] = raw_moments(self.act, at[i : i + 1])[:2, 0]
                m[i], d[i] = self.known[at[i]]
        self.previous = q
        m = np.where(live, m, np.where(q == 0, self.at_zero[0], np.inf))
        return m, np.where(live, d, np.where(q == 0, self.at_zero[1], np.nan))


def _correlations(act: Activation, variance_w, variance_b, qs, moments, slopes, c):
    """c and log(1 - c) at every layer. 1 - c is carried where c > 1/2, c itself elsewhere: neither loses its digits."""
    depth = len(qs) - 1
    cs, logs = np.empty_like(qs), np.empty_like(qs)
    layer_map = LayerMap(act)
    with np.errstate(divide="ignore"):
        log_delta = np.log1p(-c)
    for layer in range(depth + 1):
        cs[layer], logs[layer] = c, log_delta
        if layer == depth:
            break
        q, new = qs[layer], qs[layer + 1]
        fresh, fresh_log = np.full_like(c, np.nan), np.full_like(c, np.nan)
        merged = (log_delta == -np.inf) & np.isfinite(new)
        fresh[merged], fresh_log[merged] = 1.0, -np.inf
        live = np.isfinite(q) & (q > 0) & np.isfinite(new) & np.isfinite(c) & ~merged
        constant = (q == 0) & np.isfinite(new) & (new > 0) & ~merged  # phi(0) and the bias are the same for both
        fresh[constant], fresh_log[constant] = 1.0, -np.inf
        for value in set(q[live].tolist()):
            mine = np.flatnonzero(live & (q == value))
            m, d = moments[layer, mine[0]], slopes[layer, mine[0]]
            near, far = mine[log_delta[mine] < _HALF], mine[log_delta[mine] >= _HALF]
            with np.errstate(divide="ignore", invalid="ignore"):
                if near.size:
                    width = layer_map.width(value, float(m), float(d), np.exp(log_delta[near]))
                    fresh_log[near] = log_delta[near] + np.log(variance_w[near] * value * width / new[near])
                    fresh_log[near] = np.minimum(fresh_log[near], _LOG_2)
                    fresh[near] = -np.expm1(fresh_log[near])
                if far.size:
                    overlap = layer_map.overlap(value, float(m), c[far])
                    fresh[far] = np.clip((variance_w[far] * overlap + variance_b[far]) / new[far], -1, 1)
                    fresh_log[far] = np.log1p(-fresh[far])
        if np.array_equal(fresh, c) and np.array_equal(fresh_log, log_delta) and np.all(qs[layer + 1 :] == q):
            cs[layer + 1 :], logs[layer + 1 :] = c, log_delta
            break
        c, log_delta = fresh, fresh_log
    return cs, logs
