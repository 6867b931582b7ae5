"""What `measured_jacobian` returns: laws of squared singular values, their moments with errors, and a figure."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from initjax.drawing import blank_figure
from initjax.errors import InputError
from initjax.spectrum.bidiagonal import Bidiagonal

_BINS = 40


class Sample(NamedTuple):
    """One Jacobian: weighted points (probes, points) of the law of J J^T, its largest value and the bound on it."""

    nodes: np.ndarray
    weights: np.ndarray
    edge: float
    residual: float
    exact: bool

    @classmethod
    def dense(cls, rows: np.ndarray, n_out: int) -> "Sample":
        """From J or its transpose; where there are more outputs than inputs, the others have value 0."""
        if not np.all(np.isfinite(rows)):
            raise InputError(
                f"a Jacobian with {np.count_nonzero(~np.isfinite(rows))} entries that are NaN or infinite",
                "finite derivatives",
                "its singular values do not exist",
                "look for the layer where the signal or its gradient overflows (ij.inspect), or use float64 parameters",
            )
        values = np.linalg.svd(rows, compute_uv=False) ** 2
        values = np.concatenate([values, np.zeros(n_out - len(values))])[::-1]
        return cls(values[None], np.full((1, n_out), 1 / n_out), float(values[-1]), 0.0, True)

    @classmethod
    def quadrature(cls, found: Bidiagonal) -> "Sample":
        """From Golub-Kahan, one row a probe; rows that ended early are filled up with weight 0."""
        probes, points = found.alpha.shape[1], len(found.alpha)
        nodes, weights = np.zeros((2, probes, points))
        edge, residual = 0.0, 0.0
        for probe in range(probes):
            values, bounds, shares = found.ritz(probe)
            nodes[probe, : len(values)], weights[probe, : len(values)] = values, shares
            if values[-1] >= edge:
                edge, residual = float(values[-1]), float(bounds[-1])
        return cls(nodes, weights, edge, residual, False)

    def resolved(self) -> np.ndarray:
        """Points without the lowest of a quadrature, which stands for all that its steps have not resolved."""
        return self.nodes if self.exact or self.nodes.shape[1] < 3 else self.nodes[:, 1:]

    def moments(self) -> tuple[float, float]:
        """Mean and variance of an eigenvalue, both without bias: products of means are of different probes."""
        first, second = ((self.weights * self.nodes**k).sum(1) for k in (1, 2))
        p = len(first)
        square = first[0] ** 2 if p == 1 else (first.sum() ** 2 - (first**2).sum()) / (p * (p - 1))
        return float(first.mean()), float(second.mean() - square)


@dataclasses.dataclass(frozen=True)
class MeasuredSpectrum:
    """Law of the eigenvalues of J J^T, squared singular values, over random networks.

    Attributes
    ----------
    name : the map, as its layers.
    mean, mean_error : normalised trace of J J^T, the squared Jacobian norm per output; mean over networks and its
        standard error (nan for one network).
    variance, variance_error : of the eigenvalues of one network, likewise.
    edge, edge_error : the largest eigenvalue, likewise; `edge_residual`: of quadratures, within that distance of a
        network's edge there is an eigenvalue (the edge itself is a lower bound).
    exact : whether every J was decomposed; else the numbers are quadratures from random probes.
    samples : of each network, weighted points of the law.
    """

    name: str
    mean: float
    mean_error: float
    variance: float
    variance_error: float
    edge: float
    edge_error: float
    edge_residual: float
    exact: bool
    samples: tuple[Sample, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, name: str, samples: tuple[Sample, ...]) -> "MeasuredSpectrum":
        """Moments over samples."""
        table = np.array([(*s.moments(), s.edge) for s in samples])
        error = table.std(0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else np.full(3, np.nan)
        (mean, variance, edge), (mean_error, variance_error, edge_error) = table.mean(0).tolist(), error.tolist()
        residual, exact = max(s.residual for s in samples), all(s.exact for s in samples)
        return cls(name, mean, mean_error, variance, variance_error, edge, edge_error, residual, exact, samples)

    def histogram(self, edges: Any) -> tuple[np.ndarray, np.ndarray]:
        """Share of the eigenvalues between each two neighbours of `edges`, and its standard error over networks."""
        edges = np.asarray(edges, np.float64)
        shares = []
        for sample in self.samples:
            counts, _ = np.histogram(sample.nodes, edges, weights=sample.weights / len(sample.nodes))
            shares.append(counts)
        shares = np.array(shares)
        error = shares.std(0, ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.full(shares.shape[1:], np.nan)
        return shares.mean(0), error

    def plot(self, theory: Any = None, ax: Any = None) -> Any:
        """Histogram of the logarithm of the eigenvalues, with the density of a `JacobianSpectrum` as a line over it.

        Returns
        -------
        The matplotlib axes. Needs matplotlib (extra "plots").
        """
        if ax is None:
            ax = blank_figure(6, 4).add_subplot()
        nodes = np.concatenate([s.resolved().ravel() for s in self.samples])
        nodes = nodes[nodes > 1e-12 * self.edge]
        if not nodes.size:
            raise InputError(
                f"the Jacobian of {self.name}, whose singular values all vanish",
                "a map with some positive singular value",
                "the histogram is of their logarithms",
                "look for the dead layer with ij.inspect",
            )
        top = max(s.edge for s in self.samples)
        low = nodes.min() if self.exact else max(s.resolved()[:, 0].max() for s in self.samples)
        edges = np.geomspace(max(low, 1e-6 * top) * (1 - 1e-9), top * (1 + 1e-9), _BINS + 1)
        if edges[0] > 0.9 * edges[-1]:  # isometric: one narrow bin says it
            edges = np.geomspace(0.5 * top, 2 * top, _BINS + 1)
        share, error = self.histogram(edges)
        width = np.diff(np.log(edges))
        middle = np.sqrt(edges[1:] * edges[:-1])
        ax.bar(edges[:-1], share / width, np.diff(edges), align="edge", color="#D55E00", alpha=0.45, label="measured")
        if np.all(np.isfinite(error)):
            ax.errorbar(middle, share / width, error / width, fmt="none", ecolor="#D55E00", elinewidth=0.8)
        if theory is not None:
            x, y = np.asarray(theory.eigenvalue), np.asarray(theory.eigenvalue) * np.asarray(theory.density)
            if x.ndim != 1:
                raise InputError(
                    f"a theory with spectra of shape {x.shape[:-1]}",
                    "one spectrum",
                    "one line is drawn over the histogram",
                    "compute ij.jacobian_spectrum for this network's sigma_w, sigma_b and depth",
                )
            seen = (y > 0) & (x > edges[0])
            ax.plot(x[seen], y[seen], color="#0072B2", linewidth=2, label="infinite width")
            ax.axvline(float(theory.edge), color="#0072B2", linewidth=0.8, linestyle=":")
            atoms = [
                f"{share:.2g} at {at}" for share, at in ((theory.zero, "0"), (theory.top, "the edge")) if share > 0
            ]
            if atoms:
                ax.annotate(f"theory: {', '.join(atoms)}", (0.02, 0.97), xycoords="axes fraction", va="top")
        ax.set(xscale="log", xlabel="squared singular value of J", ylabel="density of its logarithm")
        ax.set_title(f"{self.name}: {len(self.samples)} networks")
        ax.legend()
        return ax


@dataclasses.dataclass(frozen=True)
class MeasuredJacobian:
    """Spectra of a network's Jacobian; made by `measured_jacobian`.

    Attributes
    ----------
    whole : of the map that was asked for.
    blocks : of every block, in order, named after the layers within; their Jacobians multiply to that of the network.
    """

    whole: MeasuredSpectrum
    blocks: tuple[MeasuredSpectrum, ...] = ()

    def __repr__(self):
        lines = [f"{'map':32}  {'mean':>20}  {'variance':>20}  {'largest':>20}"]
        for row in (self.whole, *self.blocks):
            numbers = ((row.mean, row.mean_error), (row.variance, row.variance_error), (row.edge, row.edge_error))
            lines.append(f"{row.name:32}  " + "  ".join(f"{f'{v:.4g} +- {e:.1g}':>20}" for v, e in numbers))
        return "\n".join(lines)

    def plot(self, theory: Any = None, ax: Any = None) -> Any:
        """Draw the whole map's histogram, theory (a `JacobianSpectrum`) as a line over it; returns the axes."""
        return self.whole.plot(theory, ax)
