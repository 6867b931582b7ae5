"""Jacobian spectra against closed forms, a second numerical route, and the singular values of random networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import initjax as ij
from initjax.meanfield.freeprob import Law, edges, followed


def moments(s):
    e, m = s.eigenvalue, s.mass
    return [np.sum(m * e**k, axis=-1) + s.top * s.edge**k for k in (0, 1, 2)]


@pytest.mark.parametrize("depth", [1, 4, 30, 300])
def test_gaussian_linear_networks_have_the_fuss_catalan_law(depth):
    s = ij.jacobian_spectrum(lambda x: x, 1.0, depth=depth)
    # log1p form of (L + 1)^(L + 1) / L^L
    np.testing.assert_allclose(np.log(s.edge), (depth + 1) * np.log1p(depth) - depth * np.log(depth), rtol=1e-12)
    np.testing.assert_allclose(s.variance, depth, rtol=1e-12)
    # by the angle t in (0, pi / (L + 1)): lambda = sin^(L+1)((L+1) t) / (sin t sin^L(L t)),
    # density = sin^2 t sin^(L-1)(L t) / (pi sin^L((L+1) t))
    t = np.linspace(0.02, 0.9, 150) * np.pi / (depth + 1)
    first, full, whole = (np.log(np.sin(k * t)) for k in (1, depth, depth + 1))
    log_lambda = (depth + 1) * whole - first - depth * full
    exact = np.exp(log_lambda + 2 * first + (depth - 1) * full - depth * whole) / np.pi
    law = Law(*(np.array(v) for v in ([[1.0]], [[1.0]], [0.0], [float(depth)], [0.0])))
    w, log_edge, _ = edges(law)
    found, residual = followed(law, log_lambda, (w, log_edge))
    assert residual.max() < 1e-8
    np.testing.assert_allclose(found, exact, rtol=1e-6)  # read off at Im log lambda = 1e-11, which w sees times L


# largest error of (mass, first, second moment): Newton's residual, and what lies below for smooth phi'
LAWS = {
    "relu gaussian": (jax.nn.relu, 2**0.5, 0.0, 4, "gaussian", 1e-10),
    "relu orthogonal": (jax.nn.relu, 2**0.5, 0.0, 4, "orthogonal", 1e-10),
    "hard_tanh orthogonal": (jax.nn.hard_tanh, 1.1, 0.1, 20, "orthogonal", 1e-10),
    "hard_tanh, atom at the top": (jax.nn.hard_tanh, 1.01, 0.02, 5, "orthogonal", 1e-8),
    "leaky orthogonal": (lambda x: jnp.where(x > 0, x, 0.1 * x), 1.4, 0.0, 5, "orthogonal", 1e-8),
    "leaky gaussian": (lambda x: jnp.where(x > 0, x, 0.1 * x), 1.4, 0.0, 5, "gaussian", 1e-8),
    "tanh gaussian": (jnp.tanh, 1.3, 0.2, 10, "gaussian", 1e-9),
    "tanh orthogonal": (jnp.tanh, 1.5, 0.5, 10, "orthogonal", 1e-9),
}


@pytest.mark.parametrize("name", LAWS)
def test_densities_integrate_to_one_with_the_closed_moments(name):
    phi, w, b, depth, weights, tolerance = LAWS[name]
    s = ij.jacobian_spectrum(phi, w, b, depth, weights)
    total, first, second = moments(s)
    np.testing.assert_allclose(total + s.zero + s.below, 1, atol=tolerance)
    assert s.below < 1e-3
    np.testing.assert_allclose(first, s.mean, rtol=tolerance)
    np.testing.assert_allclose(second, s.variance + s.mean**2, rtol=tolerance)
    assert np.all(s.density >= 0) and np.all(s.eigenvalue <= s.edge)


def test_edges_and_atoms_of_relu_in_closed_form():
    for depth in (2, 10, 100):
        s = ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=depth, points=64)
        z = (1 - depth + np.sqrt(depth**2 + 1)) / (2 * depth)
        np.testing.assert_allclose(s.edge, (1 + z) / z * (1 + 2 * z) ** depth, rtol=1e-10)
        assert s.zero == pytest.approx(0.5, abs=1e-14)


def test_the_curve_agrees_with_continuation_in_the_imaginary_part():
    s = ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=4, weights="orthogonal", points=64)
    law = Law(*(np.array(v) for v in ([[0.0, 1.0]], [[0.5, 0.5]], [np.log(2)], [4.0], [1.0])))
    part = slice(5, int(np.argmin(s.eigenvalue > 1e-6)))
    scaled, _ = followed(law, s.log_eigenvalue[part])
    np.testing.assert_allclose(s.density[part], scaled / s.eigenvalue[part], rtol=1e-6)  # read off 1e-11 above the axis


def test_orthogonal_linear_networks_are_isometric_and_relu_networks_never():
    s = ij.jacobian_spectrum(lambda x: x, 1.0, depth=50, weights="orthogonal")
    assert s.top == 1 and s.variance == 0 and not s.density.any()
    assert ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=50, weights="orthogonal").variance == pytest.approx(50)


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_singular_values_of_random_networks_follow_the_law(weights):
    n, depth, w, b = 600, 4, 1.5, 0.5
    q = float(ij.fixed_point(jnp.tanh, w, b).q)
    rng = np.random.default_rng(3)
    jacobian, h = np.eye(n), np.sqrt(q) * rng.normal(size=n)
    for _ in range(depth):
        a = rng.normal(size=(n, n))
        matrix = w * (a / np.sqrt(n) if weights == "gaussian" else np.linalg.qr(a)[0])
        jacobian = (1 - np.tanh(h) ** 2)[:, None] * (matrix @ jacobian)
        h = matrix @ np.tanh(h) + b * rng.normal(size=n)
    values = np.linalg.svd(jacobian, compute_uv=False) ** 2
    s = ij.jacobian_spectrum(jnp.tanh, w, b, depth, weights)
    below = 1 - np.cumsum(s.mass)  # probability of less than each node
    cdf = lambda x: np.interp(x, s.eigenvalue[::-1], below[::-1])  # noqa: E731
    # eigenvalues repel: their empirical law is within about log(n) / n; 0.03 leaves room for q's own 1 / sqrt(n)
    assert stats.ks_1samp(values, cdf).statistic < 0.03


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((jnp.tanh, 1.0, 0.0, 0), "whole numbers"),
        ((jnp.tanh, 1.5, 0.1, 4, "sparse"), "gaussian"),
        ((jax.nn.relu, 2.0, 0.0, 4, "orthogonal"), None),
        ((jax.nn.gelu, 2.5, 0.1, 4), "diverges"),
        ((jnp.tanh, 1.5, 0.1, 1, "orthogonal"), "depth = 1"),
        ((jnp.sign, 1.0, 0.1, 3), "slope"),
        ((jnp.tanh, 1.0, 0.1, 2.5), "whole numbers"),
        ((jnp.tanh, 1.0, 0.1, -1), "whole numbers"),
        ((lambda x: jnp.sign(x) * jnp.abs(x) ** 0.75, 1.0, 0.0, 3, "gaussian", 1.0), "mu_2"),  # E 1/|z| diverges
        ((lambda x: jnp.exp(x * x / 6), 1.0, 0.0, 3, "gaussian", 1.0), "mu_2"),  # phi'^4 beats the Gaussian
    ],
)
def test_what_is_refused(arguments, text):
    if text is None:  # a scale-invariant network needs no fixed point
        assert np.isfinite(ij.jacobian_spectrum(*arguments).edge)
        return
    *positional, q = arguments if len(arguments) == 6 else (*arguments, None)
    with pytest.raises(ij.InputError, match=text) as error:
        ij.jacobian_spectrum(*positional, q=q)
    assert all(error.value.parts)


@pytest.mark.parametrize(
    "weights, widths, text",
    [
        ("orthogonal", [64, 64, 48, 64], r"fan_out = 48 < fan_in = 64 in layer 2[\s\S]*16 directions to zero"),
        ("orthogonal", [48, 64, 64, 64], "layers of one width"),
        ("gaussian", [64, 64, 48, 48], "layers of one width"),
        ("gaussian", [64, 64], "depth [+] 1 widths"),
        ("gaussian", [64, 64.5, 64, 64], "positive whole numbers"),
    ],
)
def test_the_law_is_that_of_square_layers(weights, widths, text):
    with pytest.raises(ij.InputError, match=text) as error:
        ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=3, weights=weights, widths=widths)
    assert all(error.value.parts)
    square = ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=3, weights=weights, widths=[64] * 4)
    assert square.edge == ij.jacobian_spectrum(jax.nn.relu, 2**0.5, depth=3, weights=weights).edge
