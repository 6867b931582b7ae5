r"""Critical points as functions of the parameters of phi: the slope of a leaky relu, the beta of a swish.

phi closes over the parameters, which automatic differentiation has replaced by tracers. They are hoisted out of phi's
jaxpr; the point is solved at their concrete values; and the two equations
    sigma_w^2 D(q, p) = 1,    sigma_w^2 M(q, p) + sigma_b^2 = q
are differentiated (implicit function theorem) with dM/dp and dD/dp from the same quadrature nodes, or from differences
of exact expectations where a parameter moves a kink.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import NoCriticalPointError
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
        consts = [jnp.asarray(c, v.aval.dtype) for c, v in zip(consts, self.closed.jaxpr.constvars, strict=True)]
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
    """(sigma_w, q, chi_q)."""
    return tuple(_called(functools.partial(_values, hoisted, solve), [()] * 3, consts, sigma_b))


@_critical.defjvp
def _critical_jvp(hoisted, solve, primals, tangents):
    consts, sigma_b = primals
    shapes = [(3, *np.shape(v)) for v in (*consts, sigma_b)]
    slopes = _called(functools.partial(_slopes, hoisted, solve), shapes, consts, sigma_b)
    out = _critical(hoisted, solve, consts, sigma_b)
    total = jnp.zeros((3,), out[0].dtype)
    for slope, tangent in zip(slopes, (*tangents[0], tangents[1]), strict=True):
        if jnp.issubdtype(jnp.result_type(tangent), jnp.floating):
            total = total + jnp.reshape(slope, (3, -1)) @ jnp.ravel(tangent).astype(total.dtype)
    return out, (total[0], total[1], total[2])


def _called(host, shapes, consts, sigma_b):
    """`host` at the values of the parameters: now, or under jit and vmap when the values are known."""
    dtype = jnp.result_type(*consts, sigma_b)
    if not is_traced(consts, sigma_b):
        return [jnp.asarray(v, dtype) for v in host(consts, sigma_b)]

    def later(consts, sigma_b):
        try:
            found = host(consts, sigma_b)
        except NoCriticalPointError:
            found = [np.full(shape, np.nan) for shape in shapes]
        return [np.asarray(v, dtype).reshape(shape) for v, shape in zip(found, shapes, strict=True)]

    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.pure_callback(later, results, consts, sigma_b, vmap_method="sequential")


def _activation(hoisted, values) -> Activation:
    return Activation(lambda x: hoisted([jnp.asarray(v) for v in values], x))


def _values(hoisted, solve, consts, sigma_b):
    point = solve(_activation(hoisted, [np.asarray(c) for c in consts]), float(sigma_b))
    return [np.asarray(v) for v in (point.sigma_w, point.q, point.chi_q)]


def _slopes(hoisted, solve, consts, sigma_b):
    """Derivatives of (sigma_w, q, chi_q) in every parameter and in sigma_b, each (3, *shape of the parameter)."""
    values = [np.asarray(c) for c in consts]
    act = _activation(hoisted, values)
    point = solve(act, float(sigma_b))
    isolated = point.kind in ("regular", "half-stable")
    variance = float(point.sigma_w) ** 2
    q = float(point.q) if isolated else (1.0 if point.kind == "scale-invariant" else 1e-12)
    m, d, e = (float(v) for v in raw_moments(act, np.array([q]))[:, 0])
    _, d_q, e_q = _differences(lambda at: raw_moments(act, np.array([at]))[:, 0], q, 1e-3 * q)
    chi_q = e / (q * d)

    def moved(dm, dd, de, pushed):
        # d(w2) = -w2 (D_q dq + dD) / D;  dq = w2 (M_q dq + dM) + M d(w2) + pushed
        dq = (variance * (dm - m * dd / d) + pushed) / (1 - variance * (e / q - m * d_q / d)) if isolated else 0.0 * dm
        dvariance = -variance * (d_q * dq + dd) / d
        dchi = ((de + e_q * dq) / (q * d) - chi_q * (dq / q + (dd + d_q * dq) / d)) if isolated else 0.0 * dm
        return np.stack([dvariance / (2 * float(point.sigma_w)), dq, dchi])

    gradients = _parameter_gradients(hoisted, values, act, q)
    return [
        *(moved(g[0], g[1], g[2], 0.0) for g in gradients),
        moved(0.0, 0.0, 0.0, 2 * float(sigma_b) if isolated else 0.0),
    ]


def _differences(f, at: float, step: float) -> np.ndarray:
    """df/dat by fourth-order differences of exact values: 1e-11, without second derivatives of a kinked phi."""
    sides = [np.asarray(f(at + k * step)) for k in (-2.0, -1.0, 1.0, 2.0)]
    return (sides[0] - 8 * sides[1] + 8 * sides[2] - sides[3]) / (12 * step)


def _parameter_gradients(hoisted, values, act, q) -> list[np.ndarray]:
    """(dM/dp, dD/dp, dE[u phi phi']/dp) for every parameter p, at fixed q: (3, *shape of p)."""
    u, weight, _ = gaussian_rule(act, np.zeros(1), np.array([q]))
    with float64():
        nodes, weights = jnp.asarray(u[0]), jnp.asarray(weight[0])
        exact = [jnp.asarray(np.asarray(v, np.float64)) for v in values]

        def moments(values):
            f, slope = jax.jvp(lambda x: hoisted(values, x), (nodes,), (jnp.ones_like(nodes),))
            return [jnp.sum(weights * g) for g in (f * f, slope * slope, nodes * f * slope)]

        by_moment = [jax.grad(lambda v, k=k: moments(v)[k])(exact) for k in range(3)]
        out = [np.stack([np.asarray(group[i]) for group in by_moment]) for i in range(len(values))]
    for i in range(len(values)):
        if act.kinks and _moves_kinks(hoisted, values, i, act):
            out[i] = _by_differences(hoisted, values, i, q)
    return out


def _moves_kinks(hoisted, values, i, act) -> bool:
    """Whether parameter i moves a kink: then the nodes' derivative misses the kink's speed."""
    moved = [np.asarray(v, np.float64) * (1 + 1e-3 * (j == i)) + 1e-3 * (j == i) for j, v in enumerate(values)]
    kinks = _activation(hoisted, moved).kinks
    return len(kinks) != len(act.kinks) or bool(np.any(np.abs(np.subtract(kinks, act.kinks)) > 1e-9))


def _by_differences(hoisted, values, i, q) -> np.ndarray:
    out = np.empty((3, np.size(values[i])))
    for flat in range(np.size(values[i])):

        def moments(at, flat=flat):
            changed = np.array(values[i], np.float64)
            changed.flat[flat] = at
            act = _activation(hoisted, [changed if j == i else v for j, v in enumerate(values)])
            return raw_moments(act, np.array([q]))[:, 0]

        at = float(np.ravel(values[i])[flat])
        # a power of two beside the value, so that float32 parameters take exact steps
        out[:, flat] = _differences(moments, at, 2.0 ** (np.floor(np.log2(abs(at) + 1)) - 10))
    return out.reshape(3, *np.shape(values[i]))
