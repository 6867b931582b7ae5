r"""Gains of random linear layers: forward and backward, for a unit and for the norm, on average and typically.

For W of shape (fan_in, fan_out) with independent entries of mean 0 and variance s^2,
    forward,  E per-unit second moment: fan_in s^2,    squared norm: fan_out s^2,
    backward, E per-unit second moment: fan_out s^2,   squared norm: fan_in s^2,
which agree for square layers only. Gaussian W multiplies the squared norm by s^2 chi^2_fan_out exactly, so that a deep
product is close to log-normal: its typical value lies below its mean by a factor exp(-L / n).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.gaussian import moment, moment_prime
from initjax.trace.jaxpr import float64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearGain:
    """Gains of a deep linear network at initialization; floats.

    Attributes
    ----------
    forward, forward_norm : mean factor on a unit's second moment, on the squared norm, from the input to the output.
    backward, backward_norm : the same for gradients, from the output to the input.
    typical : exp(E log) of the factor on the squared norm, for Gaussian weights: about its median.
    log_mean, log_variance : mean and variance of the logarithm of that factor.
    square : E[factor^2] / E[factor]^2, prod(1 + 2 / fan_out).
    fluctuation : sum of 1 / fan_out, the depth over the width: beyond about 1 the mean describes no single network.
    """

    forward: Any
    forward_norm: Any
    backward: Any
    backward_norm: Any
    typical: Any
    log_mean: Any
    log_variance: Any
    square: Any
    fluctuation: Any


def linear_gain(std, widths) -> LinearGain:
    r"""Gains of a deep linear network x -> x W_1 ... W_L with independent weights of standard deviation `std`.

    Parameters
    ----------
    std : standard deviation of the entries, > 0: a number, or one for each layer.
    widths : (n_0, ..., n_L), input, hidden and output sizes; (fan_in, fan_out) for one layer, [n] * (L + 1) for L
        square layers.

    Returns
    -------
    LinearGain. In a square network forward = backward = (n std^2)^L, the figure that is usually quoted.

    Raises
    ------
    InputError : fewer than two widths, widths that are no positive integers, std not finite and positive.

    Accuracy
    --------
    1e-13 relative; exact for Gaussian weights, the means for any distribution of that variance.

    Examples
    --------
    >>> import initjax as ij
    >>> gain = ij.applications.signal.linear_gain(64**-0.5, [64] * 65)  # 64 layers of width 64 with n std^2 = 1
    >>> print(f"mean {gain.forward_norm:.3f}, typical {gain.typical:.3f}, variance of the log {gain.log_variance:.4f}")
    mean 1.000, typical 0.366, variance of the log 2.0316

    References
    ----------
    Hanin and Nica 2018 (arXiv:1812.05994); moments of log chi^2.
    """
    widths, std = _layers(std, widths)
    below, above = widths[:-1], widths[1:]
    log_std = 2 * np.log(std)
    with float64():
        half = jnp.asarray(above / 2)
        log_mean = np.asarray(jax.scipy.special.digamma(half)) + np.log(2) + log_std
        log_variance = np.asarray(jax.scipy.special.polygamma(1, half))
    forward, norm = np.exp(np.sum(log_std + np.log(below))), np.exp(np.sum(log_std + np.log(above)))
    return LinearGain(
        forward,
        norm,
        norm,  # the transpose: fan_in and fan_out change places
        forward,
        np.exp(log_mean.sum()),
        log_mean.sum(),
        log_variance.sum(),
        np.prod(1 + 2 / above),
        np.sum(1 / above),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XavierReport:
    """What Xavier initialization keeps in a network, layer by layer; arrays (L,).

    Attributes
    ----------
    fan_in, fan_out : of every layer.
    std, limit : standard deviation sqrt(2 / (fan_in + fan_out)), and the limit sqrt(3) std of the uniform version.
    forward, backward : factors 2 fan_in / (fan_in + fan_out) and 2 fan_out / (fan_in + fan_out) on the second moments
        of pre-activations and of gradients, without the activation.
    q : second moment of every layer's pre-activations, for inputs of mean square 1.
    gradient : second moment of the gradient with respect to them, for an output gradient of 1.
    lecun_std, he_std : 1 / sqrt(fan_in) and sqrt(2 / fan_in), for comparison.
    """

    fan_in: Any
    fan_out: Any
    std: Any
    limit: Any
    forward: Any
    backward: Any
    q: Any
    gradient: Any
    lecun_std: Any
    he_std: Any


def xavier_report(widths, phi=None) -> XavierReport:
    r"""Xavier's compromise in figures: neither signals nor gradients are kept where layers are not square.

    Variance 2 / (fan_in + fan_out) multiplies second moments by 2 fan_in / (fan_in + fan_out) forward and
    2 fan_out / (fan_in + fan_out) backward. Between the layers E[phi(sqrt(q) z)^2] and E[phi'(sqrt(q) z)^2] enter: relu
    halves both.

    Parameters
    ----------
    widths : (n_0, ..., n_L).
    phi : activation between the layers; None for a linear network.

    Returns
    -------
    XavierReport.

    Raises
    ------
    InputError : as `linear_gain`.

    Accuracy
    --------
    1e-13 relative, in the wide limit; `q` is exact at any width for linear networks.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> report = ij.applications.signal.xavier_report([256, 64, 64, 64], jax.nn.relu)
    >>> print(report.forward.round(2).tolist(), report.backward.round(2).tolist(), report.q.round(3).tolist())
    [1.6, 1.0, 1.0] [0.4, 1.0, 1.0] [1.6, 0.8, 0.4]

    References
    ----------
    Glorot and Bengio 2010, eqs. 12 and 16; He et al. 2015 (arXiv:1502.01852), section 2.2.
    """
    widths, _ = _layers(1.0, widths)
    fan_in, fan_out = widths[:-1], widths[1:]
    variance = 2 / (fan_in + fan_out)
    q = np.empty(fan_in.size)
    signal = 1.0
    for layer, gain in enumerate(variance * fan_in):
        q[layer] = gain * signal
        signal = q[layer] if phi is None else float(moment(phi, q[layer]))
    gradient = np.ones(fan_in.size)
    for layer in range(fan_in.size - 2, -1, -1):
        slope = 1.0 if phi is None else float(moment_prime(phi, q[layer]))
        gradient[layer] = gradient[layer + 1] * variance[layer + 1] * fan_out[layer + 1] * slope
    return XavierReport(
        fan_in.astype(int),
        fan_out.astype(int),
        np.sqrt(variance),
        np.sqrt(3 * variance),
        variance * fan_in,
        variance * fan_out,
        q,
        gradient,
        1 / np.sqrt(fan_in),
        np.sqrt(2 / fan_in),
    )


def _layers(std, widths) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.asarray(widths)
    if sizes.ndim != 1 or sizes.size < 2 or sizes.dtype.kind not in "iu" or np.any(sizes < 1):
        raise InputError(
            f"widths = {widths!r}",
            "at least two positive integers (n_0, ..., n_L)",
            "a layer has an input and an output size",
            "give (fan_in, fan_out) for one layer, [n] * (depth + 1) for a square network",
        )
    std = np.asarray(std, np.float64)
    if std.shape not in ((), (sizes.size - 1,)) or not np.all(np.isfinite(std) & (std > 0)):
        raise InputError(
            f"std = {std.tolist()!r} for {sizes.size - 1} layers",
            "one finite positive number, or one for each layer",
            "it is the standard deviation of the weights",
            "for a gain g in mean-field scaling give g / sqrt(fan_in)",
        )
    return sizes.astype(np.float64), np.broadcast_to(std, (sizes.size - 1,))
