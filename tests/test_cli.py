"""The command line: answers for people and for machines, and four-part errors with exit code 2."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from initjax.cli import main

FOUR_PARTS = ("Error: ", "Accepted: ", "Why: ", "Try: ")


def invoke(*arguments):
    return CliRunner().invoke(main, list(arguments))


def refused(*arguments):
    """Run a command that must be refused; returns its message."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert all(part in result.stderr for part in FOUR_PARTS), result.stderr
    return result.stderr


def answer(*arguments):
    """Run a command with --json; returns the object, which must be the whole of standard output and strict JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=refuse)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["critical", "--help"],
        ["phase", "--help"],
        ["inspect", "-h"],
        ["demo", "-h"],
        ["ntk", "-h"],
        ["trainability", "-h"],
        ["app", "-h"],
    ],
)
def test_help_does_not_import_jax(arguments):
    program = (
        "import sys\n"
        "from initjax.cli import main\n"
        f"code = main({arguments!r}, prog_name='initjax', standalone_mode=False)\n"
        "heavy = {'jax', 'numpy', 'flax', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Usage: initjax" in run.stdout


def test_help_lists_the_commands():
    text = invoke("--help").stdout
    assert all(name in text for name in ("critical", "demo", "inspect", "ntk", "phase"))


def test_critical_json_matches_the_library():
    import jax.numpy as jnp

    import initjax as ij

    data = answer("critical", "tanh", "--sigma-b", "0.05")
    point = ij.critical(jnp.tanh, 0.05)
    assert data["points"][0]["sigma_w"] == float(point.sigma_w)  # the same computation, printed in full
    assert data["points"][0]["kind"] == "regular" and data["points"][0]["stable"] is True


def test_critical_writes_any_q_as_a_string():
    assert answer("critical", "relu")["points"][0]["q"] == "NaN"


def test_critical_table_tells_how_to_use_it_in_flax():
    result = invoke("critical", "relu")
    assert result.exit_code == 0
    assert "variance_scaling(2, 'fan_in', 'normal')" in result.stdout and "any" in result.stdout


def test_critical_tells_an_unstable_point_as_a_note():
    data = answer("critical", "gelu_exact", "--sigma-b", "0.05")
    assert data["points"][0]["stable"] is False
    assert any("chi_q" in text for text in data["warnings"])


def test_critical_writes_figure_and_data(tmp_path):
    data = answer("critical", "tanh", "--sigma-b", "0.3", "--out", str(tmp_path / "new"))
    assert {path.rsplit("/")[-1] for path in data["files"]} == {"critical.json", "critical.png"}
    assert (tmp_path / "new" / "critical.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "new" / "critical.json").read_text())["phi"] == "tanh"


def test_gelu_names_the_function_of_that_name_in_jax():
    exact, default = (answer("critical", name, "--sigma-b", "1")["points"][0]["q"] for name in ("gelu_exact", "gelu"))
    assert exact != default  # the tanh form differs from the fourth digit on
    assert abs(exact / default - 1) < 1e-2


def test_unknown_activation_offers_the_nearest_names():
    assert "did you mean tanh" in refused("critical", "tanhh")
    assert "sigmoid" in refused("critical", "sigmiod")
    assert "for example tanh" in refused("critical", "qqqqqqqq")


def test_json_errors_are_json_too():
    result = invoke("critical", "tanhh", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error.keys() == {"type", "given", "accepted", "why", "remedy"}


def test_negative_sigma_b_is_refused():
    assert "sigma_b" in refused("critical", "tanh", "--sigma-b", "-1")


def test_no_critical_point_is_refused_with_its_reason():
    assert "relu" in refused("critical", "relu", "--sigma-b", "0.3")


def test_not_elementwise_is_refused():
    refused("critical", "softmax")
    refused("critical", "sum")


@pytest.mark.parametrize(
    "arguments", [["critical"], ["critical", "tanh", "--sigma-b", "many"], ["nonsense"], ["phase", "tanh", "--colour"]]
)
def test_mistakes_in_the_arguments_are_told_in_four_parts(arguments):
    assert "--help" in refused(*arguments)


@pytest.mark.parametrize("span", ["3:1", "-1:2", "1:2:3", "nan", "0:inf"])
def test_phase_refuses_a_bad_range(span):
    refused("phase", "tanh", "--sigma-w", span)


def test_phase_refuses_a_number_with_a_range():
    assert "one number and one range" in refused("phase", "tanh", "--sigma-w", "1.5")


def test_phase_of_one_point():
    data = answer("phase", "tanh", "--sigma-w", "2.5", "--sigma-b", "0.05")
    assert data["phase"] == "chaotic" and data["chi_1"] > 1 and data["xi_grad"] < 0
    assert answer("phase", "tanh", "--sigma-w", "0.8", "--sigma-b", "0.05")["phase"] == "ordered"


def test_phase_diagram_for_people_and_machines(tmp_path):
    arguments = ("phase", "tanh", "--points", "9", "--out", str(tmp_path))
    data = answer(*arguments)
    assert len(data["phase"]) == len(data["sigma_w"]) == 9 and len(data["phase"][0]) == len(data["sigma_b"]) == 9
    assert data["phase"][0][-1] == "ordered" and data["phase"][-1][0] == "chaotic"
    assert (tmp_path / "phase.png").exists()
    shown = invoke(*arguments[:4])
    assert shown.exit_code == 0 and "ordered" in shown.stdout and "chaotic" in shown.stdout


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A folder with a user's networks, current as in a shell."""
    (tmp_path / "my_networks.py").write_text(
        "import flax.linen as nn\n"
        "import jax.numpy as jnp\n"
        "class Model(nn.Module):\n"
        "    width: int = 32\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        x = jnp.tanh(nn.Dense(self.width)(x))\n"
        "        return nn.Dense(10)(x)\n"
        "model = Model()\n"
        "def soft(x):\n"
        "    return x * jnp.tanh(x)\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_networks", "my_broken"):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_a_path_to_ones_own_activation(user_module):
    assert answer("phase", "my_networks:soft", "--sigma-w", "1", "--sigma-b", "0.1")["phase"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("my_networks:Model", "is the class Model and not an instance"),
        ("my_networks:modle", "did you mean model"),
        ("my_network:model", "there is no such module"),
        ("my_broken:model", "ZeroDivisionError"),
        ("my_networks.model", "my_networks:model"),
        ("my_networks.py:model", "as Python imports it: my_networks"),
        (":model", "one side of the colon is empty"),
        ("math:pi", "model"),
    ],
)
def test_inspect_refuses_a_path_that_leads_to_no_model(user_module, path, text):
    assert text in refused("inspect", path, "--data", "digits")


def test_inspect_refuses_images_of_the_wrong_shape(user_module):
    (user_module / "my_cnn.py").write_text(
        "import flax.linen as nn\nmodel = nn.Sequential([nn.Conv(4, (3, 3, 3, 3))])\n"
    )
    assert "[8, 64]" in refused("inspect", "my_cnn:model", "--data", "digits", "--examples", "8")
    sys.modules.pop("my_cnn", None)


def test_inspect_json_joins_predicted_and_measured(user_module):
    data = answer("inspect", "my_networks:model", "--data", "digits", "--examples", "6", "--out", "report")
    assert [layer["name"] for layer in data["layers"]] == ["Dense_0", "Dense_1"]
    assert {path.rsplit("/")[-1] for path in data["files"]} >= {"inspect.json", "inspect.png"}


def test_trainability_json_has_every_claim_with_its_confidence(user_module):
    data = answer("trainability", "my_networks:model", "--examples", "4", "--learning-rate", "1e-3")
    assert data["depth"] == 2 and data["learning_rate"] == 1e-3 and data["stable"]
    for name in ("max_depth", "max_learning_rate", "slowest_mode"):
        assert data[name]["assumption"] and data[name]["confidence"] and float(data[name]["value"]) > 0
    assert "positive" in refused("trainability", "my_networks:model", "--learning-rate", "-1", "--examples", "4")


def test_ntk_json_matches_the_library(user_module):
    import numpy as np

    import initjax as ij
    from initjax.commands import lookup
    from initjax.demo.data import load

    arguments = ["ntk", "my_networks:model", "--data", "digits", "--examples", "6", "--draws", "2"]
    data = answer(*arguments, "--out", "report")
    assert {path.rsplit("/")[-1] for path in data["files"]} >= {"ntk.json", "ntk.png"}
    x = load().x_train[:6]
    exact = ij.kernel_fn(lookup.model("my_networks:model"), x)(x).ntk
    limit = data["infinite_width"]
    np.testing.assert_allclose(limit["condition_number"], ij.condition_number(exact), rtol=1e-9)
    np.testing.assert_allclose(limit["max_learning_rate"], ij.max_learning_rate(exact, 6), rtol=1e-12)
    # the slowest direction shrinks by 1 - (half the rate) lambda / n a step
    factor = 1 - limit["max_learning_rate"] / 2 * limit["smallest_eigenvalue"] / 6
    assert factor ** limit["steps_to_fit"] <= 0.01 < factor ** (limit["steps_to_fit"] - 1)
    assert len(data["draws"]) == 2 and all(draw["regime"] == "dense" for draw in data["draws"])
    assert data["draws"][0]["condition_number"] != data["draws"][1]["condition_number"]
    from initjax.commands.ntk import _table

    assert "infinite width" in [column.header for column in _table(data).columns]


def test_ntk_refuses_what_is_no_model(user_module):
    assert "did you mean model" in refused("ntk", "my_networks:modle")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("critical", "tanh", "--out", str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("arguments", [["demo"], ["critical", "tanh"]])
def test_missing_matplotlib_is_told_before_any_work(arguments, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'initjax[plots]'" in refused(*arguments, "--out", str(tmp_path))


def test_demo_without_scikit_learn_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.chdir(tmp_path)
    assert "pip install 'initjax[data]'" in refused("demo")


def test_every_public_activation_of_jax_nn_is_found_by_name():
    from initjax.commands.lookup import FAMILIAR, _named

    assert all(callable(_named(name)) for name in FAMILIAR)


def test_python_m_initjax_is_the_command_line():
    run = subprocess.run([sys.executable, "-m", "initjax", "critical", "tanhh"], capture_output=True, text=True)
    assert run.returncode == 2 and "did you mean tanh" in run.stderr and run.stdout == ""
