"""Every kind of model as two pure functions, `init(key)` and `apply(params, x)`: the only file that imports Flax.

linen modules, nnx modules, nnx factories and `(init_fn, apply_fn)` pairs look alike from here on. What is not trained
(batch statistics, dropout counters) is fixed at its initial value and stays out of `params`.
"""

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced

_MODELS = (
    "a linen module instance, an nnx module instance, an nnx factory `lambda rngs: Model(rngs=rngs)`, "
    "or a pair `(init_fn, apply_fn)`"
)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as pure functions of its trainable parameters.

    Attributes
    ----------
    kind : "linen", "nnx" or "functions".
    init : `init(key) -> params`, the trainable parameters as a pytree of arrays; traceable.
    apply : `apply(params, x) -> output`; `x` has the structure of the example inputs (array, tuple or dict).
    example : the example inputs, as given.
    values : the parameters a finished nnx module holds (then `init` returns them whatever the key), else None.
    abstract_params : shapes and dtypes of `params`.
    abstract_output : shapes and dtypes of the output on the example.
    state : what is not trained, at its initial value, by collection.
    """

    kind: Literal["linen", "nnx", "functions"]
    init: Callable[[Any], Any]
    apply: Callable[[Any, Any], Any]
    example: Any
    values: Any
    abstract_params: Any
    abstract_output: Any
    state: Any

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The path of every parameter leaf, such as `Dense_0/kernel`, in the order of `jax.tree.leaves(params)`."""
        return leaf_names(self.abstract_params)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The path of every module that owns a parameter, in the order of the parameters."""
        return tuple(dict.fromkeys(layer_of(name) for name in self.leaf_names))


def leaf_names(params) -> tuple[str, ...]:
    """The path of every leaf of a parameter tree: keys, indices and attributes joined by `/`."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)


def nnx_parameters(tree):
    """The trainable parameters of an nnx module as nested dictionaries; anything else as it is."""
    if not _is_nnx(tree):
        return tree
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(tree, nnx.Param))


def with_output(functional: Functional, output) -> Functional:
    """The model with one of its outputs: by path (`"policy"`, `"heads/value"`, `0`), or a function of all of them.

    Raises
    ------
    InputError : a path that the output does not have, or a function that cannot be called on it.
    """
    names = leaf_names(functional.abstract_output)

    def chosen(out):
        if callable(output):
            return output(out)
        return jax.tree.leaves(out)[names.index(str(output))]

    if not callable(output) and str(output) not in names:
        raise InputError(
            f"output = {output!r}",
            f"one of {', '.join(name or 'the whole' for name in names)}, or a function of the output",
            "it picks the array whose kernel is computed out of what the model returns",
            "give the path of one array, keys and indices joined by /",
        )
    apply = _leniently(lambda params, x: chosen(functional.apply(params, x)))
    try:
        abstract = jax.eval_shape(chosen, functional.abstract_output)
    except Exception as error:
        raise InputError(
            f"output = {output!r}, which raised {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            f"a function of the model's output ({', '.join(name or 'one array' for name in names)})",
            "it is called on what the model returns",
            "give the path of one array instead",
        ) from error
    return dataclasses.replace(functional, apply=apply, abstract_output=abstract)


def layer_of(leaf_name: str) -> str:
    """The module that owns a leaf: `blocks/0/Dense_0` for `blocks/0/Dense_0/kernel`."""
    return leaf_name.rpartition("/")[0] or leaf_name


def as_functional(
    model, inputs, *, apply_kwargs: dict | None = None, rngs=None, collections: dict | None = None
) -> Functional:
    """Turn a model into pure functions `init(key)` and `apply(params, x)`.

    Parameters
    ----------
    model : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, or a pair
        `(init_fn, apply_fn)` with `init_fn(key)` (or `init_fn(key, x)`) and `apply_fn(params, x)`.
    inputs : an example batch, or the call's arguments: a tuple is positional, a dict is by keyword.
        `jax.ShapeDtypeStruct` leaves are accepted where only shapes matter.
    apply_kwargs : further keyword arguments of every call, such as `train=False`.
    rngs : further random streams by name, such as `{"dropout": key}`; fixed for every call.
    collections : of a linen module, what is not trained, such as `{"batch_stats": ...}`, instead of its initial value.

    Returns
    -------
    Functional, with `init`, `apply` and the shapes of parameters and output.

    Raises
    ------
    InputError : for a class instead of an instance, something that is no model, complex or non-finite inputs, and
        inputs on which the model cannot be called.

    Examples
    --------
    >>> from flax import linen as nn
    >>> model = as_functional(nn.Dense(3), jnp.ones((2, 5)))
    >>> model.kind, model.leaf_names, model.abstract_output.shape
    ('linen', ('bias', 'kernel'), (2, 3))
    """
    _check_inputs(inputs)
    apply_kwargs, rngs = dict(apply_kwargs or {}), dict(rngs or {})
    if _is_linen(model):
        kind, build = "linen", functools.partial(_from_linen, given=collections)
    elif _is_nnx(model):
        kind, build = "nnx", _from_nnx_instance
    elif isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
        kind, build = "functions", _from_pair
    elif isinstance(model, type) or not callable(model):
        raise _not_a_model(model)
    else:
        kind, build = "nnx", _from_nnx_factory
    with _lenient():
        init, apply, values, state = build(model, inputs, apply_kwargs, rngs)
    init, apply = _leniently(init), _leniently(apply)
    try:
        abstract_params = jax.eval_shape(init, jax.random.key(0))
        abstract_output = jax.eval_shape(apply, abstract_params, _abstract(inputs))
    except Exception as error:
        raise cannot_call(model, inputs, apply_kwargs, error) from error
    return Functional(kind, init, apply, inputs, values, abstract_params, abstract_output, state)


def _lenient():
    """The author's model decides how its dtypes mix; strict modes are for the caller's own code."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def _leniently(function):
    @functools.wraps(function)
    def wrapped(*args):
        with _lenient():
            return function(*args)

    return wrapped


def _call_arguments(x) -> tuple[tuple, dict]:
    """Positional and keyword arguments of a call on `x`."""
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def _from_linen(model, inputs, apply_kwargs, rngs, given=None):
    from flax.core import meta

    def variables(key):
        args, kwargs = _call_arguments(inputs)
        return meta.unbox(model.init({**rngs, "params": key}, *args, **kwargs, **apply_kwargs))

    inputs = _zeros_if_abstract(inputs)
    collections = _try(model, inputs, apply_kwargs, lambda: jax.eval_shape(variables, jax.random.key(0)))
    others = [name for name in collections if name != "params"]
    state = dict(given or {})
    if others and not set(others) <= set(state):

        def initial_state(key):
            return {name: collection for name, collection in variables(key).items() if name != "params"}

        with jax.ensure_compile_time_eval():
            state = {**jax.jit(initial_state)(jax.random.key(0)), **state}

    def init(key):
        return variables(key).get("params", {})

    def apply(params, x):
        args, kwargs = _call_arguments(x)
        out = model.apply(
            {**state, "params": params}, *args, rngs=rngs or None, mutable=others or False, **kwargs, **apply_kwargs
        )
        return out[0] if others else out

    return init, apply, None, state


def _from_nnx_instance(model, inputs, apply_kwargs, rngs):
    from flax import nnx

    if rngs:
        raise InputError(
            f"rngs = {sorted(rngs)} beside an nnx module instance",
            "rngs for linen modules and nnx factories",
            "an nnx module already holds its random streams",
            "leave rngs out, or give the factory `lambda rngs: Model(rngs=rngs)` instead of the instance",
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    values, state = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return lambda key: values, _nnx_apply(graph, params, rest, state, apply_kwargs), values, state


def _from_nnx_factory(factory, inputs, apply_kwargs, rngs):
    from flax import nnx

    def split(key):
        streams = nnx.Rngs(_typed(key), **rngs)
        try:
            module = factory(streams)
        except TypeError as error:
            raise _not_a_model(factory, error) from error
        if not isinstance(module, nnx.Module):
            raise _not_a_model(factory, f"called with nnx.Rngs it returned {type(module).__name__}")
        return nnx.split(module, nnx.Param, ...)

    template: list = []

    def initial_state(key):
        graph, params, rest = split(key)
        template[:] = [graph, params, rest]
        return nnx.to_pure_dict(rest)

    # the abstract run names what the state holds; it is computed only if there is any
    state = jax.eval_shape(initial_state, jax.random.key(0))
    graph, params, rest = template
    params, rest = jax.tree.map(_shape_of, params), jax.tree.map(_shape_of, rest)
    if jax.tree.leaves(state):
        with jax.ensure_compile_time_eval():
            state = jax.jit(initial_state)(jax.random.key(0))

    def init(key):
        return nnx.to_pure_dict(split(key)[1])

    return init, _nnx_apply(graph, params, rest, state, apply_kwargs), None, state


def _nnx_apply(graph, params_template, state_template, state, apply_kwargs):
    from flax import nnx

    def fill(template, values):
        filled = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(filled, values)
        return filled

    given = [leaf.dtype for leaf in jax.tree.leaves(params_template)]

    def apply(params, x):
        values, real = state, jnp.result_type(float)
        if any(leaf.dtype != dtype for leaf, dtype in zip(jax.tree.leaves(params), given, strict=True)):
            # a trace in float64: running averages are updated in place, in the precision of what is averaged
            wide = lambda leaf: leaf.astype(real) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
            values = jax.tree.map(wide, state)
        module = nnx.merge(graph, fill(params_template, params), fill(state_template, values))
        args, kwargs = _call_arguments(x)
        return module(*args, **kwargs, **apply_kwargs)

    return apply


def _from_pair(pair, inputs, apply_kwargs, rngs):
    init_fn, apply_fn = pair
    inputs = _zeros_if_abstract(inputs)
    try:
        given = list(inspect.signature(init_fn).parameters.values())
        required = [p for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        # the init of a linen module is (rngs, *args)
        takes_inputs = len(required) > 1 or any(p.kind is p.VAR_POSITIONAL for p in given)
    except (TypeError, ValueError):  # a callable without a signature
        takes_inputs = False
    args, kwargs = _call_arguments(inputs)

    def variables(key):
        return init_fn(key, *args, **kwargs) if takes_inputs else init_fn(key)

    # the variables of a linen module: what stands beside "params" is not trained
    whole = _try(pair, inputs, {}, lambda: jax.eval_shape(variables, jax.random.key(0)))
    others = [name for name in whole if name != "params"] if isinstance(whole, dict) and "params" in whole else []
    state = {}
    if others:
        with jax.ensure_compile_time_eval():
            state = jax.jit(lambda key: {name: variables(key)[name] for name in others})(jax.random.key(0))

    def init(key):
        made = variables(key)
        return {"params": made["params"]} if others else made

    def apply(params, x):
        args, kwargs = _call_arguments(x)
        return apply_fn({**state, **params} if others else params, *args, **kwargs, **apply_kwargs)

    return init, apply, None, state


def _is_linen(model) -> bool:
    if "flax.linen" not in sys.modules:  # no linen module can exist before linen was imported
        return False
    return isinstance(model, sys.modules["flax.linen"].Module)


def _is_nnx(model) -> bool:
    if "flax.nnx" not in sys.modules:
        return False
    return isinstance(model, sys.modules["flax.nnx"].Module)


def _typed(key):
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _shape_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _abstract(inputs):
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf), inputs)


def _zeros_if_abstract(inputs):
    """Inputs for `init`, which look at shapes: tracers and shapes are replaced by zeros."""

    def concrete(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf):
            return np.zeros(leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.map(concrete, inputs)


def _check_inputs(inputs):
    leaves = jax.tree_util.tree_flatten_with_path(inputs)[0]
    if not leaves:
        raise InputError(
            f"inputs = {inputs!r}",
            "an example batch, a tuple of positional arguments or a dict of keyword arguments",
            "the model is traced on it",
            "give an array of shape (n, ...)",
        )
    for path, leaf in leaves:
        name = "inputs" + jax.tree_util.keystr(path)
        check_array(leaf, name)


def check_array(leaf, name: str):
    """Refuse what is no array, complex values, and (if concrete) NaN or inf."""
    try:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    except Exception:
        dtype = np.dtype(object)
    numeric = hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex, list))
    if not numeric or getattr(dtype, "kind", "") == "O":
        raise InputError(
            f"{name} of type {type(leaf).__name__}",
            "numeric arrays",
            "the model is traced on arrays",
            "convert it with jnp.asarray; pass flags such as train=False through apply_kwargs",
        )
    if jnp.issubdtype(dtype, np.complexfloating):
        raise InputError(
            f"{name} with dtype {dtype}",
            "real or integer arrays",
            "the theory of wide networks used here is that of real Gaussian fields",
            "stack real and imaginary part as two features: jnp.concatenate([x.real, x.imag], -1)",
        )
    if isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf) or not jnp.issubdtype(dtype, np.inexact):
        return
    bad = ~np.isfinite(np.asarray(leaf))  # in its own precision: a batch may be as large as half of the memory
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            f"{name} with {int(bad.sum())} entries that are NaN or inf, the first at index {where}",
            "finite numbers",
            "one such entry makes every kernel entry of its example NaN",
            "clean the data, for example with x[np.isfinite(x).all(axis=-1)]",
        )


def _describe(inputs) -> str:
    def one(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    return str(jax.tree.map(one, inputs)).replace("'", "")


def _not_a_model(model, detail: Any = None) -> InputError:
    if isinstance(model, type):
        name = model.__name__
        return InputError(
            f"the class {name}",
            _MODELS,
            "a class has no sizes yet: it is the instance that fixes widths and initializers",
            f"give {name}(...) with its arguments, or `lambda rngs: {name}(..., rngs=rngs)` for an nnx class",
        )
    name = getattr(model, "__name__", None) or repr(model)
    return InputError(
        f"the model {name} of type {type(model).__name__}" + (f": {detail}" if detail else ""),
        _MODELS,
        "weights and forward pass have to be traced separately",
        "wrap it in one of these; a plain function becomes a pair (lambda key: params, function)",
    )


def cannot_call(model, inputs, apply_kwargs, error) -> InputError:
    """The four-part error for a model that raised `error` when it was called."""
    name = type(model).__name__ if not isinstance(model, tuple) else "the pair (init_fn, apply_fn)"
    text = " ".join(str(error).split())
    return InputError(
        f"{name} called with inputs {_describe(inputs)}" + (f" and {apply_kwargs}" if apply_kwargs else ""),
        "inputs of the shapes and dtypes the model was written for, first axis the examples",
        f"the call raised {type(error).__name__}: {text[:600]}",
        "check the shape of the inputs (a tuple means positional arguments, a dict keyword arguments); "
        'further call arguments go into apply_kwargs, random streams such as dropout into rngs={"dropout": key}',
    )


def _try(model, inputs, apply_kwargs, call):
    try:
        return call()
    except Exception as error:
        raise cannot_call(model, inputs, apply_kwargs, error) from error
