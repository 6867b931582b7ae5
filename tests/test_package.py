"""The package as a whole: what importing it costs, its public names, its boundaries, and the files around it."""

import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import initjax as ij

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "initjax").rglob("*.py"))
HEAVY = ("flax.nnx", "matplotlib", "tensorstore", "plotly", "neural_tangents", "tensorflow", "sklearn", "jinja2")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_after(code: str) -> set[str]:
    """Names of the modules loaded by `code` in a fresh interpreter."""
    show = f"{code}\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_light():
    every_name = f"import initjax\nfor name in {ij.__all__!r}: getattr(initjax, name)"
    assert not modules_after(every_name).intersection(HEAVY)
    assert "jax" not in modules_after("import initjax")


def test_help_of_the_command_line_does_not_import_jax():
    code = "from initjax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code).intersection((*HEAVY, "jax", "flax", "numpy"))


@pytest.mark.parametrize("name", ij.__all__)
def test_public_names_are_documented_and_functions_show_an_example(name):
    value = getattr(ij, name)
    text = inspect.getdoc(value)
    assert text and len(text) > 40, f"{name} needs a docstring"
    if inspect.isfunction(value):
        assert ">>>" in text, f"{name} needs an executed example"
        assert "References" in text, f"{name} needs the source of its formula"


def test_public_names_are_listed_the_same_way_for_type_checkers_and_at_run_time():
    text = (ROOT / "initjax" / "__init__.py").read_text()
    declared = re.findall(r"^    from initjax\S* import (\w+) as \1$", text, re.MULTILINE)
    assert sorted(declared) == ij.__all__ == dir(ij)
    with pytest.raises(AttributeError, match="has no attribute 'criticality'; it has"):
        _ = ij.criticality


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"jax\._src|jax\.interpreters|from jax import core|jax\.extend", ("trace/jaxpr.py",)),
        (r"jax\.core\.", ("trace/jaxpr.py",)),
        (r"jax\.config|config\.update", ()),
        # the demonstration is a user of the library with a model of its own
        (r"^\s*(import|from) flax", ("trace/flax.py", "demo/")),
        (r"^(import|from) (matplotlib|plotly|sklearn|rich|tensorstore)", ()),
    ],
)
def test_boundaries_between_rooms_and_to_jax(pattern, allowed):
    hits = []
    for path in SOURCES:
        name = path.relative_to(ROOT / "initjax").as_posix()
        # docstrings show how users write things: examples do not count
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith((">>>", "...", "#"))]
        if not name.startswith(allowed or ("-",)):
            hits += [f"{name}: {line.strip()}" for line in lines if re.search(pattern, line)]
    assert not hits


def test_pillars_do_not_import_each_other_nor_what_stands_above_them():
    above = ("applications", "initializers", "inspection", "cli", "commands", "demo")
    forbidden = {
        "gaussian": ("meanfield", "infinite", "empirical", "spectrum", *above),
        "spectrum": ("meanfield", "infinite", "empirical", *above),
        "trace": ("meanfield", "infinite", "empirical", "spectrum", *above),
        "meanfield": ("infinite", "empirical", *above),
        "infinite": ("meanfield", "empirical", *above),
        "empirical": ("meanfield", "infinite", *above),
    }
    hits = []
    for room, others in forbidden.items():
        pattern = re.compile(
            rf"^\s*(from initjax import ({'|'.join(others)})|(from|import) initjax\.({'|'.join(others)}))\b"
        )
        for path in (ROOT / "initjax" / room).rglob("*.py"):
            hits += [f"{path.name}: {line.strip()}" for line in path.read_text().splitlines() if pattern.match(line)]
    assert not hits


def test_annotations_are_seen_by_the_type_checker():
    for path in SOURCES:
        text = path.read_text()
        assert not ("jaxtyping" in text and "from __future__ import annotations" in text), path


def test_errors_say_four_things_and_survive_pickling():
    error = ij.UnsupportedLayerError(
        "a loop", "dense layers", "no theory", "unroll it", layer="RNN_0", primitive="scan"
    )
    for text in ("a loop", "Accepted: dense layers", "Why: no theory", "Try: unroll it"):
        assert text in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.layer, again.primitive) == (str(error), "RNN_0", "scan")
    for name in ("NoCriticalPointError", "NotElementwiseError", "QuadratureError", "UnsupportedLayerError"):
        assert issubclass(getattr(ij, name), ij.InputError) and issubclass(getattr(ij, name), ValueError)


def test_core_dependencies_have_no_upper_caps_and_tools_are_pinned():
    project = PYPROJECT["project"]
    assert not [d for d in project["dependencies"] if "<" in d or "==" in d]
    extras = project["optional-dependencies"]
    assert "crosscheck" not in extras["all"][0] and not any("neural" in d for d in extras["all"])
    for tool in ("ruff", "pyright"):
        assert any(re.fullmatch(rf"{tool}(\[\w+\])?==[\d.]+", d) for d in extras["dev"])


def test_lock_holds_exact_versions_and_no_hosts_or_paths():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.match(r"^[a-z0-9-]+==[\w.+]+( ; .*)?$", line) for line in lines)
    locked = {line.split("==")[0] for line in lines}
    for dependency in PYPROJECT["project"]["dependencies"]:
        assert re.match(r"[a-z-]+", dependency)[0] in locked
    assert not locked.intersection(("tensorflow", "neural-tangents"))


@pytest.fixture
def project(tmp_path):
    """A copy of what `make` looks at."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(project, *arguments):
    # these tests may themselves run under make, whose settings must not be passed on
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYENV_ROOT") if name in os.environ}
    return subprocess.run(["make", *arguments], cwd=project, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("target", "extras"), [("demo", "plots,data"), ("test", "test")])
def test_make_installs_once_and_again_only_when_pyproject_changes(project, target, extras):
    first = make(project, "--dry-run", target)
    assert "venv" in first.stdout and f"--editable '.[{extras}]'" in first.stdout, first.stderr
    (project / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", f".installed-{target}"):
        (project / ".venv" / name).touch()
    earlier = time.time() - 60
    os.utime(project / "pyproject.toml", (earlier, earlier))
    assert "--editable" not in make(project, "--dry-run", target).stdout
    later = time.time() + 60  # make compares time stamps, and some file systems keep them coarsely
    os.utime(project / "pyproject.toml", (later, later))
    assert "--editable" in make(project, "--dry-run", target).stdout


def test_make_without_a_modern_python_says_what_is_missing(project):
    done = make(project, "demo", "PYTHON=", "UV=")
    assert done.returncode != 0
    assert "initjax needs Python 3.11 or newer" in done.stderr and "make demo PYTHON=" in done.stderr
