"""Condition number, extreme eigenvalues and largest stable learning rate of a kernel, formed or as an operator.

The condition number of the NTK sets how slowly gradient descent learns the slowest direction of the training set (Xiao,
Pennington, Schoenholz 2020, arXiv:1912.13053): of order N at criticality, growing as chi^-L / L with depth in the
ordered phase.
"""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.spectrum.dense import is_array, spectrum
from initjax.spectrum.lanczos import as_operator, lanczos, signs
from initjax.spectrum.results import ExtremeEigenvalues, SpectralEstimate
from initjax.trace.jaxpr import is_traced

# Up to this size all eigenvalues of an operator are computed from its matrix: seconds on two cores.
DENSE = 2048
METHODS = ("auto", "dense", "lanczos")


def extreme_eigenvalues(
    kernel: Any, *, method: str = "auto", tol: float = 1e-6, max_products: int = 500, key: Any = None
) -> ExtremeEigenvalues:
    r"""Smallest and largest eigenvalue of a kernel.

    Parameters
    ----------
    kernel : an array of shape (n, n) or (..., n, n); or a symmetric operator with `shape` and `@`, such as
        `ij.ntk_operator`. Real, positive semi-definite.
    method : "dense": all eigenvalues of the (formed) matrix. "lanczos": products only. "auto": dense for arrays and
        for operators of at most 2048 rows, Lanczos above.
    tol : Lanczos stops when both ends have a residual below tol times themselves, or the lower end is lost in rounding.
    max_products : or after this many products.
    key : of the random starting vector; None for key 0. The same key gives the same answer.

    Returns
    -------
    ExtremeEigenvalues. With Lanczos `largest` is from below, `smallest` from above, whatever the residuals: a residual
    says that an eigenvalue is near, not that it is the last one.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite; traced operators.

    Accuracy
    --------
    Dense: n eps lambda_max. Lanczos: the largest within its residual, about tol, unless the starting vector happens to
    be orthogonal to its eigenvector; the smallest converges as slowly as the spectrum is crowded near it.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> ij.extreme_eigenvalues(np.diag([1.0, 2.0, 5.0]))
    ExtremeEigenvalues(1 ... 5, dense)
    >>> ij.extreme_eigenvalues(np.diag([1.0, 2.0, 5.0]), method="lanczos")
    ExtremeEigenvalues(<= 1 (residual 0) ... >= 5 (residual 0), lanczos, 3 products)

    References
    ----------
    Golub and Van Loan, "Matrix Computations", section 10.1: convergence and error bounds of Lanczos.
    """
    check_method(method)
    if is_array(kernel) and method != "lanczos":
        values, resolution = spectrum(kernel)
        zero = resolution * 0
        return ExtremeEigenvalues(values[..., 0], values[..., -1], zero, zero, resolution, "dense", 0)
    operator = as_operator(kernel)
    if method == "dense" or (method == "auto" and operator.n <= DENSE):
        values, resolution = spectrum(operator.dense())
        return ExtremeEigenvalues(values[0], values[-1], 0.0, 0.0, resolution, "dense", 0)
    found = _ends(operator, tol, max_products, key, both=True)
    values, residuals, _ = found.ritz()
    resolution = float(np.sqrt(operator.n) * operator.eps * values[-1])
    refuse_indefinite(values[0], values[-1], operator)
    low, high, below, above = (float(number) for number in (values[0], values[-1], residuals[0], residuals[-1]))
    return ExtremeEigenvalues(low, high, below, above, resolution, "lanczos", len(found.alpha))


def _ends(operator, tol, max_products, key, both):
    def done(found):
        values, residuals, _ = found.ritz()
        lost = values[0] <= np.sqrt(operator.n) * operator.eps * values[-1]
        low = not both or lost or residuals[0] <= tol * values[0]
        return low and residuals[-1] <= tol * values[-1]

    start = signs(operator.n, 1, key)
    return lanczos(operator, start, int(max_products), done)


def refuse_indefinite(smallest, largest, operator):
    """Raise for an operator whose eigenvalue estimate is negative beyond rounding."""
    if smallest < -np.sqrt(operator.eps) * abs(largest):
        raise InputError(
            f"an operator of shape ({operator.n}, {operator.n}) with a negative eigenvalue, at most {smallest:.3g}",
            "a positive semi-definite kernel",
            "NNGP and NTK are Gram matrices; a negative eigenvalue beyond rounding means that this is no kernel",
            "check how the operator was made",
        )


def check_method(method):
    """Refuse an unknown method."""
    if method not in METHODS:
        raise InputError(
            f"method={method!r}",
            " or ".join(f'"{known}"' for known in METHODS),
            "eigenvalues come from the formed matrix, or from products with it; random projections of the parameters "
            "keep too little of the smallest one",
            'leave method at "auto"',
        )


def condition_number(kernel: Any, *, method: str = "auto", tol: float = 1e-6, max_products: int = 500, key: Any = None):
    r"""Ratio lambda_max / lambda_min of the eigenvalues of a kernel; all n eigenvalues count, none is dropped.

    Where lambda_min is not larger than what rounding leaves undecided, n eps lambda_max with eps that of the kernel's
    dtype, the kernel is singular as far as its entries tell and the answer is inf: never a negative number, as
    lambda_max / lambda_min would be for about half of the kernels deep in the ordered phase.

    Parameters
    ----------
    kernel : real, symmetric, positive semi-definite, shape (n, n), or (..., n, n) for a batch; dimensionless. Or an
        operator with `shape` and `@`, such as `ij.ntk_operator`.
    method : "dense" (all eigenvalues of the formed matrix, O(n^3)), "lanczos" (products only) or "auto": dense for
        arrays and for operators of at most 2048 rows.
    tol, max_products, key : of Lanczos, as in `extreme_eigenvalues`.

    Returns
    -------
    For an array in [1, inf], shape (...); float64, or the tracer's dtype under jit. For an operator, and for
    "lanczos", a SpectralEstimate, whose `float()` is the number. Lanczos sees the spectrum from inside, so its answer
    is a lower bound and says "at least"; inf where the smallest eigenvalue is lost in the rounding of the products.

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
    check_method(method)
    if not is_array(kernel) or method == "lanczos":
        return _condition_number(
            extreme_eigenvalues(kernel, method=method, tol=tol, max_products=max_products, key=key)
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


def _condition_number(ends: ExtremeEigenvalues) -> SpectralEstimate:
    if not ends.resolved:
        note = f"smallest eigenvalue unresolved: below {ends.resolution:.2g}, the rounding of {ends.regime}"
        return SpectralEstimate(float("inf"), 0.0, False, ends.regime, ends.products, note)
    inside = ends.regime != "dense" and not (ends.smallest_error == 0 and ends.largest_error == 0)
    value = float(ends.largest / ends.smallest)
    return SpectralEstimate(value, float("nan") if inside else 0.0, inside, ends.regime, ends.products)


def max_learning_rate(
    ntk: Any, n: Any = None, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
):
    r"""Largest learning rate at which full-batch gradient descent on the linearised network does not diverge.

    2 / lambda_max for the loss 1/2 sum_i (f(x_i) - y_i)^2, and 2 n / lambda_max for its mean over n examples,
    1/(2n) sum_i (f(x_i) - y_i)^2. For k outputs the loss sums over them too, and `ntk` is the kernel averaged over
    outputs, whose largest eigenvalue is that of the full kernel when outputs are alike (exactly so at infinite
    width). With momentum beta the limit is 2 (1 + beta) / lambda (heavy ball), or 2 (1 + beta) / ((1 + 2 beta)
    lambda) (Nesterov), with the definitions of `optax.sgd`; weight decay w adds w to lambda / n.

    Parameters
    ----------
    ntk : real, symmetric, positive semi-definite, shape (m, m), or (..., m, m) for a batch; in the parameterization
        whose gradients the optimiser sees ("standard" for a Flax model). Or an operator, such as `ij.ntk_operator`.
    n : number of examples the loss is averaged over (usually m); None for the sum.
    momentum, nesterov : as in `optax.sgd`, momentum in [0, 1).
    weight_decay : coefficient >= 0 of the parameters that is added to the gradient (`optax.add_decayed_weights`
        before the optimiser).

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
    Relative error of about n eps, eps that of the kernel's dtype; for an operator of more than 2048 rows 1e-6, to the
    safe side (the largest Ritz value and its residual). Networks of finite width leave the linearised
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
    limit. Polyak 1964 for the heavy ball. Nesterov: derived in docs/training.md.
    """
    check_momentum(momentum, nesterov, weight_decay)
    if n is not None and not is_traced(n) and not (np.ndim(n) == 0 and np.isreal(n) and np.isfinite(n) and n > 0):
        raise InputError(
            f"n={n!r}",
            "a positive number of examples, or None",
            "the mean loss divides by n",
            "give n=len(x), or leave it out when the loss is a sum",
        )
    largest = _largest(ntk)
    xp = jnp if is_traced(largest, n) else np
    count = xp.ones_like(largest) if n is None else xp.asarray(n).astype(largest.dtype)
    curvature = largest / count + weight_decay
    factor = (1 + momentum) / (1 + 2 * momentum) if nesterov else 1 + momentum
    positive = curvature > 0
    return xp.where(positive, 2 * factor / xp.where(positive, curvature, xp.ones_like(curvature)), xp.inf)[()]


def _largest(ntk):
    if is_array(ntk):
        return spectrum(ntk, "ntk").values[..., -1]
    operator = as_operator(ntk, "ntk")
    if operator.n <= DENSE:
        return spectrum(operator.dense(), "ntk").values[-1]
    values, residuals, _ = _ends(operator, 1e-6, 500, None, both=False).ritz()
    refuse_indefinite(values[0], values[-1], operator)
    return np.float64(values[-1] + residuals[-1])


def check_momentum(momentum, nesterov, weight_decay):
    """Refuse optimiser settings outside of what gradient descent knows."""
    if not (isinstance(momentum, int | float | np.number) and 0 <= momentum < 1):
        raise InputError(
            f"momentum={momentum!r}",
            "a number in [0, 1)",
            "it is the share of the last step that is kept; at 1 nothing is forgotten and nothing converges",
            "give 0.0 for plain gradient descent, 0.9 for the usual momentum",
        )
    if nesterov and momentum == 0:
        raise InputError(
            "nesterov=True without momentum",
            "nesterov with momentum > 0",
            "without momentum both are plain gradient descent",
            "give momentum=0.9, or leave nesterov out",
        )
    if not (isinstance(weight_decay, int | float | np.number) and 0 <= weight_decay < np.inf):
        raise InputError(
            f"weight_decay={weight_decay!r}",
            "a finite number >= 0",
            "it pulls the parameters back, by learning_rate * weight_decay a step",
            "leave it out for none",
        )
