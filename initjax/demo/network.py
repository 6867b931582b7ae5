"""The network of the demonstration, written as any Flax user would, and its four initializations.

This file is a user of initjax, not a part of its machinery: the module below knows nothing of the theory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

SIGMA_B = 0.05  # the same for all four, so that they differ in one number, sigma_w


class DeepMLP(nn.Module):
    """A plain tanh network of `depth` weight layers: no normalization, no skip connections."""

    depth: int
    width: int
    kernel_init: Callable[..., Any]
    bias_init: Callable[..., Any]
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth - 1):
            x = jnp.tanh(nn.Dense(self.width, kernel_init=self.kernel_init, bias_init=self.bias_init)(x))
        return nn.Dense(self.classes, kernel_init=self.kernel_init, bias_init=self.bias_init)(x)


class Setup(NamedTuple):
    """One initialization to be tried: Var W = sigma_w^2 / fan_in, Var b = sigma_b^2.

    Attributes
    ----------
    name : what people call it.
    sigma_w, sigma_b : standard deviations, dimensionless.
    kernel_init, bias_init : the Flax initializers.
    """

    name: str
    sigma_w: float
    sigma_b: float
    kernel_init: Callable[..., Any]
    bias_init: Callable[..., Any]

    def model(self, depth: int, width: int) -> DeepMLP:
        """The network with this initialization."""
        return DeepMLP(depth, width, self.kernel_init, self.bias_init)


def four_setups() -> tuple[Setup, ...]:
    """Cold, Xavier, critical and hot, at one bias scale.

    Xavier's variance 2 / (fan_in + fan_out) is sigma_w = 1 in layers whose two fans are equal, as here between hidden
    layers; so 1.0 stands for it in every layer.
    """
    from initjax import initializers, meanfield

    sigma_w = float(meanfield.critical(jnp.tanh, SIGMA_B).sigma_w)
    bias_init = nn.initializers.normal(SIGMA_B)

    def gaussian(scale: float) -> Callable[..., Any]:
        return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")

    return (
        Setup("cold", 0.8, SIGMA_B, gaussian(0.8), bias_init),
        Setup("Xavier", 1.0, SIGMA_B, gaussian(1.0), bias_init),
        Setup("critical", sigma_w, SIGMA_B, initializers.critical(jnp.tanh, SIGMA_B), bias_init),
        Setup("hot", 2.5, SIGMA_B, gaussian(2.5), bias_init),
    )
