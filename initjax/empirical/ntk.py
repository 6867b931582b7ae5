"""The exact empirical NTK of any network, tile by tile, without its Jacobian.

Theta[n, m, o, p] = sum over parameters of d f_o(x_n)/d theta . d f_p(x_m)/d theta (Jacot, Gabriel, Hongler 2018,
arXiv:1806.07572). One backward pass per output leaves at each weight the data that meet it and their cotangents;
inner products of gradients follow from these by the cheapest contraction (`taps`, `routes`). Two blocks of examples
give one tile of the kernel; only their features are held.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from initjax.empirical.blocks import as_bytes
from initjax.empirical.explain import Explanation, explanation
from initjax.empirical.features import leaves_of
from initjax.empirical.job import Job
from initjax.empirical.network import Network, chosen_leaves, examples, one_example, signature
from initjax.empirical.tiles import run
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

    Returns
    -------
    `ntk_fn(params, x1, x2=None)`: `params` any parameter tree of the model; `x1`, `x2` batches of inputs (arrays, or
    trees of arrays) with the examples along the first axis, any numbers n1, n2. x2=None means x1 and computes one
    half, the other is its mirror image, so that the kernel is symmetric to the bit. The kernel has the parameters'
    dtype, but at least float32, in which sums are taken. `ntk_fn` may stand under jit, vmap and grad.
    `ntk_fn.explain(params, x1, x2=None)` tells, without computing, how each parameter will be worked on.

    Raises
    ------
    InputError : an unknown option; a pattern that fits no parameter; inputs without a common number of examples;
        outputs that are not real arrays with the examples first; a budget too small for one gradient; and, when
        called with concrete values, a network whose examples influence each other (batch normalisation in training
        mode).

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
    return NtkFunction(Network(model_or_apply_fn), outputs, params_filter, method, memory, bool(by_leaf))


@dataclasses.dataclass(eq=False)
class NtkFunction:
    """What `empirical_ntk` returns: `ntk_fn(params, x1, x2=None)`, and `ntk_fn.explain(params, x1, x2=None)`."""

    network: Network
    outputs: str
    params_filter: Any
    method: str
    memory: Any
    by_leaf: bool
    _jobs: dict = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Any, x1: Any, x2: Any = None) -> Any:
        """The kernel between x1 and x2; a dictionary of kernels with `by_leaf`."""
        params, n1, n2, job = self._prepare(params, x1, x2)
        shape = (n1, n2, *{"trace": (), "diagonal": (job.k,), "full": (job.k, job.k)}[self.outputs])
        leaves = leaves_of(job.plans[0])
        shape = (len(leaves), *shape) if self.by_leaf else shape
        if 0 in shape or not leaves:
            kernel = jnp.zeros(shape, job.dtype)
        else:
            kernel = run(job, job.fit(params, x1, x2, as_bytes(self.memory)), params, x1, x2, shape)
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
        params = self.network.prepare(params, x1)
        chosen = chosen_leaves(params, self.params_filter)
        key = chosen, *(signature(one_example(x)) for x in (x1, x2)), signature(params)
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
