r"""One notion of layer: a map of the second moments of two inputs, composed with `>>`.

In an infinitely wide network two inputs are known by q1 = E[h1^2], q2 = E[h2^2] and k = E[h1 h2] over the units of a
layer. A `Layer` maps these to the next ones. The same arrays describe many positions of one input at once: give q1, q2,
k the shape (positions, positions), with q1[i, j] = K_ii, q2[i, j] = K_jj and k[i, j] = K_ij (`covariance` does this);
elementwise layers then act entry by entry, and convolutions and attention mix the positions.

Along with the signal goes a small change of the input, independent of it: chi = E[dh1^2] and chi_k = E[dh1 dh2]. By
Price's theorem chi_k of a pair is also dk_out / dk_in at fixed q1, q2, and chi is what a layer does to the second
moment of a gradient (weights of forward and backward pass taken independent).

Source: Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232), sections 2-4.
"""

import dataclasses
from typing import Any

import numpy as np

from initjax.errors import InputError
from initjax.gaussian.dual import _check_c
from initjax.gaussian.expect import check_q
from initjax.trace.jaxpr import is_traced


@dataclasses.dataclass(frozen=True)
class State:
    """Second moments over the units of one layer, for a pair of inputs (or many pairs at once).

    Attributes
    ----------
    q1, q2 : second moments E[h1^2], E[h2^2]; float64 arrays of one shape.
    k : E[h1 h2]; None when only single inputs are followed.
    mean1, mean2 : means over the units, not zero after an activation that is not odd.
    chi : E[dh1^2] for a small change dh of unit size at the start: the gradient's second-moment factor.
    chi_k : E[dh1 dh2] for the same small change of both inputs, which is dk_out / dk_in; None when not followed.
    gaussian : whether the units are Gaussian, as they are after a dense layer and are not after an activation.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> state = ij.layers.state(q=1.0, c=0.5)
    >>> after = ij.layers.Dense(2.0, 0.1).step(state)
    >>> print(f"{after.q1:.2f} {after.k:.2f} {after.c:.6f}")
    4.01 2.01 0.501247
    """

    q1: Any
    q2: Any
    k: Any
    mean1: Any
    mean2: Any
    chi: Any
    chi_k: Any
    gaussian: bool = True

    @property
    def c(self) -> Any:
        """Correlation k / sqrt(q1 q2); nan where a second moment is 0 or infinite."""
        if self.k is None:
            return None
        norm = np.sqrt(self.q1) * np.sqrt(self.q2)
        with np.errstate(divide="ignore", invalid="ignore"):
            c = self.k / norm
        return np.clip(np.where((norm > 0) & np.isfinite(norm), c, np.nan), -1.0, 1.0)[()]

    def replace(self, **changes) -> "State":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def times(follow, factor):
    """chi_k after a layer, where it is followed at all."""
    return None if follow is None else follow * factor


def refuse_tracers(where: str, *values) -> None:
    """Layer maps choose exact methods by value, which a tracer does not have."""
    if is_traced(*values):
        raise InputError(
            f"{where} got a traced value.",
            "concrete numbers or NumPy/JAX arrays (also inside a jitted function).",
            "each layer map chooses its own exact method from the values of q and c, which a tracer does not have.",
            "call it outside jit, grad and vmap; ij.fixed_point and ij.critical accept tracers for plain networks.",
        )


def state(q: Any = 1.0, c: Any = 0.5) -> State:
    """The state of two inputs with second moment q each and correlation c, at a layer of Gaussian pre-activations.

    Parameters
    ----------
    q : second moments >= 0.
    c : correlations in [-1, 1]; they broadcast with q. None: follow single inputs only.

    Raises
    ------
    InputError : q or c out of range; traced input.

    Examples
    --------
    >>> import initjax as ij
    >>> print(ij.layers.state(2.0, 0.25).k)
    0.5
    """
    refuse_tracers("state", q, c)
    q = check_q(q)
    if c is None:
        zero = np.zeros_like(q)
        return State(q[()], q[()], None, zero[()], zero[()], np.ones_like(q)[()], None)
    q, c = (np.array(a) for a in np.broadcast_arrays(q, _check_c(c)))
    zero, one = np.zeros_like(q)[()], np.ones_like(q)[()]
    return State(q[()], q[()], (c * q)[()], zero, zero, one, one)


def covariance(matrix, change="each") -> State:
    """The state of n positions (pixels, tokens, time steps, inputs) with a given covariance.

    Parameters
    ----------
    matrix : (n, n) symmetric positive semidefinite, E[h_i h_j].
    change : the small change that chi and chi_k follow: "each" (independent in every position, the identity) or
        "common" (the same in all), or an (n, n) array of its covariance.

    Raises
    ------
    InputError : not square, not symmetric, not positive semidefinite, NaN or infinite; traced input.

    Examples
    --------
    >>> import numpy as np, initjax as ij
    >>> tokens = ij.layers.covariance(np.eye(4))
    >>> print(ij.layers.Attention(sigma_v=1.0).step(tokens).k[0])
    [0.25 0.25 0.25 0.25]
    """
    refuse_tracers("covariance", matrix)
    given = np.asarray(matrix)
    problem = ""
    if given.ndim != 2 or given.shape[0] != given.shape[1] or not given.size:
        problem = f"its shape is {given.shape}"
    elif given.dtype.kind not in "fiub" or not np.all(np.isfinite(given)):
        problem = "it is not real and finite"
    else:
        given = given.astype(np.float64)
        size = np.abs(given).max()
        if not np.allclose(given, given.T, rtol=0, atol=1e-6 * size):
            problem = f"it differs from its transpose by {np.abs(given - given.T).max():.3g}"
        elif (lowest := float(np.linalg.eigvalsh(given)[0])) < -1e-6 * size:
            problem = f"its lowest eigenvalue is {lowest:.3g}"
    if problem:
        raise InputError(
            f"the covariance was given as an array of which {problem}.",
            "a real symmetric positive semidefinite (n, n) matrix.",
            "entry (i, j) is E[h_i h_j] over the units of a layer.",
            "for inputs x of shape (n, d) pass x @ x.T / d.",
        )
    given = (given + given.T) / 2
    q1 = np.broadcast_to(np.diag(given)[:, None], given.shape).copy()
    spread = {"each": np.eye(len(given)), "common": np.ones_like(given)}
    follow = spread[change] if isinstance(change, str) and change in spread else np.asarray(change)
    if follow.shape != given.shape:
        raise InputError(
            f"change = {change!r}.",
            '"each", "common" or an array of the shape of the covariance.',
            "it is the covariance over positions of a small change of the input.",
            'leave change="each" for gradients.',
        )
    follow = follow if np.iscomplexobj(follow) else follow.astype(np.float64)
    chi = np.broadcast_to(np.diag(follow)[:, None], given.shape).copy()
    zero = np.zeros_like(given)
    return State(q1, q1.T.copy(), given, zero, zero, chi, follow)


class Layer:
    """A map of `State`s. Layers compose: `a >> b` applies a, then b. Subclass it and write `step` for one of your own.

    Examples
    --------
    >>> import initjax as ij
    >>> class Scale(ij.layers.Layer):
    ...     def step(self, state):
    ...         two = ij.layers.Dense(2.0)
    ...         return two.step(state)
    >>> print((Scale() >> Scale()).step(ij.layers.state(1.0, 0.5)).q1)
    16.0
    """

    def step(self, state: State) -> State:
        """The state after this layer."""
        raise NotImplementedError

    def __rshift__(self, other: Any) -> "Chain":
        return Chain(self, other)

    def within(self) -> tuple["Layer", ...]:
        """This layer and those it is made of."""
        return (self,)


class Chain(Layer):
    """Layers applied one after the other; `a >> b` is `Chain(a, b)`.

    Examples
    --------
    >>> import jax.numpy as jnp, initjax as ij
    >>> block = ij.layers.Chain(ij.layers.Activation(jnp.tanh), ij.layers.Dense(1.5))
    >>> print(f"{block.step(ij.layers.state(1.0)).q1:.6f}")
    0.887163
    """

    def __init__(self, *layers: Any):
        for layer in layers:
            check_layer(layer, "Chain")
        self.layers: tuple[Layer, ...] = tuple(
            part for layer in layers for part in (layer.layers if type(layer) is Chain else (layer,))
        )

    def step(self, state: State) -> State:
        for layer in self.layers:
            state = layer.step(state)
        return state

    def within(self) -> tuple[Layer, ...]:
        return (self, *(part for layer in self.layers for part in layer.within()))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.layers))


def check_layer(layer, where: str) -> None:
    """Refuse what is no layer, naming the usual slip."""
    if not isinstance(layer, Layer):
        raise InputError(
            f"{where} got {layer!r}.",
            "layers such as ij.layers.Dense(1.5), ij.layers.Activation(jnp.tanh), or their composition a >> b.",
            "the map of a block is composed of maps of its layers.",
            "wrap an activation function as ij.layers.Activation(phi); build a layer class by calling it.",
        )
