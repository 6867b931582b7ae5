"""`initjax app optimism --r-max 1 --gamma 0.99 --variance 0.01`: the readout bias that keeps Q above every value."""

from pathlib import Path

import click

from initjax.commands.output import collected_warnings, output_options, save, show


@click.command(name="optimism", short_help="The readout bias that keeps Q above every possible value.")
@click.option("--v-max", type=float, help="Largest value of a policy; or give --r-max and --gamma.")
@click.option("--r-max", type=float, help="Largest reward.")
@click.option("--gamma", type=float, help="Discount.")
@click.option("--variance", type=float, required=True, help="Largest variance of Q over initializations.")
@click.option("--confidence", type=float, default=0.99, show_default=True, help="Probability of Q >= V_max.")
@output_options
def command(v_max, r_max, gamma, variance, confidence, as_json: bool, out: Path | None) -> None:
    """The bias b0 = V_max + z sqrt(variance) of an optimistic Q network."""
    from rich.table import Table

    from initjax.applications import rl

    with collected_warnings() as notes:
        found = rl.optimistic_bias(v_max, variance=variance, confidence=confidence, r_max=r_max, gamma=gamma)
    data = {"command": "app optimism", "bias": found.bias, "z": found.z, "v_max": found.v_max, "variance": variance}
    saved = save(out, "optimism", data) if out else []
    table = Table(title="Optimistic readout bias", title_justify="left")
    for heading in ("b0", "V_max", "z"):
        table.add_column(heading, justify="right")
    table.add_row(f"{found.bias:.6g}", f"{found.v_max:.6g}", f"{found.z:.4f}")
    show(data, [table], as_json=as_json, saved=saved, notes=notes)
