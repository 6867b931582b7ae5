r"""Units that start as copies of each other stay copies: gradient descent cannot tell them apart.

Two units of a layer are copies where their incoming weights, their bias and their outgoing weights agree: then their
gradients agree too, at every step, and the layer is as narrow as its number of distinct units. If one of the three
differs they part, at a rate set by the loss: from a relative distance eps it takes a time of the order of log(1 / eps).
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from initjax.errors import InputError

_ROUNDED = 1e-6  # relative distance below which units count as copies
_EXEMPT = re.compile(r"(scale|gamma|norm)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LayerSymmetry:
    """One layer's units.

    Attributes
    ----------
    name : path of the kernel.
    units : its width, the last axis of the kernel.
    distinct : number of groups of units, copies being one: the effective width.
    distance : smallest relative distance of two units, |a - b| / (root mean square of |a|); 0 for exact copies, inf for
        one unit.
    stable_rank : |W|_F^2 / |W|_2^2 of the kernel as a matrix; nan where it is zero.
    silent : whether all outgoing weights are zero, so that the kernel has no gradient until they move.
    flagged : whether the layer is in trouble: copies among its units.
    outgoing : path of the kernel taken as the outgoing one; empty where none fits.
    """

    name: str
    units: int
    distinct: int
    distance: float
    stable_rank: float
    silent: bool
    flagged: bool
    outgoing: str


@dataclasses.dataclass(frozen=True)
class SymmetryReport:
    """Symmetries of the units of a network.

    Attributes
    ----------
    layers : one `LayerSymmetry` for each kernel, in order.
    flagged : names of the layers with copies.
    escape : log(1 / eps) for the smallest distance eps in the report: how long, in units of the inverse growth rate,
        near copies take to part; inf where copies are exact.
    """

    layers: tuple[LayerSymmetry, ...]
    flagged: tuple[str, ...]
    escape: float

    def __repr__(self) -> str:
        rows = [
            f"{layer.name}: {layer.distinct} of {layer.units} units distinct, stable rank {layer.stable_rank:.3g}"
            + (", COPIES" if layer.flagged else "")
            + (", no gradient at step 0" if layer.silent else "")
            for layer in self.layers
        ]
        return "SymmetryReport(\n  " + "\n  ".join(rows) + "\n)"


def report(params, tolerance: float = _ROUNDED) -> SymmetryReport:
    r"""Find the units of every layer that are copies of each other, and so will remain.

    The incoming weights of a unit are its slice of the kernel's last axis, with its bias; the outgoing ones belong to
    the next kernel (in natural order of the paths) whose input size is the layer's width, or a multiple of it after
    flattening. A last layer has no outgoing kernel: its units are told apart by their targets, so it is never flagged.
    Norm scales and biases are no kernels; a zero readout over random units is silent, not symmetric.

    Parameters
    ----------
    params : parameter tree of a linen model, `nnx.state(model)`, or any tree of arrays; leaves of two axes or more
        whose path does not name a scale or a norm are kernels.
    tolerance : relative distance below which two units are copies; 1e-6 suits float32.

    Returns
    -------
    SymmetryReport.

    Raises
    ------
    InputError : no kernels, or values that are not finite.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> constant = jax.nn.initializers.constant(0.1)
    >>> model = nn.Sequential([nn.Dense(16, kernel_init=constant), jnp.tanh, nn.Dense(1, kernel_init=constant)])
    >>> found = ij.applications.symmetry.report(model.init(jax.random.key(0), jnp.ones((1, 4))))
    >>> print(found.layers[0].distinct, found.flagged)
    1 ('params/layers_0/kernel',)

    References
    ----------
    Rumelhart, Hinton, Williams 1986; the escape time is that of a linear instability, derived here.
    """
    leaves = {
        _path(path): np.asarray(jax.device_get(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    kernels = sorted(
        (name for name, leaf in leaves.items() if leaf.ndim >= 2 and leaf.size and not _EXEMPT.search(name)),
        key=_natural,
    )
    if not kernels:
        raise InputError(
            f"a tree of {len(leaves)} leaves without a kernel",
            "parameters of a model with layers: arrays of two axes or more",
            "units are the last axis of a kernel",
            "pass model.init(key, x), or nnx.state(model, nnx.Param)",
        )
    for name, leaf in leaves.items():
        if np.issubdtype(leaf.dtype, np.inexact) and not np.all(np.isfinite(leaf)):
            raise InputError(
                f"{name} with values that are not finite", "finite parameters", "nan equals nothing", "train less"
            )
    layers = []
    for number, name in enumerate(kernels):
        layers.append(_layer(name, leaves, kernels[number + 1 :], tolerance))
    near = [layer.distance for layer in layers if layer.outgoing and math.isfinite(layer.distance)]
    smallest = min(near, default=1.0)
    return SymmetryReport(
        tuple(layers),
        tuple(layer.name for layer in layers if layer.flagged),
        math.inf if smallest == 0 else max(0.0, -math.log(smallest)),
    )


def _layer(name: str, leaves: dict[str, np.ndarray], later: list[str], tolerance: float) -> LayerSymmetry:
    kernel = leaves[name].astype(np.float64)
    units = kernel.shape[-1]
    rows = [kernel.reshape(-1, units).T]
    bias = leaves.get(re.sub(r"[^/]*$", "bias", name))
    if bias is not None and bias.size == units:
        rows.append(bias.astype(np.float64).reshape(units, 1))
    outgoing, after = _outgoing(units, leaves, later)
    if after is not None:
        rows.append(after)
    vectors = np.concatenate(rows, axis=1)
    scale = math.sqrt(float(np.mean(np.sum(vectors**2, axis=1)))) or 1.0
    distance, distinct = _distinct(vectors / scale, tolerance)
    spectrum = np.linalg.svd(rows[0], compute_uv=False)
    rank = float(np.sum(spectrum**2) / spectrum[0] ** 2) if spectrum[0] > 0 else math.nan
    silent = after is not None and not np.any(after)
    flagged = bool(outgoing) and units > 1 and distinct < units
    return LayerSymmetry(name, units, distinct, distance, rank, silent, flagged, outgoing)


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
    count = len(vectors)
    if count < 2:
        return math.inf, count
    group = list(range(count))

    def root(i):
        while group[i] != i:
            i = group[i] = group[group[i]]
        return i

    smallest = math.inf
    for i in range(count - 1):  # differences, not inner products: those lose 1e-8
        distance = np.sqrt(np.sum((vectors[i + 1 :] - vectors[i]) ** 2, axis=1))
        smallest = min(smallest, float(distance.min()))
        for j in np.nonzero(distance < tolerance)[0]:
            group[root(i + 1 + int(j))] = root(i)
    return smallest, len({root(i) for i in range(count)})


def _path(path) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _natural(name: str) -> list:
    """Dense_10 after Dense_9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
