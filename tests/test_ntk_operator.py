"""NTK-vector products, trace and diagonal without the matrix, against the Gram matrix of a dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.empirical.operator import UNROLLED

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
X = jax.random.normal(jax.random.key(0), (7, 5, 5, 2), DTYPE)
V = np.random.default_rng(0).normal(size=(21, 2)).astype(DTYPE)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 3), param_dtype=DTYPE)(x))
        return nn.Dense(3, param_dtype=DTYPE)(x.mean(1)).sum(1)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(50, 5, param_dtype=DTYPE, rngs=rngs)
        self.last = nnx.Linear(5, 3, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x.reshape(x.shape[0], -1))))


@jax.custom_vjp
def backward_only(x):
    return jnp.sin(x)


backward_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


def linen():
    model = ConvNet()
    params = model.init(jax.random.key(1), X)["params"]
    return model, params, lambda p, x: model.apply({"params": p}, x)


def nnx_model():
    model = NnxMlp(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    return model, params, lambda p, x: nnx.merge(graph, p)(x)


def without_forward_derivative():
    params = {"w": jax.random.normal(jax.random.key(2), (50, 3), DTYPE)}
    apply = lambda p, x: backward_only(x.reshape(x.shape[0], 50) @ p["w"])  # noqa: E731
    return apply, params, apply


def case(build):
    model, params, apply = build()
    return model, params, gram(apply, params, X)


def gram(apply, params, x):
    """(n k, n k) from one dense Jacobian of the whole batch."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(lambda p: apply(p, x)))(params))
    rows = [np.asarray(leaf).reshape(x.shape[0] * 3, -1) for leaf in leaves]
    return sum(r @ r.T for r in rows)


def traced_out(full):
    return np.einsum("nomo->nm", full.reshape(7, 3, 7, 3)) / 3


def close(value, expected):
    # sums of a few hundred products in float64
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("build", [linen, nnx_model, without_forward_derivative])
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_products_trace_and_diagonal_match_the_dense_jacobian(build, outputs):
    model, params, full = case(build)
    kernel = full if outputs == "full" else traced_out(full)
    v = V[: len(kernel)]
    whole = ij.ntk_operator(model, params, X, outputs=outputs)
    small = whole._setting
    tight = 3 * small.params_bytes + 2 * (small.bytes_per_example + small.bytes_per_tangent)
    for memory in (None, tight):
        op = ij.ntk_operator(model, params, X, outputs=outputs, memory=memory)
        assert op.shape == kernel.shape and op.dtype == DTYPE
        assert (op._setting.blocks(1)[1] < 7) == (memory is not None)
        close(op @ v, kernel @ v)
        close(op(v[:, 0]), kernel @ v[:, 0])
        close(op.diagonal(), kernel.diagonal())
        close(op.trace(), np.trace(kernel))


def test_rectangular_operator_and_its_transpose():
    model, params, full = case(nnx_model)
    for outputs, kernel, rows in (("trace", traced_out(full), 4), ("full", full, 12)):
        for memory in (None, 15_000):
            op = ij.ntk_operator(model, params, X[:4], X, outputs=outputs, memory=memory)
            close(op @ V[: len(kernel)], kernel[:rows] @ V[: len(kernel)])
            close(op.rmatvec(V[:rows]), kernel[:, :rows] @ V[:rows])
            assert op.T.shape == op.shape[::-1]
    with pytest.raises(ij.InputError, match=r"diagonal\(\) of an NTK operator between two sets[\s\S]*x2 left out"):
        op.diagonal()


def test_params_filter_counts_the_chosen_leaves_only():
    model, params, _ = case(nnx_model)
    op = ij.ntk_operator(model, params, X, params_filter="last/*")
    expected = ij.empirical_ntk(model, params_filter="last/*")(params, X)
    close(op @ V[:7], expected @ V[:7])
    close(op.diagonal(), np.diagonal(expected))
    close(op.to_dense(), expected)


def test_operator_passes_through_jit_as_an_argument():
    model, params, full = case(nnx_model)
    setting = ij.ntk_operator(model, params, X)._setting
    product = jax.jit(lambda op, v: op @ v)
    tight = 3 * setting.params_bytes + setting.bytes_per_example + setting.bytes_per_tangent
    many = jnp.concatenate([X, X])
    for x, kernel in ((X, traced_out(full)), (many, np.tile(traced_out(full), (2, 2)))):
        op = ij.ntk_operator(model, params, x, memory=tight)
        v = np.ones(len(x), DTYPE)
        close(product(op, v), kernel @ v)
    # the second has so many blocks that the compiled program loops over them
    assert -(-14 // op._setting.blocks(1)[1]) > UNROLLED
    moved = jax.tree.map(lambda leaf: leaf, op)
    assert repr(moved) == repr(op) == "NTKOperator(14x14, float64, matrix-free)"


def test_solvers_of_jax_and_scipy_and_matfree_take_the_operator():
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    model, params, full = case(nnx_model)
    op = ij.ntk_operator(model, params, X, outputs="full")
    values = np.linalg.eigvalsh(full)
    ridge = 0.1 * values[-1]
    shifted = lambda v: op(v) + ridge * v  # noqa: E731
    b = V[:, 0]
    expected = np.linalg.solve(full + ridge * np.eye(21), b)
    # conjugate gradients at a condition number of 11: 60 steps reach rounding
    np.testing.assert_allclose(jax.scipy.sparse.linalg.cg(shifted, b, tol=1e-13, maxiter=60)[0], expected, rtol=1e-9)
    linear = scipy_linalg.aslinearoperator(op)
    assert linear.shape == (21, 21) and linear.dtype == np.float64
    np.testing.assert_allclose(scipy_linalg.eigsh(linear, k=2, v0=b)[0], values[-2:], rtol=1e-10)
    decomp = pytest.importorskip("matfree.decomp")
    tridiagonal = decomp.tridiag_sym(6, reortho="full")(op, jnp.asarray(b)).J_small
    # Lanczos values lie within the spectrum; the largest is near in six steps
    assert values[-1] * 0.95 < np.linalg.eigvalsh(tridiagonal)[-1] < values[-1] * (1 + 1e-12)


def test_auto_forms_the_matrix_when_many_products_are_wanted_and_it_fits():
    model, params, full = case(linen)
    assert ij.ntk_operator(model, params, X, products=8).matrix is None
    op = ij.ntk_operator(model, params, X, products=9)
    close(op.matrix, traced_out(full))
    close(op @ V[:7], traced_out(full) @ V[:7])
    close(ij.ntk_operator(model, params, X, method="matrix", outputs="full").matrix, full)
    assert ij.ntk_operator(model, params, X, products=9, method="matrix-free").matrix is None
    large = np.ones((200, 1)), dict(memory=2**17, products=99)  # a matrix of 8 * 200^2 > 2^17 bytes
    assert ij.ntk_operator(lambda p, x: x @ p, jnp.ones((1, 1), DTYPE), large[0], **large[1]).matrix is None


@pytest.mark.x64_off
def test_float32_products_are_accurate_to_single_precision():
    model, params, full = case(linen)
    op = ij.ntk_operator(model, params, X)
    assert op.dtype == jnp.float32
    kernel = traced_out(full)
    # float32 rounding of some hundred terms
    np.testing.assert_allclose(op @ V[:7], kernel @ V[:7], rtol=0, atol=2e-6 * np.abs(kernel).sum(1).max())


def test_low_precision_networks_are_summed_in_float32():
    params = {"w": jnp.ones((4, 2), jnp.bfloat16)}
    x = jax.random.normal(jax.random.key(3), (6, 4), jnp.bfloat16)
    op = ij.ntk_operator(lambda p, x: x @ p["w"], params, x, memory=2000)
    expected = np.asarray(x, np.float64) @ np.asarray(x, np.float64).T @ np.ones(6)
    assert op.dtype == jnp.float32
    np.testing.assert_allclose(op @ np.ones(6), expected, rtol=0.02, atol=0.02 * np.abs(expected).max())  # bf16: 2^-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(outputs="diagonal"), r"outputs='diagonal'[\s\S]*'trace' or 'full'"),
        (dict(method="sketch"), r"method='sketch'[\s\S]*'matrix-free'"),
        (dict(products=0), r"products=0[\s\S]*positive number"),
        (dict(memory=-1), r"memory=-1[\s\S]*positive number"),
        (dict(memory=100), r"memory=100 bytes[\s\S]*at least [\d,]+ bytes"),
        (dict(x1=X[:0]), r"no examples[\s\S]*at least one"),
        (dict(x1=X.at[0, 0, 0, 0].set(jnp.nan)), r"NaN or inf"),
        (dict(params_filter="nothing"), r"params_filter='nothing'[\s\S]*at least one"),
    ],
)
def test_bad_requests_get_four_part_errors(change, message):
    model, params, _ = linen()
    given = dict(x1=X) | change
    with pytest.raises(ij.InputError, match=message) as error:
        ij.ntk_operator(model, params, given.pop("x1"), **given)
    assert all(error.value.parts)


def test_the_smallest_budget_named_in_the_error_works():
    model, params, full = case(linen)
    with pytest.raises(ij.InputError) as error:
        ij.ntk_operator(model, params, X, memory=100)
    smallest = int(error.value.accepted.split()[2].replace(",", ""))
    close(ij.ntk_operator(model, params, X, memory=smallest) @ V[:7], traced_out(full) @ V[:7])


def test_bad_vectors_and_overflowing_networks_get_four_part_errors():
    model, params, _ = linen()
    op = ij.ntk_operator(model, params, X, outputs="full")
    for v in (np.ones(7), np.ones((21, 1, 1)), np.ones(21) + 0j):
        with pytest.raises(ij.InputError, match=r"NTK product with an array of shape[\s\S]*n k \+ o"):
            op @ v
    overflowing = ij.ntk_operator(lambda p, x: jnp.exp(x @ p), 1e4 * jnp.ones((1, 1), DTYPE), jnp.ones((2, 1), DTYPE))
    with pytest.raises(ij.InputError, match=r"2 entries that are NaN or infinite[\s\S]*ij.inspect"):
        overflowing @ np.ones(2)
