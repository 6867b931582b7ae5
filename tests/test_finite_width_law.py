"""The same module at three widths: the bias of the NNGP kernel falls as 1 / width, the rest is within errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from zoo_table import INPUTS

import initjax as ij

OUTPUTS = 64  # the kernel of one network is a mean over its outputs: its error is then that of the hidden layers
WIDTHS = (16, 32, 64)
normal = nn.initializers.variance_scaling(1.8, "fan_in", "normal")  # exactly Gaussian, so that only widths are finite


class Plain(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.gelu(nn.Dense(self.width, kernel_init=normal)(x))
        return nn.Dense(OUTPUTS, kernel_init=normal)(x)


class Convolutional(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(self.width, (3, 3), kernel_init=normal)(x))
        return nn.Dense(OUTPUTS, kernel_init=normal)(x.mean(axis=(1, 2)))


class Residual(nn.Module):
    """Pre-normed residual blocks."""

    width: int

    @nn.compact
    def __call__(self, x):
        dense = lambda x: nn.Dense(self.width, kernel_init=normal)(x)  # noqa: E731
        x = dense(x)
        for _ in range(2):
            x = x + dense(nn.relu(dense(nn.LayerNorm()(x))))
        return nn.Dense(OUTPUTS, kernel_init=normal)(jnp.tanh(x))


class Gated(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        dense = lambda x: nn.Dense(self.width, kernel_init=normal)(x)  # noqa: E731
        x = dense(x)
        x = x + dense(nn.silu(dense(nn.RMSNorm()(x))) * dense(nn.RMSNorm()(x)))
        return nn.Dense(OUTPUTS, kernel_init=normal)(nn.RMSNorm()(x))


class Recurrent(nn.Module):
    """Weights shared over time."""

    width: int

    @nn.compact
    def __call__(self, x):
        cell = nn.SimpleCell(self.width, kernel_init=normal, recurrent_kernel_init=normal)
        return nn.Dense(OUTPUTS, kernel_init=normal)(nn.RNN(cell)(x)[:, -1])


CASES = {
    "MLP": (Plain, "vectors"),
    "CNN": (Convolutional, "images"),
    "residual, LayerNorm": (Residual, "vectors"),
    "gated, RMSNorm": (Gated, "vectors"),
    "recurrent": (Recurrent, "sequences"),
}


def kernels(model, x, networks):
    """For every network the mean of y y' over its outputs, and y y' of the first output alone."""

    def one(key):
        y = model.apply(model.init(key, x), x)
        return y @ y.T / OUTPUTS, jnp.outer(y[:, 0], y[:, 0])

    keys = jax.random.split(jax.random.key(0), networks)
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=250))(keys)
    return [np.asarray(part, np.float64) for part in found]


RESOLVED = {"MLP", "gated, RMSNorm", "residual, LayerNorm"}  # the others' biases at width 16 are below the error


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bias_falls_as_one_over_the_width(name):
    kind, inputs = CASES[name]
    x, networks = jnp.asarray(INPUTS[inputs][:2]), 4000
    exact = ij.kernel_fn(kind(512), x)(x, get="nngp").nngp  # of any width: the notes tell narrow layers
    root = np.sqrt(np.diag(exact))
    scaled, errors = [], []
    for width in WIDTHS:
        samples, first = kernels(kind(width), x, networks)
        scaled.append(width * (samples.mean(0) - exact) / np.outer(root, root))
        errors.append(width * samples.std(0) / networks**0.5 / np.outer(root, root))
    for i in range(1, len(WIDTHS)):
        # width * bias is one number: a kernel wrong by 3 % would be 1.4 apart between widths 16 and 64
        assert np.all(np.abs(scaled[i] - scaled[0]) < 4 * np.hypot(errors[i], errors[0])), WIDTHS[i]
    if name in RESOLVED:
        assert np.max(np.abs(scaled[0]) / errors[0]) > 4
    # one output of the widest, by Wick standard errors: the bias of at most 2 / 64 is one and a half of these
    wick = np.sqrt((np.outer(root**2, root**2) + exact**2) / networks)
    assert np.all(np.abs(first.mean(0) - exact) < 4 * wick)
