"""Which rule acts on which parameter: the first that matches; what stays without a match is told."""

import difflib
import re

from initjax.errors import InputError
from initjax.reinit.info import ParamInfo, Traced, describe
from initjax.reinit.rule import Rule, arguments, as_rule


def prepared(leaves, rules, model, inputs, apply_kwargs, sibling) -> tuple[list[ParamInfo], list[Rule]]:
    needs_model = getattr(rules, "needs_model", False) or any(getattr(r, "needs_model", False) for r in rules)
    if (model is None) != (inputs is None) or needs_model and model is None:
        raise InputError(
            "rules that read the model's program, without the model" if model is None else "model= without inputs=",
            "model= and inputs= together",
            "residual branches, true fans and the order of layers are read from the traced program",
            "give the module and an example batch",
        )
    rules = [as_rule(rule) for rule in rules]
    traced = model if isinstance(model, Traced) or model is None else Traced.of(model, inputs, apply_kwargs)
    return describe(leaves, traced, sibling), rules


def _matches(rule: Rule, info: ParamInfo) -> bool:
    pattern = rule.pattern
    if pattern is ...:
        return True
    if isinstance(pattern, str):
        return re.search(pattern, info.path) is not None
    if isinstance(pattern, type):
        return info.variable is not None and issubclass(info.variable, pattern)
    if arguments(pattern) == 1:
        return bool(pattern(info))
    return bool(pattern(info.keys, info.box))  # an nnx filter


def matched(infos: list[ParamInfo], rules: list[Rule], strict: bool) -> list[Rule | None]:
    """The rule of each parameter; refuses what stays without a match."""
    chosen: list[Rule | None] = []
    used: set[int] = set()
    for info in infos:
        number = next((i for i, rule in enumerate(rules) if _matches(rule, info)), None)
        chosen.append(None if number is None else rules[number])
        if number is not None:
            used.add(number)
    if not strict:
        return chosen
    paths = [info.path for info in infos]
    for i, rule in enumerate(rules):
        if i in used or rule.optional or rule.pattern is ...:
            continue
        taken = [info.path for info in infos if _matches(rule, info)]
        if taken:
            raise InputError(
                f"the rule {rule.told}, all of whose parameters earlier rules take: {', '.join(taken[:5])}",
                "rules that act on at least one parameter",
                "of several rules the first that matches acts",
                "put it in front, or narrow the earlier rules",
            )
        raise InputError(
            f"the rule {rule.told}, which matches no parameter",
            f"patterns found in a path; the nearest paths: {', '.join(_nearest(rule.told, paths))}",
            "a rule that matches nothing is most likely misspelt",
            "correct the pattern, or give strict=False",
        )
    bare = [path for path, rule in zip(paths, chosen, strict=True) if rule is None]
    if bare:
        raise InputError(
            f"parameters without a rule: {', '.join(bare[:8])}" + (f" and {len(bare) - 8} more" if bare[8:] else ""),
            "a rule for every parameter",
            "one that is forgotten would silently keep its old value",
            "add (..., keep) at the end, or give strict=False",
        )
    return chosen


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    plain = re.sub(r"[\\^$().*+?\[\]{}|]", "", pattern)
    score = {p: max(difflib.SequenceMatcher(None, plain, part).ratio() for part in (p, *p.split("/"))) for p in paths}
    return sorted(paths, key=lambda p: -score[p])[:3]
