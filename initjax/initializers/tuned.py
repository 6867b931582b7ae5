"""Initializers chosen for an activation: on the edge of chaos, or such that a layer keeps the variance of its input."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from initjax import meanfield
from initjax.gaussian import gain
from initjax.initializers.protocol import Axes, Init, draw, factory, scale
from initjax.initializers.scaled import FanIn


@factory
def critical(
    phi: Callable,
    sigma_b: Any = 0.0,
    *,
    distribution: str = "normal",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    r"""Weights on the edge of chaos: variance sigma_w^2 / fan_in with sigma_w such that chi_1 = 1 at the fixed point
    q*.

    Together with biases of standard deviation `sigma_b` (`critical_bias`) a deep plain network of `phi` neither loses
    nor explodes its signals and gradients exponentially in depth. sigma_w is solved for once, here, not at each call.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_b : standard deviation of the biases, a concrete number >= 0.
    distribution : "normal", "truncated_normal" or "uniform", all of the same variance.
    in_axis, out_axis, batch_axis : as in `jax.nn.initializers.variance_scaling`.
    dtype : dtype where the call names none.

    Returns
    -------
    FanIn, an initializer `init(key, shape, dtype=None, out_sharding=None)` with the attribute `sigma_w`.

    Raises
    ------
    InputError : sigma_b negative, not finite, or traced; phi not elementwise; an unknown distribution.
    NoCriticalPointError : no sigma_w puts phi on the edge of chaos at this sigma_b (the message says why).

    Warns
    -----
    UnstableCriticalPointWarning : the critical point repels the variance (gelu, silu at small sigma_b).

    Accuracy
    --------
    sigma_w to 1e-10 relative; the variance of the entries is exact for all three distributions.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> print(f"{ij.initializers.critical(jax.nn.relu).sigma_w:.6f}")  # He: sqrt(2)
    1.414214
    >>> weights = ij.initializers.critical(jnp.tanh, 0.05)
    >>> biases = ij.initializers.critical_bias(jnp.tanh, 0.05)
    >>> layer = nn.Dense(300, kernel_init=weights, bias_init=biases)
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 200)))["params"]
    >>> params["kernel"].shape, params["bias"].shape
    ((200, 300), (300,))

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232), eq. 5, chi_1 = 1.
    """
    sigma_w = _critical_sigma_w(phi, sigma_b)
    return FanIn(sigma_w, distribution, in_axis, out_axis, batch_axis, dtype)


@factory
def critical_bias(phi: Callable, sigma_b: Any, *, dtype: Any = None) -> "Bias":
    """Biases N(0, sigma_b^2) that go with the weights `critical(phi, sigma_b)`.

    Parameters
    ----------
    phi : the activation; it must have a critical point at this `sigma_b`, else the same errors as from `critical`.
    sigma_b : standard deviation, a concrete number >= 0.
    dtype : dtype where the call names none.

    Returns
    -------
    Bias, an initializer `init(key, shape, dtype=None, out_sharding=None)` for any shape.

    Raises
    ------
    InputError, NoCriticalPointError : as `critical`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> b = ij.initializers.critical_bias(jnp.tanh, 0.5)(jax.random.key(0), (40_000,))
    >>> print(f"{b.std():.1f}")
    0.5

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232), section 2.
    """
    _critical_sigma_w(phi, sigma_b)
    return Bias(scale(sigma_b, "sigma_b"), dtype)


@factory
def variance_preserving(
    phi: Callable,
    kind: Any = "forward",
    *,
    q: Any = 1.0,
    distribution: str = "normal",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> FanIn:
    """Weights that keep one quantity of a bias-free layer: variance gain(phi, kind, q)^2 / fan_in.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`, the activation in front of the weights.
    kind : what is kept, as in `ij.gain`: "forward" (the second moment q), "chi" (the gradients), "centered" (the
        variance after subtraction of the mean).
    q : pre-activation second moment at which it is kept, a concrete number > 0.
    distribution, in_axis, out_axis, batch_axis, dtype : as in `critical`.

    Returns
    -------
    FanIn, an initializer with the attribute `sigma_w`.

    Raises
    ------
    InputError : an unknown kind or distribution, q not positive, a constant phi.

    Accuracy
    --------
    sigma_w to 1e-12 relative.

    Examples
    --------
    >>> import jax
    >>> import initjax as ij
    >>> print(f"{ij.initializers.variance_preserving(jax.nn.relu).sigma_w:.6f}")
    1.414214
    >>> print(f"{ij.initializers.variance_preserving(jax.nn.gelu, kind='chi').sigma_w:.3f}")
    1.481

    References
    ----------
    He et al. 2015 (arXiv:1502.01852), eq. 10, for relu.
    """
    q = scale(q, "q")
    return FanIn(float(gain(phi, kind, q)), distribution, in_axis, out_axis, batch_axis, dtype)


@dataclasses.dataclass(frozen=True)
class Bias(Init):
    """Entries N(0, sigma_b^2) for an array of any shape; a Flax and JAX initializer."""

    sigma_b: float
    dtype: Any = None

    def std(self, shape: tuple[int, ...]) -> float:
        return self.sigma_b

    def sample(self, key, shape, dtype, out_sharding) -> jax.Array:
        return draw(key, shape, dtype, out_sharding, "normal", self.sigma_b)


def _critical_sigma_w(phi, sigma_b):
    return float(meanfield.critical(phi, scale(sigma_b, "sigma_b")).sigma_w)
