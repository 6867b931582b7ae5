"""Estimated kernels: against exact ones, against integrals, against wide networks of the same module, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.errors import InputError, UnsupportedLayerError
from initjax.infinite.particles import Particles
from initjax.trace.flax import as_functional

X = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
SEQUENCE = np.random.default_rng(1).normal(size=(3, 4, 8)).astype(np.float32)
IMAGES = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.arange(8).reshape(2, 4) % 7
REASON = UnsupportedLayerError("forced", "", "by this test", "", "here", "none")


def forced(model, x, particles):
    """The exact kernel, and the estimate of the same model."""
    kernel = ij.kernel_fn(model, x)
    exact = kernel(x)
    estimator = Particles(kernel._functional, kernel.weights, jax.random.key(0), particles)
    kernel.estimate_by(estimator, REASON)
    return exact, kernel(x)


def scores(estimate, nngp, ntk=None):
    """Deviations in standard errors, upper triangle."""
    upper = np.triu_indices(len(nngp))
    z = [(estimate.nngp - nngp)[upper] / estimate.standard_error.nngp[upper]]
    if ntk is not None:
        z.append((estimate.ntk - ntk)[upper] / estimate.standard_error.ntk[upper])
    return np.abs(np.concatenate(z))


class Normed(nn.Module):
    """Residual sums, norms, gates and random biases, all of which the exact rules cover."""

    width: int = 64

    @nn.compact
    def __call__(self, x):
        init = dict(kernel_init=jax.nn.initializers.normal(1 / np.sqrt(x.shape[-1])), bias_init=zoo.small)
        x = nn.Dense(self.width, **init)(x)
        h = nn.LayerNorm()(nn.relu(x))
        x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width, bias_init=zoo.small)(h)))
        return nn.Dense(1)(nn.relu(x))


@pytest.mark.slow
def test_estimates_lie_around_exact_kernels_and_errors_fall_as_the_root_of_particles():
    errors = []
    for particles in (2048, 8192):
        exact, found = forced(Normed(), X, particles)
        assert found.particles == particles and not found.exact
        # 4 standard errors of 16 networks (Student's t: 1e-3); the bias is O(1 / width), width >= 128
        assert scores(found, exact.nngp, exact.ntk).max() < 4
        assert scores(found, exact.nngp, exact.ntk).min() < 1
        errors.append(np.linalg.norm(found.standard_error.ntk))
        for layer, theory in zip(found.layers, exact.layers, strict=True):
            assert layer.name == theory.name
            np.testing.assert_allclose(layer.q, theory.q, rtol=0.15)  # one standard deviation is 3 %
        np.testing.assert_allclose(
            [x.chi[0] for x in found.layers[1:]], [x.chi[0] for x in exact.layers[1:]], rtol=0.2
        )  # 8 directions in 16 networks
    # four times the particles: a half, each error known to 1 / sqrt(2 * 15) = 18 %
    assert 0.3 < errors[1] / errors[0] < 0.8


def test_recurrent_weights_keep_their_dependence():
    exact, found = forced(zoo.TiedRecurrent(), X, 4096)
    assert scores(found, exact.nngp, exact.ntk).max() < 4.5  # truncated normal weights on ten inputs add 1 %


def test_activation_after_a_residual_sum_against_an_integral():
    """h = relu(u), y = W relu(h + V h + b): E[y^2] by quadrature over two independent Gaussians."""
    x = X[:1]
    init = jax.nn.initializers.normal(0.3)

    class PostActivation(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(128, kernel_init=init)(x))
            return nn.Dense(1, kernel_init=zoo.he)(nn.relu(h + nn.Dense(128, kernel_init=zoo.he)(h)))

    found = ij.kernel_fn(PostActivation(), x, on_unsupported="monte_carlo", particles=8192)(x)
    q = 0.09 * float((x.astype(float) ** 2).sum())
    z, w = np.polynomial.hermite_e.hermegauss(100)
    w = w / w.sum()
    # a kink costs the rule 1 / nodes: 1e-3, far below the standard error
    inner = np.maximum(np.maximum(np.sqrt(q) * z, 0)[:, None] + np.sqrt(q) * z, 0)  # Var V h = 2 E[h^2] = q
    expected = 2 * w @ inner**2 @ w
    assert abs(found.nngp[0, 0] - expected) < 4 * found.standard_error.nngp[0, 0]
    assert found.standard_error.nngp[0, 0] < 0.05 * expected


def test_uniform_bias_against_its_integral():
    """Biases are drawn as they are: E[b^8] of a uniform number, which a Gaussian of equal variance misses."""

    class Uniform(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1.0, 1.0)  # noqa: E731
            h = nn.Dense(128, kernel_init=jax.nn.initializers.normal(0.01), bias_init=bias)(x)
            return nn.Dense(1, use_bias=False)(h**4)

    x = X[:1]
    found = ij.kernel_fn(Uniform(), x, on_unsupported="monte_carlo", particles=16384)(x)
    assert abs(found.nngp[0, 0] - 1 / 9) < 4 * found.standard_error.nngp[0, 0] + 0.001  # E[b^8] = 1/9
    gaussian = 105 / 3**4  # E of a Gaussian of variance 1/3 to the eighth
    assert abs(found.nngp[0, 0] - gaussian) > 10 * found.standard_error.nngp[0, 0]


class Attention(nn.Module):
    """A pre-normed transformer block."""

    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
        return nn.Dense(1)(x.mean(axis=1))


def test_estimates_say_what_they_are():
    kernel = ij.kernel_fn(Attention(), SEQUENCE, on_unsupported="monte_carlo", particles=2048)
    found = kernel(SEQUENCE)
    assert not found.exact and found.particles == 2048 and "exact" not in repr(found)
    assert "MultiHeadDotProductAttention_0" in found.forced_by[0] and kernel.refusal is not None
    assert any("1/128" in note for note in found.notes)
    assert found.standard_error.nngp.shape == found.standard_error.ntk.shape == (3, 3)
    assert set(found.leaves) == set(found.standard_error.leaves) == set(found.eta)
    np.testing.assert_allclose(sum(found.leaves.values()), found.ntk, rtol=1e-12)  # the same numbers added
    for matrix in (found.nngp, found.ntk):
        assert np.linalg.eigvalsh(matrix).min() > 0
    assert np.array_equal(kernel(SEQUENCE).ntk, found.ntk)  # one key
    block = kernel(SEQUENCE[:2], SEQUENCE[2:])
    np.testing.assert_allclose(block.ntk, found.ntk[:2, 2:], rtol=1e-9)  # equal networks, sums in another order
    assert {"Dense_0", "MultiHeadDotProductAttention_0/query", "Dense_1"} <= {layer.name for layer in found.layers}


def test_another_key_gives_another_estimate_within_errors():
    kernels = [
        ij.kernel_fn(zoo.DependentGate(), X, on_unsupported="monte_carlo", particles=2048, key=key)(X)
        for key in (None, jax.random.key(7))
    ]
    gap = np.abs(kernels[0].nngp - kernels[1].nngp)
    assert gap.min() > 0
    assert (gap < 4 * np.hypot(kernels[0].standard_error.nngp, kernels[1].standard_error.nngp)).all()


def test_traced_inputs():
    kernel = ij.kernel_fn(zoo.PostActivationResNet(), X, on_unsupported="monte_carlo", particles=2048)
    inside = jax.jit(lambda x: kernel(x))(jnp.asarray(X, jnp.float32))
    assert inside.nngp.shape == (3, 3) and np.isfinite(inside.nngp).all() and (inside.standard_error.ntk > 0).all()


class Coupled(nn.Module):
    """Batch normalization in training mode: an output depends on the whole batch."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, kernel_init=zoo.he)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(1)(x)


def test_batch_statistics_couple_examples():
    found = ij.kernel_fn(Coupled(), X, on_unsupported="monte_carlo", particles=4096)(X)
    # normalised over the batch, E over channels and examples of relu(h)^2 is a half up to the batch's own shape
    network = networks(Coupled(), X, 400)
    error = np.hypot(network[1], found.standard_error.nngp)
    assert (np.abs(found.nngp - network[0]) < 4 * error + 0.02 * np.abs(network[0])).all()


def networks(model, x, count, ntk=False):
    """Mean and standard error of y y' (and of the empirical NTK) over networks of the module itself."""
    functional = as_functional(model, jnp.asarray(x))
    tangent = ij.empirical_ntk(functional.apply)

    def one(key):
        params = functional.init(key)
        y = functional.apply(params, jnp.asarray(x)).reshape(len(x), -1)
        return (y @ y.T / y.shape[1], tangent(params, jnp.asarray(x))) if ntk else (y @ y.T / y.shape[1],)

    draws = jax.jit(functools.partial(jax.lax.map, one))(jax.random.split(jax.random.key(3), count))
    out = []
    for values in draws:
        out += [np.asarray(values).mean(0), np.asarray(values).std(0, ddof=1) / np.sqrt(count)]
    return out


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (zoo.TiedAutoencoder(), X),
        (zoo.TokenMixing(), SEQUENCE),
        (zoo.FixedMatrix(), X),
        (zoo.Blurred(), IMAGES),
        (zoo.TiedEmbedding(), TOKENS),
        (zoo.OffsetWeights(), X),
        (zoo.DiagonalDelta(), X),
        (zoo.ChannelMax(), X),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_limit_is_refused_here_too(model, x):
    with pytest.raises(UnsupportedLayerError, match="Monte Carlo does not cover"):
        ij.kernel_fn(model, x, on_unsupported="monte_carlo")


class TiedAttention(nn.Module):
    """Attention, which is estimated, before a weight and its transpose, which have no limit."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 64)
        x = nn.MultiHeadDotProductAttention(2)(embed(tokens))
        return embed.attend(x).mean(axis=1)


def test_an_estimated_layer_does_not_hide_a_later_refusal():
    with pytest.raises(UnsupportedLayerError, match="transpose"):
        ij.kernel_fn(TiedAttention(), TOKENS, on_unsupported="monte_carlo")


def test_a_gate_of_few_units_is_a_finite_structure():
    """Softmax over three experts: each network has one gate for all channels, and none of it is refused."""

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            gate = jax.nn.softmax(nn.Dense(3, kernel_init=zoo.he, name="gate")(x))
            return nn.Dense(1)(sum(gate[:, i : i + 1] * nn.relu(nn.Dense(64)(x)) for i in range(3)))

    found = ij.kernel_fn(Experts(), X, on_unsupported="monte_carlo", particles=8192)(X)
    network = networks(Experts(), X, 1500)
    error = np.hypot(network[1], found.standard_error.nngp)
    assert (np.abs(found.nngp - network[0]) < 4 * error).all()


def test_refusals_point_to_estimates_where_these_help():
    with pytest.raises(UnsupportedLayerError, match='on_unsupported="monte_carlo"'):
        ij.kernel_fn(zoo.PostActivationResNet(), X)
    with pytest.raises(UnsupportedLayerError) as caught:
        ij.kernel_fn(zoo.TiedAutoencoder(), X)
    assert "monte_carlo" not in caught.value.remedy


def test_a_copy_in_the_program_is_no_step():
    """JAX writes a `copy` where a user asks for an array anew."""

    class Copied(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.array(nn.Dense(32)(x), copy=True)
            return nn.Dense(1)(nn.MultiHeadDotProductAttention(2)(h).mean(axis=1))

    kernel = ij.kernel_fn(Copied(), SEQUENCE, on_unsupported="monte_carlo", particles=64)
    assert kernel.refusal is not None and "MultiHeadDotProductAttention" in kernel.refusal.layer


@pytest.mark.parametrize("particles", [0, 1.5, True])
def test_bad_numbers_of_particles(particles):
    with pytest.raises(InputError, match="particles"):
        ij.kernel_fn(zoo.DependentGate(), X, on_unsupported="monte_carlo", particles=particles)


# ------------------------------------------------------------------ against wide networks of the module itself


class AttentionNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.embed, self.out = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 64, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.out((x + self.attention(self.norm(x))).mean(axis=1))


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(48, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(4)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))


class Recurrent(nn.Module):
    cell: object = nn.LSTMCell

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(self.cell(64))(x)[:, -1])


class ResNetV1(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(64, (3, 3), kernel_init=zoo.he)(x))
        h = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(64, (3, 3), kernel_init=zoo.he)(x)))
        return nn.Dense(4)(nn.relu(x + nn.Conv(64, (3, 3), kernel_init=zoo.he)(h)).mean(axis=(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Attention(), SEQUENCE),
        (lambda rngs: AttentionNnx(rngs=rngs), SEQUENCE),
        (LeNet(), IMAGES),
        (Recurrent(), SEQUENCE),
        (Recurrent(nn.GRUCell), SEQUENCE),
        (ResNetV1(), IMAGES),
    ],
    ids=["transformer", "transformer_nnx", "lenet_max_pool", "lstm", "gru", "resnet_v1"],
)
def test_against_networks_of_the_module(model, x):
    found = ij.kernel_fn(model, x, on_unsupported="monte_carlo", particles=4096)(x)
    nngp, nngp_error, ntk, ntk_error = networks(model, x, 150, ntk=True)
    # both sides have errors; a width of 64 (4 % of the NTK at most, seen over widths) is not yet infinite
    assert (np.abs(found.nngp - nngp) < 4 * np.hypot(nngp_error, found.standard_error.nngp)).all()
    assert (np.abs(found.ntk - ntk) < 4 * np.hypot(ntk_error, found.standard_error.ntk) + 0.04 * ntk.max()).all()
