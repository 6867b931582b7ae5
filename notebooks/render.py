"""Execute the percent-format notebooks and write each as an .ipynb beside its source: `make notebooks`.

    python notebooks/render.py [name or number ...]

The sources NN_name.py are what is edited and reviewed; they also run as plain scripts. With INITJAX_NOTEBOOKS=small
they take seconds (tests/test_notebooks.py), without it the size that is printed in the .ipynb.
"""

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def sources(wanted: list[str]) -> list[Path]:
    """The notebooks whose file name begins with, or contains, one of the wanted words; all of them without any."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not wanted or any(word in path.stem for word in wanted)]


def render(path: Path) -> Path:
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # the same on every run, so that only what changed is a change
        cell.metadata = {}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}, record_timing=False).execute()
    target = path.with_suffix(".ipynb")
    jupytext.write(notebook, target, fmt="ipynb")
    return target


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for source in sources(sys.argv[1:]):
        begin = time.perf_counter()
        result = render(source)
        print(f"{result.name}: {time.perf_counter() - begin:.0f} s, {result.stat().st_size / 1024:.0f} KiB")
