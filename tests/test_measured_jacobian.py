"""Measured Jacobian spectra against dense decompositions, matrices with known singular values, and the limit's law."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import initjax as ij
from initjax.empirical.cuts import piece_map, pieces
from initjax.empirical.program import trace
from initjax.spectrum.bidiagonal import bidiagonalise
from initjax.trace.flax import as_functional

KEY = jax.random.key(0)


def batch(n=3, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


class Plain(nn.Module):
    width: int = 16
    depth: int = 4
    kernel: object = nn.initializers.variance_scaling(2.25, "fan_in", "normal")

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = jnp.tanh(nn.Dense(self.width, kernel_init=self.kernel)(x))
        return nn.Dense(5, kernel_init=self.kernel)(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for _ in range(2):
            x = x + nn.Dense(8)(nn.relu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.tanh(x))


# singular values, known by construction: full rank, rank-deficient, wide, tall
MATRICES = {
    "square": (12, 12, np.geomspace(1e-5, 3, 12)),
    "rank": (10, 10, np.array([0.5, 1.0, 2.0])),
    "wide": (6, 15, np.linspace(1, 2, 6)),
    "tall": (15, 6, np.linspace(1, 2, 6)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_golub_kahan_finds_the_singular_values_a_matrix_was_built_from(name):
    m, n, values = MATRICES[name]
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(k, k)))[0][:, : len(values)] for k in (m, n))
    a = left * values @ right.T
    start = rng.normal(size=(2, m))
    found = bidiagonalise(lambda v: v @ a.T, lambda u: u @ a, start, m, 2.0**-52)
    for probe in range(2):
        nodes, bounds, shares = found.ritz(probe)
        # a random start meets every eigenvector; what is left is the null space, one value
        expected = np.concatenate([np.zeros(int(len(nodes) > len(values))), values**2])
        np.testing.assert_allclose(nodes, expected, rtol=1e-9, atol=1e-14)  # 1e-5 of 3, squared: eps |J| on s
        u = start[probe] / np.linalg.norm(start[probe])
        np.testing.assert_allclose(shares[-len(values) :], (left.T @ u) ** 2, rtol=1e-6)
        assert np.all(bounds < 1e-9)


def test_quadrature_moments_are_those_of_the_probe():
    rng = np.random.default_rng(2)
    a, u = rng.normal(size=(40, 40)), rng.choice([-1.0, 1.0], (1, 40))
    nodes, bounds, shares = bidiagonalise(lambda v: v @ a.T, lambda u: u @ a, u, 4, 2.0**-52).ritz(0)
    gram, v = a @ a.T, u[0] / np.linalg.norm(u)
    for k in range(8):  # Gauss: exact to degree 2 * 4 - 1
        np.testing.assert_allclose(shares @ nodes**k, v @ np.linalg.matrix_power(gram, k) @ v, rtol=1e-9)
    exact = np.linalg.eigvalsh(gram)
    for node, bound in zip(nodes, bounds, strict=True):
        assert np.abs(exact - node).min() <= bound * (1 + 1e-9)


def test_both_methods_agree_with_the_dense_jacobian_of_the_module():
    model, x = Plain(), batch()
    found = ij.measured_jacobian(model, x, key=KEY, seeds=3)
    free = ij.measured_jacobian(model, x, key=KEY, seeds=3, blocks=False, steps=6, method="golub-kahan", probes=64)
    assert found.whole.exact and not free.whole.exact
    apply = as_functional(model, x).apply
    for r, (ours, theirs) in enumerate(zip(found.whole.samples, free.whole.samples, strict=True)):
        params = model.init(jax.random.split(jax.random.fold_in(KEY, r))[0], x)["params"]
        j = np.asarray(jax.jacobian(lambda x: apply(params, x[None])[0])(x[r]), np.float64)  # noqa: B023
        values = np.linalg.svd(j, compute_uv=False)[::-1] ** 2
        np.testing.assert_allclose(ours.nodes[0], values, rtol=1e-4, atol=1e-6)  # float32 products
        np.testing.assert_allclose([ours.edge, theirs.edge], values[-1], rtol=1e-5)
        np.testing.assert_allclose(ours.moments()[0], values.mean(), rtol=1e-5)
        # all 5 left directions are resolved: only Hutchinson's noise is left, zero mean, 64 probes
        probes = (theirs.weights * theirs.nodes).sum(1)
        assert abs(theirs.moments()[0] - values.mean()) < 5 * probes.std() / 8
    np.testing.assert_allclose(found.whole.mean, np.mean([s.moments()[0] for s in found.whole.samples]))


@pytest.mark.parametrize("model", [Plain(), Residual()], ids=["plain", "residual"])
@pytest.mark.slow
def test_blocks_are_cut_where_all_of_the_signal_passes(model):
    x = batch(1)
    functional = as_functional(model, x)
    program = trace(functional.apply, functional.abstract_params, x)
    chain = pieces(program)
    if isinstance(model, Residual):  # two layers in each branch, the outer one made first
        assert [p.name for p in chain] == ["Dense_0", "Dense_2 .. Dense_1", "Dense_4 .. Dense_3", "Dense_5"]
    else:
        assert [p.name for p in chain] == [f"Dense_{i}" for i in range(5)]
    params = functional.init(KEY)
    value, product = jnp.asarray(x), np.eye(x.size)
    for piece in chain:
        run = piece_map(program, [piece.start], [piece.stop])
        step = lambda v: run(jax.tree.leaves(params), [x], [v])[0]  # noqa: B023, E731
        j = jax.jacobian(step)(value)
        value = step(value)
        product = np.asarray(j).reshape(value.size, -1) @ product
    whole = np.asarray(jax.jacobian(functional.apply, 1)(params, x)).reshape(value.size, -1)
    np.testing.assert_allclose(product, whole, rtol=1e-4, atol=1e-5)


def test_first_moments_of_blocks_and_law_of_the_whole_meet_the_limit():
    """tanh at its fixed point: the input already has the variance that the layers keep."""
    w, n, depth = 1.5, 128, 3
    q = float(ij.fixed_point(jnp.tanh, w).q)
    model = nn.Sequential(
        [f for _ in range(depth + 1) for f in (nn.Dense(n, kernel_init=nn.initializers.orthogonal(w)), jnp.tanh)][:-1]
    )
    x = np.sqrt(q) / w * batch(4, n, 3)
    found = ij.measured_jacobian(model, x, key=KEY, seeds=4, start="layers_0", stop=f"layers_{2 * depth}")
    theory = ij.jacobian_spectrum(jnp.tanh, w, 0.0, depth, "orthogonal")
    # 4 networks: t with 3 degrees of freedom, 6 errors; the limit itself is off by depth / n = 2 %
    assert abs(found.whole.mean - theory.mean) < 6 * found.whole.mean_error + 0.03 * theory.mean
    assert abs(found.whole.variance - theory.variance) < 6 * found.whole.variance_error + 0.06 * theory.variance
    assert abs(found.whole.edge / theory.edge - 1) < 0.15  # fluctuates as n^(-2/3) = 4 %, and with the mean
    chi = float(theory.mean ** (1 / depth))
    for block in found.blocks[1:]:
        assert abs(block.mean - chi) < 6 * block.mean_error + 0.02 * chi
    edges = np.quantile(np.concatenate([s.nodes[0] for s in found.whole.samples]), [0, 0.25, 0.5, 0.75, 1])
    cdf = np.interp(edges, theory.eigenvalue[::-1], np.cumsum(theory.mass[::-1]))
    share, error = found.whole.histogram(edges)
    assert np.all(np.abs(share - np.diff(cdf)) < 6 * error + 0.03)  # as for the mean
    axes = found.plot(theory)
    assert len(axes.lines) >= 2 and axes.get_xscale() == "log"
    with pytest.raises(ij.InputError, match="one spectrum"):
        found.plot(ij.jacobian_spectrum(jnp.tanh, w, 0.0, [2, 3]))


def test_tokens_start_behind_their_table_and_custom_gradients_are_followed():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 4)(tokens)
            return double(nn.Dense(3, kernel_init=nn.initializers.orthogonal())(x))

    tokens = np.arange(6).reshape(2, 3)
    found = ij.measured_jacobian(Tokens(), tokens, key=KEY, seeds=2, method="golub-kahan")
    # 2 Q for each of 3 tokens: all squared singular values are 4
    np.testing.assert_allclose([found.whole.mean, found.whole.edge], 4, rtol=1e-5)
    np.testing.assert_allclose(found.whole.variance, 0, atol=1e-4)
    found.plot()


def test_a_finished_nnx_module_is_one_network_over_inputs():
    model = nnx.Sequential(nnx.Linear(6, 9, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(9, 4, rngs=nnx.Rngs(1)))
    found = ij.measured_jacobian(model, batch(2), key=KEY)
    assert len(found.whole.samples) == 2 and [b.name for b in found.blocks] == ["layers/0", "layers/2"]
    j = jax.jacobian(lambda x: model(x[None])[0])(jnp.asarray(batch(2)[1]))
    np.testing.assert_allclose(found.whole.samples[1].moments()[0], np.sum(np.asarray(j) ** 2) / 4, rtol=1e-5)


class Coupled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


@pytest.mark.parametrize(
    "model, options, text",
    [
        (Plain(), dict(start="Dense_9"), "one of Dense_0"),
        (Plain(), dict(start="Dense_2", stop="Dense_1"), "a stop behind the start"),
        (Plain(), dict(method="lanczos"), "golub-kahan"),
        (Plain(), dict(probes=1), "probes = 1"),
        (Plain(), dict(seeds=0), "seeds = 0"),
        (Plain(kernel=nn.initializers.constant(jnp.inf)), {}, "NaN or infinite"),
        (Plain(kernel=nn.initializers.constant(jnp.inf)), dict(method="golub-kahan"), "NaN or infinite"),
        (Coupled(), {}, "changes with another example"),
    ],
)
def test_what_is_refused(model, options, text):
    with pytest.raises(ij.InputError, match=text):
        ij.measured_jacobian(model, batch(), key=KEY, **{"seeds": 1, "blocks": False, **options})


def test_dead_networks_have_no_histogram():
    dead = nn.Dense(3, kernel_init=nn.initializers.zeros)
    found = ij.measured_jacobian(dead, batch(), key=KEY, seeds=2)
    assert found.whole.mean == found.whole.edge == 0
    with pytest.raises(ij.InputError, match="singular values all vanish"):
        found.plot()
