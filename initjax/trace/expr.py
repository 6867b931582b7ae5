"""A function of one real variable, grown primitive by primitive as the model is walked.

Equal expressions are one object (hash-consing): relu in thirty layers is one callable, analysed and compiled once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TABLE: dict[tuple, "Expr"] = {}


class Expr:
    """An expression in one variable. Build with `VARIABLE`, `literal` and `apply`; call it like an activation."""

    __slots__ = ("op", "params", "args", "value", "is_bool", "__dict__")

    def __init__(self, op, params: dict, args: tuple["Expr", ...], value: Any, is_bool: bool):
        self.op, self.params, self.args, self.value, self.is_bool = op, params, args, value, is_bool

    @functools.cached_property
    def fn(self):
        """The expression as an elementwise JAX function."""

        def function(x):
            return self._evaluate(x)

        function.__name__ = repr(self)[:60]
        return function

    def _evaluate(self, x):
        done: dict[int, Any] = {}
        for node in self._order:
            if node.op == "variable":
                value = x
            elif node.op == "literal":
                value = jnp.full(jnp.shape(x), node.value, bool if node.is_bool else x.dtype)
            elif node.op == "cast":
                value = done[id(node.args[0])].astype(bool if node.is_bool else x.dtype)
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

    def __repr__(self) -> str:
        if self.op == "variable":
            return "x"
        if self.op == "literal":
            return f"{self.value:g}" if not self.is_bool else str(self.value)
        name = self.op if isinstance(self.op, str) else self.op.name
        return f"{name}({', '.join(map(repr, self.args))})"


def _intern(key: tuple, *fields) -> Expr:
    if key not in _TABLE:
        _TABLE[key] = Expr(*fields)
    return _TABLE[key]


VARIABLE = _intern(("variable",), "variable", {}, (), None, False)


def literal(value) -> Expr:
    """A constant."""
    is_bool = isinstance(value, (bool, np.bool_))
    value = bool(value) if is_bool else float(value)
    return _intern(("literal", is_bool, value), "literal", {}, (), value, is_bool)


def cast(arg: Expr, to_bool: bool) -> Expr:
    """Boolean to float or back; floats of different width are one kind here."""
    if arg.is_bool == to_bool:
        return arg
    return _intern(("cast", to_bool, id(arg)), "cast", {}, (arg,), None, to_bool)


def apply(primitive, params: dict, args: list[Expr]) -> Expr:
    """A JAX elementwise primitive applied to expressions; constants are folded, identities dropped."""
    params = {k: v for k, v in params.items() if k not in ("out_sharding", "sharding")} | {
        k: None for k in params if k in ("out_sharding", "sharding")
    }
    name = primitive.name
    if name == "select_n" and args[0].op == "literal":
        return args[1 + int(args[0].value)]
    if name in ("copy", "copy_p", "stop_gradient"):
        return args[0]
    if all(a.op == "literal" for a in args):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            value = np.asarray(primitive.bind(*[jnp.asarray(a.value) for a in args], **params))
        return literal(value[()])
    is_bool = name in _PREDICATES or (name in ("and", "or", "not", "xor", "select_n") and args[-1].is_bool)
    key = (name, tuple(sorted((k, str(v)) for k, v in params.items())), tuple(id(a) for a in args))
    return _intern(key, primitive, params, tuple(args), None, is_bool)


_PREDICATES = {"eq", "ne", "lt", "le", "gt", "ge", "is_finite"}


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
