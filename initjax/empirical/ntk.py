"""The exact empirical NTK of any network: contraction of per-example Jacobians, tile by tile.

Theta[n, m, o, p] = sum over parameters of d f_o(x_n)/d theta . d f_p(x_m)/d theta (Jacot, Gabriel, Hongler 2018,
arXiv:1806.07572). The rows of a block of examples come from one backward pass per output (the Jacobian contraction of
Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720); two blocks give one tile of the kernel. Only the blocks of
one tile are held, so memory does not grow with the number of examples beyond the kernel itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.blocks import default_memory, tiles
from initjax.empirical.network import Network, chosen_leaves, examples
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
) -> Callable[..., jax.Array]:
    r"""Exact tangent kernel of a network at its own width and parameters.

    Parameters
    ----------
    model_or_apply_fn : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, a pair
        `(init_fn, apply_fn)`, or a function `apply_fn(params, x)`. Outputs have the examples along their first axis;
        all further axes are flattened into k outputs.
    outputs : which pairs of outputs. "trace": the mean over outputs, 1/k sum_o Theta[n, m, o, o], shape (n1, n2), the
        quantity whose infinite-width limit is `kernel_fn(x).ntk`. "full": all pairs, shape (n1, n2, k, k).
        "diagonal": each output with itself, shape (n1, n2, k).
    params_filter : which parameters count: a pattern on their "/"-joined path such as "*/kernel" or "Dense_0/*", or a
        function `(path, leaf) -> bool`; None for all.
    method : "auto": gradients of dense layers by their inputs and cotangents, not formed, and those of all other
        parameters as per-example Jacobians; "jacobian": Jacobians throughout. The kernel is the same up to rounding.
    memory : budget for Jacobians in bytes; None for half of the free memory, at most 2 GiB. It bounds the work at
        hand, not the kernel that is returned; under an outer `vmap` it holds for each mapped copy.

    Returns
    -------
    `ntk_fn(params, x1, x2=None)`: `params` any parameter tree of the model; `x1`, `x2` batches of inputs (arrays, or
    trees of arrays) with the examples along the first axis, any numbers n1, n2. x2=None means x1 and computes one
    half, the other is its mirror image, so that the kernel is symmetric to the bit. The kernel has the parameters'
    dtype (at least float32). `ntk_fn` may stand under jit, vmap and grad.

    Raises
    ------
    InputError : an unknown option; a pattern that fits no parameter; inputs without a common number of examples;
        outputs that are not one real array with the examples first; a budget too small for one gradient; and, when
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
            'give fnmatch patterns on paths joined by "/"',
        )
    if memory is not None and not (np.ndim(memory) == 0 and np.isreal(memory) and 0 < memory < float("inf")):
        raise InputError(
            f"memory={memory!r}",
            "a positive number of bytes, or None",
            "it bounds the Jacobians",
            "give 2**30 for 1 GiB",
        )
    network = Network(model_or_apply_fn)

    def ntk_fn(params: Any, x1: Any, x2: Any = None) -> jax.Array:
        return _kernel(network, params, x1, x2, outputs, params_filter, method, memory)

    return ntk_fn


def _kernel(network, params, x1, x2, outputs, params_filter, method, memory):
    n1 = examples(x1, "x1")
    n2 = n1 if x2 is None else examples(x2, "x2")
    params = network.prepare(params, x1)
    k = network.outputs(params, x1)
    if x2 is not None and (k2 := network.outputs(params, x2)) != k:
        raise InputError(
            f"x1 and x2 on which the network has {k} and {k2} outputs",
            "inputs that differ in nothing but the number of examples",
            "the kernel pairs output o of an example with output p of another",
            "give x2 the per-example shape of x1",
        )
    network.check_independent(params, x1)
    chosen = chosen_leaves(params, params_filter)
    leaves = [leaf for leaf, keep in zip(jax.tree.leaves(params), chosen, strict=True) if keep]
    dtype = jnp.dtype(jnp.float64 if any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves) else jnp.float32)
    static = dict(chosen=chosen, outputs=k, dtype=dtype, taps=method == "auto")
    row_bytes, work_bytes = network.footprint(params, x1, **static)
    cell_bytes = dtype.itemsize * (k if outputs != "trace" else 1) * (k if outputs == "full" else 1)
    budget = default_memory() if memory is None else int(memory)

    def blocks(x, n, size):
        """Examples in blocks of one size; the last is filled up with its last example."""
        for start in range(0, n, size):
            index = np.minimum(np.arange(start, start + size), n - 1)
            yield jax.tree.map(lambda a, index=index: jnp.asarray(a)[index], x)

    size1, chunk = tiles(n1, k, row_bytes, work_bytes, cell_bytes, budget)
    size2 = size1 if x2 is None else tiles(n2, k, row_bytes, work_bytes, cell_bytes, budget).examples
    blocks1 = list(blocks(x1, n1, size1))
    blocks2 = blocks1 if x2 is None else list(blocks(x2, n2, size2))

    def features(block, start):
        return network.features(params, block, start, chunk=chunk, **static)

    table = _tiles(features, blocks1, blocks2, range(0, k, chunk), outputs, x2 is None)
    if not table:
        return jnp.zeros((n1, n2, *{"trace": (), "diagonal": (k,), "full": (k, k)}[outputs]), dtype)
    # on the host, unless under a transformation: thousands of tiles would make one very long program
    xp = jnp if is_traced(*table.values()) else np
    kernel = _join(table, (len(blocks1), len(blocks2)), x2 is None, outputs, k, dtype, xp)
    return jnp.asarray(kernel[:n1, :n2])


def _tiles(features, blocks1, blocks2, starts, outputs, symmetric):
    """Tiles of the kernel by their block indices (a, b), b <= a where it is symmetric.

    A "trace" tile is the sum over output chunks; else the tile is left in parts, one for each (pair of) output chunks.
    """
    table: dict = {}
    for a, block in enumerate(blocks1):
        for start in starts:
            left = features(block, start)
            for b in range(a + 1) if symmetric else range(len(blocks2)):
                same = symmetric and a == b
                for other in starts if outputs == "full" else (start,):
                    right = left if same and other == start else features(blocks2[b], other)
                    part = _contract(left, right, outputs)
                    if outputs == "trace" and (a, b) in table:
                        table[a, b] = [table[a, b][0] + part]
                    else:
                        table.setdefault((a, b), []).append(part)
    return table


@functools.partial(jax.jit, static_argnames="outputs")
def _contract(left, right, outputs):
    """One tile from the features of two blocks: inner products of gradients, summed over parameters."""
    inner = {"trace": "nop,mop->nm", "full": "nop,mqp->nmoq", "diagonal": "nop,mop->nmo"}[outputs]

    def product(subscripts, a, b):
        return jnp.einsum(subscripts, a, b, precision="highest")

    terms = [product(inner, a, b) for a, b in zip(left.gradients, right.gradients, strict=True)]
    for a, b, g, h in zip(left.inputs, right.inputs, left.cotangents, right.cotangents, strict=True):
        term = product(inner, g, h)
        terms.append(term * product("ni,mi->nm", a, b).reshape(term.shape[:2] + (1,) * (term.ndim - 2)))
    return functools.reduce(jnp.add, terms)


def _join(table, blocks, symmetric, outputs, k, dtype, xp):
    """The kernel from its tiles; outputs past the k-th, which only fill up a chunk, are dropped."""

    def whole(parts):
        parts = [xp.asarray(part) for part in parts]
        if outputs == "trace":
            return parts[0] / xp.asarray(k, dtype)
        if outputs == "diagonal":
            return xp.concatenate(parts, axis=2)[..., :k]
        chunks = math.isqrt(len(parts))
        rows = [xp.concatenate(parts[i : i + chunks], axis=3) for i in range(0, len(parts), chunks)]
        return xp.concatenate(rows, axis=2)[..., :k, :k]

    tiles = {index: whole(parts) for index, parts in table.items()}
    if symmetric:
        mirrored = {"trace": (1, 0), "diagonal": (1, 0, 2), "full": (1, 0, 3, 2)}[outputs]
        for a, b in list(tiles):
            tile = tiles[a, b].transpose(mirrored)
            # the product of a block with itself is symmetric up to rounding only
            tiles[b, a] = tile if a != b else (tiles[a, a] + tile) / xp.asarray(2, dtype)
    return xp.concatenate([xp.concatenate([tiles[a, b] for b in range(blocks[1])], 1) for a in range(blocks[0])], 0)
