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


def one_equation(equation: JaxprEqn):
    """An equation as a function of its operands, literals included, which keeps custom derivatives."""
    given = [atom for atom in equation.invars if not isinstance(atom, Literal)]
    variables = list(dict.fromkeys(given))
    kept = [var for var in equation.outvars if type(var).__name__ != "DropVar"]
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    jaxpr = empty.replace(invars=variables, outvars=kept, eqns=[equation], effects=equation.effects)
    run = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))

    def function(*operands):
        pairs = zip(equation.invars, operands, strict=True)
        results = iter(run(*{v: x for v, x in pairs if not isinstance(v, Literal)}.values()))
        return [next(results) if var in kept else None for var in equation.outvars]

    return function


def is_traced(*values) -> bool:
    """Whether any leaf of `values` is a tracer (of jit, grad or vmap)."""
    return any(
        isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
        for leaf in jax.tree.leaves(values)
    )
