"""`initjax demo`: four initializations of a deep network on real images, predicted, measured and trained."""

from pathlib import Path

import click

from initjax.commands.output import collected_warnings, folder, output_options, save, show


@click.command(name="demo", short_help="Predict, measure and train four initializations on real images.")
@output_options
def command(as_json: bool, out: Path | None) -> None:
    """Predict which initializations of a deep network can be trained on handwritten digits; then train them.

    Takes a minute or two on two cores. The figure and the data go to out/demo unless --out names another folder.
    """
    from initjax.demo import run as demo
    from initjax.demo.figure import draw
    from initjax.drawing import blank_figure

    out = folder(out or Path("out/demo"))
    blank_figure(1, 1)  # what is missing is told now, not after minutes of work
    with collected_warnings() as notes, demo.progress_bars() as progress:
        report = demo.run(progress=progress)
    data = report.to_dict()
    saved = save(out, "demo", data, draw(report))
    tables = [] if as_json else [report.table(), f"\n{report.verdict}\n"]
    show(data, tables, as_json=as_json, saved=saved, notes=notes)
