"""Inits that are learned: one scale for each weight, by gradient descent on what the first steps of training do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.initializers.protocol import count
from initjax.initializers.protocol import scale as checked_scale
from initjax.reinit.tree import unpack


class History(NamedTuple):
    """What happened while scales were learned.

    Attributes
    ----------
    objective : (steps,), the quantity that is minimized.
    gradient_norm : (steps,), norm of the loss's gradient.
    scales : path -> (steps,), by which each weight has been multiplied after every step.
    """

    objective: np.ndarray
    gradient_norm: np.ndarray
    scales: dict[str, np.ndarray]


def metainit(
    params: Any,
    loss: Callable[[Any], Any],
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    progress: bool = False,
) -> tuple[Any, History]:
    """Scale weights so that the gradient changes little along itself: MetaInit's gradient quotient.

    Minimizes the mean over parameters of |(g - H g) / (g + eps sign g) - 1| = |H g| / |g + eps|, over the norm of every
    weight of two axes or more, by signed descent with momentum as published.

    Parameters
    ----------
    params : tree of parameters, as in `reinitialize` (nnx: an nnx.State).
    loss : `loss(params) -> scalar` on one batch (random inputs and labels do, as in the paper), twice differentiable.
    steps, learning_rate, momentum : of the descent on norms.
    progress : show a progress bar (rich).

    Returns
    -------
    The scaled tree, and a History of the gradient quotient.

    Raises
    ------
    InputError : a loss that is not one finite number, no weight of two axes.

    Accuracy
    --------
    That of the descent; the best scales met are returned.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> def loss(p):
    ...     return jnp.mean((jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) - y) ** 2)
    >>> params = {k: 3 * jax.random.normal(jax.random.key(i), (8, 8)) for i, k in enumerate("ab")}
    >>> params, history = ij.metainit(params, loss, steps=50)
    >>> bool(history.objective[-1] < 0.5 * history.objective[0])
    True

    References
    ----------
    Dauphin, Schoenholz 2019 (MetaInit: initializing learning by learning to initialize, NeurIPS), eq. 2, algorithm 1.
    """
    leaves, repack = unpack(params)
    chosen = _weights(leaves)
    values = [leaf.value for leaf in leaves]
    rate, beta = checked_scale(learning_rate, "learning_rate", positive=True), checked_scale(momentum, "momentum")

    def of(tree_values):
        return loss(repack(list(tree_values)))

    def scaled(logs):
        return [v * jnp.exp(logs[i]).astype(v.dtype) if i in logs else v for i, v in enumerate(values)]

    def quotient(logs):
        at = scaled(logs)
        gradient, product = jax.jvp(jax.grad(of), (at,), (jax.grad(of)(at),))
        sizes, total = [], 0
        for g, hg in zip(gradient, product, strict=True):
            sign = jnp.where(g >= 0, jnp.ones_like(g), -jnp.ones_like(g))
            below = g + jnp.asarray(1e-5, g.dtype) * sign
            sizes.append(jnp.sum(jnp.abs((g - hg) / below - jnp.ones_like(g))))
            total += g.size
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient))
        return sum(sizes) / total, norm

    step = jax.jit(jax.value_and_grad(quotient, has_aux=True))
    logs = {i: jnp.zeros((), jnp.float32) for i in chosen}
    speed = dict.fromkeys(logs, 0.0)
    best, history = (np.inf, logs), []
    for _ in _bar(count(steps, "steps"), "MetaInit", progress):
        (objective, norm), slope = step(logs)
        _check(objective, "gradient quotient")
        if float(objective) < best[0]:
            best = (float(objective), logs)
        history.append((float(objective), float(norm), {i: float(log) for i, log in logs.items()}))
        for i in logs:
            speed[i] = beta * speed[i] - rate / 10 * float(np.sign(slope[i]))
        logs = {i: log + jnp.asarray(speed[i], log.dtype) for i, log in logs.items()}
    return repack([v.astype(o.dtype) for v, o in zip(scaled(best[1]), values, strict=True)]), _history(history, leaves)


def gradinit(
    params: Any,
    loss: Callable[[Any, Any], Any],
    batches: tuple[Any, Any],
    *,
    step_size: float = 0.1,
    max_norm: float = 1.0,
    optimizer: str = "sgd",
    steps: int = 200,
    learning_rate: float = 0.01,
    progress: bool = False,
) -> tuple[Any, History]:
    """Scale weights so that the very first optimizer step lowers the loss most, at a bounded gradient: GradInit.

    Minimizes loss(theta - step_size A(g)) over one scale m of every parameter, g the gradient on one batch and the loss
    on another; while |g| exceeds `max_norm`, |g| itself. A(g) is g for "sgd", sign g for "adam". Scales stay
    above 0.01.

    Parameters
    ----------
    params : tree of parameters, as in `reinitialize` (nnx: an nnx.State).
    loss : `loss(params, batch) -> scalar`, twice differentiable.
    batches : the batch of the gradient and that of the loss after the step; the paper lets them share half.
    step_size, optimizer : of the training that will follow; "sgd" or "adam".
    max_norm : bound on the gradient: its 2-norm for "sgd", 1-norm for "adam".
    steps, learning_rate : of Adam on the scales (optax).
    progress : show a progress bar (rich).

    Returns
    -------
    The scaled tree, and a History of the loss after the step.

    Raises
    ------
    InputError : a loss that is not one finite number, an unknown optimizer.

    Accuracy
    --------
    That of the descent.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 32, 8))
    >>> def loss(p, batch):
    ...     return jnp.mean((jnp.tanh(batch[0] @ p["a"]) @ p["b"] - batch[1]) ** 2)
    >>> params = {k: 3 * jax.random.normal(jax.random.key(i), (8, 8)) for i, k in enumerate("ab")}
    >>> halves = (x[:16], y[:16]), (x[16:], y[16:])
    >>> params, history = ij.gradinit(params, loss, halves, steps=60, learning_rate=0.05)
    >>> bool(history.objective[-1] < 0.5 * history.objective[0])
    True

    References
    ----------
    Zhu et al. 2021 (arXiv:2102.08098), eq. 1 and algorithm 1.
    """
    import optax

    from initjax.initializers.protocol import choice

    choice(optimizer, "optimizer", ("sgd", "adam"), "the first step is along the gradient or its sign")
    eta = checked_scale(step_size, "step_size", positive=True)
    bound = checked_scale(max_norm, "max_norm", positive=True)
    leaves, repack = unpack(params)
    values = [leaf.value for leaf in leaves]

    def scaled(scales):
        return [v * s.astype(v.dtype) for v, s in zip(values, scales, strict=True)]

    def of(tree_values, batch):
        return loss(repack(list(tree_values)), batch)

    def objective(scales):
        at = scaled(scales)
        gradient = jax.grad(of)(at, batches[0])
        if optimizer == "sgd":
            norm, along = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient)), gradient
        else:
            norm, along = sum(jnp.sum(jnp.abs(g)) for g in gradient), [jnp.sign(g) for g in gradient]
        after = of([v - jnp.asarray(eta, v.dtype) * a for v, a in zip(at, along, strict=True)], batches[1])
        norm = jnp.asarray(norm)
        return jnp.where(norm > jnp.asarray(bound, norm.dtype), norm.astype(after.dtype), after), (after, norm)

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    scales = [jnp.ones((), jnp.float32) for _ in values]
    descent = optax.adam(checked_scale(learning_rate, "learning_rate", positive=True))
    state, history = descent.init(scales), []
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to integer powers
        for _ in _bar(count(steps, "steps"), "GradInit", progress):
            (_, (after, norm)), slope = step(scales)
            _check(after, "loss after the step")
            history.append((float(after), float(norm), {i: float(np.log(s)) for i, s in enumerate(scales)}))
            updates, state = descent.update(slope, state)
            scales = [jnp.maximum(s + u, 0.01) for s, u in zip(scales, jax.tree.leaves(updates), strict=True)]
    return repack(scaled(scales)), _history(history, leaves)


def _weights(leaves) -> list[int]:
    chosen = [i for i, leaf in enumerate(leaves) if len(leaf.value.shape) >= 2]
    if not chosen:
        raise InputError(
            f"params {[leaf.path for leaf in leaves]}, none with two axes or more",
            "a tree with weights",
            "the norms of weights are learned; biases and gains keep theirs",
            "give the parameters of the whole model",
        )
    return chosen


def _check(value: Any, what: str) -> None:
    if jnp.ndim(value) or not bool(jnp.isfinite(value)):
        raise InputError(
            f"{what} = {value}",
            "one finite number",
            "scales are learned by its gradient",
            "start from an init at which the loss is finite: ij.tune, or smaller weights",
        )


def _history(history, leaves) -> History:
    paths = {i: leaves[i].path for i in history[0][2]}
    scales = {path: np.exp([h[2][i] for h in history]) for i, path in paths.items()}
    return History(np.array([h[0] for h in history]), np.array([h[1] for h in history]), scales)


def _bar(steps: int, name: str, progress: bool):
    if not progress:
        return range(steps)
    from rich.progress import track

    return track(range(steps), description=name)
