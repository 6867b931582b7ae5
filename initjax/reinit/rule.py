"""Rules: a pattern that finds parameters, an action that makes their new values, a label."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.initializers.protocol import uncalled
from initjax.reinit.info import ParamInfo
from initjax.trace.jaxpr import is_traced


@dataclasses.dataclass(frozen=True)
class Action:
    """What a rule does, beside initializers and functions: `keep`, `scale(c)`, `constant(v)`."""

    name: str
    run: Callable[[Any, ParamInfo], Any] = dataclasses.field(repr=False, compare=False)
    value: float | None = None

    def __call__(self, key: Any, info: ParamInfo) -> Any:
        return self.run(key, info)


keep = Action("keep", lambda key, info: info.value)


def scale(factor: Any) -> Action:
    """Multiply the present value by a number; draws nothing.

    Parameters
    ----------
    factor : a finite number.

    Returns
    -------
    Action for a rule.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> ij.reinitialize({"w": jnp.ones(2)}, [("w", ij.rules.scale(3.0))], jax.random.key(0))
    {'w': Array([3., 3.], dtype=float32)}

    References
    ----------
    None: a product.
    """
    factor = _number(factor, "factor")
    return Action(f"scale({factor:.6g})", lambda key, info: info.value * jnp.asarray(factor, info.dtype), factor)


def constant(value: Any) -> Action:
    """Fill with a number.

    Parameters
    ----------
    value : a finite number.

    Returns
    -------
    Action for a rule.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import initjax as ij
    >>> ij.reinitialize({"scale": jnp.ones(2)}, [("scale", ij.rules.constant(0.0))], jax.random.key(0))
    {'scale': Array([0., 0.], dtype=float32)}

    References
    ----------
    None: a constant.
    """
    value = _number(value, "value")
    return Action(f"constant({value:.6g})", lambda key, info: jnp.full(info.shape, value, info.dtype), value)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes
    ----------
    pattern : regular expression found in the path, predicate of a ParamInfo, nnx filter, or `...` for everything.
    action : initializer, `keep`, `scale(c)`, `constant(v)`, or `fn(key, info)`.
    label : name of its parameters for `labels`, or a function of their info; the action's name if None.
    optional : whether it may match nothing.
    """

    pattern: Any
    action: Any
    label: str | Callable[[ParamInfo], str] | None = None
    optional: bool = False

    @property
    def told(self) -> str:
        """The pattern in words."""
        if self.pattern is ...:
            return "..."
        if isinstance(self.pattern, str):
            return self.pattern
        return getattr(self.pattern, "__name__", None) or type(self.pattern).__name__

    @property
    def named(self) -> str:
        """The action in words."""
        name = getattr(self.action, "name", None)
        return name if isinstance(name, str) else getattr(self.action, "__name__", type(self.action).__name__)

    def title(self, info: ParamInfo) -> str:
        """The label of one parameter, or the action in words."""
        if self.label is None:
            return self.named
        return self.label if isinstance(self.label, str) else self.label(info)


class Rules(tuple):
    """An ordered list of rules, such as the ready sets of `ij.rules`; put rules of your own in front with `+`."""

    needs_model = False

    def __new__(cls, rules: Iterable, needs_model: bool = False):
        self = super().__new__(cls, tuple(as_rule(rule) for rule in rules))
        self.needs_model = needs_model
        return self

    def __radd__(self, other):
        return Rules([*other, *self], self.needs_model)

    def __add__(self, other):
        return Rules([*self, *other], self.needs_model or getattr(other, "needs_model", False))


def as_rule(rule: Any) -> Rule:
    """A rule from a tuple; refuses patterns and actions that are none."""
    if not isinstance(rule, Rule):
        if not isinstance(rule, tuple | list) or len(rule) not in (2, 3):
            raise InputError(
                f"the rule {rule!r}",
                "(pattern, action) or (pattern, action, label)",
                "a rule says which parameters, and what to do",
                'for example ("kernel", initializers.orthogonal()) or (..., keep)',
            )
        rule = Rule(*rule)
    pattern, action = rule.pattern, rule.action
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"the pattern {pattern!r}",
                "a regular expression",
                f"it does not compile: {error}",
                "escape special characters with a backslash",
            ) from error
    elif pattern is not ... and not callable(pattern):
        raise InputError(
            f"the pattern {pattern!r}",
            "a regular expression, a predicate of a ParamInfo, an nnx filter, or ...",
            "it is tried on every parameter",
            "use '...' for all parameters that no earlier rule took",
        )
    if getattr(action, "builds_initializer", False) or action in (scale, constant):
        raise uncalled(action.__name__)
    if not callable(action):
        raise InputError(
            f"the action {action!r} of the rule {rule.told}",
            "an initializer, keep, scale(c), constant(v), or fn(key, info)",
            "it makes the new value",
            f"write constant({action!r}) for a number" if isinstance(action, int | float) else "see ij.rules",
        )
    return rule


def arguments(function: Any) -> int:
    """Number of positional arguments it must or may take."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _number(value: Any, name: str) -> float:
    number = np.asarray(np.nan if is_traced(value) else value)
    if number.ndim or number.dtype.kind not in "fiu" or not np.isfinite(number):
        raise InputError(
            f"{name}={value!r}", "one finite number", "it is fixed when the rule is built", "give a Python float"
        )
    return float(number)
