"""The demonstration: the honesty of its verdict, its data, and the whole path at a tiny size."""

import io
import json
import math

import numpy as np
import pytest

from initjax.demo.verdict import Estimate, Outcome, has_trained, is_trainable, verdict
from initjax.errors import InputError

CHANCE = 0.1


def outcome(name, trainable, accuracy, best=None, predicted=1e-3, measured=-3.0, kappa=(100.0, 2.0)):
    best = accuracy if best is None else best
    gradient, condition = Estimate(measured, 0.1), Estimate(kappa[1], 0.1)
    return Outcome(name, trainable, Estimate(accuracy, 0.01), best, predicted, gradient, kappa[0], condition)


def say(*outcomes):
    return verdict(outcomes, depth=40, steps=400, chance=CHANCE)


def test_verdict_reports_agreement_on_all():
    text = say(outcome("critical", True, 0.95), outcome("hot", False, 0.11))
    assert "agree on all 2" in text
    assert "critical would learn and hot would not" in text
    assert "critical 95.0 ± 1.0 %" in text and "hot 11.0 ± 1.0 %" in text
    assert "DISAGREE" not in text


def test_verdict_names_a_network_that_trained_against_the_prediction():
    text = say(outcome("critical", True, 0.95), outcome("hot", False, 0.9), outcome("cold", False, 0.1))
    assert "agree on 2 of 3 and DISAGREE on hot" in text


def test_verdict_names_a_network_that_failed_against_the_prediction():
    text = say(outcome("critical", True, 0.1), outcome("hot", False, 0.1))
    assert "agree on 1 of 2 and DISAGREE on critical" in text


def test_verdict_tells_when_another_learning_rate_rescues_a_failure():
    text = say(outcome("critical", True, 0.95), outcome("cold", False, 0.1, best=0.8))
    assert "though cold did learn at another learning rate" in text
    assert "another learning rate" not in say(outcome("critical", True, 0.95), outcome("cold", False, 0.1))


def test_verdict_gives_the_worst_gap_of_the_gradient_ratios():
    close = outcome("critical", True, 0.95, predicted=1.0, measured=math.log10(2.0))
    far = outcome("hot", False, 0.1, predicted=1e6, measured=4.0)
    assert "within a factor 1e+02 (worst: hot)" in say(close, far)
    assert "within a factor 2 (worst: critical)" in say(close, outcome("hot", False, 0.1, predicted=1e6, measured=6.0))


def test_verdict_survives_a_gradient_that_underflows():
    assert "within a factor inf (worst: cold)" in say(outcome("cold", False, 0.1, predicted=0.0, measured=-300.0))


def test_verdict_tells_whether_condition_numbers_come_in_the_predicted_order():
    low = outcome("critical", True, 0.95, kappa=(10.0, 1.0))
    assert "come in the predicted order, within a factor 10 (worst: cold)" in say(
        low, outcome("cold", False, 0.1, kappa=(1e6, 7.0))
    )
    assert "do NOT come in the predicted order" in say(low, outcome("cold", False, 0.1, kappa=(1e6, 0.5)))
    both_singular = say(low, outcome("cold", False, 0.1, kappa=(math.inf, math.inf)))
    assert "in the predicted order, within a factor 1 (" in both_singular
    assert "within a factor inf (worst: cold)" in say(low, outcome("cold", False, 0.1, kappa=(math.inf, 9.0)))


def test_verdict_is_one_sentence():
    text = say(outcome("critical", True, 0.95), outcome("hot", False, 0.11))
    assert text.endswith(".") and ". " not in text


@pytest.mark.parametrize(
    ("depth", "xi_grad", "xi_c", "expected"),
    [(40, math.inf, math.inf, True), (40, 14.7, 14.7, True), (40, 2.2, 2.2, False), (40, -30.0, 2.0, False)],
)
def test_is_trainable_takes_the_shorter_depth_scale(depth, xi_grad, xi_c, expected):
    assert is_trainable(depth, xi_grad, xi_c) is expected


def test_has_trained_lies_halfway_between_guessing_and_perfection():
    assert has_trained(0.56, 0.1) and not has_trained(0.54, 0.1)


def test_digits_have_unit_second_moment_and_a_fixed_split():
    from initjax.demo.data import load

    digits = load()
    for images in (digits.x_train, digits.x_test):
        # float32 sums of 64 squares
        np.testing.assert_allclose((images.astype(np.float64) ** 2).mean(axis=1), 1.0, rtol=1e-6)
    assert len(digits.x_train) == 1438 and len(digits.x_test) == 359
    assert len(np.unique(np.concatenate([digits.x_train, digits.x_test]), axis=0)) == 1797
    np.testing.assert_array_equal(load().x_test, digits.x_test)


def test_unit_second_moment_rejects_an_empty_image():
    from initjax.demo.data import unit_second_moment

    with pytest.raises(InputError, match=r"example 1 has mean square 0\.0"):
        unit_second_moment(np.array([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="mean square nan"):
        unit_second_moment(np.array([[np.nan, 2.0]]))


@pytest.mark.parametrize(
    ("sizes", "text"), [({"depth": 2}, "depth = 2"), ({"steps": 3, "evaluations": 4}, "evaluations = 4")]
)
def test_config_rejects_sizes_that_mean_nothing(sizes, text):
    from initjax.demo.run import DemoConfig

    with pytest.raises(InputError, match=text):
        DemoConfig(**sizes)


@pytest.fixture(scope="module")
def tiny_report():
    from initjax.demo.run import DemoConfig, run

    config = DemoConfig(
        depth=6,
        width=16,
        draws=3,
        seeds=2,
        ntk_images=6,
        steps=4,
        evaluations=2,
        batch=8,
        learning_rates=(1e-3, 3e-3),
        diagram_points=11,
    )
    told = []

    def progress(title, total):
        told.append([title, total, 0])

        def advance(done):
            told[-1][2] += done

        return advance

    return run(config, progress), told


@pytest.mark.slow
def test_progress_reaches_its_total_in_every_part(tiny_report):
    told = tiny_report[1]
    assert len(told) == 3
    assert all(total == done for _, total, done in told)


@pytest.mark.slow
def test_report_holds_every_promised_number(tiny_report):
    report = tiny_report[0]
    assert [line.name for line in report.lines] == ["cold", "Xavier", "critical", "hot"]
    assert [line.predicted.phase for line in report.lines] == ["ordered", "ordered", "critical", "chaotic"]
    for line in report.lines:
        assert line.predicted.q.shape == line.measured.q.mean.shape == (6,)
        assert line.predicted.gradient.shape == line.measured.log10_gradient.mean.shape == (6,)
        assert line.predicted.gradient[-1] == 1.0 and line.measured.log10_gradient.mean[-1] == 0.0
        assert line.predicted.ntk_condition_number > 1
        assert line.measured.log10_ntk_condition_number.mean > 0
        assert line.curve.mean.shape == (2,)


@pytest.mark.slow
def test_report_is_json_without_infinities(tiny_report):
    from initjax.commands.output import strict_json

    def refuse(name):
        raise AssertionError(name)

    data = json.loads(strict_json(tiny_report[0].to_dict()), parse_constant=refuse)
    assert (
        data["lines"][2]["predicted"]["xi_grad"] in ("Infinity", "-Infinity")
        or data["lines"][2]["predicted"]["xi_grad"] > 1e6
    )
    assert data["lines"][0]["curve"].keys() == {"mean", "standard_error"}
    assert data["verdict"].startswith("Before training")


@pytest.mark.slow
def test_table_and_figure_show_every_initialization(tiny_report, tmp_path):
    from rich.console import Console

    from initjax.demo.figure import draw

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tiny_report[0].table())
    text = console.export_text()
    assert "…" not in text  # nothing cut off at 80 columns
    for word in ("cold", "Xavier", "critical", "hot", "NTK condition", "grad first/last", "test accuracy"):
        assert word in text
    figure = draw(tiny_report[0])
    figure.savefig(tmp_path / "demo.png", dpi=40)
    assert (tmp_path / "demo.png").stat().st_size > 5000
    assert len(figure.axes) == 4
    assert all(axes.get_ylabel() for axes in figure.axes)
