r"""Lanczos with full reorthogonalisation: the ends and the density of a spectrum from products alone.

m products with a symmetric K, started at q, give an orthonormal basis Q and a tridiagonal T = Q^T K Q. Its
eigenvalues theta lie within the spectrum of K (Courant-Fischer): the largest is a lower bound of lambda_max, the
smallest an upper bound of lambda_min. With s an eigenvector of T, |K y - theta y| = beta_m |s_m| for y = Q s: within
that distance there is an eigenvalue (Paige 1980; Golub and Van Loan, section 10.1). And q^T f(K) q = sum_i s_1i^2
f(theta_i), a Gauss quadrature, which over random q gives traces (Ubaru, Chen, Saad 2017, SIAM J. Matrix Anal. Appl.
38(4), stochastic Lanczos quadrature). All of it is done on the host in float64; only the products are the operator's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced


class Operator(NamedTuple):
    """A symmetric operator on n numbers: `apply` maps columns (n, m), NumPy float64, to columns; `eps` its rounding."""

    apply: Callable[[np.ndarray], np.ndarray]
    n: int
    eps: float
    given: Any

    def dense(self) -> Any:
        """The matrix: formed by the operator itself if it can, else by products with the unit vectors."""
        if hasattr(self.given, "to_dense"):
            return np.asarray(self.given.to_dense())
        if isinstance(self.given, jax.Array | np.ndarray):
            return self.given
        matrix = np.concatenate([self.apply(np.eye(self.n, min(64, self.n - i), -i)) for i in range(0, self.n, 64)], 1)
        matrix = matrix.astype(np.float32 if self.eps > 1e-10 else np.float64)
        return (matrix + matrix.T) / 2


def as_operator(kernel: Any, name: str = "kernel") -> Operator:
    """Anything with a square `shape` and a product as an `Operator`; refuses what is neither or is traced."""
    shape, product = getattr(kernel, "shape", None), hasattr(kernel, "__matmul__") or callable(kernel)
    if shape is None or not product or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise InputError(
            f"a {name} of type {type(kernel).__name__}" + (f" and shape {tuple(shape)}" if shape is not None else ""),
            "an array, or a square operator with `shape` and `@`, such as ij.ntk_operator or a scipy LinearOperator",
            "its eigenvalues are found from products with vectors of that length",
            "give ij.ntk_operator(model, params, x), with x2 left out",
        )
    if is_traced(kernel):
        raise InputError(
            f"a {name} with traced entries",
            "a concrete operator (the operator itself may be jitted)",
            "Lanczos stops when its residuals are small, which a traced program cannot know",
            "call this outside jit, or form the matrix, whose eigenvalues can be traced",
        )
    dtype = jnp.dtype(getattr(kernel, "dtype", None) or np.float64)
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else float(np.finfo(np.float64).eps)
    if isinstance(kernel, jax.Array | np.ndarray):
        matrix = np.asarray(kernel).astype(np.float64)
        return Operator(lambda v: matrix @ v, shape[0], eps, kernel)
    multiply = kernel.__matmul__ if hasattr(kernel, "__matmul__") else kernel
    return Operator(lambda v: np.asarray(multiply(v), np.float64).reshape(v.shape), shape[0], eps, kernel)


class Decomposition(NamedTuple):
    """Of p starting vectors side by side after m steps.

    basis (p, m, n); alpha (m, p), beta (m, p). beta = 0: the products span no more, and Ritz values are eigenvalues.
    """

    basis: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray

    def ritz(self, probe: int = 0, steps: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending, residual bounds, and squared first components, of one probe."""
        alpha, beta = self.alpha[:steps, probe], self.beta[:steps, probe]
        # behind an exhausted space there is nothing: beta = 0 cuts it off
        end = int(np.argmax(beta == 0)) + 1 if np.any(beta == 0) else len(alpha)
        alpha, beta = alpha[:end], beta[:end]
        values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        return values, np.abs(beta[-1] * vectors[-1]), vectors[0] ** 2


def lanczos(operator: Operator, start: np.ndarray, most: int, done: Callable[[Decomposition], bool]) -> Decomposition:
    """Lanczos from the columns of `start` (n, p), until `done`, which is asked now and then, or `most` steps."""
    n, p = start.shape
    most = min(most, n)
    basis = np.zeros((p, min(most, 32), n))
    alpha, beta = np.zeros((most, p)), np.zeros((most, p))
    v = (start / np.linalg.norm(start, axis=0)).T
    scale, ask = np.zeros(p), 8
    for step in range(most):
        if step == basis.shape[1]:
            basis = np.concatenate([basis, np.zeros((p, min(step, most - step), n))], 1)
        basis[:, step] = v
        w = operator.apply(v.T).T
        if not np.all(np.isfinite(w)):
            raise InputError(
                f"an operator whose product with a finite vector has {np.count_nonzero(~np.isfinite(w))} entries that "
                "are NaN or infinite",
                "finite products",
                "its eigenvalues do not exist",
                "look for the layer where the signal overflows (ij.inspect), or use float64",
            )
        known = basis[:, : step + 1]
        overlaps = (known @ w[..., None])[..., 0]  # (p, step + 1)
        scale = np.maximum(scale, np.linalg.norm(w, axis=1))
        if step == 1 and np.any(np.abs(overlaps[:, 0] - beta[0]) > 100 * np.sqrt(operator.eps) * scale):
            raise InputError(
                f"an operator of shape ({n}, {n}) that is not symmetric: v.Ku = {overlaps[:, 0].max():.6g} and u.Kv = "
                f"{beta[0].max():.6g}",
                "a symmetric kernel of one set of inputs with itself",
                "only a symmetric kernel has the real eigenvalues asked for",
                "leave x2 out, or give the operator of (K + K^T) / 2",
            )
        alpha[step] = overlaps[:, -1]
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            w = w - (overlaps[:, None] @ known)[:, 0]
            overlaps = (known @ w[..., None])[..., 0]
        norm = np.linalg.norm(w, axis=1)
        # below the rounding of a product the direction is noise: the space is exhausted
        norm = np.where(norm > 4 * np.sqrt(n) * operator.eps * scale, norm, 0.0)
        beta[step] = norm if step + 1 < n else 0.0
        v = np.where(norm > 0, 1.0, 0.0)[:, None] * w / np.where(norm > 0, norm, 1.0)[:, None]
        found = Decomposition(known, alpha[: step + 1], beta[: step + 1])
        if np.all(beta[step] == 0):
            break
        if step + 1 >= ask:
            ask = max(step + 5, int(1.15 * step))
            if done(found):
                break
    return found


def signs(n: int, probes: int, key: Any) -> np.ndarray:
    """Random signs (n, probes), the same for the same key; None stands for key 0."""
    seed = 0 if key is None else np.asarray(key if isinstance(key, np.ndarray) else _data(key))
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, probes))


def _data(key):
    key = jnp.asarray(key)
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
