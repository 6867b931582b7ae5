"""What the demonstration found, as numbers, as a table and as JSON."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from initjax.demo.verdict import Estimate, Outcome, verdict


class Series(NamedTuple):
    """Means over seeds and their standard errors, along layers or steps.

    Attributes
    ----------
    mean, standard_error : arrays of one shape.
    """

    mean: np.ndarray
    standard_error: np.ndarray

    @classmethod
    def over(cls, samples: Any, axis: int = 0) -> "Series":
        """Mean and standard error of the mean along `axis`; one sample has no error and gives nan."""
        samples = np.asarray(samples, np.float64)
        n = samples.shape[axis]
        error = samples.std(axis, ddof=1) / np.sqrt(n) if n > 1 else np.full_like(samples.mean(axis), np.nan)
        return cls(samples.mean(axis), error)

    def at(self, index: int) -> Estimate:
        """One entry."""
        return Estimate(float(self.mean[index]), float(self.standard_error[index]))


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Theory at infinite width, computed before training.

    Attributes
    ----------
    phase : "ordered", "critical" or "chaotic".
    chi : gradient gain per layer at the fixed point.
    xi_grad, xi_c : depth scales of gradients (negative: exploding) and of correlations, in layers.
    q : pre-activation second moment of layers 1 to depth.
    gradient : second moment of the gradient of layer l relative to the last layer, layers 1 to depth.
    ntk_condition_number : of the tangent kernel on the subset of training images.
    trainable : whether this depth should learn.
    """

    phase: str
    chi: float
    xi_grad: float
    xi_c: float
    q: np.ndarray
    gradient: np.ndarray
    ntk_condition_number: float
    trainable: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """The same at finite width, over random draws of the network.

    Attributes
    ----------
    q : pre-activation second moment of layers 1 to depth.
    log10_gradient : decimal logarithm of the gradient second moment relative to the last layer.
    log10_ntk_condition_number : decimal logarithm of the condition number of the empirical tangent kernel.

    Ratios over many layers are products of random factors, so their logarithm is what has a mean and an error.
    """

    q: Series
    log10_gradient: Series
    log10_ntk_condition_number: Estimate


@dataclasses.dataclass(frozen=True)
class Line:
    """All about one initialization. `curve` is the test accuracy during training at the common learning rate."""

    name: str
    sigma_w: float
    sigma_b: float
    predicted: Predicted
    measured: Measured
    curve: Series
    best_accuracy: float

    def outcome(self) -> Outcome:
        """What the verdict needs to know."""
        return Outcome(
            name=self.name,
            trainable=self.predicted.trainable,
            accuracy=self.curve.at(-1),
            best_accuracy=self.best_accuracy,
            gradient_ratio=float(self.predicted.gradient[0]),
            measured_log10_gradient_ratio=self.measured.log10_gradient.at(0),
            condition_number=self.predicted.ntk_condition_number,
            measured_log10_condition_number=self.measured.log10_ntk_condition_number,
        )


@dataclasses.dataclass(frozen=True)
class Diagram:
    """The phase diagram behind the four points; grids are indexed [sigma_w, sigma_b].

    Attributes
    ----------
    sigma_w, sigma_b : the axes.
    excess : depth over the depth at which training should stop, negative in the ordered phase; -1 to 1 is trainable.
    critical_line : sigma_w on the edge of chaos for each sigma_b.
    """

    sigma_w: np.ndarray
    sigma_b: np.ndarray
    excess: np.ndarray
    critical_line: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """The whole demonstration.

    Attributes
    ----------
    config : the sizes it was run at.
    lines : one for each initialization.
    diagram : the plane in which they lie.
    steps : optimizer steps at which the accuracy was taken.
    chance : accuracy of always guessing the most frequent class of the test set.
    seconds : wall time.
    """

    config: Any
    lines: tuple[Line, ...]
    diagram: Diagram
    steps: np.ndarray
    chance: float
    seconds: float

    @property
    def verdict(self) -> str:
        """One sentence computed from the numbers."""
        outcomes = [line.outcome() for line in self.lines]
        return verdict(outcomes, depth=self.config.depth, steps=int(self.steps[-1]), chance=self.chance)

    def to_dict(self) -> dict:
        """Everything as dicts, lists, numbers and strings; infinities stay floats."""
        data = dataclasses.asdict(self)
        data["lines"] = [_named_tuples_to_dicts(dataclasses.asdict(line)) for line in self.lines]
        return {"command": "demo", "verdict": self.verdict, **data}

    def table(self) -> Any:
        """The table of predictions, measurements and accuracies, for rich to print."""
        from rich import box
        from rich.table import Table

        config = self.config
        rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
        table = Table(
            title=f"tanh network, depth {config.depth}, width {config.width}, on handwritten digits",
            caption=f"measured: mean and standard error of {config.draws} networks (×÷: error as a factor)\n"
            f"accuracy: {config.seeds} networks, learning rate {config.learning_rate:g}; tried: {rates}",
            box=box.SIMPLE_HEAVY,
            pad_edge=False,
            padding=(0, 1),
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("", no_wrap=True)
        for line in self.lines:
            table.add_column(line.name, justify="right", no_wrap=True)
        for title, cell in _ROWS:
            table.add_row(title, *(cell(line) for line in self.lines), end_section=title in _LAST_OF_SECTION)
        table.add_row("test accuracy %", *(_percent(line.curve.at(-1)) for line in self.lines))
        if len(config.learning_rates) > 1:
            table.add_row("  at best rate", *(f"{100 * line.best_accuracy:.1f}" for line in self.lines))
        return table


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}±{100 * estimate.standard_error:.1f}"


def _plain(value: float) -> str:
    return "inf" if np.isinf(value) else f"{value:.3g}"


def _power(estimate: Estimate) -> str:
    """A quantity measured by its decimal logarithm, with the error as a factor."""
    if not np.isfinite(estimate.mean):
        return "inf" if estimate.mean > 0 else "0"
    return f"{_short(10**estimate.mean)} ×÷{10**estimate.standard_error:.2g}"


def _short(value: float) -> str:
    """Two digits, and the exponent without its zeros, so that four columns fit a terminal."""
    mantissa, e, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _absolute(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g}±{estimate.standard_error:.1g}"


_ROWS = (
    ("sigma_w", lambda line: f"{line.sigma_w:.4g}"),
    ("sigma_b", lambda line: f"{line.sigma_b:.4g}"),
    ("phase", lambda line: line.predicted.phase),
    ("chi per layer", lambda line: f"{line.predicted.chi:.4f}"),
    ("depth scale", lambda line: _plain(min(abs(line.predicted.xi_grad), line.predicted.xi_c))),
    ("should train?", lambda line: "yes" if line.predicted.trainable else "no"),
    ("q at last layer", lambda line: _plain(line.predicted.q[-1])),
    ("  measured", lambda line: _absolute(line.measured.q.at(-1))),
    ("grad first/last", lambda line: _short(line.predicted.gradient[0])),
    ("   measured", lambda line: _power(line.measured.log10_gradient.at(0))),
    ("NTK condition", lambda line: _short(line.predicted.ntk_condition_number)),
    ("    measured", lambda line: _power(line.measured.log10_ntk_condition_number)),
)
_LAST_OF_SECTION = ("should train?", "    measured")


def _named_tuples_to_dicts(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _named_tuples_to_dicts(item) for key, item in value.items()}
    return value
