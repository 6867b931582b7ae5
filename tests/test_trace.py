"""trace/: Flax models as programs, and the distribution of their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from flax import nnx

from initjax.errors import InputError, UnsupportedLayerError
from initjax.trace import expr as ex
from initjax.trace.flax import as_functional, layer_of
from initjax.trace.initstats import leaf_statistics
from initjax.trace.inline import inline
from initjax.trace.jaxpr import float64
from initjax.trace.program import read_model
from initjax.trace.views import WeightView

X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)

# ------------------------------------------------------------------ models as functions


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class NormedNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def test_linen_batch_statistics_stay_out_of_params():
    model = as_functional(Normed(), X, apply_kwargs={"train": False})
    params = model.init(jax.random.key(0))
    assert model.layer_names == ("BatchNorm_0", "Dense_0")
    assert set(model.state) == {"batch_stats"}
    expected = Normed().apply({"params": params, **model.state}, X, train=False)
    np.testing.assert_array_equal(model.apply(params, X), expected)


def test_train_mode_needs_and_takes_its_random_stream():
    model = as_functional(Normed(), X, apply_kwargs={"train": True}, rngs={"dropout": jax.random.key(1)})
    assert model.apply(model.init(jax.random.key(0)), X).shape == (3, 4)
    with pytest.raises(InputError, match="dropout"):
        as_functional(Normed(), X, apply_kwargs={"train": True})


@pytest.mark.parametrize("model", [NormedNnx(rngs=nnx.Rngs(0)), lambda rngs: NormedNnx(rngs=rngs)])
def test_nnx_instance_and_factory(model):
    functional = as_functional(model, X)
    params = functional.init(jax.random.key(0))
    assert functional.leaf_names == ("dense/bias", "dense/kernel", "norm/bias", "norm/scale")
    assert functional.apply(params, jnp.ones((5, 6), jnp.float32)).shape == (5, 4)
    assert (functional.values is None) == callable(getattr(model, "__code__", None) and model)


def test_nnx_apply_equals_the_module_itself():
    module = zoo.MLPnnx(6, rngs=nnx.Rngs(3))
    functional = as_functional(module, X)
    np.testing.assert_array_equal(functional.apply(functional.values, X), module(X))


@pytest.mark.parametrize("with_inputs", [False, True])
def test_pair_of_functions(with_inputs):
    def init(key, *x):
        return {"w": jax.random.normal(key, (6, 2), jnp.float32)}

    def init_on_inputs(key, x):
        return init(key)

    pair = (init_on_inputs if with_inputs else init, lambda p, x: x @ p["w"])
    functional = as_functional(pair, X)
    assert functional.kind == "functions" and functional.abstract_output.shape == (3, 2)


def test_tuple_inputs_are_positional_and_dicts_are_keywords():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            return nn.Dense(2)(a) + nn.Dense(2)(b)

    for inputs in ((X, X[:, :2]), {"a": X, "b": X[:, :2]}):
        functional = as_functional(Two(), inputs)
        assert functional.apply(functional.init(jax.random.key(0)), inputs).shape == (3, 2)


def test_as_functional_inside_jit():
    def run(x):
        functional = as_functional(nn.Dense(2), x)
        return functional.apply(functional.init(jax.random.key(0)), x)

    np.testing.assert_allclose(jax.jit(run)(X), run(X), rtol=1e-6)  # float32 dot products, two orders of summation


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Dense, X, "the class Dense"),
        (NormedNnx, X, "rngs=rngs"),
        (3.0, X, "the model 3.0"),
        ((1, 2), X, "of type tuple"),
        (lambda rngs: 7, X, "returned int"),
        (zoo.MLPnnx(6, rngs=nnx.Rngs(0)), X[:, :5], r"float32\[3, 5\]"),
        (nn.Dense(2), X * 1j, "complex"),
        (nn.Dense(2), np.array([[1.0, np.nan]], np.float32), "1 entries that are NaN or inf"),
        (nn.Dense(2), np.array([[1.0, np.inf]], np.float32), r"index \(0, 1\)"),
        (nn.Dense(2), "images", "type str"),
        (nn.Dense(2), (), "inputs = "),
        (Normed(), X, "train"),
    ],
)
def test_bad_models_and_inputs_are_told_in_four_parts(model, inputs, words):
    with pytest.raises(InputError, match=words) as caught:
        as_functional(model, inputs)
    assert all([caught.value.given, caught.value.accepted, caught.value.why, caught.value.remedy])


def test_layer_of():
    assert layer_of("blocks/0/Dense_0/kernel") == "blocks/0/Dense_0"


# ------------------------------------------------------------------ distributions of weights

I = jax.nn.initializers  # noqa: E741


def stats_of(init, shape=(8, 5), dtype=jnp.float32):
    (leaf,) = leaf_statistics(as_functional((lambda key: init(key, shape, dtype), lambda p, x: x), X))
    return leaf


@pytest.mark.parametrize(
    ("init", "variance", "gaussian"),
    [
        (I.lecun_normal(), 1 / 8, False),  # truncated at two standard deviations, and corrected for it
        (I.lecun_uniform(), 1 / 8, False),
        (I.he_normal(), 2 / 8, False),
        (I.he_uniform(), 2 / 8, False),
        (I.glorot_normal(), 2 / 13, False),
        (I.glorot_uniform(), 2 / 13, False),
        (I.variance_scaling(1.7, "fan_in", "normal"), 1.7 / 8, True),
        (I.normal(0.05), 0.0025, True),
        (I.orthogonal(), 1 / 8, False),
    ],
)
def test_variance_of_known_initializers(init, variance, gaussian):
    leaf = stats_of(init)
    assert leaf.mean == 0.0 and leaf.gaussian == gaussian
    np.testing.assert_allclose(leaf.variance, variance, rtol=1e-12)  # rounded to the author's decimal
    np.testing.assert_allclose(leaf.raw_variance, variance, rtol=4e-7)  # float32 constants in the initializer


def test_custom_elementwise_initializer():
    def cubed(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -0.5, 0.5) ** 3

    leaf = stats_of(cubed)
    np.testing.assert_allclose(leaf.variance, 0.5**6 / 7, rtol=1e-6)  # E u^6 on (-1/2, 1/2); float32 constants
    assert leaf.kind == "random" and not leaf.gaussian


def test_mean_of_an_offset_uniform():
    leaf = stats_of(I.uniform(0.01))
    np.testing.assert_allclose([leaf.mean, leaf.variance], [0.005, 1e-4 / 12], rtol=1e-6)  # float32 constants


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_draws_are_read_as_they_are(dtype):
    """The variance of the values that float16 and bfloat16 normals really take, against a large sample."""
    leaf = stats_of(I.normal(1.0), dtype=dtype)
    sample = np.asarray(jax.random.normal(jax.random.key(0), (400_000,), dtype), np.float64)
    sem = np.std(sample**2) / np.sqrt(sample.size)
    spread = sem if leaf.kind == "random" else 1.0  # bfloat16 goes through integers that are not followed: sampled
    assert abs(leaf.variance - sample.var()) < 5 * spread


def test_constants_and_structured_leaves():
    assert stats_of(I.constant(0.5)).value == 0.5
    assert stats_of(I.zeros).kind == "constant"
    assert stats_of(I.delta_orthogonal(), (3, 4, 4)).kind == "structured"

    def masked(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * jnp.tri(*shape, dtype=dtype)

    assert stats_of(masked).kind == "structured"


def test_values_of_a_finished_nnx_module_are_estimated_and_say_so():
    leaves = leaf_statistics(as_functional(zoo.MLPnnx(6, rngs=nnx.Rngs(0)), X))
    kernel = next(leaf for leaf in leaves if leaf.name == "layers/1/kernel")
    assert kernel.kind == "estimated" and "estimated" in kernel.note
    # 1.8 / 256 from 65536 squared normals: relative standard error sqrt(2 / 65536) = 0.55 %
    assert abs(kernel.variance / (1.8 / 256) - 1) < 5 * np.sqrt(2 / 65536)


def test_factory_and_linen_twin_have_equal_distributions():
    linen = read_model(as_functional(zoo.MLP(), X))
    twin = read_model(as_functional(lambda rngs: zoo.MLPnnx(6, rngs=rngs), X))
    assert [(s.shape, s.variance, s.gaussian) for s in linen] == [(s.shape, s.variance, s.gaussian) for s in twin]


def test_leaves_that_share_a_key_are_flagged():
    def init(key):
        return {name: jax.random.normal(key, (6, 6), jnp.float32) for name in ("a", "b")}

    functional = as_functional((init, lambda p, x: x @ p["a"] @ p["b"]), X)
    with pytest.raises(UnsupportedLayerError, match="same random key"):
        read_model(functional)


# ------------------------------------------------------------------ programs, expressions, views


def test_inline_keeps_the_function():
    def f(x, y):
        return jax.jit(lambda a: jnp.tanh(a) * y)(x), jax.nn.relu(x) + jax.checkpoint(jnp.sin)(y)

    program = inline(jax.make_jaxpr(f)(1.5, -0.5))
    assert not {"jit", "pjit", "custom_jvp_call", "remat2", "checkpoint"} & {e.name for e in program.equations}
    values = {**program.constants, program.inputs[0]: jnp.asarray(1.5), program.inputs[1]: jnp.asarray(-0.5)}
    for e in program.equations:
        out = e.primitive.bind(*[jnp.asarray(values[n]) for n in e.inputs], **e.params)
        values.update(zip(e.outputs, out if e.primitive.multiple_results else [out], strict=True))
    np.testing.assert_allclose([values[n] for n in program.outputs], f(1.5, -0.5), rtol=1e-12)


def test_equal_expressions_are_one_object_and_compute():
    def build():
        return ex.apply(
            jax.lax.mul_p, {}, [ex.literal(0.5), ex.apply(jax.lax.exp_p, {"accuracy": None}, [ex.VARIABLE])]
        )

    assert build() is build()
    with float64():
        np.testing.assert_allclose(build().fn(jnp.asarray([0.0, 1.0])), [0.5, 0.5 * np.e], rtol=1e-15)
    assert ex.apply(jax.lax.add_p, {}, [ex.literal(1.0), ex.literal(2.0)]).value == 3.0


def test_weight_views_follow_numpy():
    """Random chains of transposes, slices and reshapes, against NumPy's own indexing of arange."""
    rng = np.random.default_rng(1)
    followed = 0
    for _ in range(200):
        shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6], size=rng.integers(1, 4)))
        array, view = np.arange(np.prod(shape)).reshape(shape), WeightView.of(0, False, shape)
        for step in rng.integers(3, size=3):
            if step == 0:
                order = [int(p) for p in rng.permutation(array.ndim)]
                array, view = array.transpose(order), view.transposed(order)
            elif step == 1:
                starts = [int(rng.integers(n)) for n in array.shape]
                steps = [int(rng.integers(1, 3)) for _ in starts]
                view = view.sliced(starts, array.shape, steps)
                array = array[tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))]
            else:
                first = int(rng.choice([d for d in range(1, array.size + 1) if array.size % d == 0]))
                new = view.reshaped((first, array.size // first))
                if new is None:
                    continue
                followed += 1
                view, array = new, array.reshape(first, -1)
        np.testing.assert_array_equal(np.broadcast_to(view.indices(range(array.ndim)), array.shape), array)
    assert followed > 100


def test_views_overlap_exactly_when_they_share_entries():
    whole = WeightView.of(0, False, (2000, 1000))
    left, right = whole.sliced((0, 0), (2000, 500), (1, 1)), whole.sliced((0, 500), (2000, 1000), (1, 1))
    middle = whole.sliced((0, 400), (2000, 600), (1, 1))
    assert not left.overlaps(right)
    assert left.overlaps(middle) and right.overlaps(middle) and left.overlaps(whole)
    small = WeightView.of(0, False, (4, 6))
    even, odd = small.sliced((0, 0), (4, 6), (1, 2)), small.sliced((0, 1), (4, 6), (1, 2))
    assert not even.overlaps(odd) and even.overlaps(small)
