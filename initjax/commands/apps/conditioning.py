"""`initjax app conditioning tanh --sigma-w 1.3`: condition numbers of NNGP and NTK by depth."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.output import collected_warnings, output_options


@click.command(name="conditioning", short_help="Condition numbers of NNGP and NTK by depth.")
@click.argument("phi")
@click.option("--sigma-w", type=float, help="Weight scale; without it, the critical one.")
@click.option("--sigma-b", type=float, default=0.0, show_default=True, help="Bias standard deviation.")
@click.option("--depth", type=click.IntRange(1), default=64, show_default=True, help="Weight layers.")
@click.option("--inputs", type=click.IntRange(2), default=10, show_default=True, help="How many inputs.")
@click.option("--positions", type=click.IntRange(1), help="Positions behind a global average; without it, none.")
@click.option("--correlation", type=float, default=0.5, show_default=True, help="Of two inputs, in the first layer.")
@output_options
def command(
    phi: str,
    sigma_w: float | None,
    sigma_b: float,
    depth: int,
    inputs: int,
    positions: int | None,
    correlation: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """How the condition numbers of NNGP and tangent kernel change with depth, and to what they tend."""
    import math

    from initjax import meanfield
    from initjax.applications import conditioning
    from initjax.commands import lookup

    activation = lookup.activation(phi)
    readout = {} if positions is None else {"architecture": "pooled", "positions": positions}
    with collected_warnings() as notes:
        scale = float(meanfield.critical(activation, sigma_b).sigma_w) if sigma_w is None else sigma_w
        found = conditioning.by_depth(
            activation, scale, sigma_b, depth=depth, n=inputs, correlation=correlation, **readout
        )
    rows: list = [("phase", found.phase, f"chi = {found.chi:.6g} at sigma_w = {scale:.6g}")]
    shown = sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, depth})
    for layer in (layer for layer in shown if layer <= depth):
        nngp, ntk = (log[layer - 1] / math.log(10) for log in (found.log_nngp, found.log_ntk))
        rows.append((f"depth {layer}", f"{ntk:.4f}", f"log10 of the NTK's condition number; of the NNGP's {nngp:.4f}"))
    rows.append(("limit", found.ntk_law.limit, f"of the NTK's; of the NNGP's {found.nngp_law.limit:.6g}"))
    data = {
        "phi": phi,
        "sigma_w": scale,
        "sigma_b": sigma_b,
        "phase": found.phase,
        "chi": found.chi,
        "depth": found.depth,
        "log_nngp": found.log_nngp,
        "log_ntk": found.log_ntk,
        "nngp_law": found.nngp_law._asdict(),
        "ntk_law": found.ntk_law._asdict(),
    }
    tell("conditioning", f"Conditioning of {phi}, {inputs} inputs", data, rows, as_json, out, notes)
