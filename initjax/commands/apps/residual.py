"""`initjax app residual module.path:model`: what skip connections do to signals and gradients."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options


@click.command(name="residual", short_help="Growth by skip connections, and zero branches.")
@click.argument("path", metavar="module.path:Model")
@data_options(least=1)
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Random networks to measure.")
@output_options
def command(
    path: str, data: str, examples: int, shape: str | None, seeds: int, as_json: bool, out: Path | None
) -> None:
    """How the residual blocks of a model make signals and gradients grow, and what zero branches leave silent."""
    import dataclasses

    import jax

    from initjax.applications import residual
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    with collected_warnings() as notes:
        found = residual.report(model, inputs, key=jax.random.key(0), seeds=seeds)
    rows = [
        ("growth", found.growth, f"of the second moment, product of 1 + alpha^2 over {len(found.blocks)} blocks"),
        ("growth, measured", found.growth_measured[0], f"+- {found.growth_measured[1]:.2g}"),
        ("of gradients", found.gradient_growth_measured[0], f"+- {found.gradient_growth_measured[1]:.2g}, backwards"),
        ("identity", "yes" if found.identity_trunk else "no", "whether the blocks together do nothing"),
        ("silent", str(len(found.silent)), ", ".join(found.silent[:6])),
    ]
    answer = {"model": path, **dataclasses.asdict(found)}
    tell("residual", f"Residual blocks of {path}", answer, rows, as_json, out, notes)
