"""How an `Inspection` looks: as a table in a terminal, as a figure, and as one HTML file."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from initjax.drawing import blank_figure

if TYPE_CHECKING:
    from initjax.inspection import Inspection

THEORY, MEASURED = "#0072B2", "#D55E00"  # Okabe and Ito, told apart with any colour vision
SHOWN = 24  # layers in the table of a deep model; the middle is left out


def table(report: "Inspection") -> Any:
    """A rich group: the layers, the model as a whole, and what the theory refuses."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    layers = Table(
        title=f"Layers: predicted | measured (mean and standard error of {report.networks} networks, "
        f"{report.inputs} inputs)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    layers.add_column("layer", overflow="fold")
    for heading in ("q", "measured", "corr.", "measured", "chi", "gradient", "measured"):
        layers.add_column(heading, justify="right", no_wrap=True)
    for layer in _shortened(report.layers):
        if layer is None:
            layers.add_row("...", *[""] * 7)
            continue
        layers.add_row(
            Text(layer.name),
            _number(layer.q),
            _estimate(layer.q_measured),
            _number(layer.correlation),
            _estimate(layer.correlation_measured),
            _number(layer.chi),
            _number(layer.gradient),
            _estimate(layer.gradient_measured),
        )
    whole = Table(title="Model", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    whole.add_column("quantity")
    whole.add_column("predicted", justify="right")
    whole.add_column("measured", justify="right")
    whole.add_row("phase, as far as this depth tells", report.phase, "")
    for title, predicted, measured in whole_model(report):
        whole.add_row(title, _number(predicted), measured)
    parts: list[Any] = [layers, whole]
    if any(layer.q_std is not None for layer in report.layers):
        parts.append(_widths(report))
    if report.blocks:
        blocks = Table(title="Repeated blocks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("block", "count", "chi", "measured", "phase"):
            blocks.add_column(heading, justify="left" if heading == "block" else "right")
        for block in report.blocks:
            numbers = (_number(block.chi), _number(block.chi_measured))
            blocks.add_row(Text(block.name), str(block.count), *numbers, block.phase)
        parts.append(blocks)
    parts.extend(Text(f"Wrong fan: {line}\n") for line in report.wrong_fans)
    if report.particles:
        parts.append(Text(f"Predictions are estimates with {report.particles} particles (see kernel_fn).\n"))
    if report.refusal:
        parts.append(Text(f"No exact prediction for this model:\n{report.refusal}\n"))
    parts.extend(Text(f"Note: {note}\n") for note in _grouped(report.notes))
    return Group(*parts)


def summary(report: "Inspection") -> str:
    """A few lines of plain text."""
    size = f"{len(report.layers)} layers, {report.inputs} inputs, {report.networks} networks"
    parts = [f"Inspection ({size}): {report.phase}"]
    for title, predicted, measured in whole_model(report):
        parts.append(f"  {title}: {_number(predicted)} predicted, {measured} measured")
    if report.refusal:
        parts.append(f"  no exact prediction: {report.refusal.partition(chr(10))[0]}")
    return "\n".join([*parts, "  all of it: rich.print(report.table()), report.plot(), report.to_html(path)"])


def whole_model(report: "Inspection") -> tuple:
    """(quantity, prediction, measurement as text) of the model as a whole."""
    return (
        ("gradient, first / last layer", report.gradient_ratio, _power(report.gradient_ratio_measured)),
        ("NTK condition number", report.condition_number, _power(report.condition_number_measured)),
        ("largest stable learning rate", report.max_learning_rate, _estimate(report.max_learning_rate_measured)),
    )


def _widths(report: "Inspection") -> Any:
    """One standard deviation of q over networks, and the share of each layer's width in that of the last."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = Table(title="Spread over networks at these widths", title_justify="left", box=box.SIMPLE_HEAD)
    widths.add_column("layer", overflow="fold")
    for heading in ("std of q", "relative", "units", "share in the last"):
        widths.add_column(heading, justify="right")
    for layer in _shortened(report.layers):
        if layer is None:
            widths.add_row("...", *[""] * 4)
        elif layer.q_std is not None:
            share = "-" if layer.width_share is None else f"{100 * layer.width_share:.0f} %"
            relative = f"{100 * layer.q_std / layer.q:.1f} %"
            widths.add_row(Text(layer.name), _number(layer.q_std), relative, str(layer.units or "-"), share)
    return widths


def draw(report: "Inspection") -> Any:
    """A matplotlib figure with q, correlation and gradient over the layers."""
    figure = blank_figure(13, 4)
    panels = figure.subplots(1, 3)
    number = range(1, len(report.layers) + 1)
    for axes, name, label, log in (
        (panels[0], "q", "second moment of a pre-activation, q", True),
        (panels[1], "correlation", "correlation of two inputs", False),
        (panels[2], "gradient", "squared gradient of an output\nwith respect to the layer", True),
    ):
        theory = [(x, getattr(layer, name)) for x, layer in zip(number, report.layers, strict=True)]
        theory = [(x, y) for x, y in theory if y is not None]
        found = [(x, getattr(layer, f"{name}_measured")) for x, layer in zip(number, report.layers, strict=True)]
        found = [(x, y.mean, y.standard_error) for x, y in found if y is not None]
        spread = [
            (x, layer.q, layer.q_std) for x, layer in zip(number, report.layers, strict=True) if layer.q_std is not None
        ]
        if name == "q" and spread:
            x, q, std = zip(*spread, strict=True)
            bounds = [
                [v / (1 + s / v) for v, s in zip(q, std, strict=True)],
                [v + s for v, s in zip(q, std, strict=True)],
            ]
            axes.fill_between(x, *bounds, color=THEORY, alpha=0.2, linewidth=0, label="one network at this width")
        if theory:
            axes.plot(*zip(*theory, strict=True), color=THEORY, label="predicted, infinite width")
        if found:
            x, mean, error = zip(*found, strict=True)
            axes.errorbar(
                x, mean, error, fmt="o", markersize=4, capsize=2, color=MEASURED, label=f"{report.networks} networks"
            )
        if log and all(y > 0 for _, y, *_ in (*theory, *found)):
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    figure.suptitle(f"Initialization of the model: {report.phase}, predicted and measured on {report.inputs} inputs")
    return figure


def table_as_html(report: "Inspection") -> str:
    """The table as an HTML fragment."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(table(report))
    return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")


def write_html(report: "Inspection", path: Path) -> Path:
    """Write the table and the figure into one file that needs no other."""
    picture = io.BytesIO()
    draw(report).savefig(picture, format="png", dpi=110)
    encoded = base64.b64encode(picture.getvalue()).decode()
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>initjax: initialization report</title>"
        f"<body>{table_as_html(report)}<p><img alt='q, correlation and gradient over the layers' "
        f"src='data:image/png;base64,{encoded}'></p></body></html>\n",
        encoding="utf-8",
    )
    return path


def _shortened(layers: tuple) -> list:
    if len(layers) <= SHOWN:
        return list(layers)
    return [*layers[: SHOWN // 2], None, *layers[-SHOWN // 2 :]]


def _grouped(notes: tuple[str, ...]) -> list[str]:
    """Notes `place: text` with the same text become one, so that forty layers do not say one thing forty times."""
    places: dict[str, list[str]] = {}
    for note in notes:
        place, colon, text = note.partition(": ")
        places.setdefault(text if colon else note, []).append(place if colon else "")
    return [
        f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {text}" if where[0] else text
        for text, where in places.items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _estimate(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.3g}±{value.standard_error:.1g}"


def _power(value: Any) -> str:
    """An estimate of a decimal logarithm, its error as a factor."""
    if value is None:
        return "-"
    return f"{10**value.mean:.2g} ×÷{10**value.standard_error:.2g}"
