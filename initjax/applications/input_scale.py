r"""The scale of the inputs at which one update of gradient descent becomes catastrophic.

Loss 1/(2N) sum (f - y)^2, step eta, inputs multiplied by s. Two criteria:
    stability        eta lambda_max(Theta(sX)) / N = 2: the first update overshoots its target; true divergence is near
                     4, between the two a wide network catapults and recovers (Lewkowycz et al. 2020).
    relative update  r_l = eta RMS|grad_l| / RMS|W_l| = 1: an update as large as the weights themselves,
                     |grad_l|^2 = (K + y^2) Theta_l for one example, K the NNGP kernel.
Theta is the kernel of the model in the parameterization in which it is trained, at its own width to leading order.
Without biases and with homogeneous activations Theta(sX) = s^2 Theta(X), and both have closed forms.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, UnreliableExpansionWarning
from initjax.infinite import kernel_fn
from initjax.trace.flax import as_functional, layer_of
from initjax.trace.jaxpr import is_traced

_STEP, _LARGEST = math.log(4.0), math.log(1e8)  # of log s, where there is no closed form
_SCATTER = 0.5  # relative deviation of lambda_max between networks beyond which its mean describes none of them
_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class InputScale:
    """The critical input scale of a model on given data.

    Attributes
    ----------
    critical : s at which the criterion is met; inf if no scale up to 1e8 does, 0 if every scale does.
    divergence : s at which eta lambda_max / N = 4, the bound beyond which a wide network diverges; nan for
        "relative_update".
    margin : 1 / critical: the data at s = 1 relative to it. Below 1 the step is safe.
    layer : the layer that fails first: with the largest part of lambda_max, or the largest relative update.
    layers : layer -> its part of lambda_max (they add up to 1), or its relative update, at the critical scale.
    exponent : d log lambda_max / d log s there (of r for "relative_update"): 2 for homogeneous networks, 1 where
        the first layer saturates.
    closed_form : whether the network is homogeneous, so that no root had to be found.
    scatter : standard deviation over random networks of lambda_max at the critical scale, relative to the mean, on at
        most 4 examples; nan if it was not measured.
    """

    critical: float
    divergence: float
    margin: float
    layer: str
    layers: dict[str, float]
    exponent: float
    closed_form: bool
    scatter: float


def critical(
    model,
    x,
    learning_rate,
    criterion: str = "stability",
    *,
    y=None,
    parameterization="standard",
    apply_kwargs=None,
    rngs=None,
    networks=8,
    key=None,
) -> InputScale:
    r"""Input scale at which a step of gradient descent on the squared error becomes too large.

    Parameters
    ----------
    model : linen module, nnx module, nnx factory `lambda rngs: Model(rngs=rngs)`, or pair `(init_fn, apply_fn)`.
    x : batch of N examples, the data at s = 1; real-valued.
    learning_rate : eta > 0 of plain gradient descent on 1/(2N) sum (f - y)^2.
    criterion : "stability": eta lambda_max(Theta(sX)) / N = 2. "relative_update": the largest r_l = 1.
    y : (N,) or (N, outputs), the targets, for "relative_update"; None for 0.
    parameterization : as in `ij.kernel_fn`.
    apply_kwargs, rngs : as in `ij.kernel_fn`.
    networks : random networks on which the scatter of lambda_max is measured; 0: it is not.
    key : of these networks; None for key 0.

    Returns
    -------
    InputScale.

    Raises
    ------
    UnsupportedLayerError : a layer outside the exact infinite-width theory.
    InputError : integer inputs, a rate that is not positive, an unknown criterion, targets that do not fit.

    Warns
    -----
    UnreliableExpansionWarning : lambda_max differs from network to network by more than half of its mean: the layer is
        narrow, or saturated to a few units, and the kernel's expectation describes none of the networks.

    Accuracy
    --------
    1e-9 relative for the kernel's expectation at leading order in the width.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import input_scale
    >>> he = lambda n: nn.Dense(n, use_bias=False, kernel_init=nn.initializers.he_normal())
    >>> model = nn.Sequential([he(1024), nn.relu, he(1024), nn.relu, he(1)])
    >>> x = jnp.ones((1, 10))
    >>> found = input_scale.critical(model, x, learning_rate=1e-3, networks=0)
    >>> print(f"{found.critical:.5f} = {(2 / (1e-3 * (10 + 1024 + 1024))) ** 0.5:.5f}, {found.closed_form}")
    0.98581 = 0.98581, True

    References
    ----------
    Lewkowycz et al. 2020 (arXiv:2003.02218), section 2: catapult between 2 and 4; Jacot et al. 2018 (arXiv:1806.07572).
    """
    rate = _positive(learning_rate, "learning_rate")
    if criterion not in ("stability", "relative_update"):
        raise InputError(
            f"criterion = {criterion!r}",
            '"stability" or "relative_update"',
            "it says what a catastrophic update is",
            'criterion="stability"',
        )
    _real(x)
    options: dict[str, Any] = dict(apply_kwargs=apply_kwargs, rngs=rngs)
    kernel = kernel_fn(model, x, parameterization=parameterization, **options)
    n = len(jax.tree.leaves(x)[0])
    functional = as_functional(model, x, **options)
    if criterion == "stability":
        if y is not None:
            raise InputError(
                "targets y with criterion = 'stability'",
                'y for "relative_update"',
                "the stability of a step does not depend on the targets",
                "leave y out",
            )
        measure: Any = _Stability(kernel, x, rate / n)
        bounds = (2.0, 4.0)
    else:
        measure = _RelativeUpdate(kernel, x, rate, y, functional)
        bounds = (1.0, math.nan)
    power = measure.power()
    scales = [_closed(measure, power, b) if power is not None else _root(measure, b) for b in bounds]
    s = scales[0]
    at = s if 0 < s < math.inf else 1.0
    parts = measure.layers(at)
    step = 1e-3
    slope = power
    if slope is None:
        slope = (math.log(measure(at * math.exp(step))) - math.log(measure(at * math.exp(-step)))) / (2 * step)
    scatter = _scatter(functional, x, at, networks, key) if networks and criterion == "stability" else math.nan
    if scatter > _SCATTER:
        warnings.warn(
            f"at the critical scale s = {at:.4g} the largest eigenvalue of the tangent kernel deviates by "
            f"{scatter:.0%} of its mean between random networks: too few units carry the gradient (narrow or "
            "saturated layers), so that the critical scale of one network may be far from that of the mean kernel.",
            UnreliableExpansionWarning,
            stacklevel=2,
        )
    return InputScale(
        critical=s,
        divergence=scales[1],
        margin=1 / s if s else math.inf,
        layer=max(parts, key=lambda name: parts[name]),
        layers=parts,
        exponent=slope,
        closed_form=power is not None,
        scatter=scatter,
    )


class _Stability:
    """eta lambda_max(Theta(sX)) / N as a function of s."""

    def __init__(self, kernel, x, rate: float):
        self.kernel, self.x, self.rate = kernel, x, rate

    def __call__(self, s: float) -> float:
        return self.rate * float(np.linalg.eigvalsh(self._ntk(s))[-1])

    def _ntk(self, s: float) -> np.ndarray:
        return np.asarray(self.kernel(_scaled(self.x, s), get=("ntk",)).ntk)

    def power(self) -> int | None:
        return _degree([self._ntk(s) for s in (1.0, 2.0, 0.25)])

    def layers(self, s: float) -> dict[str, float]:
        found = self.kernel(_scaled(self.x, s), get=("ntk", "leaves"))
        top = np.linalg.eigh(found.ntk)[1][:, -1]
        total = float(top @ found.ntk @ top)
        parts: dict[str, float] = {}
        for name, leaf in found.leaves.items():
            share = self.kernel.eta[name] * float(top @ leaf @ top) / total
            parts[layer_of(name)] = parts.get(layer_of(name), 0.0) + share
        return parts


class _RelativeUpdate:
    """The largest ratio eta RMS|grad_l| / RMS|W_l| over the weights, as a function of s."""

    def __init__(self, kernel, x, rate: float, y, functional):
        self.kernel, self.x, self.rate = kernel, x, rate
        shape = functional.abstract_output.shape
        self.n, self.outputs = shape[0], math.prod(shape[1:])
        self.yy = np.zeros((self.n, self.n))
        if y is not None:
            target = np.asarray(y, np.float64)
            if target.size != self.n * self.outputs or len(target) != self.n or not np.all(np.isfinite(target)):
                raise InputError(
                    f"targets of shape {target.shape}",
                    f"finite numbers of shape {shape}",
                    "every output has its target",
                    f"y of shape {shape}",
                )
            self.yy = target.reshape(self.n, -1) @ target.reshape(self.n, -1).T
        self.norm = {w.name: math.sqrt(w.variance * math.prod(w.shape)) for w in kernel.weights if w.variance > 0}
        if not self.norm:
            raise InputError(
                "a model without random weights",
                "weights of positive variance",
                "a relative update divides by them",
                'criterion="stability"',
            )

    def _ratios(self, s: float) -> dict[str, float]:
        found = self.kernel(_scaled(self.x, s), get=("nngp", "leaves"))
        residual = (self.outputs * found.nngp + self.yy) / self.n**2
        rate = {name: self.rate * self.kernel.eta[name] for name in self.norm}
        return {
            name: rate[name] * math.sqrt(max(float(np.sum(residual * found.leaves[name])), 0.0)) / norm
            for name, norm in self.norm.items()
        }

    def __call__(self, s: float) -> float:
        return max(self._ratios(s).values())

    def power(self) -> int | None:
        ratios = [np.array(list(self._ratios(s).values())) for s in (1.0, 2.0, 0.25)]
        return _degree(ratios) if not self.yy.any() else None

    def layers(self, s: float) -> dict[str, float]:
        parts: dict[str, float] = {}
        for name, ratio in self._ratios(s).items():
            parts[layer_of(name)] = max(parts.get(layer_of(name), 0.0), ratio)
        return parts


def _degree(values: list[np.ndarray]) -> int | None:
    """p if values at s = 1, 2, 1/4 are homogeneous of degree p > 0, entry by entry."""
    one, two, quarter = values
    size = np.abs(one).max()
    if not size > 0:
        return None
    power = math.log2(np.abs(two).max() / size)
    p = round(power)
    fits = p > 0 and np.allclose(two, 2.0**p * one, rtol=1e-9, atol=1e-9 * 2.0**p * size)
    return p if fits and np.allclose(quarter, 0.25**p * one, rtol=1e-9, atol=1e-9 * 0.25**p * size) else None


def _closed(measure: Callable[[float], float], power: int, bound: float) -> float:
    return (bound / measure(1.0)) ** (1 / power)


def _root(measure: Callable[[float], float], bound: float) -> float:
    """The s nearest to 1 at which the measure, which grows with s, reaches the bound."""
    if math.isnan(bound):
        return math.nan
    gap = lambda t: math.log(max(measure(math.exp(t)), 1e-300) / bound)  # noqa: E731
    low = high = 0.0
    at_low = at_high = gap(0.0)
    while at_high < 0:
        if high > _LARGEST:
            return math.inf
        low, at_low, high = high, at_high, high + _STEP
        at_high = gap(high)
    while at_low >= 0:
        if low < -_LARGEST:
            return 0.0
        high, at_high, low = low, at_low, low - _STEP
        at_low = gap(low)
    for _ in range(60):  # Illinois: superlinear, never outside the bracket
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        here = gap(middle)
        if abs(here) < 1e-11:
            return math.exp(middle)
        if here * at_high < 0:
            low, at_low = high, at_high
        else:
            at_low *= 0.5
        high, at_high = middle, here
    return math.exp(high)


def _scatter(functional, x, s: float, networks, key) -> float:
    """Relative standard deviation of lambda_max over random networks, on a few examples."""
    from initjax.empirical import empirical_ntk

    if isinstance(networks, bool) or not isinstance(networks, int | np.integer) or networks < 0 or networks == 1:
        raise InputError(
            f"networks = {networks!r}", "0, or an integer >= 2", "a deviation needs two values at least", "networks=8"
        )
    if functional.values is not None:  # a finished nnx module is one network
        return math.nan
    few = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:_EXAMPLES] * jnp.asarray(s, jnp.asarray(leaf).dtype), x)
    ntk_fn = empirical_ntk(functional.apply)
    found = []
    for one in jax.random.split(jax.random.key(0) if key is None else key, int(networks)):
        found.append(np.linalg.eigvalsh(np.asarray(ntk_fn(functional.init(one), few), np.float64))[-1])
    return float(np.std(found, ddof=1) / np.mean(found))


def _scaled(x, s: float):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * s, x)


def _real(x) -> None:
    for leaf in jax.tree.leaves(x):
        if is_traced(leaf) or not np.issubdtype(np.asarray(leaf).dtype, np.floating):
            raise InputError(
                "inputs that are traced" if is_traced(leaf) else f"inputs of dtype {np.asarray(leaf).dtype}",
                "concrete floating arrays",
                "a scale multiplies them",
                "scale the embedding instead" if not is_traced(leaf) else "call it outside jit",
            )


def _positive(value, name: str) -> float:
    try:
        number = float(value)
    except Exception:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} = {value!r}", "one finite number > 0", "it is a step size", f"{name}=1e-3")
    return number
