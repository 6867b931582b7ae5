"""Layers of a plain chain one after the other, each weight's variance chosen when what arrives there is known.

A layer's q and chi follow from the layers in front alone, and are linear in its own variance: one pass over the moments
settles a whole chain, where iterating on all layers at once passes through scales of 2^depth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from initjax.infinite.blocks import Block
from initjax.infinite.kernels import KernelFunction
from initjax.infinite.modes import SAME, WITHIN
from initjax.infinite.moments import Moments, Schedule
from initjax.infinite.tiles import Batch, Side, layer_slope, layer_variance

_TURNS = 50


def settle(
    kernel: KernelFunction, inputs: Any, weights: list[str], choose: Callable[[int, float, float], float]
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]] | None:
    """Factors of the weights of a chain, in program order, and for each layer q and chi of every example.

    weights : paths of the leaves; each belongs to one layer, named by its path.
    choose : `choose(i, q, chi)`, for the i-th layer behind the settled ones, gives a factor; asked again until that is
        1 (one turn for chi, which is linear in the variance, and one that confirms it).

    Returns None where the program depends on its own statistics (norms), so that it is not known before the scales are.
    """
    leaves, statistics = list(kernel.weights), []

    def expectation(body):
        statistics.append(body)
        return Moments(kernel.weights).expectation(body)

    walked = kernel.walk(inputs, expectation)
    if statistics:
        return None
    batch = Batch(walked, kernel.weights, ("ntk", "layers"))
    moved = iter(Block(batch.at, 0, batch.n, True).bodies(batch.bodies))
    output, tangent = next(moved), next(moved)
    layers, tangents = ({name: next(moved) for name in group} for group in (walked.layers, walked.tangents))
    own = Moments(kernel.weights)
    side = Side(output, tangent, layers, tangents, own, slice(0, batch.n), Schedule([], SAME, WITHIN))
    place = {leaf.name: i for i, leaf in enumerate(leaves)}
    factors, slope, older = np.ones(len(weights)), np.ones(batch.n), set()
    variances, chis = [], []
    for i, weight in enumerate(weights):
        layer, known = weight.rpartition("/")[0] or weight, set(own.remembered)
        q = chi = slope
        own.forget(older)  # a chain looks back one layer
        for _ in range(_TURNS):
            q, after = layer_variance(side, layer), layer_slope(side, layer)
            chi = np.full(batch.n, np.nan) if after is None else after / slope
            step = choose(i, float(np.mean(q)), float(np.mean(chi)))
            if abs(step - 1) < 1e-6:
                break
            factors[i] *= step
            leaf = leaves[place[weight]]
            leaves[place[weight]] = dataclasses.replace(leaf, variance=leaf.variance * step**2)
            own.leaves = tuple(leaves)
            own.forget(set(own.remembered) - known)  # they hold the old variance
        variances, chis = [*variances, q], [*chis, chi]
        slope, older = slope * chi, known
    return factors, variances, chis
