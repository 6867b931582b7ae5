"""The linearised network's training curve beside that of the network itself, and how far its kernel moved.

A network follows its linearisation as long as its tangent kernel stays where it was; both the gap and the kernel's
drift fall with width, as 1 / sqrt(width) or faster (Lee et al. 2019, arXiv:1902.06720; Chizat, Oyallon, Bach 2019,
arXiv:1812.07956). Here both are measured for one draw of each network.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from initjax.empirical.network import examples
from initjax.empirical.ntk import empirical_ntk
from initjax.errors import InputError
from initjax.spectrum import max_learning_rate, trajectory
from initjax.trace.flax import as_functional

# All pairs of outputs are kept up to this many rows; beyond, one kernel for each output, as at infinite width.
PAIRS = 2048


@dataclasses.dataclass(frozen=True)
class TrainingComparison:
    """Predicted and real training of W networks (one, or one for each width) at T times. NumPy float64.

    Attributes
    ----------
    widths : (W,), the keys of the mapping of models; None for a single model.
    times : (T,), optimiser steps.
    learning_rate : (W,), the rate used for each.
    predicted, trained : (W, T, n, k), outputs on the training inputs, of the linearised network and of the network.
    predicted_test, trained_test : (W, T, m, k), on the test inputs, or None.
    predicted_loss, trained_loss : (W, T), 1/(2n) sum (f - y)^2.
    error, test_error : (W, T), |trained - predicted| / |y - f_0| in Euclidean norm per entry; test_error None without
        test inputs.
    drift : (W,), |Theta_T - Theta_0| / |Theta_0| in Frobenius norm, of the kernel on the training inputs.
    kernel : "full" where the prediction used all pairs of outputs, "trace" where the mean over outputs.
    """

    widths: tuple
    times: np.ndarray
    learning_rate: np.ndarray
    predicted: np.ndarray
    trained: np.ndarray
    predicted_test: Any
    trained_test: Any
    predicted_loss: np.ndarray
    trained_loss: np.ndarray
    error: np.ndarray
    test_error: Any
    drift: np.ndarray
    kernel: str

    def __repr__(self):
        head = f"TrainingComparison, {self.times[-1]} steps (kernel: {self.kernel})"
        lines = [head, f"{'width':>8}  {'rate':>9}  {'loss':>9}  {'predicted':>9}  {'largest error':>13}  {'drift':>8}"]
        for i, width in enumerate(self.widths):
            name, losses = "-" if width is None else str(width), (self.trained_loss[i, -1], self.predicted_loss[i, -1])
            numbers = f"{losses[0]:9.3g}  {losses[1]:9.3g}  {self.error[i].max():13.3g}  {self.drift[i]:8.3g}"
            lines.append(f"{name:>8}  {self.learning_rate[i]:9.3g}  {numbers}")
        return "\n".join(lines)

    def plot(self) -> Any:
        """Draw loss curves, predicted as lines and trained as points, beside the error over time or over widths.

        Returns
        -------
        A matplotlib figure with two axes. Needs matplotlib (extra "plots").
        """
        from initjax.drawing import blank_figure

        figure = blank_figure(10, 3.8)
        left, right = figure.subplots(1, 2)
        for i, width in enumerate(self.widths):
            label = "network" if width is None else f"width {width}"
            left.plot(self.times, self.predicted_loss[i], color=f"C{i}")
            left.plot(self.times, self.trained_loss[i], ".", color=f"C{i}", label=label)
        left.set(xscale="symlog", yscale="log", xlabel="steps", ylabel="training loss", title="lines: linearised")
        left.legend()
        numbers = [width for width in self.widths if isinstance(width, int | float | np.number)]
        if len(numbers) == len(self.widths) > 1:
            at = np.array(numbers, np.float64)
            right.loglog(at, self.drift, "o-", label="drift of the kernel")
            right.loglog(at, self.error.max(1), "s-", label="largest error")
            right.loglog(at, self.drift[0] * np.sqrt(at[0] / at), "k:", label="1 / sqrt(width)")
            right.set(xlabel="width", ylabel="relative to the start")
        else:
            for i, width in enumerate(self.widths):
                right.plot(self.times, self.error[i], label="error" if width is None else str(width))
            right.set(xscale="symlog", yscale="log", xlabel="steps", ylabel="error, relative to the start")
        right.legend()
        return figure


def compare_to_training(
    model: Any,
    x: Any,
    y: Any,
    *,
    key: Any,
    steps: int = 200,
    times: Any = None,
    learning_rate: float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    x_test: Any = None,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
    memory: Any = None,
) -> TrainingComparison:
    r"""Train a network on the squared error with optax, and hold the linearised network's curve beside it.

    One draw of the weights, its tangent kernel, the prediction of `trajectory` from that kernel; then full-batch
    `optax.sgd` on 1/(2n) sum (f - y)^2 from the same weights, and the kernel again.

    Parameters
    ----------
    model : any model `measure` takes, or a mapping {width: model} for a study over widths, each with the same key.
    x, y : n training inputs, and targets of the shape of the outputs, (n,) or (n, k).
    key : random key of the weights.
    steps : optimiser steps.
    times : steps at which outputs are compared, ascending; None for up to 33 between 0 and `steps`, denser early on.
    learning_rate : of optax.sgd; None for a fifth of the largest stable one, `max_learning_rate`, of each network.
    momentum, nesterov, weight_decay : as in `optax.sgd`, and `optax.add_decayed_weights` before it (toward zero).
    x_test : m inputs on which outputs are compared too.
    apply_kwargs, rngs : as in `kernel_fn`.
    memory : as in `empirical_ntk`.

    Returns
    -------
    TrainingComparison: curves, error, drift of the kernel, `.plot()`.

    Raises
    ------
    InputError : inputs, targets or a model that do not fit; steps that are no positive integer; training that ends in
        NaN or infinity.

    Warns
    -----
    UserWarning : a learning rate above the largest stable one.

    Accuracy
    --------
    The prediction is exact for the linearised network, up to the rounding of its kernel in the model's precision. The
    error is what is measured here: O(1 / sqrt(width)).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> models = {w: nn.Sequential([nn.Dense(w), nn.tanh, nn.Dense(1)]) for w in (16, 1024)}
    >>> x = jax.random.normal(jax.random.key(0), (6, 10))
    >>> y = jnp.where(x[:, :1] > 0, 1.0, -1.0)
    >>> found = ij.compare_to_training(models, x, y, key=jax.random.key(1), steps=50)
    >>> bool(found.error[1].max() < found.error[0].max() / 2), bool(found.drift[1] < found.drift[0] / 2)
    (True, True)

    References
    ----------
    Lee et al. 2019 (arXiv:1902.06720), theorem 2.1 and figures 1-4.
    """
    n = examples(x, "x")
    x = jax.tree.map(jnp.asarray, x)
    if x_test is not None:
        examples(x_test, "x_test")
        x_test = jax.tree.map(jnp.asarray, x_test)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(
            f"steps={steps!r}",
            "an integer >= 1",
            "it is the number of optimiser steps",
            "ij.time_to_fit tells how many the linearised network needs",
        )
    if times is None:
        times = np.unique(np.round(np.geomspace(1, steps + 1, 33)).astype(int) - 1)
    times = np.asarray(times)
    if (
        times.ndim != 1
        or not len(times)
        or np.any(times != np.round(times))
        or times[0] < 0
        or np.any(np.diff(times) <= 0)
    ):
        raise InputError(
            f"times={times!r}",
            "whole numbers >= 0, each larger than the one before",
            "outputs are compared after so many steps",
            "leave times out for 33 of them",
        )
    models = dict(model) if isinstance(model, Mapping) else {None: model}
    runs = []
    for one in models.values():
        functional = as_functional(one, x, apply_kwargs=apply_kwargs, rngs=rngs)
        settings: dict[str, Any] = dict(momentum=momentum, nesterov=nesterov, weight_decay=float(weight_decay))
        runs.append(_compare(functional, x, y, n, key, times.astype(int), learning_rate, settings, x_test, memory))
    join = lambda name: None if runs[0][name] is None else np.stack([run[name] for run in runs])  # noqa: E731
    fields = [field.name for field in dataclasses.fields(TrainingComparison)]
    arrays: dict[str, Any] = {name: join(name) for name in fields if name not in ("widths", "times", "kernel")}
    kinds = {run["kernel"] for run in runs}
    return TrainingComparison(
        widths=tuple(models), times=times.astype(int), kernel=" and ".join(sorted(kinds)), **arrays
    )


def _compare(functional, x, y, n, key, times, learning_rate, settings, x_test, memory):
    apply = functional.apply
    params = functional.init(key)
    outputs = jax.jit(lambda p, inputs: apply(p, inputs).reshape(jax.tree.leaves(inputs)[0].shape[0], -1))
    first = outputs(params, x)
    k = first.shape[1]
    targets = np.asarray(y, np.float64)
    if targets.ndim not in (1, 2) or targets.reshape(len(targets), -1).shape != first.shape:
        raise InputError(
            f"targets of shape {targets.shape} for outputs of shape {functional.abstract_output.shape}",
            f"({n}, {k})" + (f" or ({n},)" if k == 1 else ""),
            "the squared error compares output with target",
            "give one target for each output; classes one-hot",
        )
    targets = targets.reshape(n, k)
    kind = "full" if n * k <= PAIRS else "trace"
    ntk_fn = empirical_ntk(apply, outputs=kind, memory=memory)
    theta = np.asarray(ntk_fn(params, x), np.float64)
    flat = theta.transpose(0, 2, 1, 3).reshape(n * k, n * k) if kind == "full" else theta
    if learning_rate is None:
        learning_rate = 0.2 * float(max_learning_rate(flat, n, **settings))
    test: dict[str, Any] = {}
    if x_test is not None:
        test = dict(ntk_test_train=np.asarray(ntk_fn(params, x_test, x), np.float64), f0_test=outputs(params, x_test))
    if settings["weight_decay"]:
        along = jax.jit(lambda inputs: jax.jvp(lambda p: outputs(p, inputs), (params,), (params,))[1])
        test |= dict(decay_toward="zero", radial=along(x))
        test |= {} if x_test is None else dict(radial_test=along(x_test))
    predicted = trajectory(
        theta, targets, times, learning_rate=learning_rate, f0=np.asarray(first), n=n, **settings, **test
    )
    trained, trained_test, params = _train(outputs, params, x, targets, times, learning_rate, settings, x_test)
    after = np.asarray(ntk_fn(params, x), np.float64)
    scale = np.linalg.norm(targets - np.asarray(first, np.float64)) / np.sqrt(n * k)
    rms = lambda a: np.sqrt(np.mean(np.square(a), (1, 2))) / scale  # noqa: E731
    return dict(
        learning_rate=np.float64(learning_rate),
        predicted=predicted.train,
        trained=trained,
        predicted_test=predicted.test,
        trained_test=trained_test,
        predicted_loss=predicted.loss,
        trained_loss=((trained - targets) ** 2).sum((1, 2)) / (2 * n),
        error=rms(trained - predicted.train),
        test_error=None if x_test is None else rms(trained_test - predicted.test),
        drift=np.linalg.norm(after - theta) / np.linalg.norm(theta),
        kernel=kind,
    )


def _train(outputs, params, x, targets, times, learning_rate, settings, x_test):
    """Outputs of the network itself at `times`, on training and test inputs, and its last parameters."""
    optimizer = optax.chain(
        optax.add_decayed_weights(settings["weight_decay"]),
        optax.sgd(learning_rate, momentum=settings["momentum"] or None, nesterov=settings["nesterov"]),
    )
    labels = jnp.asarray(targets)

    @jax.jit
    def step(params, state):
        def loss(params):
            out = outputs(params, x)
            return 0.5 * jnp.sum((out - labels.astype(out.dtype)) ** 2) / len(targets)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, done, train, test = optimizer.init(params), 0, [], []
    # not one loop in XLA, whose CPU loops run convolutions on one core
    for time in times:
        for _ in range(int(time) - done):
            params, state = step(params, state)
        done = int(time)
        train.append(np.asarray(outputs(params, x), np.float64))
        if x_test is not None:
            test.append(np.asarray(outputs(params, x_test), np.float64))
        if not np.all(np.isfinite(train[-1])):
            raise InputError(
                f"training that has NaN or infinite outputs after {done} steps at the rate {learning_rate:.4g}",
                "a network that trains at this rate",
                "above the largest stable rate gradient descent diverges, for this network and its linearisation alike",
                "leave learning_rate out for a fifth of the largest stable one",
            )
    return np.stack(train), np.stack(test) if test else None, params
