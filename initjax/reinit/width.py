"""Maximal update parametrization of a whole model: parts read from how its shapes grow, laws and rates by part."""

import math
from typing import Any

from initjax.errors import InputError
from initjax.initializers.protocol import choice
from initjax.initializers.protocol import scale as checked_scale
from initjax.reinit.info import ParamInfo
from initjax.reinit.rule import Rule, Rules, keep
from initjax.reinit.sets import ByFan
from initjax.reinit.tree import unpack


def mup(base: Any, *, sigma_w: float = 1.0) -> Rules:
    """Maximal update parametrization: what grows with the width is found by comparing shapes with a narrow base model.

    Kernels whose two sides grow ("hidden"): variance sigma_w^2 / fan_in. Whose inputs alone grow ("output"): sigma_w^2
    base_fan_in / fan_in^2. Others ("input", "fixed"): sigma_w^2 / fan_in. Embeddings: N(0, 1 / base_features), constant
    in the width. Biases and scales are kept ("vector"). At the base width this is the standard parametrization.

    Parameters
    ----------
    base : parameters of the same model at its base width, arrays or `ShapeDtypeStruct` (`jax.eval_shape` of init).
    sigma_w : standard deviation of kernels in mean-field scaling, sqrt(2) for relu.

    Returns
    -------
    Rules, whose labels ("hidden x4": a fan 4 times that of the base) give the learning rates by `mup_rates`.

    Raises
    ------
    InputError : sigma_w negative; when applied, parameters that the base does not have, or of another rank.

    Accuracy
    --------
    Variances are exact.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> make = lambda n: nn.Sequential([nn.Dense(n), nn.relu, nn.Dense(n), nn.relu, nn.Dense(10)])
    >>> init = lambda n: jax.eval_shape(make(n).init, jax.random.key(0), jnp.ones((1, 8)))["params"]
    >>> rules = ij.rules.mup(init(64))
    >>> [row.label for row in ij.plan(init(256), rules).rows if "kernel" in row.path]
    ['input x4', 'hidden x4', 'output x4']

    References
    ----------
    Yang et al. 2022 (arXiv:2203.03466), table 3.
    """
    sigma = checked_scale(sigma_w, "sigma_w")
    shapes = {leaf.path: tuple(leaf.value.shape) for leaf in unpack(base)[0]}

    def growth(info: ParamInfo, axes: tuple[int, ...]) -> float:
        old = shapes.get(info.path)
        if old is None or len(old) != len(info.shape):
            raise InputError(
                f"{info.path} of shape {info.shape}, in the base {old}",
                "a base of the same modules and ranks",
                "what grows with the width is found by comparing shapes",
                "build the base by the same code with a smaller width",
            )
        return math.prod(info.shape[a] / old[a] for a in axes)

    def part(info: ParamInfo) -> tuple[str, float]:
        if info.kind == "embedding":
            return "input", growth(info, info.outputs or (len(info.shape) - 1,))
        if info.kind != "kernel":
            return "vector", growth(info, tuple(range(len(info.shape))))
        into, out = growth(info, info.inputs), growth(info, info.outputs)
        if into != 1:
            return ("hidden" if out != 1 else "output"), into
        return ("input", out) if out != 1 else ("fixed", 1.0)

    def std(info: ParamInfo) -> float:
        name, ratio = part(info)
        if info.kind == "embedding":
            return math.sqrt(ratio / info.shape[-1])
        assert info.fan_in is not None
        return sigma / math.sqrt(info.fan_in) / (math.sqrt(ratio) if name == "output" else 1.0)

    def label(info: ParamInfo) -> str:
        name, ratio = part(info)
        return f"{name} x{ratio:g}"

    weight = lambda info: info.kind in ("kernel", "embedding")  # noqa: E731
    return Rules([Rule(weight, ByFan("mup", std), label), Rule(..., keep, label)])


def mup_rates(labels: Any, rate: float = 1.0, optimizer: str = "adam") -> dict[str, float]:
    """Learning rate of each label that `ij.labels(params, ij.rules.mup(base))` gives.

    Adam: rate / ratio for hidden and output kernels, rate for all others. Gradient descent: rate x ratio for input
    kernels and vectors, rate for hidden kernels, rate / ratio for the output.

    Parameters
    ----------
    labels : tree of labels.
    rate : learning rate that is right at the base width.
    optimizer : "adam" (any that normalizes gradients) or "sgd".

    Returns
    -------
    Label -> learning rate, for `optax.multi_transform({label: optax.adam(rate), ...}, labels)`.

    Raises
    ------
    InputError : an unknown optimizer.

    Examples
    --------
    >>> import initjax as ij
    >>> ij.rules.mup_rates({"a": "hidden x4", "b": "input x4"}, 1e-3)
    {'hidden x4': 0.00025, 'input x4': 0.001}

    References
    ----------
    Yang et al. 2022 (arXiv:2203.03466), table 3.
    """
    import jax

    choice(optimizer, "optimizer", ("adam", "sgd"), "the size of an update follows the gradient's or not")
    powers = {
        "adam": {"hidden": -1, "output": -1, "input": 0, "vector": 0, "fixed": 0},
        "sgd": {"hidden": 0, "output": -1, "input": 1, "vector": 1, "fixed": 0},
    }[optimizer]
    found = sorted(set(jax.tree.leaves(labels)))
    return {label: rate * float(label.split(" x")[1]) ** powers[label.split(" x")[0]] for label in found}
