r"""Recurrent networks as layer maps: time takes the place of depth, and the input enters again at every step.

    vanilla       h' = W phi(h) + U x + b                             Activation(phi) >> Dense(w, b) >> Drive(variance)
    minimalRNN    h' = u h + (1 - u) x~,  u = sigma(W h + V x~ + mu)
    GRU           h' = z h + (1 - z) tanh(W (r h) + U x + b),  z, r gates
    LSTM          c' = f c + i g,  h' = o tanh(c')                    (two moments: `lstm`)

The maps take the weights and the input of each time step as new ones. Real cells use the same weights at every step
(tied weights). For the vanilla cell this does not matter to leading order in the width. For gated cells it does: a gate
and the state that it multiplies depend on the same weights, and the error does not vanish with the width. Measured,
tied weights against the map, with sigma_u = 1 at width 500:
    cell         sigma_w, variance, bias    second moment     chi
    minimalRNN   1, 1, 0                    -1 % (2 %)        +2 % (1 %)        in brackets: standard error
    minimalRNN   2, 0.5, 1                  -8 % (3 %)        +2 % (1 %)
    minimalRNN   3, 0.5, 1                  -14 % (2 %)       +2 % (2 %)
    GRU          1, 1, 0                    -4 % (1 %)        +12 % (2 %)
    GRU          2, 0.5, 1                  +14 % (3 %)       +15 % (1 %)
    GRU          3, 0.5, 1                  +66 % (5 %)       +11 % (1 %)
    LSTM (cell)  1, 1, 1                    +11 % (2 %)
    LSTM (cell)  2, 0.5, 3                  19 times larger
So the gated maps are good to some 10 % for sigma_w <= 1, and only tell trends for strong recurrent weights or long
memory. With weights drawn anew at every step all of them agree with the map within sampling error.

Sources: Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394); Gilboa et al. 2019 (arXiv:1901.08987).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import Activation as Elementwise
from initjax.gaussian.dual import _check_c, cross
from initjax.gaussian.expect import check_q
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.results import result
from initjax.meanfield.state import Layer, State, refuse_tracers, times
from initjax.meanfield.table import table_of


class Drive(Layer):
    """An input added at every step, U x_t: second moment `variance`, and `correlation` between the two sequences.

    c = 1 is a fixed point only if both sequences are the same (correlation 1), so phases are told with a common input.

    Parameters
    ----------
    variance : E[(U x)^2] = sigma_u^2 |x|^2 / n_in, >= 0.
    correlation : of the inputs of the two sequences, in [-1, 1].

    Raises
    ------
    InputError : out of range or traced.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> from initjax.layers import Activation, Dense, Drive
    >>> point = ij.layers.fixed_point(Activation(jnp.tanh) >> Dense(1.0) >> Drive(0.25, correlation=0.5))
    >>> print(f"{point.q:.5f} {point.c:.5f}")
    0.53465 0.48314

    References
    ----------
    Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394), section 3.
    """

    def __init__(self, variance, correlation=1.0):
        refuse_tracers("Drive", variance, correlation)
        self.variance, self.correlation = check_q(variance, "variance")[()], _check_c(correlation)[()]

    def step(self, state: State) -> State:
        pair = {} if state.k is None else {"k": state.k + self.variance * self.correlation}
        return state.replace(q1=state.q1 + self.variance, q2=state.q2 + self.variance, **pair)

    def __repr__(self) -> str:
        return f"Drive({self.variance}, correlation={self.correlation})"


@functools.lru_cache(maxsize=256)
def gate(kind: str, bias: float = 0.0) -> Elementwise:
    """sigmoid(x + bias), 1 - sigmoid(x + bias) or tanh(x), one object each, so that its table is built once."""
    if kind == "open":
        return Elementwise(lambda x: jax.nn.sigmoid(x + jnp.asarray(bias, x.dtype)))
    if kind == "shut":
        return Elementwise(lambda x: jax.nn.sigmoid(-x - jnp.asarray(bias, x.dtype)))
    return Elementwise(jnp.tanh)


def _both(act: Elementwise, q, k) -> tuple[Any, Any, Any, Any]:
    """E[f^2], E[f'^2], E[f(u) f(v)], E[f'(u) f'(v)] at q1 = q2 = q; the last two None without k."""
    at = table_of(act)(np, np.asarray(q))
    if k is None:
        return at.m, at.d, None, None
    k = np.asarray(k)
    equal = k == q
    # merged inputs take the one-dimensional values, so that they stay merged
    pair = np.where(equal, at.m, cross(act, act, q, q, k))
    slopes = np.where(equal, at.d, cross(act.prime, act.prime, q, q, k))
    return at.m, at.d, pair, slopes


class _Gated(Layer):
    """What gated cells share: parameters, checks, and that both inputs have one second moment."""

    has_weights = True

    def __init__(self, sigma_w, sigma_u, variance, correlation, sigma_b):
        refuse_tracers(type(self).__name__, sigma_w, sigma_u, variance, correlation, sigma_b)
        self.sigma_w, self.sigma_u = check_sigma(sigma_w, "sigma_w")[()], check_sigma(sigma_u, "sigma_u")[()]
        self.sigma_b = check_sigma(sigma_b, "sigma_b")[()]
        self.variance, self.correlation = check_q(variance, "variance")[()], _check_c(correlation)[()]

    def _pre(self, q, k) -> tuple[Any, Any]:
        """Second moments of W h + U x + b: of one input, and of the pair."""
        vw, drive, vb = self.sigma_w**2, self.sigma_u**2 * self.variance, self.sigma_b**2
        return vw * q + drive + vb, None if k is None else vw * k + drive * self.correlation + vb

    def _check(self, state: State):
        if not np.allclose(state.q1, state.q2, rtol=1e-9, atol=0):
            raise InputError(
                f"{type(self).__name__} got inputs of second moments {np.ravel(state.q1)[0]:.6g} and "
                f"{np.ravel(state.q2)[0]:.6g}.",
                "two sequences with equal second moments.",
                "its map is written for one q.",
                "start from one q for both, for example ij.layers.state(q, c).",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma_w={self.sigma_w}, sigma_u={self.sigma_u}, variance={self.variance})"


class MinimalRNN(_Gated):
    """One step of the minimalRNN, h' = u h + (1 - u) x~ with u = sigmoid(W h + V x~ + mu); the state is h itself.

    Parameters
    ----------
    sigma_w, sigma_u : standard deviations of W and V (Var = sigma^2 / fan_in).
    variance, correlation : second moment of the embedded input x~ and its correlation between the two sequences.
    bias : mu, one number; a large one gives long memory, E[u^2] -> 1.
    sigma_b : standard deviation of a random part of the gate's bias.

    Notes
    -----
    Approximate for real cells: weights are taken new at every step. With the same weights at every step q was measured
    1 % below the map at sigma_w = 1, 8 % at 2 and 14 % at 3, and chi 2 % above it, at any width.

    Examples
    --------
    >>> import initjax as ij
    >>> point = ij.layers.fixed_point(ij.layers.MinimalRNN(1.0, 1.0, variance=1.0, bias=2.0))
    >>> print(f"{point.q:.5f} {point.chi_1:.5f}")
    0.15937 0.74440

    References
    ----------
    Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394), section 4.
    """

    def __init__(self, sigma_w, sigma_u, variance, correlation=1.0, bias=0.0, sigma_b=0.0):
        super().__init__(sigma_w, sigma_u, variance, correlation, sigma_b)
        self.bias = check_real(bias, "bias")

    def step(self, state: State) -> State:
        self._check(state)
        q, k = state.q1, state.k
        pre_q, pre_k = self._pre(q, k)
        keep, slope, keep_k, slope_k = _both(gate("open", self.bias), pre_q, pre_k)
        new, _, new_k, _ = _both(gate("shut", self.bias), pre_q, pre_k)
        x, vw = self.variance, self.sigma_w**2
        after = keep * q + new * x
        chi = keep + vw * slope * (q + x)
        pair = {}
        if k is not None:
            x_k = x * self.correlation
            pair = {
                "k": keep_k * k + new_k * x_k,
                "chi_k": times(state.chi_k, keep_k + vw * slope_k * (k + x_k)),
            }
        return state.replace(q1=after, q2=after, chi=state.chi * chi, **pair)


class GRU(_Gated):
    """One step of the GRU, h' = z h + (1 - z) tanh(W (r h) + U x + b) with gates z, r; the state is h itself.

    Parameters
    ----------
    sigma_w, sigma_u, sigma_b : standard deviations of the recurrent weights, input weights and biases of every gate.
    variance, correlation : |x|^2 / n_in, and the correlation of the inputs of two sequences.
    bias : mean of the bias of the gate z; a large one gives long memory.

    Notes
    -----
    Approximate for real cells: weights are taken new at every step. With the same weights at every step q was measured
    4 % below the map at sigma_w = 1, 14 % above at 2 and 66 % above at 3, and chi 11 to 15 % above it, at any width.

    Examples
    --------
    >>> import initjax as ij
    >>> point = ij.layers.fixed_point(ij.layers.GRU(1.0, 1.0, variance=1.0))
    >>> print(f"{point.q:.5f} {point.chi_1:.5f}")
    0.17166 0.36491

    References
    ----------
    Gilboa et al. 2019 (arXiv:1901.08987), section 3.
    """

    def __init__(self, sigma_w, sigma_u, variance, correlation=1.0, bias=0.0, sigma_b=0.0):
        super().__init__(sigma_w, sigma_u, variance, correlation, sigma_b)
        self.bias = check_real(bias, "bias")

    def step(self, state: State) -> State:
        self._check(state)
        q, k, vw = state.q1, state.k, self.sigma_w**2
        pre_q, pre_k = self._pre(q, k)
        keep, keep_d, keep_k, keep_dk = _both(gate("open", self.bias), pre_q, pre_k)
        new, _, new_k, _ = _both(gate("shut", self.bias), pre_q, pre_k)
        reset, reset_d, reset_k, reset_dk = _both(gate("open"), pre_q, pre_k)
        inner_q, inner_k = self._pre(reset * q, None if k is None else reset_k * k)
        value, value_d, value_k, value_dk = _both(gate("tanh"), inner_q, inner_k)
        after = keep * q + new * value
        # three paths from h: kept, through z (of either sign), through the candidate (directly and through r)
        chi = keep + vw * keep_d * (q + value) + new * value_d * vw * (reset + vw * reset_d * q)
        pair = {}
        if k is not None:
            slope = keep_k + vw * keep_dk * (k + value_k) + new_k * value_dk * vw * (reset_k + vw * reset_dk * k)
            pair = {"k": keep_k * k + new_k * value_k, "chi_k": times(state.chi_k, slope)}
        return state.replace(q1=after, q2=after, chi=state.chi * chi, **pair)


def check_real(value, name: str) -> float:
    """One finite number."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.ndim or not np.isfinite(array):
        raise InputError(
            f"{name} = {value!r}.", "one finite real number.", "it shifts a gate.", "pass a number such as 1.0."
        )
    return float(array)


@result
class LSTMPoint:
    """The state to which a driven LSTM tends.

    Attributes
    ----------
    cell, hidden : second moments of c and h.
    cell_c, hidden_c : correlations of two sequences in c and h.
    forget : E[f^2], the factor of the cell's memory per step.
    memory : -1 / ln E[f^2], steps over which the second moment of a cell's content decays.
    """

    cell: np.floating
    hidden: np.floating
    cell_c: np.floating
    hidden_c: np.floating
    forget: np.floating
    memory: np.floating


def lstm(sigma_w, sigma_u, variance, correlation=1.0, forget_bias=1.0, sigma_b=0.0, steps=100_000) -> LSTMPoint:
    """Fixed point of the LSTM, c' = f c + i g, h' = o tanh(c'), with new weights at every step.

    Parameters
    ----------
    sigma_w, sigma_u, sigma_b : standard deviations of recurrent weights, input weights and biases of every gate.
    variance, correlation : |x|^2 / n_in, and the correlation of the inputs of two sequences.
    forget_bias : mean of the forget gate's bias.
    steps : at most this many iterations.

    Returns
    -------
    LSTMPoint.

    Raises
    ------
    InputError : input out of range or traced; not settled within `steps`.

    Accuracy
    --------
    The iteration stops at relative changes of 1e-14. Approximate in two ways for real cells: c is a sum with random
    coefficients (kurtosis measured 3.1), and E[tanh(c)^2] is taken as if it were Gaussian: hidden off by 2 %. And
    weights are taken new at every step: with the same ones the cell's second moment was 11 % larger at sigma_w = 1,
    forget_bias = 1, and 19 times larger at sigma_w = 2, forget_bias = 3.

    Examples
    --------
    >>> import initjax as ij
    >>> point = ij.layers.lstm(1.0, 1.0, variance=1.0, forget_bias=3.0)
    >>> print(f"{point.cell:.4f} {point.hidden:.4f} {point.memory:.2f}")
    0.9232 0.1127 7.01

    References
    ----------
    Gilboa et al. 2019 (arXiv:1901.08987), section 3; van der Westhuizen and Lasenby 2018 (arXiv:1804.04849) for the
    forget bias.
    """
    cell = _Gated(sigma_w, sigma_u, variance, correlation, sigma_b)
    bias = check_real(forget_bias, "forget_bias")
    hq = hk = cq = ck = np.float64(0.0)
    for _ in range(steps):
        pre_q, pre_k = cell._pre(hq, hk)
        forget, _, forget_k, _ = _both(gate("open", bias), pre_q, pre_k)
        opened, _, opened_k, _ = _both(gate("open"), pre_q, pre_k)
        value, _, value_k, _ = _both(gate("tanh"), pre_q, pre_k)
        new_q, new_k = forget * cq + opened * value, forget_k * ck + opened_k * value_k
        out, _, out_k, _ = _both(gate("tanh"), new_q, new_k)
        new = new_q, new_k, opened * out, opened_k * out_k
        move = max(abs(a - b) for a, b in zip(new, (cq, ck, hq, hk), strict=True))
        cq, ck, hq, hk = new
        if move <= 1e-14 * max(1e-300, float(cq)):
            break
    else:
        raise InputError(
            f"the LSTM's moments still move by {move:.1e} a step after {steps} steps.",
            "a cell that settles within `steps`.",
            f"its memory is {-1 / np.log(forget):.3g} steps.",
            "pass a larger steps, or a smaller forget_bias.",
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        memory = -1 / np.log(forget)
        numbers = (cq, hq, ck / cq, hk / hq, forget, memory)
    return LSTMPoint(*(np.float64(v) for v in numbers))
