r"""Golub-Kahan bidiagonalisation with full reorthogonalisation: singular values of a map from products with it alone.

Started at u_1, products with J^T and J in turn give orthonormal bases with U^T J V = B lower bidiagonal. B B^T is what
Lanczos finds for J J^T, but the singular values of B keep eps |J| of absolute error, where the eigenvalues of B B^T
would lose everything below sqrt(eps) |J|. With w a left singular vector of B of length k, u_1^T f(J J^T) u_1 =
sum_i w_1i^2 f(s_i^2) up to degree 2 k - 1 (Gauss quadrature), and some eigenvalue of J J^T lies within
alpha_k beta_k |w_ki| of s_i^2.

Sources: Golub and Kahan 1965 (SIAM J. Numer. Anal. 2(2)), Paige and Saunders 1982 (ACM TOMS 8(1)),
algorithm "Bidiag 1".
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from initjax.errors import InputError

Product = Callable[[np.ndarray], np.ndarray]


class Bidiagonal(NamedTuple):
    """Of p starting vectors after k steps: alpha, beta (k, p). A zero ends a probe: behind it there is nothing."""

    alpha: np.ndarray
    beta: np.ndarray

    def ritz(self, probe: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues of J J^T ascending, their residual bounds, and squared first components, of one probe."""
        alpha, beta = self.alpha[:, probe], self.beta[:, probe]
        ends = np.flatnonzero((alpha == 0) | (beta == 0))
        size = int(ends[0]) + 1 if ends.size else len(alpha)
        left, s, _ = np.linalg.svd(np.diag(alpha[:size]) + np.diag(beta[: size - 1], -1))
        residual = alpha[size - 1] * beta[size - 1] * np.abs(left[-1])
        return s[::-1] ** 2, residual[::-1], left[0, ::-1] ** 2


def bidiagonalise(forward: Product, backward: Product, start: np.ndarray, steps: int, eps: float) -> Bidiagonal:
    """Bidiagonalise from the rows of `start` (p, n_out); `forward` maps rows (p, n_in) to (p, n_out), `backward` back.

    eps : relative rounding of a product; a new direction below it is none.
    """
    p, n_out = start.shape
    u = start / np.linalg.norm(start, axis=1, keepdims=True)
    v = _finite(backward(u))
    n_in = v.shape[1]
    steps = min(steps, n_out)
    lefts, rights = np.zeros((p, steps, n_out)), np.zeros((p, steps, n_in))
    alpha, beta = np.zeros((2, steps, p))
    scale = np.linalg.norm(v, axis=1)
    floor = 4 * np.sqrt(max(n_out, n_in)) * eps
    for k in range(steps):
        lefts[:, k] = u
        alpha[k], rights[:, k] = _fresh(v, rights[:, :k], floor * scale)
        if k + 1 == n_out or not np.any(alpha[k]):
            break
        w = _finite(forward(rights[:, k]))
        scale = np.maximum(scale, np.linalg.norm(w, axis=1))
        beta[k], u = _fresh(w, lefts[:, : k + 1], floor * scale)
        if k + 1 == steps or not np.any(beta[k]):
            break
        v = _finite(backward(u))
        scale = np.maximum(scale, np.linalg.norm(v, axis=1))
    return Bidiagonal(alpha[: k + 1], beta[: k + 1])


def _fresh(w, known, floor):
    """Norm and direction of what is new in w (p, n); both 0 where it is rounding."""
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        w = w - ((known @ w[..., None])[..., 0][:, None] @ known)[:, 0]
    norm = np.linalg.norm(w, axis=1)
    norm = np.where(norm > floor, norm, 0.0)
    return norm, np.where(norm > 0, 1.0, 0.0)[:, None] * w / np.where(norm > 0, norm, 1.0)[:, None]


def _finite(product: np.ndarray) -> np.ndarray:
    product = np.asarray(product, np.float64)
    if not np.all(np.isfinite(product)):
        raise InputError(
            f"a Jacobian whose product with a finite vector has {np.count_nonzero(~np.isfinite(product))} entries that "
            "are NaN or infinite",
            "finite products",
            "its singular values do not exist",
            "look for the layer where the signal or its gradient overflows (ij.inspect), or use float64 parameters",
        )
    return product
