"""`initjax app heads features.npy --classes 10`: the scale of a new head on frozen features."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.data import inputs_from
from initjax.commands.output import collected_warnings, output_options


@click.command(name="heads", short_help="Scale, first loss and gradient of a head on features.")
@click.argument("features", metavar="FEATURES.npy")
@click.option("--classes", type=click.IntRange(1), required=True, help="Number of outputs.")
@click.option("--examples", type=click.IntRange(2), default=1024, show_default=True, help="How many examples to use.")
@click.option("--variance", type=float, default=0.01, show_default=True, help="Mean square of the matched logits.")
@output_options
def command(features: str, classes: int, examples: int, variance: float, as_json: bool, out: Path | None) -> None:
    """Xavier's scale and the matched one for a head on frozen features, (examples, features) in a .npy file."""
    import dataclasses

    from initjax.applications import heads

    h = inputs_from(features, examples, None)
    with collected_warnings() as notes:
        found = {
            scheme: heads.transfer(h, classes, scheme=scheme, variance=variance) for scheme in ("xavier", "matched")
        }
    rows, data = [], {}
    for scheme, one in found.items():
        rows.append((f"{scheme}: std", one.std, "standard deviation of the kernel's entries"))
        rows.append((f"{scheme}: logits", one.logit_second_moment, "second moment of a logit"))
        rows.append((f"{scheme}: first loss", one.initial_loss, "cross-entropy before training"))
        data[scheme] = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "head"}
    rate = found["matched"].max_rate_softmax
    rows.append(("learning rate", rate, "largest stable one of the head alone, softmax at uniform"))
    tell("heads", f"A head with {classes} outputs", {"features": features, **data}, rows, as_json, out, notes)
