"""`initjax app input-scale module.path:model --learning-rate 1e-3`: how large the inputs may be."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options


@click.command(name="input-scale", short_help="The input scale at which an update becomes catastrophic.")
@click.argument("path", metavar="module.path:Model")
@click.option("--learning-rate", type=float, required=True, help="Of gradient descent on 1/(2N) sum (f - y)^2.")
@click.option(
    "--criterion", type=click.Choice(["stability", "relative_update"]), default="stability", show_default=True
)
@data_options(least=1)
@click.option("--networks", type=click.IntRange(0), default=8, show_default=True, help="For the scatter; 0: none.")
@output_options
def command(
    path: str,
    learning_rate: float,
    criterion: str,
    data: str,
    examples: int,
    shape: str | None,
    networks: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """The factor on the inputs at which a step of gradient descent overshoots, and the layer that fails first."""
    import dataclasses

    from initjax.applications import input_scale
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    with collected_warnings() as notes:
        found = input_scale.critical(model, inputs, learning_rate, criterion, networks=networks)
    rows = [
        ("critical", found.critical, "factor on these inputs at which a step overshoots"),
        ("divergence", found.divergence, "factor beyond which a wide network diverges for good"),
        ("margin", found.margin, "these inputs over the critical ones: below 1 is safe"),
        ("exponent", found.exponent, "growth of the largest eigenvalue with the scale: 2 for homogeneous networks"),
        ("fails first", found.layer, f"{found.layers[found.layer]:.3g} of it"),
    ]
    answer = {"model": path, "learning_rate": learning_rate, "criterion": criterion, **dataclasses.asdict(found)}
    tell("input-scale", f"Input scale of {path} at learning rate {learning_rate:g}", answer, rows, as_json, out, notes)
