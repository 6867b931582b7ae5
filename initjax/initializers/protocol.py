"""What every initializer here keeps to: `init(key, shape, dtype=None, out_sharding=None)`, a frozen value, a pure
function of its key.

Settings are checked when it is built, shape, dtype and key when it is called. Low precision is drawn in float32 and
rounded once; an array with an axis of length 0 is an empty array.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced

# standard deviation of a standard normal variable given |z| < 2
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
DISTRIBUTIONS = ("normal", "truncated_normal", "uniform")

P = ParamSpec("P")
R = TypeVar("R")
Axes = int | Sequence[int]


class Init:
    """The protocol: a subclass is a frozen dataclass with a field `dtype` and says how to `sample`."""

    dtype: Any = None

    def __call__(self, key: Any, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        """Values of the given shape and dtype."""
        shape = tuple(shape)
        dtype = checked_dtype(self.dtype if dtype is None else dtype)
        if not is_key(key):
            raise InputError(
                f"key={key!r}",
                "a random key, typed or legacy",
                "an initializer is a pure function of its key",
                "give jax.random.key(0)",
            )
        self.check(shape)
        if 0 in shape:
            return placed(jnp.zeros(shape, dtype), out_sharding)
        wide = jnp.dtype(dtype if dtype.itemsize >= 4 else jnp.float32)
        return self.sample(key, shape, wide, out_sharding).astype(dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape that does not fit."""

    def sample(self, key: Any, shape: tuple[int, ...], dtype: Any, out_sharding: Any) -> jax.Array:
        """Values in a dtype of at least 32 bits; no axis has length 0."""
        raise NotImplementedError

    def std(self, shape: tuple[int, ...]) -> float:
        """Root mean square of the entries of an array of this shape, exact."""
        raise NotImplementedError


def factory(build: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that builds initializers: used in the place of one, it says what is missing."""

    @functools.wraps(build)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_key(args[0] if args else kwargs.get("key")):
            raise uncalled(build.__name__)
        return build(*args, **kwargs)

    setattr(wrapped, "builds_initializer", True)  # noqa: B010  (a function has no such attribute of its own)
    return wrapped


def uncalled(name: str) -> InputError:
    """The error for a factory that stands where an initializer belongs."""
    return InputError(
        f"{name} in the place of an initializer: it was called with (key, shape, dtype)",
        f"what it returns, {name}(...)",
        f"{name} builds initializers from settings",
        f"write kernel_init=initializers.{name}(...), with its arguments or empty parentheses",
    )


def draw(key, shape, dtype, out_sharding, distribution: str, std: float) -> jax.Array:
    """Independent entries of mean 0 and E|w|^2 = std^2, in a dtype of at least 32 bits; complex ones are isotropic."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) and distribution != "normal":
        # |w|^2 by its inverse distribution function: on a disc, or exponential cut at four times its mean
        real = jnp.finfo(dtype).dtype
        keys = jax.random.split(key)
        u, turn = (jax.random.uniform(k, shape, real, out_sharding=out_sharding) for k in (keys[0], keys[1]))
        if distribution == "uniform":
            square, mean = u, 0.5
        else:
            square, mean = -jnp.log1p(u * real.type(math.expm1(-4.0))), 1 - 4 * math.exp(-4) / -math.expm1(-4.0)
        radius = jnp.sqrt(square) * real.type(std / math.sqrt(mean))
        return jax.lax.complex(
            radius * jnp.cos(2 * real.type(np.pi) * turn), radius * jnp.sin(2 * real.type(np.pi) * turn)
        )
    if distribution == "uniform":
        z = jax.random.uniform(key, shape, dtype, -1, 1, out_sharding=out_sharding)
        std = std * math.sqrt(3)
    elif distribution == "truncated_normal":
        z = jax.random.truncated_normal(key, -2, 2, shape, dtype, out_sharding=out_sharding)
        std = std / TRUNCATED_STD
    else:
        z = jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
    return z * jnp.asarray(std, dtype)


def checked_dtype(dtype: Any) -> np.dtype:
    """The dtype of the call, JAX's default for None; refused unless it is floating-point, real or complex."""
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise InputError(
            f"dtype={dtype}",
            "a floating-point dtype, real or complex",
            "weights are real or complex numbers",
            "give param_dtype=jnp.float32 to the layer",
        )
    return dtype


def placed(value: jax.Array, out_sharding: Any) -> jax.Array:
    """The value under the asked sharding."""
    return value if out_sharding is None else jax.sharding.reshard(value, out_sharding)


def scale(value: Any, name: str, positive: bool = False) -> float:
    """A setting as a float, refused unless it is one concrete finite real number >= 0 (or > 0)."""
    if is_key(value):
        raise uncalled("this function")
    number = None if is_traced(value) else np.asarray(value)
    if number is None or number.ndim or number.dtype.kind not in "fiu" or not np.isfinite(number) or number < 0:
        raise InputError(
            f"{name}={value!r}",
            "one concrete finite number >= 0",
            f"{name} is a scale, fixed when the initializer is built",
            "give a Python float; to differentiate with respect to it, scale weights of standard deviation 1 yourself",
        )
    if positive and number == 0:
        raise InputError(
            f"{name}={value!r}", "one concrete finite number > 0", f"{name} divides", "give a positive number"
        )
    return float(number)


def count(value: Any, name: str, least: int = 1) -> int:
    """A setting as an int, refused unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(
            f"{name}={value!r}", f"an integer >= {least}", f"{name} counts", "give the number that the model has"
        )
    return int(value)


def choice(value: Any, name: str, options: Sequence[str], why: str) -> str:
    """A setting that is one of a few words."""
    if value not in options:
        raise InputError(
            f"{name}={value!r}", ", ".join(map(repr, options)), why, f"the most common one is {options[0]!r}"
        )
    return value


def is_key(value: Any) -> bool:
    """Whether this is a random key, typed or legacy."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32)
