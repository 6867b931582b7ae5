"""`initjax trainability module.path:model --data digits`: will it train at this depth, at which rate, how fast?"""

from pathlib import Path

import click

from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options, save, show


@click.command(name="trainability", short_help="Forecast of a Flax model: depth, learning rate, time.")
@click.argument("path", metavar="module.path:Model")
@data_options()
@click.option("--learning-rate", type=float, help="Of gradient descent; half the largest stable one if left out.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random networks.")
@output_options
def command(
    path: str,
    data: str,
    examples: int,
    shape: str | None,
    learning_rate: float | None,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Maximum trainable depth, largest stable learning rate and time of the slowest kept mode of a Flax model.

    Each number stands beside what it assumes and how often that has been found to hold. The model is named as in
    `initjax inspect`.
    """
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    import jax

    from initjax import forecast

    with collected_warnings() as notes:
        found = forecast.trainability(model, inputs, learning_rate=learning_rate, key=jax.random.key(seed))
    answer = {"command": "trainability", "model": path, "data": data, **found.to_dict()}
    saved = save(out, "trainability", answer) if out else []
    show(answer, [] if as_json else [found.table()], as_json=as_json, saved=saved, notes=notes)
