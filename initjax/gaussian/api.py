r"""The public Gaussian expectations: mean, moments, duals, gains.

Conventions: z ~ N(0, 1); q is a pre-activation second moment; (u, v) is centred Gaussian with variances q1, q2 and
correlation c. Concrete input gives NumPy float64 whatever the x64 flag; traced input gives its own dtype. Everything is
differentiable in q, q1, q2 and c, and works under jit and vmap.
"""

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import FORMS, recognise
from initjax.gaussian.dual import pair
from initjax.gaussian.expect import _expect, check_q, expect, host_rule, scalar
from initjax.trace.jaxpr import is_traced


def mean(phi, q):
    """E[phi(sqrt(q) z)].

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    q : pre-activation second moment >= 0, any shape.

    Returns
    -------
    Array of the shape of q (float64 for concrete q).

    Raises
    ------
    InputError : q negative, complex, NaN or infinite; phi not elementwise.
    QuadratureError : the expectation does not exist or is not resolved to 1e-9.

    Accuracy
    --------
    1e-13 relative to E|phi| for q in [1e-8, 1e8].

    Examples
    --------
    >>> import jax, initjax as ij
    >>> print(f"{ij.gaussian.mean(jax.nn.relu, 1.0):.10f}")  # 1 / sqrt(2 pi)
    0.3989422804

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eq. 3, for the role of these expectations.
    """
    return expect(phi, q)


def moment(phi, q):
    """E[phi(sqrt(q) z)^2], the second moment that the next layer sees.

    Parameters, errors and accuracy as for `mean` (relative to the value itself).

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> print(f"{ij.gaussian.moment(jnp.tanh, 1.0):.12f}")
    0.394294490398

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eq. 3.
    """
    return _second(as_activation(phi), q)


def moment_prime(phi, q):
    """E[phi'(sqrt(q) z)^2] with the almost-everywhere derivative; chi_1 = sigma_w^2 times this.

    Parameters, errors and accuracy as for `moment`. At q = 0: the limit q -> 0+, which for a kink at 0 is the mean of
    the two squared slopes.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> print(f"{ij.gaussian.moment_prime(jnp.tanh, 1e4):.7e}")  # 201 Gauss-Hermite nodes give 8.8e-02
    5.3191446e-03

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232), eq. 5.
    """
    act = as_activation(phi)
    if is_traced(q):
        return _second(act.prime, q)
    q = check_q(q)
    if recognise(act.prime) is not None:
        return _second(act.prime, q)
    return scalar(host_rule(act, lambda u, f, slope: [slope * slope], q, 1)[0])


def _second(act: Activation, q):
    if is_traced(q):
        return _expect(act.square, jnp.asarray(q))
    q = check_q(q)
    member = recognise(act)
    if member is not None:
        with np.errstate(over="ignore"):
            value = FORMS[member.family](
                np, member.parameters, member.parameters, q, q, np.ones_like(q), np.zeros_like(q)
            )
        if np.all(np.isfinite(value)):
            return scalar(value)
    return scalar(host_rule(act, lambda u, f, slope: [f * f], q, 1)[0])


def dual(phi, q1, q2, c):
    """E[phi(u) phi(v)], the dual activation.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    q1, q2 : variances of u and v, >= 0.
    c : correlation in [-1, 1], both ends included. All three broadcast.

    Returns
    -------
    Array of the broadcast shape (float64 for concrete input).

    Raises
    ------
    InputError : |c| > 1, negative variances, NaN, infinite or complex input; phi not elementwise.
    QuadratureError : the expectation does not exist or is not resolved to 1e-9.

    Accuracy
    --------
    1e-12 relative to sqrt(E[phi(u)^2] E[phi(v)^2]). Derivatives by Price's theorem, exact at c = +-1.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> print(f"{ij.gaussian.dual(jax.nn.relu, 1.0, 2.0, 0.5):.12f}")
    0.430626460704

    References
    ----------
    Cho and Saul 2009; Daniely, Frostig, Singer 2016 (arXiv:1602.05897), definition 4; Price 1958.
    """
    act = as_activation(phi)
    return pair(act, act, q1, q2, c)


def dual_prime(phi, q1, q2, c):
    """E[phi'(u) phi'(v)] with the almost-everywhere derivative.

    Parameters, errors and accuracy as for `dual`. Where phi' jumps (relu), the derivative of this function in c is
    infinite at c = +-1, as it is in truth.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> print(f"{ij.gaussian.dual_prime(jax.nn.relu, 1.0, 2.0, 0.5):.12f}")  # (pi - arccos c) / (2 pi)
    0.333333333333

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eq. 7; Jacot, Gabriel, Hongler 2018 (arXiv:1806.07572), theorem 1.
    """
    act = as_activation(phi)
    return pair(act.prime, act.prime, q1, q2, c)


def gain(phi, kind: str = "forward", q=1.0):
    """The factor on unit-variance fan-in weights that makes phi keep a quantity.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    kind : "forward": sqrt(q / E[phi^2]) keeps the second moment q; "chi": 1 / sqrt(E[phi'^2]) keeps gradients
        (chi_1 = 1 at this q); "centered": 1 / std(phi), for layers that remove the mean.
    q : pre-activation second moment at which it holds, > 0.

    Returns
    -------
    Array of the shape of q.

    Raises
    ------
    InputError : unknown kind, or the expectation is 0 (a constant phi has no gain).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, initjax as ij
    >>> print(f"{ij.gain(jax.nn.relu):.10f} {ij.gain(jnp.tanh):.6f} {ij.gain(jax.nn.selu):.6f}")
    1.4142135624 1.592537 1.000000

    References
    ----------
    He et al. 2015 (arXiv:1502.01852), eq. 10, for relu; Klambauer et al. 2017 (arXiv:1706.02515) for selu.
    """
    if kind == "forward":
        below = moment(phi, q) / q
    elif kind == "chi":
        below = moment_prime(phi, q)
    elif kind == "centered":
        below = moment(phi, q) - mean(phi, q) ** 2
    else:
        raise InputError(
            f"kind = {kind!r}.",
            '"forward", "chi" or "centered".',
            "a gain keeps one quantity: the forward second moment, the gradient, or the centred variance.",
            'use kind="forward" for plain networks and kind="chi" for the edge of chaos.',
        )
    if not is_traced(below) and np.any(~(np.asarray(below) > 1e-28)):
        raise InputError(
            f"the expectation below the {kind} gain of {as_activation(phi).name} is {np.min(below):.3g} at q = {q}.",
            "an activation that is not constant, at q > 0.",
            "no factor can restore a quantity that the activation makes zero.",
            "use another activation, or another kind.",
        )
    return 1 / jnp.sqrt(below) if is_traced(below) else scalar(1 / np.sqrt(below))
