r"""The first state of the recursion: what a data set gives the first layer.

    q_1 = sigma_w^2 |x|^2 / d + sigma_b^2,    c_1 = (sigma_w^2 x.x' / d + sigma_b^2) / sqrt(q_1 q_1')
Source: Poole et al. 2016 (arXiv:1606.05340), eqs. 3, 6 at l = 1.
"""

import warnings

import numpy as np

from initjax.errors import InputError, UnnormalisedInputsWarning
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import result
from initjax.meanfield.state import refuse_tracers

_SCALE = (0.5, 2.0)  # mean second moment outside this: not normalised
_SPREAD = 10.0  # ratio of the largest to the smallest sample's second moment above which one q does not describe them


@result
class Inputs:
    """Moments of a data set of n samples with d features each.

    Attributes
    ----------
    second_moment : mean over samples of |x|^2 / d.
    second_moments : |x|^2 / d of each sample, (n,).
    mean : mean of all entries.
    mean_share : |mean sample|^2 / d over second_moment: the part of every sample that is common to all, in [0, 1].
    correlation : mean cosine of two different samples; nan for one sample.
    correlation_std : standard deviation of that cosine over pairs.
    q_1 : mean second moment of the first pre-activations, for the given sigma_w and sigma_b.
    c_1 : correlation of the first pre-activations of two samples with mean second moment and mean inner product.
    """

    second_moment: np.floating
    second_moments: np.ndarray
    mean: np.floating
    mean_share: np.floating
    correlation: np.floating
    correlation_std: np.floating
    q_1: np.floating
    c_1: np.floating


def inputs(x, sigma_w=1.0, sigma_b=0.0) -> Inputs:
    """Second moment, mean and correlations of a data set, and the q and c with which a network starts on it.

    Parameters
    ----------
    x : (n, ...) real or integer array; all axes but the first are features.
    sigma_w, sigma_b : standard deviations of the first layer (Var W = sigma_w^2 / fan_in, Var b = sigma_b^2).

    Returns
    -------
    Inputs with second_moment, second_moments (n,), mean, mean_share, correlation, correlation_std, q_1, c_1.

    Raises
    ------
    InputError : empty, NaN, infinite, complex or traced x; a sigma that is negative or not one number.

    Warns
    -----
    UnnormalisedInputsWarning : the mean second moment is outside [0.5, 2], or samples differ by more than 10 times in
        it. Attributes `quantity` and `value` carry the number.

    Accuracy
    --------
    float64 rounding. The statistics of pairs are over all n (n - 1) / 2 pairs, in O(n d min(n, d)) time.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> x = jax.random.normal(jax.random.key(0), (200, 50))
    >>> moments = ij.inputs(x, sigma_w=1.5, sigma_b=0.5)
    >>> print(f"{moments.second_moment:.2f} {moments.correlation:.2f} {moments.q_1:.2f} {moments.c_1:.2f}")
    1.02 -0.00 2.55 0.10

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3, 6.
    """
    refuse_tracers("inputs", x, sigma_w, sigma_b)
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    given = np.asarray(x)
    if str(given.dtype) in ("bfloat16", "float16"):
        given = given.astype(np.float32)
    problem = ""
    if given.dtype.kind not in "fiub":
        problem = f"dtype {given.dtype}"
    elif given.ndim < 2 or not given.size:
        problem = f"shape {given.shape}"
    elif not np.all(np.isfinite(given)):
        problem = f"{np.sum(~np.isfinite(given))} entries that are NaN or infinite"
    elif w.ndim or b.ndim:
        problem = f"sigma_w of shape {w.shape} and sigma_b of shape {b.shape}"
    if problem:
        raise InputError(
            f"inputs got {problem}.",
            "a real (n, ...) array of n samples, and one sigma_w and sigma_b.",
            "second moments and correlations are taken over the features of each sample.",
            "pass x[None] for one sample, x[:, None] for one feature a sample; remove samples with missing values.",
        )
    x = given.reshape(len(given), -1).astype(np.float64)
    n, d = x.shape
    second = np.einsum("nd,nd->n", x, x) / d
    total = float(second.mean())
    centre = x.mean(axis=0)
    share = float(centre @ centre / d / total) if total else 0.0
    correlation, spread, inner = np.nan, np.nan, np.nan
    if n > 1:
        inner = float((n * n * (centre @ centre) / d - second.sum()) / (n * (n - 1)))
        alive = second > 0
        unit = x[alive] / np.sqrt(second[alive] * d)[:, None]
        m = len(unit)
        if m > 1:
            sums = unit.sum(axis=0)
            correlation = float(np.clip((sums @ sums - m) / (m * (m - 1)), -1, 1))
            gram = unit @ unit.T if m < d else unit.T @ unit  # the same Frobenius norm
            square = (np.sum(gram * gram) - m) / (m * (m - 1))
            spread = float(np.sqrt(max(square - correlation**2, 0.0)))
    vw, vb = float(w) ** 2, float(b) ** 2
    q_1 = vw * total + vb
    c_1 = np.clip((vw * inner + vb) / q_1, -1.0, 1.0) if q_1 > 0 else np.nan
    _warn(total, second, share)
    numbers = (x.mean(), share, correlation, spread, q_1, c_1)
    return Inputs(np.float64(total), second, *(np.float64(v) for v in numbers))


def _warn(total: float, second: np.ndarray, share: float) -> None:
    low, high = float(second.min()), float(second.max())
    if not _SCALE[0] <= total <= _SCALE[1]:
        centred = f"; {share:.0%} of it is the mean sample" if share > 0.1 else ""
        message = (
            f"the inputs have second moment |x|^2 / d = {total:.6g}, not about 1{centred}: the first layer starts at "
            f"q_1 = {total:.6g} sigma_w^2 + sigma_b^2, away from the fixed point that the weights are chosen for. "
            "Subtract the mean of each feature and divide by the standard deviation."
        )
        warnings.warn(UnnormalisedInputsWarning(message, "second_moment", total), stacklevel=3)
    elif high > _SPREAD * low:
        message = (
            f"second moments |x|^2 / d of single samples range from {low:.3g} to {high:.3g}: one q_1 does not describe "
            "them all. Normalise each sample, or look at `second_moments`."
        )
        ratio = high / low if low else np.inf
        warnings.warn(UnnormalisedInputsWarning(message, "spread", ratio), stacklevel=3)
