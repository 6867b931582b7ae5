"""`initjax inspect module.path:model --data digits`: one report on a Flax model as its author wrote it."""

from pathlib import Path

import click

from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options, save, show


@click.command(name="inspect", short_help="One report on a Flax model as you wrote it.")
@click.argument("path", metavar="module.path:Model")
@data_options()
@click.option("--seeds", type=click.IntRange(2), default=8, show_default=True, help="Random networks to measure.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random networks.")
@output_options
def command(
    path: str, data: str, examples: int, shape: str | None, seeds: int, seed: int, as_json: bool, out: Path | None
) -> None:
    """What the initialization of a model will do: predicted at infinite width, measured at its own.

    The model is an instance of a linen or nnx module, a factory `lambda rngs: Model(rngs=rngs)`, or a pair
    (init_fn, apply_fn); module.path is imported from the current folder or from the installed packages.
    """
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    import jax

    from initjax import inspection

    with collected_warnings() as notes:
        report = inspection.inspect(model, inputs, key=jax.random.key(seed), seeds=seeds)
    answer = {"command": "inspect", "model": path, "data": data, **report.to_dict()}
    saved = []
    if out:
        saved = save(out, "inspect", answer, report.plot())
        saved.append(report.to_html(out / "inspect.html"))
    show(answer, [] if as_json else [report.table()], as_json=as_json, saved=saved, notes=notes)
