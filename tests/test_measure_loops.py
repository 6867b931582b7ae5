"""Layers inside scans: equal to those of the same network written out turn by turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_sequence
import zoo_table
from flax import linen as nn
from flax import nnx

import initjax as ij

T, N, D = 3, 2, 4
X = jax.random.normal(jax.random.key(0), (N, T, D))
SQUARE = (D, D)


def init(key):
    names = ("w", "u", "b", "stack", "head")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    shapes = {"w": SQUARE, "u": SQUARE, "b": (D,), "stack": (T, *SQUARE), "head": (D, 1)}
    return {name: jax.random.normal(keys[name], shape, X.dtype) / 2 for name, shape in shapes.items()}


def network(params, x, loop, reverse=False):
    """Per turn: a shared weight on the state, one on the input, and a weight that belongs to the turn, in a loop of
    two turns inside the turn."""

    def turn(state, now):
        x, own = now
        state = jnp.tanh(state @ params["w"] + x @ params["u"] + params["b"])
        inner = lambda s, _: (jnp.sin(s @ own), s)  # noqa: E731
        state, _ = loop(inner, state, jnp.zeros(2, x.dtype), False)
        return state, state

    xs = (x.swapaxes(0, 1), params["stack"])
    state, states = loop(turn, x[:, 0] / 2, xs, reverse)
    return (state + states[0]) @ params["head"]


def scanned(turn, state, xs, reverse):
    return jax.lax.scan(turn, state, xs, reverse=reverse)


def written_out(turn, state, xs, reverse):
    length, out = len(jax.tree.leaves(xs)[0]), {}
    for i in reversed(range(length)) if reverse else range(length):
        state, out[i] = turn(state, jax.tree.map(lambda a, i=i: a[i], xs))
    return state, jnp.stack([out[i] for i in range(length)])


@pytest.mark.parametrize("reverse", [False, True])
def test_turns_of_a_scan_are_the_layers_of_a_written_out_loop(reverse):
    found, expected = (
        ij.measure((init, functools.partial(network, loop=loop, reverse=reverse)), X, key=jax.random.key(1), seeds=3)
        for loop in (scanned, written_out)
    )
    assert found.layers == expected.layers and len(found.layers) == T * (2 + 2) + 1
    assert found.layers[:4] == ("w", "u", "stack", "stack#2") and not found.not_measured
    for name in ("q_samples", "gradient_samples", "correlation"):
        # the same products in float64
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-14)


def test_of_a_long_loop_some_turns_are_shown():
    def apply(params, x):
        state, _ = jax.lax.scan(lambda s, _: (jnp.tanh(s @ params["w"]), None), x[:, 0], length=40)
        return state

    found = ij.measure((lambda key: {"w": init(key)["w"]}, apply), X, key=jax.random.key(1), seeds=2)
    assert found.layers == ("w", "w#2", "w#4", "w#8", "w#16", "w#32", "w#40")
    assert np.all(found.gradient[-1] > 0) and np.all(found.gradient[0] < found.gradient[-1])


CASES = {
    "linen LSTM": (zoo_sequence.Recurrent(), ["RNN_0/LSTMCell_0"], 8),
    "linen GRU": (zoo_sequence.Recurrent(nn.GRUCell), ["GRUCell_0"], 6),
    "nnx LSTM": (lambda rngs: zoo_sequence.RecurrentNnx(rngs=rngs), ["layer/cell"], 8),
    "nnx RNN": (lambda rngs: zoo_sequence.RecurrentNnx(nnx.SimpleCell, rngs=rngs), ["layer/cell"], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_recurrent_layers_of_flax_are_measured(name):
    model, _, weights = CASES[name]
    x = zoo_table.INPUTS["sequences"]
    found = ij.measure(model, x, key=jax.random.key(2), seeds=2)
    assert len(found.layers) == weights * x.shape[1] + 1 and not found.not_measured
    assert np.all(np.isfinite(found.q)) and np.all(found.gradient[-1] > 0)


@pytest.mark.slow
def test_scanned_blocks_have_the_signals_that_theory_predicts():
    x = zoo_table.INPUTS["vectors"]
    report = ij.inspect(zoo.ScannedBlocks(), x, key=jax.random.key(3), seeds=16, kernels=False)
    assert len(report.layers) == 2 + 3 * 2 and not any("not measured" in note for note in report.notes)
    predicted = [layer for layer in report.layers if layer.q is not None]
    assert [layer.name for layer in predicted] == ["Dense_0", "blocks/Dense_1#3", "blocks/Dense_0#3", "Dense_1"]
    for layer in predicted:
        # 16 networks of width 128: Student's t; the last layer has one unit
        assert abs(layer.q_measured.mean - layer.q) < 5 * layer.q_measured.standard_error
