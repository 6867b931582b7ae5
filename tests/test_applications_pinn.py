"""Residual kernels of differential operators: closed forms, direct integrals, finite networks."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.applications import pinn
from initjax.errors import InputError, UnsupportedLayerError

POINTS = np.array([[0.3, 0.7], [-0.8, 0.4]])
SW2, SB2 = 1.5, 0.1


def advection(c):
    return lambda u: lambda x: jax.grad(u)(x)[1] + c * jax.grad(u)(x)[0]


def heat(nu):
    return lambda u: lambda x: jax.grad(u)(x)[1] - nu * jax.hessian(u)(x)[0, 0]


def network(phi, layers, width=64, variance=SW2, bias=SB2):
    kernel_init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    bias_init = nn.initializers.normal(bias**0.5) if bias else nn.initializers.zeros
    parts = []
    for _ in range(layers - 1):
        parts += [nn.Dense(width, kernel_init=kernel_init, bias_init=bias_init), phi]
    return nn.Sequential([*parts, nn.Dense(1, kernel_init=kernel_init, bias_init=bias_init)])


def residual(phi, layers, operator, x=POINTS):
    return pinn.residual_kernel(ij.kernel_fn(network(phi, layers), x, parameterization="ntk"), operator)(x)


def direct(phi, feature):
    """The residual kernels of one hidden layer as integrals over its three weights (w_x, w_t, b).

    By the trapezoid rule, exact to rounding for these functions. feature(w, x) is the residual of one unit."""
    z = np.linspace(-8.5, 8.5, 80)
    bell = np.exp(-z * z / 2)
    bell /= bell.sum()
    w = np.stack([a.ravel() for a in np.meshgrid(z, z, z, indexing="ij")], 1)
    w = w * np.sqrt([SW2 / 2, SW2 / 2, SB2])
    mass = np.einsum("i,j,k->ijk", bell, bell, bell).ravel()
    both = jax.jit(jax.vmap(jax.value_and_grad(feature), (0, None)))
    (s, ds), (t, dt) = (jax.tree.map(np.asarray, both(w, x)) for x in POINTS)
    variances = np.array([SW2 / 2, SW2 / 2, SB2])  # NTK parameterization: each leaf weighted by its variance
    one = [SW2 * mass @ (s * s), SW2 * mass @ (s * t)]
    inner = [SW2 * mass @ ((ds * dx) @ variances) for dx in (ds, dt)]
    return one, [a + b for a, b in zip(one, inner, strict=True)]


def unit(phi, operator):
    return lambda w, x: operator(lambda y: phi(w[0] * y[0] + w[1] * y[1] + w[2]))(x)


@pytest.mark.parametrize(
    ("phi", "operator", "printed"),
    [
        (jnp.tanh, advection(2.0), (2.2627, 1.5591, 5.4672, 2.9994)),
        (jnp.sin, heat(0.5), (0.88355, 0.32491, 2.5072, 0.38341)),
        # The notes print .71817, .33012, 2.2613, .51204 here, from a coarser quadrature; the integral below decides.
        (jnp.tanh, heat(0.5), (0.71805, 0.33020, 2.2642, 0.51265)),
        (lambda x: x * jnp.exp(-x * x / 2), advection(-1.0), None),
    ],
)
def test_one_hidden_layer_is_the_integral_over_its_weights(phi, operator, printed):
    found = residual(phi, 2, operator)
    covariance, tangent = direct(phi, unit(phi, operator))
    np.testing.assert_allclose(found.nngp[0], covariance, rtol=1e-10)  # two quadratures, both exact to rounding
    np.testing.assert_allclose(found.ntk[0], tangent, rtol=1e-10)
    if printed:
        values = [*found.nngp[0], *found.ntk[0]]
        np.testing.assert_allclose(values, printed, rtol=3e-5)  # five digits are printed


@pytest.mark.parametrize(
    ("phi", "operator", "printed", "rtol"),
    [
        (jnp.sin, advection(2.0), (2.5101, 0.43099, 10.824, 0.76351), 3e-5),
        (jnp.sin, heat(0.5), (1.0021, 0.06985, 5.3223, -0.34625), 7e-5),
        (jnp.tanh, advection(2.0), (1.7598, 0.71570, 7.1226, 1.8337), 1e-4),  # the third, coarser: 7.1230
    ],
)
def test_two_hidden_layers_have_the_tabulated_values(phi, operator, printed, rtol):
    found = residual(phi, 3, operator)
    np.testing.assert_allclose([*found.nngp[0], *found.ntk[0]], printed, rtol=rtol)


@pytest.mark.slow
def test_sine_kernel_in_closed_form_at_any_order():
    # K = exp(-(q1 + q2)/2) sinh k of one hidden layer of sines; JAX differentiates the closed form, here to 3 + 3.
    def k(x, y):
        q1, q2, cov = (SW2 / 2 * jnp.dot(a, b) + SB2 for a, b in ((x, x), (y, y), (x, y)))
        return SW2 * (jnp.exp(cov - (q1 + q2) / 2) - jnp.exp(-cov - (q1 + q2) / 2)) / 2 + SB2

    def third(u):
        return lambda x: jax.grad(lambda y: jax.hessian(u)(y)[0, 0])(x)[1] + x[0] * u(x)

    exact = pinn.residual_kernel(k, third)(POINTS)
    found = residual(jnp.sin, 2, third)
    assert found.orders == (3, 3)
    np.testing.assert_allclose(found.nngp, exact, rtol=1e-10, atol=1e-12)


def test_series_at_equal_points_is_the_limit_of_neighbours():
    x = np.array([[0.3, 0.7], [0.3, 0.7 + 1e-5]])
    found = residual(jnp.tanh, 3, advection(2.0), x)
    # symmetric in x, x': the entry between neighbours is the mean of the diagonal ones up to the square of the distance
    np.testing.assert_allclose(found.ntk[0, 1], found.ntk.trace() / 2, rtol=1e-8)
    # without biases the origin is a point with q = 0, singular in (q, c) and regular in covariances
    origin = np.zeros((1, 2))
    model = network(jnp.tanh, 3, bias=0.0)
    at_origin = pinn.residual_kernel(ij.kernel_fn(model, origin), advection(2.0))(origin)
    np.testing.assert_allclose(at_origin.nngp, SW2**3 * 5 / 2, rtol=1e-12)  # linear there: sw2^3 |a|^2 / d


@pytest.mark.slow
def test_elu_at_first_order_is_the_integral_over_its_weights():
    # elu' has a kink and no jump: kernels without second derivatives of phi
    found = residual(jax.nn.elu, 2, advection(2.0), POINTS)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((400_000, 3)) * np.sqrt([SW2 / 2, SW2 / 2, SB2])
    s, t = (np.asarray(jax.vmap(unit(jax.nn.elu, advection(2.0)), (0, None))(w, x)) for x in POINTS)
    for value, sample in zip(found.nngp[0], (SW2 * s * s, SW2 * s * t), strict=True):
        assert abs(value - sample.mean()) < 4 * sample.std() / len(sample) ** 0.5  # 4 standard errors
    assert np.isfinite(found.ntk).all()


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_relu_residual_statistics_in_closed_form(c):
    he = nn.initializers.he_normal()
    for widths, bias in (((20,), 0.0), ((200,), 0.3), ((32, 32, 32), 0.3)):
        init = nn.initializers.normal(bias) if bias else nn.initializers.zeros
        layers = [p for n in widths for p in (nn.Dense(n, kernel_init=he, bias_init=init), jax.nn.relu)]
        model = nn.Sequential([*layers, nn.Dense(1, kernel_init=he)])
        found = pinn.initial_statistics(model, POINTS[:1], advection(c))
        np.testing.assert_allclose(found.residual, 1 + c * c, rtol=1e-10)
        kernels = [value for name, value in found.gradient.items() if name.endswith("kernel")]
        np.testing.assert_allclose(kernels[0], 1 + c * c, rtol=1e-10)
        for fan_in, value in zip(widths, kernels[1:], strict=True):
            np.testing.assert_allclose(value, fan_in * (1 + c * c) / 2, rtol=1e-10)
        assert found.exact
        if len(widths) == 1:
            expected = (1 + c * c) ** 2 * (1 + 5 / widths[0])
            first, last = (value for name, value in found.loss_gradient.items() if name.endswith("kernel"))
            np.testing.assert_allclose(first, expected, rtol=1e-10)
            np.testing.assert_allclose(last, expected * widths[0] / 2, rtol=1e-10)


def test_relu_statistics_match_networks_and_other_scales():
    # n = 20, c = 3: E R^2 = 10 and E|dLoss/dW_1|^2 = 125; readout variance v/n multiplies by v/2; d inputs by 2/d |a|^2
    rng = np.random.default_rng(1)
    draws, n, c = 40_000, 20, 3.0
    w, v = rng.standard_normal((draws, n, 2)), rng.standard_normal((draws, n)) * (2 / n) ** 0.5
    x, a = POINTS[0], np.array([c, 1.0])
    gate = (w @ x > 0) * v
    r = np.einsum("dn,dnk,k->d", gate, w, a)
    gradient = (gate**2).sum(1) * (a @ a)
    for sample, exact in ((r * r, 10.0), (gradient, 10.0), (r * r * gradient, 125.0)):
        assert abs(sample.mean() - exact) < 4 * sample.std() / draws**0.5
    he, half = nn.initializers.he_normal(), nn.initializers.variance_scaling(0.5, "fan_in", "normal")
    model = nn.Sequential([nn.Dense(20, kernel_init=he), jax.nn.relu, nn.Dense(1, kernel_init=half)])
    three = lambda u: lambda x: jnp.dot(jnp.array([1.0, -2.0, 0.5]), jax.grad(u)(x))  # noqa: E731
    found = pinn.initial_statistics(model, np.array([[0.3, 0.7, -0.2]]), three)
    np.testing.assert_allclose(found.residual, (2 / 3) * 5.25 * 0.5 / 2, rtol=1e-10)


def test_relu_tangent_kernel_diverges_at_first_order_and_warns():
    kernel = ij.kernel_fn(network(jax.nn.relu, 2), POINTS, parameterization="ntk")
    with pytest.warns(pinn.DivergentKernelWarning, match="infinite at 2 pairs"):
        found = pinn.residual_kernel(kernel, advection(2.0))(POINTS)
    assert np.isposinf(np.diagonal(found.ntk)).all() and np.isfinite(found.ntk[0, 1])
    np.testing.assert_allclose(np.diagonal(found.nngp), SW2**2 * 5 / 4, rtol=1e-10)  # sw2^2 |a|^2 / (2 d)
    with pytest.raises(UnsupportedLayerError, match="infinite at 2 pairs"):
        pinn.balance(kernel, advection(2.0), POINTS, POINTS[:1])


def test_relu_off_the_diagonal_is_the_derivative_of_arc_cosine_kernels():
    def k(x, y):
        q1, q2, cov = (SW2 / 2 * jnp.dot(a, b) + SB2 for a, b in ((x, x), (y, y), (x, y)))
        c = cov / jnp.sqrt(q1 * q2)
        angle = jnp.arccos(c)
        return SW2 * jnp.sqrt(q1 * q2) * (jnp.sin(angle) + (jnp.pi - angle) * c) / (2 * jnp.pi) + SB2

    def theta(x, y):
        q1, q2, cov = (SW2 / 2 * jnp.dot(a, b) + SB2 for a, b in ((x, x), (y, y), (x, y)))
        return k(x, y) + SW2 * cov * (jnp.pi - jnp.arccos(cov / jnp.sqrt(q1 * q2))) / (2 * jnp.pi)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pinn.DivergentKernelWarning)
        found = residual(jax.nn.relu, 2, advection(2.0))
    pair = POINTS[:1], POINTS[1:]
    np.testing.assert_allclose(found.nngp[0, 1], pinn.residual_kernel(k, advection(2.0))(*pair)[0, 0], rtol=1e-11)
    np.testing.assert_allclose(found.ntk[0, 1], pinn.residual_kernel(theta, advection(2.0))(*pair)[0, 0], rtol=1e-11)
    with pytest.raises(InputError, match="sqrt and arccos are 0/0"):
        pinn.residual_kernel(k, advection(2.0))(POINTS)


def test_refusals_say_why():
    relu = ij.kernel_fn(network(jax.nn.relu, 2), POINTS)
    with pytest.raises(UnsupportedLayerError, match="order 2 on a network with the activation"):
        pinn.residual_kernel(relu, heat(1.0))(POINTS)
    tanh = ij.kernel_fn(network(jnp.tanh, 2), POINTS)
    burgers = lambda u: lambda x: jax.grad(u)(x)[1] + u(x) * jax.grad(u)(x)[0]  # noqa: E731
    forced = lambda u: lambda x: jax.grad(u)(x)[1] - 1.0  # noqa: E731
    shifted = lambda u: lambda x: u(x + 0.1)  # noqa: E731
    for operator, message in (
        (burgers, "nonlinear in u, or not local"),
        (forced, "forcing term"),
        (shifted, "not local"),
    ):
        with pytest.raises(InputError, match=message):
            pinn.residual_kernel(tanh, operator)(POINTS)
    with pytest.raises(InputError, match="finite real points"):
        pinn.residual_kernel(tanh, heat(1.0))(POINTS[0])
    with pytest.raises(InputError, match="result of ij.kernel_fn"):
        pinn.residual_kernel(np.eye(2), heat(1.0))


def test_balance_of_an_nnx_model_makes_the_rates_equal():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(1, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.sin(self.first(x)))

    x = np.linspace(-1.0, 1.0, 5)[:, None]
    kernel = ij.kernel_fn(lambda rngs: Net(rngs), x, parameterization="ntk")
    laplace = lambda u: lambda x: jax.hessian(u)(x)[0, 0]  # noqa: E731
    found = pinn.balance(kernel, laplace, x[1:-1], x[[0, -1]])
    assert found.kernel.shape == (5, 5)
    np.testing.assert_allclose(found.kernel, found.kernel.T, atol=1e-12)
    np.testing.assert_allclose(found.weight * found.boundary_rate, found.residual_rate, rtol=1e-12)
    np.testing.assert_allclose(found.residual_rate, found.kernel[:3, :3].trace() / 3, rtol=1e-12)
    assert np.linalg.eigvalsh(found.kernel)[0] > -1e-12 * np.linalg.eigvalsh(found.kernel)[-1]


@pytest.mark.slow
def test_residual_kernels_match_wide_networks():
    # sin, two hidden layers of 256, heat operator: covariance over initializations, empirical residual NTK
    model, draws, low = network(jnp.sin, 3, width=256), 300, POINTS.astype(np.float32)
    found = residual(jnp.sin, 3, heat(0.5))
    eta = ij.kernel_fn(model, POINTS, parameterization="ntk").eta

    def both(key):
        params = model.init(key, low)

        def r(params, x):
            return heat(0.5)(lambda y: model.apply(params, y[None])[0, 0])(x)

        values, grads = jax.vmap(jax.value_and_grad(r), (None, 0))(params, low)
        total = 0.0
        for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            flat = leaf.reshape(2, -1)
            total = total + eta[name] * flat[0] @ flat.T
        return values[0] * values, total

    covariance, tangent = (
        np.asarray(a) for a in jax.lax.map(jax.jit(both), jax.random.split(jax.random.key(0), draws))
    )
    for sample, value, bias in ((covariance, found.nngp[0], 0.02), (tangent, found.ntk[0], 0.02)):
        error = sample.std(0) / draws**0.5
        # a finite width shifts kernels by a few / width, here at most 2 %
        assert (np.abs(sample.mean(0) - value) < 4 * error + bias * abs(value[0])).all(), (sample.mean(0), value)
