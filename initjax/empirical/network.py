"""A network of any kind as `apply(params, x)`, and what its examples contribute to a tile of the kernel."""

import fnmatch
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.program import trace
from initjax.empirical.taps import find_taps
from initjax.errors import InputError
from initjax.trace.flax import as_functional, check_array, leaf_names
from initjax.trace.jaxpr import is_traced


class Network:
    """`model_or_apply_fn` made ready for Jacobians; a Flax model is resolved on the first inputs it meets."""

    def __init__(self, model_or_apply_fn: Any):
        self._model = model_or_apply_fn
        self._functional: Any = None
        self._apply: Any = model_or_apply_fn if _is_apply_fn(model_or_apply_fn) else None
        self._independent = False
        self._facts: dict = {}
        self._features = jax.jit(
            self._compute_features, static_argnames=("chosen", "chunk", "outputs", "dtype", "taps")
        )

    def prepare(self, params: Any, x: Any) -> Any:
        """Resolve the model on `x`; the parameter tree its `apply` takes, from what the user calls its parameters."""
        if self._apply is not None:
            return params
        if self._functional is None:
            example = _one_example(x) if is_traced(x) else jax.tree.map(lambda a: jnp.asarray(a)[:1], x)
            self._functional = as_functional(self._model, example)
        functional = self._functional
        if params is None and functional.values is not None:
            return functional.values
        if functional.kind == "linen" and isinstance(params, Mapping) and "params" in params:
            if others := sorted(set(params) - {"params"}):
                raise InputError(
                    f"variables of a linen module with the collections {['params', *others]}",
                    'the tree of trainable parameters, variables["params"]',
                    f"the kernel would be that of a freshly initialized {', '.join(others)}, not of the given one",
                    'give a function: empirical_ntk(lambda p, x: model.apply({**variables, "params": p}, x))',
                )
            params = params["params"]
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

    def outputs(self, params: Any, x: Any) -> int:
        """Number of outputs for one example."""
        return self._once("outputs", self._outputs, params, x)

    def _outputs(self, params, x):
        result = jax.eval_shape(self._call, params, _one_example(x))
        leaves = jax.tree.leaves(result)
        if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating) or leaves[0].shape[:1] != (1,):
            raise InputError(
                f"a network that maps one example to {jax.tree.map(lambda a: f'{a.dtype}{list(a.shape)}', result)}",
                "one real floating-point array with the examples along its first axis",
                "the kernel pairs the outputs of two examples",
                "wrap the network in a function apply_fn(params, x) that returns such an array",
            )
        return int(np.prod(leaves[0].shape[1:]))

    def check_independent(self, params: Any, x: Any):
        """Refuse, once, a network in which an example has a derivative with respect to another one."""
        differentiable = all(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in jax.tree.leaves(x))
        if self._independent or not differentiable or is_traced(params, x) or examples(x, "x") < 2:
            return

        @jax.jit
        def influence(params, x):
            out, pull = jax.vjp(lambda x: self._call(params, x), x)  # backwards, which every network can
            change = pull(jnp.ones_like(out).at[0].set(jnp.zeros((), out.dtype)))[0]
            largest = [jnp.abs(leaf).max(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(change)]
            return functools.reduce(jnp.maximum, [leaf.astype(largest[0].dtype) for leaf in largest])

        other, own = influence(params, jax.tree.map(lambda a: jnp.asarray(a[:2]), x))
        # exactly zero but for convolution algorithms that transform whole batches
        if float(other) > 1e-3 * float(own):
            raise InputError(
                f"a network whose output on one example changes with another example (derivative {float(other):.3g}, "
                f"beside {float(own):.3g} with respect to its own)",
                "a network that treats each example alone",
                "Theta(x, x') then depends on the whole batch, as with batch normalisation in training mode",
                "evaluate with stored statistics, for example "
                "empirical_ntk(lambda p, x: model.apply({**variables, 'params': p}, x, train=False))",
            )
        self._independent = True

    def features(self, params, x, start, **static) -> "Features":
        """Of outputs start .. start + chunk of the examples of `x`, all that two blocks need for their tile."""
        return self._features(params, x, start, **static)

    def footprint(self, params, x, *, chosen, outputs, dtype, taps) -> tuple[int, int]:
        """Bytes of the features of one output of one example, and of the passes through the network for one example."""
        return self._once(("footprint", chosen, dtype, taps), self._footprint, params, x, chosen, outputs, dtype, taps)

    def _footprint(self, params, x, chosen, outputs, dtype, taps):
        program = trace(self._call, params, _one_example(x))
        found, left = find_taps(program, chosen) if taps else ([], chosen)
        sizes = [program.avals[tap.value].size + tap.bias for tap in found]
        sizes += [program.avals[tap.operand].size for tap in found if tap.operand is not None]
        sizes += [np.size(leaf) for leaf, keep in zip(jax.tree.leaves(params), left, strict=True) if keep]
        avals = [program.avals[number] for step in program.steps for number in step.outputs]
        values = [aval.size * aval.dtype.itemsize for aval in avals if jnp.issubdtype(aval.dtype, jnp.inexact)]
        # forward values stay for the backward pass, whose own come and go, a few at a time for each output
        return sum(sizes) * dtype.itemsize, sum(values) + 3 * outputs * max(values, default=0)

    def _once(self, what, compute, params, x, *arguments):
        """`compute(params, x, ...)`, a fact of their shapes alone, traced once for each."""
        key = (what, *(_signature(tree) for tree in (params, _one_example(x))))
        if key not in self._facts:
            self._facts[key] = compute(params, x, *arguments)
        return self._facts[key]

    def _call(self, params, x):
        apply = self._apply if self._functional is None else self._functional.apply
        return apply(params, x)

    def _compute_features(self, params, x, start, *, chosen, chunk, outputs, dtype, taps):
        leaves, structure = jax.tree.flatten(params)

        def one_example(x):
            x = jax.tree.map(lambda a: a[None], x)
            program = trace(self._call, params, x)
            found, left = find_taps(program, chosen) if taps else ([], chosen)
            operands = {tap.operand for tap in found if tap.operand is not None}

            def run(zeros, given):
                given = iter(given)
                merged = [next(given) if keep else leaf for leaf, keep in zip(leaves, left, strict=True)]
                seen: dict[int, Any] = dict(zip(program.data, jax.tree.leaves(x), strict=True))

                def tap(number, value):
                    if number in operands:
                        seen[number] = value
                    return value + zeros[number] if number in zeros else value

                out = program.evaluate(jax.tree.unflatten(structure, merged), x, tap)[0]
                return out.reshape(outputs), [None if tap.operand is None else seen[tap.operand] for tap in found]

            zeros = {tap.value: jnp.zeros((), program.avals[tap.value].dtype) for tap in found}
            zeros = {n: jnp.broadcast_to(zero, program.avals[n].shape) for n, zero in zeros.items()}
            given = [leaf for leaf, keep in zip(leaves, left, strict=True) if keep]
            out, pullback, data = jax.vjp(run, zeros, given, has_aux=True)
            basis = jax.nn.one_hot(start + jnp.arange(chunk), outputs, dtype=out.dtype)
            cotangents, gradients = jax.vmap(pullback)(basis)
            return Features(
                inputs=[_input_with_one(seen, tap.bias, dtype) for tap, seen in zip(found, data, strict=True)],
                cotangents=[cotangents[tap.value].reshape(chunk, -1).astype(dtype) for tap in found],
                gradients=[g.reshape(chunk, -1).astype(dtype) for g in gradients],
            )

        return jax.vmap(one_example)(x)


class Features(NamedTuple):
    """What a block of n examples, c outputs each, contributes to tiles of the kernel.

    inputs, cotangents : for each tap, what meets the weights, (n, I), and g, (n, c, J).
    gradients : for each parameter without a tap, its gradients, (n, c, size).
    """

    inputs: list[jax.Array]
    cotangents: list[jax.Array]
    gradients: list[jax.Array]


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
    return int(lengths.pop() or 0)


def chosen_leaves(params: Any, params_filter: Any) -> tuple[bool, ...]:
    """For each leaf of `params`, whether the kernel sums over it: floating-point and picked by the filter."""
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    if params_filter is None:
        picked = [True] * len(leaves)
    elif isinstance(params_filter, str):
        picked = [fnmatch.fnmatchcase(name, params_filter) for name in names]
    else:
        picked = [bool(params_filter(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
    chosen = tuple(
        keep and jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for keep, leaf in zip(picked, leaves, strict=True)
    )
    if not any(chosen):
        raise InputError(
            f"params_filter={params_filter!r} on parameters {list(names)}",
            "a choice of at least one floating-point parameter",
            "the kernel is a sum over the chosen parameters",
            'patterns match the whole path: "*/kernel", "Dense_0/*"; None takes all parameters',
        )
    return chosen


def _input_with_one(data, bias, dtype):
    """The vector a that meets a kernel, with a 1 for the bias on the same y; the 1 alone for a bias without kernel."""
    parts = [] if data is None else [data.reshape(-1).astype(dtype)]
    return jnp.concatenate([*parts, jnp.ones(int(bias), dtype)])


def _is_apply_fn(model) -> bool:
    """Whether this is `apply_fn(params, x)`, and not a Flax module, a pair or a factory of one argument."""
    if not inspect.isroutine(model) and not hasattr(model, "__wrapped__") and not hasattr(model, "func"):
        return False
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return True
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters) > 1


def _one_example(x):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), jnp.result_type(a)), x)


def _input_shapes(x):
    shapes = _shapes(x)
    return shapes[0] if len(shapes) == 1 else shapes


def _signature(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _shapes(params):
    return [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
