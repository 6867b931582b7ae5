"""A function of one real variable, grown primitive by primitive as the model is walked.

Equal expressions are one object (hash-consing): relu in thirty layers is one callable, analysed and compiled once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.trace.jaxpr import float64

_TABLE: dict[tuple, "Expr"] = {}


class Expr:
    """An expression in one variable. Build with `VARIABLE`, `literal` and `apply`; `fn` is its JAX function.

    `dtype` is None for floats, which follow the variable's precision, else the dtype of its booleans or integers.
    """

    def __init__(self, op, params: dict, args: tuple["Expr", ...], value: Any, dtype: np.dtype | None):
        self.op, self.params, self.args, self.value, self.dtype = op, params, args, value, dtype

    @property
    def is_bool(self) -> bool:
        return self.dtype is not None and self.dtype.kind == "b"

    @functools.cached_property
    def fn(self):
        """The expression as an elementwise JAX function."""

        def function(x):
            return (self if x.dtype == jnp.float64 else self._narrow)._evaluate(x)

        function.__name__ = repr(self)[:60]
        return function

    def _evaluate(self, x):
        done: dict[int, Any] = {}
        for node in self._order:
            dtype = x.dtype if node.dtype is None else node.dtype
            if node.op == "variable":
                value = x
            elif node.op == "literal":
                value = jnp.full(jnp.shape(x), node.value, dtype)
            elif node.op == "cast":
                value = done[id(node.args[0])].astype(dtype)
            else:
                value = node.op.bind(*[done[id(a)] for a in node.args], **node.params)
            done[id(node)] = value
        return done[id(self)]

    @functools.cached_property
    def _order(self) -> list["Expr"]:
        order: list[Expr] = []
        seen: set[int] = set()
        stack: list[tuple[Expr, bool]] = [(self, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((a, False) for a in node.args)
        return order

    @functools.cached_property
    def _narrow(self) -> "Expr":
        """The expression for lower precisions: splitting a float64 into high and low bits is dropped there."""
        made: dict[int, Expr] = {}
        for node in self._order:
            split = _split_of(node)
            if split is not None:
                made[id(node)] = made[id(split)]
            elif isinstance(node.op, str) and node.op != "cast":
                made[id(node)] = node
            elif node.op == "cast":
                made[id(node)] = cast(made[id(node.args[0])], node.dtype)
            else:
                made[id(node)] = apply(node.op, node.params, [made[id(a)] for a in node.args], node.dtype)
        return made[id(self)]

    def __repr__(self) -> str:
        if self.op == "variable":
            return "x"
        if self.op == "literal":
            return f"{self.value:g}" if self.dtype is None else str(self.value)
        name = self.op if isinstance(self.op, str) else self.op.name
        return f"{name}({', '.join(map(repr, self.args))})"


def _split_of(node: Expr) -> Expr | None:
    """e where the node is bitcast(bitcast(e) & mask), the leading bits of e."""
    if getattr(node.op, "name", "") != "bitcast_convert_type" or getattr(node.args[0].op, "name", "") != "and":
        return None
    inner = [a for a in node.args[0].args if getattr(a.op, "name", "") == "bitcast_convert_type"]
    return inner[0].args[0] if len(inner) == 1 else None


def _intern(key: tuple, *fields) -> Expr:
    if key not in _TABLE:
        _TABLE[key] = Expr(*fields)
    return _TABLE[key]


VARIABLE = _intern(("variable",), "variable", {}, (), None, None)


def literal(value) -> Expr:
    """A constant; booleans and integers with a NumPy dtype keep it, everything else is a float."""
    if isinstance(value, (bool, np.bool_)):
        dtype, value = np.dtype(bool), bool(value)
    elif isinstance(value, np.integer):
        dtype, value = value.dtype, int(value)
    else:
        dtype, value = None, float(value)
    return _intern(("literal", dtype, value), "literal", {}, (), value, dtype)


def cast(arg: Expr, dtype: np.dtype | None) -> Expr:
    """To booleans, integers or (None) floats; floats of different width are one kind here."""
    if arg.dtype == dtype:
        return arg
    return _intern(("cast", dtype, id(arg)), "cast", {}, (arg,), None, dtype)


def apply(primitive, params: dict, args: list[Expr], dtype: np.dtype | None = None) -> Expr:
    """A pointwise JAX primitive of expressions; `dtype` is the result's, None for floats. Constants are folded."""
    name = primitive.name
    if name == "select_n" and args[0].op == "literal":
        return args[1 + int(args[0].value)]
    if all(a.op == "literal" for a in args):
        with float64():
            arrays = [jnp.asarray(a.value, jnp.float64 if a.dtype is None else a.dtype) for a in args]
            return literal(np.asarray(primitive.bind(*arrays, **params))[()])
    key = (name, tuple(sorted((k, str(v)) for k, v in params.items())), tuple(id(a) for a in args))
    return _intern(key, primitive, params, tuple(args), None, dtype)


def scaled(factor: float, arg: Expr) -> Expr:
    """factor * arg."""
    if factor == 1.0:
        return arg
    if arg.op == "literal":
        return literal(factor * arg.value)
    return apply(jax.lax.mul_p, {}, [literal(factor), arg])


def added(left: Expr, right: Expr) -> Expr:
    """left + right."""
    if left.op == right.op == "literal":
        return literal(left.value + right.value)
    for one, other in ((left, right), (right, left)):
        if one.op == "literal" and one.value == 0.0:
            return other
    return apply(jax.lax.add_p, {}, [left, right])
