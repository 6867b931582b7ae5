"""Rules over parameter trees: which parameter is re-initialized how, told before anything is drawn, then done.

A rule is `(pattern, action)` or `(pattern, action, label)`; of an ordered list the first whose pattern matches a
parameter acts on it. A parameter's key is folded with a hash of its own path, so that a layer more or less changes no
other draw.
"""

import dataclasses
import hashlib
import math
import re
import sys
from typing import Any

import jax
import numpy as np

from initjax.errors import InputError
from initjax.reinit.info import ParamInfo, copies_apart, variance_of
from initjax.reinit.match import matched, prepared
from initjax.reinit.rule import Action, Rule, arguments, keep
from initjax.reinit.tree import like, unpack
from initjax.trace.initstats import read_draw
from initjax.trace.jaxpr import is_traced


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """What will happen to one parameter.

    Attributes
    ----------
    path, shape : of the parameter.
    rule, action, label : the rule's pattern and action in words, and its label; "" where no rule matches.
    old_std, new_std : root mean square of its entries now and after; None where it is not known without drawing.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    action: str
    label: str
    old_std: float | None
    new_std: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a re-initialization, printable; made by `plan`.

    Attributes
    ----------
    rows : one `PlanRow` for each parameter.
    """

    rows: tuple[PlanRow, ...]

    def to_dict(self) -> dict:
        """The plan as dicts, lists, numbers, strings and None."""
        return {"rows": [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.rows]}

    def __repr__(self) -> str:
        number = lambda value: "?" if value is None else f"{value:.4g}"  # noqa: E731
        cells = [("path", "rule", "action", "old std", "new std")]
        # Dense_2 before Dense_10; trees sort their keys as text
        natural = lambda row: [(part.isdigit(), part.rjust(9)) for part in re.split(r"(\d+)", row.path)]  # noqa: E731
        for r in sorted(self.rows, key=natural):
            cells.append((r.path, r.rule or "-", r.action or "-", number(r.old_std), number(r.new_std)))
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def plan(
    params: Any, rules: Any, *, model: Any = None, inputs: Any = None, strict: bool = True, apply_kwargs: Any = None
) -> Plan:
    """What `reinitialize` would do, drawing nothing.

    Parameters
    ----------
    params, rules, model, inputs, strict, apply_kwargs : as in `reinitialize`; params may hold `ShapeDtypeStruct`.

    Returns
    -------
    Plan, a printable table: path, rule, action, old and new root mean square.

    Raises
    ------
    InputError : as `reinitialize`.

    Accuracy
    --------
    New values are read from the initializers' programs, 1e-6 relative; "?" where they cannot be read.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> params = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    >>> ij.plan(params, [("kernel", ij.initializers.he_normal()), (..., ij.rules.keep)])
    path    rule    action  old std  new std
    bias    ...     keep    0        0
    kernel  kernel  init    0.2685   0.3536

    References
    ----------
    He et al. 2015 (arXiv:1502.01852), eq. 10, for the example.
    """
    leaves, _ = unpack(params)
    infos, rules = prepared(leaves, rules, model, inputs, apply_kwargs, lambda path, name: _missing(path, name))
    chosen = matched(infos, rules, strict)
    rows = []
    for info, rule in zip(infos, chosen, strict=True):
        old = None
        if not isinstance(info.value, jax.ShapeDtypeStruct) and not is_traced(info.value) and info.value.size:
            old = float(np.sqrt(np.mean(np.abs(np.asarray(info.value).astype(np.complex128)) ** 2)))
        if rule is None:
            rows.append(PlanRow(info.path, info.shape, "", "", "", old, old))
            continue
        rows.append(
            PlanRow(info.path, info.shape, rule.told, rule.named, rule.title(info), old, _new_std(rule, info, old))
        )
    return Plan(tuple(rows))


def reinitialize(
    params: Any,
    rules: Any,
    key: Any,
    *,
    model: Any = None,
    inputs: Any = None,
    strict: bool = True,
    apply_kwargs: Any = None,
) -> Any:
    """Re-initialize a model's parameters by rules, without touching its code.

    Parameters
    ----------
    params : linen variables or their `params` (dict, FrozenDict, boxed or partitioned values), an nnx.State, or an nnx
        module, which is updated in place. Sharding, dtype and boxes are kept; what is not trained is left alone.
    rules : ordered list of `(pattern, action)` or `(pattern, action, label)`; the first that matches acts. A pattern is
        a regular expression found in the path (`re.search`), a predicate of a `ParamInfo`, an nnx filter, or `...`. An
        action is an initializer, `keep`, `scale(c)`, `constant(v)` (from `ij.rules`), or `fn(key, info)`.
    key : random key. Each parameter's own key depends on this one and its path alone.
    model, inputs : the model and an example batch, for rules that read the program (true fans, branches), and for
        stacked layers (scan, vmap), each copy of which is drawn on its own.
    strict : a rule or parameter without a match is an error.
    apply_kwargs : further keyword arguments of the model's call.

    Returns
    -------
    The tree with new values, in the structure of `params`; for an nnx module, that module.

    Raises
    ------
    InputError : a rule or (strict) a parameter without a match, with the nearest paths; a factory that was not called;
        a stacked or ambiguous kernel of which neither model nor bias tells the fan; a ready set without its model.

    Accuracy
    --------
    That of the actions.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 100)))
    >>> rules = [("layers_2", ij.initializers.zeros), ("kernel", ij.initializers.he_normal()), ("bias", ij.rules.keep)]
    >>> new = ij.reinitialize(params, rules, jax.random.key(1))["params"]
    >>> print(f"{new['layers_0']['kernel'].std() * 10:.1f} {new['layers_2']['kernel'].std():.1f}")
    1.4 0.0

    References
    ----------
    He et al. 2015 (arXiv:1502.01852), eq. 10, for the example.
    """
    leaves, repack = unpack(params)
    new: dict[str, Any] = {}
    busy: set[str] = set()

    def sibling(path: str, name: str):
        other = f"{path.rpartition('/')[0]}/{name}".lstrip("/")
        if other not in by_path:
            raise _missing(path, name)
        return value(other)

    def value(path: str):
        if path not in new:
            if path in busy:
                raise InputError(
                    f"{path}, whose new value depends on itself",
                    "actions that ask for siblings without a circle",
                    "no order of drawing exists",
                    "compute one of them from shapes alone",
                )
            busy.add(path)
            info, rule = by_path[path]
            new[path] = info.value if rule is None else like(_run(rule, info, _key(key, path)), info.value)
        return new[path]

    infos, rules = prepared(leaves, rules, model, inputs, apply_kwargs, sibling)
    by_path = dict(zip([i.path for i in infos], zip(infos, matched(infos, rules, strict), strict=True), strict=True))
    return repack([value(leaf.path) for leaf in leaves])


def labels(params: Any, rules: Any, *, model: Any = None, inputs: Any = None, strict: bool = True) -> Any:
    """The tree of labels that the rules give, for `optax.multi_transform`.

    Parameters
    ----------
    params, rules, model, inputs, strict : as in `reinitialize`. Labels: a rule's third entry, else its action.

    Returns
    -------
    A tree like `params` with a string at each parameter; a pure dict for nnx modules.

    Raises
    ------
    InputError : as `reinitialize`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import initjax as ij
    >>> rules = [("head", ij.rules.keep, "fast"), (..., ij.rules.keep, "slow")]
    >>> ij.labels({"head": {"kernel": jnp.ones((4, 2))}, "body": jnp.ones(3)}, rules)
    {'body': 'slow', 'head': {'kernel': 'fast'}}

    References
    ----------
    Yang et al. 2022 (arXiv:2203.03466), table 3, for learning rates by role (`ij.rules.mup`).
    """
    leaves, repack = unpack(_state(params))
    infos, rules = prepared(leaves, rules, model, inputs, None, lambda path, name: _missing(path, name))
    chosen = matched(infos, rules, strict)
    return repack(["" if rule is None else rule.title(info) for info, rule in zip(infos, chosen, strict=True)])


def _key(key: Any, path: str) -> Any:
    """The parameter's key: folded with 64 bits of a hash of its path."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for half in (digest[:4], digest[4:]):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(half, "little")))
    return key


def _run(rule: Rule, info: ParamInfo, key: Any) -> Any:
    """The new value by the rule's action."""
    action = rule.action
    if isinstance(action, Action) or hasattr(action, "acts_on_info") or arguments(action) == 2:
        value = action(key, info)
    else:
        value = copies_apart(action, key, info, info.dtype)
    if tuple(getattr(value, "shape", ())) != info.shape or not hasattr(value, "astype"):
        raise InputError(
            f"the action {rule.named} on {info.path}, which gave {getattr(value, 'shape', type(value).__name__)}",
            f"an array of shape {info.shape}",
            "a parameter keeps its shape",
            "actions get (key, info) and return an array of info.shape",
        )
    return value


def _new_std(rule: Rule, info: ParamInfo, old: float | None) -> float | None:
    action = rule.action
    if action is keep:
        return old
    if isinstance(action, Action) and action.value is not None:
        if action.name.startswith("constant"):
            return abs(action.value)
        return None if old is None else abs(action.value) * old
    of_info = getattr(action, "std_of", None)
    if of_info is not None:
        return of_info(info)
    if arguments(action) != 2 and not info.copies and callable(getattr(action, "std", None)) and not info.doubt:
        rest = len(info.inputs) + len(info.outputs) + len(info.window)
        if rest == len(info.shape) and len(info.inputs) <= 1 and len(info.outputs) <= 1:
            order = [*info.window, *info.inputs, *info.outputs]
            variance = variance_of(action, tuple(info.shape[a] for a in order), info.dtype)
            return None if variance is None else math.sqrt(variance)
    draw = lambda key: _run(rule, info, key)  # noqa: E731
    try:
        stats = read_draw(draw, info.dtype)
    except InputError as error:
        if "asked outside" in str(error) or "is not there" in str(error):
            return None
        raise
    if stats is None or stats.value is not None and stats.value.ndim:
        return None
    return math.sqrt(stats.variance + stats.mean**2)


def _missing(path: str, name: str) -> InputError:
    return InputError(
        f"the parameter {name} beside {path}, which is not there",
        "the name of a parameter of the same module",
        "an action asked for its new value",
        "narrow the rule's pattern to layers that have it",
    )


def _state(params: Any) -> Any:
    """The parameters of an nnx module as a plain dict, since labels cannot stand in a module."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module):
        return nnx.to_pure_dict(nnx.state(params, nnx.Param))
    return params
