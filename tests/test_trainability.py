"""The forecast: its numbers against closed forms, its confidence against the committed calibration, its refusals."""

import csv
import io
import json
import math
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import initjax as ij
from initjax import forecast

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def batch(n=6, d=16):
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


class Relu(nn.Module):
    """chi = sigma_w^2 / 2 in every layer, whatever q."""

    depth: int = 5
    sigma_w: float = 1.0

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.variance_scaling(self.sigma_w**2, "fan_in", "normal")
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(48, kernel_init=kernel)(x))
        return nn.Dense(3, kernel_init=kernel)(x)


@pytest.fixture(scope="module")
def found():
    return ij.trainability(Relu(), batch(), learning_rate=1e-3, seeds=2)


def test_depth_is_six_e_folds_of_chi(found):
    assert (found.depth, found.unit) == (6, "layers")
    assert found.log_gain == pytest.approx(5 * math.log(2), rel=1e-6)  # float32 constants of the initializer
    assert found.max_depth.value == pytest.approx(1 + 6 / math.log(2), rel=1e-6)
    assert "0.5 a layer" in found.max_depth.assumption


def test_critical_networks_have_no_depth_limit():
    critical = ij.trainability(Relu(3, 2**0.5), batch(), seeds=1)
    assert critical.max_depth.value == math.inf and critical.chance > 0.9 and "no depth limit" in critical.verdict


def test_rate_and_time_are_those_of_the_kernel(found):
    ntk = np.asarray(ij.kernel_fn(Relu(), batch())(batch()).ntk)
    values = np.linalg.eigvalsh(ntk)[::-1]
    assert found.max_learning_rate.value == pytest.approx(2 * 6 / values[0], rel=1e-10)
    assert np.cumsum(values)[found.kept - 1] >= 0.99 * values.sum() > np.append(0, np.cumsum(values))[found.kept - 1]
    left = (1 - 1e-3 * values[found.kept - 1] / 6) ** found.slowest_mode.value
    assert left == pytest.approx(math.exp(-1), rel=1e-9) and found.stable


def test_a_rate_above_the_limit_is_told_and_takes_for_ever(found):
    fast = ij.trainability(Relu(2), batch(), learning_rate=10.0, seeds=2)
    assert not fast.stable and fast.slowest_mode.value == math.inf and "expect divergence" in fast.verdict


def test_models_outside_the_theory_are_measured_and_it_is_said():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (16, 16), jnp.float32))
            self.out = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(jnp.tanh(x @ self.kernel[...]) @ self.kernel[...].T))

    forecast = ij.trainability(lambda rngs: Tied(rngs), batch(), seeds=2)
    assert "measured" in forecast.max_depth.assumption and "measured" in forecast.max_learning_rate.assumption
    assert any("No exact theory" in note for note in forecast.notes)
    assert 0 < forecast.slowest_mode.value < math.inf


@pytest.mark.x64_off
def test_tokens_of_numpy_have_a_measured_kernel_without_64_bit_types():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 8)(tokens)
            return nn.Dense(2)((x + nn.MultiHeadDotProductAttention(1)(x)).mean(axis=1))

    forecast = ij.trainability(Attention(), np.arange(12).reshape(4, 3) % 7, seeds=1)
    assert "measured" in forecast.max_learning_rate.assumption and 0 < forecast.max_learning_rate.value < math.inf


def test_report_is_printable_and_plain(found):
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=200).print(found.table())
    shown = " ".join(text.getvalue().split())
    for part in ("maximum trainable depth", "calibration networks", "Trainability", "steps for a factor e"):
        assert part in shown
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["max_depth"]["confidence"] and "report" not in plain


def test_confidence_is_that_of_the_committed_calibration():
    summary = json.loads((RESULTS / "trainability.json").read_text())
    assert [forecast.Bin(*row.values()) for row in summary["e-folds"]] == list(forecast.CALIBRATION)
    rate = summary["rate"]
    quoted = (forecast.RUNS, forecast.BURST_BELOW_HALF, forecast.BURST_ABOVE_TWICE)
    assert quoted == (rate["runs"], rate["exploded_below_half_the_limit"], rate["exploded_above_twice_the_limit"])


def test_calibration_is_the_count_of_the_committed_runs():
    with (RESULTS / "trainability.csv").open() as file:
        rows = list(csv.DictReader(file))
    best: dict = {}
    for row in rows:
        key = row["family"], row["sigma_w"], row["depth"]
        best[key] = max(best.get(key, (0.0, 0.0)), (float(row["accuracy"]), float(row["chi_to_depth"])))
    assert len(rows) == forecast.RUNS and len(best) >= 200
    lower = 0.0
    for bin in forecast.CALIBRATION:
        here = [accuracy > 0.5 for accuracy, gain in best.values() if lower <= gain < bin.below]
        assert len(here) == bin.networks and np.mean(here) == pytest.approx(bin.trained, abs=6e-4)
        lower = bin.below


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(learning_rate=0.0), "a positive finite number"),
        (dict(learning_rate=float("nan")), "a positive finite number"),
        (dict(learning_rate=True), "a positive finite number"),
        (dict(keep=0.0), r"a share in \(0, 1\]"),
        (dict(inputs=np.ones((1, 16), np.float32)), "at least two examples"),
        (dict(model=nn.Dense), "class"),
        (dict(model=nn.Dense(2, use_bias=False), inputs=np.zeros((2, 16), np.float32)), "largest eigenvalue 0"),
    ],
)
def test_what_is_refused(options, text):
    options = dict(model=Relu(), inputs=batch(), seeds=1) | options
    with pytest.raises(ij.InputError, match=text):
        ij.trainability(options.pop("model"), options.pop("inputs"), **options)
