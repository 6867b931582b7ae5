"""Recurrent cells: the bias that makes a cell remember, and kernels that share one fan."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.initializers.protocol import Init, choice, count, factory, placed
from initjax.initializers.scaled import FanIn
from initjax.trace.jaxpr import is_traced


@factory
def forget_gate_bias(value: Any = 1.0, *, gates: str = "ifgo", dtype: Any = None) -> "GateBias":
    """Biases of an LSTM whose gates lie side by side: `value` for the forget gate, zeros for the others.

    Parameters
    ----------
    value : bias of the forget gate. sigmoid(1) = 0.73 keeps a cell for about 3 steps, log(T - 1) for about T.
    gates : order of the gates along the last axis, with "f" for the forget gate; "f" alone for a bias of its own, as
        in Flax's `LSTMCell` ("hf/bias"). Flax's nnx `OptimizedLSTMCell` has "ifgo".
    dtype : dtype where the call names none.

    Returns
    -------
    GateBias, an initializer for shapes (..., gates * hidden). Nothing is random.

    Raises
    ------
    InputError : gates without exactly one "f"; when called, a last axis that is no multiple of their number.

    Accuracy
    --------
    Exact.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import forget_gate_bias
    >>> print(forget_gate_bias()(jax.random.key(0), (8,)))
    [0. 0. 1. 1. 0. 0. 0. 0.]

    References
    ----------
    Gers, Schmidhuber, Cummins 2000 (Learning to forget); Jozefowicz, Zaremba, Sutskever 2015, section 3: bias 1.
    """
    if not isinstance(gates, str) or gates.count("f") != 1:
        choice(gates, "gates", ("ifgo", "f"), 'one letter for each gate, "f" once')
    number = np.asarray(np.nan if is_traced(value) else value, np.float64)
    if number.ndim or not np.isfinite(number):
        raise InputError(f"value={value!r}", "one finite number", "it is a bias", "1.0 is usual")
    return GateBias(float(number), gates.index("f"), len(gates), dtype)


@dataclasses.dataclass(frozen=True)
class GateBias(Init):
    """`value` in block number `gate` of `gates` blocks of the last axis, zeros elsewhere."""

    value: float
    gate: int
    gates: int
    dtype: Any = None

    def check(self, shape):
        if not shape or shape[-1] % self.gates:
            raise InputError(
                f"a bias of shape {shape}",
                f"a last axis divisible by {self.gates}",
                f"the bias holds {self.gates} gates side by side",
                'give gates="f" for a bias of the forget gate alone',
            )

    def std(self, shape):
        return abs(self.value) / math.sqrt(self.gates)

    def sample(self, key, shape, dtype, out_sharding):
        hidden = shape[-1] // self.gates
        one = jax.nn.one_hot(jnp.arange(shape[-1]) // hidden, self.gates, dtype=dtype)[:, self.gate]
        return placed(jnp.broadcast_to(one * jnp.asarray(self.value, dtype), shape), out_sharding)


@factory
def combined_fan(other: int, sigma_w: Any = 1.0, *, distribution: str = "normal", dtype: Any = None) -> "CombinedFan":
    """One kernel of a sum W x + U h as if both were one matrix on (x, h): variance sigma_w^2 / (fan_in + other).

    The fan of `W` is read from its shape. With sigma_w = 1 and linear units the sum keeps the mean square of its two
    inputs, not the memory of h: gradients through T steps shrink by (n_h / (n_x + n_h))^T.

    Parameters
    ----------
    other : size of the other input: of h for the kernel W of x, of x for the recurrent kernel U.
    sigma_w : standard deviation in mean-field scaling of the joint matrix.
    distribution, dtype : as in `FanIn`.

    Returns
    -------
    CombinedFan, an initializer for shapes (in, out).

    Raises
    ------
    InputError : other no integer >= 1, sigma_w negative.

    Accuracy
    --------
    The variance is exact.

    Examples
    --------
    >>> from initjax.initializers import combined_fan
    >>> print(combined_fan(other=64).std((192, 192)) ** 2 * 256)
    1.0

    References
    ----------
    Glorot, Bengio 2010 (Understanding the difficulty of training deep feedforward networks), eq. 10 for the joint
    matrix; Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394) for the memory.
    """
    return CombinedFan(sigma_w, distribution, dtype=dtype, other=count(other, "other"))


@dataclasses.dataclass(frozen=True)
class CombinedFan(FanIn):
    """As `FanIn`, with `other` further terms in the sum; see `combined_fan`."""

    other: int = 0

    def of_fans(self, fan_in: float, fan_out: float) -> float:
        return super().of_fans(fan_in + self.other, fan_out)
