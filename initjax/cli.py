"""The command line: the library's answers from a shell.

Every command takes `--json` (one JSON object on standard output and nothing else there) and `--out DIR` (figures as PNG
and the same object as JSON). A request that cannot be answered ends with exit code 2 and a message in four parts: what
was given, what is accepted, why, and what to try. With `--json` that message is an object too: `{"error": {...}}`.

JSON has no infinities: they are written as the strings "Infinity", "-Infinity" and "NaN", which `float()` in Python
and `Number()` in JavaScript read back.

JAX is imported when a command runs, never by `initjax --help` or `initjax COMMAND --help`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import click

from initjax.commands import app, critical, demo, inspect, ntk, phase, trainability
from initjax.errors import InputError


class _Answers(click.Group):
    """A group of commands whose failures are told in one place, here."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            options = {"windows_expand_args": windows_expand_args, **extra}
            result = super().main(arguments, prog_name, complete_var, standalone_mode=False, **options)
        except InputError as error:
            _tell(error, as_json="--json" in arguments)
            code = 2
        except click.UsageError as error:
            _tell(_in_four_parts(error), as_json="--json" in arguments)
            code = 2
        except click.exceptions.Abort:
            click.echo("Stopped.", err=True)
            code = 130
        else:
            # click hands back the code of `ctx.exit()` here, and the command's own value otherwise
            code = result if isinstance(result, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


def _in_four_parts(error: click.UsageError) -> InputError:
    """A mistake in the arguments, as click found it, in the words of the library's own errors."""
    context = error.ctx
    path = context.command_path if context else "initjax"
    usage = context.get_usage() if context else "Usage: initjax COMMAND"
    return InputError(
        given=error.format_message(),
        accepted=usage.removeprefix("Usage: "),
        why="the arguments do not fit the command.",
        remedy=f"{path} --help",
    )


def _tell(error: InputError, as_json: bool) -> None:
    click.echo(f"Error: {error}", err=True)
    if as_json:
        from initjax.commands.output import strict_json

        parts = {name: getattr(error, name) for name in ("given", "accepted", "why", "remedy")}
        click.echo(strict_json({"error": {"type": type(error).__name__, **parts}}))


@click.group(cls=_Answers, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="initjax", message="%(prog)s %(version)s")
def main() -> None:
    """What a neural network's initialization will do, computed before training.

    \b
    initjax demo                             predict, measure and train four initializations on real images
    initjax critical tanh --sigma-b 0.05     the weight scale on the edge of chaos
    initjax phase gelu --out figures         the map of ordered and chaotic initializations
    initjax inspect my.module:model          one report on a Flax model as you wrote it
    initjax trainability my.module:model     will it train: depth, learning rate, time, each with its confidence
    initjax ntk my.module:model              its tangent kernel, the spectrum, stable learning rates
    initjax app                              one use of networks each: symmetry, signals, heads, ...

    Every command takes --json (infinities as the strings "Infinity", "-Infinity", "NaN") and --out DIR.
    """


main.add_command(app.command)
main.add_command(critical.command)
main.add_command(demo.command)
main.add_command(inspect.command)
main.add_command(ntk.command)
main.add_command(phase.command)
main.add_command(trainability.command)
