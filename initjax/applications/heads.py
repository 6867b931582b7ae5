r"""Heads on a trunk: the scale of the logits, the first loss, and the gradient that reaches the trunk.

Logits W h of a head with C outputs and entries of variance s^2, on features h with D entries:
    second moment of a logit s^2 |h|^2, variance over the data s^2 E|h - E h|^2, and, for independent normal logits of
    variance v, the first cross-entropy E log sum exp(z), log C + v (1 - 1/C) / 2 to second order;
    backwards, E|grad_h|^2 = D s^2 sum_c E g_c^2, where g is the gradient with respect to the logits.
Xavier's s^2 = 2 / (D + C) takes |h|^2 to be D. Heads of several tasks add up in the trunk, E|grad_h|^2 = sum_t
lambda_t^2 D s_t^2 C_t E g_t^2, since cross terms have mean zero: sqrt(T) for T equal tasks.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.initializers.heads import Head, _features, transfer_head
from initjax.initializers.protocol import scale
from initjax.initializers.scaled import Fixed


@dataclasses.dataclass(frozen=True)
class HeadReport:
    """A head on given features: expectations over its random weights, means over the examples. Floats.

    Attributes
    ----------
    std : standard deviation s of the kernel's entries.
    features, classes : D and C.
    second_moment : E|h|^2 of the features; a fan-in scaling is right where it is D.
    centered_moment : E|h - E h|^2.
    logit_second_moment : s^2 E|h|^2, or s^2 E|h - E h|^2 for a centred head.
    logit_variance : variance of a logit over the data, s^2 E|h - E h|^2.
    initial_loss : first cross-entropy, exact for normal weights: the mean over examples of E log sum exp.
    quadratic_loss : log C + v (1 - 1/C) / 2, its second-order form at the mean logit variance.
    feature_gradient : E|grad_h|^2 of one example, for softmax at uniform (sum_c g_c^2 = 1 - 1/C) unless `gradient`
        was given.
    max_rate_squared : largest stable step of gradient descent on the head alone, loss 1/(2N) sum (f - y)^2:
        2 / lambda_max(E h h^T).
    max_rate_softmax : the same for cross-entropy at uniform, 2 C / lambda_max(E h h^T).
    head : initializers, `nn.Dense(C, kernel_init=head.kernel, bias_init=head.bias)`.
    """

    std: float
    features: int
    classes: int
    second_moment: float
    centered_moment: float
    logit_second_moment: float
    logit_variance: float
    initial_loss: float
    quadratic_loss: float
    feature_gradient: float
    max_rate_squared: float
    max_rate_softmax: float
    head: Head


def transfer(features, classes, *, scheme: str = "matched", variance=0.01, centered: bool = False, gradient=None):
    r"""A new head on frozen features: Xavier's scale or one matched to the features, and what either starts with.

    Parameters
    ----------
    features : (n, D), what the trunk gives for some examples.
    classes : number C of outputs, >= 2.
    scheme : "matched": s^2 = variance / E|h|^2. "xavier": s^2 = 2 / (D + C), whatever the features.
    variance : logit second moment that "matched" aims at.
    centered : take the features' mean out, by the bias -mean . W ("matched" only).
    gradient : mean square of one logit's gradient, for losses other than softmax.

    Returns
    -------
    HeadReport.

    Raises
    ------
    InputError : features of another shape, not finite, or that do not vary; fewer than two classes; a centred Xavier.

    Accuracy
    --------
    Exact expectations over normal weights on the given features; the loss to 1e-9.

    Examples
    --------
    >>> import numpy as np
    >>> from initjax.applications import heads
    >>> h = np.maximum(np.random.default_rng(0).normal(size=(500, 64)), 0) * 4  # relu features, |h|^2 = 512, not 64
    >>> for scheme in ("xavier", "matched"):
    ...     found = heads.transfer(h, 10, scheme=scheme)
    ...     print(f"{scheme}: logits {found.logit_second_moment:.3f}, first loss {found.initial_loss:.2f}")
    xavier: logits 13.803, first loss 6.05
    matched: logits 0.010, first loss 2.31

    References
    ----------
    Glorot and Bengio 2010, eq. 16; the other formulas are derived in docs/applications.md.
    """
    h = _features(features)
    c = _classes(classes, "classes")
    d = h.shape[1]
    if scheme not in ("matched", "xavier"):
        raise InputError(
            f"scheme = {scheme!r}", '"matched" or "xavier"', "it chooses the kernel's scale", 'scheme="matched"'
        )
    if scheme == "xavier" and centered:
        raise InputError(
            "a centred Xavier head",
            'centered=True with scheme="matched"',
            "Xavier's scale does not look at the features, so that it has no mean to take out",
            'scheme="matched"',
        )
    middle = h.mean(0)
    squares = np.sum((h - middle) ** 2, 1) if centered else np.sum(h**2, 1)
    if scheme == "matched":
        head = transfer_head(features, variance=variance, centered=centered)
        std = head.kernel.scale
    else:
        std = math.sqrt(2 / (d + c))
        head = Head(Fixed(std, "normal", None), transfer_head(features).bias)
    second, spread = float(np.mean(np.sum(h**2, 1))), float(np.mean(np.sum((h - middle) ** 2, 1)))
    mean_logit = std**2 * float(squares.mean())
    square = _gradient(gradient, c)
    top = float(np.linalg.norm(h, 2) ** 2 / len(h))
    return HeadReport(
        std=std,
        features=d,
        classes=c,
        second_moment=second,
        centered_moment=spread,
        logit_second_moment=mean_logit,
        logit_variance=std**2 * spread,
        initial_loss=float(np.mean(cross_entropy(c, std**2 * squares))),
        quadratic_loss=math.log(c) + mean_logit * (1 - 1 / c) / 2,
        feature_gradient=d * std**2 * c * square,
        max_rate_squared=2 / top,
        max_rate_softmax=2 * c / top,
        head=head,
    )


def cross_entropy(classes, variance) -> Any:
    r"""First cross-entropy of C independent normal logits of mean 0 and given variance: E log sum_c exp(z_c).

    E log S = int (exp(-e^t) - E[exp(-e^(t + z))]^C) dt over the real line, since the C logits are independent.

    Parameters
    ----------
    classes : number C of classes, >= 2.
    variance : of the logits, >= 0; any shape.

    Returns
    -------
    Array of the shape of `variance`; log C at variance 0.

    Raises
    ------
    InputError : fewer than two classes, a variance that is negative or not finite.

    Accuracy
    --------
    1e-9 for variances up to 400.

    Examples
    --------
    >>> from initjax.applications import heads
    >>> loss = heads.cross_entropy(10, [0.01, 2.5])
    >>> print(loss.round(5), [round(2.302585 + v * 0.45, 5) for v in (0.01, 2.5)])  # the quadratic form overshoots
    [2.30708 3.28716] [2.30709, 3.42759]

    References
    ----------
    log S = int (exp(-u) - exp(-u S)) / u du over u > 0 (Frullani); the quadrature is ours.
    """
    c = _classes(classes, "classes")
    v = np.asarray(variance, np.float64)
    if not np.all(np.isfinite(v) & (v >= 0)):
        raise InputError(
            f"variance = {variance!r}", "finite numbers >= 0", "it is a variance", "the square of a standard deviation"
        )
    values, where = np.unique(v.round(14), return_inverse=True)
    if values.size > 48:  # a smooth function of the standard deviation: interpolate between Chebyshev nodes
        low, high = np.sqrt(values[[0, -1]])
        nodes = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * (np.arange(32) + 0.5) / 32)
        fit = np.polynomial.chebyshev.Chebyshev.fit(nodes, _log_sum(c, nodes**2), 31, domain=[low, high])
        return fit(np.sqrt(v))
    return _log_sum(c, values)[where].reshape(v.shape)


def _log_sum(c: int, variances: np.ndarray) -> np.ndarray:
    out = np.empty(len(variances))
    for i, variance in enumerate(variances):
        std = math.sqrt(variance)
        # trapezoidal rules: exp(-e^u) is analytic for |Im u| < pi / 2, so that the error is exp(-pi^2 / step)
        z = np.arange(-10.0, 10.0, min(0.25, 0.35 / max(std, 1e-3)))
        weight = np.exp(-z * z / 2)
        weight /= weight.sum()
        step = 0.15
        t = np.arange(-45.0 - 10 * std, 6.0 + 10 * std, step)
        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            one = np.maximum(-np.exp(t)[:, None] * np.exp(std * z), -745.0)
            small = np.minimum(-np.expm1(one) @ weight, 1.0)  # 1 - E exp(-e^t e^z) itself where it is small
            lost = np.where(small < 0.5, np.log1p(-small), np.log(np.maximum(np.exp(one) @ weight, 1e-320)))
            out[i] = step * np.sum(np.exp(-np.exp(t)) - np.exp(c * lost))
    return out


@dataclasses.dataclass(frozen=True)
class MultiTaskReport:
    """Heads of several tasks on one trunk.

    Attributes
    ----------
    tasks : task -> `HeadReport`, each head by its own features and number of outputs.
    weights : task -> loss weight lambda_t.
    trunk_gradient : E|grad_h|^2 on shared features, sum_t lambda_t^2 times each head's `feature_gradient`.
    shares : task -> its share of that; initialization does not balance tasks.
    growth : root of it over the root of the mean single-task value: sqrt(T) for T equal tasks of weight 1.
    normalized : task -> weight that keeps the trunk's gradient at the mean single task's: the given weights / growth.
    """

    tasks: dict[str, HeadReport]
    weights: dict[str, float]
    trunk_gradient: float
    shares: dict[str, float]
    growth: float
    normalized: dict[str, float]


def multi_task(features: Mapping[str, Any], classes: Mapping[str, Any], *, weights=None, gradients=None, **options):
    r"""One head for each task, scaled by its own features, and the gradient they send into a shared trunk.

    Parameters
    ----------
    features : task -> (n, D_t), the features which that head sees.
    classes : task -> number of outputs C_t.
    weights : task -> loss weight lambda_t >= 0; None: 1 for all. The heads' scales do not depend on them.
    gradients : task -> mean square of one output's gradient, for tasks whose loss is not softmax.
    options : `scheme`, `variance`, `centered` of `transfer`.

    Returns
    -------
    MultiTaskReport.

    Raises
    ------
    InputError : tasks without classes or the other way round, negative weights, none positive; else as `transfer`.

    Accuracy
    --------
    Exact expectation for independent heads with random kernels of mean zero.

    Examples
    --------
    >>> import numpy as np
    >>> from initjax.applications import heads
    >>> h = np.random.default_rng(0).normal(size=(100, 32))
    >>> found = heads.multi_task({"a": h, "b": h, "c": h, "d": h}, dict.fromkeys("abcd", 10), scheme="xavier")
    >>> print(f"gradients of the trunk grow by {found.growth:.3f}, weights that keep it: {found.normalized['a']:.3f}")
    gradients of the trunk grow by 2.000, weights that keep it: 0.500

    References
    ----------
    Derived in docs/applications.md.
    """
    names = list(features)
    weights = dict.fromkeys(names, 1.0) if weights is None else dict(weights)
    gradients = {} if gradients is None else dict(gradients)
    unknown = [name for name in gradients if name not in features]
    if not names or set(names) != set(classes) or set(names) != set(weights) or unknown:
        raise InputError(
            f"features for {sorted(features)}, classes for {sorted(classes)}, weights for {sorted(weights)}, "
            f"gradients for {sorted(gradients)}",
            "the same tasks in each; gradients for some of them",
            "every task has its features, its number of outputs and its weight",
            "multi_task({'depth': h}, {'depth': 1}, gradients={'depth': 1.0})",
        )
    weights = {name: scale(weights[name], f"weights[{name!r}]") for name in names}
    tasks = {name: transfer(features[name], classes[name], gradient=gradients.get(name), **options) for name in names}
    parts = {name: weights[name] ** 2 * tasks[name].feature_gradient for name in names}
    total = sum(parts.values())
    if not total > 0:
        raise InputError(
            f"weights {weights}", "at least one task with a positive weight and gradient", "else nothing is learnt", "1"
        )
    single = sum(task.feature_gradient for task in tasks.values()) / len(tasks)
    growth = math.sqrt(total / single)
    return MultiTaskReport(
        tasks,
        weights,
        total,
        {name: part / total for name, part in parts.items()},
        growth,
        {name: weight / growth for name, weight in weights.items()},
    )


def _classes(classes, name: str) -> int:
    if isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 1:
        raise InputError(f"{name} = {classes!r}", "an integer >= 1", "it is the number of outputs", f"{name}=10")
    return int(classes)


def _gradient(gradient, classes: int) -> float:
    """Mean square of one logit's gradient: given, or that of softmax at uniform, (1 - 1/C) / C."""
    return (1 - 1 / classes) / classes if gradient is None else scale(gradient, "gradient")
