r"""Kernel regression and alignment: what training converges to, and how well a kernel suits its targets.

Gradient descent on the linearised network ends, from f_0 = 0, at kernel regression with the NTK; a network of infinite
width, averaged over its posterior, is the same formula with the NNGP kernel (Lee et al. 2018, arXiv:1711.00165).
"""

import dataclasses
from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.spectrum.dense import eigensystem
from initjax.spectrum.requests import bad_shape, finite, refuse_traced


@dataclasses.dataclass(frozen=True)
class KernelRegression:
    """Kernel regression on n training inputs, and at m test inputs. NumPy float64; no k for targets (n,).

    Attributes
    ----------
    coefficients : (n, k), (K + jitter I)^-1 y.
    train : (n, k), fitted values K coefficients.
    test : (m, k), kernel_test_train coefficients, or None.
    variance : (m,), posterior variance of one output at the test inputs, or None.
    log_evidence : log density of y under the Gaussian process, summed over outputs; -inf if K + jitter I is singular.
    jitter : added to the eigenvalues (a noise variance).
    dropped : number of eigendirections that were left out because rounding hides their eigenvalues.
    """

    coefficients: np.ndarray
    train: np.ndarray
    test: Any
    variance: Any
    log_evidence: float
    jitter: float
    dropped: int


def kernel_regression(
    kernel: Any, y: Any, kernel_test_train: Any = None, kernel_test: Any = None, *, jitter: Any = "auto"
) -> KernelRegression:
    r"""Kernel ridge regression, with its jitter chosen from the spectrum.

    With the NTK: what gradient descent on the linearised network converges to, less the part of f_0. With the NNGP
    kernel and `kernel_test`: mean and variance of the posterior of the infinitely wide network.

    Parameters
    ----------
    kernel : (n, n), on the training inputs.
    y : targets, (n,) or (n, k).
    kernel_test_train : (m, n), between test and training inputs.
    kernel_test : (m, m) or its diagonal (m,), for the variance.
    jitter : added to every eigenvalue, >= 0: a noise variance. "auto": 0 where the smallest eigenvalue stands out of
        rounding, else the resolution n eps lambda_max, eps that of the kernel's dtype: directions far above it do not
        feel it, those below were noise. 0 leaves out the directions below that level (pseudo-inverse).

    Returns
    -------
    KernelRegression with coefficients, fitted and predicted values, variance, evidence and the jitter used.

    Raises
    ------
    InputError : shapes that do not fit; a kernel that is no kernel; a negative jitter; traced input.

    Accuracy
    --------
    Solved in the eigenbasis in float64: relative n eps kappa for a condition number kappa of kernel plus jitter.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> k = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> fit = ij.kernel_regression(k, np.array([1.0, -1.0]), np.array([[1.0, 0.0]]), np.array([1.0]))
    >>> round(float(fit.test[0]), 12), round(float(fit.variance[0]), 12), fit.jitter
    (1.0, 0.333333333333, 0.0)

    References
    ----------
    Jacot et al. 2018 (arXiv:1806.07572), section 5; Lee et al. 2018 (arXiv:1711.00165), eqs. 8-9, for the posterior.
    """
    refuse_traced(kernel, y, kernel_test_train, kernel_test)
    targets, lam, vectors, resolution = _system(kernel, y)
    auto = isinstance(jitter, str) and jitter == "auto"
    if not auto and not (isinstance(jitter, int | float | np.number) and 0 <= jitter < np.inf):
        raise InputError(
            f"jitter={jitter!r}",
            'a number >= 0, or "auto"',
            "it is added to every eigenvalue of a positive semi-definite kernel",
            'leave it at "auto"',
        )
    amount = float(jitter) if not auto else resolution if lam[0] <= resolution else 0.0
    kept = lam + amount > 0 if amount else lam > resolution
    inverse = np.where(kept, 1 / np.where(kept, lam + amount, 1.0), 0.0)
    modes = vectors.T @ targets
    coefficients = vectors @ (inverse[:, None] * modes)
    train = vectors @ ((lam * inverse)[:, None] * modes)
    test = variance = None
    if kernel_test_train is not None:
        cross = finite(kernel_test_train, "kernel_test_train")
        if cross.ndim != 2 or cross.shape[1] != len(lam):
            raise bad_shape("kernel_test_train", cross.shape, f"(m, {len(lam)})")
        test = (cross @ coefficients).reshape(len(cross), *np.shape(y)[1:])
        if kernel_test is not None:
            own = finite(kernel_test, "kernel_test")
            own = np.diagonal(own) if own.ndim == 2 and own.shape[0] == own.shape[1] else own
            if own.shape != cross.shape[:1]:
                raise bad_shape("kernel_test", own.shape, f"({len(cross)}, {len(cross)}) or its diagonal")
            # rounding may leave a small negative number
            variance = np.maximum(own - ((cross @ vectors) ** 2) @ inverse, 0.0)
    evidence = float("-inf")
    if np.all(kept):
        k = targets.shape[1]
        evidence = -0.5 * float(
            ((modes**2) * inverse[:, None]).sum() + k * (np.log(lam + amount).sum() + len(lam) * np.log(2 * np.pi))
        )
    shape = np.shape(y)
    return KernelRegression(
        coefficients.reshape(shape), train.reshape(shape), test, variance, evidence, amount, int((~kept).sum())
    )


def kernel_alignment(kernel: Any, y: Any, *, centered: bool = True) -> float:
    r"""Kernel-target alignment: the cosine between a kernel and the Gram matrix y y^T of its targets.

    <K, y y^T> / (|K| |y y^T|) in the Frobenius product, in [0, 1]: how much of the kernel's weight lies along the
    targets, and so is learned first. Centering takes the mean over examples out of both.

    Parameters
    ----------
    kernel : (n, n), positive semi-definite.
    y : targets, (n,) or (n, k), for classes one-hot.
    centered : subtract means first (Cortes, Mohri, Rostamizadeh 2012), without which a constant dominates.

    Returns
    -------
    A float in [0, 1].

    Raises
    ------
    InputError : shapes that do not fit; a kernel that is no kernel; a kernel or targets that are constant (with
        centering) or zero, which have no direction.

    Accuracy
    --------
    A few roundings in float64.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> y = np.array([1.0, -1.0])
    >>> round(ij.kernel_alignment(np.outer(y, y), y), 12), round(ij.kernel_alignment(np.eye(2), y, centered=False), 6)
    (1.0, 0.707107)

    References
    ----------
    Cristianini et al. 2002, "On kernel-target alignment", definition 1; Cortes, Mohri, Rostamizadeh 2012 (JMLR 13),
    definition 4, centered.
    """
    refuse_traced(kernel, y)
    targets, lam, vectors, _ = _system(kernel, y)
    matrix = (vectors * lam) @ vectors.T
    if centered:
        targets = targets - targets.mean(0)
        matrix = matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()
    norms = np.linalg.norm(matrix), np.linalg.norm(targets.T @ targets)
    # centering a constant leaves rounding
    if norms[0] <= 1e-13 * lam.max() or norms[1] <= 1e-26 * max(np.max(np.square(finite(y, "y"))), 1e-300):
        raise InputError(
            f"a kernel of norm {norms[0]:.3g} and targets of norm {norms[1]:.3g}" + (" after centering" * centered),
            "a kernel and targets that vary over examples" if centered else "a kernel and targets that are not zero",
            "their cosine is that between two directions, and one of them has none",
            "give centered=False, or targets of more than one class",
        )
    return float(np.einsum("ik,ij,jk->", targets, matrix, targets) / (norms[0] * norms[1]))


def _system(kernel, y):
    targets = finite(y, "y")
    if targets.ndim not in (1, 2) or targets.size == 0:
        raise bad_shape("y", targets.shape, "(n,) or (n, k)")
    if np.shape(kernel) != (len(targets), len(targets)):
        raise bad_shape("kernel", np.shape(kernel), f"({len(targets)}, {len(targets)}) for y here")
    return targets.reshape(len(targets), -1), *eigensystem(kernel)
