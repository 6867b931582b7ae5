"""Random weights of standard deviation sigma_w / sqrt(fan_in): the one sampler behind the initializers of initjax."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced

# standard deviation of a standard normal variable given |z| < 2
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
DISTRIBUTIONS = ("normal", "truncated_normal", "uniform")

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Weights of mean 0 and variance sigma_w^2 / fan_in; a Flax and JAX initializer.

    Called as `init(key, shape, dtype=None, out_sharding=None)`. fan_in is the number of terms in the sum that makes
    one unit: the product of all axes but `out_axis` and `batch_axis`, for a convolution window x channels. Being a
    value, it compares equal to another one of the same settings, so that Flax modules that hold it do too.

    Attributes
    ----------
    sigma_w : standard deviation in mean-field scaling, >= 0.
    distribution : "normal", "truncated_normal" (cut at two standard deviations, then scaled so that the variance is
        exact) or "uniform".
    in_axis, out_axis, batch_axis : axis or axes of inputs, outputs, and independent copies, as in
        `jax.nn.initializers.variance_scaling`; axes in none of them are the window of a convolution.
    dtype : used where the call names none; None for JAX's default. Below 32 bits the weights are drawn in float32,
        then rounded.

    Raises
    ------
    InputError : when built: sigma_w negative or not finite, an unknown distribution. When called: a shape without these
        axes, a dtype that is no real floating-point type, a key that is none.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import FanIn
    >>> w = FanIn(2.0)(jax.random.key(0), (400, 300))
    >>> print(f"{w.std() * 400**0.5:.2f}")
    2.00
    """

    sigma_w: float
    distribution: str = "normal"
    in_axis: Axes = -2
    out_axis: Axes = -1
    batch_axis: Axes = ()
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "sigma_w", scale(self.sigma_w, "sigma_w"))
        for name in ("in_axis", "out_axis", "batch_axis"):
            axes = getattr(self, name)
            object.__setattr__(self, name, axes if isinstance(axes, int) else tuple(axes))  # hashable
        if self.distribution not in DISTRIBUTIONS:
            raise InputError(
                f"distribution={self.distribution!r}",
                ", ".join(repr(name) for name in DISTRIBUTIONS),
                "these can be drawn entry by entry with an exact variance",
                'use "normal", for which the theory holds at finite width too',
            )

    def __call__(self, key: Any, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        """Weights of the given shape and dtype."""
        shape = tuple(shape)
        fan_in = self._fan_in(shape)
        # of an empty array there is nothing to scale
        std = self.sigma_w / math.sqrt(fan_in) if fan_in else 0.0
        return draw(key, shape, self.dtype if dtype is None else dtype, out_sharding, self.distribution, std)

    def _fan_in(self, shape):
        axes = {name: _axes(getattr(self, name)) for name in ("in_axis", "out_axis", "batch_axis")}
        used = [axis for some in axes.values() for axis in some]
        if any(not -len(shape) <= axis < len(shape) for axis in used) or len({a % len(shape) for a in used}) < len(
            used
        ):
            raise InputError(
                f"weights of shape {shape} with in_axis={self.in_axis}, out_axis={self.out_axis}, "
                f"batch_axis={self.batch_axis}",
                "different axes of the weights, so at least two axes by default",
                "the standard deviation is sigma_w / sqrt(fan_in); fan_in counts all axes but out_axis and batch_axis",
                "name the axes; for biases use critical_bias or normal, which have no fan_in",
            )
        left = {axis % len(shape) for axis in (*axes["out_axis"], *axes["batch_axis"])}
        return math.prod(size for axis, size in enumerate(shape) if axis not in left)


def draw(key, shape, dtype, out_sharding, distribution: str, std: float) -> jax.Array:
    """Independent entries of mean 0 and standard deviation `std`, in float32 at least while they are computed."""
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"dtype={dtype}",
            "a real floating-point dtype",
            "the entries are random real numbers",
            "give param_dtype=jnp.float32 to the layer; complex layers need a complex initializer such as lecun_normal",
        )
    if not _is_key(key):
        raise InputError(
            f"key={key!r}",
            "a random key, typed or legacy",
            "an initializer is a pure function of its key",
            "give jax.random.key(0)",
        )
    wide = jnp.dtype(dtype if dtype.itemsize >= 4 else jnp.float32)
    if distribution == "uniform":
        z = jax.random.uniform(key, shape, wide, -1, 1, out_sharding=out_sharding)
        std = std * math.sqrt(3)
    elif distribution == "truncated_normal":
        z = jax.random.truncated_normal(key, -2, 2, shape, wide, out_sharding=out_sharding)
        std = std / TRUNCATED_STD
    else:
        z = jax.random.normal(key, shape, wide, out_sharding=out_sharding)
    return (z * jnp.asarray(std, wide)).astype(dtype)


def scale(value: Any, name: str) -> float:
    """A standard deviation as a float, refused unless it is one finite real number >= 0."""
    number = None if is_traced(value) else np.asarray(value)
    if number is None or number.ndim or number.dtype.kind not in "fiu" or not np.isfinite(number) or number < 0:
        raise InputError(
            f"{name}={value!r}",
            "one concrete finite number >= 0",
            f"{name} is a standard deviation, fixed when the initializer is built",
            "give a Python float; to differentiate with respect to it, scale weights of standard deviation 1 yourself",
        )
    return float(number)


def _axes(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _is_key(key):
    dtype = getattr(key, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32)
