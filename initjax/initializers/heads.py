"""The last layer: its scale decides the first loss, and its bias what the network says before it has learnt."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import zeros

from initjax.errors import InputError
from initjax.gaussian import mean as gaussian_mean
from initjax.initializers.protocol import Init, count, factory, placed, scale
from initjax.initializers.scaled import FanIn, Fixed
from initjax.trace.jaxpr import is_traced


class Head(NamedTuple):
    """Initializers of a readout: `nn.Dense(n, kernel_init=head.kernel, bias_init=head.bias)`.

    Attributes
    ----------
    kernel, bias : initializers; a `MinusMean` bias is computed from the kernel (`bias.of(kernel)`, or by a rule).
    """

    kernel: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Pattern(Init):
    """Given values along the last axis, the same in every draw."""

    values: tuple[float, ...]
    dtype: Any = None

    def check(self, shape):
        if not shape or shape[-1] != len(self.values) and len(self.values) > 1:
            raise InputError(
                f"a bias of shape {shape}",
                f"shapes (..., {len(self.values)})",
                f"there are {len(self.values)} values, one for each unit",
                "give as many values as the layer has units",
            )

    def std(self, shape):
        return math.sqrt(float(np.mean(np.square(self.values))))

    def sample(self, key, shape, dtype, out_sharding):
        return placed(jnp.broadcast_to(jnp.asarray(np.asarray(self.values), dtype), shape), out_sharding)


@dataclasses.dataclass(frozen=True)
class MinusMean:
    """The bias -sum_j m_j W_ji that takes the mean m of a layer's inputs out of its outputs.

    It depends on the kernel that was drawn: `bias.of(kernel)`, or the action of a rule for the bias beside it.

    Attributes
    ----------
    values : m, one number for all inputs or one for each.
    """

    values: tuple[float, ...]

    def of(self, kernel: Any) -> jax.Array:
        """The bias for a kernel (inputs or window and inputs, outputs)."""
        flat = kernel.reshape(-1, kernel.shape[-1])
        m = jnp.asarray(np.asarray(self.values), kernel.dtype)
        if m.size not in (1, flat.shape[0]):
            raise InputError(
                f"{m.size} means for a kernel of shape {tuple(kernel.shape)}",
                f"one number, or {flat.shape[0]}",
                "every input has its mean",
                "give the features that this kernel sees",
            )
        return -(jnp.broadcast_to(m, flat.shape[:1])[:, None] * flat).sum(0)

    def __call__(self, key: Any, *shape: Any) -> jax.Array:
        """As the action of a rule: `info` gives the new kernel of the same layer."""
        if len(shape) == 1 and hasattr(shape[0], "sibling"):
            return self.of(shape[0].sibling("kernel"))
        raise InputError(
            "a bias that depends on the kernel, called as an initializer (key, shape, dtype)",
            "bias.of(kernel), or the action of a rule",
            "an initializer does not see what was drawn for the kernel beside it",
            "ij.reinitialize(params, [('bias', center_bias()), (..., keep)], key)",
        )


@factory
def log_prior_bias(prior: Any, *, dtype: Any = None) -> Pattern:
    """Biases for which a classifier says the class frequencies before training: log p, or the log odds of one.

    Parameters
    ----------
    prior : frequencies of C >= 2 classes (softmax; they are normalized), or one probability in (0, 1) (sigmoid).
    dtype : dtype where the call names none.

    Returns
    -------
    Pattern, an initializer for shapes (..., C); for one probability any shape. Nothing is random.

    Raises
    ------
    InputError : a frequency that is not positive, a probability outside (0, 1).

    Accuracy
    --------
    Rounding of the dtype. With logits of small variance v the first cross-entropy is the entropy of the classes, plus
    about v/2.

    Examples
    --------
    >>> import jax
    >>> from initjax.initializers import log_prior_bias
    >>> b = log_prior_bias([30, 60, 10])(jax.random.key(0), (3,))
    >>> print(jax.nn.softmax(b))
    [0.3 0.6 0.1]
    >>> print(f"{log_prior_bias(0.01)(jax.random.key(0), (1,))[0]:.3f}")  # focal loss: -log((1 - pi) / pi)
    -4.595

    References
    ----------
    Lin et al. 2017 (arXiv:1708.02002), section 4.1.
    """
    p = np.asarray(prior, np.float64) if not is_traced(prior) else np.asarray(np.nan)
    if p.ndim > 1 or not np.isfinite(p).all() or (p <= 0).any() or p.ndim == 0 and p >= 1 or p.ndim == 1 and len(p) < 2:
        raise InputError(
            f"prior={prior!r}",
            "positive frequencies of two classes or more, or one probability in (0, 1)",
            "the bias is a logarithm",
            "count a class that never occurs as 1",
        )
    if p.ndim == 0:
        return Pattern((float(np.log(p) - np.log1p(-p)),), dtype)
    return Pattern(tuple((np.log(p) - np.log(p.sum())).tolist()), dtype)


@factory
def optimistic_head(v_max: Any, *, sigma_w: Any = 0.1, q: Any = 1.0, confidence: Any = 3.0, dtype: Any = None) -> Head:
    """A value head that starts above the largest possible value: W of variance sigma_w^2 / fan_in and bias
    v_max + confidence sigma_w sqrt(q).

    The head's output is b + W h with standard deviation sigma_w sqrt(q) over draws, so it exceeds v_max with that many
    standard deviations. Most of the deviation is shared by all states of an action. One update of a network moves the
    values of other states too, so the optimism is not that of a table.

    Parameters
    ----------
    v_max : largest value, r_max / (1 - gamma).
    sigma_w : standard deviation of the kernel in mean-field scaling, >= 0; 0 makes all values equal.
    q : mean square of the features, at most, > 0.
    confidence : number of standard deviations, >= 0.
    dtype : dtype where the call names none.

    Returns
    -------
    Head(kernel, bias): FanIn, and a constant.

    Raises
    ------
    InputError : v_max not finite; the others negative.

    Accuracy
    --------
    Mean and variance are exact for features of mean square q.

    Examples
    --------
    >>> from initjax.initializers import optimistic_head
    >>> head = optimistic_head(1.0 / (1 - 0.9), sigma_w=0.1)
    >>> head.kernel.sigma_w, [round(b, 3) for b in head.bias.values]
    (0.1, [10.3])

    References
    ----------
    Sutton, Barto 2018 (Reinforcement learning, section 2.6) for tables; variance derived as E (W h)^2 = sigma_w^2 q.
    """
    top = np.asarray(np.nan if is_traced(v_max) else v_max, np.float64)
    if top.ndim or not np.isfinite(top):
        raise InputError(
            f"v_max={v_max!r}", "one finite number", "it is the bias of the head", "give r_max / (1 - gamma)"
        )
    std = scale(sigma_w, "sigma_w") * math.sqrt(scale(q, "q", positive=True))
    bias = float(top) + scale(confidence, "confidence") * std
    return Head(FanIn(sigma_w, dtype=dtype), Pattern((bias,), dtype))


@factory
def transfer_head(features: Any, *, variance: Any = 0.01, centered: bool = False, dtype: Any = None) -> Head:
    """A new head on frozen features: logits of a chosen mean square on these very features, whatever their scale.

    Kernel entries N(0, variance / E|h|^2), in place of a fan that would be right only for features of mean square 1.
    The first cross-entropy of C classes is log C + variance (1 - 1/C) / 2, up to O(variance^2).

    Parameters
    ----------
    features : (n, D), features h of some examples.
    variance : mean square of the logits, >= 0.
    centered : take the mean of the features out: kernel entries N(0, variance / E|h - mean|^2) and the bias
        -mean . W, which depends on the kernel (see `MinusMean`). Else biases are zero.
    dtype : dtype where the call names none.

    Returns
    -------
    Head(kernel, bias).

    Raises
    ------
    InputError : features of other shape, not finite, all zero, or all equal with `centered`; variance negative.

    Accuracy
    --------
    The mean over draws is exact on the given features.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import transfer_head
    >>> h = 5 + 3 * jax.random.normal(jax.random.key(0), (200, 400))
    >>> head = transfer_head(h, variance=0.25, centered=True)
    >>> w = head.kernel(jax.random.key(1), (400, 1000))
    >>> logits = h @ w + head.bias.of(w)
    >>> print(f"{(logits**2).mean():.2f}")
    0.25

    References
    ----------
    Derived from E (W h)^2 = s^2 |h|^2; LeCun et al. 1998 (Efficient BackProp, section 4.6) is the case |h|^2 = D.
    """
    h = _features(features)
    middle = h.mean(0) if centered else np.zeros(h.shape[1])
    square = float(np.mean(np.sum((h - middle) ** 2, 1)))
    if not square > 0:
        raise InputError(
            "features that are all zero" + (" once their mean is taken out" if centered else ""),
            "features that vary",
            "the kernel is scaled by their mean square",
            "check that the trunk has its trained weights",
        )
    kernel = Fixed(math.sqrt(scale(variance, "variance") / square), "normal", dtype)
    return Head(kernel, MinusMean(tuple(middle.tolist())) if centered else zeros)


@factory
def multitask_heads(features: Mapping[str, Any], *, variance: Any = 0.01, dtype: Any = None) -> dict[str, Head]:
    """One head for each task, each with logits of the same mean square on that task's own features.

    The scale of a head does not depend on its loss weight. With T tasks of equal heads the gradient of the shared
    trunk grows as sqrt(T): weight the losses by T^(-1/2) to keep it. Initialization does not balance tasks.

    Parameters
    ----------
    features : task -> (n, D_t), the features that this head will see.
    variance, dtype : as in `transfer_head`.

    Returns
    -------
    Task -> Head.

    Raises
    ------
    InputError : no tasks; else as `transfer_head`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from initjax.initializers import multitask_heads
    >>> heads = multitask_heads({"depth": jnp.ones((8, 64)), "class": 2 * jnp.ones((8, 32))})
    >>> {task: round(head.kernel.scale, 5) for task, head in heads.items()}
    {'depth': 0.0125, 'class': 0.00884}

    References
    ----------
    Derived as `transfer_head`, task by task; cross terms between tasks have mean zero.
    """
    count(len(features), "the number of tasks")
    return {task: transfer_head(h, variance=variance, dtype=dtype) for task, h in features.items()}


@factory
def center_bias(phi: Callable = jax.nn.relu, q: Any = 1.0) -> MinusMean:
    """The bias that takes the mean of an activation out of the next layer: b_i = -E[phi(sqrt(q) z)] sum_j W_ij.

    A trade-off, not a cure. Centred relu keeps q only with sigma_w^2 = 2 pi / (pi - 1) = 2.934, and there
    chi = pi / (pi - 1) = 1.467: gradients explode, while correlations of different inputs fall to 0. With He weights
    q falls by 1 - 1/pi in each layer.

    Parameters
    ----------
    phi : activation in front of the kernel.
    q : second moment of its pre-activation.

    Returns
    -------
    MinusMean: `bias.of(kernel)`, or the action of a rule for the bias.

    Raises
    ------
    InputError : q negative, phi not elementwise.

    Accuracy
    --------
    The mean is exact to 1e-12.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax.initializers import center_bias, he_normal
    >>> w = he_normal()(jax.random.key(0), (2000, 50))
    >>> h = jax.nn.relu(jax.random.normal(jax.random.key(1), (2000,)))
    >>> u = h @ w + center_bias().of(w)
    >>> print(f"{(u**2).mean() / (1 - 1 / jnp.pi):.0f}")
    1

    References
    ----------
    Mean of relu: E = sqrt(q / (2 pi)); chi as in Schoenholz et al. 2017 (arXiv:1611.01232), derived in docs/theory.md.
    """
    return MinusMean((float(gaussian_mean(phi, scale(q, "q"))),))


def _features(features):
    if is_traced(features):
        features = np.asarray(np.nan)
    h = np.asarray(features, np.float64)
    if h.ndim != 2 or not h.size or not np.isfinite(h).all():
        raise InputError(
            f"features of shape {h.shape}" + ("" if np.isfinite(h).all() else " with entries that are not finite"),
            "a concrete, finite array (examples, features)",
            "the head is scaled by their mean square",
            "run the trunk on a batch and flatten what its last layer gives",
        )
    return h
