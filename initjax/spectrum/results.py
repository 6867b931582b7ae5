"""How spectral quantities are reported: the number, its error, the side it errs on, and how it was made."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class SpectralEstimate:
    """A spectral quantity of an operator; `float(estimate)` is its value.

    Attributes
    ----------
    value : the number.
    error : what is known of its error, in its own unit: 0 where all eigenvalues were computed, a residual bound for
        Lanczos, a standard error over probes (with the quadrature's own change) for stochastic quadrature; nan where
        only one side is known.
    lower_bound : True: the true value is at least this one.
    regime : "dense" (all eigenvalues of the formed matrix), "lanczos" or "stochastic lanczos quadrature".
    products : operator-vector products used.
    note : what was left open, such as a smallest eigenvalue lost in rounding.
    """

    value: float
    error: float
    lower_bound: bool
    regime: str
    products: int
    note: str = ""

    def __float__(self):
        return self.value

    def __repr__(self):
        number = f"at least {self.value:.6g}" if self.lower_bound else f"{self.value:.6g}"
        error = "" if not self.error > 0 else f" +- {self.error:.1g}"
        note = f"; {self.note}" if self.note else ""
        how = self.regime if self.regime == "dense" else f"{self.regime}, {self.products} products"
        return f"{number}{error} ({how}{note})"


@dataclasses.dataclass(frozen=True)
class ExtremeEigenvalues:
    """The two ends of a positive semi-definite spectrum.

    Attributes
    ----------
    smallest, largest : eigenvalues. From Lanczos `smallest` is an upper bound of the smallest and `largest` a lower
        bound of the largest one.
    smallest_error, largest_error : within this distance there is an eigenvalue (0 when dense).
    resolution : eigenvalues below this are rounding: n eps lambda_max of a matrix, sqrt(n) eps lambda_max of products.
    regime, products : as in `SpectralEstimate`.
    """

    smallest: Any
    largest: Any
    smallest_error: Any
    largest_error: Any
    resolution: Any
    regime: str
    products: int

    @property
    def resolved(self) -> Any:
        """Whether the smallest eigenvalue stands out of rounding."""
        return self.smallest > self.resolution

    def __repr__(self):
        def side(value, error, sign):
            if self.regime == "dense":
                return f"{value:.6g}"
            return f"{sign} {value:.6g} (residual {error:.1g})"

        if np.ndim(self.largest):
            return f"ExtremeEigenvalues(batch {np.shape(self.largest)}, {self.regime})"
        low = side(self.smallest, self.smallest_error, "<=") if self.resolved else f"below {self.resolution:.2g}"
        how = self.regime if self.regime == "dense" else f"{self.regime}, {self.products} products"
        return f"ExtremeEigenvalues({low} ... {side(self.largest, self.largest_error, '>=')}, {how})"


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalue distribution of an n x n kernel as weighted points.

    Attributes
    ----------
    nodes, weights : (probes, points); the weights of each probe sum to 1. Dense: one row, every eigenvalue with 1/n.
    n : size of the kernel.
    regime, products : as in `SpectralEstimate`.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    regime: str
    products: int

    def __repr__(self):
        low, high = self.nodes.min(), self.nodes.max()
        return f"SpectralDensity(n = {self.n}, nodes from {low:.3g} to {high:.3g}, {self.regime})"

    def mean_of(self, function: Any) -> tuple[Any, Any]:
        """Mean of `function` over the eigenvalues, tr f(K) / n, and its standard error over probes (0 when dense).

        `function` maps an array of eigenvalues to one of the same shape, with any further axes in front.
        """
        values = (function(self.nodes) * self.weights).sum(-1)  # (..., probes)
        probes = len(self.nodes)
        error = values.std(-1, ddof=1) / np.sqrt(probes) if probes > 1 else np.zeros(values.shape[:-1])
        return values.mean(-1), error

    def cumulative(self, at: Any) -> tuple[Any, Any]:
        """Share of eigenvalues <= `at` (any shape), and its standard error over probes."""
        return self.mean_of(lambda nodes: np.where(nodes <= np.asarray(at)[..., None, None], 1.0, 0.0))

    def density(self, at: Any, width: float) -> tuple[Any, Any]:
        """Density of the decimal logarithm of the eigenvalues, smoothed by a Gaussian of `width` decades.

        Eigenvalues at or below zero (rounding) count at minus infinity: the integral is the share above zero.
        """
        at = np.log10(np.asarray(at, np.float64))[..., None, None]

        def bump(nodes):
            positive = nodes > 0
            distance = (at - np.log10(np.where(positive, nodes, 1.0))) / width
            return np.where(positive, np.exp(-(distance**2) / 2) / (width * np.sqrt(2 * np.pi)), 0.0)

        return self.mean_of(bump)

    def plot(self, ax: Any = None, width: float = 0.1) -> Any:
        """Draw the density over decades of the eigenvalue, with its standard error; returns the matplotlib axes."""
        if ax is None:
            from initjax.drawing import blank_figure

            ax = blank_figure(6, 3.5).add_subplot()
        positive = self.nodes[self.nodes > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        at = np.geomspace(low / 10 ** (3 * width), high * 10 ** (3 * width), 400)
        density, error = self.density(at, width)
        ax.plot(at, density)
        ax.fill_between(at, density - 2 * error, density + 2 * error, alpha=0.3, linewidth=0)
        ax.set(xscale="log", xlabel="eigenvalue", ylabel="density per decade", title=f"n = {self.n}, {self.regime}")
        return ax
