"""Inits that look at a batch: layer-sequential unit variance, weight normalization, partial Jacobians."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.initializers.orthogonal import orthogonal
from initjax.initializers.protocol import count
from initjax.initializers.protocol import scale as checked_scale
from initjax.reinit.engine import reinitialize
from initjax.reinit.info import Traced
from initjax.reinit.rule import Rule, Rules, keep, scale
from initjax.reinit.sets import is_kernel
from initjax.reinit.signals import walk
from initjax.reinit.tree import like, unpack
from initjax.trace.uses import CONTRACTIONS


def lsuv(params: Any, model: Any, inputs: Any, key: Any, *, apply_kwargs: dict | None = None) -> Any:
    """Layer-sequential unit variance: orthonormal kernels, then each scaled until its output has variance 1 on a batch.

    Every kernel is drawn orthonormal and, in program order, divided by the standard deviation of its output, bias
    excluded. Since a layer is linear in its kernel one division each is exact, where the paper iterates.

    Parameters
    ----------
    params : as in `reinitialize`; an nnx module is updated in place.
    model, inputs : the model and a batch.
    key : random key of the orthonormal kernels.
    apply_kwargs : further keyword arguments of the model's call.

    Returns
    -------
    The tree with new kernels; everything else is kept.

    Raises
    ------
    InputError : a layer whose output on this batch is constant.

    Accuracy
    --------
    Variance over batch, positions and units is 1 to rounding, on this batch.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    >>> x = jax.random.normal(jax.random.key(0), (32, 16))
    >>> params = ij.lsuv(model.init(jax.random.key(1), x), model, x, jax.random.key(2))
    >>> print(f"{model.apply(params, x).var():.3f}")
    1.000

    References
    ----------
    Mishkin, Matas 2016 (arXiv:1511.06422), algorithm 1.
    """
    traced = Traced.of(model, inputs, apply_kwargs)
    start = Rules([Rule(is_kernel, orthogonal()), Rule(..., keep)])
    params = reinitialize(params, start, key, model=traced, inputs=inputs)
    leaves, repack = unpack(params)
    values = _in_order(leaves, traced)

    def wanted(signal, alpha):
        if alpha is not None:
            return 1.0
        if not signal.variance > 0:
            raise InputError(
                f"{signal.name}, whose output is the same for the whole batch",
                "a batch on which every layer's output varies",
                "its kernel is divided by that standard deviation",
                "give more, and different, examples; check for dead units",
            )
        return 1 / math.sqrt(signal.variance)

    factors = {(s.name, s.copy): s.factor for s in walk(traced, [values], inputs, key, wanted) if s.kind != "branch"}
    return repack([_times(leaf, factors) for leaf in leaves])


def weight_norm_init(params: Any, model: Any, inputs: Any, *, apply_kwargs: dict | None = None) -> Any:
    """Data-dependent init: every unit's pre-activation has mean 0 and variance 1 on a batch.

    Unit by unit the kernel's columns are divided by the standard deviation t of what the unit sees on the batch, and
    the bias becomes -mean/t, in program order. Layers without a bias keep their mean; scanned and several-headed
    kernels are scaled as a whole.

    Parameters
    ----------
    params, model, inputs, apply_kwargs : as in `lsuv`.

    Returns
    -------
    The tree with new kernels and biases.

    Raises
    ------
    InputError : a unit whose output is constant on this batch.

    Accuracy
    --------
    Exact to rounding, on this batch.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    >>> x = jax.random.normal(jax.random.key(0), (32, 16))
    >>> y = model.apply(ij.weight_norm_init(model.init(jax.random.key(1), x), model, x), x)
    >>> bool(jnp.allclose(y.mean(0), 0, atol=1e-5)), bool(jnp.allclose(y.var(0), 1, atol=1e-4))
    (True, True)

    References
    ----------
    Salimans, Kingma 2016 (arXiv:1602.07868), section 3, eqs. 5 and 6.
    """
    traced = Traced.of(model, inputs, apply_kwargs)
    leaves, repack = unpack(params)
    values = _in_order(leaves, traced)
    new: dict[str, Any] = {leaf.path: leaf.value for leaf in leaves}
    kernels = {use.leaf: use for use in traced.survey.uses if use.kind in CONTRACTIONS}

    def adjust(leaf: int, output: jax.Array, bias: int | None):
        """The new kernel and bias of one layer, from its output without bias."""
        path, use = traced.path(leaf), kernels[leaf]
        flat = output.reshape(-1, output.shape[-1]).astype(jnp.float32)
        whole = len(use.outputs) != 1 or bool(use.batch)
        axis = None if whole else 0
        std, mean = flat.std(axis), flat.mean(axis)
        if not bool((std > 0).all()):
            raise InputError(
                f"{path}, with units whose output is the same for the whole batch",
                "a batch on which every unit varies",
                "the kernel is divided by the standard deviation",
                "give more, and different, examples; check for dead units",
            )
        divide = std if whole else std.reshape([-1 if a == use.outputs[0] else 1 for a in range(len(new[path].shape))])
        new[path] = like(new[path] / divide.astype(new[path].dtype), new[path])
        if bias is not None and not whole:
            name = traced.path(bias)
            new[name] = like((-mean / std).astype(new[name].dtype), new[name])
            return 1 / std, -mean / std
        return 1 / std, None

    walk(traced, [values], inputs, jax.random.key(0), lambda signal, alpha: 1.0, adjust)
    return repack([new[leaf.path] for leaf in leaves])


def apjn(
    model: Any,
    inputs: Any,
    *,
    key: Any,
    steps: int = 50,
    tolerance: float = 0.02,
    seeds: int = 16,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
) -> Rules:
    """Tune the layers of a plain network by averaged partial Jacobian norms, measured backwards over random networks.

    J_l = gradient_(l-1) / gradient_l of `ij.measure` is the squared Jacobian from one layer's pre-activations to the
    next's, per unit. Each step divides the later layer's kernel by sqrt(J_l), Newton's step for 1/2 (log J_l)^2 with
    J_l in proportion to its variance. Unlike `tune` it sees biases, norms and everything else between two layers
    from the side of gradients.

    Parameters
    ----------
    model : linen module, nnx factory or pair `(init_fn, apply_fn)`, of layers one behind the other.
    inputs : batch.
    key : random key of the networks; the same in every step, so that the iteration converges.
    steps, tolerance : at most so many steps, until all |log J_l| < tolerance.
    seeds : number of networks.
    apply_kwargs, rngs : as in `kernel_fn`.

    Returns
    -------
    Rules of `scale(c)` for `ij.reinitialize`.

    Raises
    ------
    InputError : fewer than two layers, gradients that vanish or are not finite.

    Accuracy
    --------
    Of these networks to `tolerance`; of others up to the standard error of the mean over `seeds`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(100), nn.relu, nn.Dense(100)])
    >>> x = jax.random.normal(jax.random.key(0), (8, 100))
    >>> rules = ij.apjn(model, x, key=jax.random.key(1))
    >>> bool(abs(rules[0].action.value - 2**0.5) < 0.1)  # He
    True

    References
    ----------
    He, Doshi, Gromov 2022 (arXiv:2206.13568), eqs. 3 and 8.
    """
    from initjax import empirical
    from initjax.trace.flax import as_functional

    steps, seeds = count(steps, "steps"), count(seeds, "seeds")
    tolerance = checked_scale(tolerance, "tolerance", positive=True)
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    traced = Traced.of(model, inputs, apply_kwargs, rngs)
    order = list(dict.fromkeys(use.leaf for use in traced.survey.uses if use.kind in CONTRACTIONS))
    if len(order) < 2:
        raise InputError(
            f"a model with {len(order)} layers", "two layers or more", "a partial Jacobian lies between two", "use tune"
        )
    logs = np.zeros(len(order))

    def init(k):
        leaves, structure = jax.tree.flatten(functional.init(k))
        for leaf, log in zip(order, logs, strict=True):
            leaves[leaf] = leaves[leaf] * jnp.asarray(math.exp(log), leaves[leaf].dtype)
        return jax.tree.unflatten(structure, leaves)

    for _ in range(steps):
        found = empirical.measure((init, functional.apply), inputs, key=key, seeds=seeds)
        gradient = found.gradient.mean(1)
        jacobian = gradient[:-1] / gradient[1:]
        if len(gradient) != len(order) or not np.isfinite(jacobian).all() or (jacobian <= 0).any():
            raise InputError(
                f"squared gradients {gradient} behind {len(order)} kernels",
                "one positive finite number for each layer",
                "partial Jacobians are their ratios",
                "tune(model, inputs, key=key) first: it works forwards and survives any start",
            )
        if np.abs(np.log(jacobian)).max() < tolerance:
            break
        logs[1:] -= np.log(jacobian) / 2
    factors = zip(order[1:], np.exp(logs[1:]), strict=True)
    rules = [(f"^{re.escape(traced.path(leaf))}$", scale(float(factor))) for leaf, factor in factors]
    return Rules([*rules, (..., keep)])


def _in_order(leaves, traced: Traced) -> list:
    by_path = {leaf.path: leaf.value for leaf in leaves}
    missing = [name for name in traced.survey.names if name not in by_path]
    if missing:
        raise InputError(
            f"params without {', '.join(missing[:5])}",
            f"the parameters of this model: {', '.join(traced.survey.names)}",
            "the model is run with them",
            "give the tree that model.init returns",
        )
    return [by_path[name] for name in traced.survey.names]


def _times(leaf, factors: dict) -> Any:
    """A leaf times its factor, or the factors of its copies along the first axis."""
    found = {copy: factor for (name, copy), factor in factors.items() if name == leaf.path}
    if not found:
        return leaf.value
    if None in found:
        return like(leaf.value * jnp.asarray(found[None], leaf.value.dtype), leaf.value)
    shape = (len(found),) + (1,) * (len(leaf.value.shape) - 1)
    times = np.array([found[copy] for copy in sorted(found)]).reshape(shape)
    return like(leaf.value * jnp.asarray(times, leaf.value.dtype), leaf.value)
