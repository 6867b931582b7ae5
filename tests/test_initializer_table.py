"""Every initializer over shapes and dtypes: protocol, variance within standard errors, exact statements exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import initjax as ij
from initjax import initializers as I
from initjax.initializers.heads import Pattern

DENSE, CONV, CONV1, STACK = (60, 40), (3, 3, 12, 20), (4, 10, 30), (5, 24, 16)
REAL = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
ALL = [*REAL, jnp.complex64, jnp.complex128]
H = np.random.default_rng(0).normal(2.0, 1.0, (50, 60))
relu = jax.nn.relu

# name -> initializer, shapes, variance as a function of the shape (by the formula of its source), dtypes. Entries are
# independent of each other unless the variance is marked exact.
fan = lambda s: math.prod(s[:-1])  # noqa: E731
avg = lambda s: (math.prod(s[:-1]) + math.prod(s[:-2]) * s[-1]) / 2  # noqa: E731
least = lambda s: max(fan(s), s[-1])  # noqa: E731
RANDOM = {
    "critical": (I.critical(relu), [DENSE, CONV, CONV1], lambda s: 2 / fan(s), ALL),
    "critical truncated": (I.critical(relu, distribution="truncated_normal"), [DENSE], lambda s: 2 / fan(s), ALL),
    "critical uniform": (I.critical(relu, distribution="uniform"), [DENSE], lambda s: 2 / fan(s), ALL),
    "critical stack": (I.critical(relu, batch_axis=0), [STACK], lambda s: 2 / s[1], REAL),
    "critical_bias": (I.critical_bias(jnp.tanh, 0.3), [(900,), STACK], lambda s: 0.09, ALL),
    "variance_preserving": (I.variance_preserving(relu), [DENSE, CONV], lambda s: 2 / fan(s), REAL),
    "FanAvg": (I.FanAvg(1.0), [DENSE, CONV], lambda s: 1 / avg(s), ALL),
    "symmetric_uniform": (I.symmetric_uniform(0.3), [(900,), CONV], lambda s: 0.03, ALL),
    "exact_truncated_normal": (I.exact_truncated_normal(0.2), [(900,), CONV], lambda s: 0.04, ALL),
    "torch_default": (I.torch_default(), [DENSE, CONV], lambda s: 1 / (3 * fan(s)), REAL),
    "torch_default_bias": (I.torch_default_bias(12), [(900,)], lambda s: 1 / 36, REAL),
    "siren": (I.siren(20.0), [DENSE], lambda s: 2 / (fan(s) * 400), REAL),
    "siren first": (I.siren(first=True), [(3, 400)], lambda s: 1 / (3 * fan(s) ** 2), REAL),
    "gpt2": (I.gpt2(), [DENSE], lambda s: 4e-4, REAL),
    "gpt2 residual": (I.gpt2(blocks=8), [DENSE], lambda s: 4e-4 / 16, REAL),
    "deepnorm encoder": (I.deepnorm(6), [DENSE], lambda s: 48**-0.5 / avg(s), REAL),
    "deepnorm both": (
        I.deepnorm(6, 4, part="decoder"), [DENSE], lambda s: 48**-0.5 / avg(s), REAL,
    ),
    "deepnorm query": (I.deepnorm(6, query_key=True), [DENSE], lambda s: 1 / avg(s), REAL),
    "t_fixup encoder": (I.t_fixup(6), [DENSE], lambda s: 0.67**2 * 6**-0.5 / avg(s), REAL),
    "t_fixup decoder": (I.t_fixup(6, "decoder"), [DENSE], lambda s: 54**-0.5 / avg(s), REAL),
    "t_fixup embedding": (I.t_fixup(6, "embedding"), [(70, 32)], lambda s: 54**-0.5 / s[-1], REAL),
    "fixup": (I.fixup(9, 3), [CONV], lambda s: 2 * 9**-0.5 / fan(s), REAL),
    "mup hidden": (I.mup(), [DENSE], lambda s: 1 / fan(s), REAL),
    "mup output": (I.mup("output", 15), [DENSE], lambda s: 15 / fan(s) ** 2, REAL),
    "spectral_mup": (I.spectral_mup(), [DENSE, (40, 60)], lambda s: min(1, s[1] / s[0]) / s[0], REAL),
    "combined_fan": (I.combined_fan(20), [DENSE], lambda s: 1 / (fan(s) + 20), REAL),
    "transfer_head": (I.transfer_head(H).kernel, [DENSE], lambda s: 0.01 / np.mean((H**2).sum(1)), REAL),
    "optimistic_head": (I.optimistic_head(3.0, sigma_w=0.2).kernel, [DENSE], lambda s: 0.04 / fan(s), REAL),
    "sparse": (I.sparse(7, 1.5), [DENSE, CONV], lambda s: 2.25 / fan(s), REAL),
    "mirrored": (I.mirrored(I.FanIn(1.0), -2), [DENSE], lambda s: 2 / fan(s), ALL),
}  # fmt: skip
# mean square of the entries, not a sample of anything: exact in every draw
EXACT = {
    "orthogonal": (I.orthogonal(1.5), [DENSE, DENSE[::-1], CONV, STACK], lambda s: 2.25 / least(s), ALL),
    "scaled_orthogonal": (I.scaled_orthogonal(1.5), [DENSE, DENSE[::-1], CONV], lambda s: 2.25 / fan(s), ALL),
    "delta_orthogonal": (
        I.delta_orthogonal(), [CONV, (3, 3, 20, 12), (4, 2, 8, 8)],
        lambda s: 1 / (max(s[-2:]) * math.prod(s[:-2])), ALL,
    ),
    "delta_orthogonal keeps q": (
        I.delta_orthogonal(keeps_q=True), [CONV], lambda s: 1 / (s[-2] * math.prod(s[:-2])), REAL,
    ),
    "spectral_mup orthogonal": (
        I.spectral_mup(distribution="orthogonal"), [DENSE, (40, 60)], lambda s: min(1, s[1] / s[0]) / s[0], REAL,
    ),
    "looks_linear": (I.looks_linear(), [DENSE], lambda s: 2 / least(s), ALL),
    "identity": (I.identity(2.0), [DENSE, DENSE[::-1]], lambda s: 4 / max(s), ALL),
    "dirac": (I.dirac(2), [(3, 3, 4, 12)], lambda s: 8 / math.prod(s), ALL),
    "log_prior_bias": (I.log_prior_bias([0.5, 0.5]), [(2,)], lambda s: math.log(2) ** 2, REAL),
    "forget_gate_bias": (I.forget_gate_bias(3.0), [(16,)], lambda s: 9 / 4, REAL),
    "optimistic bias": (I.optimistic_head(3.0, sigma_w=0.2).bias, [(5,)], lambda s: 3.6**2, REAL),
}  # fmt: skip
JAX = ["constant", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "kaiming_normal", "kaiming_uniform",
       "lecun_normal", "lecun_uniform", "normal", "ones", "truncated_normal", "uniform", "variance_scaling",
       "xavier_normal", "xavier_uniform", "zeros"]  # fmt: skip
FACTORIES = ["critical", "critical_bias", "variance_preserving", "orthogonal", "scaled_orthogonal", "delta_orthogonal",
             "identity", "dirac", "sparse", "mirrored", "looks_linear", "symmetric_uniform", "exact_truncated_normal",
             "torch_default", "torch_default_bias", "siren", "gpt2", "deepnorm", "t_fixup", "fixup", "mup",
             "spectral_mup", "combined_fan", "log_prior_bias", "optimistic_head", "transfer_head", "center_bias",
             "forget_gate_bias"]  # fmt: skip


def cases(table):
    return [pytest.param(*row, shape, id=f"{name} {shape}") for name, row in table.items() for shape in row[1]]


def drawn(init, shapes, dtypes, shape):
    """One draw for each dtype, of further shapes in float32 alone; one program, since compiling is what costs."""
    dtypes = dtypes if shape == shapes[0] else [jnp.float32]
    draws = jax.jit(lambda key: [init(key, shape, dtype) for dtype in dtypes])(jax.random.key(0))
    return zip(dtypes, draws, strict=True)


def wide(w):
    return np.asarray(w, np.complex128 if jnp.issubdtype(w.dtype, jnp.complexfloating) else np.float64)


@pytest.mark.parametrize(("init", "shapes", "variance", "dtypes", "shape"), cases(RANDOM))
def test_variance_of_random_entries(init, shapes, variance, dtypes, shape):
    for dtype, w in drawn(init, shapes, dtypes, shape):
        assert (w.shape, w.dtype) == (shape, dtype)
        expected = variance(shape)
        squares = np.abs(wide(w)).ravel() ** 2
        # independent squares, in mirrored weights equal in pairs: their own spread gives the standard error
        copies = 2 if hasattr(init, "sign") else 1
        error = np.std(squares) * math.sqrt(copies / squares.size)
        assert abs(squares.mean() - expected) < 4 * error, (dtype, squares.mean() / expected)
        assert abs(wide(w).mean()) < 4 * math.sqrt(expected * copies / squares.size)
        np.testing.assert_allclose(init.std(shape) ** 2, expected, rtol=1e-12)


@pytest.mark.parametrize(("init", "shapes", "variance", "dtypes", "shape"), cases(EXACT))
def test_mean_square_of_structured_weights_is_exact(init, shapes, variance, dtypes, shape):
    for dtype, w in drawn(init, shapes, dtypes, shape):
        assert (w.shape, w.dtype) == (shape, dtype)
        # one rounding of every entry, of either sign; and a QR of up to 12 n eps before it
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.mean(np.abs(wide(w)) ** 2), variance(shape), rtol=max(8 * eps, 1e-14))
        np.testing.assert_allclose(init.std(shape) ** 2, variance(shape), rtol=1e-12)


@pytest.mark.parametrize("name", [*RANDOM, *EXACT])
def test_protocol(name):
    """Keys of both kinds, vmap over keys, jit, eval_shape, default dtype, empty shapes, equality, positional calls."""
    init, shapes, *_ = {**RANDOM, **EXACT}[name]
    shape, key = shapes[0], jax.random.key(3)
    abstract = jax.eval_shape(lambda k: init(k, shape, jnp.bfloat16, None), key)
    assert (abstract.shape, abstract.dtype) == (shape, jnp.bfloat16)
    assert jax.eval_shape(lambda k: init(k, list(shape)), key).dtype == jnp.result_type(float)

    stacked = jax.eval_shape(jax.vmap(lambda k: init(k, shape, jnp.float32)), jax.random.split(key, 2))
    assert stacked.shape == (2, *shape)
    assert jax.eval_shape(lambda k: init(k, shape), jax.random.key_data(key)).shape == shape  # a legacy key
    if not isinstance(init, Pattern):
        empty = (0, *shape[1:])
        assert init(key, empty).shape == empty and init(key, empty, jnp.float16).dtype == jnp.float16
    assert init == init and hash(init) == hash(init)


@pytest.mark.parametrize("name", JAX)
def test_shape_only_schemes_are_jax_own(name):
    assert getattr(I, name) is getattr(jax.nn.initializers, name)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_passed_uncalled_says_so(name):
    x = jnp.ones((1, 4))
    with pytest.raises(ij.InputError, match=rf"{name} in the place of an initializer[\s\S]*{name}\(\.\.\.\)"):
        nn.Dense(4, kernel_init=getattr(I, name), bias_init=getattr(I, name)).init(jax.random.key(0), x)


def test_out_sharding_is_kept():
    mesh = jax.make_mesh((1,), ("rows",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    for init in (I.FanIn(1.0), I.orthogonal(), I.identity()):
        w = init(jax.random.key(0), (4, 4), jnp.float32, sharding)
        assert w.sharding.spec[0] == "rows"
        np.testing.assert_array_equal(w, init(jax.random.key(0), (4, 4), jnp.float32))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(30, 12), (2, 3, 2, 20)])
def test_orthogonality_to_rounding(dtype, shape):
    w = wide(I.orthogonal(2.0)(jax.random.key(1), shape, dtype)).reshape(-1, shape[-1])
    gram = w.conj().T @ w if w.shape[0] >= w.shape[1] else w @ w.conj().T
    # n entries of one rounding each in low precision; LAPACK's QR is good to a few eps sqrt(n)
    assert np.abs(gram - 4 * np.eye(len(gram))).max() < 8 * float(jnp.finfo(dtype).eps) * math.sqrt(len(gram))


@pytest.mark.parametrize(
    "init", [I.FanIn(1.0, "uniform"), I.orthogonal(), I.sparse(3)], ids=["uniform", "qr", "sparse"]
)
def test_draws_are_pure_functions_of_the_key(init):
    """Batched over keys, for legacy keys and in low precision: the same weights, rounded once."""
    keys = jax.random.split(jax.random.key(3), 2)
    w = init(keys[1], (8, 6), jnp.float32)
    # batched QR and fused products round differently
    np.testing.assert_allclose(jax.vmap(lambda k: init(k, (8, 6), jnp.float32))(keys)[1], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(init(jax.random.key_data(keys[1]), (8, 6), jnp.float32), w)
    np.testing.assert_array_equal(init(keys[1], (8, 6), jnp.bfloat16), w.astype(jnp.bfloat16))


def test_orthogonal_is_haar_and_its_column_axis_is_the_one_named():
    draw = jax.jit(jax.vmap(lambda k: I.orthogonal()(k, (3, 3), jnp.float64)))
    draws = draw(jax.random.split(jax.random.key(0), 4000))
    # Haar: E trace = 0 and E trace^2 = 1, each entry of variance 1/3; a QR without signs gives trace -0.6
    trace = np.trace(draws, axis1=1, axis2=2)
    assert abs(trace.mean()) < 4 / math.sqrt(4000) and abs((trace**2).mean() - 1) < 4 * (trace**2).std() / 4000**0.5
    w = I.orthogonal(column_axis=0)(jax.random.key(1), (4, 3, 5), jnp.float64).reshape(4, 15)
    np.testing.assert_allclose(w @ w.T, np.eye(4), atol=1e-14)


@pytest.mark.parametrize("window", [(3,), (4, 2)])
def test_delta_orthogonal_keeps_norms_under_flax_same_padding(window):
    """The tap is where "SAME" padding looks at the position itself, for even windows too."""
    x = jax.random.normal(jax.random.key(0), (2, *(6,) * len(window), 5), jnp.float64)
    for features, kept in ((8, True), (3, False)):
        layer = nn.Conv(features, window, kernel_init=I.delta_orthogonal(), param_dtype=jnp.float64)
        y, variables = layer.init_with_output(jax.random.key(1), x)
        tap = np.asarray(variables["params"]["kernel"])[tuple((n - 1) // 2 for n in window)]
        np.testing.assert_allclose(y, x @ tap, atol=1e-13)
        if kept:
            np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-12)
        else:
            np.testing.assert_allclose(tap.T @ tap, np.eye(3), atol=1e-13)


def test_dirac_copies_each_group():
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 8))
    layer = nn.Conv(16, (3, 3), feature_group_count=2, use_bias=False, kernel_init=I.dirac(2), param_dtype=x.dtype)
    y = layer.init_with_output(jax.random.key(1), x)[0]
    for group in range(2):
        np.testing.assert_array_equal(y[..., 8 * group : 8 * group + 4], x[..., 4 * group : 4 * group + 4])
        assert not y[..., 8 * group + 4 : 8 * group + 8].any()


@pytest.mark.slow
def test_mirrored_network_is_zero_and_its_tangent_kernel_that_of_its_pairs():
    """With scale 2^-1/2: hidden block as the half network's, readout block, a sum over all units, twice as large."""
    x = jax.random.normal(jax.random.key(0), (4, 5))

    def net(width, hidden, readout):
        layers = [nn.Dense(width, kernel_init=hidden, param_dtype=x.dtype), jnp.tanh]
        return nn.Sequential([*layers, nn.Dense(1, kernel_init=readout, param_dtype=x.dtype)])

    base = I.FanIn(1.0)
    whole = net(32, I.mirrored(base, -1, 1), I.mirrored(base, -2, -1, scale=2**-0.5))
    y, variables = whole.init_with_output(jax.random.key(1), x)
    assert jnp.abs(y).max() < 1e-12
    half = jax.tree.map(lambda w: w, variables["params"])
    half["layers_0"] = jax.tree.map(lambda w: w[..., :16], half["layers_0"])
    half["layers_2"] = {**half["layers_2"], "kernel": 2**0.5 * half["layers_2"]["kernel"][:16]}
    small = net(16, base, base)
    for layer, factor in (("layers_0", 1), ("layers_2", 2)):
        kernels = [ij.empirical_ntk(m, params_filter=f"{layer}/kernel")(p, x)
                   for m, p in ((whole, variables["params"]), (small, half))]  # fmt: skip
        np.testing.assert_allclose(kernels[0], factor * kernels[1], rtol=1e-9)


def test_looks_linear_relu_network_is_the_product_of_its_matrices():
    keys = jax.random.split(jax.random.key(0), 12)
    w = [I.looks_linear("first")(keys[0], (20, 40))]
    w += [I.looks_linear()(key, (40, 40)) for key in keys[1:-1]] + [I.looks_linear("last")(keys[-1], (40, 20))]
    x = jax.random.normal(jax.random.key(1), (20,))

    def network(x):
        for kernel in w[:-1]:
            x = relu(x @ kernel)
        return x @ w[-1]

    jacobian = np.asarray(jax.jacobian(network)(x))
    np.testing.assert_allclose(jacobian @ jacobian.T, np.eye(20), atol=1e-10)  # twelve orthogonal factors


def test_heads_give_the_promised_logits():
    head = I.transfer_head(H, variance=0.09, centered=True)
    w = head.kernel(jax.random.key(0), (60, 4000), jnp.float64)
    logits = H @ np.asarray(w) + np.asarray(head.bias.of(w))
    # 4000 independent units; the rows of each are correlated, so the units alone count
    per_unit = np.mean(np.asarray(logits) ** 2, 0)
    assert abs(per_unit.mean() - 0.09) < 4 * per_unit.std() / math.sqrt(4000)
    assert np.abs(logits.mean(0)).max() < 1e-12
    for task, part in I.multitask_heads({"a": H, "b": 3 * H[:, :30]}).items():
        h = H if task == "a" else 3 * H[:, :30]
        np.testing.assert_allclose(part.kernel.scale**2 * np.mean((h**2).sum(1)), 0.01, rtol=1e-12)
    q = I.optimistic_head(5.0, sigma_w=0.5, q=2.0, confidence=2.0).bias(jax.random.key(0), (3,))
    np.testing.assert_allclose(q, 5 + 2 * 0.5 * math.sqrt(2), rtol=1e-7)


def test_priors():
    counts = np.array([5.0, 90.0, 405.0])
    bias = I.log_prior_bias(counts)(jax.random.key(0), (3,), jnp.float64)
    np.testing.assert_allclose(jax.nn.softmax(bias), counts / 500, rtol=1e-12)
    one = I.log_prior_bias(0.01)(jax.random.key(0), (7,), jnp.float64)
    np.testing.assert_allclose(jax.nn.sigmoid(one), 0.01, rtol=1e-12)


def test_center_bias_and_its_trade_off():
    """Centred relu: at sigma_w^2 = 2 pi / (pi - 1) q is kept, the mean is gone, and chi = pi / (pi - 1)."""
    rng = np.random.default_rng(0)
    n, m = 1000, 1000
    h = np.maximum(rng.normal(size=(8, n)), 0)
    sigma_w = math.sqrt(2 * math.pi / (math.pi - 1))
    w = I.FanIn(sigma_w)(jax.random.key(0), (n, m), jnp.float64)
    u = h @ np.asarray(w) + np.asarray(I.center_bias().of(w))
    # rows are independent given h; |h - m|^2 / n fluctuates by sqrt(2.4 / n), 8 rows and m units average little of it
    assert abs((np.asarray(u) ** 2).mean() - 1) < 5 * math.sqrt(3 / (8 * n) + 2 / (8 * m))
    np.testing.assert_allclose(sigma_w**2 * ij.gaussian.moment_prime(relu, 1.0), math.pi / (math.pi - 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (I.deepnorm_scales(18), (36**0.25, 144**-0.25, None, None)),
        (I.deepnorm_scales(0, 100), (None, None, 200**0.25, 800**-0.25)),
        (I.deepnorm_scales(18, 12), (0.81 * (18**4 * 12) ** (1 / 16), 0.87 * (18**4 * 12) ** (-1 / 16),
                                     36**0.25, 144**-0.25)),
    ],
)  # fmt: skip
def test_deepnorm_constants_of_the_paper(scales, expected):
    assert [None if a is None else round(a, 12) for a in scales] == [
        None if b is None else round(b, 12) for b in expected
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: I.orthogonal(-1.0), r"scale=-1\.0"),
        (lambda: I.orthogonal()(jax.random.key(0), (5,)), r"shape \(5,\)[\s\S]*matrix"),
        (lambda: I.delta_orthogonal()(jax.random.key(0), (5, 5)), r"3 to 5 axes[\s\S]*use orthogonal"),
        (lambda: I.identity()(jax.random.key(0), (3, 4, 4)), r"shape \(3, 4, 4\)[\s\S]*dirac"),
        (lambda: I.dirac(3)(jax.random.key(0), (3, 4, 4)), r"groups=3"),
        (lambda: I.sparse(0), r"connections=0"),
        (lambda: I.mirrored(I.FanIn(1.0), sign=0.5), r"sign=0\.5"),
        (lambda: I.mirrored(I.orthogonal), r"base='orthogonal'[\s\S]*call the factory"),
        (lambda: I.mirrored(I.FanIn(1.0))(jax.random.key(0), (4, 5)), r"mirrored along[\s\S]*even"),
        (lambda: I.looks_linear("middle"), r"part='middle'"),
        (lambda: I.symmetric_uniform(math.nan), r"limit=nan"),
        (lambda: I.exact_truncated_normal(-0.1), r"std=-0\.1"),
        (lambda: I.torch_default_bias(0), r"fan_in=0"),
        (lambda: I.siren(0.0), r"omega=0\.0"),
        (lambda: I.gpt2(0), r"blocks=0"),
        (lambda: I.deepnorm(), r"encoder_layers \+ decoder_layers=0"),
        (lambda: I.deepnorm(2, 2), r"part=None[\s\S]*'encoder', 'decoder'"),
        (lambda: I.t_fixup(2, "head"), r"part='head'"),
        (lambda: I.fixup(4, 1), r"layers_in_branch=1"),
        (lambda: I.mup("output"), r"base_fan_in=None"),
        (lambda: I.combined_fan(0), r"other=0"),
        (lambda: I.log_prior_bias([0.2, 0.0]), r"prior=[\s\S]*positive"),
        (lambda: I.log_prior_bias(1.5), r"prior=1\.5"),
        (lambda: I.log_prior_bias([0.2, 0.8])(jax.random.key(0), (3,)), r"shape \(3,\)[\s\S]*2 values"),
        (lambda: I.optimistic_head(math.inf), r"v_max=inf"),
        (lambda: I.transfer_head(np.zeros((3, 4))), r"all zero"),
        (lambda: I.transfer_head(np.full((3, 4), np.nan)), r"not finite"),
        (lambda: I.multitask_heads({}), r"number of tasks=0"),
        (lambda: I.center_bias()(jax.random.key(0), (4,), jnp.float32), r"bias\.of\(kernel\)"),
        (lambda: I.forget_gate_bias(gates="igo"), r"gates='igo'"),
        (lambda: I.forget_gate_bias()(jax.random.key(0), (6,)), r"divisible by 4"),
        (lambda: I.FanIn(1.0)(jax.random.key(0), (4, 4), jnp.int8), r"int8"),
    ],
)  # fmt: skip
def test_bad_settings_get_four_part_errors(call, message):
    with pytest.raises(ij.InputError, match=message) as error:
        call()
    assert all(error.value.parts)
