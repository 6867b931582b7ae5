"""`initjax inspect module.path:model --data digits`: one report on a Flax model as its author wrote it."""

from pathlib import Path

import click

from initjax.commands.output import collected_warnings, output_options, save, show
from initjax.errors import InputError


@click.command(name="inspect", short_help="One report on a Flax model as you wrote it.")
@click.argument("path", metavar="module.path:Model")
@click.option("--data", default="digits", show_default=True, help="digits, or a .npy file with examples along axis 0.")
@click.option("--examples", type=click.IntRange(2), default=32, show_default=True, help="How many examples to use.")
@click.option("--shape", help="Shape of one example, such as 8,8,1 for the digits as images.")
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
    inputs = _inputs(data, examples, shape)
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


def _inputs(data: str, examples: int, shape: str | None):
    """The first examples of the data, each with mean square 1 if they are the digits, in the asked shape."""
    import numpy as np

    if data == "digits":
        from initjax.demo.data import load

        inputs = load().x_train
    elif data.endswith(".npy"):
        try:
            inputs = np.load(data, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(
                given=f"--data {data}: {error}.",
                accepted="a file that numpy.save wrote, an array of numbers with the examples along its first axis.",
                why="the file could not be read.",
                remedy="numpy.save('inputs.npy', x), then --data inputs.npy",
            ) from error
        if inputs.ndim < 2 or len(inputs) < 2 or not np.issubdtype(inputs.dtype, np.number):
            raise InputError(
                given=f"--data {data}: an array of shape {inputs.shape} and dtype {inputs.dtype}.",
                accepted="numbers with at least two examples along the first axis, and at least one axis more.",
                why="correlations and kernels are between examples.",
                remedy="numpy.save('inputs.npy', x) with x of shape (examples, features)",
            )
    else:
        raise InputError(
            given=f"--data {data}.",
            accepted="digits, or the path of a .npy file.",
            why="there is no other data set here.",
            remedy="numpy.save('inputs.npy', x), then --data inputs.npy",
        )
    inputs = inputs[:examples]
    if shape is None:
        return inputs
    try:
        return inputs.reshape(len(inputs), *(int(size) for size in shape.split(",")))
    except ValueError:
        raise InputError(
            given=f"--shape {shape} for examples of shape {inputs.shape[1:]}.",
            accepted="whole numbers with commas between them whose product is the size of one example.",
            why="an example is reshaped, never cut or filled.",
            remedy="--shape 8,8,1 for the digits as images with one channel",
        ) from None
