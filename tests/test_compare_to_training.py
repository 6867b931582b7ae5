"""Real training by optax beside the linearised prediction, at widths where the theory must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import initjax as ij

HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
X = jax.random.normal(jax.random.key(0), (8, 16))
Y = np.sign(np.asarray(X[:, 0] * X[:, 1]))
X_TEST = jax.random.normal(jax.random.key(5), (4, 16))


def relu_net(width):
    dense = lambda n: nn.Dense(n, kernel_init=HE, param_dtype=jnp.float64)  # noqa: E731
    return nn.Sequential([dense(width), nn.relu, dense(1)])


def test_wide_networks_follow_their_linearisation_and_wider_ones_more_closely():
    found = ij.compare_to_training(
        {w: relu_net(w) for w in (128, 2048)}, X, Y, key=jax.random.key(1), steps=200, times=[0, 10, 50, 200],
        x_test=X_TEST,
    )  # fmt: skip
    assert found.widths == (128, 2048) and found.kernel == "full" and found.trained.shape == (2, 4, 8, 1)
    # 0.023, 0.0015, 4e-9 were found at width 2048 from the kernel of infinite width; its own kernel does better at once
    assert found.error[1, 0] < 1e-14 and found.error[1, 1] < 0.023 / 10 and found.error[1, 2] < 0.0015 / 10
    assert found.error[1, 3] < 1e-6
    # 16 times the width: at least the 4 of 1 / sqrt(width)
    assert np.all(found.error[1].max() < found.error[0].max() / 4)
    assert found.test_error[1].max() < found.test_error[0].max() / 4
    assert found.drift[1] < found.drift[0] / 4
    np.testing.assert_allclose(found.learning_rate[1], found.learning_rate[0] / 16, rtol=0.5)  # NTK grows as width
    assert str(found).count("\n") == 3 and "2048" in repr(found)


def test_prediction_from_the_kernel_of_infinite_width_holds_within_its_deviation():
    model = relu_net(2048)
    ntk = ij.kernel_fn(model, X)(X).ntk
    rate = 0.2 * float(ij.max_learning_rate(ntk, n=8))
    found = ij.compare_to_training(model, X, Y, key=jax.random.key(2), times=[0, 10, 50, 200], learning_rate=rate)
    run = ij.trajectory(ntk, Y[:, None], found.times, learning_rate=rate, f0=found.trained[0, 0], n=8)
    error = np.linalg.norm(found.trained[0] - run.train, axis=(1, 2)) / np.linalg.norm(Y[:, None] - found.trained[0, 0])
    # kernels of this width are off by 2 / sqrt(2048) = 0.044 relative, and s e^-s <= 0.37 of that reaches the outputs
    assert error.max() < 0.044 and found.error.max() < error[1] / 10


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_divergence_above_and_convergence_below_the_largest_learning_rate(kind):
    model = nn.Dense(1, param_dtype=jnp.float64) if kind == "linear" else relu_net(2048)
    params = model.init(jax.random.key(1), X)["params"]
    limit = float(ij.max_learning_rate(ij.empirical_ntk(model)(params, X), n=8))
    times = np.arange(0, 301, 10)
    losses = []
    for factor in (0.99, 1.01):
        with pytest.warns(UserWarning, match="above the largest stable one") if factor > 1 else no_warning():
            found = ij.compare_to_training(
                model, X, Y, key=jax.random.key(1), times=times, learning_rate=factor * limit
            )
        losses.append(found.trained_loss[0])
    below, above = losses
    assert below[-1] < 0.1 * below[0] and np.all(np.diff(below) < 0)
    # 1.02^2t along the largest eigenvector. The relu network follows until its kernel gives way (Lewkowycz et al. 2020)
    assert above[5] > 0.8 * 1.02**80 * above[1]
    if kind == "linear":
        np.testing.assert_allclose(above[-1] / above[-2], 1.02**20, rtol=1e-6)  # the others have decayed


def no_warning():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("settings", [dict(momentum=0.8), dict(momentum=0.8, nesterov=True, weight_decay=0.3)])
def test_a_model_that_is_linear_in_its_parameters_is_predicted_exactly(settings):
    class Linear(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(16, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.layer(jnp.sin(x))

    y = np.stack([Y, -0.3 * Y], 1)
    model = Linear(nnx.Rngs(0))
    found = ij.compare_to_training(
        model, X, y, key=jax.random.key(0), steps=60, learning_rate=0.05, x_test=X_TEST, **settings
    )
    # sixty steps in float64
    assert found.error.max() < 1e-12 and found.test_error.max() < 1e-12 and found.drift[0] < 1e-14
    assert found.times[0] == 0 and found.times[-1] == 60 and found.widths == (None,)


def test_comparison_draws_itself():
    pytest.importorskip("matplotlib")
    models = {w: relu_net(w) for w in (8, 32)}
    found = ij.compare_to_training(models, X, Y, key=jax.random.key(1), steps=5)
    left, right = found.plot().axes
    assert left.get_ylabel() == "training loss" and right.get_xlabel() == "width"
    single = ij.compare_to_training(models[8], X, Y, key=jax.random.key(1), steps=5).plot()
    assert single.axes[1].get_xlabel() == "steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), r"steps=0[\s\S]*time_to_fit"),
        (dict(times=[3, 2]), r"times=[\s\S]*each larger"),
        (dict(y=np.ones(5)), r"targets of shape \(5,\)[\s\S]*\(8, 1\) or \(8,\)"),
        (dict(learning_rate=-1.0), r"learning_rate=-1.0"),
        (dict(learning_rate=1e9, steps=60), r"overflow|NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:learning_rate")
def test_bad_requests_get_four_part_errors(change, message):
    given = dict(x=X, y=Y, key=jax.random.key(0)) | change
    with pytest.raises(ij.InputError, match=message) as error:
        ij.compare_to_training(relu_net(8), given.pop("x"), given.pop("y"), **given)
    assert all(error.value.parts)
