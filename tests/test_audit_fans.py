"""True fans read from programs: the four wrong Flax defaults, stacks, groups, shared leaves; and the fix, measured."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import linen as nn
from flax import nnx

import initjax as ij
from initjax.trace.flax import as_functional
from initjax.trace.residual import branches
from initjax.trace.uses import survey

KEY = jax.random.key(0)


class Batched(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(40, axis=-1, batch_dims=(0,))(x)


class VmappedConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})(6, (3, 3))(x)


BROKEN = {
    "DenseGeneral with batch_dims": (Batched(), (16, 200, 10), 10, 16),
    "Einsum of rank 3": (nn.Einsum((8, 12, 40), "bqd,hdk->bqhk", use_bias=False), (200, 3, 12), 12, 8),
    "ConvLocal": (nn.ConvLocal(4, (3, 3), padding="CIRCULAR"), (60, 8, 8, 3), 27, 64),
    "ConvTranspose": (nn.ConvTranspose(32, (4, 4), (2, 2), padding="CIRCULAR"), (20, 8, 8, 3), 12, 4),
    "ConvTranspose, kernel transposed": (
        nn.ConvTranspose(32, (4, 4), (2, 2), padding="CIRCULAR", transpose_kernel=True), (20, 8, 8, 16), 64, 8,
    ),
}  # fmt: skip


SLOW = {"ConvLocal", "ConvTranspose, kernel transposed", "ConvTranspose"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BROKEN])
def test_the_wrong_flax_defaults_are_found_and_fixed_to_unit_variance(name):
    model, shape, fan, ratio = BROKEN[name]
    x = jax.random.normal(KEY, shape, jnp.float32)
    report = ij.audit_fans(model, x)
    (row,) = report.wrong
    assert (row.fan, row.ratio) == (fan, ratio) and row.fix == f"multiply by {math.sqrt(ratio):.4g}"
    np.testing.assert_allclose(row.variance * fan * ratio, 1, rtol=1e-6)  # float32 constants in the initializer
    variables = model.init(jax.random.key(1), x)
    for rules in (report.rules, ij.rules.lecun_fixed()):
        fixed = ij.reinitialize(variables, rules, jax.random.key(2), model=model, inputs=x)
        y = np.asarray(model.apply(fixed, x), np.float64)
        kernel = jax.tree.leaves(fixed)[-1]
        # the mean square follows |W|^2, a sum of as many squares, and |x|^2: both have relative error sqrt(2 / size)
        error = math.sqrt(2 / kernel.size + 2 / x.size)
        assert abs((y**2).mean() - 1) < 4 * error
        assert abs((np.asarray(model.apply(variables, x)) ** 2).mean() * ratio - 1) < 5 * error


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Conv(6, (3, 3), feature_group_count=3), (1, 8, 8, 3), {"kernel": (9, (), (0, 1, 2), (3,))}),
        (nn.Conv(6, (3, 3), (2, 2), kernel_dilation=2), (1, 8, 8, 3), {"kernel": (27, (), (0, 1, 2), (3,))}),
        (VmappedConv(), (5, 1, 8, 8, 3), {"VmapConv_0/kernel": (27, (0,), (1, 2, 3), (4,))}),
        (zoo.ScannedBlocks(), (1, 16), {"Dense_0/kernel": (16, (), (0,), (1,)),
                                        "blocks/Dense_1/kernel": (128, (0,), (1,), (2,)),
                                        "blocks/Dense_0/kernel": (128, (0,), (1,), (2,)),
                                        "Dense_1/kernel": (128, (), (0,), (1,))}),
        (nn.MultiHeadDotProductAttention(4, qkv_features=16), (1, 5, 16),
         {"query/kernel": (16, (), (0,), (1, 2)), "key/kernel": (16, (), (0,), (1, 2)),
          "value/kernel": (16, (), (0,), (1, 2)), "out/kernel": (16, (), (0, 1), (2,))}),
        (nn.RNN(nn.OptimizedLSTMCell(6)), (1, 2, 3),
         {**{f"cell/i{g}/kernel": (3, (), (0,), (1,)) for g in "figo"},
          **{f"cell/h{g}/kernel": (6, (), (0,), (1,)) for g in "figo"}}),
        (lambda rngs: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs), (1, 5, 16),
         {"query/kernel": (16, (), (0,), (1, 2)), "key/kernel": (16, (), (0,), (1, 2)),
          "value/kernel": (16, (), (0,), (1, 2)), "out/kernel": (16, (), (0, 1), (2,))}),
    ],
)  # fmt: skip
def test_fans_and_axes_of_right_layers(model, shape, expected):
    report = ij.audit_fans(model, jnp.ones(shape, jnp.float32))
    assert {r.name: (r.fan, r.copies, r.inputs, r.outputs) for r in report.rows} == expected
    assert all(r.ratio == 1 for r in report.rows) and not report.not_followed and not report.wrong


def test_shared_leaves_have_one_row_for_each_role():
    rows = ij.audit_fans(zoo.TiedEmbedding(), jnp.ones((1, 5), jnp.int32)).rows
    assert [(r.kind, r.fan) for r in rows if "embedding" in r.name] == [("lookup", 1), ("product", 64)]
    rows = ij.audit_fans(zoo.TiedAutoencoder(), jnp.ones((1, 5))).rows
    assert [(r.fan, r.ratio) for r in rows] == [(5, 1), (256, 5 / 256)] and all("shared" in r.note for r in rows)


def test_scaled_weights_and_functions_of_weights():
    def apply(params, x):
        normed = params["v"] / jnp.sqrt(jnp.sum(params["v"] ** 2, 0, keepdims=True))
        return (x @ (params["w"].T * 0.25)) @ normed

    def init(key):
        return {"w": jax.random.normal(key, (8, 16)), "v": jax.random.normal(jax.random.fold_in(key, 1), (8, 4))}

    first, second = ij.audit_fans((init, apply), jnp.ones((1, 16))).rows
    # NTK parametrization: unit variance times 1/16, sixteen terms
    assert (first.fan, first.ratio, round(first.sigma_w, 6)) == (16, 1, 1) and first.inputs == (1,)
    assert second.fan == 8 and second.ratio is None and "function of the weight" in second.note


def test_initializers_without_a_fan_or_with_an_odd_gain_are_not_called_wrong():
    for init, ratio in ((jax.nn.initializers.normal(0.02), None), (ij.initializers.critical(jnp.tanh, 0.3), 1)):
        (row,) = ij.audit_fans(nn.ConvTranspose(4, (4, 4), (2, 2), kernel_init=init), jnp.ones((1, 8, 8, 3))).rows
        assert row.ratio == (ratio if ratio is None else 4)  # the fan of the default axes is wrong for any gain
        (row,) = ij.audit_fans(nn.Dense(4, kernel_init=init), jnp.ones((1, 9))).rows
        assert row.ratio in (1, None)


def test_report_prints_and_serializes():
    report = ij.audit_fans(Batched(), jnp.ones((16, 3, 10)))
    assert "multiply by 4" in repr(report)
    assert report.to_dict()["rows"][0]["ratio"] == 16
    with pytest.raises(ij.InputError, match="DenseGeneral|Batched"):
        ij.audit_fans(Batched, jnp.ones((16, 3, 10)))


# ------------------------------------------------------------------ residual branches


class Parallel(nn.Module):
    """x + attention-like(LN x) + gain * MLP(LN x), as PaLM and CaiT have it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for i in range(2):
            h = nn.LayerNorm()(x)
            gain = self.param(f"gain{i}", nn.initializers.ones, (16,))
            x = x + nn.Dense(16, name=f"a{i}")(h) + gain * nn.Dense(16, name=f"b{i}")(nn.gelu(nn.Dense(32)(h)))
        return x


@pytest.mark.parametrize(
    ("model", "shape", "ends"),
    [
        (Parallel(), (1, 5), ["a0/kernel", "gain0", "a1/kernel", "gain1"]),
        (zoo.ScannedBlocks(), (1, 5), ["blocks/Dense_0/kernel"] * 3),
        (zoo.PostActivationResNet(), (1, 5), ["Dense_1/kernel"]),
        (zoo.ResNetV2(), (1, 8, 8, 3), ["Conv_2/kernel", "Conv_4/kernel"]),
        (zoo.GLU(), (1, 5), []),
        (zoo.ScannedRNN(), (1, 3, 5), []),
        (nn.RNN(nn.LSTMCell(4)), (1, 3, 5), []),
        (nn.RNN(nn.GRUCell(4)), (1, 3, 5), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_branches_of_real_models(model, shape, ends):
    found = survey(as_functional(model, jnp.ones(shape, jnp.float32)))
    assert [found.names[b.end] for b in branches(found)] == ends
