"""BatchNorm in training mode in the limit of a large batch: against integrals over the batch, and wide networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import initjax as ij

NORMAL = nn.initializers.normal(0.5)


class Net(nn.Module):
    """(n, positions, features) -> Dense, BatchNorm, relu, mean over positions, Dense."""

    width: int = 64
    depth: int = 1
    act: str = "relu"
    fast: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        for _ in range(self.depth):
            x = nn.Dense(self.width, kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"))(x)
            x = nn.BatchNorm(use_running_average=not train, epsilon=0.0, use_fast_variance=self.fast)(x)
            x = nn.relu(x) if self.act == "relu" else x
        return nn.Dense(1)(x.mean(1))


large = functools.partial(ij.kernel_fn, on_unsupported="large_batch")


def exact(x, draws):
    """NNGP and first layer's NTK of `Net()`, for the batch as it is: integrals over all its pre-activations."""
    n, positions, features = x.shape
    u = x.reshape(n * positions, features)
    u = u - u.mean(0)
    pool = np.kron(np.eye(n), np.full((1, positions), 1 / positions))

    def one(key):
        v = u @ jax.random.normal(key, (features,)) / np.sqrt(features)
        s = jnp.sqrt(jnp.mean(v**2))
        y = v / s
        rows = jnp.where(y > 0, pool, 0.0)  # of the Jacobian, then projected as the derivative of a normalization is
        rows = (rows - jnp.outer(rows @ y, y) / y.size) / s
        out = pool @ jnp.maximum(y, 0)
        return jnp.outer(out, out), (rows @ u) @ (rows @ u).T

    samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
    return [(np.asarray(k.mean(0)), np.asarray(k.std(0)) / np.sqrt(draws)) for k in samples]


@pytest.mark.parametrize("positions", [1, 6])
def test_error_falls_as_the_effective_rank_grows(positions):
    """The exact integral has corrections of order 1 / r; averages over positions do not enlarge them.

    Without the tangent of the variance the NTK of the pooled network is too large by half, at every rank.
    """
    errors, ranks = [], []
    for features in (14, 56):
        x = np.random.default_rng(1).normal(size=(10 if positions > 1 else 40, positions, features))
        kernel = large(Net(), x)(x, get=("nngp", "leaves"))
        found = (kernel.nngp, kernel.leaves["Dense_0/kernel"])
        (rank,) = kernel.batch_rank.values()
        ranks.append(rank)
        for value, (mean, noise), bound in zip(found, exact(x, 1500), (1.0, 3.0), strict=True):
            size = np.linalg.norm(mean)
            errors.append(np.linalg.norm(value - mean) / size)
            assert errors[-1] < bound / rank + 2 * np.linalg.norm(noise) / size
    assert ranks[1] > 2 * ranks[0]
    assert errors[3] < 0.6 * errors[1]


def test_closed_form_for_orthogonal_inputs():
    """All pairs of examples have correlation -1 / (n - 1) after centring: Cho and Saul's kernel at one angle."""
    n = 12
    x = np.sqrt(n) * np.eye(n)[:, None]
    kernel = large(Net(), x)(x)
    c = -1 / (n - 1)
    apart = (np.sqrt(1 - c * c) + c * (np.pi - np.arccos(c))) / (2 * np.pi)
    np.testing.assert_allclose(kernel.nngp, np.where(np.eye(n), 0.5, apart), rtol=1e-12)  # closed forms on both sides
    assert kernel.batch_rank["Dense_0"] == pytest.approx(n - 1, rel=1e-10)
    assert not kernel.exact and "large batch" in repr(kernel)


@pytest.mark.parametrize("act", ["relu", "linear"])
def test_gradients_explode_at_the_rate_of_yang_and_others(act):
    """pi / (pi - 1) for relu in large batches, (n - 2) / (n - 3) for linear ones (arXiv:1902.08129), up to O(1 / n)."""
    n = 20
    x = np.sqrt(n) * np.eye(n)[:, None]
    kernel = large(Net(depth=5, act=act), x)(x)
    rate = np.pi / (np.pi - 1) if act == "relu" else (n - 2) / (n - 3)
    np.testing.assert_allclose(kernel.layers[4].chi, rate, rtol=3 / n)
    leaves = [kernel.leaves[f"Dense_{i}/kernel"][0, 0] for i in (2, 3)]
    assert leaves[0] / leaves[1] == pytest.approx(rate, rel=3 / n)  # and so do those by weight leaf


def test_same_values_however_the_variance_is_written():
    x = np.random.default_rng(0).normal(size=(20, 1, 24))
    kernel_fn = large(Net(), x)
    kernel = kernel_fn(x)
    other = large(Net(fast=False), x)(x)
    np.testing.assert_allclose(other.ntk, kernel.ntk, rtol=1e-10)  # rounding of E u^2 - m^2
    with pytest.raises(ij.InputError, match="effective rank, which has to be known"):
        jax.jit(kernel_fn)(jnp.asarray(x))
    block = kernel_fn(x, x[::-1])
    np.testing.assert_allclose(block.ntk[:, ::-1], kernel.ntk, rtol=1e-9)  # equal statistics, another route


def test_refusals_name_the_way_out():
    x = np.random.default_rng(0).normal(size=(4, 1, 24))
    with pytest.raises(ij.UnsupportedLayerError, match="on_unsupported='large_batch'"):
        ij.kernel_fn(Net(), x)
    with pytest.raises(ij.UnsupportedLayerError, match="effective rank 2"):
        large(Net(), x)
    alike = np.ones((64, 1, 1)) + 1e-3 * np.random.default_rng(0).normal(size=(64, 1, 24))
    alike[:, :, 0] += np.random.default_rng(1).normal(size=(64, 1))  # many examples along one direction
    with pytest.raises(ij.UnsupportedLayerError, match="effective rank 1"):
        large(Net(), alike)

    class Mean(nn.Module):  # an average over the batch that does not settle: examples have a common part
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(64, kernel_init=NORMAL)(x))
            return nn.Dense(1)(h / (1.0 + h.mean(0)))

    with pytest.raises(ij.UnsupportedLayerError, match="average|effective rank"):
        large(Mean(), np.ones((64, 3)) + 0.1 * np.random.default_rng(0).normal(size=(64, 3)))


class Conv(nn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(self.width, (3, 3))(x)
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x + nn.Conv(self.width, (3, 3))(h)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(1)(x.mean((1, 2)))


@pytest.mark.slow
def test_residual_network_of_finite_width():
    """Within 3 / r and four standard errors of 40 networks of width 64, whose own bias is of order 1 / 64."""
    x = jax.random.normal(jax.random.key(0), (16, 4, 4, 3), jnp.float32)
    model = Conv()
    kernel = large(model, x)(x)

    def both(key):
        v = model.init(key, x)
        f = lambda p: model.apply({**v, "params": p}, x, mutable=["batch_stats"])[0][:3, 0]  # noqa: E731
        jacobian = jax.jacrev(f)(v["params"])
        ntk = sum(jnp.einsum("a...,b...->ab", leaf, leaf) for leaf in jax.tree.leaves(jacobian))
        return ntk, jnp.einsum("aij,bij->ab", *[jacobian["Dense_0"]["kernel"]] * 2)

    found = jax.jit(lambda keys: jax.lax.map(both, keys))(jax.random.split(jax.random.key(1), 40))
    rank = min(kernel.batch_rank.values())
    for samples, theory in zip(
        [np.asarray(f, float) for f in found], (kernel.ntk, kernel.leaves["Dense_0/kernel"]), strict=True
    ):
        mean, error = samples.mean(0), samples.std(0) / np.sqrt(40)
        assert (abs(mean - theory[:3, :3]) < 4 * error + (3 / rank + 1 / 64) * abs(theory[:3, :3]).max()).all()
