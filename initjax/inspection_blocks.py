"""Blocks that a model repeats, found by their names, and what one of them does to signals and gradients."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

CRITICAL = 0.05  # |ln chi| of one block below which it counts as critical: a factor 10 takes 46 blocks or more


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """A block that occurs several times, such as `Block_*` or `layers/*`.

    Attributes
    ----------
    name : path with the running number as a star.
    count : how many there are.
    chi : predicted factor by which one block multiplies the square of a small perturbation, geometric mean over the
        blocks but the first; None without a prediction.
    chi_measured : the same from measured gradients, from the first layer of one block to that of the next.
    phase : "ordered", "critical" (|ln chi| < 0.05) or "chaotic", of `chi`, else of `chi_measured`; "unknown".
    """

    name: str
    count: int
    chi: float | None
    chi_measured: float | None
    phase: str


def repeated_blocks(layers: Sequence[Any]) -> tuple[BlockReport, ...]:
    """Blocks of a list of `LayerReport`, in order; families of at least three, so that two can be compared."""
    families: dict[str, dict[str, list]] = {}
    for layer in layers:
        found = _member(layer.name)
        if found is not None:
            family, member = found
            families.setdefault(family, {}).setdefault(member, []).append(layer)
    reports = []
    for family, members in families.items():
        ordered = sorted(members.items(), key=lambda item: _number(item[0]))
        blocks = [rows for _, rows in ordered]
        if len(blocks) < 3 or len({len(rows) for rows in blocks[1:]}) != 1:
            continue
        chi = _mean([_product([row.chi for row in rows]) for rows in blocks[1:]])
        firsts = [rows[0].gradient_measured for rows in blocks[1:]]
        pairs = zip(firsts[:-1], firsts[1:], strict=True)
        measured = _mean([a.mean / b.mean if a and b and a.mean > 0 < b.mean else None for a, b in pairs])
        value = measured if chi is None else chi
        reports.append(BlockReport(family, len(blocks), chi, measured, _phase(value)))
    return tuple(reports)


def _member(name: str) -> tuple[str, str] | None:
    """(`Block_*`, `Block_2`) of `Block_2/Dense_0`: the outermost part of the path with a number at its end."""
    parts = name.partition("#")[0].split("/")
    for i, part in enumerate(parts):
        if re.search(r"(^|_)\d+$", part):
            head = "/".join(parts[:i])
            star = re.sub(r"\d+$", "*", part)
            return (f"{head}/{star}" if head else star), "/".join(parts[: i + 1])
    return None


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def _product(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.prod(known) if len(known) == len(values) else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values) or min(known) <= 0 or not all(map(math.isfinite, known)):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))


def _phase(chi: float | None) -> str:
    if chi is None:
        return "unknown"
    return "critical" if abs(math.log(chi)) < CRITICAL else "chaotic" if chi > 1 else "ordered"
