"""The demonstration's figure: where the four initializations lie, what that does to signals, and how they train.

One colour and one marker for each initialization in every panel, from the palette of Okabe and Ito, which readers with
any colour vision can tell apart. Lines are theory, markers are measured at finite width.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from initjax.drawing import blank_figure

if TYPE_CHECKING:
    from initjax.demo.report import Report

STYLE = {
    "cold": ("#0072B2", "v"),
    "Xavier": ("#009E73", "s"),
    "critical": ("#000000", "o"),
    "hot": ("#D55E00", "^"),
}
LABELS = {"cold": (-4, 10), "Xavier": (-8, -20), "critical": (34, -4), "hot": (0, 10)}
ORDERED, TRAINABLE, CHAOTIC = "#DCE9F5", "#FFF3B8", "#F8DDD0"


def draw(report: "Report") -> Any:
    """Draw the report; returns a matplotlib figure, 16 x 5.4 inches."""
    figure = blank_figure(16, 5.4)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.25))
    _phase(figure.add_subplot(grid[:, 0]), report)
    upper = figure.add_subplot(grid[0, 1])
    lower = figure.add_subplot(grid[1, 1], sharex=upper)
    _signal(upper, lower, report)
    _training(figure.add_subplot(grid[:, 2]), report)
    config = report.config
    figure.suptitle(
        f"Which initialization of a {config.depth}-layer tanh network (width {config.width}) can be trained on "
        "handwritten digits?",
        fontsize=13,
    )
    return figure


def _phase(axes, report: "Report") -> None:
    """Panel a: the plane of initializations, with the band in which this depth is predicted to be trainable."""
    diagram, depth = report.diagram, report.config.depth
    axes.contourf(
        diagram.sigma_w,
        diagram.sigma_b,
        diagram.excess.T,
        levels=(-np.inf, -1, 1, np.inf),
        colors=(ORDERED, TRAINABLE, CHAOTIC),
    )
    axes.plot(diagram.critical_line, diagram.sigma_b, color="0.25", linewidth=1.5, linestyle="--")
    middle = int(0.55 * len(diagram.sigma_b))
    axes.annotate(
        "edge of chaos\n$\\chi_1 = 1$",
        (diagram.critical_line[middle], diagram.sigma_b[middle]),
        xytext=(8, -14),
        textcoords="offset points",
        fontsize=9,
        color="0.25",
    )
    left, right, top = diagram.sigma_w[0], diagram.sigma_w[-1], diagram.sigma_b[-1]
    for place, text in ((0.15, "ordered\ngradients vanish"), (0.8, "chaotic\ngradients explode")):
        axes.text(left + place * (right - left), 0.97 * top, text, ha="center", va="top", fontsize=10)
    for line in report.lines:
        colour, marker = STYLE[line.name]
        axes.plot(line.sigma_w, line.sigma_b, marker, color=colour, markersize=10, markeredgecolor="white", zorder=5)
        # the three that lie close together get their names at different heights
        axes.annotate(
            line.name,
            (line.sigma_w, line.sigma_b),
            xytext=LABELS[line.name],
            textcoords="offset points",
            ha="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_xlabel("weight scale $\\sigma_w$    (Var $W = \\sigma_w^2$ / fan-in)")
    axes.set_ylabel("bias scale $\\sigma_b$    (Var $b = \\sigma_b^2$)")
    axes.set_title(f"a. Predicted: yellow = {depth} layers can be trained", loc="left")


def _signal(upper, lower, report: "Report") -> None:
    """Panel b: second moment forwards and gradients backwards, predicted lines under measured points."""
    layers = np.arange(1, report.config.depth + 1)
    for line in report.lines:
        colour, marker = STYLE[line.name]
        points = dict(fmt=marker, color=colour, markersize=4.5, elinewidth=1, capsize=2, linestyle="none")
        upper.plot(layers, line.predicted.q, color=colour, linewidth=1.2)
        shown = slice(0, None, max(1, len(layers) // 10))
        q = line.measured.q
        upper.errorbar(layers[shown], q.mean[shown], q.standard_error[shown], **points)
        lower.plot(layers, line.predicted.gradient, color=colour, linewidth=1.2)
        logs = line.measured.log10_gradient
        mean, low = 10**logs.mean, 10 ** (logs.mean - logs.standard_error)
        high = 10 ** (logs.mean + logs.standard_error)
        lower.errorbar(layers[shown], mean[shown], [(mean - low)[shown], (high - mean)[shown]], **points)
    upper.set_yscale("log")
    lower.set_yscale("log")
    upper.tick_params(labelbottom=False)
    upper.set_ylabel("signal $q$, second\nmoment of a unit")
    lower.set_ylabel("gradient second moment,\nrelative to the last layer")
    lower.set_xlabel("layer")
    upper.set_title(f"b. Line = predicted, points = measured, {report.config.draws} networks", loc="left")


def _training(axes, report: "Report") -> None:
    """Panel c: test accuracy during training at the common learning rate."""
    for line in report.lines:
        colour, marker = STYLE[line.name]
        mean, error = 100 * line.curve.mean, 100 * line.curve.standard_error
        axes.plot(report.steps, mean, marker=marker, markersize=4.5, color=colour, label=line.name)
        axes.fill_between(report.steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    chance = 100 * report.chance
    axes.axhline(chance, color="0.4", linestyle=":", linewidth=1.2)
    axes.text(report.steps[-1], chance + 1, "guessing", ha="right", va="bottom", color="0.4", fontsize=9)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"c. Training, all alike (SGD, learning rate {report.config.learning_rate:g})", loc="left")
    axes.legend(loc="center right", title="initialization")
