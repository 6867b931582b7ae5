"""Weights with a pattern: identities, few connections, and mirrored units whose contributions cancel or add up."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from initjax.errors import InputError
from initjax.initializers.orthogonal import centre, orthogonal
from initjax.initializers.protocol import Init, choice, count, factory, placed
from initjax.initializers.protocol import scale as checked_scale


@dataclasses.dataclass(frozen=True)
class Identity(Init):
    """scale on the diagonal of (inputs, outputs), in the middle of a window if there is one; zeros elsewhere."""

    scale: float = 1.0
    groups: int = 1
    dtype: Any = None
    window: bool = False

    def __post_init__(self):
        object.__setattr__(self, "scale", checked_scale(self.scale, "scale"))
        count(self.groups, "groups")

    def check(self, shape):
        fits = 3 <= len(shape) <= 5 if self.window else len(shape) == 2
        if not fits or shape[-1] % self.groups:
            raise InputError(
                f"weights of shape {shape}" + (f" with groups={self.groups}" if self.groups > 1 else ""),
                "shapes (window, in / groups, out) of 3 to 5 axes, out divisible by groups"
                if self.window
                else "shapes (in, out)",
                "every output copies the input channel of its own number",
                "use identity for dense layers and dirac for convolutions",
            )

    def std(self, shape):
        return self.scale * math.sqrt(self.groups * min(shape[-2], shape[-1] // self.groups) / math.prod(shape))

    def sample(self, key, shape, dtype, out_sharding):
        one = jnp.eye(shape[-2], shape[-1] // self.groups, dtype=dtype) * jnp.asarray(self.scale, dtype)
        block = jnp.tile(one, (1, self.groups))
        return placed(jnp.zeros(shape, dtype).at[centre(shape)].set(block) if self.window else block, out_sharding)


@dataclasses.dataclass(frozen=True)
class Sparse(Init):
    """Every unit has `connections` inputs with weights N(0, sigma_w^2 / connections); the others are 0."""

    connections: int
    sigma_w: float = 1.0
    dtype: Any = None

    def __post_init__(self):
        count(self.connections, "connections")
        object.__setattr__(self, "sigma_w", checked_scale(self.sigma_w, "sigma_w"))

    def check(self, shape):
        if len(shape) < 2:
            raise InputError(
                f"weights of shape {shape}",
                "two axes or more, the last one the units",
                "the connections of a unit are chosen among its inputs",
                "use zeros for biases",
            )

    def std(self, shape):
        fan_in = math.prod(shape[:-1])
        kept = min(self.connections, fan_in)
        return self.sigma_w / math.sqrt(fan_in) if kept else 0.0

    def sample(self, key, shape, dtype, out_sharding):
        places, values = jax.random.split(key)
        fan_in, units = math.prod(shape[:-1]), shape[-1]
        kept = min(self.connections, fan_in)
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(places, (fan_in, units)), 0), 0)
        w = jax.random.normal(values, (fan_in, units), dtype) * jnp.asarray(self.sigma_w / math.sqrt(kept), dtype)
        return placed(jnp.where(rank < kept, w, jnp.zeros_like(w)).reshape(shape), out_sharding)


@dataclasses.dataclass(frozen=True)
class Mirrored(Init):
    """The second half along each axis of `axes` is the first half times `sign`; `base` draws the first."""

    base: Any
    axes: tuple[int, ...] = (-1,)
    sign: float = -1.0
    scale: float = 1.0
    dtype: Any = None

    def check(self, shape):
        bad = [axis for axis in self.axes if not -len(shape) <= axis < len(shape) or shape[axis] % 2]
        if bad:
            raise InputError(
                f"weights of shape {shape}, mirrored along the axes {self.axes}",
                "an even number of entries along each of them",
                "units come in pairs",
                "make the width even, or choose the axis of the pairs",
            )

    def half(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `base` draws."""
        axes = {axis % len(shape) for axis in self.axes}
        return tuple(n // 2 if axis in axes else n for axis, n in enumerate(shape))

    def std(self, shape):
        return self.scale * self.base.std(self.half(shape))

    def sample(self, key, shape, dtype, out_sharding):
        w = self.base(key, self.half(shape), dtype) * jnp.asarray(self.scale, dtype)
        for axis in self.axes:
            w = jnp.concatenate([w, w * jnp.asarray(self.sign, dtype)], axis)
        return placed(w, out_sharding)


@factory
def identity(scale: Any = 1.0, *, dtype: Any = None) -> Identity:
    """A scaled identity matrix, also rectangular: unit i copies input i, units without an input are 0.

    Parameters
    ----------
    scale : the diagonal. Mean square of the entries scale^2 / max(fan_in, fan_out); nothing is random.
    dtype : dtype where the call names none.

    Returns
    -------
    Identity, an initializer for shapes (in, out).

    Raises
    ------
    InputError : scale negative or not finite; when called, other than two axes.

    Accuracy
    --------
    Exact.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import identity
    >>> print(identity()(jax.random.key(0), (2, 3)))
    [[1. 0. 0.]
     [0. 1. 0.]]

    References
    ----------
    Le, Jaitly, Hinton 2015 (arXiv:1504.00941), section 2, for recurrent kernels.
    """
    return Identity(scale, 1, dtype)


@factory
def dirac(groups: int = 1, scale: Any = 1.0, *, dtype: Any = None) -> Identity:
    """A convolution that copies: output i of every group is input i of it, in the middle of the window.

    Parameters
    ----------
    groups : the layer's feature_group_count.
    scale : the entries that are not 0.
    dtype : dtype where the call names none.

    Returns
    -------
    Identity, an initializer for shapes (window, in / groups, out) of 3 to 5 axes. The middle of an even window is
    (size - 1) // 2, so that "SAME" padding gives the input itself.

    Raises
    ------
    InputError : groups no integer >= 1; when called, a shape that does not fit.

    Accuracy
    --------
    Exact.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.initializers import dirac
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 5, 4))
    >>> layer = nn.Conv(4, (2, 3), kernel_init=dirac())
    >>> bool((layer.init_with_output(jax.random.key(1), x)[0] == x).all())
    True

    References
    ----------
    Zagoruyko, Komodakis 2017 (arXiv:1706.00388), section 3.
    """
    return Identity(scale, groups, dtype, window=True)


@factory
def sparse(connections: int = 15, sigma_w: Any = 1.0, *, dtype: Any = None) -> Sparse:
    """Every unit sees a fixed number of random inputs, so that its input's spread does not depend on the width.

    Parameters
    ----------
    connections : weights of a unit that are not 0; all of them where there are fewer inputs.
    sigma_w : their law is N(0, sigma_w^2 / connections), so the variance of an entry is sigma_w^2 / fan_in.
    dtype : dtype where the call names none.

    Returns
    -------
    Sparse, an initializer for shapes of two axes or more, the last one the units.

    Raises
    ------
    InputError : connections no integer >= 1, sigma_w negative; when called, fewer than two axes.

    Accuracy
    --------
    The number of connections is exact, and so is the variance.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import sparse
    >>> w = sparse(5)(jax.random.key(0), (100, 4))
    >>> print((w != 0).sum(0))
    [5 5 5 5]

    References
    ----------
    Martens 2010 (Deep learning via Hessian-free optimization, section 5).
    """
    return Sparse(connections, sigma_w, dtype)


@factory
def mirrored(base: Any, axis: Any = -1, sign: Any = -1.0, *, scale: Any = 1.0, dtype: Any = None) -> Mirrored:
    """Units in pairs: the second half of the weights along `axis` is `sign` times the first.

    Hidden units mirrored with `sign=1` (axis -1 of their kernel) and a readout mirrored with `sign=-1` (axis -2) make
    the network's output exactly 0 at initialization, while its gradients are not. `scale=2**-0.5` in the readout gives
    its entries the variance of the full fan, and the tangent kernel the mean of a network without pairs.

    Parameters
    ----------
    base : initializer of the half; it sees half the shape, so its fans are those of the half.
    axis : axis or axes of the pairs; along several, the signs multiply.
    sign : 1 or -1.
    scale : factor on all entries; variance scale^2 times that of `base`.
    dtype : dtype where the call names none.

    Returns
    -------
    Mirrored, an initializer for shapes that are even along `axis`.

    Raises
    ------
    InputError : a sign other than 1 or -1, a factory as base; when called, an odd axis.

    Accuracy
    --------
    The halves are equal bit for bit.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.initializers import FanIn, mirrored
    >>> hidden, readout = mirrored(FanIn(2**0.5), -1, 1), mirrored(FanIn(1.0), -2, -1)
    >>> model = nn.Sequential([nn.Dense(64, kernel_init=hidden), jnp.tanh, nn.Dense(1, kernel_init=readout)])
    >>> print(abs(model.init_with_output(jax.random.key(0), jnp.ones((3, 8)))[0]).max() < 1e-6)
    True

    References
    ----------
    Chizat, Oyallon, Bach 2019 (arXiv:1812.07956), section 2 (doubling trick); Zhang et al. 2020 (arXiv:1905.07777).
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if sign not in (1, -1):
        raise InputError(
            f"sign={sign!r}", "1 or -1", "a mirrored unit repeats or cancels its partner", "use scale for factors"
        )
    if getattr(base, "builds_initializer", False) or not callable(base):
        raise InputError(
            f"base={getattr(base, '__name__', base)!r}",
            "an initializer such as FanIn(1.0) or orthogonal()",
            "it draws the first half",
            "call the factory, with empty parentheses if it needs no arguments",
        )
    return Mirrored(base, axes, float(sign), checked_scale(scale, "scale"), dtype)


@factory
def looks_linear(part: str = "hidden", base: Any = None, *, dtype: Any = None) -> Mirrored:
    """Mirrored relu units, relu(u) and relu(-u), such that a deep relu network is exactly linear at initialization.

    relu(u) - relu(-u) = u, so gradients do not shatter: the Jacobian is the product of the matrices W of `base`.

    Parameters
    ----------
    part : "first" (in, 2n): [W, -W]; "hidden" (2n, 2m): [[W, -W], [-W, W]]; "last" (2n, out): [[W], [-W]]. "last" also
        fits layers behind concatenated relu, [relu(u), relu(-u)].
    base : initializer of W; `orthogonal()` if left out. Variance as that of `base` for the half shape.
    dtype : dtype where the call names none.

    Returns
    -------
    Mirrored, an initializer for shapes that are even along the mirrored axes.

    Raises
    ------
    InputError : an unknown part; when called, an odd width.

    Accuracy
    --------
    Exactly linear up to the rounding of sums.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import looks_linear
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> first, hidden, last = (looks_linear(part) for part in ("first", "hidden", "last"))
    >>> a, b, c = first(keys[0], (4, 8)), hidden(keys[1], (8, 8)), last(keys[2], (8, 4))
    >>> f = lambda x: jax.nn.relu(jax.nn.relu(x @ a) @ b) @ c
    >>> x = jax.random.normal(jax.random.key(1), (5, 4))
    >>> bool(jnp.abs(f(x) + f(-x)).max() < 1e-5), bool(abs((f(x) ** 2).sum() / (x**2).sum() - 1) < 1e-5)
    (True, True)

    References
    ----------
    Balduzzi et al. 2017 (arXiv:1702.08591), section 4.
    """
    choice(part, "part", ("hidden", "first", "last"), "the pattern depends on which sides are doubled")
    axes = {"first": (-1,), "hidden": (-2, -1), "last": (-2,)}[part]
    return mirrored(orthogonal() if base is None else base, axes, -1, dtype=dtype)
