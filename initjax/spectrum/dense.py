"""Eigenvalues of a formed kernel, and what rounding lets us know of the small ones.

A kernel whose entries are known to a relative precision eps has eigenvalues known to about n eps lambda_max (Weyl's
inequality with the norm of the rounding error). Below that level a computed eigenvalue is noise and may be negative.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced


class Spectrum(NamedTuple):
    """Ascending eigenvalues of a positive semi-definite kernel, and the level under which they are rounding."""

    values: Float[Array | np.ndarray, "*batch n"]
    resolution: Float[Array | np.ndarray, "*batch"]


def spectrum(kernel: Any, name: str = "kernel") -> Spectrum:
    """Eigenvalues of `kernel`, shape (..., n, n); concrete kernels in float64, tracers in their own dtype.

    Raises `InputError` for a kernel that is not real, square and, as far as its entries are concrete, finite,
    symmetric and positive semi-definite up to rounding.
    """
    shape, dtype = _shape_and_dtype(kernel, name)
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else float(np.finfo(np.float64).eps)
    if is_traced(kernel):
        # eigenvalue routines know float32 and float64 only
        computed = jnp.asarray(kernel).astype(dtype if dtype == jnp.float64 else jnp.float32)
        values = jnp.linalg.eigvalsh(computed)
        return Spectrum(values, shape[-1] * eps * jnp.abs(values[..., -1]))

    matrix = _checked(kernel, name, shape, eps)
    values = np.linalg.eigvalsh(matrix)
    return Spectrum(values, _resolution(values, eps, name, shape))


def eigensystem(kernel: Any, name: str = "kernel") -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvalues (ascending, rounding below zero cut off), eigenvectors in columns, and resolution of one concrete
    kernel (n, n), in float64; raises as `spectrum` does, and for a batch or a tracer."""
    shape, dtype = _shape_and_dtype(kernel, name)
    if len(shape) != 2 or is_traced(kernel):
        raise InputError(
            f"a {name} of shape {shape}" + (" with traced entries" if is_traced(kernel) else ""),
            "one concrete kernel of shape (n, n)",
            "its eigenvectors are found in float64 on the host",
            "loop over a batch; call this outside jit",
        )
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else float(np.finfo(np.float64).eps)
    values, vectors = np.linalg.eigh(_checked(kernel, name, shape, eps))
    resolution = float(_resolution(values, eps, name, shape))
    return np.maximum(values, 0.0), vectors, resolution


def _checked(kernel, name, shape, eps) -> np.ndarray:
    """The kernel in float64, symmetric to the bit."""
    matrix = np.asarray(kernel).astype(np.float64)
    largest = np.abs(matrix).max(initial=0.0)
    if not np.isfinite(largest):
        raise InputError(
            f"a {name} of shape {shape} with {np.count_nonzero(~np.isfinite(matrix))} entries that are NaN or infinite",
            "finite entries",
            "its eigenvalues do not exist",
            "look for the layer where the signal overflows (ij.inspect), or compute the kernel in float64",
        )
    transposed = np.swapaxes(matrix, -1, -2)
    asymmetry = np.abs(matrix - transposed).max(initial=0.0)
    if asymmetry > 100 * eps * np.sqrt(shape[-1]) * largest:
        raise InputError(
            f"a {name} of shape {shape} that is not symmetric: mirrored entries differ by up to {asymmetry:.3g}",
            "a symmetric kernel of one set of inputs with itself, such as kernel_fn(x).ntk",
            "only a symmetric kernel has the real eigenvalues asked for; a kernel between two sets of inputs has none",
            "compute the kernel with x2=None, or symmetrise rounding away: (k + k.T) / 2",
        )
    return (matrix + transposed) / 2


def _resolution(values, eps, name, shape):
    """The level under which eigenvalues are rounding; refuses negative ones far beyond it."""
    # a norm, not values[-1]: an indefinite matrix may have its largest eigenvalue in absolute value below zero
    norm = np.abs(values).max(-1)
    if np.any(values[..., 0] < -np.sqrt(eps) * norm):
        raise InputError(
            f"a {name} of shape {shape} with a negative eigenvalue, {values[..., 0].min():.3g} beside {norm.max():.3g}",
            "a positive semi-definite kernel",
            "NNGP and NTK are Gram matrices; a negative eigenvalue beyond rounding means that this is no kernel",
            "check how the matrix was made (a centred or differenced kernel, a wrong reshape of the output axes)",
        )
    return shape[-1] * eps * norm


def is_array(kernel: Any) -> bool:
    """Whether this is an array or converts to one, and not an operator. What is neither is told so as an array."""
    arrays = isinstance(kernel, jax.Array | np.ndarray | list | tuple | int | float | np.generic)
    return arrays or not (hasattr(kernel, "__matmul__") or callable(kernel)) or not hasattr(kernel, "shape")


def _shape_and_dtype(kernel, name):
    if not isinstance(kernel, jax.Array | np.ndarray | list | tuple | int | float | np.generic):
        raise InputError(
            f"a {name} of type {type(kernel).__name__}",
            "an array of shape (n, n), or (..., n, n) for a batch of kernels",
            "the eigenvalues are those of one matrix",
            "give a field of it, as kernel_fn(x).ntk" if hasattr(kernel, "ntk") else "convert it with numpy.asarray",
        )
    array = kernel if isinstance(kernel, jax.Array) else np.asarray(kernel)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or not jnp.issubdtype(array.dtype, jnp.number):
        raise InputError(
            f"a {name} of dtype {array.dtype}",
            "a real floating-point or integer array",
            "the kernels of real networks are real and symmetric",
            "take the real part if the imaginary part is zero",
        )
    if array.ndim < 2 or array.shape[-1] != array.shape[-2] or array.shape[-1] == 0:
        raise InputError(
            f"a {name} of shape {array.shape}",
            "a square kernel of shape (n, n) with n >= 1, or (..., n, n) for a batch of kernels",
            "eigenvalues belong to the kernel of one set of inputs with itself",
            "compute the kernel with x2=None; an NTK of shape (n, n, k, k) becomes square by "
            "theta.transpose(0, 2, 1, 3).reshape(n * k, n * k)",
        )
    return array.shape, array.dtype
