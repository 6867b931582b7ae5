r"""Learning the initialization by descent through descent: which weight scale adapts fastest, and why.

MAML with a learned scale for each layer: w = exp(s_l) w_0 with fresh w_0 at every step; the outer loss after inner
steps of SGD is minimised over s by Adam. For f = v . phi(W x)/sqrt(n) the tangent kernel that drives adaptation is
    Theta = E phi(u) phi(u') + s_v^2 (x . x') E phi'(u) phi'(u').
If the hidden layer alone adapts, the second block is all there is; one step of rate eta on kappa MSE / 2 is best at
eta kappa Theta = 1, so that a curvature kappa above 1/(eta s_v^2 |x|^2) is braked by saturation: sigma rises with it.
If all layers adapt, saturation raises the first block instead, and the brake is a smaller sigma: beyond eta kappa of
order 1 it falls with kappa. (Below, any kernel is too small, and what counts is how little the untrained f_0 disturbs.)

Sources: Finn, Abbeel, Levine 2017 (arXiv:1703.03400), MAML; the argument is derived in the documentation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax import gaussian
from initjax.applications.models import check_count, check_positive, drawn, matrices
from initjax.errors import InputError
from initjax.trace.flax import layer_of


@dataclasses.dataclass(frozen=True)
class LearnedInit:
    """Scales learned through inner steps. Made by `learn_init`.

    Attributes
    ----------
    scales : layer -> factor on the weights that the model's own initializers draw.
    history : layer -> (meta_steps,), the factor before each step.
    loss : (meta_steps,), mean query loss of each step, a noisy estimate.
    adapting : paths of the leaves that inner steps move.
    init : `init(key) -> params` with the learned scales.
    """

    scales: dict[str, float]
    history: dict[str, np.ndarray] = dataclasses.field(repr=False)
    loss: np.ndarray = dataclasses.field(repr=False)
    adapting: tuple[str, ...]
    init: Callable = dataclasses.field(repr=False)


def learn_init(
    task_sampler: Callable,
    model: Any,
    *,
    key: Any,
    adapt: Any = "all",
    learn: Any = "all",
    shared: bool = False,
    curvature: float = 1.0,
    inner_steps: int = 1,
    inner_rate: float = 0.3,
    meta_steps: int = 250,
    meta_rate: float = 0.04,
    tasks: int = 16,
    apply_kwargs: dict | None = None,
) -> LearnedInit:
    r"""Weight scales that make a few inner steps of SGD most useful, by MAML with Adam on their logarithms.

    Parameters
    ----------
    task_sampler : `task_sampler(key) -> (x, y, x_query, y_query)`, traceable; one regression task.
    model : linen module, nnx factory or pair, with outputs of the shape of y. In the NTK parameterization (divide by
        sqrt(fan_in) in the forward pass) inner rates do not depend on the width.
    key : random key; every meta step draws fresh weights and tasks.
    adapt : which leaves the inner steps move: "all", "hidden" (all but the last layer), or a function path -> bool.
    learn : which layers' matrices have a learned scale: "all", "hidden", or a function path -> bool.
    shared : one scale for all of these, instead of one for each layer.
    curvature : kappa, the inner loss is kappa / 2 times the mean squared error.
    inner_steps, inner_rate : of SGD. meta_steps, meta_rate : of Adam. tasks : for each meta step.
    apply_kwargs : further arguments of every call.

    Returns
    -------
    LearnedInit.

    Raises
    ------
    InputError : nothing to adapt or to learn; numbers out of range; a meta loss that is no longer finite.

    Accuracy
    --------
    Stochastic: scales of repeated runs differ by some ten percent, and may still drift after `meta_steps`; see
    `history`. Compare signs and orders of magnitude.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import meta
    >>> def task(key):
    ...     x = jax.random.normal(key, (4, 2))
    ...     return x, x[:, :1], x, x[:, :1]
    >>> found = meta.learn_init(task, nn.Dense(1), key=jax.random.key(0), meta_steps=3)
    >>> found.adapting, found.history["kernel"].shape
    (('bias', 'kernel'), (3,))

    References
    ----------
    Finn, Abbeel, Levine 2017 (arXiv:1703.03400), algorithm 1.
    """
    import optax

    why = "it is a number of steps or tasks"
    numbers = dict(inner_steps=inner_steps, meta_steps=meta_steps, tasks=tasks)
    inner_steps, meta_steps, tasks = (check_count(v, name, 1, why) for name, v in numbers.items())
    for name, value in dict(curvature=curvature, inner_rate=inner_rate, meta_rate=meta_rate).items():
        check_positive(value, name, "it scales a loss or a step")
    try:
        example = task_sampler(jax.random.key(0))
        x, y, x_query, y_query = example
    except Exception as failure:
        raise InputError(
            f"a task_sampler that failed with {type(failure).__name__}: {str(failure)[:200]}",
            "task_sampler(key) -> (x, y, x_query, y_query)",
            "each meta step draws its tasks from it",
            "return four arrays",
        ) from failure
    functional = drawn(model, x, apply_kwargs)
    if functional.abstract_output.shape != jnp.shape(y):
        raise InputError(
            f"outputs of shape {functional.abstract_output.shape} and targets of shape {jnp.shape(y)}",
            "targets of the shape of the outputs",
            "the loss is their mean squared difference, and broadcasting would average over pairs",
            "give y the axes of the output, such as y[:, None]",
        )
    names = functional.leaf_names
    moves = _chosen(adapt, names, functional, "adapt")
    weights = [i for i in matrices(functional) if _chosen(learn, names, functional, "learn")[i]]
    if not weights or not any(moves):
        raise InputError(
            f"adapt={adapt!r}, learn={learn!r}, which choose no {'weight' if weights else 'matrix'}",
            '"all", "hidden", or a function of the paths ' + ", ".join(names),
            "there is nothing to adapt or to learn",
            'adapt="all", learn="all"',
        )
    tree = jax.tree.structure(functional.abstract_params)
    layer = {i: layer_of(names[i]) if not shared else "shared" for i in weights}
    labels = tuple(dict.fromkeys(layer.values()))
    place = {i: labels.index(name) for i, name in layer.items()}

    def scaled(params, s):
        leaves = jax.tree.leaves(params)
        leaves = [w * jnp.exp(s[place[i]]).astype(w.dtype) if i in place else w for i, w in enumerate(leaves)]
        return jax.tree.unflatten(tree, leaves)

    def error(params, x, y):
        return jnp.mean((functional.apply(params, x) - y) ** 2)

    mask = jax.tree.unflatten(tree, moves)

    def query_loss(s, key):
        init_key, task_key = jax.random.split(key)
        params = scaled(functional.init(init_key), s)
        x, y, x_query, y_query = task_sampler(task_key)

        def inner(params, _):
            grads = jax.grad(lambda p: error(p, x, y) * (curvature / 2))(params)
            return jax.tree.map(lambda w, g, m: w - inner_rate * g if m else w, params, grads, mask), None

        params, _ = jax.lax.scan(inner, params, length=inner_steps)
        return error(params, x_query, y_query) * (curvature / 2)

    def meta_loss(s, key):
        return jnp.mean(jax.vmap(query_loss, (None, 0))(s, jax.random.split(key, tasks)))

    optimiser = optax.adam(meta_rate)

    def step(carry, key):
        s, state = carry
        value, grad = jax.value_and_grad(meta_loss)(s, key)
        updates, state = optimiser.update(grad, state)
        return (optax.apply_updates(s, updates), state), (s, value)

    with jax.numpy_dtype_promotion("standard"):
        s = jnp.zeros(len(labels), functional.abstract_output.dtype)
        run = jax.jit(lambda s, keys: jax.lax.scan(step, (s, optimiser.init(s)), keys))
        (s, _), (history, losses) = run(s, jax.random.split(key, meta_steps))
    s, history, losses = (np.asarray(a, np.float64) for a in (s, history, losses))
    if not np.isfinite(losses).all():
        raise InputError(
            f"a meta loss that is {losses[~np.isfinite(losses)][0]} at step {int(np.argmin(np.isfinite(losses)))}",
            "inner steps that converge",
            "an inner rate above 2 / (curvature * lambda_max) diverges",
            f"inner_rate={inner_rate / 4:g}, or a smaller initial scale",
        )
    learned = jnp.asarray(s)

    def init(key):
        return scaled(functional.init(key), learned)

    return LearnedInit(
        dict(zip(labels, np.exp(s).tolist(), strict=True)),
        {name: np.exp(history[:, i]) for i, name in enumerate(labels)},
        losses,
        tuple(name for name, m in zip(names, moves, strict=True) if m),
        init,
    )


def _chosen(which: Any, names: tuple[str, ...], functional, what: str) -> list[bool]:
    if callable(which):
        return [bool(which(name)) for name in names]
    if which == "all":
        return [True] * len(names)
    if which == "hidden":
        last = layer_of(names[_readout(functional)])
        return [layer_of(name) != last for name in names]
    raise InputError(
        f"{what}={which!r}", '"all", "hidden" or a function path -> bool', "it chooses leaves by path", f'{what}="all"'
    )


def _readout(functional) -> int:
    """The leaf of the last product of weights and data, in the order of the program."""
    from initjax.trace.uses import CONTRACTIONS, survey

    return [use.leaf for use in survey(functional).uses if use.kind in CONTRACTIONS][-1]


def one_point_scale(
    phi: Any, curvature: float, *, rate: float = 0.3, readout: float = 1.0, norm: float = 1.0, adapt: str = "hidden"
) -> float:
    r"""The hidden scale sigma at which one step of SGD fits one point exactly: eta kappa Theta(sigma) = 1.

    Theta = s_v^2 |x|^2 E phi'^2 if the hidden layer adapts, plus E phi^2 if all layers do, for f = v . phi(W x)/sqrt(n)
    with W ~ N(0, sigma^2), v ~ N(0, s_v^2), pre-activations of variance sigma^2 |x|^2.

    Parameters
    ----------
    phi : activation.
    curvature, rate : kappa and eta. readout : s_v. norm : |x|.
    adapt : "hidden" or "all".

    Returns
    -------
    float: the smallest such sigma; 0 where Theta is too small at every sigma and largest at 0 (a saturating activation
    below the curvature 1/(eta s_v^2 |x|^2)); inf where it is too large at every sigma in [1e-3, 1e3].

    Raises
    ------
    InputError : numbers that are not positive, another `adapt`.

    Accuracy
    --------
    1e-9 relative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from initjax.applications import meta
    >>> [round(meta.one_point_scale(jnp.tanh, kappa), 3) for kappa in (1.0, 10.0, 30.0)]
    [0.0, 1.493, 4.754]
    """
    for name, value in dict(curvature=curvature, rate=rate, readout=readout, norm=norm).items():
        check_positive(value, name, "it enters the kernel")
    if adapt not in ("hidden", "all"):
        raise InputError(f"adapt={adapt!r}", '"hidden" or "all"', "it names the layers that adapt", 'adapt="hidden"')

    def excess(log_sigma):
        q = np.exp(2 * np.asarray(log_sigma)) * norm**2
        theta = readout**2 * norm**2 * np.asarray(gaussian.moment_prime(phi, q))
        if adapt == "all":
            theta = theta + np.asarray(gaussian.moment(phi, q))
        return rate * curvature * theta - 1

    grid = np.linspace(np.log(1e-3), np.log(1e3), 400)
    values = excess(grid)
    change = np.flatnonzero(np.sign(values[1:]) != np.sign(values[:-1]))
    if not change.size:
        return 0.0 if values[0] < 0 else float("inf")
    low, high = grid[change[0]], grid[change[0] + 1]
    rising = values[change[0] + 1] > values[change[0]]
    for _ in range(60):
        middle = (low + high) / 2
        below = float(excess(middle)) < 0
        low, high = (middle, high) if below == rising else (low, middle)
    return float(np.exp((low + high) / 2))
