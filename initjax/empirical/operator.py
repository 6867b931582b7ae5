r"""The empirical NTK as a linear operator: products with vectors, its trace and its diagonal, without the matrix.

Theta v = J (J^T v), one backward and one forward pass through the network (Pearlmutter 1994; NTK-vector products of
Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720, section 3.3). Examples are taken in blocks: J^T v is summed
over the blocks of the second set, then each block of the first gives its rows of the product. What is held is a few
copies of the parameters and one block of activations, whatever the number of examples.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.blocks import as_bytes
from initjax.empirical.network import Network, chosen_leaves, examples
from initjax.empirical.ntk import empirical_ntk
from initjax.errors import InputError
from initjax.trace.flax import leaf_names
from initjax.trace.jaxpr import is_traced

OUTPUTS = ("trace", "full")
METHODS = ("auto", "matrix-free", "matrix")
# About as many products as forming the matrix costs, for the networks measured in benchmarks/spectrum.py.
WORTH_FORMING = 8
# Bytes of activations that blocks are made for where the budget allows more: beyond, they only leave the caches.
CACHED, FEWEST = 32 * 2**20, 64
# Blocks of examples that a traced product may write out one after another.
UNROLLED = 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """What is fixed when the operator is traced."""

    network: Network
    outputs: str
    k: int
    n1: int
    n2: int
    chosen: tuple[bool, ...]
    dtype: Any
    memory: int
    bytes_per_example: int
    bytes_per_tangent: int
    forward: bool
    params_bytes: int

    def call(self, leaves, params, x):
        """Outputs (examples, k) as a function of the chosen leaves."""
        given = iter(leaves)
        every, structure = jax.tree.flatten(params)
        merged = [next(given) if keep else leaf for leaf, keep in zip(every, self.chosen, strict=True)]
        out = self.network._call(jax.tree.unflatten(structure, merged), x)
        return out.reshape(out.shape[0], self.k)

    def leaves(self, params):
        """The leaves that the kernel sums over."""
        return [leaf for leaf, keep in zip(jax.tree.leaves(params), self.chosen, strict=True) if keep]

    def filter(self, params):
        """The same choice for `empirical_ntk`."""
        names = {name for name, keep in zip(leaf_names(params), self.chosen, strict=True) if keep}
        return lambda name, leaf: name in names

    def cotangents(self, index, rows):
        """Those of `index` among all vectors, (vectors, examples, k): for "trace" of one output each."""
        if self.outputs == "full":
            return rows[index]
        return rows[index // self.k] * jax.nn.one_hot(index % self.k, self.k, dtype=rows.dtype)[:, None, :]

    def kept(self, index, tangents):
        """What a product keeps of J u, (vectors, examples, k): for "trace" the output its cotangent belonged to."""
        return (
            jnp.take_along_axis(tangents, (index % self.k)[:, None, None], 2) if self.outputs == "trace" else tangents
        )

    def blocks(self, vectors: int, traced: bool = False) -> tuple[int, int]:
        """Vectors at once, and examples in a block, for products with `vectors` vectors of outputs.

        A traced product takes few large blocks, which keep its program short."""
        # vectors may take half of what the passes for one example leave
        each = 3 * self.params_bytes + self.bytes_per_tangent
        at_once = max(1, min(vectors, (self.memory - self.bytes_per_example) // 2 // each))
        room = self.memory - 3 * at_once * self.params_bytes
        per_example = self.bytes_per_example + at_once * self.bytes_per_tangent
        block = room // per_example if traced else min(room // per_example, max(FEWEST, CACHED // per_example))
        return -(-vectors // -(-vectors // at_once)), int(max(0, block))


@jax.tree_util.register_pytree_node_class
class NTKOperator:
    """The symmetric (or, between two sets, rectangular) NTK as a linear operator. Made by `ntk_operator`.

    `op @ v`, `op(v)` and `op.matvec(v)` are Theta v, for a vector or a matrix of columns; `op.T` is the operator from
    the second set to the first. It is a pytree, so it may be an argument of a jitted function; parameters and inputs
    are its leaves. `jax.scipy.sparse.linalg.cg`, `scipy.sparse.linalg` (which reads shape, dtype, matvec and rmatvec)
    and matfree take it as it is.

    Attributes
    ----------
    shape, dtype : of the matrix it stands for, (n1, n2), or (n1 k, n2 k) for outputs="full", where output o of
        example n has the index n k + o.
    matrix : the matrix, if it has been formed, else None.
    """

    ndim = 2

    def __init__(self, setting: _Setting, params: Any, x1: Any, x2: Any = None, matrix: Any = None):
        self._setting, self._params, self._x1, self._x2, self.matrix = setting, params, x1, x2, matrix

    def tree_flatten(self):
        return (self._params, self._x1, self._x2, self.matrix), self._setting

    @classmethod
    def tree_unflatten(cls, setting, children):
        return cls(setting, *children)

    @property
    def shape(self) -> tuple[int, int]:
        rows = 1 if self._setting.outputs == "trace" else self._setting.k
        return self._setting.n1 * rows, self._setting.n2 * rows

    @property
    def dtype(self) -> Any:
        return self._setting.dtype

    @property
    def T(self) -> "NTKOperator":
        """The operator between the two sets in the other order."""
        if self._x2 is None:
            return self
        setting = dataclasses.replace(self._setting, n1=self._setting.n2, n2=self._setting.n1)
        return NTKOperator(setting, self._params, self._x2, self._x1, None if self.matrix is None else self.matrix.T)

    def __repr__(self):
        how = "matrix-free" if self.matrix is None else "formed"
        return f"NTKOperator({self.shape[0]}x{self.shape[1]}, {np.dtype(self.dtype).name}, {how})"

    def __matmul__(self, v: Any) -> jax.Array:
        """Theta v for v of shape (n2,) or (n2, m)."""
        v = self._vector(v)
        columns = v[:, None] if v.ndim == 1 else v
        if self.matrix is not None:
            product = jnp.matmul(self.matrix, columns, precision="highest")
        else:
            product = _product(self._setting, self._params, self._x1, self._x2, columns)
        if not is_traced(product) and not bool(jnp.isfinite(product).all()) and bool(jnp.isfinite(v).all()):
            raise InputError(
                f"an NTK product with {int((~jnp.isfinite(product)).sum())} entries that are NaN or infinite",
                "a network with finite outputs and gradients on these inputs",
                "every entry of the product sums over the gradients of all examples",
                "look for the layer where the signal overflows (ij.inspect), or use float64 parameters",
            )
        return product[:, 0] if v.ndim == 1 else product

    __call__ = matvec = matmat = __matmul__

    def rmatvec(self, v: Any) -> jax.Array:
        """Theta^T v for v of shape (n1,) or (n1, m)."""
        return self.T @ v

    rmatmat = rmatvec

    def diagonal(self) -> jax.Array:
        """Exact diagonal: squared gradient norms of each example (for "trace" their mean over outputs)."""
        self._symmetric("diagonal")
        if self.matrix is not None:
            return jnp.diagonal(self.matrix)
        setting = self._setting
        per_example = setting.k * (setting.params_bytes + setting.bytes_per_tangent) + setting.bytes_per_example
        size = int(max(1, min(setting.memory // (4 * per_example), setting.n1)))
        out = jnp.zeros((setting.n1, 1 if setting.outputs == "trace" else setting.k), setting.dtype)
        block = functools.partial(_diagonal_block, setting, size, self._params, self._x1)
        return _loop(-(-setting.n1 // size), block, out).reshape(-1)

    def trace(self) -> jax.Array:
        """Exact trace, the sum of `diagonal()`: one backward pass for each output."""
        return self.diagonal().sum()

    def to_dense(self) -> jax.Array:
        """The matrix, formed by `empirical_ntk` if it is not yet."""
        return self.form().matrix

    def form(self) -> "NTKOperator":
        """The same operator with its matrix formed: worth it from about eight products on, where the matrix fits."""
        if self.matrix is not None:
            return self
        setting = self._setting
        theta = empirical_ntk(
            setting.network._call,
            outputs=setting.outputs,
            params_filter=setting.filter(self._params),
            memory=setting.memory,
        )(self._params, self._x1, self._x2)
        if setting.outputs == "full":
            theta = theta.transpose(0, 2, 1, 3).reshape(self.shape)
        return NTKOperator(setting, self._params, self._x1, self._x2, theta.astype(self.dtype))

    def _symmetric(self, name):
        if self._x2 is not None:
            raise InputError(
                f"{name}() of an NTK operator between two sets of inputs, of shape {self.shape}",
                "an operator of one set with itself",
                "a kernel between two sets has no diagonal of squared gradient norms",
                "ntk_operator(model, params, x) with x2 left out",
            )

    def _vector(self, v):
        v = jnp.asarray(v)
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1] or jnp.issubdtype(v.dtype, jnp.complexfloating):
            raise InputError(
                f"an NTK product with an array of shape {v.shape} and dtype {v.dtype}",
                f"a real vector of shape ({self.shape[1]},) or columns of shape ({self.shape[1]}, m)",
                f"the operator has the shape {self.shape}"
                + (", with output o of example n at n k + o" if self._setting.outputs == "full" else ""),
                "flatten examples and outputs with v.reshape(-1)",
            )
        return v.astype(self.dtype)


def ntk_operator(
    model: Any,
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str = "trace",
    params_filter: Any = None,
    method: str = "auto",
    products: Any = None,
    memory: Any = None,
) -> NTKOperator:
    r"""Empirical tangent kernel as a linear operator: Theta v = J (J^T v), without the matrix.

    Parameters
    ----------
    model : as in `empirical_ntk`: a Flax module, a factory, a pair, or `apply_fn(params, x)`.
    params : parameter tree of the model.
    x1, x2 : batches of n1 and n2 inputs with the examples along the first axis; x2=None means x1.
    outputs : "trace": the mean over the k outputs, acts on n2 numbers, and costs k passes; "full": all pairs of
        outputs, acts on n2 k numbers (output o of example n at n k + o), one pass.
    params_filter : which parameters count, as in `empirical_ntk`.
    method : "matrix-free", "matrix" (formed at once), or "auto": formed if `products` says that more than about eight
        products are wanted and the matrix fits into `memory`, else matrix-free.
    products : number of products that will be asked for, a hint for "auto"; None if not known.
    memory : budget for activations and tangents, in bytes or as "4GiB"; None for half of the free memory.

    Returns
    -------
    NTKOperator, with `@`, `matvec`, `rmatvec`, `trace()`, `diagonal()`, `to_dense()`, `T`, `shape`, `dtype`. The dtype
    is float64 if a parameter is, else float32.

    Raises
    ------
    InputError : what `empirical_ntk` refuses; a budget too small for one example, with the smallest that works; a
        product that is not finite.

    Accuracy
    --------
    A product is exact up to rounding: relative to |Theta| |v| about 1e-15 in float64 and 1e-6 in float32. Networks
    that compute in bfloat16 give products of bfloat16 accuracy, summed in float32.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> op = ij.ntk_operator(lambda params, x: x @ params["w"], {"w": jnp.ones((2, 1))}, x)
    >>> op, (op @ jnp.array([1.0, 0.0])).tolist(), float(op.trace())
    (NTKOperator(2x2, float32, matrix-free), [5.0, 11.0], 30.0)

    References
    ----------
    Novak, Sohl-Dickstein, Schoenholz 2022 (arXiv:2206.08720), section 3.3, NTK-vector products.
    """
    for name, value, accepted in (("outputs", outputs, OUTPUTS), ("method", method, METHODS)):
        if value not in accepted:
            raise InputError(
                f"{name}={value!r}",
                " or ".join(repr(option) for option in accepted),
                "an operator acts on one number for each example, or for each example and output",
                f"leave {name} out for {accepted[0]!r}",
            )
    if products is not None and not (np.ndim(products) == 0 and np.isreal(products) and 0 < products < float("inf")):
        raise InputError(
            f"products={products!r}",
            "a positive number, or None",
            "it says how often the operator will be applied",
            "leave products out if it is not known",
        )
    budget = as_bytes(memory)
    network = Network(model)
    sizes = [examples(x, name) for x, name in ((x1, "x1"), (x2, "x2")) if x is not None]
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
    setting = _Setting(
        network,
        outputs,
        k,
        sizes[0],
        sizes[-1],
        chosen,
        dtype,
        budget,
        *_footprint(network, params, x1, k),
        params_bytes=dtype.itemsize * sum(np.size(leaf) for leaf in leaves),
    )
    if setting.blocks(1)[1] < 1:
        needed = 3 * setting.params_bytes + setting.bytes_per_example + setting.bytes_per_tangent
        raise InputError(
            f"memory={setting.memory:,} bytes",
            f"at least {needed:,} bytes for this network",
            f"three copies of the parameters take {3 * setting.params_bytes:,} bytes, and the passes for one example "
            f"{setting.bytes_per_example + setting.bytes_per_tangent:,}",
            "give more memory, or leave parameters out with params_filter",
        )
    x1, x2 = (None if x is None else jax.tree.map(jnp.asarray, x) for x in (x1, x2))
    operator = NTKOperator(setting, params, x1, x2)
    fits = dtype.itemsize * math.prod(operator.shape) <= setting.memory
    many = products is not None and products > WORTH_FORMING
    return operator.form() if method == "matrix" or (method == "auto" and many and fits) else operator


def _footprint(network, params, x, k) -> tuple[int, int, bool]:
    """Bytes that one example adds to what a backward pass keeps, and to the passes of each vector; and whether the
    network can be differentiated forwards, which functions with a custom backward pass cannot."""

    def kept(count):
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *np.shape(a)[1:]), jnp.result_type(a)), x)
        residuals = jax.eval_shape(lambda p, b: jax.vjp(lambda p: network._call(p, b), p)[1], params, batch)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)), batch

    (one, batch), (two, _) = kept(1), kept(2)
    equations = list(_equations(jax.make_jaxpr(network._call)(params, batch).jaxpr))
    values = [
        var.aval for eqn in equations for var in eqn.outvars if hasattr(getattr(var.aval, "dtype", 0), "itemsize")
    ]
    widest = max((math.prod(aval.shape) * aval.dtype.itemsize for aval in values), default=0)
    forward = not any(eqn.primitive.name.startswith("custom_vjp") for eqn in equations)
    # a layer's value and its cotangent or tangent, and what the product or convolution between them copies
    return max(two - one, 0) + 2 * widest, 4 * widest + 8 * k, forward


def _equations(jaxpr):
    """All equations of a program, also of those inside its calls and loops."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _product(setting: _Setting, params, x1, x2, columns):
    """Theta times columns (n2 or n2 k, m), chunk after chunk of vectors, block after block of examples."""
    trace, k, m = setting.outputs == "trace", setting.k, columns.shape[1]
    vectors = m * k if trace else m
    at_once, block = setting.blocks(vectors, is_traced(params, x1, x2, columns))
    rows = columns.T.reshape(m, setting.n2, -1)  # (m, n2, 1 or k)
    leaves = setting.leaves(params)
    parts = []
    for first in range(0, vectors, at_once):
        # the last chunk is filled up with its last vector
        index = jnp.minimum(first + jnp.arange(at_once), vectors - 1)
        if x2 is None and block >= setting.n1:
            parts.append(_one_block(setting, params, x1, rows, index))
            continue
        size, count = min(block, setting.n2), -(-setting.n2 // block)
        total = [jnp.zeros((at_once, *leaf.shape), setting.dtype) for leaf in leaves]
        pull = functools.partial(_pull_back, setting, size, params, x1 if x2 is None else x2, rows, index)
        total = _loop(count, pull, total)
        size, count = min(block, setting.n1), -(-setting.n1 // block)
        u = [part.astype(leaf.dtype) for part, leaf in zip(total, leaves, strict=True)]
        out = jnp.zeros((at_once, setting.n1, 1 if trace else k), setting.dtype)
        parts.append(_loop(count, functools.partial(_push_forward, setting, size, params, x1, u, index), out))
    out = jnp.concatenate(parts)[:vectors]
    out = out.reshape(m, k, setting.n1).mean(1) if trace else out.reshape(m, setting.n1 * k)
    return out.T


def _loop(count, body, carry):
    """`carry = body(i, carry)` for i < count: on the host, where each call runs at full speed (XLA's CPU loops run
    convolutions on one core, ten times slower), but as a loop in long programs."""
    if count > UNROLLED and is_traced(body.args[2:], carry):
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


@functools.partial(jax.jit, static_argnums=0)
def _one_block(setting, params, x, rows, index):
    """J J^T v where all examples are one block: both passes share what the forward pass keeps."""
    leaves = setting.leaves(params)
    out, push = _linearize(lambda p: setting.call(p, params, x), leaves, setting.forward)
    pull = jax.linear_transpose(push, leaves)
    u = jax.vmap(pull)(setting.cotangents(index, rows).astype(out.dtype))[0]
    return setting.kept(index, jax.vmap(push)(u)).astype(setting.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pull_back(setting, size, params, x, rows, index, i, total):
    """Add J^T v of block i to the total; each part (vectors, *leaf)."""
    # the last block moves back so that it is full; examples that an earlier block has had count 0
    start = jnp.minimum(i * size, setting.n2 - size)
    fresh = start + jnp.arange(size) >= i * size
    block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), x)
    rows = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    rows = jnp.where(fresh[None, :, None], rows, jnp.zeros_like(rows))
    out, pull = jax.vjp(lambda p: setting.call(p, params, block), setting.leaves(params))
    parts = jax.vmap(pull)(setting.cotangents(index, rows).astype(out.dtype))[0]
    return [a + part.astype(a.dtype) for a, part in zip(total, parts, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _push_forward(setting, size, params, x, u, index, i, out):
    """Write J u for the examples of block i into out (vectors, n1, outputs kept)."""
    start = jnp.minimum(i * size, setting.n1 - size)
    block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), x)
    push = _linearize(lambda p: setting.call(p, params, block), setting.leaves(params), setting.forward)[1]
    rows = setting.kept(index, jax.vmap(push)(u)).astype(out.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, rows, start, axis=1)


def _linearize(function, leaves, forward):
    """Value and derivative map of `function`; a network with a custom backward pass only has its pull-back turned."""
    if forward:
        return jax.linearize(function, leaves)
    out, pull = jax.vjp(function, leaves)
    turned = jax.linear_transpose(lambda ct: pull(ct)[0], out)
    return out, lambda u: turned(u)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _diagonal_block(setting, size, params, x, i, out):
    """Write the kernel of each example of block i with itself, which `empirical_ntk` has without long gradients."""
    ntk_fn = empirical_ntk(
        setting.network._call,
        outputs="trace" if setting.outputs == "trace" else "diagonal",
        params_filter=setting.filter(params),
    )
    start = jnp.minimum(i * size, setting.n1 - size)
    block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size)[:, None], x)
    rows = jax.vmap(lambda example: ntk_fn(params, example).reshape(-1))(block).astype(out.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, rows, start, axis=0)
