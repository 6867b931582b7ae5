"""Spectra from products alone: Lanczos and stochastic quadrature against spectra that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_spectrum import from_eigenvalues

import initjax as ij
from initjax.spectrum.lanczos import as_operator, lanczos, signs

# many small, few large, as the spectrum of a tangent kernel
VALUES = np.concatenate([np.geomspace(1e-3, 1.0, 196), [2.0, 5.0, 10.0, 200.0]])


class Products:
    """A matrix of which only products can be had."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.count = matrix, matrix.shape, matrix.dtype, 0

    def __matmul__(self, v):
        self.count += np.ndim(v) and np.shape(v)[1]
        with np.errstate(invalid="ignore"):
            return self.matrix @ np.asarray(v, self.dtype)


@pytest.fixture(scope="module")
def kernel():
    return from_eigenvalues(VALUES)


def test_lanczos_finds_both_ends_from_their_side(kernel):
    op = Products(kernel)
    ends = ij.extreme_eigenvalues(op, method="lanczos")
    assert ends.products == op.count <= 200 and ends.regime == "lanczos" and ends.resolved
    assert ends.largest <= 200 * (1 + 1e-14)
    # it stopped at a residual of 1e-6 of the value, and the eigenvalue's error is the square of that
    np.testing.assert_allclose(ends.largest, 200, rtol=1e-10)
    assert ends.smallest >= 1e-3 * (1 - 1e-9)
    # within its residual there is an eigenvalue
    assert np.abs(VALUES - ends.smallest).min() <= ends.smallest_error + 1e-12


def test_few_steps_bound_the_condition_number_from_below_and_say_so(kernel):
    for products in (10, 30, 80):
        answer = ij.condition_number(Products(kernel), method="lanczos", max_products=products)
        assert answer.lower_bound and 1 < float(answer) <= 2e5 * (1 + 1e-9)
        assert repr(answer).startswith("at least") and f"lanczos, {answer.products} products" in repr(answer)
    assert answer.value > 2 * float(ij.condition_number(Products(kernel), method="lanczos", max_products=10))


def test_small_operators_are_formed_and_exact(kernel):
    answer = ij.condition_number(Products(kernel))
    assert answer.regime == "dense" and not answer.lower_bound and repr(answer) == "200000 (dense)"
    np.testing.assert_allclose(float(answer), 2e5, rtol=200 * 2e5 * 2.3e-16 * 10)  # n eps kappa
    assert isinstance(ij.condition_number(kernel), float)


def test_an_exhausted_krylov_space_gives_eigenvalues():
    for values, steps in (([3.0] * 50, 1), ([1.0] * 25 + [4.0] * 25, 2)):
        answer = ij.condition_number(from_eigenvalues(values), method="lanczos")
        assert answer.products == steps and not answer.lower_bound
        np.testing.assert_allclose(float(answer), max(values) / min(values), rtol=1e-12)


def test_smallest_eigenvalue_below_rounding_is_reported_as_unresolved():
    singular = from_eigenvalues([0.0] * 5 + list(np.geomspace(0.1, 1.0, 60)))
    answer = ij.condition_number(Products(singular), method="lanczos")
    assert answer.value == np.inf and "smallest eigenvalue unresolved" in repr(answer)
    ends = ij.extreme_eigenvalues(Products(singular), method="lanczos")
    assert not ends.resolved and "below" in repr(ends)
    single = Products(from_eigenvalues(np.geomspace(1e-9, 1.0, 65)).astype(np.float32))
    assert ij.condition_number(single, method="lanczos").value == np.inf
    with pytest.warns(UserWarning, match="log-determinant -inf.*unresolved"):
        assert float(ij.log_determinant(singular)) == -np.inf


def test_residual_bounds_hold_at_every_step(kernel):
    for steps in (5, 20, 50):
        values, residuals, shares = lanczos(as_operator(kernel), signs(200, 1, None), steps, lambda found: False).ritz()
        distance = np.abs(values[:, None] - VALUES).min(1)
        assert np.all(distance <= residuals + 1e-12)
        np.testing.assert_allclose(shares.sum(), 1, rtol=1e-13)


def test_ritz_values_match_those_of_matfree(kernel):
    decomp = pytest.importorskip("matfree.decomp")
    start = signs(200, 1, jax.random.key(4))
    values, _, _ = lanczos(as_operator(kernel), start, 30, lambda found: False).ritz()
    other = decomp.tridiag_sym(30, reortho="full")(lambda v: jnp.asarray(kernel) @ v, jnp.asarray(start[:, 0])).J_small
    # both reorthogonalise: rounding only
    np.testing.assert_allclose(values, np.linalg.eigvalsh(other), rtol=0, atol=1e-10 * 200)


def test_quadrature_matches_the_known_spectrum_within_its_standard_error(kernel):
    density = ij.spectral_density(Products(kernel), jax.random.key(1), method="lanczos")
    assert density.nodes.shape == (10, 64) and density.products == 640
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-13)
    mean, error = density.mean_of(lambda nodes: nodes)
    assert 0 < abs(mean - VALUES.mean()) < 4 * error < 2 * VALUES.mean()
    for at in (1e-2, 0.3, 3.0, 300.0):
        share, error = density.cumulative(at)
        # four standard errors of ten probes, and the smoothing of one quadrature point among 64
        assert abs(share - np.mean(VALUES <= at)) < 4 * error + 1 / 64
    for estimate, exact in (
        (ij.log_determinant(Products(kernel), method="lanczos"), np.log(VALUES).sum()),
        (ij.log_determinant(Products(kernel), method="lanczos", jitter=0.1), np.log(VALUES + 0.1).sum()),
        (ij.effective_rank(kernel, method="lanczos"), float(ij.effective_rank(kernel))),
    ):
        assert abs(estimate.value - exact) < 4 * estimate.error < abs(exact)
        assert estimate.regime == "stochastic lanczos quadrature"


def test_dense_density_is_exact_and_the_same_key_gives_the_same_answer(kernel):
    density = ij.spectral_density(kernel)
    assert density.regime == "dense"
    np.testing.assert_allclose(density.cumulative([1.5, 6.0])[0], [196 / 200, 198 / 200], rtol=1e-12)
    at = np.geomspace(1e-5, 1e4, 4000)
    smooth, error = density.density(at, 0.1)
    # the bumps of all eigenvalues lie within the interval: a trapezoid of a smooth function
    np.testing.assert_allclose(np.trapezoid(smooth, np.log10(at)), 1, rtol=1e-6)
    assert error.max() == 0
    np.testing.assert_allclose(float(ij.log_determinant(kernel)), np.log(VALUES).sum(), rtol=1e-9)  # n eps kappa
    first, again, other = (
        ij.spectral_density(kernel, jax.random.key(k), method="lanczos", steps=8, probes=2).nodes for k in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_density_draws_itself(kernel):
    pytest.importorskip("matplotlib")
    ax = ij.spectral_density(kernel, method="lanczos", steps=16).plot()
    assert "eigenvalue" in ax.get_xlabel() and ax.get_lines()


@pytest.mark.parametrize(
    "settings", [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(weight_decay=0.3)]
)
def test_learning_rate_limits_of_optax_sgd(settings):
    # one direction is enough: the loss lambda x^2 / (2 n), with its gradient given to optax
    curvature, n = 3.0, 4
    limit = float(ij.max_learning_rate(np.diag([1.0, curvature]), n=n, **settings))
    decay = settings.get("weight_decay", 0.0)
    momentum = dict(momentum=settings.get("momentum"), nesterov=settings.get("nesterov", False))
    for factor, diverges in ((0.99, False), (1.01, True)):
        optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(factor * limit, **momentum))

        def step(carry, _, optimizer=optimizer):
            x, state = carry
            updates, state = optimizer.update(curvature * x / n, state, x)
            return (optax.apply_updates(x, updates), state), None

        start = jnp.ones((), jnp.float64)
        (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=3000)
        assert (abs(float(x)) > 1e3) == diverges and (abs(float(x)) < 1e-3) == (not diverges)


def test_operators_give_learning_rates_on_the_safe_side(kernel, monkeypatch):
    monkeypatch.setattr("initjax.spectrum.conditioning.DENSE", 10)
    rate = float(ij.max_learning_rate(Products(kernel), n=200))
    assert 2.0 * (1 - 2e-6) < rate <= 2.0  # 2 n / 200, within the residual


def test_ntk_operator_and_its_matrix_give_the_same_answers():
    x = jax.random.normal(jax.random.key(0), (6, 4), jnp.float64)
    params = {"w": jax.random.normal(jax.random.key(1), (4, 3), jnp.float64)}
    op = ij.ntk_operator(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    matrix = np.asarray(op.to_dense())
    assert op.matrix is None
    np.testing.assert_allclose(float(ij.condition_number(op)), ij.condition_number(matrix), rtol=1e-9)
    np.testing.assert_allclose(ij.max_learning_rate(op), ij.max_learning_rate(matrix), rtol=1e-12)
    lanczos_rank = ij.effective_rank(op, method="lanczos")
    assert abs(lanczos_rank.value - ij.effective_rank(matrix)) < 4 * lanczos_rank.error + 1e-9


@pytest.mark.parametrize("fn", [ij.condition_number, ij.effective_rank, ij.max_learning_rate, ij.extreme_eigenvalues,
                                ij.spectral_density, ij.log_determinant])  # fmt: skip
def test_bad_operators_get_four_part_errors(fn):
    for bad, message in (
        (Products(np.ones((2, 3))), r"Products and shape \(2, 3\)[\s\S]*square operator"),
        (Products(np.array([[1.0, 2.0], [2.0, 1.0]])), r"negative eigenvalue"),
        (Products(np.array([[1.0, np.inf], [np.inf, 1.0]])), r"NaN or infinite"),
        (object(), r"object[\s\S]*array"),
    ):
        with pytest.raises(ij.InputError, match=message) as error:
            fn(bad)
        assert all(error.value.parts)


def test_bad_products_found_on_the_way_get_four_part_errors():
    rng = np.random.default_rng(0)
    for matrix, message in (
        (rng.normal(size=(30, 30)), r"not symmetric[\s\S]*x2"),
        (np.diag(np.linspace(-1, 1, 30)), r"negative eigenvalue"),
        (np.full((30, 30), np.nan), r"NaN or infinite[\s\S]*overflows"),
    ):
        with pytest.raises(ij.InputError, match=message):
            ij.extreme_eigenvalues(Products(matrix), method="lanczos")
    with pytest.raises(ij.InputError, match=r"traced entries[\s\S]*outside jit"):
        jax.jit(lambda op: ij.extreme_eigenvalues(op).largest)(
            ij.ntk_operator(lambda p, x: x @ p, jnp.ones((2, 1)), jnp.ones((3, 2)))
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ij.spectral_density(np.eye(3), probes=1), r"probes=1[\s\S]*>= 2"),
        (lambda: ij.spectral_density(np.eye(3), steps=0), r"steps=0[\s\S]*>= 2"),
        (lambda: ij.spectral_density(np.ones((2, 3, 3))), r"batch of kernels[\s\S]*loop"),
        (lambda: ij.log_determinant(np.eye(3), jitter=-1), r"jitter=-1[\s\S]*>= 0"),
        (lambda: ij.effective_rank(np.eye(3), method="sketch"), r"method='sketch'[\s\S]*random projections"),
        (lambda: ij.max_learning_rate(np.eye(3), momentum=1.0), r"momentum=1.0[\s\S]*\[0, 1\)"),
        (lambda: ij.max_learning_rate(np.eye(3), nesterov=True), r"nesterov=True without momentum"),
        (lambda: ij.max_learning_rate(np.eye(3), weight_decay=-1), r"weight_decay=-1[\s\S]*>= 0"),
        (lambda: jax.jit(ij.spectral_density)(np.eye(3)), r"a traced kernel[\s\S]*outside jit"),
    ],
)
def test_bad_options_get_four_part_errors(call, message):
    with pytest.raises(ij.InputError, match=message) as error:
        call()
    assert all(error.value.parts)
