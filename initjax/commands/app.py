"""`initjax app NAME`: what the theory says about one use of networks, from a shell."""

import importlib

import click

# name -> what it answers; the command itself is imported from `commands/apps/NAME.py` when it is asked for
APPS = {
    "conditioning": "Condition numbers of NNGP and NTK by depth.",
    "heads": "Scale, first loss and gradient of a head on features.",
    "input-scale": "The input scale at which an update becomes catastrophic.",
    "optimism": "The readout bias that keeps Q above every possible value.",
    "recurrent": "Critical recurrent weights with an input, and memory.",
    "residual": "Growth by skip connections, and zero branches.",
    "symmetry": "Units that start as copies of each other, layers without gradient.",
    "signal": "Gains of linear and Xavier networks of given widths.",
}


class _Apps(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(APPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in APPS:
            return None
        return importlib.import_module(f"initjax.commands.apps.{cmd_name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Applications"):
            formatter.write_dl(sorted(APPS.items()))


@click.group(name="app", cls=_Apps, short_help="What the theory says about one use of networks.")
def command() -> None:
    """What initialization theory says about one use of networks.

    `initjax app NAME --help` tells the arguments of each; docs/applications.md tells the theory.
    """
