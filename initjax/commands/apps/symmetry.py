"""`initjax app symmetry module.path:model`: units that start as copies of each other."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options


@click.command(name="symmetry", short_help="Units that start as copies of each other, layers without gradient.")
@click.argument("path", metavar="module.path:Model")
@data_options(least=1)
@output_options
def command(path: str, data: str, examples: int, shape: str | None, as_json: bool, out: Path | None) -> None:
    """Which units of a model start as copies of each other, and which layers have no gradient in the first step."""
    import dataclasses

    from initjax.applications import symmetry
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    with collected_warnings() as notes:
        found = symmetry.report(model, inputs)
    rows = []
    for layer in found.layers:
        trouble = [text for told, text in ((layer.flagged, "COPIES"), (layer.dead, "no gradient at step 0")) if told]
        tell_rank = f"stable rank {layer.stable_rank:.3g}"
        rows.append((layer.name, f"{layer.effective_width} of {layer.units}", ", ".join([tell_rank, *trouble])))
    tell(
        "symmetry", f"Distinct units of {path}", {"model": path, **dataclasses.asdict(found)}, rows, as_json, out, notes
    )
