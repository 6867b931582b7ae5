"""What a kernel will cost, parameter by parameter."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from initjax.empirical.blocks import Tiling
from initjax.empirical.job import Job
from initjax.empirical.routes import sizes


class Row(NamedTuple):
    """One parameter, or a weight with the bias merged into it.

    kind : "product", "convolution", "lookup", or what the parameter does otherwise ("bias", "scale", "scan", ...);
        "function of parameters" for one that first meets other parameters; "unused".
    groups, positions, inputs, units : g, T, I, J of its products; zeros where there are none.
    route : "pair", "explicit", "streamed" or "gradient".
    flops : of its contraction, for the whole kernel; passes through the network come on top.
    bytes : held for one example.
    """

    leaves: tuple[str, ...]
    kind: str
    groups: int
    positions: int
    inputs: int
    units: int
    route: str
    flops: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a kernel will be computed.

    Attributes
    ----------
    rows : one `Row` for each chosen parameter, or weight with its bias.
    examples, outputs : sizes of a tile: examples of x1 and x2, and outputs at a time.
    bytes : foreseen peak of what is held at once, without the kernel itself.
    """

    rows: tuple[Row, ...]
    examples: tuple[int, int]
    outputs: int
    bytes: int

    def __repr__(self):
        width = max([9, *(len(" + ".join(row.leaves)) for row in self.rows)])
        kind = max([4, *(len(row.kind) for row in self.rows)])
        dims = f"{'g':>4} {'T':>5} {'I':>6} {'J':>6}"
        lines = [f"{'parameter':{width}}  {'kind':{kind}}  {dims}  {'route':8} {'GFLOP':>9} {'KiB':>9}"]
        for row in self.rows:
            dims = f"{row.groups:4} {row.positions:5} {row.inputs:6} {row.units:6}" if row.groups else " " * 24
            lines.append(
                f"{' + '.join(row.leaves):{width}}  {row.kind:{kind}}  {dims}  {row.route:8} {row.flops / 1e9:9.3f} "
                f"{row.bytes / 1024:9.1f}"
            )
        lines.append(
            f"tiles of {self.examples[0]} x {self.examples[1]} examples, {self.outputs} outputs at a time, "
            f"{self.bytes / 2**20:.1f} MiB foreseen"
        )
        return "\n".join(lines)


def explanation(job: Job, tiles: Tiling, params: Any) -> Explanation:
    """The table of a job in a tiling."""
    plan, size = job.plans[0], job.dtype.itemsize
    names = job.names
    rows = []
    for term, route in zip(plan.direct, tiles.routes, strict=True):
        dims = sizes(term) if term.uses else (0, 0, 0, 0)
        leaves = tuple(names[leaf] for leaf in term.leaves)
        rows.append(Row(leaves, term.how, *dims, route.name, route.flops, route.entries * size))
    leaves = jax.tree.leaves(params)
    for leaf in plan.pulled_leaves:
        of = [term for term in plan.pulled if leaf in term.leaves]
        kind = f"function of parameters ({'+'.join(sorted({term.how for term in of}))})"
        if len(of) > 1:
            kind = f"{len(of)} uses ({'+'.join(sorted({term.how for term in of}))})"
        entries = np.size(leaves[leaf])
        flops = 2 * entries * tiles.pairs * (job.k**2 if job.outputs == "full" else job.k)
        rows.append(Row((names[leaf],), kind, 0, 0, 0, 0, "explicit", flops, tiles.outputs * entries * size))
    found = {name for row in rows for name in row.leaves}
    for name, keep in zip(names, job.chosen, strict=True):
        if keep and name not in found:
            rows.append(Row((name,), "unused", 0, 0, 0, 0, "-", 0.0, 0))
    rows.sort(key=lambda row: names.index(row.leaves[0]))
    covered = sorted(name for row in rows for name in row.leaves)
    assert covered == sorted(name for name, keep in zip(names, job.chosen, strict=True) if keep)
    return Explanation(tuple(rows), (tiles.rows, tiles.columns), tiles.outputs, tiles.bytes)
