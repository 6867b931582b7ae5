"""A model with other variances: the same forward pass, with matrices drawn anew or scaled."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.flax import Functional, as_functional

Pair = tuple[Callable, Callable]


def drawn(model: Any, x: Any, apply_kwargs: dict | None = None) -> Functional:
    """The model as pure functions, refused where it has one set of weights instead of initializers."""
    functional = as_functional(model, x, apply_kwargs=apply_kwargs)
    if functional.values is not None:
        raise InputError(
            f"an nnx module instance, {type(model).__name__}",
            "a factory `lambda rngs: Model(rngs=rngs)`, a linen module or a pair (init_fn, apply_fn)",
            "the answer is a mean over random weights, and a finished module has one set of them",
            f"lambda rngs: {type(model).__name__}(..., rngs=rngs)",
        )
    return functional


def matrices(functional: Functional) -> list[int]:
    """Positions of the leaves that are weight matrices or convolution kernels, in the order of the leaves."""
    return [i for i, leaf in enumerate(jax.tree.leaves(functional.abstract_params)) if len(leaf.shape) >= 2]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """fan_in and fan_out of a kernel (*window, in, out), as Flax counts them."""
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def scaled(functional: Functional, factor: Any) -> Pair:
    """Every random variance times `factor`: the leaves of the model's own draw times its square root."""
    return lambda key: jax.tree.map(
        lambda w: w * jnp.asarray(factor**0.5, w.dtype), functional.init(key)
    ), functional.apply


def with_variances(functional: Functional, variances: dict[int, float]) -> Pair:
    """Normal leaves of these variances at these positions, the others as they are."""

    def init(key):
        leaves, tree = jax.tree.flatten(functional.init(key))
        for i, variance in variances.items():
            normal = jax.random.normal(jax.random.fold_in(key, i), leaves[i].shape, leaves[i].dtype)
            leaves[i] = normal * jnp.asarray(variance**0.5, leaves[i].dtype)
        return jax.tree.unflatten(tree, leaves)

    return init, functional.apply


def check_positive(value: Any, name: str, why: str) -> float:
    """A finite positive number, or a refusal."""
    if isinstance(value, bool) or not np.isscalar(value) or not np.isfinite(value) or value <= 0:  # pyright: ignore
        raise InputError(f"{name}={value}", "a finite number > 0", why, f"{name}=1.0")
    return float(value)  # pyright: ignore


def check_count(value: Any, name: str, least: int, why: str) -> int:
    """An integer of at least `least`, or a refusal."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name}={value!r}", f"an integer >= {least}", why, f"{name}={max(least, 32)}")
    return int(value)
