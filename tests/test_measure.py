"""Measured signals of each layer against exact results for linear networks, the theory of wide ones, and explicit
Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
X = jax.random.normal(jax.random.key(0), (3, 32), DTYPE)


def gaussian(sigma_w):
    return nn.initializers.variance_scaling(sigma_w**2, "fan_in", "normal")


class Mlp(nn.Module):
    widths: tuple
    sigma_w: float
    sigma_b: float = 0.0
    phi: object = jnp.tanh

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal(self.sigma_b) if self.sigma_b else nn.initializers.zeros
        for i, width in enumerate(self.widths):
            x = self.phi(x) if i else x
            x = nn.Dense(width, kernel_init=gaussian(self.sigma_w), bias_init=bias, param_dtype=DTYPE)(x)
        return x


def wide_limit(x, sigma_w, sigma_b, depth):
    """q, correlations and squared gradients per output of an infinitely wide tanh network, by 2-D Gauss-Hermite in
    NumPy."""
    z, w = np.polynomial.hermite_e.hermegauss(64)
    w = w / w.sum()
    x = np.asarray(x, np.float64)
    k = sigma_w**2 * x @ x.T / x.shape[1] + sigma_b**2
    covariances, slopes = [k], []
    for _ in range(depth - 1):
        q = np.diag(k)
        c = k / np.sqrt(q[:, None] * q[None, :])
        c = np.clip(c, -1, 1)
        u = np.sqrt(q)[:, None, None, None] * z[:, None]
        v = np.sqrt(q)[None, :, None, None] * (c[..., None, None] * z[:, None] + np.sqrt(1 - c**2)[..., None, None] * z)
        slopes.append(sigma_w**2 * ((1 - np.tanh(np.sqrt(q)[:, None] * z) ** 2) ** 2 @ w))
        k = sigma_w**2 * np.einsum("ijab,a,b->ij", np.tanh(u) * np.tanh(v), w, w) + sigma_b**2
        covariances.append(k)
    gradients = np.cumprod([np.ones(len(x)), *slopes[::-1]], axis=0)[::-1]
    q = np.stack([np.diag(k) for k in covariances])
    return q, np.stack([k / np.sqrt(np.outer(np.diag(k), np.diag(k))) for k in covariances]), gradients


def test_wide_tanh_network_matches_infinite_width_within_its_errors():
    widths, sigma_w, sigma_b = (600, 500, 600, 40), 1.4, 0.3
    found = ij.measure(Mlp(widths, sigma_w, sigma_b), X, key=jax.random.key(1), seeds=40)
    q, c, gradient = wide_limit(X, sigma_w, sigma_b, len(widths))
    assert found.layers == ("Dense_0", "Dense_1", "Dense_2", "Dense_3")
    # 4 standard errors each; corrections of relative order depth / width = 0.7 % are a tenth of that
    assert np.all(np.abs(found.q - q) < 4 * found.q_error)
    off = ~np.eye(3, dtype=bool)
    assert np.all(np.abs(found.correlation - c)[:, off] < 4 * found.correlation_error[:, off])
    assert np.all(np.abs(found.gradient - gradient) < 4 * found.gradient_error)
    # and the errors are small enough for that to mean something: of the 40 outputs, sqrt(2 / 40 / 40) = 4 %
    assert np.all(found.q_error < 0.06 * q) and np.all(found.gradient_error < 0.1 * gradient)


def test_linear_network_of_any_widths_has_its_exact_means():
    widths, sigma_w = (6, 20, 9, 5), 1.2
    found = ij.measure(Mlp(widths, sigma_w, phi=lambda x: x), X, key=jax.random.key(2), seeds=1500)
    powers = np.arange(1, 5)[:, None]
    q = sigma_w ** (2.0 * powers) * np.asarray((X**2).mean(1))[None]
    assert np.all(np.abs(found.q - q) < 4.5 * found.q_error)  # 24 comparisons, exact at any width
    gradient = sigma_w ** (2.0 * (4 - powers)) * np.ones((4, 3))
    assert np.all(np.abs(found.gradient - gradient) < 4.5 * found.gradient_error)


def test_given_network_has_the_signals_and_the_jacobian_norms_of_explicit_formulas():
    weights = [jax.random.normal(jax.random.key(i), s, DTYPE) for i, s in enumerate([(32, 7), (7, 5), (5, 4)])]
    bias = jax.random.normal(jax.random.key(9), (7,), DTYPE)

    def apply(params, x):
        h = jax.nn.softplus((x @ params["a"]["w"]) / np.sqrt(32) + params["a"]["b"][None])
        return jnp.sin(h @ params["b"]["w"]) @ params["c"]["w"]

    params = {"a": {"w": weights[0], "b": bias}, "b": {"w": weights[1]}, "c": {"w": weights[2]}}
    found = ij.measure((lambda key: params, apply), X, key=jax.random.key(3), seeds=400)
    assert found.layers == ("a", "b", "c")
    h1 = np.asarray(X) @ np.asarray(weights[0]) / np.sqrt(32) + np.asarray(bias)
    h2 = np.logaddexp(h1, 0) @ np.asarray(weights[1])
    h3 = np.sin(h2) @ np.asarray(weights[2])
    for layer, h in enumerate((h1, h2, h3)):
        np.testing.assert_allclose(found.q[layer], (h**2).mean(1), rtol=1e-12)  # the same sums in another order
        norms = np.linalg.norm(h, axis=1)
        np.testing.assert_allclose(found.correlation[layer], h @ h.T / np.outer(norms, norms), rtol=0, atol=1e-12)
    assert found.q_error.max() < 1e-12  # one and the same network each time
    # E |v J|^2 = |J|_F^2: 400 random readouts, 4 standard errors
    jacobian3 = np.stack([np.eye(4)] * 3)
    jacobian2 = np.cos(h2)[:, :, None] * np.asarray(weights[2])
    jacobian1 = (1 / (1 + np.exp(-h1)))[:, :, None] * np.einsum("ij,njk->nik", np.asarray(weights[1]), jacobian2)
    for layer, jacobian in enumerate((jacobian1, jacobian2, jacobian3)):
        expected = (jacobian**2).sum((1, 2)) / 4
        assert np.all(np.abs(found.gradient[layer] - expected) < 4 * found.gradient_error[layer])


def test_chunks_of_networks_give_the_same_samples():
    model = Mlp((8, 8), 1.0)
    whole = ij.measure(model, X, key=jax.random.key(4), seeds=5)
    parts = ij.measure(model, X, key=jax.random.key(4), seeds=5, memory=12_000)  # two or so at a time
    # batched products may be summed in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), whole, parts)
    assert whole.q_samples.shape == (5, 2, 3)
    np.testing.assert_allclose(whole.q_error, whole.q_samples.std(0, ddof=1) / np.sqrt(5), rtol=1e-12)


class Attention(nn.Module):
    """Convolution under remat, attention, a dense layer used twice, position codes, a loop of two turns."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Conv)(8, (3, 3), param_dtype=DTYPE, name="conv")(x).reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(2, param_dtype=DTYPE, name="mha")(x)
        tied = nn.Dense(8, param_dtype=DTYPE, name="tied")
        x = tied(jnp.tanh(tied(x)))
        x = x + self.param("codes", nn.initializers.normal(), x.shape[1:], DTYPE)
        return nn.RNN(nn.SimpleCell(4, param_dtype=DTYPE, name="cell"))(x[:, :2]).mean(1)


def test_layers_are_found_and_named_and_what_is_left_is_told():
    x = jax.random.normal(jax.random.key(5), (2, 4, 4, 3), DTYPE)
    found = ij.measure(Attention(), x, key=jax.random.key(6), seeds=2)
    once = ("conv", "mha/query", "mha/key", "mha/value", "mha/out", "tied", "tied#2")
    assert found.layers == (*once, "cell/i", "cell/h", "cell/i#2", "cell/h#2")
    assert found.not_measured == ("codes",)
    text = repr(found)
    assert "2 networks on 2 inputs" in text and "tied#2" in text and "not measured" in text


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 6, param_dtype=DTYPE, rngs=rngs)
        self.last = nnx.Linear(6, 2, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, ids):
        return self.last(jnp.tanh(self.embed(ids)))


def test_nnx_factory_draws_networks_and_instance_is_one_network():
    ids = jnp.array([1, 4])
    found = ij.measure(lambda rngs: NnxMlp(rngs), ids, key=jax.random.PRNGKey(0), seeds=3)
    assert found.layers == ("embed", "last") and found.q_samples.shape == (3, 2, 2)
    assert np.all(found.q_error > 0)
    model = NnxMlp(nnx.Rngs(0))
    one = ij.measure(model, ids, key=jax.random.PRNGKey(0))
    np.testing.assert_allclose(one.q[0], (np.asarray(model.embed(ids)) ** 2).mean(1), rtol=1e-12)
    assert np.isnan(one.q_error).all()


@pytest.mark.x64_off
def test_gradients_below_the_smallest_squares_of_float32_are_measured():
    sigma_w = 0.01
    found = ij.measure(Mlp((30,) * 12, sigma_w, phi=lambda x: x), X, key=jax.random.key(7), seeds=60)
    exact = sigma_w ** (2.0 * 11)  # 1e-44, below the smallest normal float32
    assert found.gradient.dtype == np.float64
    assert np.all(np.abs(found.gradient[0] - exact) < 4 * found.gradient_error[0])
    assert np.all(found.gradient_error[0] < 0.5 * exact)


@pytest.mark.x64_off
def test_bfloat16_network_is_measured_in_float32():
    model = nn.Dense(200, dtype=jnp.bfloat16, kernel_init=gaussian(1.0))
    found = ij.measure(model, X, key=jax.random.key(8), seeds=8)
    # bfloat16 rounds each product to 0.4 %, well inside the statistical error
    assert np.all(np.abs(found.q[0] - np.asarray((X**2).mean(1))) < 4 * found.q_error[0])


def test_bad_input_gets_four_part_errors():
    model = Mlp((4,), 1.0)
    key = jax.random.key(0)
    for seeds in (0, 2.5, True):
        with pytest.raises(ij.InputError, match=rf"seeds={seeds}[\s\S]*integer >= 1"):
            ij.measure(model, X, key=key, seeds=seeds)
    with pytest.raises(ij.InputError, match=r"none of which meets data[\s\S]*nn.scan"):
        ij.measure((lambda key: jnp.ones((), DTYPE), lambda p, x: p * x), X, key=key)
    with pytest.raises(ij.InputError, match="NaN"):
        ij.measure(model, X.at[0].set(jnp.nan), key=key)
    with pytest.raises(ij.InputError, match="the class Mlp"):
        ij.measure(Mlp, X, key=key)
