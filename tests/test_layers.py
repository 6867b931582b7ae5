"""Layer maps against closed forms, the plain-network solvers, and wide random networks.

Simulations are NumPy with fixed seeds, and share no code with the library. A tolerance of k standard errors is a
statement about those draws; finite width shifts means by O(1/n), which each test allows for where it matters.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import initjax as ij
from initjax import layers
from initjax.layers import (
    Activation,
    Attention,
    BatchNorm,
    Convolution,
    Dense,
    Dropout,
    LayerNorm,
    Residual,
    RMSNorm,
)


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def relu(x):
    return np.maximum(x, 0.0)


def correlated(rng, shape, c):
    """Two standard Gaussian arrays with correlation c."""
    u, w = rng.normal(size=(2, *shape))
    return u, c * u + np.sqrt(1 - c * c) * w


# -- the composable notion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phi, sigma_w, sigma_b",
    [
        (jnp.tanh, 1.5, 0.05),
        (jnp.tanh, 0.9, 0.3),
        (exact_gelu, 1.41, 1.0),  # 1 - c* = 6.9e-4: missed by coarse scans of c
        (jax.nn.relu, 1.2, 0.3),
        (jax.nn.relu, 1.6, 0.1),
        (jnp.cos, 1.5, 0.1),  # a falling variance map
    ],
)
def test_activation_then_dense_is_the_plain_network(phi, sigma_w, sigma_b):
    block = Activation(phi) >> Dense(sigma_w, sigma_b)
    found, plain = layers.fixed_point(block), ij.fixed_point(phi, sigma_w, sigma_b)
    assert found.phase == plain.phase
    for name, rtol in (("q", 1e-9), ("c", 1e-9), ("chi_1", 1e-9), ("chi_q", 1e-8), ("chi_c", 1e-9), ("xi_c", 1e-6)):
        # both carry 1e-12 amplified by 1 / |1 - chi_q|, at most 200 here; xi by 1 / |1 - chi| once more
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=rtol, err_msg=name)
    path, expected = layers.propagate(block, 12, 0.7, 0.3), ij.propagate(phi, sigma_w, sigma_b, 12, 0.7, 0.3)
    for name in ("q", "c", "chi", "gradient"):
        np.testing.assert_allclose(getattr(path, name), getattr(expected, name), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "phi, sigma_b", [(jnp.tanh, 0.0), (jnp.tanh, 0.05), (jnp.tanh, 1.0), (jax.nn.relu, 0.0), (exact_gelu, 0.3)]
)
def test_critical_of_a_plain_block_is_the_plain_solver(phi, sigma_b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ij.UnstableCriticalPointWarning)
        found = layers.critical(lambda w, b: Activation(phi) >> Dense(w, b), sigma_b)
        plain = ij.critical(phi, sigma_b)
    assert (found.kind, bool(found.stable)) == (plain.kind, bool(plain.stable))
    # promised 1e-9; q = 0 is found at the lowest q scanned, 1e-18
    np.testing.assert_allclose(found.sigma_w, plain.sigma_w, rtol=1e-9)
    np.testing.assert_allclose(found.q, plain.q, rtol=1e-9)


def test_chains_are_associative_and_layers_of_ones_own_compose():
    class Double(layers.Layer):
        def step(self, state):
            return Dense(2.0).step(state)

    a, b, c = Activation(jnp.tanh), Double(), LayerNorm()
    left, right = ((a >> b) >> c).step(layers.state(1.3, 0.2)), (a >> (b >> c)).step(layers.state(1.3, 0.2))
    assert left == right and left.q1 == 1.0
    same = (a >> Dense(2.0) >> c).step(layers.state(1.3, 0.2))
    assert left.k == same.k and left.chi == same.chi


def test_small_change_factor_is_the_slope_of_the_map_in_k():
    # Price: chi_k = dk'/dk at fixed q; central difference h = 1e-4 leaves h^2 times a third derivative of order 1
    block = Residual(LayerNorm() >> Activation(exact_gelu) >> Dropout(0.8) >> Dense(1.3, 0.2), 0.7) >> LayerNorm()
    state, h = layers.state(1.4, 0.45), 1e-4
    up, down = (block.step(state.replace(k=state.k + s * h)).k for s in (1, -1))
    np.testing.assert_allclose(block.step(state).chi_k, (up - down) / (2 * h), rtol=1e-7)


def test_unequal_second_moments_pass_through_every_pairwise_layer():
    start = layers.state(1.0, 0.0).replace(q2=2.0, k=0.6)
    after = (Activation(jax.nn.relu) >> Dense(2**0.5)).step(start)
    np.testing.assert_allclose([after.q1, after.q2], [1.0, 2.0], rtol=1e-12)
    c = 0.6 / np.sqrt(2)
    closed = np.sqrt(2) / np.pi * (np.sqrt(1 - c * c) + c * (np.pi - np.arccos(c)))  # Cho and Saul, order 1
    np.testing.assert_allclose(after.k, closed, rtol=1e-12)


def test_a_sequence_of_blocks_is_followed_block_by_block():
    # alpha_l = l^{-1/2}: q = prod (1 + 1 / l) = depth + 1 for a He branch
    branch = Activation(jax.nn.relu) >> Dense(2**0.5)
    blocks = [Residual(branch, (layer + 1) ** -0.5) for layer in range(12)]
    path = layers.propagate(blocks, 12)
    np.testing.assert_allclose(path.q, 1 + np.arange(13), rtol=1e-11)
    np.testing.assert_allclose(path.gradient, 13 / (1 + np.arange(13)), rtol=1e-11)
    assert np.isnan(path.chi[-1])


def test_divergence_is_told_layer_by_layer_and_gradients_keep_their_logarithm():
    path = layers.propagate(Activation(jax.nn.relu) >> Dense(4.0), 20, np.array([1.0, 1e-12]), 0.5)
    # q doubles three times a layer: 8^l passes 1e12 at l = 14 from q = 1, and not within 20 from 1e-12
    assert np.all(np.isfinite(path.q[:14, 0])) and np.all(np.isinf(path.q[14:, 0]))
    assert np.all(np.isfinite(path.c[:14, 0])) and np.all(np.isnan(path.c[14:, 0]))
    np.testing.assert_allclose(path.q[:, 1], 1e-12 * 8.0 ** np.arange(21), rtol=1e-11)
    deep = layers.propagate(Activation(jnp.tanh) >> Dense(0.1, 0.1), 400, c0=None)
    assert deep.gradient[0] == 0.0  # below the smallest float64
    assert -2000 < deep.log_gradient[0] < -1500 and np.all(np.isnan(deep.c))


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_relu_keeps_q_and_has_its_own_correlation():
    block = Activation(jax.nn.relu) >> Dropout(0.9) >> Dense(1.8**0.5)
    point = layers.fixed_point(block)
    # printed digits of the reference iteration
    assert abs(point.c - 0.62715) < 5e-6 and abs(point.chi_c - 0.6442) < 5e-5
    # second route: c = 0.9 J1(c) / pi by bisection (Cho and Saul), J1 = s + (pi - theta) c
    low, high = 0.0, 1.0
    for _ in range(60):
        c = (low + high) / 2
        above = 0.9 * (np.sqrt(1 - c * c) + (np.pi - np.arccos(c)) * c) / np.pi > c
        low, high = (c, high) if above else (low, c)
    np.testing.assert_allclose(point.c, low, rtol=1e-11)
    np.testing.assert_allclose(point.chi_c, 0.9 * (np.pi - np.arccos(low)) / np.pi, rtol=1e-11)
    np.testing.assert_allclose(point.chi_1, 1.0, rtol=1e-12)  # (sigma_w^2 / keep) D = 2 * 1/2
    assert point.phase == "critical" and np.isfinite(point.xi_c)


def test_dropout_is_critical_for_gradients_at_two_keep():
    point = layers.critical(lambda w, b: Activation(jax.nn.relu) >> Dropout(0.7) >> Dense(w, b))
    np.testing.assert_allclose(point.sigma_w**2, 2 * 0.7, rtol=1e-9)
    assert point.kind == "scale-invariant"


def test_merged_inputs_separate_under_dropout_in_a_wide_network():
    rng, n, keep, depth = np.random.default_rng(0), 1500, 0.9, 8
    path = layers.propagate(Activation(jax.nn.relu) >> Dropout(keep) >> Dense(1.8**0.5), depth, 1.0, 1.0)
    found = []
    for _ in range(4):
        a = b = rng.normal(size=n)
        for _ in range(depth):
            w = rng.normal(size=(n, n)) * np.sqrt(2 * keep / n)
            a, b = (w @ (relu(h) * (rng.random(n) < keep) / keep) for h in (a, b))
        found.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    error = np.std(found, ddof=1) / 2
    # error is a standard error of four draws: t with 3 degrees of freedom, 5.8 at 99 %; plus O(depth / n) of width
    assert abs(np.mean(found) - path.c[-1]) < 5.8 * error + depth / n


# -- residual ----------------------------------------------------------------------------------------------------------


def test_residual_relu_grows_geometrically():
    depth, sigma_w = 30, 1.0
    for alpha in (1.0, depth**-0.5):
        block = Residual(Activation(jax.nn.relu) >> Dense(sigma_w), alpha)
        path = layers.propagate(block, depth)
        growth = 1 + alpha**2 * sigma_w**2 / 2
        np.testing.assert_allclose(path.q[-1], growth**depth, rtol=1e-11)  # a rounding of 1e-13 per layer
        np.testing.assert_allclose(path.gradient[0], growth**depth, rtol=1e-11)
    np.testing.assert_allclose(path.q[-1], 1.6419, atol=1e-4)  # printed in the reference with five digits
    assert abs(np.log(path.q[-1]) - sigma_w**2 / 2) < 1 / depth  # -> e^{sigma_w^2 / 2}
    for alpha, gain in ((10**-0.5, 2.594), (1.0, 1024.0), (0.0, 1.0)):  # He branch: (1 + alpha^2)^L
        path = layers.propagate(Residual(Activation(jax.nn.relu) >> Dense(2**0.5), alpha), 10)
        np.testing.assert_allclose([path.q[-1], path.gradient[0]], gain, rtol=1e-4)


def test_residual_network_of_finite_width_follows_the_map():
    rng, n, depth = np.random.default_rng(1), 600, 20
    for phi, fn, sigma_w, alpha in ((jax.nn.relu, relu, 1.0, depth**-0.5), (jnp.tanh, np.tanh, 1.0, 1.0)):
        path = layers.propagate(Residual(Activation(phi) >> Dense(sigma_w), alpha), depth)
        q, norm = [], []
        for _ in range(6):
            h, v = rng.normal(size=(2, n))
            h /= np.sqrt(np.mean(h * h))
            v /= np.sqrt(np.mean(v * v))
            for _ in range(depth):  # v: a small change carried along, whose square is the gradient's factor
                w = rng.normal(size=(n, n)) * sigma_w / np.sqrt(n)
                slope = np.where(h > 0, 1.0, 0.0) if phi is jax.nn.relu else 1 - np.tanh(h) ** 2
                h, v = h + alpha * w @ fn(h), v + alpha * w @ (slope * v)
            q.append(np.mean(h * h))
            norm.append(np.mean(v * v))
        for values, expected in ((q, path.q[-1]), (norm, path.gradient[0])):
            error = np.std(values, ddof=1) / np.sqrt(6)
            # 5 standard errors of six draws (99.6 %), and a shift of order depth / n
            assert abs(np.mean(values) - expected) < 5 * error + depth / n * expected


def test_residual_tanh_grows_linearly_and_gradients_as_the_exponential_of_a_root():
    path = layers.propagate(Residual(Activation(jnp.tanh) >> Dense(1.0)), 400, c0=None)
    # q grows by M(q) -> 1 - O(q^{-1/2}) per layer
    assert 0.85 < (path.q[400] - path.q[200]) / 200 < 1
    # log gradient = sum log(1 + D(q_l)), D ~ (4/3) / sqrt(2 pi q): ~ l^{1/2}, so a factor 2 from 100 to 400
    growth = np.log(path.gradient[0] / path.gradient[[100, 400]])
    assert abs(growth[1] / growth[0] - 2) < 0.15
    # alpha = 1, sigma_w = 1, D at large q by its asymptote
    q = path.q[400]
    np.testing.assert_allclose(path.chi[400] - 1, 4 / 3 / np.sqrt(2 * np.pi * q), rtol=0.01)


def test_alpha_zero_is_the_identity_and_dead_branches_are_told():
    block = Residual(Activation(jnp.tanh) >> Dense(2.0, 1.0), alpha=0.0)
    path = layers.propagate(block, 7, 1.7, 0.3)
    assert np.all(path.q == 1.7) and np.all(path.c == path.c[0]) and np.all(path.chi == 1)
    assert layers.fixed_point(block).phase == "critical"
    unbounded = layers.fixed_point(Residual(Activation(jnp.tanh) >> Dense(1.0)))
    assert unbounded.phase == "unbounded" and np.isinf(unbounded.q)
    with pytest.raises(ij.NoCriticalPointError, match="skip connection alone"):
        layers.critical(lambda w, b: Residual(Activation(jnp.tanh) >> Dense(w, b)))


# -- normalization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [jax.nn.relu, jnp.tanh, exact_gelu])
def test_layer_norm_before_the_activation(phi):
    w, b = 1.7, 0.4
    block = Activation(phi) >> Dense(w, b) >> LayerNorm()
    point = layers.fixed_point(block)
    m, d = ij.gaussian.moment(phi, 1.0), ij.gaussian.moment_prime(phi, 1.0)
    assert point.q == 1.0 and point.chi_q == 0.0
    np.testing.assert_allclose(point.chi_1, w**2 * d / (w**2 * m + b**2), rtol=1e-11)
    after = block.step(layers.state(1.0, 0.3))
    overlap = ij.gaussian.dual(phi, 1.0, 1.0, 0.3)
    np.testing.assert_allclose(after.k, (w**2 * overlap + b**2) / (w**2 * m + b**2), rtol=1e-11)
    rms = (Activation(phi) >> Dense(w, b) >> RMSNorm()).step(layers.state(1.0, 0.3))
    assert rms.k == after.k  # pre-activations have mean zero


def test_layer_norm_before_relu_without_bias_has_chi_1_whatever_the_weight_scale():
    for w in (0.3, 3.0):
        point = layers.fixed_point(Activation(jax.nn.relu) >> Dense(w) >> LayerNorm())
        np.testing.assert_allclose(point.chi_1, 1.0, rtol=1e-12)
    with pytest.raises(ij.NoCriticalPointError, match="does not depend on the weight scale"):
        layers.critical(lambda w, b: Activation(jax.nn.relu) >> Dense(w, b) >> LayerNorm())


@pytest.mark.parametrize("phi", [jax.nn.relu, exact_gelu, jax.nn.silu])
def test_layer_norm_after_the_activation_subtracts_the_mean(phi):
    block = Activation(phi) >> LayerNorm() >> Dense(1.0)
    m, mu = ij.gaussian.moment(phi, 1.0), ij.gaussian.mean(phi, 1.0)
    d = ij.gaussian.moment_prime(phi, 1.0)
    point = layers.fixed_point(block)
    np.testing.assert_allclose(point.chi_1, d / (m - mu**2), rtol=1e-11)
    assert point.chi_1 >= 1 and point.phase == "chaotic"  # Gaussian Poincare inequality
    overlap = ij.gaussian.dual(phi, 1.0, 1.0, 0.3)
    np.testing.assert_allclose(block.step(layers.state(1.0, 0.3)).k, (overlap - mu**2) / (m - mu**2), rtol=1e-11)
    kept = (Activation(phi) >> RMSNorm() >> Dense(1.0)).step(layers.state(1.0, 0.3))
    np.testing.assert_allclose(kept.k, overlap / m, rtol=1e-11)


def test_means_of_many_second_moments_are_those_of_single_ones():
    q = np.exp(np.linspace(-18, 15, 40))
    for phi in (jax.nn.silu, jax.nn.relu, lambda x: jnp.exp(-x * x / 2)):
        after = Activation(phi).step(layers.state(q, None))
        np.testing.assert_allclose(after.mean1, ij.gaussian.mean(phi, q), rtol=1e-10)  # interpolated to 1e-12
        np.testing.assert_allclose(after.q1, ij.gaussian.moment(phi, q), rtol=1e-11)


def test_pre_norm_residual_grows_linearly_with_a_relative_gradient_of_one_over_depth():
    w, depth = 1.5, 300
    path = layers.propagate(Residual(LayerNorm() >> Activation(jnp.tanh) >> Dense(w)), depth)
    step = w**2 * ij.gaussian.moment(jnp.tanh, 1.0)
    np.testing.assert_allclose(path.q, 1 + step * np.arange(depth + 1), rtol=1e-11)
    np.testing.assert_allclose(path.chi - 1, w**2 * ij.gaussian.moment_prime(jnp.tanh, 1.0) / path.q, rtol=1e-9)


def test_post_norm_residual_contracts_its_skip_path():
    # LN(x + f(x)): the skip path alone carries 1 / (1 + sigma_f^2) of the squared signal and gradient per layer
    w = 1.5
    point = layers.fixed_point(Residual(Activation(jnp.tanh) >> Dense(w)) >> LayerNorm())
    power = w**2 * ij.gaussian.moment(jnp.tanh, 1.0)
    branch = w**2 * ij.gaussian.moment_prime(jnp.tanh, 1.0)
    np.testing.assert_allclose(point.chi_1, (1 + branch) / (1 + power), rtol=1e-11)


def test_normalized_networks_of_finite_width_follow_the_map():
    rng, n, depth = np.random.default_rng(2), 700, 6
    cases = [
        (Residual(LayerNorm() >> Activation(jax.nn.relu) >> Dense(1.5)), lambda h, w: h + w @ relu(norm(h))),
        (Residual(Activation(jax.nn.relu) >> Dense(1.5)) >> LayerNorm(), lambda h, w: norm(h + w @ relu(h))),
        (Activation(jax.nn.relu) >> LayerNorm() >> Dense(1.5), lambda h, w: w @ norm(relu(h))),
    ]

    def norm(h):
        return (h - h.mean(axis=0)) / h.std(axis=0)

    for block, apply in cases:
        path = layers.propagate(block, depth, 1.0, 0.5)
        rows = []
        for _ in range(6):
            h = np.stack(correlated(rng, (n,), 0.5), axis=1)
            for _ in range(depth):
                h = apply(h, 1.5 * rng.normal(size=(n, n)) / np.sqrt(n))
            rows.append([np.mean(h[:, 0] ** 2), h[:, 0] @ h[:, 1] / np.sqrt(np.prod((h * h).sum(axis=0)))])
        error = np.std(rows, axis=0, ddof=1) / np.sqrt(6)
        expected = np.array([path.q[-1], path.c[-1]])
        # 5 standard errors of six draws (99.6 %), and a shift of order depth / n
        assert np.all(np.abs(np.mean(rows, axis=0) - expected) < 5 * error + depth / n * np.maximum(expected, 1))


@pytest.mark.parametrize("phi, factor", [(jax.nn.relu, np.pi / (np.pi - 1)), (jnp.tanh, 1.17781), (lambda x: x, 1.0)])
def test_batch_norm_gradient_factor(phi, factor):
    for w in (0.5, 3.0):  # independent of the weight scale
        point = layers.fixed_point(BatchNorm() >> Activation(phi) >> Dense(w, 0.2))
        np.testing.assert_allclose(point.chi_1, factor, rtol=5e-6 if phi is jnp.tanh else 1e-11)  # printed digits
    variance = ij.gaussian.moment(phi, 1.0) - ij.gaussian.mean(phi, 1.0) ** 2
    np.testing.assert_allclose(point.chi_1, ij.gaussian.moment_prime(phi, 1.0) / variance, rtol=1e-11)
    with pytest.raises(ij.NoCriticalPointError, match=r"E\[phi'\^2\] / Var\(phi\)"):
        layers.critical(lambda w, b: BatchNorm() >> Activation(phi) >> Dense(w, b))


@pytest.mark.slow
def test_batch_norm_network_multiplies_gradients_by_that_factor():
    # one layer h -> BN -> phi -> W, gradient of a random direction for the whole batch, through the statistics
    n, batch = 800, 256

    def layer(h, w):
        z = (h - h.mean(axis=0, keepdims=True)) / h.std(axis=0, keepdims=True)
        return jax.nn.relu(z) @ w

    @jax.jit
    def ratios(h, w1, w2, direction):
        """Squared norms of the gradient after one more layer downwards."""
        middle, down = jax.vjp(lambda h: layer(h, w1), h)
        _, top = jax.vjp(lambda h: layer(h, w2), middle)
        (g1,) = top(direction)
        (g0,) = down(g1)
        return jnp.sum(g0**2) / jnp.sum(g1**2)

    out = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        h, direction = rng.normal(size=(2, batch, n))
        h = relu(h) @ rng.normal(size=(n, n)) / np.sqrt(n)  # so that the batch has its common part
        w1, w2 = rng.normal(size=(2, n, n)) / np.sqrt(n)
        out.append(float(ratios(h, w1, w2, direction)))
    error = np.std(out, ddof=1) / np.sqrt(6)
    # finite batch: 1 + O(1/B), 1.0040 for linear at 256
    assert abs(np.mean(out) - 1.466942) < 5 * error + 1.466942 / batch


def test_batch_norm_in_a_residual_branch_grows_linearly():
    # De and Smith 2020: 1 + l
    path = layers.propagate(Residual(BatchNorm() >> Activation(jax.nn.relu) >> Dense(2**0.5)), 20, 1.0, 0.0)
    np.testing.assert_allclose(path.q, 1 + np.arange(21), rtol=1e-11)


# -- convolution -------------------------------------------------------------------------------------------------------


def test_convolution_modes_are_dirichlet_ratios_and_one_for_the_delta_kernel():
    size, half = 12, 2
    modes = layers.convolution_modes(np.full(5, 1 / 5), size)
    w = 2 * np.pi * np.arange(1, size) / size
    ratio = np.sin((2 * half + 1) * w / 2) / ((2 * half + 1) * np.sin(w / 2))
    np.testing.assert_allclose(modes[0], 1.0, rtol=1e-15)
    np.testing.assert_allclose(modes[1:], ratio, atol=1e-14)  # sums of five cosines
    np.testing.assert_allclose(layers.convolution_modes([0, 1, 0], size), 1.0, rtol=1e-15)
    plane = layers.convolution_modes(np.full((3, 3), 1 / 9), (4, 6))
    line = [layers.convolution_modes(np.full(3, 1 / 3), p) for p in (4, 6)]
    np.testing.assert_allclose(plane, np.outer(*line), atol=1e-14)


def test_fourier_modes_of_the_covariance_decay_as_the_theory_says():
    # perturb K(a, a + s) of a fixed point by a plane wave: one layer multiplies by chi_1 lambda_w in the ordered phase
    size, w, b = 8, 0.9, 0.3
    fractions = np.array([0.2, 0.5, 0.3])
    q = ij.fixed_point(jnp.tanh, w, b).q
    chi = ij.fixed_point(jnp.tanh, w, b).chi_1
    layer = Activation(jnp.tanh) >> Convolution(fractions, w, b, positions=size)
    a = np.arange(size)
    modes = layers.convolution_modes(fractions, size)
    for m in (0, 1, 3):
        wave = np.exp(2j * np.pi * m * (a[:, None] + 0 * a[None, :]) / size)
        start = layers.covariance(np.full((size, size), q), change=wave)
        np.testing.assert_allclose(layer.step(start).chi_k, chi * modes[m] * wave, rtol=1e-11)


def test_periodic_convolution_on_equal_positions_is_dense_and_forgets_all_but_the_mean():
    size = 6
    layer = Activation(jax.nn.relu) >> Convolution(np.full(3, 1 / 3), 1.4, 0.2, positions=size)
    same = layer.step(layers.covariance(np.ones((size, size))))
    dense = (Activation(jax.nn.relu) >> Dense(1.4, 0.2)).step(layers.state(1.0, 1.0))
    np.testing.assert_allclose(same.k, dense.k, rtol=1e-12)
    np.testing.assert_allclose(same.q1, dense.q1, rtol=1e-12)
    linear = Convolution(np.full(3, 1 / 3), positions=size)
    x = np.random.default_rng(8).normal(size=(size, 9))
    start = layers.covariance(x @ x.T / 9)
    state = start
    for _ in range(100):  # slowest mode: ((1 + 2 cos(pi / 3)) / 3)^100 = (2/3)^100 = 2e-18
        state = linear.step(state)
    a = np.arange(size)
    for shift in range(size):  # K(a, a + s) becomes its mean over a
        moved = (a + shift) % size
        np.testing.assert_allclose(state.k[a, moved], start.k[a, moved].mean(), rtol=0, atol=1e-13)


def test_zero_padding_loses_the_borders():
    # ((1/H) 1^T A^L 1)^2, A tridiagonal ones / 3; printed digits
    kernel = np.full((3, 3), 1 / 9)
    for size, expected in ((8, 0.35303), (16, 0.63529)):
        left = layers.padding_gain(kernel, (size, size), 10)
        assert abs(left.mean() - expected) < 5e-6
        a = (np.eye(size) + np.eye(size, k=1) + np.eye(size, k=-1)) / 3
        line = np.linalg.matrix_power(a, 10).sum(axis=1)
        np.testing.assert_allclose(left, np.outer(line, line), rtol=1e-13)
    assert abs(left[0, 0] - 0.0859) < 5e-4  # a simulated corner, three digits
    one = layers.padding_gain(kernel, (16, 16), 1).mean()
    np.testing.assert_allclose(one, (1 - 2 / 48) ** 2, rtol=1e-13)
    layer = Convolution(np.full(3, 1 / 3), positions=8, padding="zero")
    state = layers.covariance(np.eye(8))
    for _ in range(10):
        state = layer.step(state)
    np.testing.assert_allclose(np.diag(state.q1), layers.padding_gain(np.full(3, 1 / 3), 8, 10), rtol=1e-13)


def test_wide_convolutional_network_has_the_covariance_of_the_map():
    rng, channels, size, depth, runs = np.random.default_rng(3), 300, 6, 3, 8
    fractions = np.array([0.25, 0.5, 0.25])
    for padding in ("circular", "zero"):
        layer = Activation(jnp.tanh) >> Convolution(fractions, 1.5, 0.2, positions=size, padding=padding)
        root = np.linalg.cholesky(0.6 + 0.9 * np.eye(size))
        state = layers.covariance(root @ root.T)
        for _ in range(depth):
            state = layer.step(state)
        found = []
        for _ in range(runs):
            h = rng.normal(size=(channels, size)) @ root.T
            for _ in range(depth):
                x, new = np.tanh(h), 0.2 * rng.normal(size=(channels, 1)) + np.zeros((1, size))
                for share, offset in zip(fractions, (-1, 0, 1), strict=True):
                    moved = np.roll(x, -offset, axis=1)
                    if padding == "zero" and offset:
                        moved[:, -1 if offset == 1 else 0] = 0.0
                    new = new + 1.5 * np.sqrt(share / channels) * rng.normal(size=(channels, channels)) @ moved
                h = new
            found.append(h.T @ h / channels)
        error = np.std(found, axis=0, ddof=1) / np.sqrt(runs)
        # 36 entries (21 distinct): 6 standard errors with 7 degrees of freedom, and O(depth / channels) of width
        assert np.all(np.abs(np.mean(found, axis=0) - state.k) < 6 * error + depth / channels)


# -- attention ---------------------------------------------------------------------------------------------------------


def test_attention_without_skip_has_rank_one_after_one_layer():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5, 40))
    start = layers.covariance(x @ x.T / 40)
    after = Attention(1.3).step(start)
    np.testing.assert_allclose(after.k, 1.3**2 * np.mean(x @ x.T / 40), rtol=1e-13)
    np.testing.assert_allclose(after.c, 1.0, rtol=1e-13)


def test_attention_with_skip_follows_the_q_p_recursion_and_a_wide_network():
    tokens, depth, a2, n, runs = 32, 10, 0.5, 300, 6
    block = Residual(Attention(1.0), alpha=a2)
    state, q, p = layers.covariance(np.eye(tokens)), 1.0, 0.0
    for _ in range(depth):
        state = block.step(state)
        mean = (q + (tokens - 1) * p) / tokens
        q, p = q + a2**2 * mean, p + a2**2 * mean
    np.testing.assert_allclose([state.q1[0, 0], state.k[0, 1]], [q, p], rtol=1e-13)
    np.testing.assert_allclose(q - p, 1.0, rtol=1e-13)  # kept by the skip
    assert abs(q - 1.260) < 5e-4 and abs(p - 0.2598) < 5e-5  # printed digits
    rng, rows = np.random.default_rng(5), []
    for _ in range(runs):
        x = rng.normal(size=(tokens, n))
        for _ in range(depth):
            logits = (x @ rng.normal(size=(n, n)) / n) @ (rng.normal(size=(n, n)) / n @ x.T) / n
            weights = np.exp(logits)
            weights /= weights.sum(axis=1, keepdims=True)
            x = x + a2 * weights @ x @ rng.normal(size=(n, n)) / np.sqrt(n)
        k = x @ x.T / n
        rows.append([np.trace(k) / tokens, (k.sum() - np.trace(k)) / tokens / (tokens - 1)])
    error = np.std(rows, axis=0, ddof=1) / np.sqrt(runs)
    # 5 standard errors of six draws (99.6 %), and a shift of order depth / n relative to the growth of 0.26
    assert np.all(np.abs(np.mean(rows, axis=0) - [q, p]) < 5 * error + 0.26 * depth / n)


@pytest.mark.slow
def test_attention_with_logits_of_order_one_is_as_far_off_as_the_documentation_says():
    tokens, depth, a2, n, runs = 32, 10, 0.5, 400, 8
    for sigma_logit, within in ((0.3, 0.0), (1.0, 0.025)):
        block = Residual(Attention(1.0, sigma_logit), alpha=a2)
        state = layers.covariance(np.eye(tokens))
        for _ in range(depth):
            state = block.step(state)
        rng, rows = np.random.default_rng(9), []
        for _ in range(runs):
            x = rng.normal(size=(tokens, n))
            for _ in range(depth):
                queries, keys = x @ rng.normal(size=(2, n, n)) / np.sqrt(n)
                weights = np.exp(sigma_logit * queries @ keys.T / np.sqrt(n))
                weights /= weights.sum(axis=1, keepdims=True)
                x = x + a2 * weights @ x @ rng.normal(size=(n, n)) / np.sqrt(n)
            k = x @ x.T / n
            rows.append([np.trace(k) / tokens, (k.sum() - np.trace(k)) / tokens / (tokens - 1)])
        error = np.std(rows, axis=0, ddof=1) / np.sqrt(runs)
        # 4.5 standard errors of eight draws (99.7 %); the approximation itself: 0.025; width: depth / n of the growth
        assert np.all(np.abs(np.mean(rows, axis=0) - [state.q1[0, 0], state.k[0, 1]]) < 4.5 * error + within + 0.01)
        assert np.all(np.isnan(state.chi))


def test_attention_logits_vanish_into_the_exact_layer_and_condensation_is_refused():
    x = np.random.default_rng(10).normal(size=(6, 30))
    start = layers.covariance(x @ x.T / 30)
    exact, small = Attention(1.2).step(start), Attention(1.2, 1e-4).step(start)
    np.testing.assert_allclose(small.k, exact.k, atol=1e-7)  # next order sigma_logit^2 = 1e-8 times a few
    with pytest.raises(ij.InputError, match="single tokens"):
        Attention(1.0, 2.0).step(layers.covariance(np.eye(32)))


def test_cosines_of_tokens_tend_to_one_with_depth():
    block = Residual(Attention(1.0)) >> LayerNorm()
    state = layers.covariance(np.eye(8))
    for _ in range(40):
        state = block.step(state)
    assert np.all(state.c > 0.999)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: layers.Chain(jnp.tanh), "wrap an activation function"),
        (lambda: Dropout(0.0), "rate"),
        (lambda: Dense(-1.0), "standard deviation"),
        (lambda: Residual(Activation(jnp.tanh)), "branch without weights"),
        (lambda: (Activation(jnp.tanh) >> Activation(jnp.tanh)).step(layers.state()), "not Gaussian"),
        (lambda: layers.fixed_point(Dense(1.0) >> Activation(jnp.tanh)), "pre-activations"),
        (lambda: layers.fixed_point(Dense(np.array([1.0, 2.0, 3.0]))), "parameters that are arrays"),
        (lambda: Convolution([0.5, 0.5], positions=4), "odd number"),
        (lambda: Convolution([0.5, 0.5, 0.5], positions=4), "sum to 1"),
        (lambda: Attention(1.0).step(layers.state()), "covariance"),
        (lambda: layers.covariance(np.array([[1.0, 2.0], [2.0, 1.0]])), "lowest eigenvalue"),
        (lambda: layers.propagate(Dense(1.0), -1), "depth counts"),
        (lambda: layers.propagate([Dense(1.0)], 3), "one block for every depth"),
        (lambda: LayerNorm().step(layers.state(0.0)), "not all equal"),
        (lambda: BatchNorm().step(layers.state(1.0).replace(q2=2.0)), "equal second moments"),
        (lambda: jax.jit(lambda q: layers.state(q).q1)(1.0), "traced value"),
        (lambda: jax.jit(lambda w: Dense(w).sigma_w)(1.0), "traced value"),
    ],
)
def test_refusals_say_what_to_do(make, reason):
    with pytest.raises(ij.InputError, match=reason) as caught:
        make()
    assert caught.value.accepted and caught.value.why and caught.value.remedy


@pytest.mark.parametrize(
    "make_block, sigma_b, reason",
    [
        (lambda w, b: Activation(jax.nn.relu) >> Dense(w, b), 0.3, "grows in every block"),
        (lambda w, b: Activation(jnp.sign) >> Dense(w, b), 0.3, "no slope"),
        (lambda w, b: LayerNorm() >> Activation(jnp.tanh) >> Dense(w, b), 0.0, "does not depend on the weight scale"),
    ],
)
def test_blocks_without_an_edge_say_why(make_block, sigma_b, reason):
    with pytest.raises(ij.NoCriticalPointError, match=reason):
        layers.critical(make_block, sigma_b)


def test_layer_norm_with_biases_has_an_edge_in_closed_form():
    # chi = w^2 D / (w^2 M + b^2) = 1 at w^2 = b^2 / (D - M)
    b = 0.3
    gap = ij.gaussian.moment_prime(jnp.tanh, 1.0) - ij.gaussian.moment(jnp.tanh, 1.0)
    for block in (
        lambda w, b: Activation(jnp.tanh) >> Dense(w, b) >> LayerNorm(),
        lambda w, b: LayerNorm() >> Activation(jnp.tanh) >> Dense(w, b),
    ):
        np.testing.assert_allclose(layers.critical(block, b).sigma_w ** 2, b**2 / gap, rtol=1e-9)


def test_layer_maps_work_inside_a_users_jit_and_without_64_bit_input():
    block = Activation(jnp.tanh) >> Dense(1.5, 0.05)
    outside = float(layers.fixed_point(block).q)
    inside = jax.jit(lambda x: x * layers.fixed_point(block).q)(jnp.ones(()))
    np.testing.assert_allclose(inside, outside, rtol=1e-14)
    assert isinstance(layers.fixed_point(block, np.float32(1.0)).q, np.float64)


# -- the data set ------------------------------------------------------------------------------------------------------


def test_inputs_gives_the_first_state_of_the_recursion():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(40, 5, 4)) + 0.5
    found = ij.inputs(x, 1.3, 0.4)
    flat = x.reshape(40, 20)
    gram = flat @ flat.T / 20
    pairs = np.triu_indices(40, 1)
    cosine = (gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))))[pairs]
    # the same sums in another order
    np.testing.assert_allclose(found.second_moments, np.diag(gram), rtol=1e-13)
    np.testing.assert_allclose(found.correlation, cosine.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.correlation_std, cosine.std(), rtol=1e-9)
    np.testing.assert_allclose(found.mean, x.mean(), rtol=1e-13)
    q = 1.3**2 * np.diag(gram).mean() + 0.4**2
    np.testing.assert_allclose(found.q_1, q, rtol=1e-13)
    np.testing.assert_allclose(found.c_1, (1.3**2 * gram[pairs].mean() + 0.4**2) / q, rtol=1e-12)
    narrow = flat[:, :12].astype(np.float32)  # fewer features than samples: the other Gram matrix
    unit = narrow / np.linalg.norm(narrow, axis=1, keepdims=True)
    np.testing.assert_allclose(ij.inputs(narrow).correlation_std, (unit @ unit.T)[pairs].std(), rtol=1e-5)


def test_inputs_agrees_with_the_first_layer_of_a_wide_network():
    rng, n = np.random.default_rng(7), 40_000
    x = rng.normal(size=(3, 12)) + 0.3
    found = ij.inputs(x, 1.5, 0.5)
    h = x @ rng.normal(size=(12, n)) * 1.5 / np.sqrt(12) + 0.5 * rng.normal(size=n)
    # E[h^2] over n independent units: relative standard error sqrt(2 / n) = 0.7 %
    np.testing.assert_allclose(np.mean(h * h), found.q_1, rtol=5 * np.sqrt(2 / n))


@pytest.mark.parametrize(
    "x, quantity, value",
    [
        (np.full((4, 3), 255, np.uint8), "second_moment", 65025.0),
        (np.full((4, 3), 0.1), "second_moment", 0.01),
        (np.array([[0.1, 0.1], [1.9, 1.9]]), "spread", 361.0),
    ],
)
def test_inputs_warns_with_the_number(x, quantity, value):
    with pytest.warns(ij.UnnormalisedInputsWarning, match="second moment") as caught:
        ij.inputs(x)
    message = caught[0].message
    assert message.quantity == quantity
    np.testing.assert_allclose(message.value, value, rtol=1e-12)


@pytest.mark.parametrize("x", [np.ones(3), np.ones((0, 3)), np.array([[1.0, np.nan]]), np.ones((2, 2), complex)])
def test_inputs_refuses_what_is_no_data_set(x):
    with pytest.raises(ij.InputError, match="inputs got"):
        ij.inputs(x)
