"""Matrices with orthonormal rows or columns, alone or in the middle of a convolution's window, in every precision."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from initjax.errors import InputError
from initjax.initializers.protocol import Init, factory, placed, scale


@dataclasses.dataclass(frozen=True)
class Orthogonal(Init):
    """Weights with orthonormal columns (units) or, if there are more units than inputs, rows; times `scale`.

    Attributes
    ----------
    scale : factor, >= 0.
    column_axis : the axis of the units; the others are one axis of inputs, unless `delta`.
    dtype : dtype where the call names none; below 32 bits the QR is made in float32. Complex: unitary.
    keeps_q : multiply by sqrt(fan_out / fan_in) where there are more units than inputs, so that the mean square of a
        unit equals that of an input.
    delta : put the matrix into the middle of a convolution's window, zeros around it.
    """

    scale: float = 1.0
    column_axis: int = -1
    dtype: Any = None
    keeps_q: bool = False
    delta: bool = False

    def __post_init__(self):
        object.__setattr__(self, "scale", scale(self.scale, "scale"))

    def check(self, shape):
        few = len(shape) < 2 or self.delta and not 3 <= len(shape) <= 5
        if few or not -len(shape) <= self.column_axis < len(shape):
            raise InputError(
                f"weights of shape {shape} with column_axis={self.column_axis}",
                "3 to 5 axes (window, inputs, outputs), column_axis one of them"
                if self.delta
                else "two axes or more, column_axis one of them",
                "orthogonality is a statement about a matrix",
                "use orthogonal for dense layers" if self.delta else "use zeros or critical_bias for biases",
            )

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Numbers of inputs and of units of the matrix, without the window if `delta`."""
        units = shape[self.column_axis]
        if self.delta:
            rest = [n for axis, n in enumerate(shape[-2:], len(shape) - 2) if axis != self.column_axis % len(shape)]
            return rest[0], units
        return math.prod(shape) // max(units, 1), units

    def factor(self, fan_in: int, fan_out: int) -> float:
        return self.scale * (math.sqrt(max(1.0, fan_out / fan_in)) if self.keeps_q else 1.0)

    def std(self, shape):
        fan_in, fan_out = self.matrix(shape)
        filled = fan_in * fan_out / math.prod(shape)  # 1, or one over the size of the window
        return self.factor(fan_in, fan_out) * math.sqrt(filled / max(fan_in, fan_out))

    def sample(self, key, shape, dtype, out_sharding):
        fan_in, fan_out = self.matrix(shape)
        q = stiefel(key, max(fan_in, fan_out), min(fan_in, fan_out), dtype)
        q = (q if fan_in >= fan_out else q.T) * jnp.asarray(self.factor(fan_in, fan_out), dtype)
        if self.delta:
            q = q if self.column_axis % len(shape) == len(shape) - 1 else q.T
            return placed(jnp.zeros(shape, dtype).at[centre(shape)].set(q), out_sharding)
        rest = [n for axis, n in enumerate(shape) if axis != self.column_axis % len(shape)]
        return placed(jnp.moveaxis(q.reshape(*rest, fan_out), -1, self.column_axis), out_sharding)


def stiefel(key, rows: int, columns: int, dtype) -> jax.Array:
    """`columns` orthonormal vectors of length `rows`, uniformly (Haar) distributed."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (rows, columns), dtype))
    d = jnp.diagonal(r)
    size = jnp.abs(d).astype(dtype)
    return q * jnp.where(d == 0, jnp.ones_like(d), d / jnp.where(d == 0, jnp.ones_like(d), size))[None, :]


def centre(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The tap of a window that sees the position itself under "SAME" padding, of even windows too."""
    return tuple((n - 1) // 2 for n in shape[:-2])


@factory
def orthogonal(scale: Any = 1.0, column_axis: int = -1, dtype: Any = None) -> Orthogonal:
    """Orthonormal columns, or rows where there are more units than inputs: W W^T or W^T W = scale^2 I.

    The mean square of the entries is scale^2 / max(fan_in, fan_out), so with fan_out > fan_in the mean square q of the
    units is smaller than that of the inputs by fan_in / fan_out: see `scaled_orthogonal`.

    Parameters
    ----------
    scale : factor, a number >= 0; sigma_w of mean-field theory for square matrices.
    column_axis : axis of the units; all others together are the inputs (window x channels).
    dtype : dtype where the call names none.

    Returns
    -------
    Orthogonal, an initializer for shapes of two axes or more: uniform (Haar) on the orthogonal (complex: unitary)
    group. bfloat16 and float16 too, which `jax.nn.initializers.orthogonal` refuses.

    Raises
    ------
    InputError : scale negative or not finite; when called, fewer than two axes.

    Accuracy
    --------
    W^T W = scale^2 I to a few eps of float32 or float64; low precision is that rounded once.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import orthogonal
    >>> w = orthogonal()(jax.random.key(0), (64, 32))
    >>> bool(jnp.abs(w.T @ w - jnp.eye(32)).max() < 1e-5)
    True

    References
    ----------
    Saxe, McClelland, Ganguli 2014 (arXiv:1312.6120), section 3; Mezzadri 2007 (arXiv:math-ph/0609050) for the signs.
    """
    return Orthogonal(scale, column_axis, dtype)


@factory
def scaled_orthogonal(sigma_w: Any = 1.0, column_axis: int = -1, dtype: Any = None) -> Orthogonal:
    """Orthogonal weights that keep q for every shape: mean square of the entries exactly sigma_w^2 / fan_in.

    Where there are more units than inputs the matrix is multiplied by sqrt(fan_out / fan_in).

    Parameters
    ----------
    sigma_w : standard deviation in mean-field scaling, e.g. `ij.critical(phi).sigma_w`.
    column_axis, dtype : as in `orthogonal`.

    Returns
    -------
    Orthogonal, an initializer for shapes of two axes or more.

    Raises
    ------
    InputError : as `orthogonal`.

    Accuracy
    --------
    The Frobenius norm is exact to rounding: sigma_w^2 fan_out.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import scaled_orthogonal
    >>> for shape in ((64, 16), (16, 64)):
    ...     w = scaled_orthogonal()(jax.random.key(0), shape)
    ...     print(f"{(w**2).mean() * shape[0]:.5f}")
    1.00000
    1.00000

    References
    ----------
    Martens et al. 2021 (arXiv:2110.01765), section 4 (scaled-corrected uniform orthogonal).
    """
    return Orthogonal(sigma_w, column_axis, dtype, keeps_q=True)


@factory
def delta_orthogonal(
    scale: Any = 1.0, column_axis: int = -1, dtype: Any = None, *, keeps_q: bool = False
) -> Orthogonal:
    """An orthogonal matrix in the middle of a convolution's window and zeros around it: all spatial modes are kept.

    More inputs than outputs are fine (the rows are then a projection); even windows have their middle at
    (size - 1) // 2, the tap that sees the position itself under "SAME" padding.

    Parameters
    ----------
    scale, column_axis, dtype : as in `orthogonal`. Mean square of the entries of the tap: scale^2 / max(in, out).
    keeps_q : multiply by sqrt(out / in) where there are more outputs than inputs.

    Returns
    -------
    Orthogonal, an initializer for shapes (window, in, out) of 3 to 5 axes.

    Raises
    ------
    InputError : scale negative or not finite; when called, other numbers of axes.

    Accuracy
    --------
    The tap is orthogonal to a few eps of float32 or float64.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import delta_orthogonal
    >>> w = delta_orthogonal()(jax.random.key(0), (4, 4, 8, 6), jnp.bfloat16)
    >>> w.dtype, int((w != 0).any((2, 3)).sum()), bool((w[1, 1] != 0).all())
    (dtype(bfloat16), 1, True)

    References
    ----------
    Xiao et al. 2018 (arXiv:1806.05393), algorithm 1.
    """
    return Orthogonal(scale, column_axis, dtype, keeps_q=bool(keeps_q), delta=True)
