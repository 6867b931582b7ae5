r"""Optimism under uncertainty with a network: the bias that keeps every Q above V_max, and how fast it leaks away.

At initialization Q(s, a) = b0 + a Gaussian field of covariance K(s, s'), independent over actions. So Q(s, a) >= V_max
with probability Phi(z) if b0 >= V_max + z sqrt(K(s, s)). A good part of K is shared by all states: it is an offset of
the action, not noise of the state. One step of temporal-difference learning at s moves every other s' by
Theta(s', s) / Theta(s, s) of what it moves s: the guarantee "every action is tried" holds for tables, where that is 0.

Sources: Brafman, Tennenholtz 2002 (optimistic values in tables); Jacot et al. 2018 (arXiv:1806.07572) for the leakage.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.applications.models import check_count, check_positive, drawn
from initjax.errors import InputError
from initjax.infinite.kernels import KernelFunction


@dataclasses.dataclass(frozen=True)
class Optimism:
    """An optimistic readout bias, and what Q looks like under it. Made by `optimistic_bias`.

    Attributes
    ----------
    bias : b0, in the unit of the values.
    z : number of standard deviations by which it exceeds v_max.
    v_max : the value that every Q has to exceed.
    standard_deviation : (n,), of Q(s, a) over initializations.
    within : mean over initializations of the variance of Q over the given states, for one action.
    shared : mean variance that is left: that of an offset common to the states.
    """

    bias: float
    z: float
    v_max: float
    standard_deviation: np.ndarray
    within: float
    shared: float


def optimistic_bias(
    v_max: float | None = None,
    kernel_fn: Any = None,
    states: Any = None,
    *,
    variance: Any = None,
    confidence: float = 0.99,
    z: float | None = None,
    actions: int = 1,
    everywhere: bool = False,
    r_max: float | None = None,
    gamma: float | None = None,
) -> Optimism:
    r"""Readout bias with which Q(s, a) >= v_max at initialization, b0 = v_max + z sqrt(max_s Var Q(s, a)).

    Parameters
    ----------
    v_max : largest value that a policy can have; or None with `r_max` and `gamma`, then r_max / (1 - gamma).
    kernel_fn, states : `ij.kernel_fn` of the Q network (one output per action, alike at initialization) and the states
        (n, ...). A constant readout bias that the model has by itself is no spread, and is left out.
    variance : instead of these, the variance of Q at every state, a number or (n,).
    confidence : probability with which Q(s, a) >= v_max; for each state and action alone, or for all of them together
        with `everywhere` (union bound over n states and `actions` actions, on the safe side).
    z : the number of standard deviations, instead of `confidence`.
    actions : number of actions, for `everywhere`.
    r_max, gamma : largest reward and discount in [0, 1).

    Returns
    -------
    Optimism. `within` and `shared` are nan if `variance` is given.

    Raises
    ------
    InputError : neither v_max nor r_max and gamma; no states; a confidence outside (1/2, 1); a negative variance.

    Accuracy
    --------
    Exact at infinite width; a network of width n has heavier tails, by an excess kurtosis of order depth / n.

    Examples
    --------
    >>> from initjax.applications import rl
    >>> found = rl.optimistic_bias(r_max=1.0, gamma=0.9, variance=0.01, z=3.0)
    >>> print(round(found.bias, 9))  # 1 / (1 - 0.9) + 3 * 0.1
    10.3
    """
    from statistics import NormalDist

    if v_max is None:
        if r_max is None or gamma is None or not np.isfinite(r_max) or not 0 <= gamma < 1:
            raise InputError(
                f"v_max=None, r_max={r_max}, gamma={gamma}",
                "v_max, or r_max with a discount 0 <= gamma < 1",
                "V_max = r_max / (1 - gamma) is what no policy exceeds",
                "optimistic_bias(r_max=1.0, gamma=0.99, ...)",
            )
        v_max = r_max / (1 - gamma)
    if not np.isfinite(v_max):
        raise InputError(f"v_max={v_max}", "a finite value", "the bias has to exceed it", "bound the rewards")
    within = shared = float("nan")
    if variance is None:
        kernel = _covariance(kernel_fn, states)
        variance = np.diagonal(kernel)
        shared, within = float(kernel.mean()), float(variance.mean() - kernel.mean())
    variance = np.atleast_1d(np.asarray(variance, np.float64))
    if not variance.size or not np.isfinite(variance).all() or (variance < 0).any():
        raise InputError(
            f"variance={variance}",
            "finite variances >= 0",
            "they are those of Q over initializations",
            "give ij.kernel_fn of the Q network and the states instead",
        )
    if z is None:
        if not 0.5 < confidence < 1:
            raise InputError(
                f"confidence={confidence}", "a probability in (1/2, 1)", "below 1/2 no optimism is needed", "0.99"
            )
        pairs = variance.size * check_count(actions, "actions", 1, "it is the number of outputs") if everywhere else 1
        z = NormalDist().inv_cdf(1 - (1 - confidence) / pairs)
    deviation = np.sqrt(variance)
    return Optimism(float(v_max + z * deviation.max()), float(z), float(v_max), deviation, within, shared)


def _kernel(kernel_fn: Any, states: Any, get: tuple[str, ...]):
    if not isinstance(kernel_fn, KernelFunction) or states is None:
        raise InputError(
            f"kernel_fn={type(kernel_fn).__name__}, states={type(states).__name__}",
            "ij.kernel_fn of the Q network, and a batch of states",
            "spread and leakage are its kernels at these states",
            "rl.leakage(ij.kernel_fn(model, states), states)",
        )
    return kernel_fn(states, get=get)


def _covariance(kernel_fn: Any, states: Any) -> np.ndarray:
    kernel = _kernel(kernel_fn, states, ("nngp", "leaves"))
    fixed = 0.0
    for weight in kernel_fn.weights:  # a constant readout bias b0: E Q Q' contains b0^2, which is not a spread
        if weight.kind == "constant" and _is_readout_bias(kernel.leaves[weight.name]):
            values = np.asarray(weight.value)
            if values.size and np.ptp(values) > 0:
                raise InputError(
                    f"a readout bias {weight.name} that differs between actions",
                    "one constant for all actions",
                    "the kernel is a mean over outputs, which are taken to be alike",
                    "initialise it with jax.nn.initializers.constant(b0), or with zeros",
                )
            fixed += float(values.ravel()[0]) ** 2
    return kernel.nngp - fixed


def _is_readout_bias(leaf: np.ndarray) -> bool:
    return bool(np.allclose(leaf, 1.0, rtol=0, atol=1e-12))


@dataclasses.dataclass(frozen=True)
class Leakage:
    """Where an update goes. Made by `leakage`.

    Attributes
    ----------
    matrix : (n, n), [i, j]: what one step at state i moves Q(state j, same action), over what it moves Q(state i).
    mean : mean over pairs of different states. 0 in a table.
    bias : (n,), the part that goes through the readout bias and moves all states alike.
    visits : (n,), how many first-order updates of other states undo the optimism of a state as much as one of its own:
        the inverse of the mean of its column, inf in a table.
    """

    matrix: np.ndarray
    mean: float
    bias: np.ndarray
    visits: np.ndarray


def leakage(kernel_fn: Any, states: Any) -> Leakage:
    r"""How one temporal-difference step at a state leaks to the others: Theta(s', s) / Theta(s, s).

    Parameters
    ----------
    kernel_fn : of the Q network, from `ij.kernel_fn`, in the parameterization of the optimiser ("standard" for SGD).
    states : batch (n, ...).

    Returns
    -------
    Leakage. It is the same for every action; other actions are not moved at leading order.

    Raises
    ------
    InputError : no kernel function; states at which no weight moves the output.

    Accuracy
    --------
    That of `kernel_fn`; a network of width w differs by O(1 / sqrt(w)).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> from initjax.applications import rl
    >>> table = jnp.eye(3)  # one state each, linear, no bias: a table
    >>> print(rl.leakage(ij.kernel_fn(nn.Dense(2, use_bias=False), table), table).mean)
    0.0
    """
    kernel = _kernel(kernel_fn, states, ("ntk", "leaves"))
    own = np.diagonal(kernel.ntk)
    if not (own > 0).all():
        raise InputError(
            f"state {int(np.argmin(own))}, at which no weight moves the output",
            "states with Theta(s, s) > 0",
            "an update there changes nothing, and has no share to leak",
            "give the model biases, or leave that state out",
        )
    matrix = kernel.ntk / own[:, None]
    n = len(own)
    through = sum((kernel_fn.eta[k] for k, leaf in kernel.leaves.items() if _is_readout_bias(leaf)), 0.0)
    off = matrix[~np.eye(n, dtype=bool)].reshape(n, n - 1) if n > 1 else np.zeros((1, 1))
    column = (matrix.sum(0) - 1) / max(n - 1, 1)
    with np.errstate(divide="ignore"):
        visits = np.where(column > 0, 1 / np.where(column > 0, column, 1.0), np.inf)
    return Leakage(matrix, float(off.mean()), through / own, visits)


# ------------------------------------------------------------------ exploration of a small environment


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What a greedy agent saw. Made by `explore`; K random networks.

    Attributes
    ----------
    coverage : (K, steps), share of all state-action pairs tried up to each step.
    goal : (K,), first step at which the rewarded pair was tried, nan if never.
    values : (K, n, actions), Q at the end.
    """

    coverage: np.ndarray
    goal: np.ndarray
    values: np.ndarray


def chain(length: int) -> tuple[np.ndarray, np.ndarray]:
    """A deterministic chain: action 0 steps left, action 1 right; stepping right at the right end pays 1 and restarts.

    Returns
    -------
    next_state, reward : (length, 2) tables.
    """
    here = np.arange(check_count(length, "length", 2, "a chain has two ends"))
    following = np.stack([np.maximum(here - 1, 0), np.minimum(here + 1, length - 1)], 1)
    reward = np.zeros((length, 2))
    reward[-1, 1], following[-1, 1] = 1.0, 0
    return following, reward


def explore(
    model: Any,
    states: Any,
    environment: tuple[Any, Any],
    *,
    key: Any,
    bias: float = 0.0,
    networks: int = 16,
    steps: int = 500,
    gamma: float = 0.95,
    step_size: float = 0.5,
    start: int = 0,
) -> Exploration:
    r"""Greedy Q-learning from an initial bias, without any other exploration, on an environment given by two tables.

    One step of SGD on (r + gamma max Q(s') - Q(s, a))^2 / 2 after each move, at the rate step_size / Theta(s, s): each
    step removes `step_size` of its own error, as in a table.

    Parameters
    ----------
    model : Q network, one output per action; linen, nnx factory or pair.
    states : (n, ...) what the network sees in each state.
    environment : `(next_state, reward)`, (n, actions) tables, such as `rl.chain(n)`.
    key : random key of networks and of ties.
    bias : b0, added to all outputs and trained with them.
    networks, steps, gamma, step_size, start : numbers of networks and moves, discount, step size, first state.

    Returns
    -------
    Exploration.

    Raises
    ------
    InputError : a finished nnx module; tables that do not fit the model or the states.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.applications import rl
    >>> seen = rl.explore(nn.Dense(2, use_bias=False), jnp.eye(4), rl.chain(4), key=jax.random.key(0), steps=40)
    >>> seen.coverage.shape
    (16, 40)
    """
    functional = drawn(model, states)
    following, reward = (jnp.asarray(table) for table in environment)
    n, actions = following.shape
    if functional.abstract_output.shape != (n, actions) or reward.shape != (n, actions):
        raise InputError(
            f"outputs of shape {functional.abstract_output.shape} and tables {following.shape}, {reward.shape}",
            "outputs (n, actions), and two tables of that shape",
            "Q has one value for each state and action",
            "give the model one output per action",
        )
    check_positive(step_size, "step_size", "it is the share of an error that one update removes")
    dtype = functional.abstract_output.dtype
    reward = reward.astype(dtype)
    states = jnp.asarray(states)
    discount, size_of_step = jnp.asarray(gamma, dtype), jnp.asarray(step_size, dtype)

    def q_of(trained, s):
        params, b0 = trained
        return functional.apply(params, states[s][None])[0] + b0

    def one(key):
        params_key, walk_key = jax.random.split(key)
        trained = functional.init(params_key), jnp.full(actions, bias, dtype)

        def move(carry, key):
            trained, s, tried = carry
            q = q_of(trained, s)
            noise = jax.random.uniform(key, q.shape, dtype) * jnp.asarray(1e-6, dtype)  # ties are broken at random
            a = jnp.argmax(q + noise)
            after, r = following[s, a], reward[s, a]
            ends = r > 0
            target = r + jnp.where(ends, jnp.zeros((), dtype), discount * q_of(trained, after).max())
            grads = jax.grad(lambda t: q_of(t, s)[a])(trained)
            size = sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))
            step = size_of_step * (target - q[a]) / size
            trained = jax.tree.map(lambda w, g: (w + step * g).astype(w.dtype), trained, grads)
            tried = tried.at[s, a].set(True)
            return (trained, after, tried), (tried.mean(dtype=dtype), ends)

        begin = trained, jnp.asarray(start, following.dtype), jnp.zeros((n, actions), bool)
        (trained, _, _), (coverage, ends) = jax.lax.scan(move, begin, jax.random.split(walk_key, steps))
        return coverage, ends, functional.apply(trained[0], states) + trained[1][None]

    with jax.numpy_dtype_promotion("standard"):
        coverage, ends, values = jax.jit(jax.vmap(one))(jax.random.split(key, networks))
    ends = np.asarray(ends)
    goal = np.where(ends.any(1), ends.argmax(1).astype(float), np.nan)
    return Exploration(np.asarray(coverage, np.float64), goal, np.asarray(values, np.float64))
