"""Parameter trees of every kind as a list of (path, array): linen dicts, FrozenDict, boxed values, nnx State, Modules.

Paths are those of `initjax.trace.flax`: keys joined by `/`, without the collection name `params` and without the field
of a box, so that a leaf has one name however its tree is wrapped. Flax is not imported: whoever holds one of its
objects has imported it.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One trainable array: its path, as text and as keys, its value, and the nnx Variable (or other box) around it."""

    path: str
    keys: tuple
    value: Any
    variable: type | None = None
    box: Any = None


def unpack(params: Any) -> tuple[list[Leaf], Callable[[list], Any]]:
    """The trainable leaves of a tree, and a function that puts new values into the same boxes.

    Integer leaves, random keys, collections beside `params`, and nnx variables that are no `nnx.Param` are kept.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module):
        state = nnx.state(params, nnx.Param)
        leaves, repack_state = unpack(state)

        def update(values: list) -> Any:
            nnx.update(params, repack_state(values))
            return params

        return leaves, update
    if isinstance(params, type) or callable(params) and not isinstance(params, Mapping):
        raise InputError(
            f"params of type {type(params).__name__}",
            "a parameter tree: linen variables or their `params`, an nnx.State, an nnx module",
            "rules act on arrays",
            "give model.init(key, x) of a linen module, or the nnx module itself",
        )
    variables = getattr(nnx, "Variable", ()) if nnx is not None else ()
    is_box = lambda x: isinstance(x, variables) or hasattr(x, "replace_boxed")  # noqa: E731
    found, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    has_collections = isinstance(params, Mapping) and "params" in params and isinstance(params["params"], Mapping)
    leaves, places, boxes = [], [], [box for _, box in found]
    for place, (keys, box) in enumerate(found):
        names = tuple(_name(key) for key in keys)
        if has_collections:
            if names[0] != "params":
                continue
            names = names[1:]
        inner = jax.tree.leaves(box)
        variable = type(box) if isinstance(box, variables) else None
        if len(inner) != 1 or variable is not None and not issubclass(variable, nnx.Param):  # pyright: ignore
            continue
        if not hasattr(inner[0], "dtype") or not jnp.issubdtype(inner[0].dtype, jnp.inexact):
            continue
        leaves.append(Leaf("/".join(map(str, names)), names, inner[0], variable, box))
        places.append(place)
    if not leaves:
        raise InputError(
            f"params of type {type(params).__name__} without a floating-point array",
            "a parameter tree: linen variables or their `params`, an nnx.State, an nnx module",
            "rules act on arrays",
            "give model.init(key, x) of a linen module, or the nnx module itself",
        )

    def repack(values: list) -> Any:
        whole = list(boxes)
        for place, value in zip(places, values, strict=True):
            box = boxes[place]
            whole[place] = jax.tree.unflatten(jax.tree.structure(box), [value])
        return jax.tree.unflatten(structure, whole)

    return leaves, repack


def like(value: Any, old: Any) -> Any:
    """The new value in the dtype and under the sharding of the old one."""
    value = value.astype(old.dtype)
    if isinstance(old, jax.Array) and not is_traced(old, value) and value.sharding != old.sharding:
        value = jax.device_put(value, old.sharding)
    return value


def _name(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)
