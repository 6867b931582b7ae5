"""`dks` and `tat`: the public solvers."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, UnattainableTargetError
from initjax.gaussian.activation import Activation, as_activation
from initjax.shaping import leaky, network
from initjax.shaping.shaped import ShapedActivation
from initjax.shaping.solution import (
    Reach,
    check_above,
    each,
    from_table,
    leaky_dks,
    leaky_tat,
    namespace,
)
from initjax.shaping.subnetworks import subnetwork_maximum
from initjax.trace.jaxpr import is_traced


def dks(
    phi,
    *,
    zeta: Any = 1.5,
    depth: Any = None,
    model=None,
    inputs=None,
    maximum=None,
    q_slope: float | None = 1.0,
    apply_kwargs=None,
    rngs=None,
) -> ShapedActivation:
    r"""Deep kernel shaping: gamma (phi(alpha x + beta) + delta) with Q(1) = Q'(1) = 1, C(0) = 0 and C_f'(1) = zeta.

    C_f'(1) is the slope of the network's correlation map, the largest over its subnetworks: zeta^(1/depth) a layer in a
    plain network. Such layers neither forget nor scramble their inputs however many there are, without norms or
    shortcuts. Of several solutions the one on the branch from the linear limit (zeta -> 1) is returned; of several
    limits the one with the smallest |beta|, then the smallest |phi(beta)|, then beta > 0.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`, continuous. For the relu family the negative slope is solved for.
    zeta : target C_f'(1) > 1; number or array. Traced values are accepted, and differentiated, with `depth`.
    depth : number of nonlinear layers of a plain network; integer or array. All of `zeta` and `depth` broadcast.
    model, inputs : instead of depth, a Flax model and an example batch: the subnetwork-maximum function is read from
        its trace (`subnetwork_maximum`), with the branch weights of its residual sums.
    maximum : instead, that function itself, M(x, r).
    q_slope : Q'(1); 1 in the paper. None, for relu only: left free, with beta = +-1, as in the authors' package.
    apply_kwargs, rngs : of the model, as in `ij.kernel_fn`.

    Returns
    -------
    ShapedActivation: the activation of every layer, to be used with its `kernel_init`, biases of zero, and inputs of
    q = 1 (`ij.shaping.per_location_normalization`).

    Raises
    ------
    UnattainableTargetError : phi cannot be that nonlinear (or, with Q'(1) = 1, not nonlinear at all).
    InputError : zeta <= 1, depth < 1, not exactly one of depth, model and maximum.
    UnsupportedLayerError : the model is not of shaped layers, affine layers and normalized sums.

    Accuracy
    --------
    All conditions to 1e-11 in float64. Traced float32 targets: parameters to 1e-5 relative, nan where unattainable.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> act = ij.shaping.dks(jax.nn.selu, depth=100)
    >>> print(*(f"{v:.8f}" for v in act.conditions()[:3]), f"{act.conditions().c_slope ** 100:.8f}")
    1.00000000 1.00000000 0.00000000 1.50000000
    >>> ij.shaping.dks(jnp.tanh, depth=[3, 30, 300]).alpha.round(6).tolist()
    [0.590534, 0.166741, 0.052066]

    References
    ----------
    Martens et al. 2021 (arXiv:2110.01765), "Summary of our method".
    """
    act = as_activation(phi)
    zeta, depth, maximum = _network(act, "zeta", zeta, depth, model, inputs, maximum, apply_kwargs, rngs)
    check_above(zeta, 1.0, "zeta", "C_f'(1) = 1 for a linear network; a nonlinear one with C(0) = 0 has more")
    if maximum is None:
        slope_minus_1 = namespace(zeta, depth).expm1(namespace(zeta, depth).log(zeta) / depth)
    else:
        slope_minus_1 = each(lambda z: network.c_slope(maximum, z) - 1, zeta)
    reach = Reach("zeta", zeta, depth, lambda s: _whole(maximum, depth, s), "C'(1)")
    if leaky.is_homogeneous(act):
        return leaky_dks(act, phi, slope_minus_1, q_slope, reach)
    if q_slope is None or not math.isfinite(q_slope):
        raise InputError(
            f"q_slope = {q_slope!r} for phi = {act.name}",
            "a finite number, 1 in the paper; None for the relu family only",
            "without the condition on Q'(1) the solutions of this phi are a curve, not a point",
            "leave q_slope at 1.0",
        )
    return from_table(act, phi, "dks", slope_minus_1, float(q_slope), reach)


def tat(
    phi,
    *,
    tau: Any = 0.3,
    eta: Any = 0.9,
    depth: Any = None,
    model=None,
    inputs=None,
    maximum=None,
    apply_kwargs=None,
    rngs=None,
) -> ShapedActivation:
    r"""Tailored activation transformation: Q(1) = Q'(1) = C'(1) = 1, and C_f''(1) = tau or, for the relu family,
    C_f(0) = eta.

    A smooth phi becomes gamma (phi(alpha x + beta) + delta), with curvature tau / depth a layer in a plain network;
    relu and leaky relu become a leaky relu of gamma = sqrt(2 / (1 + slope^2)), alpha = 1, beta = delta = 0, whose slope
    brings two orthogonal inputs to the correlation eta at the output. The branch is chosen as in `dks`, over both signs
    of the mean.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`: relu or leaky relu, or with a continuous derivative.
    tau : target C_f''(1) > 0 for smooth phi; number or array.
    eta : target C_f(0) in (0, 1) for the relu family; number or array.
    depth, model, inputs, maximum, apply_kwargs, rngs : as in `dks`.

    Returns
    -------
    ShapedActivation.

    Raises
    ------
    UnattainableTargetError : the network is too shallow for eta or tau, or C''(1) does not exist (a kink).
    InputError, UnsupportedLayerError : as in `dks`.

    Accuracy
    --------
    As `dks`; the slope of the relu family to 1e-12.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> act = ij.shaping.tat(jax.nn.relu, depth=50)
    >>> print(f"{act.negative_slope:.6f} {act.gamma:.6f}")
    0.430523 1.298948
    >>> correlation = 0.0
    >>> for _ in range(50):
    ...     correlation = act.c_map(correlation)
    >>> print(f"{correlation:.9f}")
    0.900000000

    References
    ----------
    Zhang, Botev, Martens 2022 (arXiv:2203.08120), sections 4.2 and 4.3.
    """
    act = as_activation(phi)
    if leaky.is_homogeneous(act):
        eta, depth, maximum = _network(act, "eta", eta, depth, model, inputs, maximum, apply_kwargs, rngs)
        return leaky_tat(phi, act, eta, depth, maximum)
    tau, depth, maximum = _network(act, "tau", tau, depth, model, inputs, maximum, apply_kwargs, rngs)
    check_above(tau, 0.0, "tau", "C_f''(1) is a mean square of second derivatives, 0 only for a linear network")
    if act.prime.jumps:
        raise UnattainableTargetError(
            f"phi = {act.name}, with kinks at {', '.join(f'{k:.6g}' for k, _ in act.prime.jumps[:3])}, by TAT.",
            "activations with a continuous derivative, or relu and leaky relu.",
            "C''(1) = E[phi''^2] is infinite at a kink: the bound C_f''(1) <= tau fails for every transformation.",
            "use ij.shaping.dks, whose conditions hold for kinks; or a smooth relative (gelu, softplus, elu).",
        )
    per_layer = tau / depth if maximum is None else each(lambda t: network.c_curvature(maximum, t), tau)
    reach = Reach("tau", tau, depth, lambda t: _whole_curvature(maximum, depth, t), "C''(1)")
    return from_table(act, phi, "tat", per_layer, 1.0, reach)


# -- arguments -------------------------------------------------------------------------------------------------------


def _network(act: Activation, name: str, target, depth, model, inputs, maximum, apply_kwargs, rngs):
    """The target, depth (float, or None) and maximum (or None), checked and broadcast."""
    given = [n for n, v in (("depth", depth), ("model", model), ("maximum", maximum)) if v is not None]
    if len(given) != 1 or (model is not None) != (inputs is not None):
        raise InputError(
            f"{', '.join(given) or 'none of depth, model and maximum'}{' with inputs' if inputs is not None else ''}",
            "exactly one of depth=..., model=... with inputs=..., maximum=...",
            f"the target {name} of the network is distributed over its layers",
            "give depth for a plain network, model and an example batch for any other",
        )
    if act.jumps:
        raise InputError(
            f"phi = {act.name} with a jump at {act.jumps[0][0]:.6g}",
            "continuous activations",
            "C'(1) = E[phi'^2] is infinite at a jump",
            "smooth the jump",
        )
    if model is not None:
        maximum = subnetwork_maximum(model, inputs, act, apply_kwargs=apply_kwargs, rngs=rngs)
    if depth is None:
        if is_traced(target):
            raise InputError(
                f"a traced {name} with model or maximum",
                f"concrete {name}; traced ones with depth=...",
                "the network's function is solved outside the program",
                "call it outside jit, and pass the ShapedActivation in",
            )
        return np.asarray(target, np.float64), None, maximum
    if is_traced(depth) and not is_traced(target):
        target = jnp.asarray(target, jnp.result_type(float))
    if not is_traced(depth):
        depth = np.asarray(depth)
        if depth.dtype.kind not in "iu" or np.any(depth < 1):
            raise InputError(
                f"depth = {depth.tolist()!r}",
                "integers >= 1",
                "depth is the number of nonlinear layers on the way from the input to the output",
                "count the activations that an input passes through",
            )
    xp = namespace(target, depth)
    target, depth = xp.broadcast_arrays(target if is_traced(target) else np.asarray(target, np.float64), depth)
    if xp is jnp:
        return target, depth.astype(target.dtype), None
    return target, depth.astype(np.float64), None


def _whole(maximum, depth, c_slope: float) -> float:
    """C_f'(1) of the network when every layer has this C'(1)."""
    return c_slope**depth if maximum is None else float(maximum(1.0, lambda y: c_slope * y))


def _whole_curvature(maximum, depth, curvature: float) -> float:
    return curvature * depth if maximum is None else float(maximum(0.0, lambda y: y + curvature))
