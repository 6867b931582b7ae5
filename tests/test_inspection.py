"""The report on a whole model: both sides joined, refusals told, and every form it takes."""

import io
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import initjax as ij

KEY = jax.random.key(0)


def batch(n=6, d=16):
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


class Tanh(nn.Module):
    """Hidden layers with known standard deviations."""

    hidden: int = 2
    width: int = 48
    sigma_w: float = 1.5
    sigma_b: float = 0.3

    @nn.compact
    def __call__(self, x):
        options = dict(
            kernel_init=nn.initializers.variance_scaling(self.sigma_w**2, "fan_in", "normal"),
            bias_init=nn.initializers.normal(self.sigma_b),
        )
        for _ in range(self.hidden):
            x = jnp.tanh(nn.Dense(self.width, **options)(x))
        return nn.Dense(3, **options)(x)


@pytest.fixture(scope="module")
def report():
    return ij.inspect(Tanh(), batch(), key=KEY, seeds=24)


def test_predicted_second_moments_follow_the_variance_map(report):
    q = 1.5**2 * np.mean(batch().astype(np.float64) ** 2, axis=1) + 0.3**2
    for layer in report.layers:
        # the widths of the initializers are float32 constants, snapped to the decimals they stand for
        np.testing.assert_allclose(layer.q, q.mean(), rtol=1e-6)
        q = 1.5**2 * ij.gaussian.moment(jnp.tanh, q) + 0.3**2


def test_predicted_gradients_are_products_of_chi(report):
    chi = [layer.chi for layer in report.layers]
    # both are means over inputs with different q: a product of means is not the mean of products
    assert report.layers[0].gradient == pytest.approx(chi[1] * chi[2], rel=0.05)
    assert report.layers[-1].gradient == pytest.approx(1.0, rel=1e-12)
    assert report.gradient_ratio == report.layers[0].gradient / report.layers[-1].gradient


def test_measurements_lie_around_the_predictions(report):
    for layer in report.layers:
        assert abs(layer.q_measured.mean - layer.q) < 5 * layer.q_measured.standard_error  # 24 draws: t, not normal
        gap = abs(layer.correlation_measured.mean - layer.correlation)
        assert gap < 5 * layer.correlation_measured.standard_error
    gap = abs(report.gradient_ratio_measured.mean - math.log10(report.gradient_ratio))
    assert gap < 5 * report.gradient_ratio_measured.standard_error
    # the largest eigenvalue of 4 networks of width 48
    measured = report.max_learning_rate_measured
    assert abs(measured.mean - report.max_learning_rate) < max(
        5 * measured.standard_error, 0.3 * report.max_learning_rate
    )


def test_spectrum_is_that_of_the_kernel(report):
    kernel = ij.kernel_fn(Tanh(), batch())(batch())
    # rounding: the report computes more parts of the kernel in one go
    assert report.condition_number == pytest.approx(float(ij.condition_number(kernel.ntk)), rel=1e-12)
    assert report.max_learning_rate == pytest.approx(float(ij.max_learning_rate(kernel.ntk, len(batch()))), rel=1e-12)


@pytest.mark.parametrize(("sigma_w", "phase"), [(0.3, "ordered"), (1.0, "critical"), (6.0, "chaotic")])
def test_phase_is_what_the_whole_depth_does(sigma_w, phase):
    found = ij.inspect(Tanh(4, 16, sigma_w, 0.01), batch(3), key=KEY, depth_report=False, kernels=False)
    assert found.phase == phase
    assert found.networks == found.kernels == 0 and found.gradient_ratio_measured is None


class Tied(nn.Module):
    """A weight and its transpose in one forward pass, which no theory of independent layers covers."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 32), jnp.float32)
        return nn.Dense(2)(jnp.tanh(x @ kernel) @ kernel.T)


def test_refusal_is_told_and_the_measured_side_stands():
    with pytest.raises(ij.UnsupportedLayerError) as error:
        ij.kernel_fn(Tied(), batch())
    found = ij.inspect(Tied(), batch(), key=KEY, seeds=3)
    assert found.refusal == str(error.value)
    assert found.phase == "unknown" and found.condition_number is None
    assert [layer.name for layer in found.layers] == ["kernel", "kernel#2", "Dense_0"]
    assert all(layer.q is None and layer.q_measured.mean > 0 for layer in found.layers)
    assert found.condition_number_measured.mean > 0
    assert "No exact prediction" in text_of(found)


def test_a_module_used_several_times_is_predicted_at_its_last_use():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(64)(x))
            again = nn.Dense(64)
            for _ in range(2):
                x = jnp.tanh(again(x))
            return nn.Dense(2)(x)

    found = ij.inspect(Shared(), batch(4, 64), key=KEY, kernels=False, seeds=16)
    assert [layer.name for layer in found.layers] == ["Dense_0", "Dense_1", "Dense_1#2", "Dense_2"]
    _, second, third, _ = found.layers
    assert second.q is None
    gap = abs(third.q_measured.mean - third.q)
    assert gap < 5 * third.q_measured.standard_error < second.q_measured.mean - third.q_measured.mean + gap


def test_nnx_factory_and_linen_agree():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.relu(self.first(x)))

    linen = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(3)])
    options = dict(key=KEY, depth_report=False, kernels=False)
    ours, theirs = ij.inspect(lambda rngs: Net(rngs), batch(), **options), ij.inspect(linen, batch(), **options)
    assert [layer.name for layer in ours.layers] == ["first", "last"]
    assert [layer.q for layer in ours.layers] == pytest.approx([layer.q for layer in theirs.layers], rel=1e-12)
    assert ours.condition_number == pytest.approx(theirs.condition_number, rel=1e-9)


def text_of(found):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


def test_table_fits_a_terminal_and_names_every_layer(report):
    text = text_of(report)
    assert all(layer.name in text for layer in report.layers)
    assert "NTK condition number" in text and "…" not in text


@pytest.mark.slow
def test_table_of_a_deep_model_leaves_out_the_middle():
    found = ij.inspect(Tanh(hidden=40, width=8), batch(2), key=KEY, depth_report=False, kernels=False)
    text = text_of(found)
    assert "Dense_0" in text and "Dense_40" in text and "Dense_20" not in text and "..." in text


def test_dict_is_json(report):
    from initjax.commands.output import strict_json

    data = json.loads(strict_json(report.to_dict()))
    assert data["layers"][0]["q_measured"].keys() == {"mean", "standard_error"}
    assert data["refusal"] is None and data["inputs"] == 6 and data["networks"] == 24 and data["kernels"] == 4


def test_figure_and_html(report, tmp_path):
    figure = report.plot()
    assert len(figure.axes) == 3 and all(axes.get_xlabel() == "layer" for axes in figure.axes)
    text = report.to_html(tmp_path / "report.html").read_text()
    assert text.startswith("<!doctype html>") and "data:image/png;base64," in text
    assert "Dense_1" in text and "http" not in text  # self-contained


@pytest.mark.parametrize("seeds", [0, True])
def test_seeds_are_checked(seeds):
    with pytest.raises(ij.InputError, match=f"seeds = {seeds}"):
        ij.inspect(Tanh(), batch(), key=KEY, seeds=seeds)


def test_a_class_and_a_wrong_shape_are_refused():
    with pytest.raises(ij.InputError, match="class"):
        ij.inspect(Tanh, batch(), key=KEY)
    # a convolution over more axes than the inputs have
    with pytest.raises(ij.InputError, match="Accepted: "):
        ij.inspect(nn.Sequential([nn.Conv(2, (3, 3)), nn.Dense(1)]), batch(2, 4)[0], key=KEY)


# ------------------------------------------------------------------ blocks, fans, and models that only run


class Stack(nn.Module):
    sigma_w: float

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64)(x)
        for i in range(4):
            init = nn.initializers.variance_scaling(self.sigma_w**2, "fan_in", "normal")
            x = jnp.tanh(nn.Dense(64, kernel_init=init, name=f"block_{i}")(x))
        return nn.Dense(1)(x)


@pytest.mark.parametrize(("sigma_w", "phase"), [(0.5, "ordered"), (3.0, "chaotic")])
def test_repeated_blocks_have_a_phase(sigma_w, phase):
    x = np.random.default_rng(5).normal(size=(2, 8)).astype(np.float32)
    (block,) = ij.inspect(Stack(sigma_w), x, key=jax.random.key(0), kernels=False, seeds=8).blocks
    assert (block.name, block.count, block.phase) == ("block_*", 4, phase)
    # 8 networks of width 64, means over three blocks: a standard deviation of 10 %
    assert abs(block.chi_measured / block.chi - 1) < 0.4


def test_wrong_fans_are_told():
    model = nn.Sequential([nn.ConvTranspose(4, (4, 4), (2, 2)), lambda x: x.mean((1, 2)), nn.Dense(1)])
    report = ij.inspect(model, np.ones((1, 4, 4, 3), np.float32), key=jax.random.key(0), kernels=False, seeds=1)
    assert report.wrong_fans == ("layers_0/kernel: multiply by 2",)


class TwoOutputs(nn.Module):
    """What the kernels have no answer for: two outputs, coupled by batch statistics."""

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(16)(x))
        return {"a": nn.Dense(1)(h), "b": nn.Dense(2)(nn.relu(h))}


def test_one_missing_side_leaves_the_others():
    x = np.random.default_rng(6).normal(size=(4, 8)).astype(np.float32)
    report = ij.inspect(TwoOutputs(), x, key=jax.random.key(0), seeds=2)
    assert all(layer.q_measured is not None for layer in report.layers) and len(report.layers) == 3
    assert report.kernels == 0 and any("tangent kernels are not measured" in note for note in report.notes)
    assert report.refusal is not None and "one floating array" in report.refusal


def test_estimated_predictions_stand_beside_measurements():
    class PostActivation(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(64)(x))
            return nn.Dense(1)(nn.relu(x + nn.Dense(64)(x)))

    x = np.random.default_rng(7).normal(size=(3, 8)).astype(np.float32)
    options = dict(key=jax.random.key(0), kernels=False, seeds=16, on_unsupported="monte_carlo", particles=2048)
    report = ij.inspect(PostActivation(), x, **options)
    assert report.refusal is None and report.particles == 2048
    for layer in report.layers[:2]:
        # the predicted side has 16 networks of 128 channels: 4 %
        assert abs(layer.q_measured.mean - layer.q) < 4 * layer.q_measured.standard_error + 0.15 * layer.q


class Recurrent(nn.Module):
    """The carry of its scan is float32, whatever the parameters are."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.GRUCell(8))(x)[:, -1])


@pytest.mark.x64_off
def test_tangent_kernels_of_a_model_that_insists_on_its_precision():
    x = np.random.default_rng(8).normal(size=(3, 2, 4)).astype(np.float32)
    report = ij.inspect(Recurrent(), x, key=jax.random.key(0), seeds=1, depth_report=False)
    assert report.kernels == 1 and report.condition_number_measured is not None


@pytest.mark.slow
def test_layers_on_a_few_inputs_and_the_spectrum_on_all():
    x = batch(100)
    found = ij.inspect(Tanh(1, 16), x, key=KEY, seeds=2)
    few = ij.kernel_fn(Tanh(1, 16), x)(x[:64])
    assert found.layers[1].q == pytest.approx(float(np.mean(few.layers[1].q)), rel=1e-12)
    whole = ij.kernel_fn(Tanh(1, 16), x)(x, get="ntk").ntk
    assert found.condition_number == pytest.approx(float(ij.condition_number(whole)), rel=1e-9)
    assert found.condition_number > float(ij.condition_number(few.ntk))  # of a larger matrix with the first inside
    assert found.inputs == 100 and found.condition_number_measured.mean > 0


def test_reprs_are_a_few_lines(report):
    kernel = ij.kernel_fn(Tanh(), batch())(batch())
    assert len(repr(report).splitlines()) <= 6 and "NTK condition number" in repr(report)
    for value in (kernel, kernel.layers[0], kernel.layers):
        assert len(repr(value)) < 400
