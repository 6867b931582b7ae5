"""Independent entries whose variance follows the fans: one sampler, sigma_w^2 over a power of the fan."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from initjax.errors import InputError
from initjax.initializers.protocol import DISTRIBUTIONS, Axes, Init, count, draw, factory, scale


class Entrywise(Init):
    """Independent entries of mean 0 and of one law."""

    distribution: str = "normal"

    def sample(self, key, shape, dtype, out_sharding) -> jax.Array:
        return draw(key, shape, dtype, out_sharding, self.distribution, self.std(shape))


def _check_distribution(name):
    if name not in DISTRIBUTIONS:
        raise InputError(
            f"distribution={name!r}",
            ", ".join(repr(name) for name in DISTRIBUTIONS),
            "these can be drawn entry by entry with an exact variance",
            'use "normal", for which the theory holds at finite width too',
        )


@dataclasses.dataclass(frozen=True)
class FanIn(Entrywise):
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
        then rounded. Complex entries are isotropic with E|w|^2 = sigma_w^2 / fan_in.
    power : the variance is sigma_w^2 / fan_in^power.

    Raises
    ------
    InputError : when built: sigma_w negative or not finite, an unknown distribution. When called: a shape without these
        axes, a dtype that is no floating-point type, a key that is none.

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
    power: float = 1.0

    convention: ClassVar[str] = "fan_in counts all axes but out_axis and batch_axis"

    def __post_init__(self):
        object.__setattr__(self, "sigma_w", scale(self.sigma_w, "sigma_w"))
        for name in ("in_axis", "out_axis", "batch_axis"):
            axes = getattr(self, name)
            object.__setattr__(self, name, axes if isinstance(axes, int) else tuple(axes))  # hashable
        _check_distribution(self.distribution)

    def check(self, shape):
        self.fans(shape)

    def std(self, shape: tuple[int, ...]) -> float:
        """Standard deviation of the entries of an array of this shape."""
        return self.of_fans(*self.fans(shape))

    def of_fans(self, fan_in: float, fan_out: float) -> float:
        """Standard deviation for given fans; of an empty array there is nothing to scale."""
        return self.sigma_w / fan_in ** (self.power / 2) if fan_in else 0.0

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """fan_in and fan_out: the window times the sizes of the other side's axes."""
        axes = {name: _axes(getattr(self, name)) for name in ("in_axis", "out_axis", "batch_axis")}
        used = [axis for some in axes.values() for axis in some]
        if any(not -len(shape) <= axis < len(shape) for axis in used) or len({a % len(shape) for a in used}) < len(
            used
        ):
            raise InputError(
                f"weights of shape {shape} with in_axis={self.in_axis}, out_axis={self.out_axis}, "
                f"batch_axis={self.batch_axis}",
                "different axes of the weights, so at least two axes by default",
                f"the standard deviation is sigma_w / sqrt(fan_in); {self.convention}",
                "name the axes; for biases use critical_bias or normal, which have no fan_in",
            )

        def without(*names):
            left = {axis % len(shape) for name in names for axis in axes[name]}
            return math.prod(size for axis, size in enumerate(shape) if axis not in left)

        return without("out_axis", "batch_axis"), without("in_axis", "batch_axis")


@dataclasses.dataclass(frozen=True)
class FanAvg(FanIn):
    """As `FanIn`, with variance sigma_w^2 / ((fan_in + fan_out) / 2): Glorot's compromise, sigma_w the gain."""

    def of_fans(self, fan_in: float, fan_out: float) -> float:
        return self.sigma_w / math.sqrt((fan_in + fan_out) / 2) if fan_in + fan_out else 0.0


@dataclasses.dataclass(frozen=True)
class Fixed(Entrywise):
    """Entries of one standard deviation in an array of any shape; a Flax and JAX initializer."""

    scale: float
    distribution: str = "normal"
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "scale", scale(self.scale, "std"))
        _check_distribution(self.distribution)

    def std(self, shape: tuple[int, ...]) -> float:
        return self.scale


@factory
def symmetric_uniform(limit: Any = 1e-2, *, dtype: Any = None) -> Fixed:
    """Entries uniform on [-limit, limit): mean 0, unlike `jax.nn.initializers.uniform`, which draws from [0, scale).

    Parameters
    ----------
    limit : a number >= 0. Variance limit^2 / 3, whatever the fans.
    dtype : dtype where the call names none.

    Returns
    -------
    Fixed, an initializer for any shape; complex entries are uniform on a disc of the same variance.

    Raises
    ------
    InputError : limit negative, not finite or traced.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import symmetric_uniform
    >>> w = symmetric_uniform(0.5)(jax.random.key(0), (50, 40))
    >>> bool(w.min() < -0.49), bool(w.max() < 0.5)
    (True, True)

    References
    ----------
    LeCun, Bottou, Orr, Mueller 1998 (Efficient BackProp, section 4.6): weights of mean 0.
    """
    return Fixed(scale(limit, "limit") / math.sqrt(3), "uniform", dtype)


@factory
def exact_truncated_normal(std: Any = 1e-2, *, dtype: Any = None) -> Fixed:
    """A normal law cut at two of its standard deviations, then scaled: the entries have the standard deviation `std`.

    `jax.nn.initializers.truncated_normal(stddev)` gives 0.8796 stddev instead, and `variance_scaling(...,
    "truncated_normal")` with a complex dtype a variance 1.87 % too large.

    Parameters
    ----------
    std : standard deviation of the entries, a number >= 0, whatever the fans. They are bounded by 2.2737 std.
    dtype : dtype where the call names none.

    Returns
    -------
    Fixed, an initializer for any shape; complex entries are isotropic, |w|^2 cut at four times its mean.

    Raises
    ------
    InputError : std negative, not finite or traced.

    Accuracy
    --------
    The variance is exact, real and complex.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import exact_truncated_normal
    >>> w = exact_truncated_normal(0.1)(jax.random.key(0), (400, 300))
    >>> print(f"{w.std():.3f} {abs(w).max():.3f}")
    0.100 0.227

    References
    ----------
    Johnson, Kotz, Balakrishnan 1994 (Continuous univariate distributions 1, section 13.10.1): the variance.
    """
    return Fixed(std, "truncated_normal", dtype)


@factory
def torch_default(*, in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: Any = None) -> FanIn:
    """Weights of PyTorch's Linear and Conv layers: uniform on +-1/sqrt(fan_in), variance 1 / (3 fan_in).

    That is sigma_w^2 = 1/3: kaiming_uniform with the slope sqrt(5), kept by PyTorch for old models. Signals shrink by
    3 (relu: 6) in each layer.

    Parameters
    ----------
    in_axis, out_axis, batch_axis : as in `FanIn`; fan_in is window x input channels.
    dtype : dtype where the call names none.

    Returns
    -------
    FanIn. Its biases: `torch_default_bias(fan_in)`.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import torch_default, torch_default_bias
    >>> w = torch_default()(jax.random.key(0), (100, 64))
    >>> b = torch_default_bias(fan_in=100)(jax.random.key(1), (64,))
    >>> bool(abs(w).max() < 0.1), bool(abs(b).max() < 0.1)
    (True, True)

    References
    ----------
    PyTorch, torch.nn.Linear and torch.nn.Conv2d, `reset_parameters`.
    """
    return FanIn(1 / math.sqrt(3), "uniform", in_axis, out_axis, batch_axis, dtype)


@factory
def torch_default_bias(fan_in: int, *, dtype: Any = None) -> Fixed:
    """Biases of PyTorch's layers: uniform on +-1/sqrt(fan_in), variance 1 / (3 fan_in), with the fan of the kernel.

    The shape of a bias does not tell that fan. Rules know it: `ij.rules.torch_default`.

    Parameters
    ----------
    fan_in : fan of the kernel that the bias goes with, window x input channels.
    dtype : dtype where the call names none.

    Returns
    -------
    Fixed, an initializer for any shape.

    Raises
    ------
    InputError : fan_in no integer >= 1.

    Examples
    --------
    >>> from initjax.initializers import torch_default_bias
    >>> print(f"{torch_default_bias(fan_in=9 * 64).std((128,)):.5f}")  # a 3x3 convolution of 64 channels
    0.02406

    References
    ----------
    PyTorch, torch.nn.Linear, `reset_parameters`.
    """
    return Fixed(1 / math.sqrt(3 * count(fan_in, "fan_in")), "uniform", dtype)


def _axes(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)
