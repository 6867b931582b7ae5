"""Initializers: sigma_w against known values, the law of the entries within standard errors, and the Flax protocol."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.initializers import FanIn, critical, critical_bias, variance_preserving
from initjax.initializers.protocol import TRUNCATED_STD

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
DISTRIBUTIONS = ["normal", "truncated_normal", "uniform"]
# fourth moment over squared variance; truncated at 2: (3 - 2 phi(2) (2^3 + 3 * 2) / P) / TRUNCATED_STD^4
PHI2, P2 = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
KURTOSIS = {"normal": 3.0, "uniform": 1.8, "truncated_normal": (3 - 2 * PHI2 * 14 / P2) / TRUNCATED_STD**4}


def assert_law(entries, std, kurtosis=3.0):
    """Mean 0 and variance std^2 within 4.5 standard errors, the fourth moment within 5."""
    x = np.asarray(entries, np.float64).ravel() / std
    assert abs(x.mean()) < 4.5 / math.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 4.5 * math.sqrt((kurtosis - 1) / x.size)
    assert abs((x**4).mean() - kurtosis) < 5 * (x**4).std() / math.sqrt(x.size)


def test_jax_initializers_are_passed_on_unchanged():
    for name in dir(jax.nn.initializers):
        if not name.startswith("_") and "orthogonal" not in name:  # ours take low precision and every shape
            assert getattr(ij.initializers, name) is getattr(jax.nn.initializers, name)
    assert ij.initializers.gain is ij.gain


@pytest.mark.parametrize(
    ("phi", "sigma_b", "expected"),
    [
        (jax.nn.relu, 0.0, math.sqrt(2)),  # He
        (jnp.tanh, 0.0, 1.0),
        (lambda x: x, 0.0, 1.0),
        (lambda x: jnp.where(x > 0, x, 0.2 * x), 0.0, math.sqrt(2 / 1.04)),
    ],
)
def test_critical_sigma_w_closed_forms(phi, sigma_b, expected):
    np.testing.assert_allclose(critical(phi, sigma_b).sigma_w, expected, rtol=1e-10)  # promised accuracy


def test_critical_is_the_mean_field_solution_and_holds_chi_one():
    init = critical(jnp.tanh, 0.05)
    assert init.sigma_w == float(ij.critical(jnp.tanh, 0.05).sigma_w)
    point = ij.fixed_point(jnp.tanh, init.sigma_w, 0.05)
    assert abs(point.chi_1 - 1) < 1e-8  # sigma_w to 1e-10, and chi moves with q about as fast
    assert init == critical(jnp.tanh, 0.05) and hash(init) == hash(critical(jnp.tanh, 0.05))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_entries_have_the_promised_law(distribution):
    init = FanIn(1.3, distribution)
    w = init(jax.random.key(0), (200, 300))
    assert w.dtype == DTYPE
    assert_law(w, 1.3 / math.sqrt(200), KURTOSIS[distribution])
    if distribution != "normal":
        limit = {"uniform": math.sqrt(3), "truncated_normal": 2 / TRUNCATED_STD}[distribution] * 1.3 / math.sqrt(200)
        assert jnp.abs(w).max() <= limit * (1 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "fan_in"),
    [
        ((30, 500), {}, 30),
        ((500, 30), {"in_axis": 1, "out_axis": 0}, 30),
        ((3, 3, 10, 200), {}, 90),  # convolution: window times channels
        ((12, 2, 5, 100), {"in_axis": 0, "out_axis": (-2, -1)}, 24),  # attention heads, with an axis in neither
        ((6, 30, 100), {"batch_axis": 0}, 30),  # stacked layers
        ((6, 4, 30, 25), {"batch_axis": (0, 1)}, 30),
    ],
)
def test_fan_in_counts_the_terms_of_one_unit(shape, axes, fan_in):
    assert_law(FanIn(2.0, **axes)(jax.random.key(1), shape), 2.0 / math.sqrt(fan_in))
    # jax's own initializer of the same variance, drawn from the same key
    ours = FanIn(2.0, **axes)(jax.random.key(1), shape)
    theirs = jax.nn.initializers.variance_scaling(4.0, "fan_in", "normal", **axes)(jax.random.key(1), shape, DTYPE)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # one rounding of the standard deviation, in either precision


def test_initializer_under_transformations_keys_and_empty_shapes():
    init = critical(jax.nn.relu)
    keys = jax.random.split(jax.random.key(2), 3)
    stacked = jax.jit(jax.vmap(lambda key: init(key, (4, 5))))(keys)
    np.testing.assert_allclose(stacked[1], init(keys[1], (4, 5)), rtol=1e-6)
    shape = jax.eval_shape(lambda key: init(key, (4, 5), jnp.bfloat16), keys[0])
    assert (shape.shape, shape.dtype) == ((4, 5), jnp.bfloat16)
    legacy = jax.random.PRNGKey(2)
    np.testing.assert_array_equal(init(legacy, (4, 5)), init(jax.random.wrap_key_data(legacy), (4, 5)))
    for empty in ((0, 5), (4, 0), (0, 0)):
        assert init(keys[0], empty).shape == empty
    assert init(keys[0], [4, 5]).shape == (4, 5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_drawn_in_float32_and_rounded(dtype):
    init = FanIn(1.0)
    w = init(jax.random.key(3), (100, 400), dtype)
    assert w.dtype == dtype
    np.testing.assert_array_equal(w, init(jax.random.key(3), (100, 400), jnp.float32).astype(dtype))
    assert_law(w, 0.1)
    assert FanIn(1.0, dtype=dtype)(jax.random.key(3), (4, 4)).dtype == dtype


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        weights, biases = critical(jnp.tanh, 0.3), critical_bias(jnp.tanh, 0.3)
        for _ in range(3):
            x = jnp.tanh(nn.Dense(100, kernel_init=weights, bias_init=biases, param_dtype=DTYPE)(x))
        return nn.Conv(16, (3,), kernel_init=weights, param_dtype=DTYPE)(x[..., None])


def test_initializers_in_linen_inside_jit():
    params = jax.jit(Deep().init)(jax.random.key(4), jnp.ones((1, 80), DTYPE))["params"]
    sigma_w = critical(jnp.tanh, 0.3).sigma_w
    assert_law(params["Dense_0"]["kernel"], sigma_w / math.sqrt(80))
    assert_law(params["Dense_1"]["kernel"], sigma_w / math.sqrt(100))
    assert_law(np.concatenate([params[f"Dense_{i}"]["bias"] for i in range(3)]), 0.3)
    assert params["Conv_0"]["kernel"].shape == (3, 1, 16)


def test_initializers_in_nnx():
    layer = nnx.Linear(
        100, 90, kernel_init=critical(jax.nn.relu), bias_init=critical_bias(jax.nn.relu, 0.0), rngs=nnx.Rngs(0)
    )
    assert_law(layer.kernel[...], math.sqrt(2 / 100))
    assert not np.any(layer.bias[...])


def test_variance_preserving_keeps_what_it_says():
    for phi in (jnp.tanh, jax.nn.gelu, jnp.sin):
        forward = variance_preserving(phi, q=0.7).sigma_w
        # both sides are the same expectation to rounding
        np.testing.assert_allclose(forward**2 * ij.gaussian.moment(phi, 0.7), 0.7, rtol=1e-12)
        chi = variance_preserving(phi, "chi", q=0.7).sigma_w
        np.testing.assert_allclose(chi**2 * ij.gaussian.moment_prime(phi, 0.7), 1.0, rtol=1e-12)


def test_critical_init_keeps_gradients_of_a_deep_network_where_lecun_loses_them():
    def network(kernel_init):
        layers = []
        for _ in range(12):
            layers += [nn.Dense(64, kernel_init=kernel_init, use_bias=False, param_dtype=DTYPE), jax.nn.relu]
        return nn.Sequential(layers[:-1])

    x = jax.random.normal(jax.random.key(5), (2, 64), DTYPE)
    log_ratio = {}
    for name, init in (("critical", critical(jax.nn.relu)), ("lecun", nn.initializers.lecun_normal())):
        samples = ij.measure(network(init), x, key=jax.random.key(6), seeds=24).gradient_samples
        log_ratio[name] = np.log(samples[:, 0] / samples[:, -1]).mean()
    # a factor 2 in variance in each of 11 layers; both share the O(depth / width) drift of the logarithm and its spread
    # of about sqrt(5 * 11 / 64 / 24) = 0.2 each
    assert abs(log_ratio["critical"] - log_ratio["lecun"] - 11 * math.log(2)) < 5 * 0.2 * math.sqrt(2)


@pytest.mark.x64_off
def test_sigma_w_is_solved_in_float64_also_inside_jit_with_x64_off():
    seen = []

    @jax.jit
    def draw(key):
        init = critical(jnp.tanh, 0.05)
        seen.append(init.sigma_w)
        return init(key, (3, 4))

    assert draw(jax.random.key(0)).dtype == jnp.float32
    assert seen[0] == float(ij.critical(jnp.tanh, 0.05).sigma_w)
    assert abs(ij.fixed_point(jnp.tanh, seen[0], 0.05).chi_1 - 1) < 1e-8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: critical(jnp.tanh, -0.1), r"sigma_b=-0\.1[\s\S]*>= 0"),
        (lambda: critical(jnp.tanh, jnp.nan), r"sigma_b=nan"),
        (lambda: critical(jnp.tanh, np.array([0.1, 0.2])), r"sigma_b=[\s\S]*one concrete finite number"),
        (lambda: jax.jit(lambda b: critical(jnp.tanh, b))(0.1), r"sigma_b[\s\S]*fixed when the initializer is built"),
        (lambda: critical_bias(jnp.tanh, math.inf), r"sigma_b=inf"),
        (lambda: variance_preserving(jnp.tanh, q=-1.0), r"q=-1\.0"),
        (lambda: FanIn(-1.0), r"sigma_w=-1\.0"),
        (lambda: FanIn(1.0, "cauchy"), r"distribution='cauchy'[\s\S]*'truncated_normal'"),
        (lambda: FanIn(1.0)(jax.random.key(0), (5,)), r"shape \(5,\)[\s\S]*for biases use critical_bias"),
        (lambda: FanIn(1.0)(jax.random.key(0), ()), r"shape \(\)"),
        (lambda: FanIn(1.0, in_axis=-1)(jax.random.key(0), (5, 4)), r"in_axis=-1[\s\S]*different axes"),
        (lambda: FanIn(1.0)(jax.random.key(0), (5, 4), jnp.int32), r"int32[\s\S]*floating-point"),
        (lambda: FanIn(1.0)(0, (5, 4)), r"key=0[\s\S]*jax\.random\.key\(0\)"),
    ],
)
def test_bad_input_gets_four_part_errors(call, message):
    with pytest.raises(ij.InputError, match=message) as error:
        call()
    assert all([error.value.given, error.value.accepted, error.value.why, error.value.remedy])


def test_no_critical_point_is_told_when_built():
    with pytest.raises(ij.NoCriticalPointError):
        critical(jax.nn.relu, 0.3)
    with pytest.raises(ij.NoCriticalPointError):
        critical_bias(jax.nn.relu, 0.3)
