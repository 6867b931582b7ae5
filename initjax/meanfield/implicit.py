r"""Critical points as functions of the parameters of phi: the slope of a leaky relu, the beta of a swish.

phi closes over the parameters, which automatic differentiation has replaced by tracers. They are hoisted out of phi's
jaxpr; the point is solved at their concrete values; and the two equations
    sigma_w^2 D(q, p) = 1,    sigma_w^2 M(q, p) + sigma_b^2 = q
are differentiated (implicit function theorem) with dM/dp and dD/dp from the same quadrature nodes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import Activation
from initjax.gaussian.expect import gaussian_rule
from initjax.meanfield.results import CriticalPoint
from initjax.meanfield.table import raw_moments
from initjax.trace.jaxpr import float64, is_traced, jaxpr_as_fun, tracing_float64


class Hoisted:
    """phi with the values that it closes over as explicit arguments; hashable by identity."""

    def __init__(self, phi):
        self.name = getattr(phi, "__name__", type(phi).__name__)
        with tracing_float64():
            self.closed = jax.make_jaxpr(phi)(jax.ShapeDtypeStruct((), np.float64))

    def __call__(self, consts, x):
        """phi at the array x for given parameters."""
        run = jaxpr_as_fun(type(self.closed)(self.closed.jaxpr, list(consts)))
        return jax.vmap(lambda v: run(v)[0])(jnp.ravel(x)).reshape(jnp.shape(x))


def critical_in_parameters(phi, sigma_b, solve) -> CriticalPoint:
    """The critical point of a phi with traced parameters; `solve(activation, sigma_b)` gives the concrete one."""
    hoisted = Hoisted(phi)
    sigma_b = jnp.asarray(sigma_b)
    sigma_w, q, chi_q = _critical(hoisted, solve, tuple(hoisted.closed.consts), sigma_b)
    return CriticalPoint(sigma_w, sigma_b, q, chi_q, None, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _critical(hoisted, solve, consts, sigma_b):
    return _solved(hoisted, solve, consts, sigma_b)[0]


def _solved(hoisted, solve, consts, sigma_b):
    if is_traced(consts, sigma_b):
        raise InputError(
            f"phi = {hoisted.name} closes over a parameter that jax.jit or jax.vmap has replaced by a tracer.",
            "parameters with values: plain numbers, or those that jax.grad and jax.jvp differentiate outside jit.",
            "the Gaussian expectations of phi are resolved by looking at its values.",
            "call ij.critical outside jit, and differentiate it with jax.grad directly.",
        )
    values = [np.asarray(c) for c in consts]
    act = Activation(lambda x: hoisted([jnp.asarray(v) for v in values], x))
    point = solve(act, float(sigma_b))
    dtype = jnp.result_type(*consts, sigma_b)
    return tuple(jnp.asarray(v, dtype) for v in (point.sigma_w, point.q, point.chi_q)), act, point


@_critical.defjvp
def _critical_jvp(hoisted, solve, primals, tangents):
    consts, sigma_b = primals
    dconsts, dsigma_b = tangents
    out, act, point = _solved(hoisted, solve, consts, sigma_b)
    isolated = point.kind in ("regular", "half-stable")
    variance = float(point.sigma_w) ** 2
    q = float(point.q) if isolated else (1.0 if point.kind == "scale-invariant" else 1e-12)
    m, d, e = (float(v) for v in raw_moments(act, np.array([q]))[:, 0])
    # fourth-order differences of exact values: 1e-12, without second derivatives of a kinked phi
    step = 1e-3 * q
    sides = raw_moments(act, q + step * np.array([-2.0, -1.0, 1.0, 2.0]))
    _, d_q, e_q = (float(v) for v in sides @ (np.array([1.0, -8.0, 8.0, -1.0]) / (12 * step)))
    m_q = e / q
    grads = _parameter_gradients(hoisted, consts, act, q)
    zero = jnp.zeros_like(out[0])
    dm, dd, de = (
        sum((jnp.sum(jnp.asarray(g, zero.dtype) * t) for g, t in zip(group, dconsts, strict=True) if _moves(t)), zero)
        for group in grads
    )
    # d(w2) = -w2 (D_q dq + dD) / D;  dq = w2 (M_q dq + dM) + M d(w2) + 2 sigma_b dsigma_b
    dq = zero
    if isolated:
        pushed = 2 * float(sigma_b) * dsigma_b if _moves(dsigma_b) else zero
        dq = (variance * (dm - m * dd / d) + pushed) / (1 - variance * (m_q - m * d_q / d))
    dvariance = -variance * (d_q * dq + dd) / d
    chi_q = e / (q * d)
    dchi = ((de + e_q * dq) / (q * d) - chi_q * (dq / q + (dd + d_q * dq) / d)) if isolated else zero
    return out, (dvariance / (2 * float(point.sigma_w)), dq, dchi)


def _moves(tangent) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(tangent), jnp.floating))


def _parameter_gradients(hoisted, consts, act, q):
    """dM/dp, dD/dp and dE[u phi phi']/dp for every parameter, at fixed q."""
    _refuse_moving_kinks(hoisted, consts, act)
    u, weight, _ = gaussian_rule(act, np.zeros(1), np.array([q]))
    with float64():
        nodes, weights = jnp.asarray(u[0]), jnp.asarray(weight[0])
        values = [jnp.asarray(np.asarray(c, np.float64)) for c in consts]

        def moments(values):
            f, slope = jax.jvp(lambda x: hoisted(values, x), (nodes,), (jnp.ones_like(nodes),))
            return [jnp.sum(weights * g) for g in (f * f, slope * slope, nodes * f * slope)]

        grads = [jax.grad(lambda v, k=k: moments(v)[k])(values) for k in range(3)]
        return [[np.asarray(g) for g in group] for group in grads]


def _refuse_moving_kinks(hoisted, consts, act):
    if not act.kinks:
        return
    for i, c in enumerate(consts):
        moved = [np.asarray(v, np.float64) * (1 + 1e-3 * (j == i)) + 1e-3 * (j == i) for j, v in enumerate(consts)]
        kinks = Activation(lambda x, moved=moved: hoisted([jnp.asarray(v) for v in moved], x)).kinks
        if len(kinks) != len(act.kinks) or np.any(np.abs(np.subtract(kinks, act.kinks)) > 1e-9):
            raise InputError(
                f"parameter number {i} of phi = {hoisted.name} (value {np.asarray(c)}) moves its kinks {act.kinks}.",
                "parameters that change the slopes of phi, not where it has kinks.",
                "the derivative of E[phi'^2] would need the speed of the kink, which automatic differentiation drops.",
                "rescale the input instead, or take a finite difference of ij.critical.",
            )
