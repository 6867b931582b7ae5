"""What every command shares: the `--json` and `--out` options, strict JSON, and where figures go."""

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from initjax.errors import InputError


def output_options(function: Callable) -> Callable:
    """Add `--json` and `--out DIR` to a command; it receives them as `as_json` and `out`."""
    function = click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the figures (PNG) and the data (JSON); made if missing.",
    )(function)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
    )(function)


def plain(value: Any) -> Any:
    """Turn results into what JSON knows: arrays to lists, NumPy scalars to numbers, infinities to strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def strict_json(value: Any) -> str:
    """Write `value` as JSON that every parser accepts.

    Examples
    --------
    >>> print(strict_json({"condition_number": float("inf")}))
    {
      "condition_number": "Infinity"
    }
    """
    return json.dumps(plain(value), indent=2, allow_nan=False)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the library's warnings as texts, so that a person and a machine are told each of them once."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield texts
    for item in caught:
        if str(item.message) not in texts:
            texts.append(str(item.message))


def folder(out: Path) -> Path:
    """Make the folder `out`, or say in four parts why that failed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            given=f"--out {out}: {error.strerror or error}.",
            accepted="a folder that exists, or that can be made.",
            why="the figures and the data are written there.",
            remedy="name a folder of your own, e.g. --out out",
        ) from error
    return out


def save(out: Path, name: str, data: dict, drawing: Any = None) -> list[Path]:
    """Write `name.json`, and `name.png` if there is a drawing, into the folder `out`; return the paths."""
    paths = [folder(out) / f"{name}.json"]
    paths[0].write_text(strict_json(data) + "\n")
    if drawing is not None:
        paths.append(out / f"{name}.png")
        drawing.savefig(paths[-1], dpi=150)
    return paths


def show(data: dict, tables: list[Any], *, as_json: bool, saved: list[Path], notes: list[str]) -> None:
    """Print the answer once: JSON for a machine, or tables, notes and file names for a person."""
    if as_json:
        click.echo(strict_json({**data, "files": saved, "warnings": notes}))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(f"[yellow]Note:[/yellow] {note}", markup=True)
    for path in saved:
        console.print(f"written: {path}", markup=False, soft_wrap=True)
