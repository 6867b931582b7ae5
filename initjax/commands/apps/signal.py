"""`initjax app signal 256 64 64`: what widths do to signals and gradients."""

from pathlib import Path

import click

from initjax.commands.output import collected_warnings, output_options, save, show

NUMBERS = {
    "forward": "second moment of a unit, output over input",
    "forward_norm": "squared norm, output over input: mean",
    "typical": "squared norm, output over input: exp of the mean logarithm",
    "backward": "second moment of a gradient entry, input over output",
    "backward_norm": "squared norm of the gradient, input over output",
    "log_variance": "variance of the logarithm of the squared norm",
    "fluctuation": "depth over width: beyond about 1 the mean describes no network",
}


@click.command(name="signal", short_help="Gains of linear and Xavier networks of given widths.")
@click.argument("widths", nargs=-1, type=click.IntRange(1), required=True)
@click.option("--std", type=float, help="Standard deviation of the weights; without it, Xavier's for each layer.")
@click.option("--phi", help="Activation between the layers, for the Xavier report.")
@output_options
def command(widths: tuple[int, ...], std: float | None, phi: str | None, as_json: bool, out: Path | None) -> None:
    """Gains of a network with WIDTHS n_0 ... n_L (input, hidden, output): linear exactly, Xavier layer by layer."""
    import dataclasses

    from initjax.applications import signal
    from initjax.commands import lookup

    activation = lookup.activation(phi) if phi else None
    with collected_warnings() as notes:
        xavier = signal.xavier_report(list(widths), activation)
        gain = signal.linear_gain(xavier.std if std is None else std, list(widths))
    data = {
        "command": "app signal",
        "widths": widths,
        "std": xavier.std if std is None else std,
        "linear": dataclasses.asdict(gain),
        "phi": phi or "linear",
        "xavier": dataclasses.asdict(xavier),
    }
    saved = save(out, "signal", data) if out else []
    show(data, [] if as_json else _tables(gain, xavier, std, phi), as_json=as_json, saved=saved, notes=notes)


def _tables(gain, xavier, std: float | None, phi: str | None) -> list:
    from rich.table import Table

    weights = "Xavier weights" if std is None else f"weights of standard deviation {std:g}"
    linear = Table(title=f"Linear network, {weights}", title_justify="left")
    for heading in ("quantity", "value", "meaning"):
        linear.add_column(heading, justify="right" if heading == "value" else "left")
    for name, meaning in NUMBERS.items():
        linear.add_row(name, f"{float(getattr(gain, name)):.6g}", meaning)
    layers = Table(title=f"Xavier, layer by layer, {phi or 'linear'} between the layers", title_justify="left")
    for heading in ("layer", "fan_in", "fan_out", "std", "forward", "backward", "q", "gradient"):
        layers.add_column(heading, justify="right")
    columns = (xavier.std, xavier.forward, xavier.backward, xavier.q, xavier.gradient)
    for i, row in enumerate(zip(xavier.fan_in, xavier.fan_out, *columns, strict=True)):
        layers.add_row(str(i + 1), str(row[0]), str(row[1]), *(f"{value:.5g}" for value in row[2:]))
    return [linear, layers]
