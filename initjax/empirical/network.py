"""A network of any kind as `apply(params, x)`, and which of its parameters count."""

import fnmatch
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.independence import keeps_examples_apart
from initjax.errors import InputError
from initjax.trace.flax import as_functional, cannot_call, check_array, leaf_names
from initjax.trace.jaxpr import is_traced


class Network:
    """`model_or_apply_fn` made ready for Jacobians; a Flax model is resolved on the first inputs it meets."""

    def __init__(self, model_or_apply_fn: Any, apply_kwargs: dict | None = None, rngs: Any = None):
        self._model, self._options = model_or_apply_fn, dict(apply_kwargs=apply_kwargs, rngs=rngs)
        self._collections: dict = {}
        self.version = 0  # of what is not trained
        self._functional: Any = None
        self._apply: Any = model_or_apply_fn if _is_apply_fn(model_or_apply_fn) else None
        self._independent = False

    def prepare(self, params: Any, x: Any) -> Any:
        """Resolve the model on `x`; the parameter tree its `apply` takes, from what the user calls its parameters."""
        if self._apply is not None:
            return params
        collections: dict = {}
        if isinstance(params, Mapping) and "params" in params and self._is_linen(x):
            collections, params = {name: part for name, part in params.items() if name != "params"}, params["params"]
        self._resolve(x, collections)
        functional = self._functional
        if params is None and functional.values is not None:
            return functional.values
        expected, names = functional.abstract_params, functional.leaf_names
        if _shapes(params) != _shapes(expected):
            raise InputError(
                f"params with the leaf shapes {_shapes(params)}, and inputs of the shape {_input_shapes(x)}",
                f"parameters of this model for such inputs: {dict(zip(names, _shapes(expected), strict=True))}",
                "each parameter is differentiated where the model uses it",
                "check the inputs' last axis, and give model.init(key, x)['params'] (linen) or "
                "nnx.state(model, nnx.Param) (nnx) of this very model",
            )
        # an nnx.State and the plain dictionary of its values have the same leaves in the same order
        return jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(params))

    def _is_linen(self, x):
        self._resolve(x, self._collections)
        return self._functional.kind == "linen"

    def _resolve(self, x, collections):
        """The model as functions, with these values of what is not trained."""
        old, new = (jax.tree.leaves(part) for part in (self._collections, collections))
        if self._functional is not None and len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True)):
            return
        example = one_example(x) if is_traced(x) or _is_abstract(x) else jax.tree.map(lambda a: jnp.asarray(a)[:1], x)
        self._functional = as_functional(self._model, example, collections=collections, **self._options)
        self._collections, self.version = collections, self.version + 1

    def outputs(self, params: Any, x: Any) -> int:
        """Number of outputs for one example, over all arrays the network returns."""
        try:
            result = jax.eval_shape(self._call, params, one_example(x))
        except Exception as error:
            raise cannot_call(self._model, x, dict(self._options["apply_kwargs"] or {}), error) from error
        leaves = jax.tree.leaves(result)
        real = all(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.shape[:1] == (1,) for leaf in leaves)
        if not leaves or not real:
            raise InputError(
                f"a network that maps one example to {jax.tree.map(lambda a: f'{a.dtype}{list(a.shape)}', result)}",
                "real floating-point arrays with the examples along their first axis",
                "the kernel pairs the outputs of two examples",
                "wrap the network in a function apply_fn(params, x) that returns such arrays only",
            )
        return sum(int(np.prod(leaf.shape[1:])) for leaf in leaves)

    def check_independent(self, params: Any, x: Any):
        """Refuse, once, a network in which an example has a derivative with respect to another one.

        Most programs show that there is none; the others are measured.
        """
        if self._independent or is_traced(params, x) or _is_abstract(x) or examples(x, "x") < 2:
            return
        two = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *np.shape(a)[1:]), jnp.result_type(a)), x)
        if keeps_examples_apart(self._call, params, two):
            self._independent = True
            return
        if not all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(x)):
            return self._check_alone(params, x)

        @jax.jit
        def influence(params, x):
            out, pull = jax.vjp(lambda x: self._call(params, x), x)  # backwards, which every network can
            change = pull(jax.tree.map(lambda a: jnp.ones_like(a).at[0].set(jnp.zeros((), a.dtype)), out))[0]
            largest = [jnp.abs(leaf).max(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(change)]
            return functools.reduce(jnp.maximum, [leaf.astype(largest[0].dtype) for leaf in largest])

        other, own = influence(params, jax.tree.map(lambda a: jnp.asarray(a[:2]), x))
        # exactly zero but for convolution algorithms that transform whole batches
        if float(other) > 1e-3 * float(own):
            raise _coupled(f"derivative {float(other):.3g}, beside {float(own):.3g} with respect to its own")
        self._independent = True

    def _check_alone(self, params, x):
        """The same for inputs without derivatives: an example alone against the same one beside another."""

        @jax.jit
        def change(params, x):
            beside = jax.tree.leaves(self._call(params, x))
            alone = jax.tree.leaves(self._call(params, jax.tree.map(lambda a: a[:1], x)))
            difference = [jnp.max(jnp.abs(a[:1] - b), initial=0.0) for a, b in zip(beside, alone, strict=True)]
            return difference, [jnp.max(jnp.abs(b), initial=0.0) for b in alone]

        difference, size = (float(max(map(float, part))) for part in change(params, jax.tree.map(lambda a: a[:2], x)))
        # rounding of float32 products of other shapes
        if difference > 1e-3 * size:
            raise _coupled(f"by {difference:.3g}, of {size:.3g}")
        self._independent = True

    def _call(self, params: Any, x: Any) -> Any:
        apply = self._apply if self._functional is None else self._functional.apply
        return apply(params, x)


def _coupled(detail):
    return InputError(
        f"a network whose output on one example changes with another example ({detail})",
        "a network that treats each example alone, or coupled=True",
        "Theta(x, x') then depends on the whole batch, as with batch normalisation in training mode",
        "evaluate with stored statistics: apply_kwargs=dict(train=False) (or use_running_average=True) and "
        "params=variables with their batch_stats; coupled=True takes the batch as it is",
    )


def examples(x: Any, name: str) -> int:
    """Number of examples of a batch of inputs; refuses inputs that do not agree on one."""
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        check_array(leaf, name)
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths:
        raise InputError(
            f"{name} with leaves of the shapes {[np.shape(leaf) for leaf in leaves]}",
            "an array, or a tree of arrays, that all have the same number of examples as their first axis",
            "the kernel has one row for each example",
            f"give {name}[None] for a single example, and close over arguments that are no examples",
        )
    n = int(lengths.pop() or 0)
    if n == 0:
        raise InputError(
            f"{name} with no examples: leaves of the shapes {[np.shape(leaf) for leaf in leaves]}",
            "at least one example",
            "a kernel without rows says nothing",
            "check the slice that made the batch",
        )
    return n


def chosen_leaves(params: Any, params_filter: Any) -> tuple[bool, ...]:
    """For each leaf of `params`, whether the kernel sums over it: floating-point and picked by the filter."""
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    if params_filter is None:
        picked = [True] * len(leaves)
    elif isinstance(params_filter, str):
        picked = [fnmatch.fnmatchcase(name, params_filter) for name in names]
        if not any(picked):
            picked = _matching(params_filter, names)
    else:
        takes_leaf = _required(params_filter) != 1
        picked = [
            bool(params_filter(*(name, leaf)[: 1 + takes_leaf])) for name, leaf in zip(names, leaves, strict=True)
        ]
    chosen = tuple(
        keep and jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for keep, leaf in zip(picked, leaves, strict=True)
    )
    for name, leaf, keep in zip(names, leaves, picked, strict=True):
        if keep and jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise InputError(
                f"the parameter {name} with dtype {jnp.result_type(leaf)}",
                "real parameters",
                "the gradient with respect to a complex parameter is no single vector",
                "hold real and imaginary part as two real parameters, or leave it out with params_filter",
            )
    if not any(chosen):
        raise InputError(
            f"params_filter={params_filter!r} on parameters {list(names)}",
            "a choice of at least one floating-point parameter",
            "the kernel is a sum over the chosen parameters",
            'shell patterns match the whole path: "*/kernel", "Dense_0/*"; other text is a regular expression, '
            'searched in it: "kernel|scale"; None takes all parameters',
        )
    return chosen


def _is_apply_fn(model) -> bool:
    """Whether this is `apply_fn(params, x)`, and not a Flax module, a pair or a factory of one argument."""
    if not inspect.isroutine(model) and not hasattr(model, "__wrapped__") and not hasattr(model, "func"):
        return False
    required = _required(model)
    return required is None or required > 1


def _required(function) -> int | None:
    """Number of arguments without default, or None if there may be any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters)


def _matching(pattern, names):
    try:
        return [re.search(pattern, name) is not None for name in names]
    except re.error:
        return [False] * len(names)


def one_example(x: Any) -> Any:
    """Shapes of a batch of one."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), jnp.result_type(a)), x)


def _is_abstract(x):
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def _input_shapes(x):
    shapes = _shapes(x)
    return shapes[0] if len(shapes) == 1 else shapes


def signature(tree: Any):
    """Structure, shapes and dtypes of a tree of arrays, as a key."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _shapes(params):
    return [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
