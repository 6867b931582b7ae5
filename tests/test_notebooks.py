"""The notebooks: each runs as a plain script at small size, and each .ipynb is the executed twin of its source."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# a folder of the machine that made it: absolute paths of Unix homes, environments and temporary files, or of Windows
PATH = re.compile(r"(?<![\w.:/])/(home|root|work|usr|opt|tmp|Users|var|mnt|private)/|[A-Z]:\\\\")


def cells(text: str) -> list[tuple[str, str]]:
    """(type, source) of each cell of a percent-format script."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if "[markdown]" in kind:
            lines = [re.sub(r"^# ?", "", line) for line in body.strip("\n").splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip("\n")))
    return found


def test_there_are_notebooks_and_every_source_has_its_twin():
    assert SOURCES
    assert [path.with_suffix(".ipynb") for path in SOURCES] == sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_ipynb_is_the_executed_twin(path):
    book = json.loads(path.with_suffix(".ipynb").read_text())
    assert cells(path.read_text()) == [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]
    everything = "\n".join(texts + [json.dumps(book["metadata"])])
    assert not PATH.search(everything)
    assert path.with_suffix(".ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_asks_predicts_measures_and_says_what_would_refute_it(path):
    markdown = [text for kind, text in cells(path.read_text()) if kind == "markdown"]
    assert markdown[0].startswith("# ") and "?" in markdown[0]
    headings = re.findall(r"^## (.*)$", "\n".join(markdown), re.MULTILINE)
    predicts, measures = (next(i for i, h in enumerate(headings) if word in h) for word in ("rediction", "easurement"))
    assert predicts < measures and "falsified" in headings[-1]


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_runs_as_a_script_at_small_size(path):
    environment = {**os.environ, "INITJAX_NOTEBOOKS": "small", "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", path.name],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
