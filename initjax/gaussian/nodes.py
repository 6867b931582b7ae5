"""Gauss-Legendre nodes on [-1, 1] and the panels on which Gaussian expectations are summed."""

import functools

import numpy as np

ORDER = 20  # nodes a panel
LOW_ORDER = 14  # second order, for the error estimate
REACH = 12.0  # |z| covered: the Gaussian weight beyond is 4e-33
FAR_REACH = 38.0  # for functions that grow like exp: the weight underflows here


@functools.cache
def legendre(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    nodes.flags.writeable = weights.flags.writeable = False
    return nodes, weights


@functools.cache
def legendre_transform(order: int) -> np.ndarray:
    """Matrix (nodes, degrees): values at the nodes @ matrix = Legendre coefficients."""
    nodes, weights = legendre(order)
    basis = np.polynomial.legendre.legvander(nodes, order - 1)
    return weights[:, None] * basis * (np.arange(order) + 0.5)


@functools.cache
def unit_edges(reach: float, width: float = 1.0) -> np.ndarray:
    """Panel edges on [-reach, reach], no wider than `width`, with an edge at 0."""
    panels = int(np.ceil(reach / width))
    return np.linspace(-reach, reach, 2 * panels + 1)


def panel_nodes(edges: np.ndarray, order: int = ORDER) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the composite rule on `edges` (..., E): both (..., (E-1) * order)."""
    nodes, weights = legendre(order)
    middle = (edges[..., 1:] + edges[..., :-1]) / 2
    half = (edges[..., 1:] - edges[..., :-1]) / 2
    shape = edges.shape[:-1] + (-1,)
    return (middle[..., None] + half[..., None] * nodes).reshape(shape), (half[..., None] * weights).reshape(shape)
