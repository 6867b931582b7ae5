"""Rules over parameter trees: matching, keys, stacks, boxes, shardings, and the errors that teach."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import initjax as ij
from initjax import initializers as I
from initjax import rules as R

KEY = jax.random.key(7)
X = jnp.ones((2, 16), jnp.float32)


def small():
    return nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)])


@pytest.fixture(scope="module")
def params():
    return small().init(jax.random.key(0), X)["params"]


def test_first_match_wins_and_values_are_the_initializers(params):
    rules = [("layers_2/kernel", I.zeros), ("kernel", I.he_normal()), ("bias", R.constant(0.5))]
    new = ij.reinitialize(params, rules, KEY)
    assert not new["layers_2"]["kernel"].any() and (new["layers_0"]["bias"] == 0.5).all()
    w = np.asarray(new["layers_0"]["kernel"], float)
    assert abs(w.var() * 16 / 2 - 1) < 5 * math.sqrt(2 / w.size)  # Gaussian: relative error of a variance sqrt(2 / n)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


def test_actions_keep_scale_constant_function(params):
    def of_info(key, info):
        assert info.path == "layers_2/kernel" and info.fan_in == 32 and info.kind == "kernel"
        return jnp.full(info.shape, info.fan_out, info.dtype)

    rules = [("layers_2/kernel", of_info), ("layers_0/kernel", R.scale(3.0)), (..., R.keep)]
    new = ij.reinitialize(params, rules, KEY)
    assert (new["layers_2"]["kernel"] == 8).all()
    np.testing.assert_array_equal(new["layers_0"]["kernel"], 3 * params["layers_0"]["kernel"])
    assert new["layers_0"]["bias"] is params["layers_0"]["bias"]


def test_a_key_depends_on_the_path_alone(params):
    rules = [("kernel", I.normal(1.0)), (..., R.keep)]
    new = ij.reinitialize(params, rules, KEY)
    more = ij.reinitialize({**params, "another": {"kernel": jnp.ones((16, 32))}}, rules, KEY)
    np.testing.assert_array_equal(new["layers_0"]["kernel"], more["layers_0"]["kernel"])
    assert not np.array_equal(more["another"]["kernel"], more["layers_0"]["kernel"])
    # the same parameters under a collection name, frozen, or with a legacy key
    for tree, read in (
        ({"params": params}, lambda t: t["params"]),
        (FrozenDict(params), lambda t: t),
    ):
        other = ij.reinitialize(tree, rules, jax.random.key_data(KEY))
        assert isinstance(other, type(tree))
        np.testing.assert_array_equal(read(other)["layers_0"]["kernel"], new["layers_0"]["kernel"])
    assert not np.array_equal(
        ij.reinitialize(params, rules, jax.random.key(8))["layers_0"]["kernel"], new["layers_0"]["kernel"]
    )


def test_other_collections_and_integers_are_left_alone():
    tree = {"params": {"w": jnp.ones(3), "steps": jnp.arange(2)}, "batch_stats": {"mean": jnp.ones(3)}}
    new = ij.reinitialize(tree, [(..., R.constant(0.0))], KEY)
    assert not new["params"]["w"].any() and new["batch_stats"]["mean"].all()
    np.testing.assert_array_equal(new["params"]["steps"], jnp.arange(2))


def test_boxes_dtypes_and_shardings_are_kept():
    mesh = jax.make_mesh((1,), ("m",))
    boxed = nn.with_partitioning(I.lecun_normal(), (None, "m"))
    variables = nn.Dense(4, kernel_init=boxed, param_dtype=jnp.bfloat16).init(KEY, jnp.ones((1, 8), jnp.bfloat16))
    new = ij.reinitialize(variables, [("kernel", I.orthogonal()), (..., R.keep)], KEY)
    box = new["params"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == (None, "m") and box.value.dtype == jnp.bfloat16
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("m"))
    placed = {"w": jax.device_put(jnp.ones((4, 4)), sharding)}
    assert ij.reinitialize(placed, [(..., I.normal())], KEY)["w"].sharding == sharding
    labels = ij.labels(variables, [("kernel", R.keep, "a"), (..., R.keep, "b")])["params"]
    assert labels["kernel"].value == "a" and labels["bias"] == "b"


def test_nnx_modules_change_in_place_and_states_do_not():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(16, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    model = Net(nnx.Rngs(0))
    state = nnx.state(model)
    mean = model.norm.mean[...]
    rules = [(nnx.PathContains("kernel"), I.zeros), (nnx.OfType(nnx.Param), R.constant(2.0))]
    fresh = ij.reinitialize(state, rules, KEY)
    assert model.dense.kernel[...].any() and not fresh["dense"]["kernel"][...].any()
    assert ij.reinitialize(model, rules, KEY) is model
    assert not model.dense.kernel[...].any() and (model.norm.scale[...] == 2).all()
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    # linen twin: the same paths draw the same values
    w = ij.reinitialize(model, [("kernel", I.normal()), (nnx.Param, R.keep)], KEY).dense.kernel[...]
    twin = ij.reinitialize({"dense": {"kernel": jnp.ones((16, 8), jnp.float32)}}, [("kernel", I.normal())], KEY)
    np.testing.assert_array_equal(w, twin["dense"]["kernel"])
    assert ij.labels(model, [("norm", R.keep, "slow"), (..., R.keep, "fast")])["norm"]["scale"] == "slow"


def test_it_works_inside_jit_and_vmap_over_keys(params):
    rules = [("kernel", I.orthogonal()), (..., R.keep)]
    new = jax.jit(lambda p, key: ij.reinitialize(p, rules, key))(params, KEY)
    np.testing.assert_allclose(
        new["layers_0"]["kernel"], ij.reinitialize(params, rules, KEY)["layers_0"]["kernel"], atol=1e-5
    )  # fused arithmetic rounds differently
    many = jax.vmap(lambda key: ij.reinitialize(params, rules, key))(jax.random.split(KEY, 3))
    assert many["layers_0"]["kernel"].shape == (3, 16, 32)


# ------------------------------------------------------------------ stacks


def stacked():
    return zoo.ScannedBlocks(), jax.random.normal(KEY, (2, 16), jnp.float32)


def test_a_stacked_kernel_is_drawn_copy_by_copy():
    """A naive draw of (3, 128, 128) has a third of the variance; and orthogonality holds in each copy."""
    model, x = stacked()
    params = model.init(KEY, x)["params"]
    for options in ({}, {"model": model, "inputs": x}):  # by the bias (3, 128), and by the program
        new = ij.reinitialize(params, [("blocks.*kernel", I.orthogonal()), (..., R.keep)], KEY, **options)
        w = np.asarray(new["blocks"]["Dense_0"]["kernel"], np.float64)
        np.testing.assert_allclose(w[1].T @ w[1], np.eye(128), atol=1e-5)
        he = ij.reinitialize(params, [("kernel", I.he_normal()), (..., R.keep)], KEY, **options)
        w = np.asarray(he["blocks"]["Dense_0"]["kernel"], np.float64)
        assert abs(w.var() * 64 - 1) < 5 * math.sqrt(2 / w.size)
        assert not np.array_equal(w[0], w[1])
        plan = ij.plan(params, R.he(), **options)
        row = next(r for r in plan.rows if r.path == "blocks/Dense_0/kernel")
        np.testing.assert_allclose(row.new_std, math.sqrt(2 / 128), rtol=1e-6)


def test_a_stack_that_nothing_tells_is_an_error():
    Stack = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Stack(6, use_bias=False)(x)

    x = jnp.ones((5, 2, 30), jnp.float32)
    params = Model().init(KEY, x)
    with pytest.raises(ij.InputError, match=r"\(5, 30, 6\)[\s\S]*5 copies of \(30, 6\)[\s\S]*give model= and inputs="):
        ij.reinitialize(params, [("kernel", I.he_normal())], KEY)
    with pytest.raises(ij.InputError, match="5 copies"):
        ij.reinitialize(params, R.he(), KEY)
    # of one variance in both readings: no question
    assert not ij.reinitialize(params, [("kernel", I.zeros)], KEY)["params"]["VmapDense_0"]["kernel"].any()
    ij.reinitialize(params, [("kernel", I.normal(0.02))], KEY)
    w = ij.reinitialize(params, [("kernel", I.orthogonal())], KEY, model=Model(), inputs=x)["params"]
    gram = np.einsum("bij,bik->bjk", *2 * [np.asarray(w["VmapDense_0"]["kernel"], float)])
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(6), (5, 6, 6)), atol=1e-5)


def test_heads_of_attention_are_one_axis_to_an_initializer():
    """Flax flattens (d, heads, features) before it draws; on the raw shape he_normal would count d x heads terms."""
    params = nn.MultiHeadDotProductAttention(8, qkv_features=64).init(KEY, jnp.ones((1, 3, 64), jnp.float32))["params"]
    new = ij.reinitialize(params, [("kernel", I.he_normal()), (..., R.keep)], KEY)
    for name in ("query", "key", "value", "out"):
        w = np.asarray(new[name]["kernel"], float)
        assert abs(w.var() * 32 - 1) < 5 * math.sqrt(2 / w.size)


# ------------------------------------------------------------------ plan and labels


def test_plans_are_printed_in_natural_order():
    tree = {f"Dense_{i}": {"kernel": np.ones((2, 2))} for i in (10, 2, 1)}
    lines = repr(ij.plan(tree, [(..., R.keep)])).splitlines()[1:]
    assert [line.split("/")[0] for line in lines] == ["Dense_1", "Dense_2", "Dense_10"]


def test_plan_reads_without_drawing(params):
    def refuses(key, shape, dtype):
        raise AssertionError("drawn")

    shapes = jax.eval_shape(lambda: params)
    plan = ij.plan(shapes, [("kernel", I.FanIn(2.0)), (..., R.scale(2.0))])
    rows = {r.path: r for r in plan.rows}
    np.testing.assert_allclose(rows["layers_2/kernel"].new_std, 2 / math.sqrt(32), rtol=1e-12)
    assert rows["layers_2/kernel"].old_std is None and rows["layers_0/bias"].new_std is None
    assert "layers_0/kernel" in str(plan) and plan.to_dict()["rows"][0]["path"] == "layers_0/bias"
    real = ij.plan(params, [("kernel", I.glorot_uniform()), (..., R.keep)])
    np.testing.assert_allclose(real.rows[1].new_std, math.sqrt(2 / 48), rtol=1e-5)  # read from JAX's own program
    assert ij.plan(params, [("kernel", jax.nn.initializers.orthogonal()), (..., R.keep)]).rows[1].new_std is None


def test_labels_serve_optax(params):
    labels = ij.labels(params, [("layers_2", R.keep, "head"), (..., R.keep, "body")])
    optimizer = optax.multi_transform({"head": optax.sgd(1.0), "body": optax.set_to_zero()}, labels)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert not updates["layers_0"]["kernel"].any() and updates["layers_2"]["kernel"].any()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernle", I.zeros), (..., R.keep)], r"kernle[\s\S]*nearest paths: layers_\d/kernel"),
        ([("kernel", I.zeros)], r"without a rule: layers_0/bias, layers_2/bias[\s\S]*\(\.\.\., keep\)"),
        ([(..., R.keep), ("kernel", I.zeros)], r"earlier rules take: layers_0/kernel"),
        ([("kernel", I.orthogonal), (..., R.keep)], r"orthogonal in the place of an initializer"),
        ([("kernel", jax.nn.initializers.he_normal), (..., R.keep)], r"he_normal in the place"),
        ([("kernel", R.scale), (..., R.keep)], r"scale in the place"),
        ([("kernel", 0.0), (..., R.keep)], r"the action 0\.0[\s\S]*constant\(0\.0\)"),
        ([("(", R.keep)], r"regular expression[\s\S]*does not compile"),
        ([3], r"the rule 3"),
        ([(3, R.keep)], r"the pattern 3"),
        ([("kernel", lambda key, info: jnp.ones(3)), (..., R.keep)], r"gave \(3,\)[\s\S]*keeps its shape"),
        (R.zero_gamma(), r"without the model[\s\S]*model= and inputs="),
        (R.lstm(), r"matches no parameter"),
    ],
)
def test_rules_that_cannot_be_followed_say_why(params, rules, message):
    with pytest.raises(ij.InputError, match=message) as error:
        ij.reinitialize(params, rules, KEY)
    assert all(error.value.parts)


def test_strict_off_keeps_what_has_no_rule(params):
    new = ij.reinitialize(params, [("kernel", I.zeros), ("nothing", I.zeros)], KEY, strict=False)
    assert not new["layers_0"]["kernel"].any() and new["layers_0"]["bias"] is params["layers_0"]["bias"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ij.reinitialize(nn.Dense(3), [], KEY), r"params of type Dense"),
        (lambda: ij.reinitialize({}, [], KEY), r"without a floating-point array"),
        (lambda: ij.reinitialize({"w": X}, R.he(), KEY, model=small()), r"model= without inputs="),
        (lambda: ij.reinitialize({"w": X}, R.he(), KEY, model=small(), inputs=X), r"does not have"),
        (lambda: R.constant(math.nan), r"value=nan"),
        (lambda: R.scale(jnp.ones(2)), r"factor="),
        (lambda: ij.reinitialize({"bias": X[0]}, [("bias", I.center_bias())], KEY), r"kernel beside bias"),
    ],
)
def test_bad_input_gets_four_part_errors(call, message):
    with pytest.raises(ij.InputError, match=message) as error:
        call()
    assert all(error.value.parts)


def test_an_action_sees_the_new_value_beside_it(params):
    rules = [("layers_2/bias", I.center_bias()), ("kernel", I.he_normal()), (..., R.keep)]
    new = ij.reinitialize(params, rules, KEY)
    w = np.asarray(new["layers_2"]["kernel"], float)
    np.testing.assert_allclose(new["layers_2"]["bias"], -w.sum(0) / math.sqrt(2 * math.pi), rtol=1e-5, atol=1e-6)
