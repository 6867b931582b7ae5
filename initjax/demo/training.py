"""Train every initialization alike: the same optimizer, learning rates, batches and number of steps.

All networks of one call run side by side in one compiled program, so a comparison costs one compilation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from initjax.demo.data import Digits

MOMENTUM = 0.9


class Curves(NamedTuple):
    """What training did.

    Attributes
    ----------
    steps : number of optimizer steps done at each evaluation; shape `(k,)`.
    loss : mean training cross-entropy since the evaluation before; shape `(setups, learning rates, seeds, k)`.
    accuracy : test accuracy, a fraction; same shape as `loss`.
    learning_rates : shape `(learning rates,)`.
    """

    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    learning_rates: np.ndarray


def train(
    models: Sequence[Any],
    data: Digits,
    *,
    learning_rates: Sequence[float],
    seeds: int,
    steps: int,
    batch: int,
    evaluations: int,
    key: jax.Array,
    advance: Callable[[int], None] = lambda steps: None,
) -> Curves:
    """Train each model from `seeds` draws of its own initializers, at every learning rate.

    Parameters
    ----------
    models : linen modules that differ in their initializers only.
    data : images and labels.
    learning_rates : of stochastic gradient descent with momentum 0.9.
    seeds : draws of the weights; draw s uses the same key for every model.
    steps, batch : optimizer steps, and images in each step; every network sees the same batches.
    evaluations : how often the test accuracy is taken; divides `steps`.
    key : for weights and batches.
    advance : called with the number of steps done since the last call.

    Returns
    -------
    Curves
    """
    weights_key, batch_key = jax.random.split(key)
    x = jnp.asarray(data.x_train[:1])
    keys = jax.random.split(weights_key, seeds)
    # Not jitted: the layers share a few small programs, where one program of all layers would compile for seconds.
    drawn = [jax.vmap(model.init, (0, None))(keys, x) for model in models]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    apply = models[0].apply
    x_test, y_test = jnp.asarray(data.x_test), jnp.asarray(data.y_test)

    def loss_fn(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()

    def stretch(params, state, rate, images, labels):
        optimizer = optax.sgd(rate, momentum=MOMENTUM)

        def step(carry, some):
            params, state = carry
            loss, gradient = jax.value_and_grad(loss_fn)(params, *some)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), (images, labels))
        guess = jnp.argmax(apply(params, x_test), axis=-1).astype(y_test.dtype)
        accuracy = jnp.mean((guess == y_test).astype(jnp.float32))
        return params, state, losses.mean(), accuracy

    rates = np.asarray(learning_rates, np.float32)
    params = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:, None], (leaf.shape[0], len(rates), *leaf.shape[1:])), params
    )
    each = jax.vmap(stretch, (0, 0, None, None, None))  # seeds
    each = jax.vmap(each, (0, 0, 0, None, None))  # learning rates
    each = jax.jit(jax.vmap(each, (0, 0, None, None, None)), donate_argnums=(0, 1))  # models
    state = jax.tree.map(jnp.zeros_like, optax.sgd(rates[0], momentum=MOMENTUM).init(params))

    per = steps // evaluations
    images, labels = _batches(data, steps, batch, batch_key)
    loss, accuracy = [], []
    for start in range(0, per * evaluations, per):
        some = slice(start, start + per)
        params, state, *numbers = each(params, state, rates, images[some], labels[some])
        loss.append(np.asarray(numbers[0]))
        accuracy.append(np.asarray(numbers[1]))
        advance(per)
    return Curves(per * np.arange(1, evaluations + 1), np.stack(loss, -1), np.stack(accuracy, -1), rates)


def _batches(data: Digits, steps: int, batch: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the training set anew for each pass, and cut it into full batches."""
    shuffle = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    per_pass = len(data.x_train) // batch
    passes = -(-steps // per_pass)
    order = np.concatenate([shuffle.permutation(len(data.x_train))[: per_pass * batch] for _ in range(passes)])
    order = order[: steps * batch].reshape(steps, batch)
    return data.x_train[order], data.y_train[order]
