r"""Training curves of the linearised network: what gradient descent does when the tangent kernel stays where it is.

f_t - y = (I - eta Theta / n)^t (f_0 - y) on the training set, f_t(x*) = f_0(x*) - Theta_* alpha_t elsewhere (Jacot et
al. 2018, arXiv:1806.07572; Lee et al. 2019, arXiv:1902.06720). A network of width w follows up to O(1 / sqrt(w)).
"""

import dataclasses
from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.spectrum.conditioning import check_momentum
from initjax.spectrum.dense import eigensystem, is_array
from initjax.spectrum.lanczos import as_operator
from initjax.spectrum.modes import descent, flow
from initjax.spectrum.moments import over_batches, over_initializations
from initjax.spectrum.requests import (
    as_times,
    bad_shape,
    check_ensemble,
    check_options,
    cross_kernel,
    finite,
    like,
    positive,
    refuse_overflow,
    refuse_traced,
    square,
    warn_unstable,
)

# An operator of more rows is not formed: its eigenvectors alone would take minutes.
FORMED = 4096


@dataclasses.dataclass(frozen=True)
class LinearTrajectory:
    """Predicted training of the linearised network at T times. NumPy float64; shapes for targets (n, k), without k for
    targets (n,).

    Attributes
    ----------
    times : (T,), in optimiser steps.
    train : (T, n, k), mean outputs on the training inputs.
    test : (T, m, k), mean outputs on the test inputs, or None.
    loss : (T,), expected training loss, 1/(2n) sum (f - y)^2, or 1/2 sum (f - y)^2 if n was None; without the penalty.
    train_variance : (T, n), of one output over initializations (`nngp`) or batches (`batch_size`), else None.
    test_variance : (T, m), over initializations, else None.
    """

    times: np.ndarray
    train: np.ndarray
    test: Any
    loss: np.ndarray
    train_variance: Any = None
    test_variance: Any = None

    def plot(self, ax: Any = None) -> Any:
        """Draw the loss over steps; returns the matplotlib axes."""
        if ax is None:
            from initjax.drawing import blank_figure

            ax = blank_figure(6, 3.5).add_subplot()
        ax.plot(self.times, self.loss, label="linearised network")
        ax.set(yscale="log", xlabel="steps", ylabel="training loss")
        return ax


def trajectory(
    ntk: Any,
    y: Any,
    times: Any,
    *,
    learning_rate: float,
    f0: Any = 0.0,
    n: Any = None,
    dynamics: str = "descent",
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_toward: str = "init",
    radial: Any = None,
    radial_test: Any = None,
    ntk_test_train: Any = None,
    f0_test: Any = 0.0,
    nngp: Any = None,
    nngp_test_train: Any = None,
    nngp_test: Any = None,
    batch_size: int | None = None,
) -> LinearTrajectory:
    r"""Training and test outputs of the linearised network under full-batch gradient descent on the squared error.

    Parameters
    ----------
    ntk : tangent kernel on the n training inputs, (n, n), the same for each output; or (n, n, k, k) for all pairs; or
        an operator such as `ij.ntk_operator` ("full" ones act on n k numbers). In the parameterization whose gradients
        the optimiser sees ("standard" for a Flax model).
    y : targets, (n,) or (n, k).
    times : (T,) numbers of steps, integers >= 0; for "flow" any times >= 0 in the same unit.
    learning_rate : of the optimiser, > 0.
    f0 : outputs before training, a number or the shape of y; with `nngp` their mean over initializations.
    n : number of examples the loss is averaged over (usually len(y)), as in `max_learning_rate`; None for the sum.
    dynamics : "descent", discrete steps; "flow", their limit of small rates (no momentum there: heavy ball becomes
        flow at the rate learning_rate / (1 - momentum)).
    momentum, nesterov : as in `optax.sgd`.
    weight_decay : added to the gradient as weight_decay * (theta - theta_0) (`decay_toward="init"`) or weight_decay *
        theta (`"zero"`, what optax.add_decayed_weights before optax.sgd does).
    radial, radial_test : for `"zero"`, J theta_0, the derivative of the outputs along the parameters themselves, in the
        shapes of y and of the test outputs: `jax.jvp(f, (params,), (params,))[1]`. L f0 for networks that are
        homogeneous of degree L in their parameters.
    ntk_test_train, f0_test : kernel (m, n) or (m, n, k, k) between test and training inputs, and first test outputs.
    nngp, nngp_test_train, nngp_test : covariances of the first outputs over initializations, (n, n), (m, n), and (m, m)
        or its diagonal (m,): the answer then is the mean and the variance over an ensemble of trained networks.
    batch_size : batches of so many examples, each drawn independently and uniformly with replacement. The mean of the
        linear dynamics over such batches is exactly that of full batches; loss and train_variance are the exact
        second moments, one n x n recursion a step. Only for plain descent on the mean loss (n = len(y)).

    Returns
    -------
    LinearTrajectory with train, test, loss and variances.

    Raises
    ------
    InputError : shapes that do not fit; a kernel that is no kernel; options that do not go together; a rate at which
        the outputs overflow. Traced input.

    Warns
    -----
    UserWarning : the learning rate is above the largest stable one, so that the curve grows.

    Accuracy
    --------
    Rounding: relative t eps for t steps, plus n eps lambda_max in the kernel's eigenvalues. The statement on a network
    of width w is one of leading order, off by O(1 / sqrt(w)); `compare_to_training` measures that.

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> run = ij.trajectory(np.diag([1.0, 4.0]), np.array([1.0, 1.0]), [0, 1, 2], learning_rate=0.25)
    >>> run.train.tolist()  # residuals shrink by 1 - 0.25 lambda a step
    [[0.0, 0.0], [0.25, 1.0], [0.4375, 1.0]]

    References
    ----------
    Lee et al. 2019 (arXiv:1902.06720), eqs. 8-11 (flow) and 14-16 (mean and variance over initializations, with the
    factors of descent in place of those of flow). Weight decay, momentum and batches: docs/training.md.
    """
    refuse_traced(ntk, y, times, f0, ntk_test_train, nngp)
    check_momentum(momentum, nesterov, weight_decay)
    eta = positive(learning_rate, "learning_rate")
    y = finite(y, "y")
    if y.ndim not in (1, 2) or y.size == 0:
        raise bad_shape("y", y.shape, "(n,) or (n, k)")
    count = 1.0 if n is None else positive(n, "n")
    times = as_times(times, dynamics)
    check_options(dynamics, momentum, weight_decay, decay_toward, radial, radial_test, ntk_test_train)
    check_ensemble(nngp, nngp_test_train, nngp_test, ntk_test_train, weight_decay, decay_toward, ntk)
    targets = y.reshape(len(y), -1)
    examples, k = targets.shape
    lam, vectors, paired = _eigen(ntk, examples, k)
    to_modes = lambda a: vectors.T @ (a.reshape(-1, 1) if paired else a)  # noqa: E731
    from_modes = lambda a: (vectors @ a).reshape(examples, k)  # noqa: E731
    first = like(f0, targets, "f0")
    toward_zero = weight_decay > 0 and decay_toward == "zero"
    rho = like(radial, targets, "radial") if toward_zero else np.zeros_like(targets)

    settings: dict[str, Any] = dict(eta=eta, n=count, decay=weight_decay, toward_zero=toward_zero)
    if dynamics == "descent":
        warn_unstable(lam, eta, count, momentum, nesterov, weight_decay)
        modes = descent(lam, times, momentum=momentum, nesterov=nesterov, **settings)
    else:
        modes = flow(lam, times, **settings)
    refuse_overflow(modes, times, eta)

    r, p = to_modes(first - targets), to_modes(rho)
    residual = np.stack([from_modes(R[:, None] * r + S[:, None] * p) for R, S in zip(modes.R, modes.S, strict=True)])
    train = targets + residual
    squares = (residual**2).sum((1, 2))
    test = None
    if ntk_test_train is not None:
        cross = cross_kernel(ntk_test_train, examples, k, paired)
        m = len(cross) // (k if paired else 1)
        start = like(f0_test, np.zeros((m, k)), "f0_test")
        along = like(radial_test, start, "radial_test") if toward_zero else np.zeros_like(start)
        reach = cross @ vectors
        moved = [reach @ (A[:, None] * r + B[:, None] * p) for A, B in zip(modes.A, modes.B, strict=True)]
        test = start - modes.gamma[:, None, None] * along - np.stack(moved).reshape(len(times), m, k)
        test = test.reshape(len(times), m, *y.shape[1:])
    train_variance = test_variance = None
    if nngp is not None:
        covariance = square(nngp, examples, "nngp")
        train_variance, test_variance = over_initializations(
            modes, vectors, covariance, ntk_test_train, nngp_test_train, nngp_test, examples
        )
        squares = squares + k * train_variance.sum(1)
    if batch_size is not None:
        if dynamics != "descent" or momentum or weight_decay or paired or count != examples:
            raise InputError(
                f"batch_size={batch_size} with dynamics={dynamics!r}, momentum={momentum}, weight_decay={weight_decay}"
                f", n={n}" + (", all pairs of outputs" if paired else ""),
                "plain descent on the mean loss (n=len(y)) with one kernel (n, n) for each output",
                "the second moments of batch noise are stated exactly for that alone",
                "leave batch_size out for full batches, whose outputs are the exact mean over batches in any case",
            )
        start = first - targets
        second = start @ start.T + (0.0 if nngp is None else k * square(nngp, examples, "nngp"))
        squares, train_variance = over_batches(lam, vectors, second, residual, times, eta, batch_size, k)
    train = train.reshape(len(times), *y.shape)
    return LinearTrajectory(times, train, test, squares / (2 * count), train_variance, test_variance)


def time_to_fit(
    ntk: Any,
    y: Any,
    *,
    learning_rate: float,
    tolerance: float = 0.01,
    f0: Any = 0.0,
    n: Any = None,
    dynamics: str = "descent",
) -> float:
    r"""Steps until the training error |f_t - y| of the linearised network is at most `tolerance` times |f_0 - y|.

    Parameters
    ----------
    ntk, y, learning_rate, f0, n, dynamics : as in `trajectory`.
    tolerance : in (0, 1); ratio of Euclidean norms over all examples and outputs.

    Returns
    -------
    Number of steps: whole for "descent", a real time for "flow". inf if it is never reached: the rate is above the
    stable one, or more than that share of the error lies in directions whose eigenvalue is lost in rounding
    (n eps lambda_max).

    Raises
    ------
    InputError : as in `trajectory`; a tolerance outside of (0, 1).

    Accuracy
    --------
    The very first step for which the inequality holds in float64; relative 1e-12 for "flow".

    Examples
    --------
    >>> import numpy as np
    >>> import initjax as ij
    >>> ij.time_to_fit(np.diag([0.5, 0.5]), np.array([1.0, 2.0]), learning_rate=1.0, tolerance=0.1)  # 2^-4 < 0.1 < 2^-3
    4.0

    References
    ----------
    Jacot, Gabriel, Hongler 2018 (arXiv:1806.07572), section 5: each direction is learned at the rate of its eigenvalue.
    """
    refuse_traced(ntk, y, f0)
    eta = positive(learning_rate, "learning_rate")
    if not (isinstance(tolerance, int | float | np.number) and 0 < tolerance < 1):
        raise InputError(
            f"tolerance={tolerance!r}",
            "a number in (0, 1)",
            "it is the share of the first error that may be left",
            "give 0.01 for a hundredth",
        )
    as_times([0], dynamics)
    y = finite(y, "y")
    if y.ndim not in (1, 2) or y.size == 0:
        raise bad_shape("y", y.shape, "(n,) or (n, k)")
    targets = y.reshape(len(y), -1)
    lam, vectors, paired = _eigen(ntk, *targets.shape, cut=True)
    residual = like(f0, targets, "f0") - targets
    shares = ((vectors.T @ (residual.reshape(-1, 1) if paired else residual)) ** 2).sum(1)
    if shares.sum() == 0:
        return 0.0
    rate = eta * lam / (1.0 if n is None else positive(n, "n"))
    if dynamics == "flow":
        speed = -rate
    else:
        with np.errstate(divide="ignore"):  # a direction that is learned in one step
            speed = np.where(rate < 1, np.log1p(-np.minimum(rate, 1.0)), np.log(np.abs(1 - rate)))

    def left(time):
        with np.errstate(over="ignore", under="ignore"):
            factor = np.exp(2 * time * speed) if time > 0 else np.ones_like(speed)
        return float(np.sqrt(shares @ factor / shares.sum()))

    if np.any((speed > 0) & (shares > 0)) or shares[speed == 0].sum() > tolerance**2 * shares.sum():
        return float("inf")
    high = 1.0
    while left(high) > tolerance:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    while high - low > (1 if dynamics == "descent" else 1e-13 * high):
        middle = (low + high) / 2 if dynamics == "flow" else float((int(low) + int(high)) // 2)
        low, high = (low, middle) if left(middle) <= tolerance else (middle, high)
    return high


def _eigen(ntk, examples, k, cut=False):
    """Eigenvalues, eigenvectors, and whether they belong to all pairs of outputs; `cut`: 0 below rounding."""
    if not is_array(ntk):
        operator = as_operator(ntk, "ntk")
        if operator.n > FORMED:
            raise InputError(
                f"an ntk operator of {operator.n} rows",
                f"at most {FORMED} rows, or a formed kernel",
                "a curve for any time needs all eigenvectors of the matrix",
                "take a subset of the examples, or form the kernel with ij.empirical_ntk",
            )
        ntk = operator.dense()
    shape = np.shape(ntk)
    paired = len(shape) == 4 or (k > 1 and shape == (examples * k, examples * k))
    if shape == (examples, examples, k, k):
        ntk = np.asarray(ntk).transpose(0, 2, 1, 3).reshape(examples * k, examples * k)
    elif shape != (examples, examples) and not (paired and len(shape) == 2):
        raise bad_shape("ntk", shape, f"({examples}, {examples}) or ({examples}, {examples}, {k}, {k}) for y here")
    lam, vectors, resolution = eigensystem(ntk, "ntk")
    return np.where(lam > resolution, lam, 0.0) if cut else lam, vectors, paired
