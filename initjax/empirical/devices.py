"""A tile whose rows are spread over several devices.

Each device has the features of its own rows and columns. Those of the columns go round the ring of devices, one step
for each tile; a symmetric tile goes half round, and the other half is the mirror image of what another device has.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from initjax.empirical import features
from initjax.empirical.blocks import Tiling
from initjax.empirical.job import Job, mirrored


class Ring:
    """Devices of one process, and the programs they run together."""

    def __init__(self, devices: tuple):
        self.size = len(devices)
        self._mesh = Mesh(np.array(devices), ("rows",))
        self._programs: dict = {}

    def tile(self, job: Job, tiles: Tiling, params: Any, block1: Any, block2: Any, start, other, same: bool):
        """A tile of `size` times the rows and columns of `tiles`; `same` if it is a block with itself."""
        key = job, tiles._replace(bytes=0), same
        if key not in self._programs:
            spread, everywhere = P("rows"), P()
            program = jax.shard_map(
                functools.partial(self._turn, job, tiles, same),
                mesh=self._mesh,
                in_specs=(everywhere, spread, spread, everywhere, everywhere),
                out_specs=P(*[None] * job.by_leaf, "rows"),
                check_vma=False,
            )
            self._programs[key] = jax.jit(program)
        params = jax.device_put(params, NamedSharding(self._mesh, P()))
        return self._programs[key](params, block1, block2, start, other)

    def _turn(self, job, tiles, same, params, block1, block2, start, other):
        """The rows of one device."""
        options: dict = dict(chunk=tiles.outputs, outputs=job.outputs, dtype=job.dtype, by_leaf=job.by_leaf)
        compute = lambda plan, x, o: features.compute(plan, tiles.routes, params, x, o, **options)  # noqa: E731
        left = compute(job.plans[0], block1, start)
        right = left if same else compute(job.plans[1], block2, other)
        here, axis = lax.axis_index("rows"), job.by_leaf + 1
        steps = self.size // 2 + 1 if same else self.size
        parts: dict[int, Any] = {}
        for step in range(steps):
            parts[step] = features.contract(
                job.plans[0], tiles.routes, left, right, job.outputs, same and step == 0, job.by_leaf
            )
            if step + 1 < steps:
                right = jax.tree.map(functools.partial(self._pass, by=1), right)
        if same:
            parts[0] = (parts[0] + mirrored(parts[0], job.outputs)) / np.asarray(2, job.dtype)
            for step in range(1, steps):
                # what the device `step` places before has computed for these rows
                theirs = self._pass(mirrored(parts[step], job.outputs), -step)
                if 2 * step == self.size:
                    parts[step] = jnp.where(here < step, parts[step], theirs)
                else:
                    parts[self.size - step] = theirs
        # part `step` belongs to the columns of device here + step
        ordered = jnp.stack([parts[step] for step in range(self.size)])
        ordered = ordered[(jnp.arange(self.size) - here) % self.size]
        row = jnp.concatenate(list(ordered), axis)
        return row / np.asarray(job.k, job.dtype) if job.outputs == "trace" else row

    def _pass(self, value, by):
        """What the device `by` places further on has."""
        return lax.ppermute(value, "rows", [((i + by) % self.size, i) for i in range(self.size)])
