"""`initjax app`: the same answers as the library's, help without JAX, and four-part refusals."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from initjax.applications import conditioning, recurrent
from initjax.cli import main
from initjax.commands.app import APPS


def invoke(*arguments):
    return CliRunner().invoke(main, ["app", *arguments])


def answer(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_application_has_help_and_none_imports_jax():
    names = sorted(APPS)
    listed = [
        line.split()[0] for line in invoke("--help").stdout.splitlines() if line.startswith("  ") and line.split()
    ]
    assert set(names) <= set(listed)
    program = (
        "import sys\n"
        "from initjax.cli import main\n"
        f"codes = [main(['app', name, '--help'], standalone_mode=False) for name in {names!r}]\n"
        "heavy = {'jax', 'numpy', 'flax', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(any(codes) or (f'imported {heavy}' if heavy else 0))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Usage: initjax") + run.stdout.count("Usage:") >= len(names)


def test_answers_are_the_librarys(tmp_path):
    data = answer("recurrent", "tanh", "--input-variance", "0.25")
    point = recurrent.critical(jnp.tanh, 0.25)
    assert data["critical"]["variance"] == float(point.variance) and data["phase"] == "critical"
    data = answer("conditioning", "relu", "--depth", "20", "--positions", "4")
    found = conditioning.by_depth(lambda x: jnp.maximum(x, 0), 1.0, depth=20, architecture="pooled", positions=4)
    np.testing.assert_allclose(data["log_ntk"], found.log_ntk, rtol=1e-12)
    assert data["nngp_law"]["limit"] == "Infinity"
    data = answer("signal", "256", "64", "--phi", "relu")
    assert data["xavier"]["forward"] == [1.6]
    np.save(tmp_path / "h.npy", np.abs(np.random.default_rng(0).normal(size=(50, 8))))
    data = answer("heads", str(tmp_path / "h.npy"), "--classes", "3", "--out", str(tmp_path))
    assert data["matched"]["logit_second_moment"] == pytest.approx(0.01) and (tmp_path / "heads.json").exists()
    assert "cross-entropy" in invoke("heads", str(tmp_path / "h.npy"), "--classes", "3").stdout


MODEL = """
import jax
from flax import linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = lambda n: nn.Dense(n, use_bias=False, kernel_init=nn.initializers.he_normal())
        x = dense(16)(x)
        x = x + dense(16)(nn.relu(x)) * self.param("gain", nn.initializers.zeros, (1, 16), "float32")
        return dense(1)(x)

model = Net()
plain = nn.Sequential([nn.Dense(8, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
"""


def test_models_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_apps.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = answer("residual", "mine_for_apps:model", "--data", "x.npy", "--seeds", "2")
    assert data["identity_trunk"] is True and len(data["silent"]) == 1
    data = answer("symmetry", "mine_for_apps:model", "--data", "x.npy")
    assert data["flagged"] == [] and len(data["dead"]) == 1
    data = answer("input-scale", "mine_for_apps:plain", "--data", "x.npy", "--learning-rate", "0.1", "--networks", "0")
    assert data["closed_form"] is True and data["critical"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["conditioning", "relu", "--sigma-w", "3", "--sigma-b", "0.5", "--depth", "400"],
        ["recurrent", "relu", "--input-variance", "0.1"],
        ["signal"],
        ["heads", "nothing.npy", "--classes", "3"],
        ["nonsense"],
    ],
)
def test_refusals_have_four_parts(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert all(part in result.stderr for part in ("Error: ", "Accepted: ", "Why: ", "Try: "))
