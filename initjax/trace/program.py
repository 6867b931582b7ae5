"""A model and example shapes as one straight-line program: outputs and their tangents from weights and inputs.

The program is `jax.jvp` of the model with every weight leaf and every input perturbed independently: the covariance of
its outputs is the NNGP kernel, that of its tangents the NTK, and one interpreter serves both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import UnsupportedLayerError
from initjax.trace.flax import Functional
from initjax.trace.initstats import LeafStats, leaf_statistics
from initjax.trace.inline import Straight, inline
from initjax.trace.jaxpr import ClosedJaxpr, tracing_float64


@dataclasses.dataclass(frozen=True)
class Program:
    """The straight-line program of one model at one input shape.

    Attributes
    ----------
    body : the equations. Its inputs are, in order: weight leaves, their tangents, the input leaves, the tangents of
        the floating input leaves. Its outputs: the output, its tangent.
    leaves : distribution of every weight leaf.
    input_shapes : of the input leaves.
    floating : for every input leaf, whether it is floating (only these have tangents).
    """

    body: Straight
    leaves: tuple[LeafStats, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    floating: tuple[bool, ...]


def trace_program(functional: Functional, leaves: tuple[LeafStats, ...], x) -> Program:
    """Trace the model at the shapes of `x`, in float64: constants inside activations keep all their digits.

    Parameters
    ----------
    functional, leaves : from `as_functional` and `leaf_statistics`.
    x : inputs, with the structure of the example; only shapes and dtypes are read.
    Raises
    ------
    UnsupportedLayerError : the model has a custom_vjp, has several outputs, or a non-floating output.
    """
    shapes, tree = jax.tree.flatten(x)
    floating = tuple(bool(jnp.issubdtype(leaf.dtype, jnp.floating)) for leaf in shapes)
    _check_outputs(functional)

    def traced(real) -> ClosedJaxpr:
        def struct(leaf, is_real=True):
            return jax.ShapeDtypeStruct(leaf.shape, real if is_real else leaf.dtype)

        def both(params, params_dot, xs, reals_dot):
            def model(params, reals):
                it = iter(reals)
                merged = [next(it) if f else leaf for leaf, f in zip(xs, floating, strict=True)]
                return functional.apply(params, jax.tree.unflatten(tree, merged))

            reals = [leaf for leaf, f in zip(xs, floating, strict=True) if f]
            return jax.jvp(model, (params, reals), (params_dot, reals_dot))

        xs = [struct(leaf, f) for leaf, f in zip(shapes, floating, strict=True)]
        params = jax.tree.map(struct, functional.abstract_params)
        reals = [leaf for leaf, f in zip(xs, floating, strict=True) if f]
        return jax.make_jaxpr(both)(params, params, xs, reals)

    with tracing_float64():
        try:
            closed = traced(jnp.float64)
        except TypeError as error:
            if "custom_vjp" in str(error):
                raise _custom_vjp(error) from error
            closed = traced(jnp.float32)  # a model that insists on float32, as in the carry of a scan
    with tracing_float64():  # unrolling a loop traces its body
        body = inline(closed)
    return Program(body, leaves, tuple(tuple(leaf.shape) for leaf in shapes), floating)


def trace_model(functional: Functional, x, real) -> ClosedJaxpr:
    """The model alone, without its tangent, at the shapes of `x`: weight leaves, then input leaves, to one output.

    real : type of all that is floating; float32 where the model insists on it, as in the carry of a scan.
    """

    _check_outputs(functional)

    def traced(real) -> ClosedJaxpr:
        def struct(leaf):
            is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
            return jax.ShapeDtypeStruct(leaf.shape, real if is_real else leaf.dtype)

        return jax.make_jaxpr(functional.apply)(*jax.tree.map(struct, (functional.abstract_params, x)))

    try:
        closed = traced(real)
    except TypeError:
        closed = traced(jnp.float32)
    return closed


def read_model(functional: Functional) -> tuple[LeafStats, ...]:
    """The distribution of the weight leaves; refuses leaves that share a random key."""
    leaves = leaf_statistics(functional)
    owners: dict[Any, str] = {}
    for leaf in leaves:
        if leaf.key is None:
            continue
        if leaf.key in owners and np.prod(leaf.shape) > 0:
            raise UnsupportedLayerError(
                f"the weights {owners[leaf.key]} and {leaf.name} are drawn with the same random key",
                "weights drawn with keys of their own",
                "they are equal or correlated, and the infinite-width theory takes different leaves as independent",
                "split the key, or give each its own stream; to tie weights, use one parameter twice",
                layer=leaf.name,
            )
        owners[leaf.key] = leaf.name
    return leaves


def _custom_vjp(error) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"a function with a custom_vjp rule: {' '.join(str(error).split())[:200]}",
        "functions with JAX's own derivative, or with a custom_jvp rule",
        "the NTK follows forward derivatives, and a custom_vjp rule has none; ignoring the rule would give the kernel "
        "of another gradient",
        "write the rule as jax.custom_jvp",
        primitive="custom_vjp_call",
    )


def _check_outputs(functional: Functional) -> None:
    found = jax.tree_util.tree_flatten_with_path(functional.abstract_output)[0]
    if len(found) == 1 and jnp.issubdtype(found[0][1].dtype, jnp.floating):
        return
    paths = [jax.tree_util.keystr(path) for path, _ in found]
    given = ", ".join(
        f"{path or 'one array'}: {a.dtype}{list(a.shape)}" for path, (_, a) in zip(paths, found, strict=True)
    )
    real = [p for p, (_, a) in zip(paths, found, strict=True) if jnp.issubdtype(a.dtype, jnp.floating)]
    raise UnsupportedLayerError(
        f"the model's output is ({given})",
        "one floating array, first axis the examples",
        "a kernel is the covariance of one output",
        "choose one, in ij.kernel_fn with output=..., elsewhere by a pair, "
        f"(init_fn, lambda params, x: apply_fn(params, x){real[0]}); init and apply of a linen module will do"
        if real
        else "return the floating array in front of it",
        layer="output",
    )
