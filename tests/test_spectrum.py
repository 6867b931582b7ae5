"""Conditioning of kernels: matrices built from their eigenvalues, the equal-correlation closed form, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import initjax as ij

EPS = float(np.finfo(np.float64).eps)


def from_eigenvalues(values, seed=0):
    """A symmetric matrix with exactly these eigenvalues, up to rounding of n eps times the largest."""
    values = np.asarray(values, dtype=np.float64)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(values.size, values.size)))
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def equal_correlations(n, diagonal, off):
    return np.full((n, n), off) + (diagonal - off) * np.eye(n)


@pytest.mark.parametrize("kappa", [1.0, 12.5, 1e6, 1e10])
def test_condition_number_of_matrix_built_from_eigenvalues(kappa):
    matrix = from_eigenvalues(np.geomspace(3.0, 3.0 * kappa, 12))
    # the smallest eigenvalue is known to n eps lambda_max, hence kappa to n eps kappa; 10 covers the constant
    np.testing.assert_allclose(ij.condition_number(matrix), kappa, rtol=10 * 12 * EPS * kappa)


@pytest.mark.parametrize("n", [2, 10])
def test_condition_number_equal_correlations_closed_form(n):
    diagonal, off = 1.7, 0.9  # eigenvalues: d + (n - 1) o once, d - o otherwise (Xiao et al. 2020)
    expected = (diagonal + (n - 1) * off) / (diagonal - off)
    # well conditioned: a few roundings
    np.testing.assert_allclose(ij.condition_number(equal_correlations(n, diagonal, off)), expected, rtol=1e-13)


def test_ordered_phase_kernels_are_large_or_inf_never_negative():
    answers = [float(ij.condition_number(equal_correlations(10, 1.0, 1.0 - chi))) for chi in 0.3 ** np.arange(1, 40)]
    assert all(a > 1 for a in answers)
    assert np.all(np.diff([a for a in answers if np.isfinite(a)]) > 0)
    assert answers[-1] == np.inf
    # the plain ratio of numpy's eigenvalues is negative for some singular kernels, so the test can fail
    naive = []
    for seed in range(8):
        values = np.linalg.eigvalsh(from_eigenvalues([0.0] * 9 + [1.0], seed))
        naive.append(values[-1] / values[0])
        assert ij.condition_number(from_eigenvalues([0.0] * 9 + [1.0], seed)) == np.inf
    assert min(naive) < 0


def test_condition_number_of_float32_kernel_warns_where_float64_resolves():
    matrix = from_eigenvalues(np.geomspace(1e-9, 1.0, 6))
    # eps n kappa = 1e9 * 6 * 2e-16
    np.testing.assert_allclose(ij.condition_number(matrix), 1e9, rtol=1e-5)
    with pytest.warns(UserWarning, match="float32 kernel.*float64"):
        assert ij.condition_number(matrix.astype(np.float32)) == np.inf


def test_effective_rank_of_r_equal_eigenvalues_is_r():
    for r in (1, 3, 8):
        matrix = from_eigenvalues([0.0] * (8 - r) + [2.5] * r)
        # entropy of rounding-sized eigenvalues: n eps log(1/eps) = 6e-14, 10 covers the constant
        np.testing.assert_allclose(ij.effective_rank(matrix), r, rtol=1e-12)


def test_effective_rank_matches_entropy_of_known_eigenvalues():
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(ij.effective_rank(from_eigenvalues(7 * p)), 2**1.5, rtol=1e-12)  # entropy 1.5 bits
    assert ij.effective_rank(np.zeros((3, 3))) == 0


def test_max_learning_rate_is_the_stability_limit_of_gradient_descent():
    matrix = from_eigenvalues([0.5, 1.0, 4.0])
    limit = float(ij.max_learning_rate(matrix))
    np.testing.assert_allclose(limit, 0.5, rtol=1e-14)
    np.testing.assert_allclose(ij.max_learning_rate(matrix, n=3), 3 * limit, rtol=1e-15)
    for factor, diverges in ((0.99, False), (1.01, True)):
        residual = np.ones(3)
        for _ in range(2000):
            residual = residual - factor * limit * matrix @ residual
        assert (np.linalg.norm(residual) > 1) == diverges
    assert ij.max_learning_rate(np.zeros((2, 2))) == np.inf


def test_batches_of_kernels_answer_in_batches():
    stack = np.stack([from_eigenvalues([1.0, 2.0, 3.0]), from_eigenvalues([0.0, 0.0, 1.0])])[None]
    assert ij.condition_number(stack).shape == (1, 2)
    np.testing.assert_allclose(ij.condition_number(stack), [[3.0, np.inf]], rtol=1e-13)
    np.testing.assert_allclose(ij.effective_rank(stack)[0, 1], 1.0, rtol=1e-12)
    assert ij.max_learning_rate(stack).shape == (1, 2)


def test_traced_kernels_give_the_same_numbers():
    stack = jnp.asarray(np.stack([from_eigenvalues([1.0, 2.0, 4.0]), from_eigenvalues([0.0, 0.0, 1.0])]))
    for fn in (ij.condition_number, ij.effective_rank, ij.max_learning_rate, lambda k: ij.max_learning_rate(k, n=3)):
        np.testing.assert_allclose(jax.jit(fn)(stack), fn(stack), rtol=1e-12)  # two LAPACK calls of the same matrix
    assert np.isnan(jax.jit(ij.condition_number)(stack * jnp.nan)).all()


@pytest.mark.x64_off
def test_float64_kernel_keeps_its_precision_without_x64():
    answer = ij.condition_number(from_eigenvalues(np.geomspace(1e-9, 1.0, 6)))
    assert answer.dtype == np.float64
    np.testing.assert_allclose(answer, 1e9, rtol=1e-5)  # eps n kappa
    traced = jax.jit(ij.condition_number)(jnp.asarray(from_eigenvalues([1.0, 2.0, 4.0])))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, 4.0, rtol=1e-5)  # a few float32 roundings


@pytest.mark.parametrize("fn", [ij.condition_number, ij.effective_rank, ij.max_learning_rate])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((2, 3)), r"shape \(2, 3\)[\s\S]*square[\s\S]*x2=None"),
        (np.ones(4), r"shape \(4,\)[\s\S]*square"),
        (np.zeros((0, 0)), r"shape \(0, 0\)[\s\S]*n >= 1"),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), r"not symmetric[\s\S]*0\.1[\s\S]*symmetrise"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), r"2 entries that are NaN[\s\S]*finite"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), r"negative eigenvalue, -1[\s\S]*positive semi-definite"),
        (-np.eye(2), r"negative eigenvalue"),
        (np.eye(2) + 0j, r"complex128[\s\S]*real"),
        (None, r"NoneType[\s\S]*array"),
    ],
)
def test_bad_kernels_get_four_part_errors(fn, kernel, message):
    with pytest.raises(ij.InputError, match=message) as error:
        fn(kernel)
    assert all([error.value.given, error.value.accepted, error.value.why, error.value.remedy])


def test_bad_options_get_four_part_errors():
    with pytest.raises(ij.InputError, match=r"method='sketch'[\s\S]*dense"):
        ij.condition_number(np.eye(2), method="sketch")
    for n in (0, -3, np.nan, "all"):
        with pytest.raises(ij.InputError, match=r"n=[\s\S]*positive number of examples"):
            ij.max_learning_rate(np.eye(2), n=n)
