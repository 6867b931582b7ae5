r"""Sums over all eigenvalues: density, effective rank, log-determinant.

Exact from all eigenvalues where the matrix is formed. Above that, stochastic Lanczos quadrature: for a vector z of
random signs E z^T f(K) z = tr f(K), and z^T f(K) z is the Gauss quadrature of m Lanczos steps (Ubaru, Chen, Saad 2017,
SIAM J. Matrix Anal. Appl. 38(4), algorithm 1). The error is told: the spread over probes, and how much the last
quarter of the steps still changed.
"""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.spectrum.conditioning import DENSE, check_method, refuse_indefinite
from initjax.spectrum.dense import is_array, spectrum
from initjax.spectrum.lanczos import as_operator, lanczos, signs
from initjax.spectrum.results import SpectralDensity, SpectralEstimate
from initjax.trace.jaxpr import is_traced

QUADRATURE = "stochastic lanczos quadrature"


def spectral_density(
    kernel: Any, key: Any = None, *, method: str = "auto", probes: int = 10, steps: int = 64
) -> SpectralDensity:
    r"""Distribution of the eigenvalues of a kernel.

    Parameters
    ----------
    kernel : an array (n, n), or a symmetric operator with `shape` and `@`, such as `ij.ntk_operator`.
    key : random key of the probes; None for key 0. The same key gives the same answer.
    method : "dense", "lanczos", or "auto": dense for arrays and for operators of at most 2048 rows.
    probes, steps : random vectors, and Lanczos steps of each: probes * steps products, `probes` at a time.

    Returns
    -------
    SpectralDensity, with `cumulative(at)`, `density(at, width)`, `mean_of(f)`, each a pair (value, standard error),
    and `plot()`.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite; traced kernels;
        fewer than two probes or steps.

    Accuracy
    --------
    Dense: n eps lambda_max for each eigenvalue. Quadrature: exact for polynomials up to degree 2 steps - 1 but for the
    standard error over probes, about sqrt(2 / (probes n)) for a share of the eigenvalues.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> density = ij.spectral_density(np.diag([1.0, 1.0, 2.0, 8.0]))
    >>> share, error = density.cumulative(2.0)
    >>> float(share), float(error)
    (0.75, 0.0)

    References
    ----------
    Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", algorithm 1; Ghorbani,
    Krishnan, Xiao 2019 (arXiv:1901.10159), for densities.
    """
    return _density(kernel, key, method, probes, steps)[0]


def _density(kernel, key, method, probes, steps, name="kernel"):
    """The density, a coarser one by three quarters of the steps, and the resolution below which values are rounding."""
    check_method(method)
    for what, number in (("probes", probes), ("steps", steps)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 2:
            raise InputError(
                f"{what}={number!r}",
                "an integer >= 2",
                "a spread over probes needs two of them, a quadrature two points",
                f"leave {what} out for the default",
            )
    array = is_array(kernel)
    if is_traced(kernel):
        raise InputError(
            f"a traced {name}",
            "a concrete one",
            "a density is described by points on the host",
            "call it outside jit",
        )
    operator = None if array and method != "lanczos" else as_operator(kernel, name)
    if operator is None or method == "dense" or (method == "auto" and operator.n <= DENSE):
        values, resolution = spectrum(kernel if operator is None else operator.dense(), name)
        if values.ndim > 1:
            raise InputError(
                f"a batch of kernels of shape {np.shape(kernel)}",
                "one kernel of shape (n, n)",
                "each has a density of its own",
                "loop over the batch",
            )
        n = len(values)
        density = SpectralDensity(np.asarray(values)[None], np.full((1, n), 1 / n), n, "dense", 0)
        return density, density, float(resolution)
    found = lanczos(operator, signs(operator.n, int(probes), key), int(steps), lambda found: False)
    done = len(found.alpha)
    fine, coarse = (_points(found, operator.n, end, probes * done) for end in (done, max(1, done * 3 // 4)))
    top = fine.nodes.max()
    refuse_indefinite(fine.nodes.min(), top, operator)
    return fine, coarse, float(np.sqrt(operator.n) * operator.eps * top)


def _points(found, n, steps, products):
    """Nodes and weights of every probe; those of an exhausted one are filled up with weight 0."""
    probes = found.alpha.shape[1]
    nodes, weights = np.zeros((2, probes, steps))
    for probe in range(probes):
        values, _, shares = found.ritz(probe, steps)
        nodes[probe], weights[probe, : len(values)] = values[-1], shares
        nodes[probe, : len(values)] = values
    return SpectralDensity(nodes, weights, n, QUADRATURE, int(products))


def _mean(density, coarse, function):
    """Mean of `function` over eigenvalues, with an error from probes and from the number of steps."""
    value, spread = density.mean_of(function)
    return float(value), float(np.hypot(spread, np.abs(value - coarse.mean_of(function)[0])))


def log_determinant(
    kernel: Any, *, jitter: float = 0.0, method: str = "auto", key: Any = None, probes: int = 10, steps: int = 64
) -> SpectralEstimate:
    r"""log det (K + jitter I), the sum of the logarithms of the eigenvalues.

    Parameters
    ----------
    kernel, method, key, probes, steps : as in `spectral_density`.
    jitter : added to every eigenvalue; >= 0.

    Returns
    -------
    SpectralEstimate with value, error and regime. -inf, and a note, where an eigenvalue (with jitter) is lost in
    rounding: its logarithm is not known at all.

    Raises
    ------
    InputError : as in `spectral_density`; a jitter that is negative or not finite.

    Warns
    -----
    UserWarning : -inf was returned because of rounding.

    Accuracy
    --------
    Dense: n^2 eps kappa at worst, mostly in the smallest eigenvalues. Quadrature: `error`, one standard error over
    probes and the change of the last quarter of the steps; logarithms converge in about sqrt(kappa) steps.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> ij.log_determinant(np.diag([1.0, 2.0, 4.0]))
    2.07944 (dense)

    References
    ----------
    Ubaru, Chen, Saad 2017, section 5.1, log-determinants by stochastic Lanczos quadrature.
    """
    if not (isinstance(jitter, int | float | np.number) and 0 <= jitter < np.inf):
        raise InputError(
            f"jitter={jitter!r}",
            "a finite number >= 0",
            "it moves the spectrum away from zero",
            "give some 1e-6 of the largest eigenvalue, or leave it out",
        )
    density, coarse, resolution = _density(kernel, key, method, probes, steps)
    smallest = density.nodes.min() + jitter
    if smallest <= resolution:
        note = f"an eigenvalue is unresolved: {smallest:.2g}, below the rounding {resolution:.2g}"
        warnings.warn(f"log-determinant -inf: {note}. Compute the kernel in float64, or add jitter.", stacklevel=2)
        return SpectralEstimate(float("-inf"), 0.0, False, density.regime, density.products, note)
    value, error = _mean(density, coarse, lambda nodes: np.log(nodes + jitter))
    return SpectralEstimate(density.n * value, density.n * error, False, density.regime, density.products)


def effective_rank(kernel: Any, *, method: str = "auto", key: Any = None, probes: int = 10, steps: int = 64):
    r"""Effective rank of Roy and Vetterli: the exponential of the entropy of the normalised eigenvalues.

    exp(-sum_i p_i log p_i) with p_i = lambda_i / sum_j lambda_j. It is n for a multiple of the identity, 1 for a
    kernel that sees all inputs alike, and r for r equal eigenvalues and zeros. Unlike the rank it does not jump with
    rounding.

    Parameters
    ----------
    kernel : real, symmetric, positive semi-definite, shape (n, n), or (..., n, n) for a batch; or an operator, such as
        `ij.ntk_operator`, whose exact trace is used where it has a method `trace`.
    method, key, probes, steps : as in `spectral_density`.

    Returns
    -------
    For an array in [1, n], shape (...); float64, or the tracer's dtype under jit. Exactly 0 for the zero kernel, which
    has no direction. For an operator, and for "lanczos", a SpectralEstimate.

    Raises
    ------
    InputError : a kernel that is not square, symmetric, real, finite and positive semi-definite.

    Accuracy
    --------
    Relative error of about n eps log(1 / eps), eps that of the kernel's dtype; quadrature: `error`.

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
    check_method(method)
    if is_array(kernel) and method != "lanczos":
        return _entropy_rank(spectrum(kernel)[0])
    density, coarse, _ = _density(kernel, key, method, probes, steps)
    if density.regime == "dense":
        return SpectralEstimate(float(_entropy_rank(density.nodes[0])), 0.0, False, "dense", 0)
    exact: Any = getattr(kernel, "trace", None)
    total = float(exact()) if exact is not None else density.n * float(density.mean_of(lambda nodes: nodes)[0])
    if total <= 0:
        return SpectralEstimate(0.0, 0.0, False, density.regime, density.products)

    def entropy(nodes):
        p = np.where(nodes > 0, nodes, 0.0) / total
        return -p * np.log(np.where(p > 0, p, 1.0))

    value, error = _mean(density, coarse, entropy)
    rank = float(np.exp(density.n * value))
    return SpectralEstimate(rank, rank * density.n * error, False, density.regime, density.products)


def _entropy_rank(values):
    xp = jnp if is_traced(values) else np
    # rounding may leave small negative values: they carry no weight
    values = xp.where(values > 0, values, xp.zeros_like(values))
    total = values.sum(-1, keepdims=True)
    p = values / xp.where(total > 0, total, xp.ones_like(total))
    entropy = -(p * xp.log(xp.where(p > 0, p, xp.ones_like(p)))).sum(-1)
    return xp.where(total[..., 0] > 0, xp.exp(entropy), xp.zeros_like(entropy))[()]
