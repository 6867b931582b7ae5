"""Scales that keep a network's features moving as it gets wider (maximal update), and those of periodic activations."""

import dataclasses
import math
from typing import Any

import jax

from initjax.errors import InputError
from initjax.initializers.orthogonal import stiefel
from initjax.initializers.protocol import Axes, choice, count, factory, placed, scale
from initjax.initializers.scaled import FanIn


@dataclasses.dataclass(frozen=True)
class Spectral(FanIn):
    """Weights whose spectral norm is of order sigma_w sqrt(fan_out / fan_in); see `spectral_mup`."""

    def of_fans(self, fan_in: float, fan_out: float) -> float:
        return self.sigma_w / math.sqrt(fan_in) * math.sqrt(min(1.0, fan_out / fan_in)) if fan_in else 0.0


@dataclasses.dataclass(frozen=True)
class SpectralOrthogonal(FanIn):
    """Orthogonal weights of spectral norm exactly sigma_w sqrt(fan_out / fan_in); see `spectral_mup`."""

    def of_fans(self, fan_in: float, fan_out: float) -> float:
        return self.sigma_w * math.sqrt(min(1.0, fan_out / fan_in) / fan_in) if fan_in else 0.0

    def sample(self, key, shape, dtype, out_sharding) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:-1]), shape[-1]
        q = stiefel(key, max(fan_in, fan_out), min(fan_in, fan_out), dtype)
        norm = jax.numpy.asarray(self.sigma_w * math.sqrt(fan_out / fan_in), dtype)
        return placed(((q if fan_in >= fan_out else q.T) * norm).reshape(shape), out_sharding)


@factory
def mup(
    part: str = "hidden",
    base_fan_in: int | None = None,
    sigma_w: Any = 1.0,
    *,
    distribution: str = "normal",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    """Maximal update parametrization: variance sigma_w^2 / fan_in, in the readout sigma_w^2 base_fan_in / fan_in^2.

    At the base width it is the standard parametrization. Its learning rates with Adam: hidden and output kernels in
    proportion to base_fan_in / fan_in, input kernels and vectors constant; `ij.rules.mup` assigns parts and rates to
    a whole model.

    Parameters
    ----------
    part : "input" (only the outputs grow with the width), "hidden" (both sides grow), "output" (only the inputs grow).
    base_fan_in : fan_in of the same readout at the base width; needed for part="output".
    sigma_w : standard deviation in mean-field scaling at the base width.
    distribution, in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanIn.

    Raises
    ------
    InputError : an unknown part, base_fan_in missing for the output.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import mup
    >>> readout = mup("output", base_fan_in=64)
    >>> [round(readout.std((n, 10)) * n, 6) for n in (64, 256, 1024)]
    [8.0, 8.0, 8.0]

    References
    ----------
    Yang et al. 2022 (arXiv:2203.03466), table 3.
    """
    choice(part, "part", ("hidden", "input", "output"), "the law depends on which side grows with the width")
    axes = (distribution, in_axis, out_axis, batch_axis, dtype)
    if part != "output":
        return FanIn(sigma_w, *axes)
    base = count(base_fan_in, "base_fan_in")
    return FanIn(scale(sigma_w, "sigma_w") * math.sqrt(base), *axes, power=2.0)


@factory
def spectral_mup(
    sigma_w: Any = 1.0,
    *,
    distribution: str = "normal",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    """Weights with spectral norm of order sqrt(fan_out / fan_in), the condition for features to move at every width.

    Standard deviation sigma_w min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in): one formula for input, hidden and output
    layers. Its learning rates: in proportion to fan_out / fan_in for gradient descent, 1 / fan_in for Adam.

    Parameters
    ----------
    sigma_w : factor.
    distribution : "normal", "truncated_normal", "uniform" or "orthogonal" (spectral norm exactly
        sigma_w sqrt(fan_out / fan_in), all singular values equal; default axes only).
    in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanIn, with the standard deviation above.

    Raises
    ------
    InputError : sigma_w negative, an unknown distribution, other axes with "orthogonal".

    Accuracy
    --------
    Variance and, for "orthogonal", spectral norm are exact.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import spectral_mup
    >>> w = spectral_mup(distribution="orthogonal")(jax.random.key(0), (256, 64))
    >>> print(f"{jnp.linalg.norm(w, 2):.5f}")
    0.50000

    References
    ----------
    Yang, Simon, Bernstein 2023 (arXiv:2310.17813), eq. 8 (parametrization 1).
    """
    if distribution == "orthogonal":
        if (in_axis, out_axis, batch_axis) != (-2, -1, ()):
            raise InputError(
                f"axes ({in_axis}, {out_axis}, {batch_axis}) with distribution='orthogonal'",
                "the default axes, units last",
                "all other axes together are the inputs of one matrix",
                "move the axes, or use the normal distribution",
            )
        return SpectralOrthogonal(sigma_w, dtype=dtype)
    return Spectral(sigma_w, distribution, in_axis, out_axis, batch_axis, dtype)


@factory
def siren(
    omega: Any = 30.0,
    *,
    first: bool = False,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    """Weights for sin(omega (W x + b)): uniform on +-sqrt(6 / fan_in) / omega, in the first layer on +-1 / fan_in.

    Variance 2 / (omega^2 fan_in), so that omega W x has variance 1 behind a sine; first layer 1 / (3 fan_in^2). SIREN
    networks as published take `torch_default_bias` for their biases.

    Parameters
    ----------
    omega : the frequency in front of the layer, > 0. It plays no part in the first layer's law.
    first : whether the layer sees the coordinates.
    in_axis, out_axis, batch_axis, dtype : as in `FanIn`.

    Returns
    -------
    FanIn of uniform entries.

    Raises
    ------
    InputError : omega not positive.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import siren
    >>> keys = jax.random.split(jax.random.key(0))
    >>> print(f"{abs(siren(first=True)(keys[0], (2, 4000))).max():.3f}")
    0.500
    >>> print(f"{abs(siren()(keys[1], (600, 100))).max() * 30:.3f}")
    0.100

    References
    ----------
    Sitzmann et al. 2020 (arXiv:2006.09661), section 3.2 and supplement 1.
    """
    omega = scale(omega, "omega", positive=True)
    axes = ("uniform", in_axis, out_axis, batch_axis, dtype)
    return FanIn(1 / math.sqrt(3), *axes, power=2.0) if first else FanIn(math.sqrt(2) / omega, *axes)
