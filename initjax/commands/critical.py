"""`initjax critical PHI`: the weight scale that puts an activation on the edge of chaos."""

import math
from pathlib import Path

import click

from initjax.commands.output import collected_warnings, output_options, save, show
from initjax.drawing import blank_figure


@click.command(name="critical", short_help="The weight scale on the edge of chaos.")
@click.argument("phi")
@click.option("--sigma-b", type=float, default=0.0, show_default=True, help="Bias standard deviation, >= 0.")
@click.option("--all", "every", is_flag=True, help="Every critical point at this sigma_b, not only the primary one.")
@output_options
def command(phi: str, sigma_b: float, every: bool, as_json: bool, out: Path | None) -> None:
    """Weight scale on the edge of chaos: Var W = sigma_w^2 / fan_in at which gradients neither vanish nor explode.

    PHI is a name in jax.nn or jax.numpy, erf, gelu_exact, or module.path:function.
    """
    from initjax import meanfield
    from initjax.commands import lookup

    activation = lookup.activation(phi)
    with collected_warnings() as notes:
        if every:
            points = list(meanfield.critical_points(activation, sigma_b))
        else:
            points = [meanfield.critical(activation, sigma_b)]
    rows = [
        {
            "sigma_w": float(point.sigma_w),
            "sigma_b": float(point.sigma_b),
            "q": float(point.q),
            "chi_q": float(point.chi_q),
            "stable": bool(point.stable),
            "kind": str(point.kind),
        }
        for point in points
    ]
    data = {"command": "critical", "phi": phi, "sigma_b": sigma_b, "points": rows}
    saved = save(out, "critical", data, _draw(activation, phi, sigma_b, rows)) if out else []
    show(
        data, [] if as_json else [_table(phi, rows), _how_to_use(phi, rows)], as_json=as_json, saved=saved, notes=notes
    )


def _table(phi: str, rows: list[dict]):
    from rich.table import Table

    table = Table(title=f"Critical initialization of {phi}: chi_1 = 1 at the fixed point q*", title_justify="left")
    for heading in ("sigma_w", "sigma_b", "q*", "chi_q", "stable", "kind"):
        table.add_column(heading, justify="left" if heading in ("stable", "kind") else "right")
    for row in rows:
        q = "any" if math.isnan(row["q"]) else f"{row['q']:.10g}"
        stable = "yes" if row["stable"] else "no"
        table.add_row(
            f"{row['sigma_w']:.10g}", f"{row['sigma_b']:g}", q, f"{row['chi_q']:.6g}", stable, str(row["kind"])
        )
    return table


def _how_to_use(phi: str, rows: list[dict]) -> str:
    if not rows:
        return f"{phi} has no critical point here."
    row = rows[0]
    return (
        "In Flax: kernel_init=variance_scaling"
        f"({row['sigma_w'] ** 2:.6g}, 'fan_in', 'normal'), bias_init=normal({row['sigma_b']:g})"
    )


def _draw(activation, phi: str, sigma_b: float, rows: list[dict]):
    """Gradient gain per layer against sigma_w at this sigma_b, with the critical points marked."""
    import numpy as np

    from initjax import meanfield

    centre = rows[0]["sigma_w"] if rows else 1.0
    sigma_w = np.linspace(0.5 * centre, 1.5 * centre, 121)
    line = meanfield.phase_diagram(activation, sigma_w, np.array([sigma_b]))
    chi = np.asarray(line.chi_1).reshape(-1)
    drawing = blank_figure(6.4, 4.4)
    axes = drawing.subplots()
    axes.plot(sigma_w, chi, color="#0072B2", label="chi_1 at the fixed point q*")
    axes.axhline(1.0, color="0.5", linestyle="--", linewidth=1, label="edge of chaos, chi_1 = 1")
    for row in rows:
        if sigma_w[0] <= row["sigma_w"] <= sigma_w[-1]:
            axes.plot(row["sigma_w"], 1.0, "o", color="#D55E00", label=f"critical: sigma_w = {row['sigma_w']:.6g}")
    axes.set_xlabel("weight scale sigma_w (Var W = sigma_w$^2$ / fan_in)")
    axes.set_ylabel("gradient gain per layer, chi_1")
    axes.set_title(f"{phi}, sigma_b = {sigma_b:g}")
    axes.legend()
    return drawing
