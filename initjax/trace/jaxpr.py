"""The one place that touches what may move in JAX: jaxpr types, the local float64 context, evaluating equations.

Everything else in the package imports these names from here and stays on `jax`, `jax.numpy` and `jax.lax`.
"""

import contextlib

import jax
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Var as Var
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun


@contextlib.contextmanager
def float64():
    """Compute concrete values in float64, whatever the user's x64 flag, also while the user's function is traced.

    Inside, only concrete values may be used. Take results out as NumPy arrays: a float64 `jax.Array` is
    truncated by the first operation outside when the user's flag is off.
    """
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        yield


@contextlib.contextmanager
def tracing_float64():
    """Trace with 64-bit types on, whatever the user's flag; unlike `float64`, tracers of the user's may take part."""
    with jax.enable_x64(True):
        yield


def scan_parts(equation: JaxprEqn) -> tuple[int, int, ClosedJaxpr]:
    """Number of constants, number of carries, and body of a scan; JAX 0.12 describes them by trees."""
    params = equation.params
    body = params["jaxpr"]
    if not isinstance(body, ClosedJaxpr):
        body = ClosedJaxpr(body, ())
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"], body
    consts, carries, _ = (len(group) for group in params["ft_in"].unpack())
    return consts, carries, body


def is_traced(*values) -> bool:
    """Whether any leaf of `values` is a tracer (of jit, grad or vmap)."""
    return any(
        isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
        for leaf in jax.tree.leaves(values)
    )
