r"""Recurrent networks: the critical recurrent variance with an input, and how long a cell remembers.

    h_t = W phi(h_{t-1}) + U x_t + b:    q = sigma_w^2 E[phi(sqrt(q) z)^2] + v + sigma_b^2,    v = E[(U x)^2]

For second moments and gradients the input is one more bias, v beside sigma_b^2. It pushes units into saturation, where
slopes are smaller: inputs suppress chaos, and sigma_w^2 E[phi'^2] = 1 needs larger recurrent weights. What passes from
one step to the next is chi = sigma_w^2 E[phi'^2], the memory of a cell chi^T after T steps.

A single kernel on [x, h] with fan_in = inputs + hidden keeps the forward scale. It does not keep memory: the recurrent
block then has sigma_w^2 = rho = hidden / (inputs + hidden) of its own, and gradients shrink as rho^T.
"""

import math
from typing import Any

import numpy as np

from initjax.errors import InputError, NoCriticalPointError
from initjax.gaussian import moment
from initjax.gaussian.activation import as_activation
from initjax.gaussian.dual import _check_c
from initjax.gaussian.expect import check_q
from initjax.meanfield import critical as critical_point
from initjax.meanfield.blocks import fixed_point
from initjax.meanfield.elementary import Activation, Dense
from initjax.meanfield.fixed import CRITICAL_WITHIN, check_sigma, depth_scale
from initjax.meanfield.recurrent import Drive
from initjax.meanfield.results import result
from initjax.meanfield.state import refuse_tracers


@result
class RecurrentCritical:
    """The recurrent weights on the edge of chaos, in the presence of an input.

    Attributes
    ----------
    sigma_w : standard deviation of the recurrent weights in mean-field scaling, sigma_w^2 E[phi'^2] = 1.
    variance : sigma_w^2.
    q : second moment of the pre-activation, input included.
    c : correlation to which two sequences with the given input correlation tend; 1 with a common input.
    chi_c : slope of the correlation map there; 1 with a common input, below 1 otherwise.
    xi_c : time steps over which correlations settle, -1 / ln chi_c; inf with a common input.
    stable : whether q attracts.
    """

    sigma_w: Any
    variance: Any
    q: Any
    c: Any
    chi_c: Any
    xi_c: Any
    stable: Any


def critical(phi, input_variance, input_correlation=1.0, *, sigma_b=0.0) -> RecurrentCritical:
    r"""Recurrent weight scale on the edge of chaos for a cell that is driven by an input at every step.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    input_variance : v = E[(U x)^2] >= 0, what the input adds to a pre-activation: sigma_u^2 |x|^2 / n_in.
    input_correlation : of the inputs of two sequences, in [-1, 1]. Merged sequences stay merged only if it is 1, so
        that phases are told with a common input.
    sigma_b : bias standard deviation.

    Returns
    -------
    RecurrentCritical.

    Raises
    ------
    NoCriticalPointError : for relu and its kin with an input: their chi does not depend on q, and at chi = 1 the second
        moment grows by v at every step.
    InputError : values out of range, batched or traced.

    Warns
    -----
    UnstableCriticalPointWarning : the variance map leaves the only critical point.

    Accuracy
    --------
    1e-10 relative. Exact as the width grows, also for weights tied over time; at finite width n and near criticality
    the correlation deviates: tanh at sigma_w^2 = 2.5, v = 0.25, input correlation 0.5 has c = 0.367 in theory and 0.334
    at n = 1000.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from initjax.applications import recurrent
    >>> for v in (0.01, 0.25, 1.0):
    ...     print(f"input {v}: recurrent variance {recurrent.critical(jnp.tanh, v).variance:.5f}")
    input 0.01: recurrent variance 1.42421
    input 0.25: recurrent variance 2.40149
    input 1.0: recurrent variance 3.44321

    References
    ----------
    Molgedey, Schuchhardt, Schuster 1992 (suppression of chaos by noise); Chen, Pennington, Schoenholz 2018
    (arXiv:1806.05394), section 3.
    """
    refuse_tracers("critical", input_variance, input_correlation, sigma_b)
    v, b = _scalar(check_q(input_variance, "input_variance"), "input_variance"), _sigma(sigma_b, "sigma_b")
    shared = _scalar(_check_c(input_correlation), "input_correlation")
    act = as_activation(phi)
    try:
        point = critical_point(act, math.sqrt(v + b * b))
    except NoCriticalPointError as error:
        raise NoCriticalPointError(
            f"no recurrent weight scale puts {act.name} on the edge of chaos with input_variance = {v:g}",
            "a cell with chi = 1 at a fixed second moment; the input adds to it like a bias of variance v",
            error.why,
            "a saturating activation such as tanh, or a norm on the input",
        ) from error
    w = float(point.sigma_w)
    if shared == 1 or v == 0 or not np.isfinite(point.q) or point.q == 0:
        c, chi_c = 1.0, 1.0
    else:
        settled = fixed_point(Activation(act) >> Dense(w, b) >> Drive(v, shared), q0=float(point.q))
        c, chi_c = float(settled.c), float(settled.chi_c)
    xi_c = math.inf if abs(chi_c - 1) < CRITICAL_WITHIN else float(depth_scale(chi_c))
    numbers = (w, w * w, float(point.q), c, chi_c, xi_c)
    return RecurrentCritical(*(np.float64(number) for number in numbers), stable=point.stable)


@result
class Memory:
    """What a cell with these weights keeps of its past.

    Attributes
    ----------
    q : second moment of a pre-activation, once settled.
    second_moment : of a unit behind phi, E[phi^2].
    gain : chi, factor on the second moment of a perturbation, and of a gradient, per step.
    horizon : steps over which they change e-fold, -1 / ln chi: positive forgetting, negative exploding, inf at 1.
    kept : chi^steps.
    recurrent_variance : sigma_w^2 of the recurrent block in its own fan_in: with one kernel on [x, h], rho sigma_w^2.
    rho : hidden / (inputs + hidden) for one kernel on [x, h]; 1 for separate ones.
    correlation : to which two sequences with the given input correlation tend.
    phase : "ordered", "critical", "chaotic" or "unbounded".
    """

    q: Any
    second_moment: Any
    gain: Any
    horizon: Any
    kept: Any
    recurrent_variance: Any
    rho: Any
    correlation: Any
    phase: Any


def memory(
    phi,
    sigma_w=1.0,
    *,
    input_variance=None,
    input_correlation=1.0,
    hidden=None,
    inputs=None,
    input_square=1.0,
    sigma_b=0.0,
    steps=10,
) -> Memory:
    r"""How long a recurrent cell remembers: chi^T, with separate kernels or with one kernel on [x, h].

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w : standard deviation in mean-field scaling: of the recurrent kernel, sigma_w^2 / hidden, or of the single
        kernel on [x, h], sigma_w^2 / (inputs + hidden).
    input_variance : separate kernels: E[(U x)^2], what the input adds to a pre-activation.
    hidden, inputs : sizes, for a single kernel on [x, h]; given instead of `input_variance`.
    input_square : mean square of an input entry, with a single kernel.
    input_correlation : of the inputs of two sequences.
    sigma_b : bias standard deviation.
    steps : T of `Memory.kept`.

    Returns
    -------
    Memory.

    Raises
    ------
    InputError : neither or both of `input_variance` and the two sizes, values out of range, batched or traced.

    Accuracy
    --------
    1e-11; exact as the width grows. `kept` is the gain of second moments at the fixed point: from another start the
    first steps differ.

    Examples
    --------
    >>> from initjax.applications import recurrent
    >>> one_kernel = recurrent.memory(lambda x: x, hidden=192, inputs=64, steps=10)  # LeCun scaling of the fan of both
    >>> print(f"q = {one_kernel.q:.3f}, but gradients keep {one_kernel.kept:.5f} of their square in 10 steps")
    q = 1.000, but gradients keep 0.05631 of their square in 10 steps

    References
    ----------
    Chen, Pennington, Schoenholz 2018 (arXiv:1806.05394), section 3; rho^T derived from it.
    """
    refuse_tracers("memory", sigma_w, input_variance, input_correlation, input_square, sigma_b)
    w, b = _sigma(sigma_w, "sigma_w"), _sigma(sigma_b, "sigma_b")
    sizes = (hidden, inputs)
    if (input_variance is None) == (None in sizes) or (input_variance is not None and sizes != (None, None)):
        raise InputError(
            f"input_variance = {input_variance!r}, hidden = {hidden!r}, inputs = {inputs!r}",
            "input_variance (separate kernels), or hidden and inputs (one kernel on [x, h])",
            "they are two ways to say how strong the input is",
            "input_variance=0.25, or hidden=192, inputs=64",
        )
    if input_variance is None:
        for name, size in (("hidden", hidden), ("inputs", inputs)):
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise InputError(f"{name} = {size!r}", "an integer >= 1", "it is a number of units", f"{name}=64")
        rho = hidden / (hidden + inputs)  # pyright: ignore[reportOptionalOperand]
        v = w * w * (1 - rho) * _scalar(check_q(input_square, "input_square"), "input_square")
    else:
        rho, v = 1.0, _scalar(check_q(input_variance, "input_variance"), "input_variance")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise InputError(f"steps = {steps!r}", "an integer >= 0", "it counts time steps", "steps=10")
    recurrent_w = w * math.sqrt(rho)
    shared = _scalar(_check_c(input_correlation), "input_correlation")
    act = as_activation(phi)
    point = fixed_point(Activation(act) >> Dense(recurrent_w, b) >> Drive(v, shared))
    chi = float(point.chi_1)
    q = float(point.q)
    second = float(moment(act, q)) if q < math.inf else math.inf
    with np.errstate(over="ignore"):
        kept = np.float64(chi) ** int(steps)
    numbers = (q, second, chi, point.xi_grad, kept, recurrent_w**2, rho, point.c)
    return Memory(*(np.float64(number) for number in numbers), phase=point.phase)


def _scalar(value, name: str) -> float:
    if np.ndim(value):
        raise InputError(
            f"{name} of shape {np.shape(value)}", "one number", "each cell is solved on its own", "loop over values"
        )
    return float(value)


def _sigma(value, name: str) -> float:
    return _scalar(check_sigma(value, name), name)
