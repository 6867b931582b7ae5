"""Condition number, effective rank and largest stable learning rate of a formed kernel.

The condition number of the NTK sets how slowly gradient descent learns the slowest direction of the training set (Xiao,
Pennington, Schoenholz 2020, arXiv:1912.13053): of order N at criticality, growing as chi^-L / L with depth in the
ordered phase.
"""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.spectrum.dense import spectrum
from initjax.trace.jaxpr import is_traced


def condition_number(kernel: Any, *, method: str = "auto"):
    r"""Ratio lambda_max / lambda_min of the eigenvalues of a kernel; all n eigenvalues count, none is dropped.

    Where lambda_min is not larger than what rounding leaves undecided, n eps lambda_max with eps that of the kernel's
    dtype, the kernel is singular as far as its entries tell and the answer is inf: never a negative number, as
    lambda_max / lambda_min would be for about half of the kernels deep in the ordered phase.

    Parameters
    ----------
    kernel : real, symmetric, positive semi-definite, shape (n, n), or (..., n, n) for a batch; dimensionless.
    method : "auto" or "dense" (all eigenvalues of the formed matrix, O(n^3)).

    Returns
    -------
    In [1, inf], shape (...); float64, or the tracer's dtype under jit.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite; an unknown method.
        Under jit the entries are not seen: NaN gives NaN.

    Warns
    -----
    UserWarning : inf was returned because the kernel is stored in less than float64.

    Accuracy
    --------
    Relative error of about n eps kappa for a condition number kappa below 1 / (n eps): at n = 100, kappa = 1e4 is
    good to 0.01 in float32 and to 1e-10 in float64.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> float(ij.condition_number(np.array([[2.0, 1.0], [1.0, 2.0]])))
    3.0
    >>> float(ij.condition_number(np.ones((3, 3))))  # one direction only: two eigenvalues vanish
    inf

    References
    ----------
    Xiao, Pennington, Schoenholz 2020 (arXiv:1912.13053), kappa = lambda_max / lambda_min and its phases.
    """
    if method not in ("auto", "dense"):
        raise InputError(
            f"method={method!r}",
            '"auto" or "dense"',
            "a condition number needs the smallest eigenvalue resolved, which only the formed kernel gives",
            'leave method at "auto"',
        )
    values, resolution = spectrum(kernel)
    smallest, largest = values[..., 0], values[..., -1]
    resolved = smallest > resolution
    if is_traced(values):
        ratio = jnp.where(resolved, largest / jnp.where(resolved, smallest, jnp.ones_like(smallest)), jnp.inf)
        return jnp.where(jnp.isnan(largest), largest, ratio)
    dtype = getattr(kernel, "dtype", np.dtype(np.float64))
    if not np.all(resolved) and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 64:
        warnings.warn(
            f"condition number inf: smallest eigenvalue {np.min(smallest):.2g}, below the rounding of a {dtype} "
            f"kernel, {np.max(resolution):.2g}. Compute the kernel in float64 to resolve more.",
            stacklevel=2,
        )
    return np.where(resolved, largest / np.where(resolved, smallest, 1.0), np.inf)[()]


def effective_rank(kernel: Any):
    r"""Effective rank of Roy and Vetterli: the exponential of the entropy of the normalised eigenvalues.

    exp(-sum_i p_i log p_i) with p_i = lambda_i / sum_j lambda_j. It is n for a multiple of the identity, 1 for a
    kernel that sees all inputs alike, and r for r equal eigenvalues and zeros. Unlike the rank it does not jump with
    rounding.

    Parameters
    ----------
    kernel : real, symmetric, positive semi-definite, shape (n, n), or (..., n, n) for a batch.

    Returns
    -------
    In [1, n], shape (...); float64, or the tracer's dtype under jit. Exactly 0 for the zero kernel, which has no
    direction.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite.

    Accuracy
    --------
    Relative error of about n eps log(1 / eps), eps that of the kernel's dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> round(float(ij.effective_rank(np.eye(5))), 12), round(float(ij.effective_rank(np.ones((5, 5)))), 12)
    (5.0, 1.0)

    References
    ----------
    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, definition 1.
    """
    values, _ = spectrum(kernel)
    xp = jnp if is_traced(values) else np
    # rounding may leave small negative values: they carry no weight
    values = xp.where(values > 0, values, xp.zeros_like(values))
    total = values.sum(-1, keepdims=True)
    p = values / xp.where(total > 0, total, xp.ones_like(total))
    entropy = -(p * xp.log(xp.where(p > 0, p, xp.ones_like(p)))).sum(-1)
    return xp.where(total[..., 0] > 0, xp.exp(entropy), xp.zeros_like(entropy))[()]


def max_learning_rate(ntk: Any, n: Any = None):
    r"""Largest learning rate at which full-batch gradient descent on the linearised network does not diverge.

    2 / lambda_max for the loss 1/2 sum_i (f(x_i) - y_i)^2, and 2 n / lambda_max for its mean over n examples,
    1/(2n) sum_i (f(x_i) - y_i)^2. For k outputs the loss sums over them too, and `ntk` is the kernel averaged over
    outputs, whose largest eigenvalue is that of the full kernel when outputs are alike (exactly so at infinite
    width).

    Parameters
    ----------
    ntk : real, symmetric, positive semi-definite, shape (m, m), or (..., m, m) for a batch; in the parameterization
        whose gradients the optimiser sees ("standard" for a Flax model).
    n : number of examples the loss is averaged over (usually m); None for the sum.

    Returns
    -------
    Positive, shape (...), in units of the optimiser's learning rate; inf for the zero kernel. float64, or the
    tracer's dtype.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite; n that is not
        positive.

    Accuracy
    --------
    Relative error of about n eps, eps that of the kernel's dtype. Networks of finite width leave the linearised
    regime: they can survive up to about twice this rate (Lewkowycz et al. 2020, arXiv:2003.02218).

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> ntk = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> round(float(ij.max_learning_rate(ntk)), 12), round(float(ij.max_learning_rate(ntk, n=2)), 12)
    (0.666666666667, 1.333333333333)

    References
    ----------
    Lee et al. 2019 (arXiv:1902.06720), eta_critical = 2 / (lambda_min + lambda_max), of which this is the stability
    limit.
    """
    if n is not None and not is_traced(n) and not (np.ndim(n) == 0 and np.isreal(n) and np.isfinite(n) and n > 0):
        raise InputError(
            f"n={n!r}",
            "a positive number of examples, or None",
            "the mean loss divides by n",
            "give n=len(x), or leave it out when the loss is a sum",
        )
    values, _ = spectrum(ntk, "ntk")
    largest = values[..., -1]
    xp = jnp if is_traced(largest, n) else np
    count = xp.ones_like(largest) if n is None else xp.asarray(n).astype(largest.dtype)
    positive = largest > 0
    return xp.where(positive, 2 * count / xp.where(positive, largest, xp.ones_like(largest)), xp.inf)[()]
