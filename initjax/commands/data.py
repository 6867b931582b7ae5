"""The inputs of commands that take a model: the digits, or a .npy file."""

from collections.abc import Callable

import click

from initjax.errors import InputError


def data_options(examples: int = 32, least: int = 2) -> Callable[[Callable], Callable]:
    """Add `--data`, `--examples` and `--shape` to a command, which gives them to `inputs_from`."""
    options = (
        click.option(
            "--data", default="digits", show_default=True, help="digits, or a .npy file with examples along axis 0."
        ),
        click.option(
            "--examples",
            type=click.IntRange(least),
            default=examples,
            show_default=True,
            help="How many examples to use.",
        ),
        click.option("--shape", help="Shape of one example, such as 8,8,1 for the digits as images."),
    )

    def add(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def inputs_from(data: str, examples: int, shape: str | None):
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
