"""Predicted spread of q over networks against exact laws, `finite_width`, and networks of the module itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import initjax as ij

KEY = jax.random.key(0)


def batch(n=3, d=6):
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


class Net(nn.Module):
    widths: tuple = (40, 10, 40)
    phi: object = nn.relu
    sigma_w: float = 2**0.5
    sigma_b: float = 0.0

    @nn.compact
    def __call__(self, x):
        options = dict(kernel_init=nn.initializers.variance_scaling(self.sigma_w**2, "fan_in", "normal"))
        if self.sigma_b:
            options["bias_init"] = nn.initializers.normal(self.sigma_b)
        for n in self.widths:
            x = self.phi(nn.Dense(n, **options)(x))
        return nn.Dense(4, **options)(x)


def report(model, x=None, **options):
    options = dict(kernels=False, depth_report=False) | options
    return ij.inspect(model, batch() if x is None else x, key=KEY, **options)


def test_relu_networks_have_the_exact_law_and_name_the_bottleneck():
    found = report(Net())
    ratio = [1 + (layer.q_std / layer.q) ** 2 for layer in found.layers]
    # products of four numbers; q carries the float32 constants of the initializer, snapped to their decimals
    np.testing.assert_allclose(ratio, [1, 1 + 5 / 40, (1 + 5 / 40) * 1.5, (1 + 5 / 40) ** 2 * 1.5], rtol=1e-6)
    assert found.bottleneck.name == "Dense_1" and found.bottleneck.units == 10
    np.testing.assert_allclose(sum(layer.width_share for layer in found.layers[:-1]), 1)
    assert found.layers[-1].width_share is None
    assert "Spread over networks" in str(found._repr_html_())


@pytest.mark.slow
def test_tanh_networks_meet_finite_width_and_networks_of_the_module():
    w, b, widths = 1.4, 0.3, (60, 60, 60, 60)
    x = np.ones((1, 6), np.float32)
    found = report(Net(widths, jnp.tanh, w, b), x)
    theory = ij.finite_width(jnp.tanh, w, b, widths, q0=w**2 + b**2)
    q_std = np.array([layer.q_std for layer in found.layers])
    np.testing.assert_allclose(q_std, np.sqrt(theory.variance), rtol=1e-6)
    measured = ij.measure(Net(widths, jnp.tanh, w, b), x, key=KEY, seeds=2000).q_samples[:, :, 0]
    # the mean over n units of a layer adds its own sampling: Var = v + (2 / n) (K^2 + v)
    n = np.array([*widths, 4])
    expected = q_std**2 + 2 / n * (theory.q**2 + q_std**2)
    # sampling error of a variance 3 % (2000 networks, tails above normal); second order: sum of 1 / n = 7 %
    np.testing.assert_allclose(measured.var(axis=0), expected, rtol=0.15)


def test_nnx_factories_scaled_layers_and_branches_are_followed():
    class Two(nnx.Module):
        def __init__(self, rngs):
            he = nnx.initializers.he_normal()
            self.a, self.b = nnx.Linear(6, 20, kernel_init=he, rngs=rngs), nnx.Linear(20, 5, kernel_init=he, rngs=rngs)

        def __call__(self, x):
            return self.b(2.0 * nnx.leaky_relu(self.a(x), 0.2))

    found = report(lambda rngs: Two(rngs))
    kappa = 6 * (1 + 0.2**4) / (1 + 0.2**2) ** 2 - 1
    np.testing.assert_allclose((found.layers[1].q_std / found.layers[1].q) ** 2, kappa / 20, rtol=1e-5)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))


@pytest.mark.parametrize(
    "model, x, known",
    [
        (Norm(), None, ["Dense_0", "Dense_2"]),
        (nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(4, (3, 3))]), np.ones((2, 5, 5, 3), np.float32), []),
        (nn.Dense(3, kernel_init=nn.initializers.orthogonal()), None, []),
    ],
    ids=["norm", "conv", "orthogonal"],
)
def test_where_the_recursion_has_no_answer_none_is_given_and_it_is_told(model, x, known):
    found = report(model, x)
    assert [layer.name for layer in found.layers if layer.q_std is not None] == known
    assert found.refusal is not None or any("is not predicted" in note for note in found.notes)


def test_networks_too_deep_for_their_width_are_told():
    assert not any("no single network" in note for note in report(Net((64, 64), jnp.tanh, 1.5, 0.1)).notes)
    assert any("no single network" in note for note in report(Net((4, 4, 4), nn.relu, 1.5, 0.1)).notes)
