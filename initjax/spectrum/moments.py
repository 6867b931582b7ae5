r"""Second moments of linear training: over initializations, and over batches.

Initializations: f_0 is Gaussian with covariance K (the NNGP kernel), so outputs, linear in f_0, are Gaussian (Lee et
al. 2019, arXiv:1902.06720, eqs. 14-16). Batches b of B examples, each drawn uniformly with replacement, move the
residuals by r' = r - (eta / B) sum_{i in b} Theta e_i r_i, whence E r' = (I - eta Theta / n) E r and, with C = E r r^T,

    C' = C - (eta / n) (Theta C + C Theta) + eta^2 Theta [(1 - 1/B) C / n^2 + diag(C) / (B n)] Theta.
"""

import numpy as np

from initjax.errors import InputError
from initjax.spectrum.requests import bad_shape, finite, overflow


def over_initializations(modes, vectors, covariance, cross, nngp_test_train, nngp_test, examples):
    """Variances over initializations: R K R^T on training inputs, and of f_0(x*) - Theta_* A (f_0 - y) on test ones."""
    inside = vectors.T @ covariance @ vectors
    # R K R^T in the eigenbasis, then its diagonal among the examples
    train = np.stack([np.einsum("ni,ij,nj->n", vectors * R, inside, vectors * R, optimize=True) for R in modes.R])
    if cross is None:
        return train, None
    cross = finite(cross, "ntk_test_train")
    mixed, own = finite(nngp_test_train, "nngp_test_train"), finite(nngp_test, "nngp_test")
    own = np.diagonal(own) if own.ndim == 2 else own
    if mixed.shape != cross.shape or own.shape != cross.shape[:1]:
        raise bad_shape(
            "nngp_test_train and nngp_test", (mixed.shape, own.shape), f"{cross.shape} and ({len(cross)},) or square"
        )
    reach, mixed = cross @ vectors, mixed @ vectors
    test = []
    for A in modes.A:
        gain = reach * A
        test.append(own - 2 * (gain * mixed).sum(1) + np.einsum("mi,ij,mj->m", gain, inside, gain, optimize=True))
    return train, np.maximum(np.stack(test), 0.0)


def over_batches(lam, vectors, second, mean, times, eta, batch, k):
    """Expected squares and variances under batches drawn with replacement: the exact recursion of E[r r^T]."""
    n = len(lam)
    steps = int(times[-1]) if len(times) else 0
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise InputError(
            f"batch_size={batch!r}",
            "an integer >= 1",
            "it is the number of examples drawn for a step",
            "leave it out for full batches",
        )
    if float(steps) * n**3 > 1e13:
        raise InputError(
            f"batch_size={batch} for {n} examples and {steps} steps",
            "at most 1e13 for steps * examples^3",
            "each step moves an n x n matrix of second moments",
            "take fewer examples or steps; the mean needs no batch_size",
        )
    theta = (vectors * lam) @ vectors.T
    squares, variances, done = [], [], 0
    for time, now in zip(times, mean, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(int(time) - done):
                drift = theta @ second / n
                pairs = (1 - 1 / batch) * (drift @ theta) / n + (theta * (np.diagonal(second) / (batch * n))) @ theta
                second = second - eta * (drift + drift.T) + eta**2 * pairs
        done = int(time)
        diagonal = np.diagonal(second)
        if not np.all(np.isfinite(diagonal)):
            raise overflow(time, eta, "smaller batches bear smaller rates than ij.max_learning_rate")
        squares.append(diagonal.sum())
        variances.append(np.maximum((diagonal - (now**2).sum(1)) / k, 0.0))
    return np.array(squares), np.stack(variances)
