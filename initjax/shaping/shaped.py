"""What shaping returns: the activation, the weights that go with it, and the normalization of the inputs."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax import gaussian
from initjax.errors import InputError
from initjax.gaussian.activation import Activation
from initjax.gaussian.expect import host_rule
from initjax.initializers import delta_orthogonal, scaled_orthogonal
from initjax.trace.jaxpr import is_traced


class Conditions(NamedTuple):
    """What a shaped layer does at q = 1, by quadrature of the shaped function itself.

    Attributes
    ----------
    q : Q(1), the second moment that it passes on.
    q_slope : Q'(1).
    c_zero : C(0), the correlation of two uncorrelated inputs.
    c_slope : C'(1).
    c_curvature : C''(1); infinite where the slope jumps.
    """

    q: Any
    q_slope: Any
    c_zero: Any
    c_slope: Any
    c_curvature: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShapedActivation:
    r"""x -> gamma (phi(alpha x + beta) + delta): an elementwise activation for Flax modules, and a pytree.

    Attributes
    ----------
    alpha, beta, gamma, delta : input scale and shift, output scale and shift, as in the papers; arrays where depths or
        targets were batches (`shaped[i]` takes one, `jax.vmap` maps over all).
    negative_slope : for the relu family, where phi is the leaky relu of this slope; else None.
    local : the target of one layer: C'(1) for DKS, C''(1) for TAT, C(0) for TAT of the relu family.
    phi : the activation before.
    method : "dks" or "tat".

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> act = ij.shaping.dks(jnp.tanh, depth=50)
    >>> print(f"{act.alpha:.6f} {act.beta:.6f} {act.gamma:.5f} {act.delta:.6f}")
    0.128440 0.570780 10.60445 -0.509807
    >>> print(f"{act(jnp.float32(0.5)):.4f}")
    0.5480
    """

    alpha: Any
    beta: Any
    gamma: Any
    delta: Any
    negative_slope: Any
    local: Any
    phi: Any = dataclasses.field(metadata={"static": True})
    method: str = dataclasses.field(metadata={"static": True})

    @property
    def __name__(self) -> str:
        return f"{self.method}({getattr(self.phi, '__name__', 'phi')})"

    def __call__(self, x):
        """The shaped activation of x; below 32 bits computed in float32, as gamma amplifies what delta cancels."""
        x = jnp.asarray(x)
        wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
        alpha, beta, gamma, delta = (jnp.asarray(v, wide) for v in (self.alpha, self.beta, self.gamma, self.delta))
        u = alpha * x.astype(wide) + beta
        if self.negative_slope is None:
            value = self.phi(u)
        else:
            value = jnp.where(u >= 0, u, jnp.asarray(self.negative_slope, wide) * u)
        return (gamma * (value + delta)).astype(x.dtype)

    def __getitem__(self, index) -> "ShapedActivation":
        """One of a batch of solutions."""
        return jax.tree.map(lambda v: v[index], self)

    def kernel_init(self, key, shape, dtype=None, out_sharding=None) -> jax.Array:
        """The weights that go with it, a Flax initializer: scaled orthogonal, at the centre of a convolution."""
        init = scaled_orthogonal() if len(shape) == 2 else delta_orthogonal(keeps_q=True)
        return init(key, shape, dtype, out_sharding)

    @property
    def activation(self) -> Activation:
        """As an `ij.Activation`, with the kinks of phi carried over; for every other function of initjax."""
        self._single("activation")
        found = gaussian.as_activation(self.phi)
        return Activation(self, kinks=tuple((k - float(self.beta)) / float(self.alpha) for k in found.kinks))

    def conditions(self) -> Conditions:
        """Q(1), Q'(1), C(0), C'(1) and C''(1) of this function, for checking."""
        act, one = self.activation, np.ones(1)
        q, q_slope, c_slope = (float(v[0]) for v in host_rule(act, lambda u, f, d: [f * f, u * f * d, d * d], one, 3))
        mean = float(gaussian.mean(act, 1.0))
        bend = math.inf if act.prime.jumps else float(gaussian.moment_prime(act.prime, 1.0)) / q
        return Conditions(q, q_slope, mean * mean / q, c_slope / q, bend)

    def c_map(self, c):
        """The local correlation map C(c) at q = 1, for c in [-1, 1]."""
        return gaussian.dual(self.activation, 1.0, 1.0, c)

    def _single(self, what: str) -> None:
        if is_traced(self.alpha) or np.ndim(self.alpha):
            raise InputError(
                f"{what} of a batch of {np.shape(self.alpha)} shaped activations"
                if np.ndim(self.alpha)
                else f"{what} of a shaped activation with traced parameters",
                "one shaped activation with concrete parameters",
                "Gaussian expectations are computed function by function, from definite values",
                "take one with shaped[i], outside jit",
            )


def per_location_normalization(x, homogeneous: str = "one", *, scale: float = 1.0):
    """Inputs with q = 1 at every location: the last axis is scaled to a mean square of 1.

    Shaping holds for q = 1 from the first layer on. A further feature, the same for all examples, keeps what the
    scaling would lose: the norm of the input.

    Parameters
    ----------
    x : (..., features); the other axes are examples and locations (pixels, tokens).
    homogeneous : "one" appends the feature `scale`; "avg_q" appends `scale` times the root of the mean square over all
        axes but the first (the batch), for inputs with locations; "off" appends none.
    scale : of the appended feature.

    Returns
    -------
    Array (..., features + 1), or (..., features) for "off", with mean(y^2, -1) = 1.

    Raises
    ------
    InputError : an unknown `homogeneous`, "avg_q" without locations, no axis, or an all-zero location with "off".

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> y = ij.shaping.per_location_normalization(jnp.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
    >>> print([[f"{v:.3f}" for v in row] for row in y], (y**2).mean(-1).round(3).tolist())
    [['1.177', '0.000', '1.569', '0.392'], ['0.000', '0.000', '0.000', '2.000']] [1.0, 1.0]

    References
    ----------
    Martens et al. 2021 (arXiv:2110.01765), "Uniform q values via Per-Location Normalization".
    """
    x = jnp.asarray(x)
    if homogeneous not in ("one", "avg_q", "off") or x.ndim < 1 or homogeneous == "avg_q" and x.ndim < 3:
        raise InputError(
            f"homogeneous = {homogeneous!r} for inputs of shape {x.shape}",
            '"one", "avg_q" (inputs of shape (batch, locations..., features)) or "off"',
            "without locations the mean square of the example is that of its one location, so that avg_q adds nothing",
            'use "one"',
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    if homogeneous == "one":
        x = jnp.concatenate([x, jnp.full_like(x[..., :1], scale)], axis=-1)
    elif homogeneous == "avg_q":
        axes = tuple(range(1, x.ndim))
        size = scale * jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
        x = jnp.concatenate([x, jnp.broadcast_to(size, (*x.shape[:-1], 1))], axis=-1)
    q = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    if not is_traced(q) and bool(jnp.any(q == 0)):
        raise InputError(
            f"inputs of shape {x.shape} with {int(jnp.sum(q == 0))} locations that are zero in every feature",
            "locations with a feature that is not zero",
            "zero cannot be scaled to a mean square of 1",
            'use homogeneous="one", whose further feature is never zero',
        )
    return x * jax.lax.rsqrt(q)
