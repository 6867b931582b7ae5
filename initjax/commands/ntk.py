"""`initjax ntk module.path:model --data digits`: the tangent kernel of a Flax model, its spectrum, what it predicts."""

from pathlib import Path

import click

from initjax.commands.data import data_options, inputs_from
from initjax.commands.output import collected_warnings, output_options, save, show
from initjax.errors import UnsupportedLayerError

# More examples are answered by products alone.
FORMED = 2048
# rows of the answer: what it is called in the table, where it stands in the JSON
ROWS = (
    ("largest eigenvalue", "largest_eigenvalue"),
    ("smallest eigenvalue", "smallest_eigenvalue"),
    ("condition number", "condition_number"),
    ("effective rank", "effective_rank"),
    ("largest stable learning rate", "max_learning_rate"),
    ("    with momentum 0.9", "max_learning_rate_momentum_0.9"),
    ("steps to fit the slowest direction", "steps_to_fit"),
)


@click.command(name="ntk", short_help="The tangent kernel of a Flax model and what it predicts.")
@click.argument("path", metavar="module.path:Model")
@data_options(examples=64)
@click.option("--draws", type=click.IntRange(1), default=4, show_default=True, help="Random networks.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random networks.")
@output_options
def command(
    path: str, data: str, examples: int, shape: str | None, draws: int, seed: int, as_json: bool, out: Path | None
) -> None:
    """Spectrum, condition number and stable learning rates of a model's tangent kernel, at its width and at infinite.

    The kernel is the mean over outputs, in the model's own parameterization; rates are for gradient descent on the
    mean squared error over the examples. More than 2048 examples are not formed: then bounds are given, and it says so.
    """
    from initjax.commands import lookup

    model = lookup.model(path)
    inputs = inputs_from(data, examples, shape)
    with collected_warnings() as notes:
        answer, densities = _answer(model, inputs, draws, seed)
    answer = {"command": "ntk", "model": path, "data": data, "examples": len(inputs), **answer}
    saved = save(out, "ntk", answer, _draw(densities, path)) if out else []
    show(answer, [] if as_json else [_table(answer)], as_json=as_json, saved=saved, notes=notes)


def _answer(model, inputs, draws, seed):
    """The numbers of each draw and of infinite width, and the eigenvalue densities behind them."""
    import jax

    import initjax as ij
    from initjax.trace.flax import as_functional

    functional = as_functional(model, inputs)
    draws = 1 if functional.values is not None else draws  # a finished module is one network
    drawn, densities = [], []
    ntk_fn = ij.empirical_ntk(functional.apply)
    for key in jax.random.split(jax.random.key(seed), draws):
        params = functional.init(key)
        large = len(inputs) > FORMED
        kernel = ij.ntk_operator(functional.apply, params, inputs) if large else ntk_fn(params, inputs)
        numbers, density = _numbers(kernel)
        drawn.append(numbers)
        densities.append(density)
    refusal = limit = None
    try:
        kernel = ij.kernel_fn(model, inputs)(inputs).ntk
    except UnsupportedLayerError as error:
        refusal = error.given
    else:
        limit, density = _numbers(kernel)
        densities.append(density)
    return {"draws": drawn, "infinite_width": limit, "infinite_width_refused": refusal}, (densities, limit is not None)


def _numbers(kernel):
    import math

    import initjax as ij

    n = kernel.shape[0]
    ends = ij.extreme_eigenvalues(kernel)
    rate = float(ij.max_learning_rate(kernel, n))
    slowest = rate * float(ends.smallest) / n if ends.resolved else 0.0
    return {
        "regime": ends.regime,
        "largest_eigenvalue": float(ends.largest),
        "smallest_eigenvalue": float(ends.smallest) if ends.resolved else 0.0,
        "condition_number": float(ij.condition_number(kernel)),
        "effective_rank": float(ij.effective_rank(kernel)),
        "max_learning_rate": rate,
        "max_learning_rate_momentum_0.9": float(ij.max_learning_rate(kernel, n, momentum=0.9)),
        # at half the largest rate
        "steps_to_fit": math.ceil(math.log(0.01) / math.log1p(-slowest / 2)) if 0 < slowest < 2 else math.inf,
    }, ij.spectral_density(kernel)


def _table(answer: dict):
    from rich.table import Table

    dense = all(draw["regime"] == "dense" for draw in answer["draws"])
    table = Table(title=f"Tangent kernel of {answer['model']} on {answer['examples']} examples", title_justify="left")
    table.add_column("quantity")
    table.add_column("infinite width", justify="right")
    table.add_column(f"this network, {len(answer['draws'])} draws" + ("" if dense else " (Lanczos)"), justify="right")
    limit = answer["infinite_width"]
    for title, name in ROWS:
        values = [draw[name] for draw in answer["draws"]]
        low, high = min(values), max(values)
        drawn = f"{low:.4g}" if low == high else f"{low:.4g} ... {high:.4g}"
        # from inside the spectrum: the smallest eigenvalue is smaller still
        bounds = {"smallest_eigenvalue": "<= ", "condition_number": ">= ", "steps_to_fit": ">= "}
        bound = "" if dense else bounds.get(name, "")
        table.add_row(title, "-" if limit is None else f"{limit[name]:.4g}", bound + drawn)
    table.caption = "steps: to 1 % of its error, at half the largest stable rate"
    if answer["infinite_width_refused"]:
        table.caption += f"; infinite width: {answer['infinite_width_refused']}"
    return table


def _draw(found, path: str):
    """Density of eigenvalues over decades: draws thin, infinite width thick."""
    import numpy as np

    from initjax.drawing import blank_figure

    densities, has_limit = found
    figure = blank_figure(6.4, 4.0)
    axes = figure.subplots()
    nodes = np.concatenate([density.nodes.ravel() for density in densities])
    nodes = nodes[nodes > 0] if np.any(nodes > 0) else np.ones(1)
    at = np.geomspace(nodes.min() / 2, nodes.max() * 2, 400)
    for i, density in enumerate(densities):
        last = has_limit and i == len(densities) - 1
        label = "infinite width" if last else "this network" if i == 0 else None
        style = dict(color="k", linewidth=2) if last else dict(color="#0072B2", linewidth=1)
        axes.plot(at, density.density(at, 0.1)[0], label=label, **style)
    axes.set(xscale="log", xlabel="eigenvalue of the tangent kernel", ylabel="density per decade", title=path)
    axes.legend()
    return figure
