"""Kernels against an independent library, neural-tangents, where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import neural_tangents_shim

import initjax as ij

SIGMA_W, SIGMA_B = 1.4, 0.3
X = jax.random.normal(jax.random.key(0), (5, 6), jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)


@pytest.fixture(scope="module")
def peer():
    """neural-tangents under the promotion rules it was written for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield neural_tangents_shim.load()


class Mlp(nn.Module):
    phi: object

    @nn.compact
    def __call__(self, x):
        weights, biases = (
            nn.initializers.variance_scaling(SIGMA_W**2, "fan_in", "normal"),
            nn.initializers.normal(SIGMA_B),
        )
        for i in range(3):
            x = self.phi(x) if i else x
            x = nn.Dense(50, kernel_init=weights, bias_init=biases, param_dtype=X.dtype)(x)
        return x


# the peer's own error: about 1e-8 on the diagonal of the relu NTK, rounding elsewhere
@pytest.mark.parametrize(("phi", "name", "rtol"), [(jax.lax.erf, "Erf", 1e-10), (jax.nn.relu, "Relu", 5e-8)])
def test_infinite_width_kernels_agree_with_neural_tangents(peer, phi, name, rtol):
    stax = peer.stax
    dense = stax.Dense(50, SIGMA_W, SIGMA_B)
    layers = [dense, getattr(stax, name)(), dense, getattr(stax, name)(), dense]
    theirs = stax.serial(*layers)[2](X, None, ("nngp", "ntk"))
    ours = ij.kernel_fn(Mlp(phi), X, parameterization="ntk")(X)
    np.testing.assert_allclose(ours.nngp, theirs.nngp, rtol=rtol)
    np.testing.assert_allclose(ours.ntk, theirs.ntk, rtol=rtol)


def test_empirical_ntk_agrees_with_neural_tangents(peer):
    model = Mlp(jnp.tanh)
    params = model.init(jax.random.key(1), X)
    theirs = peer.empirical_ntk_fn(model.apply, trace_axes=(), vmap_axes=0, implementation=1)(X, None, params)
    # two orders of the same sums in float64
    ours = ij.empirical_ntk(model, outputs="full")(params, X)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * float(jnp.abs(theirs).max()))
