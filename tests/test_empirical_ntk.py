"""The empirical NTK against the full Jacobian's Gram matrix, in every tiling, and on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij
import initjax.empirical.ntk as ntk_module
from initjax.empirical.blocks import LIVE_COPIES, tiles
from initjax.empirical.program import trace
from initjax.empirical.taps import find_taps

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
X = jax.random.normal(jax.random.key(0), (5, 6), DTYPE)
IMAGES = jax.random.normal(jax.random.key(1), (3, 5, 5, 2), DTYPE)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (7, 4):
            x = jnp.tanh(nn.Dense(width, param_dtype=DTYPE)(x))
        return nn.Dense(3, param_dtype=DTYPE)(x)


class TiedNorm(nn.Module):
    """One dense layer used twice, a norm with a scale, a free parameter under a nonlinear function."""

    @nn.compact
    def __call__(self, x):
        tied = nn.Dense(6, param_dtype=DTYPE)
        x = x + jax.nn.gelu(tied(x))
        scale = self.param("scale", nn.initializers.ones, (6,), DTYPE)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True)) * scale[None]
        log_scale = self.param("log_scale", nn.initializers.zeros, (6,), DTYPE)
        return nn.Dense(2, param_dtype=DTYPE)(tied(x) * jnp.exp(log_scale)[None])


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(nn.Conv(4, (3, 3), strides=2, param_dtype=DTYPE)(x))
        return nn.Dense(2, param_dtype=DTYPE)(x.mean((1, 2)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 5, param_dtype=DTYPE, rngs=rngs)
        self.last = nnx.Linear(5, 2, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))


def gram(apply, params, x, keep=lambda name: True):
    """All pairs of outputs, (n, n, k, k), from one dense Jacobian of the whole batch."""
    jacobian = jax.jit(jax.jacrev(lambda p: apply(p, x)))(params)
    kernel = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(jacobian)[0]:
        if keep(jax.tree_util.keystr(path, simple=True, separator="/")):
            rows = np.asarray(leaf).reshape(*leaf.shape[:2], -1)
            kernel = kernel + np.einsum("nop,mqp->nmoq", rows, rows)
    return kernel


def reduced(full, outputs):
    diagonal = np.einsum("nmoo->nmo", full)
    return {"full": full, "diagonal": diagonal, "trace": diagonal.mean(-1)}[outputs]


def assert_kernel(kernel, expected):
    # both are sums of some hundred products in float64
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "x"), [(Mlp(), X), (TiedNorm(), X), (ConvNet(), IMAGES)], ids=["mlp", "tied", "conv"]
)
@pytest.mark.parametrize("outputs", ["trace", "full", "diagonal"])
def test_ntk_of_linen_module_is_the_gram_matrix_of_its_jacobian(model, x, outputs):
    params = model.init(jax.random.key(2), x)["params"]
    full = gram(lambda p, x: model.apply({"params": p}, x), params, x)
    kernel = ij.empirical_ntk(model, outputs=outputs)(params, x)
    assert kernel.dtype == jnp.float64
    assert_kernel(kernel, reduced(full, outputs))


def test_ntk_of_nnx_module_factory_state_and_function_agree():
    model = NnxMlp(nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    values = nnx.to_pure_dict(state)
    expected = reduced(gram(lambda p, x: NnxApply(graph, state)(p, x), values, X), "trace")
    assert_kernel(ij.empirical_ntk(model)(values, X), expected)
    assert_kernel(ij.empirical_ntk(model)(state, X), expected)
    assert_kernel(ij.empirical_ntk(model)(None, X), expected)  # the parameters the module holds
    assert_kernel(ij.empirical_ntk(lambda rngs: NnxMlp(rngs))(values, X), expected)


class NnxApply:
    def __init__(self, graph, state):
        self.graph, self.state = graph, state

    def __call__(self, params, x):
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state)(x)


@pytest.mark.parametrize(
    ("method", "outputs", "memory"),
    [("auto", outputs, memory) for outputs in ("trace", "full", "diagonal") for memory in (3_500, 7_000)]
    + [("jacobian", "trace", 10_000), ("jacobian", "full", 7_000)],
)
def test_every_tiling_gives_the_same_kernel(monkeypatch, method, outputs, memory):
    model = Mlp()
    params = model.init(jax.random.key(2), X)["params"]
    full = gram(lambda p, x: model.apply({"params": p}, x), params, X)
    chosen = []
    monkeypatch.setattr(ntk_module, "tiles", lambda *args: chosen.append(tiles(*args)) or chosen[-1])
    ntk_fn = ij.empirical_ntk(model, outputs=outputs, method=method, memory=memory)
    kernel = ntk_fn(params, X)
    assert chosen[0].examples < 5 or chosen[0].outputs < 3  # more than one block, or chunks of the outputs
    assert_kernel(kernel, reduced(full, outputs))
    mirrored = {"trace": (1, 0), "diagonal": (1, 0, 2), "full": (1, 0, 3, 2)}[outputs]
    np.testing.assert_array_equal(kernel, kernel.transpose(mirrored))
    assert_kernel(ntk_fn(params, X, X[:4]), reduced(full, outputs)[:, :4])


def test_gradients_of_dense_layers_are_not_formed_and_those_of_others_are():
    """Which parameters get taps: dense kernels and biases used once on one data vector, and no others."""

    def tapped(model, x):
        params = model.init(jax.random.key(2), x)["params"]
        program = trace(lambda p, x: model.apply({"params": p}, x), params, x[:1])
        taps, left = find_taps(program, (True,) * len(program.names))
        return taps, [name for name, keep in zip(program.names, left, strict=True) if keep]

    taps, left = tapped(Mlp(), X)
    assert len(taps) == 3 and all(tap.bias and tap.operand is not None for tap in taps) and not left
    taps, left = tapped(ConvNet(), IMAGES)
    assert len(taps) == 1 and left == ["Conv_0/bias", "Conv_0/kernel"]
    # names in the order the author made them: Dense_0 is used twice, and the last Dense is Dense_1
    taps, left = tapped(TiedNorm(), X)
    assert len(taps) == 1 and left == ["Dense_0/bias", "Dense_0/kernel", "log_scale", "scale"]
    taps, left = tapped(nn.Dense(4, param_dtype=DTYPE), X[:, None])  # one position: still one data vector
    assert len(taps) == 1 and not left
    taps, left = tapped(nn.Dense(4, param_dtype=DTYPE), jnp.stack([X, X], 1))  # two positions share the weights
    assert not taps and left == ["bias", "kernel"]


def test_blocks_stay_within_the_budget_and_use_it():
    sizes = [
        (1000, 10, 4000, 500, 4, 10**6),
        (7, 3, 100, 0, 36, 10**4),
        (5, 64, 1000, 2000, 4, 10**5),
        (10**4, 1, 1, 1, 8, 10**7),
    ]
    for examples, outputs, row, work, cell, memory in sizes:
        block, chunk = tiles(examples, outputs, row, work, cell, memory)

        def needed(block, chunk, row=row, work=work, cell=cell):
            return max(block * (LIVE_COPIES * chunk * row + work), 3 * cell * block**2 if chunk > 1 or block > 1 else 0)

        assert needed(block, chunk) <= memory
        # balanced blocks, no fewer of which would do
        total, size = (outputs, chunk) if chunk < outputs else (examples, block)
        fewer = -(-total // size) - 1
        if fewer:
            larger = -(-total // fewer)
            assert needed(*((1, larger) if chunk < outputs else (larger, chunk))) > memory


@pytest.mark.parametrize("method", ["auto", "jacobian"])
def test_features_held_at_once_stay_within_the_budget(monkeypatch, method):
    x = jnp.tile(X, (40, 1))
    params = {"w": jax.random.normal(jax.random.key(3), (6, 500), DTYPE)}
    apply = lambda p, x: jnp.tanh(x @ p["w"]).reshape(x.shape[0], 5, 100).sum(-1)  # noqa: E731
    seen = []
    contract = ntk_module._contract

    def spy(left, right, outputs):
        seen.append(sum(a.nbytes for a in jax.tree.leaves((left, right))))
        return contract(left, right, outputs)

    budget = 2 * 10**6
    monkeypatch.setattr(ntk_module, "_contract", spy)
    kernel = ij.empirical_ntk(apply, memory=budget, method=method)(params, x)
    assert len(seen) > 5 and 2 * max(seen) <= budget
    assert_kernel(kernel, np.tile(reduced(gram(apply, params, X), "trace"), (40, 40)))


def test_filter_by_pattern_and_by_function_splits_the_sum_over_parameters():
    model = Mlp()
    params = model.init(jax.random.key(2), X)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    kernels = ij.empirical_ntk(model, params_filter="*/kernel")(params, X)
    assert_kernel(kernels, reduced(gram(apply, params, X, lambda name: name.endswith("kernel")), "trace"))
    biases = ij.empirical_ntk(model, params_filter=lambda path, leaf: leaf.ndim == 1)(params, X)
    assert_kernel(kernels + biases, reduced(gram(apply, params, X), "trace"))


def test_ntk_under_jit_vmap_and_grad():
    model = Mlp()
    ntk_fn = ij.empirical_ntk(model)
    stacked = jax.vmap(lambda key: model.init(key, X)["params"])(jax.random.split(jax.random.key(4), 2))
    together = jax.jit(jax.vmap(lambda p: ntk_fn(p, X)))(stacked)
    for i in range(2):
        assert_kernel(together[i], ntk_fn(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), X))
    # Theta of x @ w is x x^T, whatever w; of (x @ w)^2 with one input it is 4 x^4 w^2, with slope 8 x^4 w
    ntk_fn = ij.empirical_ntk(lambda w, x: (x * w) ** 2)
    slope = jax.grad(lambda w: ntk_fn(w, jnp.full((1, 1), 2.0, DTYPE))[0, 0])(jnp.asarray(3.0, DTYPE))
    np.testing.assert_allclose(slope, 8 * 16 * 3, rtol=1e-14)


def test_trees_of_inputs_integers_and_empty_batches():
    table = jax.random.normal(jax.random.key(5), (4, 3), DTYPE)
    apply = lambda p, x: p["table"][x["ids"]] * x["weight"][:, None]  # noqa: E731
    x = {"ids": jnp.array([0, 2, 2]), "weight": jnp.array([1.0, 2.0, 3.0], DTYPE)}
    kernel = ij.empirical_ntk(apply)({"table": table, "steps": jnp.array(3)}, x)
    # d f_o / d table[i, o] = weight where the ids agree
    np.testing.assert_array_equal(kernel, [[1, 0, 0], [0, 4, 6], [0, 6, 9]])
    assert ij.empirical_ntk(apply)({"table": table}, x, jax.tree.map(lambda a: a[:0], x)).shape == (3, 0)


@pytest.mark.x64_off
def test_float32_kernel_of_bfloat16_parameters():
    w = jnp.ones((6, 2), jnp.bfloat16)
    kernel = ij.empirical_ntk(lambda p, x: x @ p)(w, X.astype(jnp.bfloat16))
    assert kernel.dtype == jnp.float32
    x = X.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(kernel, x @ x.T, rtol=1e-5, atol=1e-5)  # float32 sums of six exact products


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, param_dtype=DTYPE)(
            jnp.tanh((x - x.mean(0, keepdims=True)) * jax.lax.rsqrt(x.var(0, keepdims=True)))
        )


def test_network_that_couples_examples_is_refused():
    params = BatchNorm().init(jax.random.key(0), X)
    with pytest.raises(
        ij.InputError, match=r"changes with another example[\s\S]*batch normalisation[\s\S]*train=False"
    ):
        ij.empirical_ntk(BatchNorm())(params, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "sum"}, r"outputs='sum'[\s\S]*'trace' or 'full'"),
        ({"method": "structured"}, r"method='structured'[\s\S]*'jacobian'"),
        ({"memory": 0}, r"memory=0[\s\S]*positive number of bytes"),
        ({"memory": "2GB"}, r"memory='2GB'[\s\S]*2\*\*30"),
        ({"params_filter": 3}, r"params_filter=3[\s\S]*pattern"),
    ],
)
def test_bad_options_get_four_part_errors(options, message):
    with pytest.raises(ij.InputError, match=message):
        ij.empirical_ntk(Mlp(), **options)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({"memory": 100}, X, r"memory=100 bytes[\s\S]*at least [\d,]+ bytes[\s\S]*params_filter"),
        ({"params_filter": "*/weight"}, X, r"\*/weight[\s\S]*Dense_0/kernel[\s\S]*at least one"),
        ({}, X.at[0, 0].set(jnp.nan), r"x1.*NaN"),
        ({}, jnp.ones((), DTYPE), r"x1[\s\S]*number of examples"),
        ({}, X[:, :5], r"inputs of the shape \(5, 5\)[\s\S]*last axis"),
    ],
)
def test_bad_calls_get_four_part_errors(options, x, message):
    model = Mlp()
    params = model.init(jax.random.key(2), X)["params"]
    with pytest.raises(ij.InputError, match=message):
        ij.empirical_ntk(model, **options)(params, x)


def test_wrong_networks_parameters_and_pairs_get_four_part_errors():
    model = Mlp()
    variables = model.init(jax.random.key(2), X)
    with pytest.raises(ij.InputError, match=r"batch_stats[\s\S]*freshly initialized"):
        ij.empirical_ntk(model)({**variables, "batch_stats": {}}, X)
    with pytest.raises(ij.InputError, match=r"leaf shapes[\s\S]*Dense_0/kernel"):
        ij.empirical_ntk(model)({"w": X}, X)
    with pytest.raises(ij.InputError, match=r"the class Mlp"):
        ij.empirical_ntk(Mlp)(variables, X)
    with pytest.raises(ij.InputError, match=r"one real floating-point array"):
        ij.empirical_ntk(lambda p, x: (x @ p, x))(jnp.ones((6, 1), DTYPE), X)
    with pytest.raises(ij.InputError, match=r"5 and 6 outputs"):
        ij.empirical_ntk(lambda p, x: x * p)(jnp.ones((), DTYPE), X[:, :5], X)
