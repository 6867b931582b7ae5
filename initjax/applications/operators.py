r"""Linear differential operators given as functions of functions: their order and their coefficients at given points.

D u(x) = sum_alpha a_alpha(x) d^alpha u(x). The order is found by letting D act on a function that counts how often it
is differentiated, the coefficients by letting it act on the monomials around each point; that what was found is all of
D is checked on exponentials.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import tracing_float64

_HIGHEST = 8
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear differential operator at n points.

    Attributes
    ----------
    order : of its highest derivative.
    coefficients : alpha -> (n,), the factor of d^alpha; only those that are not zero at all points.
    size : n.
    """

    order: int
    coefficients: dict[Index, np.ndarray]
    size: int

    def factorial(self, alpha: Index) -> float:
        """alpha! = prod_i alpha_i!."""
        return float(math.prod(map(math.factorial, alpha)))


def read_operator(operator: Callable, x: np.ndarray) -> Operator:
    """Coefficients of `operator` at the points x, (n, d); raises InputError where it is no such operator."""
    if not callable(operator):
        raise _refuse(f"operator = {operator!r}", "it acts on functions")
    with tracing_float64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        d = x.shape[1]
        try:
            depth = _depth(operator, x[0])
            indices = [i for i in itertools.product(range(depth + 1), repeat=d) if sum(i) <= depth]
            theta = jnp.zeros(len(indices))
            value = jax.jit(jax.vmap(_on_monomials(operator, indices), (None, 0)))
            slope = jax.jit(jax.vmap(jax.grad(_on_monomials(operator, indices)), (None, 0)))
            offset, found = np.asarray(value(theta, x)), np.asarray(slope(theta, x))
            probes = np.stack([_wave(w, d) for w in (0, 1)])
            at = lambda w, y: operator(lambda z: jnp.exp(jnp.dot(w, z - y)))(y)  # noqa: E731
            seen = np.asarray(jax.jit(jax.vmap(jax.vmap(at, (None, 0)), (0, None)))(probes, x))
        except InputError:
            raise
        except Exception as error:
            raise _refuse(
                f"an operator that failed with {type(error).__name__}: {str(error)[:200]}",
                "it has to map a function of one point (d,) to another such function, with scalar values",
            ) from error
    if found.shape[0] != len(x) or offset.ndim != 1:
        raise _refuse("an operator whose results are not scalar", "one number is asked for at each point")
    if np.any(offset != 0):
        raise _refuse("an operator that is not zero on u = 0", "a forcing term moves the mean of R, not its covariance")
    symbol = np.stack([np.prod(probes ** np.array(i), axis=1) for i in indices], 1)  # (2, indices)
    said = symbol @ found.T
    size = np.abs(symbol) @ np.abs(found.T) + 1e-300
    if not np.isfinite(found).all() or np.any(np.abs(said - seen) > 1e-9 * size):
        raise _refuse(
            "an operator that is not a linear differential operator",
            "its values on exponentials are not those of its derivatives: it is nonlinear in u, or not local",
        )
    kept = {i: found[:, n] for n, i in enumerate(indices) if np.any(found[:, n])}
    if not kept:
        raise _refuse("an operator that is zero at all points", "there is no residual")
    return Operator(max(map(sum, kept)), kept, len(x))


def _refuse(given: str, why: str) -> InputError:
    return InputError(
        given,
        "a linear differential operator `lambda u: lambda x: ...`, such as a sum of derivatives with coefficients",
        why,
        "write lambda u: lambda x: jax.grad(u)(x)[1] + c * jax.grad(u)(x)[0]; linearise a nonlinear equation first",
    )


def _wave(number: int, d: int) -> np.ndarray:
    return np.cos(1.3 + np.arange(d) + 0.7 * number) + 0.25


def _on_monomials(operator: Callable, indices: list[Index]) -> Callable:
    """theta, x -> D[sum_alpha theta_alpha (y - x)^alpha / alpha!](x), linear in theta with slopes a_alpha(x)."""

    def applied(theta, x):
        def u(y):
            total = 0.0
            for weight, index in zip(theta, indices, strict=True):
                term = weight / math.prod(map(math.factorial, index))
                for i, n in enumerate(index):
                    for _ in range(n):
                        term = term * (y[i] - x[i])
                total = total + term
            return total

        return operator(u)(x)

    return applied


def _depth(operator: Callable, x: np.ndarray) -> int:
    """How often the operator differentiates: the derivative tensors of exp(w.x) that it asks for."""
    deepest = [0]
    w = jnp.asarray(_wave(0, len(x)))

    def tensor(n: int) -> Callable:
        @jax.custom_jvp
        def derivative(y):
            out = jnp.exp(jnp.dot(w, y))
            for _ in range(n):
                out = out[..., None] * w
            return out

        @derivative.defjvp
        def rule(primals, tangents):
            deepest[0] = max(deepest[0], n + 1)
            if n >= _HIGHEST:
                raise _refuse(f"an operator of an order above {_HIGHEST}", "such kernels are not resolved in float64")
            return derivative(*primals), jnp.tensordot(tensor(n + 1)(*primals), tangents[0], 1)

        return derivative

    jax.eval_shape(operator(tensor(0)), jnp.asarray(x))
    return deepest[0]
