r"""Units that start as copies of each other stay copies: gradient descent cannot tell them apart.

Two units of a layer are copies where their incoming weights, their bias and their outgoing weights agree: then their
gradients agree too, at every step, and the layer is as narrow as its number of distinct units. If one of the three
differs they part: from a relative distance eps, at the rate r of the instability, after log(1 / eps) / r.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.flax import as_functional, leaf_names, nnx_parameters
from initjax.trace.uses import CONTRACTIONS, survey

_ROUNDED = 1e-6  # relative distance below which units count as copies
_EXEMPT = re.compile(r"(scale|gamma|norm)", re.IGNORECASE)
_SCREEN = 1e-5  # relative squared distance below which inner products are too coarse, and differences are formed


@dataclasses.dataclass(frozen=True)
class LayerSymmetry:
    """One layer's units.

    Attributes
    ----------
    name : path of the kernel.
    units : its width.
    effective_width : number of distinct units, copies counted once.
    distance : smallest relative distance of two units, |a - b| over the root mean square of |a|, of the vectors of
        incoming weights, bias and outgoing weights; 0 for exact copies, inf for a single unit.
    stable_rank : |W|_F^2 / |W|_2^2 of the kernel as a matrix; nan where it is zero.
    dead : whether its gradient is exactly zero: measured with the model; without it, whether all outgoing weights are
        zero.
    flagged : whether there are copies among its units.
    outgoing : path of the kernel taken as the outgoing one; empty where none fits.
    """

    name: str
    units: int
    effective_width: int
    distance: float
    stable_rank: float
    dead: bool
    flagged: bool
    outgoing: str


@dataclasses.dataclass(frozen=True)
class SymmetryReport:
    """Symmetries of the units of a network.

    Attributes
    ----------
    layers : one `LayerSymmetry` for each kernel, in order.
    flagged : names of the layers with copies.
    dead : names of the layers without gradient in the first step.
    escape : log(1 / eps) for the smallest distance eps of two units in the report: the time that they take to part, in
        units of the inverse rate of the instability; inf for exact copies, 0 where none are near.
    """

    layers: tuple[LayerSymmetry, ...]
    flagged: tuple[str, ...]
    dead: tuple[str, ...]
    escape: float

    def __repr__(self) -> str:
        rows = [
            f"{layer.name}: {layer.effective_width} of {layer.units} units distinct"
            + f", stable rank {layer.stable_rank:.3g}"
            + (", COPIES" if layer.flagged else "")
            + (", no gradient at step 0" if layer.dead else "")
            for layer in self.layers
        ]
        return "SymmetryReport(\n  " + "\n  ".join(rows) + "\n)"


def report(
    params, inputs=None, *, key=None, tolerance: float = _ROUNDED, apply_kwargs=None, rngs=None
) -> SymmetryReport:
    r"""Find the units of every layer that are copies of each other, and so will remain.

    The outgoing weights of a layer are those of the next kernel whose input size is the layer's width, or a multiple of
    it after flattening: next in the order of computation if the model and inputs are given, else in the order of the
    tree. A last layer has none: its units are told apart by their targets, so that it is never flagged. Norm scales
    and biases are no kernels; a zero readout over random units is no symmetry, though it leaves them without gradient.

    Parameters
    ----------
    params : a parameter tree of arrays, or an nnx module, or with `inputs` any model (linen, nnx, factory, pair).
    inputs : example batch; then the layers' order and gradients are read from the model on it.
    key : of the draw of a model that is no finished module; None for key 0.
    tolerance : relative distance below which two units are copies; 1e-6 suits float32.
    apply_kwargs, rngs : of a model, as in `ij.kernel_fn`.

    Returns
    -------
    SymmetryReport.

    Raises
    ------
    InputError : no kernels, values that are traced or not finite, a model without inputs.

    Accuracy
    --------
    Distances to 1e-13 relative to the size of the vectors where they are small, 1e-6 where not. Whether gradients are
    zero is exact for these weights, inputs and a random readout.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import symmetry
    >>> constant = jax.nn.initializers.constant(0.1)
    >>> model = nn.Sequential([nn.Dense(16, kernel_init=constant), jnp.tanh, nn.Dense(1, kernel_init=constant)])
    >>> found = symmetry.report(model, jnp.ones((1, 4)))
    >>> print(found.layers[0].effective_width, found.flagged, found.escape)
    1 ('layers_0/kernel',) inf

    References
    ----------
    Rumelhart, Hinton, Williams 1986 (Nature 323); the escape time is that of a linear instability, derived in
    docs/applications.md.
    """
    if inputs is None:
        leaves, kernels, dead = *_from_tree(params), None
    else:
        leaves, kernels, dead = _from_model(params, inputs, key, apply_kwargs, rngs)
    if not kernels:
        raise InputError(
            f"a tree of {len(leaves)} leaves without a kernel",
            "parameters of a model with layers: arrays of two axes or more",
            "units are the last axis of a kernel",
            "pass model.init(key, x), an nnx module, or the model and inputs",
        )
    if not 0 <= tolerance < 1:
        raise InputError(
            f"tolerance = {tolerance!r}", "a number in [0, 1)", "it is a relative distance", "tolerance=1e-6"
        )
    layers = tuple(_layer(name, leaves, kernels[number + 1 :], tolerance, dead) for number, name in enumerate(kernels))
    near = [layer.distance for layer in layers if layer.outgoing and math.isfinite(layer.distance)]
    smallest = min(near, default=1.0)
    return SymmetryReport(
        layers,
        tuple(layer.name for layer in layers if layer.flagged),
        tuple(layer.name for layer in layers if layer.dead),
        math.inf if smallest == 0 else max(0.0, -math.log(smallest)),
    )


# ------------------------------------------------------------------ what the layers are, and in which order


def _from_tree(params) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays by path, and the kernels' paths in order."""
    tree = nnx_parameters(params)
    if callable(tree) or hasattr(tree, "init"):
        raise InputError(
            f"{type(params).__name__}, a model without inputs",
            "a parameter tree, an nnx module, or a model and an example batch",
            "a model has no weights until it has met inputs",
            "report(model, x)",
        )
    ordered = list(_walk(tree))
    leaves = {name: _array(name, leaf) for name, leaf in ordered}
    return leaves, [name for name, leaf in leaves.items() if leaf.ndim >= 2 and leaf.size and not _EXEMPT.search(name)]


def _walk(tree, path: str = ""):
    """(path, leaf) in the order of computation as far as a tree tells: that of its dictionaries, which linen fills in
    order of computation, and natural order (Dense_10 after Dense_9) where these have been sorted."""
    if isinstance(tree, Mapping):
        keys = list(tree)
        if [str(k) for k in keys] == sorted(str(k) for k in keys):
            keys = sorted(keys, key=lambda k: _natural(str(k)))
        for k in keys:
            yield from _walk(tree[k], f"{path}/{k}" if path else str(k))
        return
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        yield "/".join(filter(None, (path, name))), leaf


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _array(name: str, leaf) -> np.ndarray:
    try:
        value = np.asarray(jax.device_get(leaf))
    except Exception as error:
        raise InputError(
            f"{name} of type {type(leaf).__name__}",
            "concrete arrays",
            "their values are compared",
            "call it outside jit",
        ) from error
    if value.dtype.kind not in "iub" and not np.all(np.isfinite(value.astype(np.float64))):
        raise InputError(
            f"{name} with values that are not finite",
            "finite parameters",
            "nan equals nothing, not even itself",
            "look at the parameters before training diverges",
        )
    return value


def _from_model(model, inputs, key, apply_kwargs, rngs):
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    first, second = jax.random.split(jax.random.key(0) if key is None else key)
    params = functional.init(first)
    names = functional.leaf_names
    leaves = {name: _array(name, leaf) for name, leaf in zip(names, jax.tree.leaves(params), strict=True)}
    read = survey(functional)
    used = [use.leaf for use in read.uses if use.kind in (*CONTRACTIONS, "lookup")]
    kernels = [names[leaf] for leaf in dict.fromkeys(used)]
    data = jax.tree.map(jnp.asarray, inputs)

    def readout(params):
        outputs = [
            out for out in jax.tree.leaves(functional.apply(params, data)) if jnp.issubdtype(out.dtype, jnp.floating)
        ]
        keys = jax.random.split(second, len(outputs))
        return sum(
            jnp.sum(out * jax.random.normal(k, out.shape, out.dtype)) for out, k in zip(outputs, keys, strict=True)
        )

    gradients = jax.tree.leaves(jax.jit(jax.grad(readout))(params))
    dead = {name for name, g in zip(names, gradients, strict=True) if not np.any(np.asarray(g))}
    return leaves, kernels, dead


# ------------------------------------------------------------------ one layer


def _layer(name: str, leaves, later: list[str], tolerance: float, dead: set[str] | None) -> LayerSymmetry:
    kernel = leaves[name].astype(np.float64)
    units = kernel.shape[-1]
    incoming = kernel.reshape(-1, units).T
    rows = [incoming]
    bias = leaves.get(re.sub(r"[^/]*$", "bias", name))
    if bias is not None and bias.size == units:
        rows.append(bias.astype(np.float64).reshape(units, 1))
    outgoing, after = _outgoing(units, leaves, later)
    if after is not None:
        rows.append(after)
    vectors = np.concatenate(rows, axis=1)
    size = math.sqrt(float(np.mean(np.sum(vectors**2, axis=1)))) or 1.0
    distance, distinct = _distinct(vectors / size, tolerance)
    spectrum = np.linalg.svd(incoming, compute_uv=False)
    rank = float(np.sum(spectrum**2) / spectrum[0] ** 2) if spectrum[0] > 0 else math.nan
    still = name in dead if dead is not None else after is not None and not np.any(after)
    flagged = bool(outgoing) and units > 1 and distinct < units
    return LayerSymmetry(name, units, distinct, distance, rank, still, flagged, outgoing)


def _outgoing(units: int, leaves, later: list[str]) -> tuple[str, Any]:
    """The next kernel that takes this layer's units, as (units, everything else)."""
    for name in later:
        kernel = leaves[name].astype(np.float64)
        size = kernel.shape[-2]
        if size % units == 0:  # flattened positions come first, channels last
            split = kernel.reshape(*kernel.shape[:-2], size // units, units, kernel.shape[-1])
            return name, np.moveaxis(split, -2, 0).reshape(units, -1)
    return "", None


def _distinct(vectors: np.ndarray, tolerance: float) -> tuple[float, int]:
    """Smallest distance of two rows, and the number of groups closer than the tolerance (single linkage)."""
    unique = np.unique(vectors, axis=0)
    smallest = math.inf if len(unique) == len(vectors) else 0.0
    group = list(range(len(unique)))

    def root_of(i):
        while group[i] != i:
            i = group[i] = group[group[i]]
        return i

    squares = np.sum(unique**2, axis=1)
    for i in range(len(unique) - 1):
        rest = unique[i + 1 :]
        square = squares[i + 1 :] + squares[i] - 2 * (rest @ unique[i])
        near = np.flatnonzero(square < _SCREEN)  # inner products lose 1e-16 of squares: differences for these
        square[near] = np.sum((rest[near] - unique[i]) ** 2, axis=1)
        smallest = min(smallest, math.sqrt(max(float(square.min()), 0.0)))
        for j in near[square[near] < tolerance**2]:
            group[root_of(i + 1 + int(j))] = root_of(i)
    return smallest, len({root_of(i) for i in range(len(unique))})
