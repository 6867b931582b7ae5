"""A layer's target to its parameters: the table for activations that bend, closed forms for the relu family.

Where a target is out of reach the error says which bound of one layer fails, and how far this network gets.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, UnattainableTargetError
from initjax.gaussian.activation import Activation
from initjax.gaussian.expect import scalar
from initjax.shaping import leaky, network
from initjax.shaping.shaped import ShapedActivation
from initjax.shaping.table import Table, newton, table_of
from initjax.trace.jaxpr import is_traced

_LINEAR = math.log(1e-10)  # levels below: a layer that float64 cannot tell from a linear one


class Reach:
    """What is needed to say how far an activation reaches in a network."""

    def __init__(self, name: str, target, depth, whole, local: str):
        self.name, self.target, self.depth, self.whole, self.local = name, target, depth, whole, local

    def refuse(self, act_name: str, missing, needed, best: float, why: str) -> UnattainableTargetError:
        missing, needed = np.asarray(missing), np.asarray(needed)
        at = np.unravel_index(int(np.argmax(np.where(missing, needed, -np.inf))), missing.shape)
        target, need = float(np.asarray(self.target)[at]), float(needed[at])
        if self.depth is None:
            network_, possible = "this network", self.whole(best)
            deeper = "make the network deeper"
        else:
            depth = float(np.asarray(self.depth)[at])
            base = 1.0 if self.name == "zeta" else 0.0
            possible = best**depth if base else best * depth
            network_ = f"depth = {depth:g}"
            least = math.log(target) / math.log(best) if base else target / best
            deeper = f"use depth >= {math.ceil(least - 1e-9):d}"
        smaller = f"{self.name} <= {math.floor(possible * 1e6) / 1e6:.7g}"
        return UnattainableTargetError(
            f"{self.name} = {target:g} for {act_name} with {network_}: one layer would need {self.local} = {need:.7g}.",
            f"{smaller} here, as {act_name} reaches {self.local} = {best:.7g} at most.",
            f"the bound on {self.local} of one layer: {why}",
            f"{smaller} (a more linear network), or {deeper}.",
            possible,
        )


def from_table(act: Activation, phi, method: str, amount, q_slope: float, reach: Reach) -> ShapedActivation:
    """`amount` is C'(1) - 1 for DKS and C''(1) for TAT."""
    table = table_of(act, method)
    local = amount + 1 if method == "dks" else amount
    if is_traced(amount):
        if q_slope != 1.0:
            raise InputError(
                f"q_slope = {q_slope:g} with traced targets",
                "q_slope = 1 inside jit",
                "other values are solved for outside the program",
                "call it outside jit",
            )
        values = table(jnp, jnp.log(amount))
        return _shaped((*values, None, local), phi, method)
    level = np.log(amount)
    if np.any(level < _LINEAR):
        raise InputError(
            f"{reach.name} = {float(np.min(reach.target)):.12g}: one layer would have {reach.local} within "
            f"{float(np.min(amount)):.1e} of a linear one",
            f"targets that leave each layer at least {math.exp(_LINEAR):.0e}",
            "gamma would amplify rounding errors of phi more than its curvature",
            f"use a larger {reach.name}, or no activation at all",
        )
    if np.any(level > table.top):
        best = math.exp(table.top) + (1 if method == "dks" else 0)
        why = (
            "on the branch from the linear limit it has a maximum there"
            if table.ends == "top"
            else "it grows no further, or too slowly to be followed, as alpha increases"
        )
        raise reach.refuse(act.name, level > table.top, local, best, f"with the other conditions met, {why}.")
    if q_slope != 1.0:
        values = _other_q_slope(table, level, q_slope, act)
    else:
        values = table(np, level)
    return _shaped((*values, None, local), phi, method)


def _shaped(values, phi, method: str) -> ShapedActivation:
    alpha, beta, gamma, delta, slope, local = (v if v is None or is_traced(v) else scalar(v) for v in values)
    return ShapedActivation(alpha, beta, gamma, delta, slope, local, phi, method)


def _other_q_slope(table: Table, level, q_slope: float, act: Activation):
    """The solution continued from Q'(1) = 1 to another value."""
    alpha, beta, _, _ = table(np, level.ravel())
    x = np.stack([np.log(alpha), np.arcsinh(beta)], 1)
    for part in np.linspace(0, 1, 9)[1:]:
        x, shape = newton(table.layer, level.ravel(), x, 1 + part * (q_slope - 1))
        miss = np.maximum(
            np.abs(shape.level - level.ravel()), np.abs(shape.balance) * np.exp(np.minimum(level.ravel(), 0))
        )
        if not np.all(miss < 1e-9):
            raise UnattainableTargetError(
                f"q_slope = {q_slope:g} for {act.name}, lost at Q'(1) = {1 + part * (q_slope - 1):.4g}.",
                "values near 1.",
                "the bound on Q'(1): for a layer close to linear it lies within about the root of C'(1) - 1 of 1.",
                "use q_slope=1.0, or a larger zeta.",
            )
    columns = (np.exp(x[:, 0]), np.sinh(x[:, 1]), shape.gamma, shape.delta)
    return tuple(c.reshape(level.shape) for c in columns)


def leaky_dks(act: Activation, phi, slope_minus_1, q_slope, reach: Reach) -> ShapedActivation:
    xp = namespace(slope_minus_1)
    c_slope = slope_minus_1 + 1
    zero = xp.zeros_like(c_slope)
    if q_slope is None:
        if xp is jnp:
            raise InputError(
                "q_slope = None with a traced zeta", "concrete zeta", "it is solved on the host", "leave jit"
            )
        alpha, beta = leaky.solve_relu(c_slope)
        values, _ = _relu_outputs(alpha, beta)
        return _shaped((alpha, beta, *values, zero, c_slope), phi, "dks")
    if q_slope != 1.0:
        raise InputError(
            f"q_slope = {q_slope!r} for the relu family",
            "1.0 or None",
            "Q'(1) = 1 for every leaky relu at beta = 0",
            "leave q_slope at 1.0",
        )
    if xp is np and np.any(c_slope > leaky.STEEPEST):
        raise reach.refuse(
            act.name, c_slope > leaky.STEEPEST, c_slope, leaky.STEEPEST, "pi / (pi - 2) is that of |x|, slope -1."
        )
    slope, gamma, delta = leaky.shaped_dks(xp, c_slope)
    values = (zero + 1, zero, gamma, delta, slope, c_slope)
    return _shaped(values, phi, "dks")


def _relu_outputs(alpha, beta):
    """gamma and delta of relu(alpha x + beta), from its mean and second moment."""
    t = beta / alpha
    below = 0.5 * np.vectorize(math.erfc)(-t / math.sqrt(2))
    density = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    mean, square = t * below + density, (1 + t * t) * below + t * density
    return (1 / (alpha * np.sqrt(square - mean * mean)), -alpha * mean), below


def leaky_tat(phi, act: Activation, eta, depth, maximum) -> ShapedActivation:
    check_above(eta, 0.0, "eta", "C_f(0) lies between 0 (never quite) and 1 (a constant network)", 1.0)
    xp = namespace(eta)
    if maximum is None:
        k = leaky.solve_depth(eta, depth)
    else:
        k = each(lambda e: network.leaky_share(maximum, e, leaky.c_map), eta)
    if xp is np and np.any(np.isnan(k)):
        at = np.unravel_index(int(np.argmax(np.isnan(k))), np.shape(k))
        target = float(np.asarray(eta)[at])
        if maximum is None:
            layers = int(np.asarray(depth)[at])
            best, where = leaky.relu_c_zero(layers), f"depth = {layers}"
            deeper = f"use depth >= {next(d for d in itertools.count(layers) if leaky.relu_c_zero(d) >= target)}"
        else:
            best, where = float(maximum(0.0, lambda c: leaky.c_map(np, np.float64(c), 1.0))), "this network"
        attainable = f"{math.floor(best * 1e6) / 1e6:.7g}"
        raise UnattainableTargetError(
            f"eta = {target:g} for {act.name} with {where}: even relu gives no more than C_f(0) = {best:.7g}.",
            f"eta <= {attainable} here.",
            "the bound C_f(0) <= eta holds for all slopes from 0 to 1: few layers of leaky relu are nearly linear.",
            f"eta <= {attainable} (a more linear network), or {deeper}.",
            best,
        )
    slope, gamma, delta = leaky.shaped_tat(xp, k)
    local = k / math.pi
    values = (0 * slope + 1, 0 * slope, gamma, delta, slope, local)
    return _shaped(values, phi, "tat")


def namespace(*values):
    return jnp if is_traced(values) else np


def check_above(target, bound: float, name: str, why: str, ceiling: float = math.inf) -> None:
    if not is_traced(target) and not np.all((np.asarray(target) > bound) & (np.asarray(target) < ceiling)):
        value = np.asarray(target).ravel()
        bad = value[~((value > bound) & (value < ceiling))][0]
        limit = f"{name} > {bound:g}" if ceiling == math.inf else f"{bound:g} < {name} < {ceiling:g}"
        raise InputError(f"{name} = {bad:g}", f"finite numbers with {limit}", why, f"use the default of {name}")


def each(f, values):
    flat = np.array([f(float(v)) for v in np.ravel(values)])
    return flat.reshape(np.shape(values))
