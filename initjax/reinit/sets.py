"""Ready sets of rules, each the initialization of one paper applied to a whole model from outside.

Sets that scale by fans use the true ones where the model is given. Sets that need the order of layers or the residual
branches read them from the traced program, so they work whatever the layers are called.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from initjax.initializers.heads import MinusMean
from initjax.initializers.protocol import checked_dtype, draw
from initjax.reinit.info import ParamInfo, check_stack
from initjax.reinit.rule import Rule, Rules, keep

MinusMean.acts_on_info = True  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True)
class ByFan:
    """An action: independent entries whose standard deviation is a function of the parameter's info."""

    name: str
    std_of: Callable[[ParamInfo], float]
    distribution: str = "normal"

    acts_on_info = True

    def __call__(self, key: Any, info: ParamInfo) -> jax.Array:
        if info.fan_in is not None and info.doubt:
            check_stack(lambda k, shape, dtype: jax.random.normal(k, shape, dtype) / math.prod(shape[:-1]), info)
        dtype = checked_dtype(info.dtype)
        wide = dtype if dtype.itemsize >= 4 else checked_dtype("float32")
        return draw(key, info.shape, wide, None, self.distribution, self.std_of(info)).astype(dtype)


def is_kernel(info: ParamInfo) -> bool:
    """Whether the parameter meets data in a product or convolution."""
    return info.kind == "kernel"


def is_bias(info: ParamInfo) -> bool:
    return info.kind == "bias"


def is_embedding(info: ParamInfo) -> bool:
    return info.kind == "embedding"


def _by_fan(name: str, std_of: Callable[[float, float], float], distribution: str) -> Rules:
    def of(info: ParamInfo) -> float:
        assert info.fan_in is not None and info.fan_out is not None
        return std_of(info.fan_in, info.fan_out)

    return Rules([Rule(is_kernel, ByFan(name, of, distribution), "kernel"), Rule(..., keep, "other")])


def he(distribution: str = "normal") -> Rules:
    """He's law with true fans: every kernel of variance 2 / fan_in; biases, scales and embeddings are kept.

    Parameters
    ----------
    distribution : "normal", "truncated_normal" or "uniform", all of that variance.

    Returns
    -------
    Rules.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model, x = nn.ConvTranspose(64, (4, 4), (2, 2)), jnp.ones((1, 4, 4, 64))
    >>> params = model.init(jax.random.key(0), x)
    >>> print(ij.plan(params, ij.rules.he(), model=model, inputs=x))  # 256 terms, not 1024
    path    rule       action  old std  new std
    bias    ...        keep    0        0
    kernel  is_kernel  he      0.03136  0.08839

    References
    ----------
    He et al. 2015 (arXiv:1502.01852), eq. 10.
    """
    return _by_fan("he", lambda fan_in, fan_out: math.sqrt(2 / fan_in), distribution)


def xavier(distribution: str = "uniform") -> Rules:
    """Glorot's law with true fans: every kernel of variance 2 / (fan_in + fan_out); everything else is kept.

    Parameters
    ----------
    distribution : as in `he`.

    Returns
    -------
    Rules.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> print(ij.plan({"kernel": jnp.ones((40, 10))}, ij.rules.xavier()))
    path    rule       action  old std  new std
    kernel  is_kernel  xavier  1        0.2

    References
    ----------
    Glorot, Bengio 2010 (Understanding the difficulty of training deep feedforward networks), eq. 16.
    """
    return _by_fan("xavier", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)), distribution)


def lecun_fixed(distribution: str = "truncated_normal") -> Rules:
    """Flax's default with the true fans: every kernel of variance 1 / fan_in; everything else is kept.

    Corrects DenseGeneral with batch_dims, Einsum with three axes, ConvLocal and ConvTranspose (see `ij.audit_fans`).

    Parameters
    ----------
    distribution : as in `he`.

    Returns
    -------
    Rules.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model, x = nn.Einsum((8, 16, 5), "bqd,hdk->bqhk", use_bias=False), jnp.ones((1, 3, 16))
    >>> params = model.init(jax.random.key(0), x)
    >>> print(f"{ij.plan(params, ij.rules.lecun_fixed(), model=model, inputs=x).rows[0].new_std:.3f}")
    0.250

    References
    ----------
    LeCun et al. 1998 (Efficient BackProp, section 4.6).
    """
    return _by_fan("lecun", lambda fan_in, fan_out: math.sqrt(1 / fan_in), distribution)


def torch_default() -> Rules:
    """PyTorch's layers: kernels uniform on +-1/sqrt(fan_in), and biases too, with their kernel's fan.

    Returns
    -------
    Rules. Biases without a kernel beside them are kept.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> params = {"kernel": jnp.ones((75, 10)), "bias": jnp.ones(10)}
    >>> [round(row.new_std, 4) for row in ij.plan(params, ij.rules.torch_default()).rows]
    [0.0667, 0.0667]

    References
    ----------
    PyTorch, torch.nn.Linear, `reset_parameters`.
    """

    def std(info: ParamInfo) -> float:
        kernel = info.beside("kernel")
        assert kernel is not None and kernel.fan_in is not None
        return (3 * kernel.fan_in) ** -0.5

    def of_kernel(info: ParamInfo) -> bool:
        kernel = info.beside("kernel")
        return info.kind == "bias" and kernel is not None and kernel.fan_in is not None

    kernels = _by_fan("torch", lambda fan_in, fan_out: (3 * fan_in) ** -0.5, "uniform")
    return Rules([kernels[0], Rule(of_kernel, ByFan("torch", std, "uniform"), "bias", optional=True), kernels[1]])
