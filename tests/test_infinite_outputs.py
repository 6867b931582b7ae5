"""Models with several outputs: the one that is meant is chosen by path or by a function."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import initjax as ij

X = np.random.default_rng(0).normal(size=(3, 5))


class Trunk(nn.Module):
    """Two heads with weights of known variance on one trunk."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64, name="trunk")(x))
        value = nn.Dense(1, name="value", kernel_init=nn.initializers.normal(0.3))(h)
        policy = nn.Dense(4, name="policy", kernel_init=nn.initializers.normal(0.1))(h)
        return {"heads": (value, policy), "mask": x > 0}


def test_outputs_by_path_and_by_function():
    """Heads differ in the variance of their weights alone, so their kernels are in the ratio 9."""
    value = ij.kernel_fn(Trunk(), X, output="heads/0")(X)
    policy = ij.kernel_fn(Trunk(), X, output=lambda out: out["heads"][1])(X)
    np.testing.assert_allclose(value.nngp, 9 * policy.nngp, rtol=1e-12)
    by_pair = ij.kernel_fn((Trunk().init, lambda v, x: Trunk().apply(v, x)["heads"][0]), X)(X)
    np.testing.assert_array_equal(value.ntk, by_pair.ntk)  # the same program
    np.testing.assert_array_equal(value.leaves["policy/kernel"], 0)


def test_both_heads_by_one_function():
    """Units side by side: the mean over all of them."""
    value, policy = (ij.kernel_fn(Trunk(), X, output=f"heads/{i}")(X).nngp for i in (0, 1))
    both = ij.kernel_fn(Trunk(), X, output=lambda out: jnp.concatenate(out["heads"], -1))(X).nngp
    np.testing.assert_allclose(both, (value + 4 * policy) / 5, rtol=1e-12)


def test_outputs_that_are_not_there():
    with pytest.raises(ij.UnsupportedLayerError, match="output=..."):
        ij.kernel_fn(Trunk(), X)
    with pytest.raises(ij.InputError, match="one of heads/0, heads/1, mask"):
        ij.kernel_fn(Trunk(), X, output="policy")
    with pytest.raises(ij.InputError, match="which raised KeyError"):
        ij.kernel_fn(Trunk(), X, output=lambda out: out["actor"])
    with pytest.raises(ij.UnsupportedLayerError, match="bool"):
        ij.kernel_fn(Trunk(), X, output="mask")
