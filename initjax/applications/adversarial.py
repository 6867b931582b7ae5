r"""How sensitive a network is to its input: the expected squared input gradient, and what a scale of the weights does.

    E|grad_x f|^2 = sw2 prod_l chi_l,    chi_l = sw2 E phi'(sqrt(q_l) z)^2,
the product over all layers of the growth of a small perturbation. Scaling every variance by alpha multiplies |grad_x f|
by alpha^(L/2), L the number of weight matrices with the readout, for homogeneous networks without biases, and then
exactly in every draw. Elsewhere chi depends on q and q on alpha: growth per layer is chi(q*(alpha)), far less.

Sources: Poole et al. 2016 (arXiv:1606.05340), Schoenholz et al. 2017 (arXiv:1611.01232) for the product of chi;
Goodfellow, Shlens, Szegedy 2015 (arXiv:1412.6572) for FGSM.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.applications.models import check_count, check_positive, drawn, matrices, scaled
from initjax.errors import InputError, UnsupportedLayerError
from initjax.infinite.kernels import kernel_fn


@dataclasses.dataclass(frozen=True)
class InputGradient:
    """E|grad_x f|^2 of one output unit at n inputs. Made by `input_gradient`.

    Attributes
    ----------
    predicted : (n,), at infinite width: the product of the layers' chi.
    chi : layer name -> (n,), its factors.
    measured, standard_error : (n,), mean over random networks of the model's own width.
    draws : how many.
    """

    predicted: np.ndarray
    chi: dict[str, np.ndarray]
    measured: np.ndarray
    standard_error: np.ndarray
    draws: int


def input_gradient(
    model: Any, x: Any, *, key: Any = None, draws: int = 256, apply_kwargs: dict | None = None
) -> InputGradient:
    r"""Expected squared norm of the gradient of an output with respect to the input, predicted and measured.

    Parameters
    ----------
    model : linen module, nnx factory or pair; outputs are alike at initialization, the first one is measured.
    x : inputs (n, ...).
    key, draws : of the random networks that are measured; key None for a fixed one.
    apply_kwargs : further arguments of every call.

    Returns
    -------
    InputGradient, summed over input entries; divide by d for the mean over coordinates.

    Raises
    ------
    UnsupportedLayerError : a layer outside the exact theory, or a model in which the perturbation is not followed.
    InputError : a finished nnx module, fewer than two draws.

    Accuracy
    --------
    Predicted: that of `kernel_fn`, at infinite width; a network of width n fluctuates by depth / n. Measured: its
    standard error, from heavy-tailed samples.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import adversarial
    >>> he = nn.initializers.he_normal()
    >>> model = nn.Sequential([nn.Dense(64, kernel_init=he), nn.relu, nn.Dense(1, kernel_init=he)])
    >>> found = adversarial.input_gradient(model, jnp.ones((1, 16)), draws=64)
    >>> print(f"{found.predicted[0]:.6f}")  # 2 * 2 / 2
    2.000000
    """
    functional = drawn(model, x, apply_kwargs)
    predicted, chi = _theory(model, x, apply_kwargs)
    norms = _squared_norms(functional, x, key, draws)
    error = norms.std(0, ddof=1) / np.sqrt(draws)
    return InputGradient(predicted, chi, norms.mean(0), error, draws)


def _theory(model: Any, x: Any, apply_kwargs: dict | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    layers = kernel_fn(model, x, apply_kwargs=apply_kwargs)(x, get=("ntk", "layers")).layers
    chi = {layer.name: np.asarray(layer.chi) for layer in layers}
    out = np.prod(list(chi.values()), axis=0)
    if not np.isfinite(out).all():
        lost = next(name for name, value in chi.items() if not np.isfinite(value).all())
        raise UnsupportedLayerError(
            f"the layer {lost}, at which no perturbation of the input arrives",
            "networks in which every layer is between input and output",
            "the product of chi has no value there",
            "leave layers out that do not depend on the input",
            layer=lost,
        )
    return out, chi


def _squared_norms(functional, x, key, draws: int) -> np.ndarray:
    draws = check_count(draws, "draws", 2, "a standard error needs a spread")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))

    def first(params, one):
        return functional.apply(params, one[None]).reshape(-1)[0]

    def norms(key):
        grads = jax.vmap(jax.grad(first, 1), (None, 0))(functional.init(key), x)
        return jnp.sum(grads.reshape(len(x), -1) ** 2, axis=1)

    keys = jax.random.split(jax.random.key(0) if key is None else key, draws)
    return np.asarray(jax.lax.map(jax.jit(norms), keys, batch_size=min(draws, 64)), np.float64)


@dataclasses.dataclass(frozen=True)
class AlphaScaling:
    """What multiplying every variance by alpha does to |grad_x f|. Made by `alpha_scaling`; means over the inputs.

    Attributes
    ----------
    alpha : the factors, (A,).
    predicted : (A,), root of the ratio of the expected squared gradients, alpha over 1.
    measured, standard_error : (A,), the same from networks with common random numbers.
    homogeneous : whether the network is positively homogeneous in each weight matrix and has nothing else: then alpha
        multiplies the gradient of every single draw by alpha^(matrices / 2).
    matrices : L, the number of weight matrices, readout included.
    power_law : (A,), alpha^(L/2).
    """

    alpha: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    homogeneous: bool
    matrices: int
    power_law: np.ndarray


def alpha_scaling(
    model: Any, x: Any, alpha: Any, *, key: Any = None, draws: int = 64, apply_kwargs: dict | None = None
) -> AlphaScaling:
    r"""The growth of the input gradient when the variances of all weights and biases are multiplied by alpha.

    The folklore alpha^(L/2) holds for homogeneous networks without biases alone; `predicted` is right for others too.
    For the gradient of a squared loss with target 0, multiply by the same factor once more; cross-entropy saturates.

    Parameters
    ----------
    model : linen module, nnx factory or pair.
    x : inputs (n, ...).
    alpha : a factor > 0, or several.
    key, draws, apply_kwargs : as in `input_gradient`.

    Returns
    -------
    AlphaScaling.

    Raises
    ------
    InputError : alpha not positive; else as `input_gradient`.

    Accuracy
    --------
    As `input_gradient`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import adversarial
    >>> layers = [layer for _ in range(4) for layer in (nn.Dense(32, use_bias=False), nn.relu)]
    >>> model = nn.Sequential([*layers, nn.Dense(1, use_bias=False)])
    >>> found = adversarial.alpha_scaling(model, jnp.ones((1, 16)), 1.5, draws=8)
    >>> found.matrices, found.homogeneous, found.measured.round(4).tolist()  # 1.5^(5/2)
    (5, True, [2.7557])
    """
    factors = np.array([check_positive(a, "alpha", "it multiplies variances") for a in np.atleast_1d(alpha)])
    functional = drawn(model, x, apply_kwargs)
    base, _ = _theory(model, x, apply_kwargs)
    reference = _squared_norms(functional, x, key, draws).mean(1)
    predicted, measured, errors = [], [], []
    for factor in factors:
        pair = scaled(functional, float(factor))
        predicted.append(np.sqrt(_theory(pair, x)[0].mean() / base.mean()))
        norms = _squared_norms(dataclasses.replace(functional, init=pair[0]), x, key, draws).mean(1)
        ratio = norms.mean() / reference.mean()
        # delta method for the ratio of two means over the same draws
        spread = (norms - ratio * reference).std(ddof=1) / reference.mean() / np.sqrt(len(norms))
        measured.append(np.sqrt(ratio))
        errors.append(spread / (2 * np.sqrt(ratio)))
    count = len(matrices(functional))
    found = _is_homogeneous(functional, x, count)
    return AlphaScaling(
        factors, np.array(predicted), np.array(measured), np.array(errors), found, count, factors ** (count / 2)
    )


def _is_homogeneous(functional, x, count: int) -> bool:
    """Whether doubling all weights multiplies the outputs of one draw by 2^count."""
    params = functional.init(jax.random.key(11))
    once = np.asarray(functional.apply(params, x), np.float64)
    twice = np.asarray(functional.apply(jax.tree.map(lambda w: 2 * w, params), x), np.float64)
    size = np.abs(once).max()
    return bool(size > 0 and np.abs(twice / 2.0**count - once).max() < 1e-4 * size)


# ------------------------------------------------------------------ trained networks under attack


def fgsm(apply: Any, params: Any, x: Any, y: Any, size: float) -> np.ndarray:
    """Inputs moved by size * sign(gradient of the cross-entropy): the fast gradient sign attack.

    Parameters
    ----------
    apply : `apply(params, x) -> logits (n, classes)`.
    params, x, y : parameters, inputs (n, ...), labels (n,).
    size : change of each entry of x.

    Returns
    -------
    The attacked inputs, of the shape of x.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from initjax.applications import adversarial
    >>> weights = jnp.array([[1.0, -1.0], [0.0, 0.0]])
    >>> adversarial.fgsm(lambda w, x: x @ w, weights, jnp.ones((1, 2)), jnp.array([0]), 0.25).tolist()
    [[0.75, 1.0]]
    """
    return np.asarray(jnp.asarray(x) + size * jnp.sign(_loss_gradient(apply, params, jnp.asarray(x), jnp.asarray(y))))


def _loss_gradient(apply, params, x, y):
    def loss(x):
        logits = jax.nn.log_softmax(apply(params, x))
        return -jnp.sum(jnp.take_along_axis(logits, y[:, None], 1))

    return jax.grad(loss)(x)


@dataclasses.dataclass(frozen=True)
class Attack:
    """Networks trained from scaled initializations, and attacked. Made by `attack`; one row for each alpha.

    Attributes
    ----------
    alpha : (A,).
    initial : (A,), root of E|grad_x f|^2 at initialization, from theory.
    trained : (A, seeds), root mean square over test inputs of the input gradient of the margin, after training.
    accuracy, attacked : (A, seeds), test accuracy before and under the attack.
    size : change of each input entry by the attack.
    correlation : of log `initial` with the share of correct answers that the attack turns, over all networks.
    correlation_trained : of log `trained` with the same.
    correlation_error : standard error of `correlation` at zero correlation, 1 / sqrt(networks - 1).
    """

    alpha: np.ndarray
    initial: np.ndarray
    trained: np.ndarray
    accuracy: np.ndarray
    attacked: np.ndarray
    size: float
    correlation: float
    correlation_trained: float
    correlation_error: float


def attack(
    model: Any,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    alpha: Sequence[float],
    *,
    size: float,
    key: Any,
    seeds: int = 3,
    steps: int = 300,
    learning_rate: float = 1e-3,
) -> Attack:
    r"""Whether the input gradient at initialization says how easily the trained network is fooled: train, then FGSM.

    Parameters
    ----------
    model : classifier; linen module, nnx factory or pair.
    train, test : (inputs, labels).
    alpha : factors on all variances, two or more.
    size : change of each input entry by the attack.
    key : random key. seeds : networks for each alpha. steps, learning_rate : of Adam on full batches.

    Returns
    -------
    Attack.

    Raises
    ------
    InputError : fewer than two alphas; networks all of which, or none of which, the attack turns.

    Examples
    --------
    See `notebooks/12_adversarial.py`, on handwritten digits.
    """
    import optax

    factors = np.array([check_positive(a, "alpha", "it multiplies variances") for a in alpha])
    if len(np.unique(factors)) < 2:
        raise InputError(
            f"alpha={alpha}", "two or more factors", "a correlation needs a spread", "alpha=[0.5, 1, 2, 4]"
        )
    (x, y), (x_test, y_test) = ((jnp.asarray(a), jnp.asarray(b)) for a, b in (train, test))
    functional = drawn(model, x)
    base, keys = functional.apply, jax.random.split(key, seeds)
    optimiser = optax.adam(learning_rate)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(base(params, x), y).mean()

    def one(key, factor):
        params = jax.tree.map(lambda w: w * jnp.sqrt(factor).astype(w.dtype), functional.init(key))

        def step(carry, _):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), length=steps)
        gradient = _loss_gradient(base, params, x_test, y_test)
        moved = x_test + jnp.asarray(size, x_test.dtype) * jnp.sign(gradient)
        right = base(params, x_test).argmax(1) == y_test
        still = base(params, moved).argmax(1) == y_test
        margin = jax.vmap(jax.grad(lambda one, label: _margin(base(params, one[None])[0], label)))(x_test, y_test)
        square = jnp.mean(jnp.sum(margin.reshape(len(x_test), -1) ** 2, 1))
        return jnp.sqrt(square), right.mean(), still.mean(), (right & ~still).sum() / right.sum()

    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(jax.vmap(one, (0, None)))
        rows = [[np.asarray(v, np.float64) for v in run(keys, jnp.asarray(f, x.dtype))] for f in factors]
    trained, accuracy, attacked, turned = (np.stack(column) for column in zip(*rows, strict=True))
    initial = np.array([np.sqrt(_theory(scaled(functional, float(f)), x_test[:8])[0].mean()) for f in factors])
    if not np.isfinite(turned).all() or np.ptp(turned) == 0:
        raise InputError(
            f"an attack of size {size} that turns {turned.ravel()[0]:.0%} of the answers of every network",
            "a size at which some networks resist more than others",
            "without a spread there is no correlation",
            "try a size of a tenth of the standard deviation of the inputs",
        )
    flat = np.repeat(np.log(initial), seeds), np.log(trained).ravel(), turned.ravel()
    first, last = (float(np.corrcoef(column, flat[2])[0, 1]) for column in flat[:2])
    error = float(1 / np.sqrt(flat[2].size - 1))
    return Attack(factors, initial, trained, accuracy, attacked, float(size), first, last, error)


def _margin(logits, label):
    own = jax.nn.one_hot(label, logits.shape[0], dtype=logits.dtype)
    return jnp.sum(logits * own) - jax.nn.logsumexp(logits - 1e9 * own)
