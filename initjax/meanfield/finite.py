r"""How far a network of finite width strays from mean-field theory: the four-point recursion.

For one fixed input, given layer l the pre-activations of layer l + 1 are i.i.d. N(0, S), with S = sigma_b^2 plus
sigma_w^2 mean_j phi(h_j)^2 over the n_l units of layer l. S itself is random, with mean K + g and variance v:
    v' = (sigma_w^4 / n) Var phi^2 + V'(K)^2 v,    g' = V'(K) g + V''(K) v / 2,    v = g = 0 in the first layer,
to first order in 1 / n. For positively homogeneous phi without biases the factors of S are i.i.d., and the second
moment is exact: E S^2 / (E S)^2 = prod(1 + kappa / n_l), kappa = E phi^4 / (E phi^2)^2 - 1 (linear 2, relu 5).

Sources: Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), chapters 4 and 5; for the homogeneous laws Hanin and Nica 2018
(arXiv:1812.05994), Hanin and Rolnick 2018 (arXiv:1803.01719).
"""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma

from initjax.errors import InputError, UnreliableExpansionWarning
from initjax.gaussian.activation import as_activation
from initjax.gaussian.expect import check_q, host_rule
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import result
from initjax.meanfield.roots import variance_roots
from initjax.meanfield.table import ramp, table_of
from initjax.meanfield.trajectory import propagate
from initjax.trace.jaxpr import float64

_FAR = 5.0  # standard deviations of S within which the variance map must lead back: the upper tail is heavy
LARGE = 0.25  # relative variance of S beyond which second order is no small correction


@result
class FiniteWidth:
    """Statistics over random networks of S, the second moment of each layer's pre-activations; index 0 is layer 1.

    Attributes
    ----------
    q : infinite-width value K.
    mean : E S, with the 1/n shift.
    variance : Var S. The standard deviation of a predicted kernel diagonal is its root.
    kurtosis : E h^4 / (E h^2)^2 of one pre-activation, 3 for a Gaussian.
    log_mean, log_variance : mean and variance of ln S relative to ln K, log-normal to the same order.
    index : sum of 1 / n over the hidden layers before, the depth-to-width ratio that all of these grow with.
    exact : whether variance and kurtosis are exact at every width, not only to first order in 1 / n.
    reliable : whether the expansion is small, and no unstable fixed point lies within five standard deviations.
    """

    q: Any
    mean: Any
    variance: Any
    kurtosis: Any
    log_mean: Any
    log_variance: Any
    index: Any
    exact: Any
    reliable: Any


def finite_width(phi, sigma_w, sigma_b=0.0, widths=(), q0=1.0) -> FiniteWidth:
    """Mean shift, variance and kurtosis that finite layers add to mean-field theory, layer by layer.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : standard deviations >= 0, scalars.
    widths : hidden widths n_1 .. n_m, positive: n_l is the fan-in of weight matrix l + 1.
    q0 : second moment of the first layer's pre-activations, the same for every network (a fixed input), > 0.

    Returns
    -------
    FiniteWidth, every field of shape (m + 1,).

    Raises
    ------
    InputError : widths not positive integers, q0 <= 0, bad standard deviations; phi not elementwise.
    QuadratureError : E phi^4 does not exist.

    Warns
    -----
    UnreliableExpansionWarning : depth / width is not small, or the distribution of S reaches an unstable fixed point
        of the variance map (bistable gelu: simulated variances are five times the prediction).

    Accuracy
    --------
    Errors of relative order index^2, except for positively homogeneous phi at sigma_b = 0 (see `exact`).

    Examples
    --------
    >>> import jax, numpy as np, initjax as ij
    >>> he = ij.finite_width(jax.nn.relu, np.sqrt(2.0), widths=[50] * 9)
    >>> print(f"{1 + he.variance[-1] / he.mean[-1] ** 2:.4f}")  # 1.1^9
    2.3579

    References
    ----------
    Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), sections 4.3 and 5.4; Hanin and Nica 2018 (arXiv:1812.05994).
    """
    act = as_activation(phi)
    n = check_widths(widths)
    w, b = (float(check_sigma(v, name).reshape(())) for v, name in ((sigma_w, "sigma_w"), (sigma_b, "sigma_b")))
    q0 = float(check_q(q0, "q0").reshape(()))
    if q0 == 0:
        raise InputError(
            "q0 = 0.", "q0 > 0.", "a dead layer has no distribution.", "pass sigma_w^2 |x|^2 / n_0 + sigma_b^2."
        )
    k = np.asarray(propagate(act, w, b, n.size, q0).q)
    second, fourth = host_rule(act, lambda u, f, slope: [f * f, f**4], k[:-1], 2) if n.size else np.zeros((2, 0))
    slopes = ramp(act)
    exact = slopes is not None and b == 0
    v, g = np.zeros(n.size + 1), np.zeros(n.size + 1)
    if exact and slopes is not None:
        kappa = fourth / second**2 - 1
        v[1:] = k[1:] ** 2 * (np.cumprod(1 + kappa / n) - 1)
        log_mean, log_variance = _homogeneous_logarithms(slopes[0], slopes[1], n, kappa)
    else:
        first, bend = _derivatives(act, w, k[:-1])
        for layer in range(n.size):
            noise = w**4 * (fourth[layer] - second[layer] ** 2) / n[layer]
            v[layer + 1] = noise + first[layer] ** 2 * v[layer]
            g[layer + 1] = first[layer] * g[layer] + bend[layer] * v[layer] / 2
        relative = v / k**2
        log_mean, log_variance = g / k - relative / 2, relative
    reliable = np.ones(k.shape, bool)
    if not exact:
        reliable = (v <= LARGE * k**2) & ~reaches_unstable(act, w, b, k, np.sqrt(v))
    if not np.all(reliable):
        _warn(act, w, b, k, v, reliable)
    mean = k + g
    return FiniteWidth(
        k,
        mean,
        v,
        3 * (1 + v / mean**2),
        log_mean,
        log_variance,
        np.concatenate([[0.0], np.cumsum(1 / n)]),
        np.full(n.size + 1, exact),
        reliable,
    )


def check_widths(widths) -> np.ndarray:
    n = np.atleast_1d(np.asarray(widths, dtype=np.float64)) if np.size(widths) else np.zeros(0)
    if n.ndim != 1 or np.any(~(n >= 1)) or np.any(n != np.floor(n)):
        raise InputError(
            f"widths = {widths!r}.",
            "a sequence of positive whole numbers, one for each hidden layer.",
            "fluctuations are sums of 1 / n over the layers.",
            "pass [256] * 10 for ten hidden layers of 256 units.",
        )
    return n


def _derivatives(act, sigma_w: float, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V'(K) and V''(K) from the table of log M."""
    t = table_of(act)(np, k)
    return sigma_w**2 * t.m * t.r / k, sigma_w**2 * t.m * (t.r * t.r - t.r + t.dr) / k**2


def step(act, sigma_w: float, k: float, v: float, n: int, exact: bool) -> tuple[float, float, float]:
    """Var S behind n units whose own S has mean k and variance v; the part of it that is new; the factor of the rest.

    `exact` : act is positively homogeneous and there are no biases, so that the product of factors is exact.
    """
    second, fourth = (float(m) for m in host_rule(act, lambda u, f, slope: [f * f, f**4], np.array(k), 2))
    noise = sigma_w**4 * (fourth - second**2) / n
    if exact:
        factor = (sigma_w**2 * second / k) ** 2
        return noise * (1 + v / k**2) + factor * v, noise * (1 + v / k**2), factor
    factor = float(_derivatives(act, sigma_w, np.array([k]))[0][0]) ** 2
    return noise + factor * v, noise, factor


def reaches_unstable(act, w, b, k, deviation) -> np.ndarray:
    """Whether an unstable fixed point of the variance map lies within five standard deviations of S, at each k."""
    roots = variance_roots(act, w, b)
    q, slope = np.atleast_1d(np.asarray(roots.q)), np.atleast_1d(np.asarray(roots.chi_q))
    repelling = q[(slope > 1) & (q > 0)]
    near = np.zeros(k.shape, bool)
    for root in repelling:
        near |= np.abs(k - root) < _FAR * deviation
    return near


def _homogeneous_logarithms(right, left, n, kappa):
    """Mean and variance of ln S - ln K for S a product of independent factors."""
    if left == -right or left == right or left == 0 or right == 0:
        table = {size: _log_moments(int(size), left != 0 and right != 0) for size in np.unique(n)}
        mean, variance = np.array([table[size] for size in n]).reshape(-1, 2).T
    else:  # two slopes: a mixture of two chi-squares, to second order in 1 / n
        mean, variance = -kappa / (2 * n), kappa / n
    return np.concatenate([[0.0], np.cumsum(mean)]), np.concatenate([[0.0], np.cumsum(variance)])


def _log_moments(n: int, linear: bool) -> tuple[float, float]:
    """Mean and variance of ln(chi^2_n / n), or of ln(2 chi^2_m / n) with m ~ Binomial(n, 1/2) given m >= 1."""
    m = np.arange(1, n + 1)
    with float64():
        half = jnp.asarray(m / 2)
        psi, psi_1 = np.asarray(digamma(half)), np.asarray(polygamma(1, half))
    if linear:
        return float(psi[-1] - np.log(n / 2)), float(psi_1[-1])
    chance = np.cumsum(np.log(n + 1.0 - m) - np.log(m))  # ln of n over m
    weight = np.exp(chance - chance.max())
    weight /= weight.sum()
    each = psi + np.log(4 / n)
    mean = float(weight @ each)
    return mean, float(weight @ (psi_1 + (each - mean) ** 2))


def _warn(act, w, b, k, v, reliable) -> None:
    at = int(np.argmin(reliable))
    warnings.warn(
        f"{act.name} at sigma_w = {w:g}, sigma_b = {b:g}: in layer {at + 1} the standard deviation of q is "
        f"{np.sqrt(v[at]):.3g} beside q = {k[at]:.3g}, which is not small or reaches an unstable fixed point; from "
        "there on first order in 1/width is no estimate. Wider layers or fewer of them, or measure with ij.measure.",
        UnreliableExpansionWarning,
        stacklevel=3,
    )


__all__ = ["FiniteWidth", "finite_width"]
