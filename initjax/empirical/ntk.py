"""The exact empirical NTK of any network, tile by tile, without its Jacobian.

Theta[n, m, o, p] = sum over parameters of d f_o(x_n)/d theta . d f_p(x_m)/d theta (Jacot, Gabriel, Hongler 2018,
arXiv:1806.07572). One backward pass per output leaves at each weight the data that meet it and their cotangents;
inner products of gradients follow from these by the cheapest contraction (`taps`, `routes`). Two blocks of examples
give one tile of the kernel; only their features are held.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from initjax.empirical.blocks import as_bytes
from initjax.empirical.devices import Ring
from initjax.empirical.explain import Explanation, explanation
from initjax.empirical.features import leaves_of
from initjax.empirical.job import Job
from initjax.empirical.network import Network, chosen_leaves, examples, one_example, signature
from initjax.empirical.tiles import Run
from initjax.errors import InputError
from initjax.trace.jaxpr import is_traced

OUTPUTS = ("trace", "full", "diagonal")


def empirical_ntk(
    model_or_apply_fn: Any,
    *,
    outputs: str = "trace",
    params_filter: Any = None,
    method: str = "auto",
    memory: Any = None,
    by_leaf: bool = False,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
    coupled: bool = False,
    devices: Any = None,
) -> "NtkFunction":
    r"""Exact tangent kernel of a network at its own width and parameters.

    Parameters
    ----------
    model_or_apply_fn : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, a pair
        `(init_fn, apply_fn)`, or a function `apply_fn(params, x)`. Outputs, an array or a tree of arrays, have the
        examples along their first axis; all further axes of all arrays are flattened into k outputs.
    outputs : which pairs of outputs. "trace": the mean over outputs, 1/k sum_o Theta[n, m, o, o], shape (n1, n2), the
        quantity whose infinite-width limit is `kernel_fn(x).ntk`. "full": all pairs, shape (n1, n2, k, k).
        "diagonal": each output with itself, shape (n1, n2, k).
    params_filter : which parameters count: a pattern on their "/"-joined path such as "*/kernel" or "Dense_0/*"; where
        that fits none, a regular expression searched in the path, such as "kernel|scale"; a function `(path, leaf) ->
        bool` or `path -> bool`; None for all.
    method : "auto": for each parameter the cheapest of the exact contractions that its use in the network allows, by a
        count of operations and memory; see `ntk_fn.explain`. "jacobian": the gradient of every parameter is formed by
        automatic differentiation. The kernel is the same up to rounding.
    memory : budget in bytes, or text such as "4GiB"; None for half of the free memory. It bounds the work at hand, not
        the kernel that is returned; under an outer `vmap` it holds for each mapped copy.
    by_leaf : return the summand of each parameter instead of their sum, `{path: kernel}`.
    apply_kwargs, rngs : further arguments of every call, such as `dict(train=False)`, and random streams of a linen
        module, such as `{"dropout": key}`, the same for every example.
    coupled : allow networks whose examples influence each other (batch normalisation in training mode): each batch is
        then one unit, and Theta[n, m] pairs the outputs n of x1 and m of x2 as functions of whole batches.
    devices : over which blocks of rows are spread; None for all local ones.

    Returns
    -------
    `ntk_fn(params, x1, x2=None)`: `params` any parameter tree of the model, or the variables of a linen module with all
    their collections; `x1`, `x2` batches of inputs (arrays, or
    trees of arrays) with the examples along the first axis, any numbers n1, n2. x2=None means x1 and computes one
    half, the other is its mirror image, so that the kernel is symmetric to the bit. The kernel has the parameters'
    dtype, but at least float32, in which sums are taken. `ntk_fn` may stand under jit, vmap and grad.
    `ntk_fn.explain(params, x1, x2=None)` tells, without computing, how each parameter will be worked on.

    Raises
    ------
    InputError : an unknown option; a pattern that fits no parameter; inputs without a common number of examples;
        outputs that are not real arrays with the examples first; integers that are used as numbers; complex values; a
        budget too small, with the smallest that works; and, when called with concrete values, inputs, outputs or
        gradients that are not finite, and a network whose examples influence each other.
    PartialKernelError : a block failed or was interrupted; the error carries the others, and can resume.

    Accuracy
    --------
    Exact up to rounding: relative to the largest entry about 1e-15 in float64 and 1e-6 in float32. A condition number
    above 1e6 needs float64 parameters and inputs.

    Examples
    --------
    A linear model has the Gram matrix of its inputs as kernel:

    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> ntk_fn = ij.empirical_ntk(lambda params, x: x @ params["w"])
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> ntk_fn({"w": jnp.ones((2, 3))}, x).tolist()
    [[5.0, 11.0], [11.0, 25.0]]

    References
    ----------
    Jacot, Gabriel, Hongler 2018 (arXiv:1806.07572), section 4; Novak, Sohl-Dickstein, Schoenholz 2022
    (arXiv:2206.08720), sections 3.2, Jacobian contraction, and 3.4, structured derivatives.
    """
    for name, value, accepted in (("outputs", outputs, OUTPUTS), ("method", method, ("auto", "jacobian"))):
        if value not in accepted:
            raise InputError(
                f"{name}={value!r}",
                " or ".join(repr(option) for option in accepted),
                "outputs are the pairs of outputs the kernel has, method is how Jacobians are contracted",
                f"leave {name} out for {accepted[0]!r}",
            )
    if params_filter is not None and not isinstance(params_filter, str) and not callable(params_filter):
        raise InputError(
            f"params_filter={params_filter!r}",
            'a pattern such as "*/kernel", a function (path, leaf) -> bool, or None',
            "it chooses parameters by their path",
            'give a shell pattern or a regular expression on paths joined by "/"',
        )
    if memory is not None:
        as_bytes(memory)
    devices = tuple(jax.local_devices() if devices is None else devices)
    ring = Ring(devices) if len(devices) > 1 else None
    network = Network(model_or_apply_fn, apply_kwargs, rngs)
    return NtkFunction(network, outputs, params_filter, method, memory, bool(by_leaf), bool(coupled), ring)


@dataclasses.dataclass(eq=False)
class NtkFunction:
    """What `empirical_ntk` returns: `ntk_fn(params, x1, x2=None)`, and `ntk_fn.explain(params, x1, x2=None)`."""

    network: Network
    outputs: str
    params_filter: Any
    method: str
    memory: Any
    by_leaf: bool
    coupled: bool = False
    ring: Ring | None = None
    _jobs: dict = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Any, x1: Any, x2: Any = None) -> Any:
        """The kernel between x1 and x2; a dictionary of kernels with `by_leaf`."""
        if self.coupled:
            return self._of_batches(params, x1, x2)
        params, n1, n2, job = self._prepare(params, x1, x2)
        shape = (n1, n2, *{"trace": (), "diagonal": (job.k,), "full": (job.k, job.k)}[self.outputs])
        leaves = leaves_of(job.plans[0])
        shape = (len(leaves), *shape) if self.by_leaf else shape
        ring = None if is_traced(params, x1, x2) or self.ring is None or n1 < 2 * self.ring.size else self.ring
        kernel = jnp.zeros(shape, job.dtype)
        if leaves and job.k:
            tiles = job.fit(params, x1, x2, as_bytes(self.memory), 1 if ring is None else ring.size)
            kernel = Run(job, tiles, params, x1, x2, shape, ring).finish()
            if not is_traced(kernel) and not bool(jnp.isfinite(kernel).all()):
                raise _not_finite(self.network, job, params, x1, x2)
        if not self.by_leaf:
            return kernel
        kernels = {job.names[leaf]: kernel[i] for i, leaf in enumerate(leaves)}
        unused = [name for name, keep in zip(job.names, job.chosen, strict=True) if keep and name not in kernels]
        return kernels | {name: jnp.zeros(shape[1:], job.dtype) for name in unused}

    def explain(self, params: Any, x1: Any, x2: Any = None) -> Explanation:
        """A table of what each parameter costs, by which route, and the memory foreseen.

        Programs are compiled, for their memory, but not run; inputs may be `jax.ShapeDtypeStruct`.
        """
        params, _, _, job = self._prepare(params, x1, x2)
        return explanation(job, job.fit(params, x1, x2, as_bytes(self.memory)), params)

    def _prepare(self, params, x1, x2):
        n1 = examples(x1, "x1")
        n2 = n1 if x2 is None else examples(x2, "x2")
        if x2 is not None and jax.tree.structure(x1) != jax.tree.structure(x2):
            raise InputError(
                f"x1 and x2 of the structures {jax.tree.structure(x1)} and {jax.tree.structure(x2)}",
                "inputs that differ in nothing but the number of examples",
                "one network is called on both",
                "give x2 the same keys and nesting as x1",
            )
        params = self.network.prepare(params, x1)
        chosen = chosen_leaves(params, self.params_filter)
        key = self.network.version, chosen, *(signature(one_example(x)) for x in (x1, x2)), signature(params)
        job = self._jobs.get(key)
        if job is None:
            k = self.network.outputs(params, x1)
            if x2 is not None and (k2 := self.network.outputs(params, x2)) != k:
                raise InputError(
                    f"x1 and x2 on which the network has {k} and {k2} outputs",
                    "inputs that differ in nothing but the number of examples",
                    "the kernel pairs output o of an example with output p of another",
                    "give x2 the per-example shape of x1",
                )
            self.network.check_independent(params, x1)
            job = Job(self.network, params, x1, x2, k, self.outputs, chosen, self.method == "auto", self.by_leaf)
            if not is_traced(*(plan.program.constants for plan in job.plans)):
                self._jobs[key] = job
        return params, n1, n2, job

    def _of_batches(self, params, x1, x2):
        """The kernel of the function that maps a batch to all its outputs, each batch being one example of it."""
        n1, n2 = examples(x1, "x1"), examples(x1 if x2 is None else x2, "x2")
        params = self.network.prepare(params, x1)

        def whole(params, batches):
            outputs = self.network._call(params, jax.tree.map(lambda a: a[0], batches))
            flat = [out.reshape(out.shape[0], -1) for out in jax.tree.leaves(outputs)]
            return jnp.concatenate(flat, 1)[None]

        if n1 != n2:
            raise InputError(
                f"x1 with {n1} and x2 with {n2} examples, and coupled=True",
                "batches of one size",
                "the outputs of a whole batch are one vector",
                "give x2 as many examples as x1 has",
            )
        inner = NtkFunction(Network(whole), "full", self.params_filter, self.method, self.memory, self.by_leaf)
        kernels = inner(params, *(None if x is None else jax.tree.map(lambda a: a[None], x) for x in (x1, x2)))

        def reduced(kernel):
            kernel = kernel[0, 0].reshape(n1, -1, n2, kernel.shape[-1] // n2).transpose(0, 2, 1, 3)
            diagonal = jnp.diagonal(kernel, axis1=2, axis2=3)
            return {"full": kernel, "diagonal": diagonal, "trace": diagonal.mean(-1)}[self.outputs]

        return {name: reduced(kernel) for name, kernel in kernels.items()} if self.by_leaf else reduced(kernels)


def _not_finite(network, job, params, x1, x2):
    """Why a kernel is not finite."""
    for name, leaf in zip(job.names, jax.tree.leaves(params), strict=True):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            given, remedy = f"the parameter {name} with entries that are NaN or inf", "load the parameters anew"
            break
    else:
        bad = [
            name
            for name, x in (("x1", x1), ("x2", x2))
            if x is not None
            and not all(bool(jnp.isfinite(out).all()) for out in jax.tree.leaves(network._call(params, x)))
        ]
        what = f"outputs on {' and '.join(bad)}" if bad else "gradients, though its outputs are finite,"
        given = f"a network with {what} that are NaN or inf"
        remedy = "look for the layer where the signal overflows (ij.inspect), or use float64 parameters"
    return InputError(given, "parameters, outputs and gradients that are finite", "the kernel would not be", remedy)
