"""`initjax phase PHI`: the map of ordered and chaotic initializations, or one point of it."""

from pathlib import Path

import click

from initjax.commands.output import collected_warnings, output_options, save, show
from initjax.drawing import blank_figure
from initjax.errors import InputError

# one letter a cell in the terminal's map
LETTERS = {"ordered": "o", "critical": "|", "chaotic": "#", "unbounded": "^"}


class _Span(click.ParamType):
    """One number, or a range `low:high`."""

    name = "number or low:high"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(":"))
        except ValueError:
            self.fail(f"{value!r} is neither a number nor low:high.", param, ctx)
        if len(numbers) > 2 or any(not 0 <= number < float("inf") for number in numbers):
            self.fail(f"{value!r}: a standard deviation is a finite number >= 0, a range has one colon.", param, ctx)
        if len(numbers) == 2 and not numbers[0] < numbers[1]:
            self.fail(f"{value!r}: the range must rise.", param, ctx)
        return numbers


@click.command(name="phase", short_help="Ordered, critical or chaotic: the map, or one point of it.")
@click.argument("phi")
@click.option("--sigma-w", type=_Span(), default="0.5:3", show_default=True, help="Weight scale, or a range low:high.")
@click.option("--sigma-b", type=_Span(), default="0:1", show_default=True, help="Bias scale, or a range low:high.")
@click.option(
    "--points", type=click.IntRange(2, 2000), default=101, show_default=True, help="Grid points on each axis."
)
@output_options
def command(phi: str, sigma_w: tuple, sigma_b: tuple, points: int, as_json: bool, out: Path | None) -> None:
    """Ordered, critical or chaotic: what deep networks with PHI do at each weight and bias scale.

    With two ranges this is the phase diagram. With one number for each of --sigma-w and --sigma-b it is that point:
    its fixed points, its gradient gain chi_1 and its depth scales in layers.

    PHI is a name in jax.nn or jax.numpy, erf, gelu_exact, or module.path:function.
    """
    from initjax.commands import lookup

    activation = lookup.activation(phi)
    if len(sigma_w) == len(sigma_b) == 1:
        _one_point(activation, phi, sigma_w[0], sigma_b[0], as_json, out)
    elif len(sigma_w) == len(sigma_b) == 2:
        _diagram(activation, phi, sigma_w, sigma_b, points, as_json, out)
    else:
        raise InputError(
            given="one number and one range for --sigma-w and --sigma-b.",
            accepted="two numbers (one point of the diagram) or two ranges low:high (the diagram).",
            why="a diagram has two axes.",
            remedy="initjax phase tanh --sigma-w 1.5 --sigma-b 0.05",
        )


def _one_point(activation, phi: str, sigma_w: float, sigma_b: float, as_json: bool, out: Path | None) -> None:
    from initjax import meanfield

    with collected_warnings() as notes:
        point = meanfield.fixed_point(activation, sigma_w, sigma_b)
    numbers = {name: float(getattr(point, name)) for name in POINT_FIELDS}
    data = {
        "command": "phase",
        "phi": phi,
        "sigma_w": sigma_w,
        "sigma_b": sigma_b,
        "phase": str(point.phase),
        **numbers,
    }
    saved = save(out, "phase", data, _draw_point(activation, phi, data)) if out else []
    tables = []
    if not as_json:
        from rich.table import Table

        table = Table(title=f"{phi} at sigma_w = {sigma_w:g}, sigma_b = {sigma_b:g}: {data['phase']}")
        table.add_column("quantity")
        table.add_column("value", justify="right")
        table.add_column("meaning")
        for name, meaning in POINT_FIELDS.items():
            table.add_row(name, f"{numbers[name]:.8g}", meaning)
        tables.append(table)
    show(data, tables, as_json=as_json, saved=saved, notes=notes)


POINT_FIELDS = {
    "q": "second moment of a pre-activation, deep in the network",
    "c": "correlation of two inputs, deep in the network",
    "chi_1": "gradient gain per layer (second moment): < 1 vanishing, > 1 exploding",
    "chi_q": "slope of the variance map at q: below 1 in size, q is reached",
    "chi_c": "slope of the correlation map at c",
    "xi_q": "layers over which the second moment settles",
    "xi_c": "layers over which correlations, and with them inputs, are forgotten",
    "xi_grad": "layers over which gradients change e-fold: positive vanishing, negative exploding",
}


def _diagram(activation, phi: str, sigma_w, sigma_b, points: int, as_json: bool, out: Path | None) -> None:
    import numpy as np

    from initjax import meanfield

    weights, biases = (np.linspace(low, high, points) for low, high in (sigma_w, sigma_b))
    with collected_warnings() as notes:
        diagram = meanfield.phase_diagram(activation, weights, biases)
    phase = np.asarray(diagram.phase)
    line = dict(zip(("sigma_w", "sigma_b", "stable"), np.asarray(diagram.critical_line).T, strict=True))
    data = {
        "command": "phase",
        "phi": phi,
        "sigma_w": weights,
        "sigma_b": biases,
        "axes": "arrays are indexed [sigma_w, sigma_b]",
        "phase": phase,
        "critical_line": line,
        **{name: getattr(diagram, name) for name in ("q", "c", "chi_1", "xi_q", "xi_c")},
    }
    saved = []
    if out:
        drawing = blank_figure(6.4, 4.4)
        diagram.plot(ax=drawing.subplots())
        saved = save(out, "phase", data, drawing)
    tables = [] if as_json else [_map(phi, phase, weights, biases), _line_table(phi, line)]
    show(data, tables, as_json=as_json, saved=saved, notes=notes)


def _map(phi: str, phase, sigma_w, sigma_b):
    """The diagram in letters, sigma_w to the right and sigma_b upwards, coarse enough for a terminal."""
    import numpy as np
    from rich.text import Text

    columns = np.linspace(0, len(sigma_w) - 1, min(60, len(sigma_w))).astype(int)
    rows = np.linspace(len(sigma_b) - 1, 0, min(16, len(sigma_b))).astype(int)
    colours = {"ordered": "blue", "critical": "bold", "chaotic": "red", "unbounded": "magenta"}
    text = Text(f"Phases of {phi}, sigma_b upwards, sigma_w to the right\n")
    for row in rows:
        text.append(f"{sigma_b[row]:6.3g} ")
        for column in columns:
            name = str(phase[column, row])
            text.append(LETTERS.get(name, "?"), style=colours.get(name, ""))
        text.append("\n")
    text.append(f"{'':7}{sigma_w[0]:<{max(1, len(columns) - 6)}.3g}{sigma_w[-1]:>6.3g}\n")
    shown = [name for name in LETTERS if (phase == name).any()]
    text.append("   ".join(f"{LETTERS[name]} {name}" for name in shown))
    return text


def _line_table(phi: str, line: dict):
    import numpy as np
    from rich.table import Table

    table = Table(title=f"Edge of chaos of {phi}: chi_1 = 1", title_justify="left")
    table.add_column("sigma_b", justify="right")
    table.add_column("critical sigma_w", justify="right")
    table.add_column("stable")
    for index in np.unique(np.linspace(0, len(line["sigma_b"]) - 1, 6).astype(int)):
        sigma_w, sigma_b, stable = (line[name][index] for name in ("sigma_w", "sigma_b", "stable"))
        if np.isfinite(sigma_w):
            table.add_row(f"{sigma_b:.4g}", f"{sigma_w:.8g}", "yes" if stable else "no")
        else:
            table.add_row(f"{sigma_b:.4g}", "none", "")
    return table


def _draw_point(activation, phi: str, data: dict):
    """How the second moment and the correlation of two inputs move from layer to layer at this point."""
    import numpy as np

    from initjax import meanfield

    depth = 50
    path = meanfield.propagate(activation, data["sigma_w"], data["sigma_b"], depth)
    drawing = blank_figure(9, 3.8)
    left, right = drawing.subplots(1, 2)
    layers = np.arange(depth + 1)
    left.plot(layers, np.asarray(path.q), color="#0072B2")
    left.set_ylabel("second moment of a pre-activation, q")
    right.plot(layers, np.asarray(path.c), color="#D55E00")
    right.set_ylabel("correlation of two inputs, c")
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.set_xlabel("layer")
    drawing.suptitle(f"{phi}, sigma_w = {data['sigma_w']:g}, sigma_b = {data['sigma_b']:g}: {data['phase']}")
    return drawing
