"""Every condition of the exact rules: what a wrong acceptance would have returned, against the module's own networks.

Two statistics of the first output tell: its second moment, which is the NNGP kernel, and its shape, E|y| over the root
of the second moment, which is that of a normal number where the kernel of a wide network is a number and smaller where
it stays random. Conditions that have tests of their own: biases that are not Gaussian (`test_infinite`), scalar
products, batch statistics (`test_infinite_coverage`), means over channels as the output (`test_third_party`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_sequence
from flax import linen as nn
from zoo_table import INPUTS

import initjax as ij
from initjax.errors import UnsupportedLayerError
from initjax.trace.flax import as_functional

NETWORKS = 12000
NORMAL = (2 / np.pi) ** 0.5  # E|y| of a standard normal number
ONES = np.ones((1, 10), np.float32)
FIRST = np.sqrt(10).astype(np.float32) * np.eye(1, 10, dtype=np.float32)  # mean square 1, in one entry
IMAGE, SEQUENCE, TOKENS = (INPUTS[name][:1] for name in ("images", "sequences", "tokens"))


class UnequalColumns(nn.Module):
    """Every other column of the weights is zero."""

    @nn.compact
    def __call__(self, x):
        def init(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) * (jnp.arange(shape[1]) % 2).astype(dtype)

        return nn.Dense(1)(jnp.tanh(nn.Dense(64, kernel_init=init)(x)))


class Doubling(nn.Module):
    """A loop that ends when the activations are large enough."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        h = jax.lax.while_loop(lambda h: jnp.mean(h**2) < 8.0, lambda h: 2 * h, h)
        return nn.Dense(1)(h)


class Branching(nn.Module):
    """One of two nonlinearities, by the data."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        return nn.Dense(1)(jax.lax.cond(h[0, 0] > 0, jnp.abs, jnp.zeros_like, h))


class Ranked(nn.Module):
    """The channels in order, the largest quarter kept."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.sort(nn.Dense(64)(x), axis=-1)[:, 48:])


DEPTHWISE = nn.Sequential([nn.Conv(64, (1, 1)), nn.Conv(64, (1, 1), feature_group_count=64)])


def equal_keys(key):
    """Two weights with one key are one weight."""
    init = nn.initializers.lecun_normal()
    return {name: init(key, (10, 64), jnp.float32) for name in "ab"} | {"head": init(jax.random.key(1), (64, 1))}


def difference(params, x):
    return (x @ params["a"] - x @ params["b"]) @ params["head"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A condition.

    accepted : second moment (or the shape of a normal number) of the output that a wrong acceptance would return.
    words : of the reason. shape : which of the two is compared.
    """

    name: str
    model: Any
    x: Any
    accepted: float
    words: str
    shape: bool = False


CASES = [
    # logits of the token itself are e . LN(e + ...), not a sum of independent terms of variance 1 / 32
    Case("W and its transpose", zoo_sequence.TiedLanguageModel(), TOKENS, 1.0, "transpose"),
    Case("token mixing", zoo.TokenMixing(), SEQUENCE, NORMAL, "token mixing", True),
    Case("known matrix over channels", zoo.FixedMatrix(), ONES, NORMAL, "fixed matrix", True),
    Case("known kernel over channels", zoo.Blurred(), IMAGE, NORMAL, "known kernel", True),
    Case("one channel in each group", DEPTHWISE, IMAGE[:, :1, :1], NORMAL, "depthwise", True),
    # h and its maximum taken as two independent normals
    Case("maximum over channels", zoo.ChannelMax(), ONES, 2.0, "maximum"),
    Case("order of channels", Ranked(), ONES, 1.0, "order of the entries"),
    # four experts averaged with equal weights: relu halves q = 9, and 4 times (1/4)^2 is left
    Case("routing", zoo_sequence.TopOneExperts(), 3 * ONES, 9 / 8, "routing"),
    Case("weights that are not centred", zoo.OffsetWeights(), ONES, 0.5 * 10 * 0.01 / 12, "mean"),
    Case("weights of unequal variance", UnequalColumns(), ONES, ij.gaussian.moment(jnp.tanh, 5.0), "identically"),
    # the raw input taken as one more normal number of its mean square
    Case("raw input as a residual", zoo.RawSkip(), FIRST, 1.0, "varies along channels"),
    # entry (i, j) and entry (j, i) taken as independent everywhere
    Case("channel axes that change places", zoo.ChannelTranspose(), ONES, 2.0, "change places"),
    Case("one random number for all channels", zoo.SharedScalar(), ONES, NORMAL, "repeated over all channels", True),
    # the sum of relu(u) and W relu(u) taken as Gaussian
    Case("several fields in one function", zoo.PostActivationResNet(), ONES, 0.5, "several different random fields"),
    Case(
        "a gate with its own Gaussian",
        zoo.DependentGate(),
        ONES,
        2 * float(ij.gaussian.moment(jax.nn.silu, 1.0)),
        "several different random fields",
    ),
    Case("a loop that depends on data", Doubling(), ONES, 1.0, "data-dependent loop"),
    Case("a branch that depends on data", Branching(), ONES, 1.0, "depends on data"),
    Case("two weights with one key", (equal_keys, difference), ONES, 2.0, "same random key"),
]


def outputs(model, x):
    functional = as_functional(model, jnp.asarray(x))
    one = lambda key: functional.apply(functional.init(key), jnp.asarray(x)).reshape(-1)[own(x)]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), NETWORKS)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys), np.float64)


def own(x) -> int:
    """The logit of the last token itself, the first output otherwise."""
    return int(x[0, -1]) if x.dtype.kind == "i" else 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_acceptance_would_have_been_wrong(case):
    with pytest.raises(UnsupportedLayerError, match=case.words) as caught:
        ij.kernel_fn(case.model, case.x)
    assert all(caught.value.parts) and caught.value.layer
    y = outputs(case.model, case.x)
    square = np.mean(y**2)
    measured, parts = square, y**2
    if case.shape:
        measured = np.mean(np.abs(y)) / square**0.5
        parts = np.abs(y) / square**0.5 - measured / 2 * y**2 / square  # the delta method
    error = np.std(parts) / NETWORKS**0.5
    assert abs(measured - case.accepted) > 6 * error
    # and beyond what 64 channels leave at finite width, where the shape moves by a kurtosis of 5/64 over 24
    assert abs(measured - case.accepted) > (0.01 if case.shape else 0.1 * case.accepted)
