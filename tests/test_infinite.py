"""infinite/: kernels against an independent recursion, against wide random networks, and the refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from oracles import recursion

import initjax as ij
from initjax.errors import InputError, UnsupportedLayerError
from initjax.trace.flax import as_functional

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 10)).astype(np.float32)
SEQUENCE = RNG.normal(size=(3, 5, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
IMAGE_MODELS = (zoo.MaxPooled, zoo.Depthwise, zoo.Blurred, zoo.ConvNeXtBlock)
TOKENS = RNG.integers(0, 11, size=(3, 5))
NAMES = ("relu", "leaky_relu", "abs", "erf", "gelu", "tanh")
EXACT = 1e-10  # both sides are converged quadrature or closed forms in float64; seen: 1e-14


@functools.cache
def own_oracle(activation):
    return oracle(activation, X, X)


def oracle(activation, x1, x2, width=256):
    x1, x2 = np.asarray(x1, float), np.asarray(x2, float)
    variances = [1.8 / x1.shape[1]] + [1.8 / width] * 3
    return recursion.mlp(x1, x2, activation, variances, [0.01] * 4, [width] * 3)


@functools.cache
def linen_kernel(activation):
    return ij.kernel_fn(zoo.MLP(activation), X)


# ------------------------------------------------------------------ against the independent recursion


@pytest.mark.parametrize("twin", ["linen", "nnx"])
@pytest.mark.parametrize("activation", NAMES)
def test_mlp_equals_the_independent_recursion(activation, twin):
    if twin == "linen":
        kernel, layers = linen_kernel(activation), [f"Dense_{i}" for i in range(4)]
    else:
        kernel = ij.kernel_fn(lambda rngs: zoo.MLPnnx(10, activation, rngs=rngs), X)
        layers = [f"layers/{i}" for i in range(4)]
    got = kernel(X)
    nngp, thetas, covs, chis = own_oracle(activation)
    np.testing.assert_allclose(got.nngp, nngp, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, sum(thetas.values()), rtol=EXACT)
    for (kind, index), theta in thetas.items():
        np.testing.assert_allclose(got.leaves[f"{layers[index]}/{kind}"], theta, rtol=EXACT)
    assert [layer.name for layer in got.layers] == layers
    for layer, (cov, q, _) in zip(got.layers, covs, strict=True):
        np.testing.assert_allclose(layer.q, q, rtol=EXACT)
        np.testing.assert_allclose(layer.correlation, cov / np.sqrt(np.outer(q, q)), atol=EXACT)
    np.testing.assert_allclose(got.layers[0].chi, 1.8, rtol=EXACT)  # sigma_w^2 of a linear layer
    for layer, chi in zip(got.layers[1:], chis, strict=True):
        np.testing.assert_allclose(layer.chi, chi, rtol=EXACT)
    # a bias's gradient is the gradient with respect to the pre-activation
    for layer in got.layers:
        np.testing.assert_allclose(layer.gradient, np.diag(got.leaves[f"{layer.name}/bias"]), rtol=EXACT)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_two_batches_of_different_sizes(activation):
    x2 = RNG.normal(size=(2, 10)).astype(np.float32)
    got = linen_kernel(activation)(X, x2)
    nngp, thetas, covs, _ = oracle(activation, X, x2)
    np.testing.assert_allclose(got.nngp, nngp, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, sum(thetas.values()), rtol=EXACT)
    cov, q1, q2 = covs[2]
    np.testing.assert_allclose(got.layers[2].correlation, cov / np.sqrt(np.outer(q1, q2)), atol=EXACT)


@pytest.mark.parametrize("activation", NAMES)
def test_equal_examples_have_equal_entries_and_the_diagonal_is_exact(activation):
    """Copies of one example: every entry is the diagonal one, without arccos(1) noise."""
    x = np.concatenate([X[:2], X[:1] * (1 + 1e-7)]).astype(np.float32)
    x = np.concatenate([x, X[:1]])
    got = linen_kernel(activation)(x)
    for kernel in (got.nngp, got.ntk):
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-14)
        np.testing.assert_allclose(kernel[0, 3], kernel[0, 0], rtol=1e-13)  # rounding of one matrix product
        assert np.linalg.eigvalsh(kernel).min() > -1e-12 * kernel.max()
    np.testing.assert_array_equal(np.diag(got.layers[1].correlation), 1.0)


def test_instance_of_nnx_estimates_and_says_so():
    got = ij.kernel_fn(zoo.MLPnnx(10, rngs=nnx.Rngs(0)), X)(X)
    exact = linen_kernel("relu")(X)
    assert any("estimated" in note for note in got.notes)
    # the first kernel has 2560 entries: relative standard error of its variance sqrt(2 / 2560) = 2.8 %
    np.testing.assert_allclose(np.diag(got.nngp), np.diag(exact.nngp), rtol=5 * 0.03)


# ------------------------------------------------------------------ dependence of branches


def test_a_field_added_to_itself_is_four_kernels():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            u = nn.Dense(1, name="u")(x)
            return u + u

    once = ij.kernel_fn(nn.Dense(1), X)(X)
    twice = ij.kernel_fn(Twice(), X)(X)
    np.testing.assert_allclose(twice.nngp, 4 * once.nngp, rtol=1e-14)  # one multiplication
    np.testing.assert_allclose(twice.ntk, 4 * once.ntk, rtol=1e-14)


def test_functions_of_one_field_are_summed_with_their_dependence():
    """tanh(2u) + 0.6 u: second moments by the oracle's own quadrature of the sum."""
    got = ij.kernel_fn(zoo.DependentBranches(), X)(X)
    x = np.asarray(X, float)
    cov = x @ x.T / 10
    q = np.diag(cov)
    value = recursion.on_matrix(recursion.smooth(lambda u: np.tanh(2 * u) + 0.6 * u), cov, q, q)
    slope = recursion.on_matrix(recursion.smooth(lambda u: 2 / np.cosh(2 * u) ** 2 + 0.6), cov, q, q)
    np.testing.assert_allclose(got.nngp, value, rtol=EXACT)
    expected = 128 * value + 1 + slope * (x @ x.T + 1)  # Var(W) n = 1 for the lecun readout
    np.testing.assert_allclose(got.ntk, expected, rtol=EXACT)


def test_preactivation_residual():
    got = ij.kernel_fn(zoo.PreActivationResNet(), X)(X)
    x = np.asarray(X, float)
    relu, step = recursion.ACTIVATIONS["relu"]

    def through(dual, cov):
        return recursion.on_matrix(dual, cov, np.diag(cov), np.diag(cov))

    width = 128
    stream, theta = x @ x.T / 10, x @ x.T + 1
    for _ in range(2):
        h = 2 * through(relu, stream)
        theta_h = width * through(relu, stream) + 1 + 2 * through(step, stream) * theta
        branch = 2 * through(relu, h)
        theta_branch = width * through(relu, h) + 1 + 2 * through(step, h) * theta_h
        stream, theta = stream + 0.25 * branch, theta + 0.25 * theta_branch
    np.testing.assert_allclose(got.nngp, through(relu, stream), rtol=EXACT)
    expected = width * through(relu, stream) + 1 + through(step, stream) * theta
    np.testing.assert_allclose(got.ntk, expected, rtol=EXACT)


def test_flattened_and_pooled_sequences():
    x = np.asarray(SEQUENCE, float)
    n, t, d = x.shape
    flat = x.reshape(n * t, d)
    cov = 2 / d * flat @ flat.T + 0.01
    relu, step = recursion.ACTIVATIONS["relu"]
    q = np.diag(cov)
    value = recursion.on_matrix(relu, cov, q, q).reshape(n, t, n, t)
    slope = recursion.on_matrix(step, cov, q, q).reshape(n, t, n, t)
    theta = (flat @ flat.T + 1).reshape(n, t, n, t)

    flattened = ij.kernel_fn(zoo.FlattenedSequence(), SEQUENCE)(SEQUENCE)
    same = functools.partial(np.einsum, "atbt->ab")
    np.testing.assert_allclose(flattened.nngp, same(value) / t, rtol=EXACT)
    np.testing.assert_allclose(flattened.ntk, 64 * same(value) + 1 + same(slope * theta) / t, rtol=EXACT)

    pooled = ij.kernel_fn(zoo.PooledSequence(), SEQUENCE)(SEQUENCE)
    mean = functools.partial(np.mean, axis=(1, 3))
    np.testing.assert_allclose(pooled.nngp, mean(value), rtol=EXACT)
    np.testing.assert_allclose(pooled.ntk, 64 * mean(value) + 1 + mean(slope * theta), rtol=EXACT)


# ------------------------------------------------------------------ convolutions


@pytest.mark.parametrize(
    ("activation", "readout", "padding"),
    [
        ("relu", "flat", "SAME"),
        ("relu", "mean", "SAME"),
        ("relu", "mean", "CIRCULAR"),
        pytest.param("erf", "mean", "SAME", marks=pytest.mark.slow),
    ],
)
def test_cnn_equals_the_independent_recursion(activation, readout, padding):
    positions = 4 if padding == "SAME" else 16
    variances = [2 / 27, 2 / (9 * 64), 1 / (64 * (positions if readout == "flat" else 1))]
    strides = [1, 2 if padding == "SAME" else 1]
    x = np.asarray(IMAGES, float)
    nngp, ntk = recursion.cnn(x, activation, 64, variances, 0.01, strides, padding, readout)
    got = ij.kernel_fn(zoo.CNN(activation, readout, padding), IMAGES)(IMAGES)
    np.testing.assert_allclose(got.nngp, nngp, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, ntk, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, sum(got.leaves.values()), rtol=1e-14)


def test_cnn_twins_and_two_batches():
    linen = ij.kernel_fn(zoo.CNN(), IMAGES)
    twin = ij.kernel_fn(lambda rngs: zoo.CNNnnx(3, 4, rngs=rngs), IMAGES)
    whole = linen(IMAGES)
    np.testing.assert_allclose(twin(IMAGES).ntk, whole.ntk, rtol=1e-13)
    block = linen(IMAGES[:1], IMAGES)
    np.testing.assert_allclose(block.nngp, whole.nngp[:1], rtol=1e-13)
    np.testing.assert_allclose(block.ntk, whole.ntk[:1], rtol=1e-13)


@pytest.mark.slow
def test_residual_cnn_against_random_networks():
    model, networks, x = as_functional(zoo.ResNetV2(), IMAGES), 1600, jnp.asarray(IMAGES)
    y = outputs_of(lambda key: model.apply(model.init(key), x)[:, 0], networks, 100)
    exact = ij.kernel_fn(zoo.ResNetV2(), IMAGES)(IMAGES).nngp
    q = np.diag(exact)
    # Wick errors at R = 1600; width 64 under six convolutions adds a few per cent of the same size
    assert np.all(np.abs(y.T @ y / networks - exact) < 4 * np.sqrt((np.outer(q, q) + exact**2) / networks))


# ------------------------------------------------------------------ norms and gates


def relu_features():
    x = np.asarray(X, float)
    cov = 0.2 * x @ x.T + 0.01
    q = np.diag(cov)
    relu, step = recursion.ACTIVATIONS["relu"]
    return x, q, recursion.on_matrix(relu, cov, q, q), recursion.on_matrix(step, cov, q, q)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, functools.partial(nn.GroupNorm, num_groups=8)])
def test_norms_of_activations(norm):
    """The law of large numbers over channels: mean and variance become numbers, their tangents vanish."""
    width, eps = 128, 1e-6
    x, q, value, slope = relu_features()
    mean = 0 if norm is nn.RMSNorm else np.sqrt(q / (2 * np.pi))
    scale = 1 / np.sqrt(q / 2 - mean**2 + eps)
    centred = (value - np.multiply.outer(mean, mean)) * np.outer(scale, scale)
    got = ij.kernel_fn(zoo.Normed(norm), X)(X)
    np.testing.assert_allclose(got.nngp, centred, rtol=1e-9)  # the mean is subtracted from a number of its own size
    theta = slope * (x @ x.T + 1) * np.outer(scale, scale)  # through the features, the readout variance is 1 / width
    norm_parts = centred + (norm is not nn.RMSNorm)  # tangents of the norm's own scale and, if it has one, bias
    np.testing.assert_allclose(got.ntk, width * centred + 1 + theta + norm_parts, rtol=1e-9)


def test_batch_norm_in_evaluation_mode_is_affine():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(64)(x)
            return nn.Dense(1)(nn.relu(nn.BatchNorm(use_running_average=True, epsilon=0.0)(x)))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(64)(x)))

    np.testing.assert_allclose(ij.kernel_fn(Model(), X)(X).nngp, ij.kernel_fn(Plain(), X)(X).nngp, rtol=1e-13)


def test_gate_of_independent_branches():
    got = ij.kernel_fn(zoo.Gated(), X)(X)
    x = np.asarray(X, float)
    cov = x @ x.T / 10
    q = np.diag(cov)

    def sigmoid(u):
        return 1 / (1 + np.exp(-u))

    silu = recursion.on_matrix(recursion.smooth(lambda u: u * sigmoid(u)), cov, q, q)
    prime = recursion.smooth(lambda u: sigmoid(u) * (1 + u * (1 - sigmoid(u))))
    slope = recursion.on_matrix(prime, cov, q, q)
    np.testing.assert_allclose(got.nngp, silu * cov, rtol=EXACT)
    inner = x @ x.T + 1
    np.testing.assert_allclose(got.ntk, 128 * silu * cov + 1 + slope * cov * inner + silu * inner, rtol=EXACT)
    np.testing.assert_allclose(got.leaves["value/bias"], silu, rtol=EXACT)


def test_glu_split_equals_two_layers():
    """Two halves of one Dense are two independent Dense layers."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = (nn.Dense(128, bias_init=zoo.small)(x) for _ in range(2))
            return nn.Dense(1)(a * nn.sigmoid(b))

    split, two = (ij.kernel_fn(model, X)(X) for model in (zoo.GLU(), Two()))
    np.testing.assert_allclose(split.nngp, two.nngp, rtol=1e-12)
    np.testing.assert_allclose(split.ntk, two.ntk, rtol=1e-12)
    whole = ij.kernel_fn(nn.Sequential([nn.Dense(64), nn.Dense(1)]), X)(X).nngp
    np.testing.assert_allclose(ij.kernel_fn(zoo.HalfChannels(), X)(X).nngp, 2 * whole, rtol=1e-12)  # q + q


class Gain(nn.Module):
    """A residual branch behind one trainable number (ReZero at 0)."""

    start: float
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(64)(x)
        gain = self.param("gain", nn.initializers.constant(self.start), (), x.dtype)
        h = h + gain * nn.Dense(64)(nn.relu(h))
        return nn.Dense(1)(nn.LayerNorm()(h) if self.norm else h)


def test_a_trainable_number_shared_by_all_channels():
    """Its leaf is the mean of (dy/da)^2 = (W branch)^2, whatever its value: the kernel of the branch alone."""

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.Dense(64)(nn.relu(nn.Dense(64)(x))))

    branch = ij.kernel_fn(Branch(), X)(X).nngp
    for start in (0.0, 1.0):
        got = ij.kernel_fn(Gain(start), X)(X)
        np.testing.assert_allclose(got.leaves["gain"], branch, rtol=1e-12)
    with pytest.raises(UnsupportedLayerError, match="shared by all"):
        ij.kernel_fn(Gain(1.0, norm=True), X)


# ------------------------------------------------------------------ loops, shared weights, embeddings


def test_recurrent_network_by_scan():
    """h_t = tanh(W h_(t-1) + U x_t), W shared: every pair of times by its own quadrature."""
    got = ij.kernel_fn(zoo.ScannedRNN(), SEQUENCE)(SEQUENCE)
    x = np.asarray(SEQUENCE, float)
    n, t, d = x.shape
    tanh = recursion.ACTIVATIONS["tanh"][0]
    drive = np.einsum("asd,btd->satb", x, x) / d  # time, example, time, example
    state = np.zeros((t, n, t, n))
    variances = np.zeros((t, n))  # of the pre-activations, which every pair of times needs first
    for lag in range(t):
        for a in range(t - lag):
            b = a + lag
            cov = drive[a, :, b] + (state[a - 1, :, b - 1] if a else 0.0)
            if lag == 0:
                variances[a] = np.diag(cov)
            state[a, :, b] = recursion.on_matrix(tanh, cov, variances[a], variances[b])
            state[b, :, a] = state[a, :, b].T
    np.testing.assert_allclose(got.nngp, state.mean(axis=(0, 2)), rtol=EXACT)


def test_scanned_blocks_equal_looped_blocks():
    scanned, looped = (ij.kernel_fn(model, X)(X) for model in (zoo.ScannedBlocks(), zoo.LoopedBlocks()))
    np.testing.assert_allclose(scanned.nngp, looped.nngp, rtol=1e-12)
    np.testing.assert_allclose(scanned.ntk, looped.ntk, rtol=1e-12)


def test_embedding_is_a_contraction_with_one_hot_tokens():
    got = ij.kernel_fn(zoo.TextClassifier(), TOKENS)(TOKENS)
    hot = np.eye(11)[TOKENS].reshape(-1, 11)
    variance = 1 / 32  # Flax: one over the number of features
    cov = variance * hot @ hot.T  # times 32 channels times 1 / 32
    relu = recursion.ACTIVATIONS["relu"][0]
    q = np.diag(cov)
    value = recursion.on_matrix(relu, cov, q, q).reshape(3, 5, 3, 5).mean(axis=(1, 3))
    np.testing.assert_allclose(got.nngp, value, rtol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("model", [zoo.Normed(nn.LayerNorm, 256), zoo.PreNormBlock(nn.RMSNorm, 256), zoo.Gated(256)])
def test_norms_and_gates_against_random_networks(model):
    networks, x = 1600, jnp.asarray(X)
    y = outputs_of(lambda key: model.apply(model.init(key, x), x)[:, 0], networks, 100)
    exact = ij.kernel_fn(model, X)(X).nngp
    q = np.diag(exact)
    # Wick errors at R = 1600: 3.5 % on the diagonal; ten truncated-normal inputs and width 256 add about 1 %
    assert np.all(np.abs(y.T @ y / networks - exact) < 4 * np.sqrt((np.outer(q, q) + exact**2) / networks))


# ------------------------------------------------------------------ against random networks


def outputs_of(apply_all, networks, chunk):
    """Outputs of independent networks, stacked: keys 0, 1, 2, ... once, whatever they give."""
    run = jax.jit(jax.vmap(apply_all))
    keys = jax.random.split(jax.random.key(0), networks)
    parts = [np.asarray(run(keys[i : i + chunk]), np.float64) for i in range(0, networks, chunk)]
    return np.concatenate(parts)


@pytest.mark.slow
def test_nngp_is_the_mean_over_wide_random_networks():
    networks = 2000
    x = jnp.asarray(X)
    names = ("relu", "leaky_relu", "erf", "gelu", "tanh")

    def all_activations(key):  # the same weights under every activation
        params = zoo.MLP("relu").init(key, x)
        return jnp.stack([zoo.MLP(name).apply(params, x)[:, 0] for name in names])

    y = outputs_of(all_activations, networks, 100)  # (networks, activations, examples)
    for index, name in enumerate(names):
        exact = linen_kernel(name)(X).nngp
        mean = y[:, index].T @ y[:, index] / networks
        q = np.diag(exact)
        error = np.sqrt((np.outer(q, q) + exact**2) / networks)  # Wick; width 256 moves the mean by about 1 %, a third
        assert np.all(np.abs(mean - exact) < 4 * error), name


@pytest.mark.slow
@pytest.mark.parametrize("model", [zoo.PreActivationResNet(), zoo.DependentBranches(), zoo.TiedRecurrent()])
def test_nngp_of_dependent_branches_and_tied_weights(model):
    networks, x = 1600, jnp.asarray(X)
    y = outputs_of(lambda key: model.apply(model.init(key, x), x)[:, 0], networks, 200)
    exact = ij.kernel_fn(model, X)(X).nngp
    q = np.diag(exact)
    # Wick errors at R = 1600; the truncated normals of the first layer (10 inputs) and width 128 add about 1 %
    assert np.all(np.abs(y.T @ y / networks - exact) < 4 * np.sqrt((np.outer(q, q) + exact**2) / networks))


@pytest.mark.slow
def test_standard_ntk_is_the_mean_empirical_ntk_and_the_gap_falls_as_one_over_width():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    gaps, errors = [], []
    for width, networks in ((16, 6000), (32, 6000), (64, 4000)):
        model = zoo.MLP("gelu", width=width)

        def ntk(key, model=model):
            params = model.init(key, x)
            grads = jax.vmap(jax.grad(lambda p, row: model.apply(p, row[None])[0, 0]), (None, 0))(params, x)
            return sum(g.reshape(3, -1) @ g.reshape(3, -1).T for g in jax.tree.leaves(grads))

        theta = outputs_of(ntk, networks, 500)
        exact = ij.kernel_fn(model, x)(x).ntk
        gaps.append(width * (theta.mean(axis=0) / exact - 1))
        errors.append(width * theta.std(axis=0) / np.sqrt(networks) / np.abs(exact))
    assert np.all(np.abs(gaps[2]) / 64 < 4 * errors[2] / 64 + 0.04)  # 0.04: the gap itself at width 64, seen 0.026
    assert np.max(np.abs(gaps[0]) / errors[0]) > 5  # the gap is resolved at width 16 ...
    for gap, error in zip(gaps[1:], errors[1:], strict=True):  # ... and width * gap does not depend on the width
        assert np.all(np.abs(gap - gaps[0]) < 4 * np.hypot(error, errors[0]))


# ------------------------------------------------------------------ parameterizations, leaves


@pytest.mark.parametrize(
    "parameterization", ["standard", "ntk", {"kernel": 0.5, r"Dense_0/": 0.0, "bias$": 2.0}, {"Dense_3": 3}]
)
def test_leaves_times_eta_sum_to_the_ntk(parameterization):
    kernel = ij.kernel_fn(zoo.MLP("gelu"), X, parameterization=parameterization)
    got = kernel(X)
    total = sum(kernel.eta[name] * theta for name, theta in got.leaves.items())
    np.testing.assert_allclose(got.ntk, total, rtol=1e-15)  # the same sum, up to its order


def test_ntk_parameterization_does_not_depend_on_the_width():
    def kernels(width):
        return ij.kernel_fn(zoo.MLP("erf", width=width), X, parameterization="ntk")(X)

    np.testing.assert_allclose(kernels(16).ntk, kernels(1000).ntk, rtol=1e-12)  # variances rounded to 1.8 / width
    np.testing.assert_allclose(kernels(16).nngp, kernels(1000).nngp, rtol=1e-12)


@pytest.mark.parametrize(
    ("parameterization", "words"),
    [("mup", "mup"), ({"kernal": 1.0}, "finds no leaf"), ({"kernel": -1.0}, "finite number"), ({"(": 1.0}, r"\(")],
)
def test_bad_parameterizations(parameterization, words):
    with pytest.raises(InputError, match=words):
        ij.kernel_fn(zoo.MLP(), X, parameterization=parameterization)


# ------------------------------------------------------------------ jit, dtypes, inputs


def test_inside_jit_with_concrete_and_with_traced_inputs():
    kernel = linen_kernel("erf")
    exact = kernel(X).ntk
    concrete = jax.jit(lambda s: s * jnp.asarray(kernel(X).ntk, s.dtype))(jnp.asarray(1.0))
    np.testing.assert_allclose(concrete, exact, rtol=1e-14)
    traced = jax.jit(lambda x: kernel(x).ntk)(jnp.asarray(X, jnp.float64))
    np.testing.assert_allclose(traced, exact, rtol=1e-9)  # closed forms on both sides
    single = jax.jit(lambda x: linen_kernel("relu")(x).nngp)(jnp.asarray(X))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, linen_kernel("relu")(X).nngp, rtol=2e-5)  # float32


@pytest.mark.x64_off
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_float64_results_whatever_the_flag(activation):
    kernel = linen_kernel(activation)
    got = kernel(X)
    nngp, thetas, _, _ = own_oracle(activation)
    assert got.ntk.dtype == np.float64
    np.testing.assert_allclose(got.nngp, nngp, rtol=EXACT)
    np.testing.assert_allclose(got.ntk, sum(thetas.values()), rtol=EXACT)
    if activation != "tanh":  # without a closed form the traced quadrature takes long to compile
        traced = jax.jit(lambda x: kernel(x).ntk)(jnp.asarray(X))
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, got.ntk, rtol=2e-5)  # float32


@pytest.mark.slow
def test_kernel_is_differentiable_in_the_inputs():
    kernel = ij.kernel_fn(nn.Sequential([nn.Dense(64), jax.lax.erf, nn.Dense(1)]), X)
    x = jnp.asarray(X[:2], jnp.float64)
    direction = np.linspace(-1, 1, x.size).reshape(x.shape)
    slope = jax.grad(lambda t: kernel(x + t * direction).ntk[0, 1])(0.0)
    ends = [kernel(np.asarray(x) + t * direction).ntk[0, 1] for t in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)  # central difference, float64


def test_results_are_numpy_float64_and_pytrees():
    got = linen_kernel("relu")(X)
    assert isinstance(got.nngp, np.ndarray) and got.nngp.dtype == np.float64
    doubled = jax.tree.map(lambda a: 2 * a, got)
    assert [layer.name for layer in doubled.layers] == [layer.name for layer in got.layers]
    assert "exact" in repr(got)


def test_outputs_of_any_width_squeezed_or_not():
    class Squeezed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return zoo.MLP("relu")(x).squeeze(-1)

    one = linen_kernel("relu")(X)
    many = ij.kernel_fn(zoo.MLP("relu", outputs=7), X)(X)
    flat = ij.kernel_fn(Squeezed(), X)(X)
    for other in (many, flat):
        np.testing.assert_allclose(other.nngp, one.nngp, rtol=1e-14)
        np.testing.assert_allclose(other.ntk, one.ntk, rtol=1e-14)


def test_zero_initialised_readout_keeps_its_tangent_kernel():
    class ZeroReadout(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(64)(x))
            return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)

    got = ij.kernel_fn(ZeroReadout(), X)(X)
    cov = np.asarray(X, float) @ np.asarray(X, float).T / 10
    relu = recursion.ACTIVATIONS["relu"][0]
    expected = 64 * recursion.on_matrix(relu, cov, np.diag(cov), np.diag(cov)) + 1
    np.testing.assert_array_equal(got.nngp, 0.0)
    np.testing.assert_allclose(got.ntk, expected, rtol=EXACT)


def test_a_zero_example():
    x = np.concatenate([X[:2], np.zeros((1, 10), np.float32)])
    got = linen_kernel("tanh")(x)
    assert np.all(np.isfinite(got.ntk)) and got.nngp[2, 2] > 0  # biases alone


@pytest.mark.slow
def test_a_deep_network_keeps_he_variance():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(120):
                x = nn.relu(nn.Dense(16, kernel_init=zoo.he)(x))
            return nn.Dense(1)(x)

    deep = ij.kernel_fn(Deep(), X)(X)
    np.testing.assert_allclose(np.diag(deep.nngp), np.sum(X.astype(float) ** 2, 1) / 10, rtol=1e-10)  # He keeps q


@pytest.mark.parametrize(
    ("batch", "words"),
    [(X[:, :7], "float32"), (X * 1j, "complex"), (np.full((2, 10), np.nan, np.float32), "NaN")],
)
def test_bad_batches(batch, words):
    with pytest.raises(InputError, match=words):
        linen_kernel("relu")(batch)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("model", zoo.REFUSED)
def test_refusals_name_layer_primitive_and_reason(model):
    x = {zoo.TokenMixing: SEQUENCE, zoo.TiedEmbedding: TOKENS}.get(model, IMAGES if model in IMAGE_MODELS else X)
    with pytest.raises(UnsupportedLayerError, match=zoo.REFUSED[model]) as caught:
        ij.kernel_fn(model(), x)
    error = caught.value
    assert model.__name__ in error.layer and error.primitive
    assert all([error.given, error.accepted, error.why, error.remedy])


def test_tied_autoencoder_would_have_been_wrong_by_two_orders():
    """What a wrong acceptance returns (W^T taken as independent of W) against networks of the module itself."""
    width, networks = 512, 200
    x = np.zeros((1, 10), np.float32)
    x[0, 0] = 1.0
    independent = 0.5 * (1 / 10) * (1 / 10) * width  # E[relu(u)^2] n Var(W): one entry of relu(x W) V
    model = zoo.TiedAutoencoder(width)
    y = outputs_of(lambda key: model.apply(model.init(key, jnp.asarray(x)), jnp.asarray(x))[0, 0], networks, 100)
    truth = np.mean(y**2)
    assert truth > 20 * independent  # W W^T has a mean of order n: the neglected term is the leading one
    with pytest.raises(UnsupportedLayerError, match="transpose"):
        ij.kernel_fn(model, x)


def test_uniform_bias_would_have_been_wrong():
    """A uniform bias of variance 1/3 taken as Gaussian: E[relu(b)^2] agrees, E[relu(b)] does not."""
    b = np.random.default_rng(0).uniform(-1, 1, 200_000)
    pretended = np.sqrt(1 / 3 / (2 * np.pi))  # E[relu] of a Gaussian of the same variance
    assert abs(np.maximum(b, 0).mean() - pretended) > 0.015  # 1/4 against 0.2303; sampling error 0.0006
    with pytest.raises(UnsupportedLayerError, match="normal"):
        ij.kernel_fn(zoo.UniformBias(), X)


def test_on_unsupported_leaves_exact_models_exact():
    exact = ij.kernel_fn(zoo.MLP("relu"), X, on_unsupported="monte_carlo")(X)
    assert exact.exact and exact.standard_error is None and exact.particles == 0
    with pytest.raises(InputError, match="on_unsupported"):
        ij.kernel_fn(zoo.MLP("relu"), X, on_unsupported="ignore")


def test_custom_vjp_is_refused():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.sign(x)

    straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, ct: (ct,))

    class Binary(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(straight_through(nn.Dense(8)(x)))

    with pytest.raises(UnsupportedLayerError, match="custom_vjp"):
        ij.kernel_fn(Binary(), X)


def test_several_outputs_and_losses_are_refused():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x), nn.Dense(2)(x)

    with pytest.raises(UnsupportedLayerError, match="one floating array"):
        ij.kernel_fn(Two(), X)


def test_the_default_gelu_at_large_variance():
    # its tanh form, as differentiated by JAX, is rounding far out; q = 4 reaches there
    model = nn.Sequential([nn.Dense(64), jax.nn.gelu, nn.Dense(1)])
    x = 2.0 * jnp.eye(3) * 3**0.5
    kernel = ij.kernel_fn(model, x)(x)
    np.testing.assert_allclose(np.diagonal(kernel.nngp), ij.gaussian.moment(jax.nn.gelu, 4.0), rtol=1e-12)
