"""The subcommands of `initjax app`, one file each: `command`, a click command with the name of its application."""

from pathlib import Path
from typing import Any

from initjax.commands.output import save, show


def tell(name: str, title: str, data: dict, rows: list[tuple[str, Any, str]], as_json: bool, out: Path | None, notes):
    """Print rows of (quantity, value, meaning), or `data` as JSON, and write it into `out`."""
    data = {"command": f"app {name}", **data}
    saved = save(out, name, data) if out else []
    tables = []
    if not as_json:
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for heading in ("quantity", "value", "meaning"):
            table.add_column(heading, justify="right" if heading == "value" else "left")
        for quantity, value, meaning in rows:
            table.add_row(quantity, value if isinstance(value, str) else f"{float(value):.6g}", meaning)
        tables.append(table)
    show(data, tables, as_json=as_json, saved=saved, notes=notes)
