"""The empirical NTK against the full Jacobian's Gram matrix, in every tiling, and on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from oracles.jacobian import gram

import initjax as ij
import initjax.empirical.features as features_module
import initjax.empirical.job as job_module
import initjax.empirical.tiles as tiles_module
from initjax.empirical.blocks import as_bytes
from initjax.empirical.independence import keeps_examples_apart

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


class Mixed(nn.Module):
    """Two positions, so that gradients of the first layer may be formed; a gain; an output layer with one position."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, param_dtype=DTYPE)(x.reshape(-1, 2, 3)))
        x = x * self.param("scale", nn.initializers.ones, (4,), DTYPE)[None, None]
        return nn.Dense(3, param_dtype=DTYPE)(x.reshape(-1, 8))


@pytest.mark.parametrize(
    ("method", "outputs", "rows", "chunk"),
    [
        ("auto", "trace", 2, 3),
        ("auto", "full", 2, 2),
        ("auto", "diagonal", 5, 2),
        ("jacobian", "trace", 3, 2),
        ("jacobian", "full", 3, 3),
    ],
)
def test_every_tiling_gives_the_same_kernel(monkeypatch, method, outputs, rows, chunk):
    model = Mixed()
    params = model.init(jax.random.key(2), X)["params"]
    full = gram(lambda p, x: model.apply({"params": p}, x), params, X)
    tiling = job_module.tiling
    monkeypatch.setattr(
        job_module, "tiling", lambda *args: tiling(*args)._replace(rows=rows, columns=rows, outputs=chunk)
    )
    ntk_fn = ij.empirical_ntk(model, outputs=outputs, method=method)
    kernel = ntk_fn(params, X)
    assert_kernel(kernel, reduced(full, outputs))
    mirrored = {"trace": (1, 0), "diagonal": (1, 0, 2), "full": (1, 0, 3, 2)}[outputs]
    np.testing.assert_array_equal(kernel, kernel.transpose(mirrored))
    assert_kernel(ntk_fn(params, X, X[:4]), reduced(full, outputs)[:, :4])


@pytest.mark.parametrize("route", ["pair", "explicit", "streamed"])
@pytest.mark.parametrize("outputs", ["trace", "full", "diagonal"])
def test_every_route_gives_the_same_kernel(monkeypatch, route, outputs):
    """Dense layers on two positions, by pairs of positions and by formed gradients, whole or some inputs at a time."""
    model = Mixed()
    params = model.init(jax.random.key(2), X)["params"]
    full = gram(lambda p, x: model.apply({"params": p}, x), params, X)
    tiling = job_module.tiling

    def force(*args):
        found = tiling(*args)
        routes = [r if r.name == "gradient" else r._replace(name=route) for r in found.routes]
        return found._replace(routes=tuple(routes), rows=3, columns=3)

    monkeypatch.setattr(job_module, "tiling", force)
    monkeypatch.setattr(features_module, "CACHE", 100)  # so that several inputs at a time do not fit
    kernel = ij.empirical_ntk(model, outputs=outputs)(params, X)
    assert_kernel(kernel, reduced(full, outputs))


def test_each_parameter_goes_the_way_its_use_allows():
    """What meets data in a product is tapped, with its bias; functions of parameters are pulled back."""

    def kinds(model, x):
        params = model.init(jax.random.key(2), x)["params"]
        table = ij.empirical_ntk(model).explain(params, x)
        assert "foreseen" in repr(table)
        return {row.leaves: (row.kind, row.route) for row in table.rows}

    found = kinds(Mlp(), X)
    assert set(found.values()) == {("product", "pair")} and all(len(leaves) == 2 for leaves in found)
    found = kinds(ConvNet(), IMAGES)
    assert found["Conv_0/kernel", "Conv_0/bias"][0] == "convolution"
    found = kinds(TiedNorm(), X)
    assert found["Dense_0/kernel",][0] == "product"  # two positions: it is used twice
    assert found["scale",] == ("scale", "gradient")
    assert found["log_scale",][0] == "function of parameters (scale)"
    # one position is still one data vector; two share the weights, and the bias
    assert list(kinds(nn.Dense(4, param_dtype=DTYPE), X[:, None]).values()) == [("product", "pair")]


def test_memory_is_given_in_bytes_or_in_words():
    assert as_bytes("4GiB") == 4 * 2**30 == as_bytes(2**32) and as_bytes(" 500 MB ") == 500 * 10**6
    assert as_bytes("1.5k") == 1500 and as_bytes(None) > 0


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_kernel_stays_within_its_budget_down_to_the_smallest_that_works(outputs):
    model = Mixed()
    params = model.init(jax.random.key(2), X)["params"]
    free = ij.empirical_ntk(model, outputs=outputs).explain(params, X)
    with pytest.raises(ij.InputError, match=r"at least [\d,]+ bytes") as refused:
        ij.empirical_ntk(model, outputs=outputs, memory=100)(params, X)
    smallest = int(refused.value.accepted.split()[2].replace(",", ""))
    assert smallest < free.bytes / 2
    ntk_fn = ij.empirical_ntk(model, outputs=outputs, memory=smallest)
    table = ntk_fn.explain(params, X)
    assert table.bytes <= smallest and table.examples == (1, 1)
    assert_kernel(ntk_fn(params, X), reduced(gram(lambda p, x: model.apply({"params": p}, x), params, X), outputs))
    with pytest.raises(ij.InputError, match="at least"):
        ij.empirical_ntk(model, outputs=outputs, memory=smallest - 1)(params, X)


def test_kernels_of_single_parameters_sum_to_the_kernel():
    model = TiedNorm()
    params = model.init(jax.random.key(2), X)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    parts = ij.empirical_ntk(model, by_leaf=True)(params, X, X[:3])
    assert len(parts) == len(jax.tree.leaves(params))
    for name, part in parts.items():
        assert_kernel(part, reduced(gram(apply, params, X, X[:3], lambda leaf, name=name: leaf == name), "trace"))


def test_filter_by_pattern_and_by_function_splits_the_sum_over_parameters():
    model = Mlp()
    params = model.init(jax.random.key(2), X)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    kernels = ij.empirical_ntk(model, params_filter="*/kernel")(params, X)
    assert_kernel(kernels, reduced(gram(apply, params, X, keep=lambda name: name.endswith("kernel")), "trace"))
    assert_kernel(ij.empirical_ntk(model, params_filter="ker.el$")(params, X), kernels)
    assert_kernel(ij.empirical_ntk(model, params_filter=lambda path: "kernel" in path)(params, X), kernels)
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


def test_trees_of_inputs_and_integers():
    table = jax.random.normal(jax.random.key(5), (4, 3), DTYPE)
    apply = lambda p, x: p["table"][x["ids"]] * x["weight"][:, None]  # noqa: E731
    x = {"ids": jnp.array([0, 2, 2]), "weight": jnp.array([1.0, 2.0, 3.0], DTYPE)}
    kernel = ij.empirical_ntk(apply)({"table": table, "steps": jnp.array(3)}, x)
    # d f_o / d table[i, o] = weight where the ids agree
    np.testing.assert_array_equal(kernel, [[1, 0, 0], [0, 4, 6], [0, 6, 9]])


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
    # unless it is allowed: then the batch is one unit
    kernel = ij.empirical_ntk(BatchNorm(), coupled=True)(params, X, X)
    assert_kernel(kernel, reduced(gram(lambda p, x: BatchNorm().apply(p, x), params, X), "trace"))
    embedded = lambda p, ids: jnp.tanh(p[ids] - p[ids].mean(0, keepdims=True))  # noqa: E731
    with pytest.raises(ij.InputError, match=r"changes with another example"):
        ij.empirical_ntk(embedded)(X, jnp.array([1, 2, 3]))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, param_dtype=DTYPE, dtype=DTYPE)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4, param_dtype=DTYPE)(x))
        return nn.Dense(2, param_dtype=DTYPE)(jnp.tanh(x))


@jax.numpy_dtype_promotion("standard")  # as Flax mixes dtypes
def test_given_batch_statistics_and_dropout_streams_are_used():
    model, key = Stateful(), jax.random.key(3)
    variables = model.init({"params": key, "dropout": key}, X, train=False)
    ntk_fn = ij.empirical_ntk(model, apply_kwargs=dict(train=False), rngs={"dropout": key})
    for scale in (1.0, 2.0):  # the second call must not see the statistics of the first
        variables["batch_stats"] = jax.tree.map(lambda a, scale=scale: a * scale + 0.5, variables["batch_stats"])
        apply = lambda p, x: model.apply({**variables, "params": p}, x, train=False, rngs={"dropout": key})  # noqa: B023, E731
        one = gram(apply, variables["params"], X[:1])  # a mask for each example of a batch is not one network
        assert_kernel(ntk_fn(variables, X[:1]), reduced(one, "trace"))


def test_blocks_that_are_done_survive_a_failing_one(monkeypatch):
    model = Mlp()
    params = model.init(jax.random.key(2), X)["params"]
    tiling = job_module.tiling
    monkeypatch.setattr(job_module, "tiling", lambda *args: tiling(*args)._replace(rows=2, columns=2, resident=False))
    calls = []
    ntk_fn = ij.empirical_ntk(model)
    whole = ntk_fn(params, X)
    ntk_fn = ij.empirical_ntk(model)
    run_tiles = tiles_module.Run._tiles

    def tiles_until(self):
        for i, tile in enumerate(run_tiles(self)):
            if i == 3 and not calls:
                calls.append(1)
                raise RuntimeError("out of memory")
            yield tile

    monkeypatch.setattr(tiles_module.Run, "_tiles", tiles_until)
    with pytest.raises(ij.PartialKernelError, match=r"of the kernel was computed[\s\S]*resume") as stopped:
        ntk_fn(params, X)
    error = stopped.value
    np.testing.assert_array_equal(error.done, np.maximum.outer(range(5), range(5)) < 4)  # tiles of two examples
    np.testing.assert_array_equal(np.isnan(error.kernel), ~error.done)
    np.testing.assert_array_equal(error.kernel[error.done], whole[error.done])
    np.testing.assert_array_equal(error.resume(), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "sum"}, r"outputs='sum'[\s\S]*'trace' or 'full'"),
        ({"method": "structured"}, r"method='structured'[\s\S]*'jacobian'"),
        ({"memory": 0}, r"memory=0[\s\S]*positive number of bytes"),
        ({"memory": "two GB"}, r"memory='two GB'[\s\S]*2\*\*30"),
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
    with pytest.raises(ij.InputError, match=r"no examples[\s\S]*at least one"):
        ij.empirical_ntk(model)(variables, X[:0])
    with pytest.raises(ij.InputError, match=r"int32[\s\S]*astype"):
        ij.empirical_ntk(model)(variables, jnp.ones((5, 6), jnp.int32))
    with pytest.raises(ij.InputError, match=r"structures[\s\S]*same keys"):
        ij.empirical_ntk(lambda p, x: x["a"] @ p)(jnp.ones((6, 1), DTYPE), {"a": X}, X)
    with pytest.raises(ij.InputError, match=r"KeyError[\s\S]*check the shape"):
        ij.empirical_ntk(lambda p, x: x @ p["w"])({"v": jnp.ones((6, 1), DTYPE)}, X)
    with pytest.raises(ij.InputError, match=r"complex128[\s\S]*two real parameters"):
        ij.empirical_ntk(lambda p, x: jnp.real(x @ p))(jnp.ones((6, 1), complex), X)
    with pytest.raises(ij.InputError, match=r"gradients, though its outputs are finite[\s\S]*overflows"):
        ij.empirical_ntk(lambda p, x: jnp.sqrt(x @ p))(jnp.zeros((6, 1), DTYPE), X)
    with pytest.raises(ij.InputError, match=r"the parameter Dense_0/bias with entries that are NaN"):
        broken = jax.tree.map(lambda a: a, variables["params"])
        broken["Dense_0"]["bias"] = broken["Dense_0"]["bias"].at[0].set(jnp.nan)
        ij.empirical_ntk(model)(broken, X)
    with pytest.raises(ij.InputError, match=r"leaf shapes[\s\S]*Dense_0/kernel"):
        ij.empirical_ntk(model)({"w": X}, X)
    with pytest.raises(ij.InputError, match=r"the class Mlp"):
        ij.empirical_ntk(Mlp)(variables, X)
    with pytest.raises(ij.InputError, match=r"int32[\s\S]*real floating-point arrays"):
        ij.empirical_ntk(lambda p, x: (x @ p, x.astype(jnp.int32)))(jnp.ones((6, 1), DTYPE), X)
    with pytest.raises(ij.InputError, match=r"5 and 6 outputs"):
        ij.empirical_ntk(lambda p, x: x * p)(jnp.ones((), DTYPE), X[:, :5], X)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0, keepdims=True),
        lambda x: x[::-1],
        lambda x: jnp.roll(x, 1, axis=0),
        lambda x: jnp.cumsum(x, axis=0),
        lambda x: (x @ x.T)[:, :1],
        lambda x: jnp.sort(x, axis=0),
        lambda x: x[jnp.array([1, 0, 2])],
        lambda x: x.T.reshape(x.shape),
        lambda x: jnp.concatenate([x[1:], x[:1]]),
        lambda x: x * jax.nn.softmax(x.sum(1))[:, None],
        lambda x: jax.lax.associative_scan(jnp.add, x),
        lambda x: jnp.where(x > jnp.median(x, axis=0), x, 0),
        lambda x: jax.lax.conv(x.T[None], jnp.ones((x.shape[1], x.shape[1], 3)), (1,), "SAME")[0].T,
        lambda x: x + x[jnp.argsort(x[:, 0])],
    ],
)
def test_no_proof_that_examples_which_meet_stay_apart(mix):
    assert keeps_examples_apart(lambda p, x: jnp.tanh(x) @ p, jnp.ones((6, 2)), X[:3])
    assert not keeps_examples_apart(lambda p, x: mix(x) @ p, jnp.ones((6, 2)), X[:3])
