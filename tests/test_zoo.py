"""The zoo: what the table says of every model, in linen and in nnx; twins have equal kernels."""

import jax
import numpy as np
import pytest
import zoo_table
from flax import nnx
from zoo_table import INPUTS, ZOO

import initjax as ij
from initjax.errors import UnsupportedLayerError

OF = {verdict: [entry for entry in ZOO if entry.verdict == verdict] for verdict in ("exact", "estimated", "refused")}
# more than five seconds each where nothing is compiled yet; their parts are in others of the table
LONG = {"DenseNet", "RNN", "U-Net", "WideResNet block, dropout", "ResNet v2, GroupNorm", "ResNet v1, zero gamma"}
ROTARY = "decoder block: RMSNorm, rotary attention, SwiGLU"
by_name = {"ids": lambda entry: entry.name.replace(" ", "_")}


def twins(entry):
    return [(entry.linen, entry.options), (entry.factory, {})]


def some_slow(entries):
    return [pytest.param(e, marks=pytest.mark.slow) if e.name in LONG else e for e in entries]


@pytest.mark.parametrize("entry", some_slow(OF["exact"]), **by_name)
def test_twins_have_equal_exact_kernels(entry):
    x = INPUTS[entry.inputs]
    linen, twin = (ij.kernel_fn(model, x, **options)(x) for model, options in twins(entry))
    assert linen.exact and twin.exact
    # the same sums up to their order; norms subtract means of the size of the values
    np.testing.assert_allclose(twin.nngp, linen.nngp, rtol=1e-10)
    np.testing.assert_allclose(twin.ntk, linen.ntk, rtol=1e-10)
    for kernel in (linen.nngp, linen.ntk):
        assert np.linalg.eigvalsh(kernel).min() > -1e-12 * kernel.max()


@pytest.mark.parametrize("entry", OF["estimated"] + OF["refused"], **by_name)
def test_both_twins_are_refused_for_the_reason_in_the_table(entry):
    x, words = INPUTS[entry.inputs], entry.why.partition("weight q/kernel")[0]  # each twin has names of its own
    for model, options in twins(entry):
        with pytest.raises(UnsupportedLayerError) as caught:
            ij.kernel_fn(model, x, **options)
        error = caught.value
        assert words in error.why and error.layer and error.primitive and all(error.parts)
        # the remedy is a remedy: an estimate is proposed where there is one, and only there
        estimated = entry.verdict == "estimated"
        assert ("monte_carlo" in error.remedy) == estimated
        if not estimated:
            with pytest.raises(UnsupportedLayerError, match="Monte Carlo does not cover"):
                ij.kernel_fn(model, x, on_unsupported="monte_carlo", **options)


def named(*names):
    return [entry for entry in ZOO if entry.name in names]


@pytest.mark.slow
@pytest.mark.parametrize("entry", named("ConvNeXt block", "ViT", "transformer, post-LN", ROTARY), **by_name)
def test_estimates_lie_around_networks_of_the_module(entry):
    """What `test_particles` does not have: depthwise convolution, class token, norm after the sum, rotary codes."""
    x = INPUTS[entry.inputs]
    found = ij.kernel_fn(entry.linen, x, on_unsupported="monte_carlo", particles=4096, **entry.options)(x)
    network = ij.monte_carlo_kernels(entry.linen, x, key=jax.random.key(1), draws=400, **entry.options)
    for part in ("nngp", "ntk"):
        mean, error = getattr(network, part), getattr(network, f"{part}_error")
        error = np.hypot(error, getattr(found.standard_error, part))
        # 4 standard errors of both sides; the module's own width is 32, its gap is of the order of 1/32
        assert np.all(np.abs(mean - getattr(found, part)) < 4 * error + 0.05 * getattr(found, part).max()), part


@pytest.mark.slow
@pytest.mark.parametrize("entry", named("LSTM", "ResNet v1, BatchNorm in evaluation", ROTARY), **by_name)
def test_twins_have_equal_estimates_within_their_errors(entry):
    x = INPUTS[entry.inputs]
    linen, twin = (
        ij.kernel_fn(model, x, on_unsupported="monte_carlo", particles=2048, key=jax.random.key(seed), **options)(x)
        for seed, (model, options) in enumerate(twins(entry))
    )
    for part in ("nngp", "ntk"):
        error = np.hypot(getattr(linen.standard_error, part), getattr(twin.standard_error, part))
        # errors from 16 networks each: Student's t with 30 degrees of freedom, 4.5 is 1e-4; entries are few
        assert np.all(np.abs(getattr(linen, part) - getattr(twin, part)) < 4.5 * error), part


@pytest.mark.parametrize("name", ["MLP, tanh", "SwiGLU", "embedding and classifier"])
def test_finished_instances_agree_within_the_precision_they_state(name):
    (entry,) = named(name)
    x = INPUTS[entry.inputs]
    exact, found = (ij.kernel_fn(m, x)(x) for m in (entry.linen, entry.nnx(rngs=nnx.Rngs(0))))
    estimated = ij.kernel_fn(entry.nnx(rngs=nnx.Rngs(0)), x).weights
    # the kernel is a product of variances: relative errors sqrt(2 / size) of the weights add in quadrature
    error = np.sqrt(sum(2 / np.prod(leaf.shape) for leaf in estimated if leaf.kind == "estimated"))
    assert any("estimated" in note for note in found.notes) and error < 0.3
    np.testing.assert_allclose(np.diag(found.nngp), np.diag(exact.nngp), rtol=4 * error)


def test_the_page_of_the_documentation_shows_the_table():
    assert zoo_table.PAGE.read_text(encoding="utf-8") == zoo_table.page(), "run `python tests/zoo_table.py`"
    assert len(ZOO) >= 24 and len({entry.name for entry in ZOO}) == len(ZOO)
