"""`initjax app recurrent tanh --input-variance 0.25`: the critical recurrent weights, and memory."""

from pathlib import Path

import click

from initjax.commands.apps import tell
from initjax.commands.output import collected_warnings, output_options


@click.command(name="recurrent", short_help="Critical recurrent weights with an input, and memory.")
@click.argument("phi")
@click.option("--input-variance", type=float, default=0.0, show_default=True, help="E[(U x)^2] of a pre-activation.")
@click.option("--correlation", type=float, default=1.0, show_default=True, help="Of the inputs of two sequences.")
@click.option("--sigma-b", type=float, default=0.0, show_default=True, help="Bias standard deviation.")
@click.option("--sigma-w", type=float, help="Recurrent weight scale, for the memory; without it, the critical one.")
@click.option("--steps", type=click.IntRange(0), default=10, show_default=True, help="Time steps of the memory.")
@output_options
def command(
    phi: str,
    input_variance: float,
    correlation: float,
    sigma_b: float,
    sigma_w: float | None,
    steps: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """The recurrent weight scale on the edge of chaos of a cell driven by an input, and what a cell remembers."""
    from initjax.applications import recurrent
    from initjax.commands import lookup

    activation = lookup.activation(phi)
    with collected_warnings() as notes:
        point = recurrent.critical(activation, input_variance, correlation, sigma_b=sigma_b)
        scale = float(point.sigma_w) if sigma_w is None else sigma_w
        cell = recurrent.memory(
            activation,
            scale,
            input_variance=input_variance,
            input_correlation=correlation,
            sigma_b=sigma_b,
            steps=steps,
        )
    rows = [
        ("critical variance", point.variance, "sigma_w^2 at which gradients through time keep their size"),
        ("q", point.q, "second moment of a pre-activation there"),
        ("xi_c", point.xi_c, "time steps over which two sequences forget their difference"),
        (f"gain at {scale:.4g}", cell.gain, "factor on a squared gradient per step"),
        ("horizon", cell.horizon, "steps per e-fold: positive forgetting, negative exploding"),
        ("kept", cell.kept, f"of a squared gradient after {steps} steps"),
    ]
    names = ("sigma_w", "variance", "q", "c", "chi_c", "xi_c")
    data = {
        "phi": phi,
        "critical": {name: float(getattr(point, name)) for name in names} | {"stable": bool(point.stable)},
        "memory": {name: float(getattr(cell, name)) for name in ("q", "gain", "horizon", "kept", "correlation")},
        "sigma_w": scale,
        "phase": str(cell.phase),
    }
    tell("recurrent", f"Recurrent {phi}, input variance {input_variance:g}", data, rows, as_json, out, notes)
