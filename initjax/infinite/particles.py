r"""Kernels with a standard error, for models in which the exact rules meet several dependent random numbers at once.

R independent networks run the model's own program with every hidden layer widened to about `width` channels (wide.py);
each gives kernels, of which mean and standard error over the networks are reported. One particle is one channel of one
network, so a layer has R * width of them.

The output is not sampled where it is linear in its last weights: with one random readout v, sum_leaf Var Theta_leaf
over these weights is E[y y'] given everything before them. Tangent kernels come from one backward pass per example.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.infinite.tiles import ratio
from initjax.infinite.wide import Plan, Wide, plan, real, real_type
from initjax.trace.flax import Functional
from initjax.trace.initstats import LeafStats
from initjax.trace.jaxpr import ClosedJaxpr, is_traced, tracing_float64
from initjax.trace.program import trace_model

PARTICLES = 8192
NETWORKS = 16  # at least; the standard error is that of so many independent networks
WIDTHS = (512, 256, 128)
DIRECTIONS = 8  # in which the inputs of each network are perturbed, for chi
WORK = 2e10  # floating-point operations of one call that the width may be chosen for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StandardError:
    """Standard errors of an estimated kernel: one standard deviation of each entry, over independent networks.

    Attributes
    ----------
    nngp, ntk : (n1, n2), like the kernels.
    leaves : leaf path -> (n1, n2), like `Kernel.leaves`.
    """

    nngp: Any
    ntk: Any
    leaves: dict[str, Any]

    def __repr__(self) -> str:
        known = {name: value for name in ("nngp", "ntk") if (value := getattr(self, name)) is not None}
        sizes = (f"{name} {'traced' if is_traced(v) else f'up to {np.max(v):.2g}'}" for name, v in known.items())
        return f"StandardError({', '.join(sizes)}, {len(self.leaves)} leaves)"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Averages over networks, and those of every network.

    Attributes
    ----------
    nngp, leaves : (R, n1, n2) and, by leaf, the same.
    layers : name -> q (n1,), correlation (n1, n2), slope (n1,), gradient (n1,).
    networks, width : how many, how wide.
    notes : approximations.
    """

    nngp: Any
    leaves: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    networks: int
    width: int
    notes: tuple[str, ...]


class Particles:
    """The estimator of one model; raises UnsupportedLayerError where widening it means nothing."""

    def __init__(self, functional: Functional, leaves: tuple[LeafStats, ...], key, particles: int):
        self._functional, self._leaves = functional, leaves
        self._key, self._particles = key, particles
        self._prepared: dict[Any, Any] = {}

    def check(self, x) -> None:
        """Walk the model at the shapes of `x`."""
        with tracing_float64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            self._prepare(x, False, False)

    def __call__(self, x1, x2=None) -> Estimate:
        traced = is_traced(x1, x2)
        # tracers of the caller's jit stay in the caller's precision
        precision = contextlib.nullcontext() if traced else tracing_float64()
        with precision, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            coupled = self._coupled(x1)
            batches = [x1] if x2 is None else [x1, x2]
            prepared = [self._prepare(x, coupled, traced) for x in batches]
            leaves = [[real(leaf) for leaf in jax.tree.leaves(x)] for x in batches]
            # one batch after another only where the examples of a batch act on each other
            if not coupled and len(batches) == 2:
                sizes = [len(xs[0]) for xs in leaves]
                joined = [jnp.concatenate(pair) for pair in zip(*leaves, strict=True)]
                found, width = self._run(prepared[:1], [joined], traced)
                first, second = slice(sizes[0]), slice(sizes[0], None)
            else:
                found, width = self._run(prepared, leaves, traced)
                n1 = len(leaves[0][0])
                first, second = slice(n1), slice(n1, None) if len(batches) == 2 else slice(n1)
            if not traced:
                found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
            nngp, kernels, layers = found
            networks = nngp.shape[0]
            cut = lambda a: a[..., first, second]  # noqa: E731
            told = {}
            for name in prepared[0].plan.layers:
                q, covariance, slope, gradient = layers[name]
                root = q.mean(0) ** 0.5
                told[name] = dict(
                    q=q.mean(0)[first],
                    correlation=cut(ratio(covariance.mean(0), root[:, None] * root[None, :])),
                    slope=slope.mean(0)[first],
                    gradient=gradient.mean(0)[first],
                )
            notes = tuple(prepared[0].plan.notes.values())
            return Estimate(cut(nngp), {k: cut(v) for k, v in kernels.items()}, told, networks, width, notes)

    # ------------------------------------------------------------------ preparation

    def _prepare(self, x, coupled: bool, traced: bool) -> "_Prepared":
        shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(x)]
        n = shapes[0].shape[0] if shapes[0].shape else 1
        tree = jax.tree.structure(x)
        if not coupled:
            shapes = [jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype) for s in shapes]
        key = (tree, coupled, traced, n, tuple((s.shape, str(s.dtype)) for s in shapes))
        if key not in self._prepared:
            closed = trace_model(self._functional, jax.tree.unflatten(tree, shapes), real_type())
            inputs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in closed.in_avals[len(self._leaves) :]]
            inputs = [jax.eval_shape(real, s) for s in inputs]
            found = plan(closed, self._leaves, inputs, WIDTHS[1])
            passes = 6.0 * (1 if coupled else n) * (n if coupled else 1)
            work = passes * found.work / WIDTHS[1] ** 2 * self._particles  # of one channel of width
            allowed = [w for w in WIDTHS if w * NETWORKS <= self._particles and work * w < WORK]
            width = max(allowed, default=WIDTHS[-1])
            if width != WIDTHS[1]:
                found = plan(closed, self._leaves, inputs, width)
            self._prepared[key] = _Prepared(self._functional, self._leaves, closed, found, width, coupled)
        return self._prepared[key]

    def _coupled(self, x) -> bool:
        """Whether the output of an example depends on its batch, on random weights (a zero readout would hide it)."""
        leaves = jax.tree.leaves(x)
        if is_traced(x):
            return True
        if len(leaves[0]) < 2:
            return False
        random = np.random.default_rng(0)
        pairs = []
        for leaf in leaves:
            leaf = np.asarray(leaf)[[0, -1]]
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                leaf = (leaf + random.normal(size=leaf.shape)).astype(leaf.dtype)
            pairs.append(leaf)
        tree = jax.tree.structure(x)
        draw = lambda s: (0.3 * random.normal(size=s.shape)).astype(s.dtype)  # noqa: E731
        params = jax.tree.map(draw, self._functional.abstract_params)

        def run(*rows):
            batch = jax.tree.unflatten(tree, [leaf[list(rows)] for leaf in pairs])
            return np.asarray(apply(params, batch), np.float64)

        apply = _compiled(self._functional.apply, params, jax.tree.unflatten(tree, pairs))
        alike, other = run(0, 0), run(0, 1)
        largest = 1e-3 * np.abs(alike).max()
        return bool(max(np.abs(alike[0] - alike[1]).max(), np.abs(alike[0] - other[0]).max()) > largest)

    # ------------------------------------------------------------------ running

    def _run(self, prepared: list["_Prepared"], batches: list[list], traced: bool):
        width = min(p.plan.narrowest for p in prepared)
        networks = max(NETWORKS, -(-self._particles // width))
        keys = jax.random.split(self._key, networks)
        one = lambda key: _joined([p.network(key, xs) for p, xs in zip(prepared, batches, strict=True)], prepared[0])  # noqa: E731
        if traced:
            return jax.lax.map(one, keys), width
        if len(prepared) == 1:
            return prepared[0].compiled(keys, batches[0]), width
        return _compiled(lambda keys: jax.lax.map(one, keys), keys)(keys), width


class _Prepared:
    """A traced model with its plan, at one shape of the inputs."""

    def __init__(self, functional, leaves, closed: ClosedJaxpr, plan: Plan, width: int, coupled: bool):
        self.functional, self.leaves, self.closed, self.plan = functional, leaves, closed, plan
        self.width, self.coupled = width, coupled
        self._programs: dict[Any, Any] = {}

    def compiled(self, keys, xs: list):
        """Kernels of many networks, one after another, in one compiled program."""
        shapes = (keys.shape, *(x.shape for x in xs))
        if shapes not in self._programs:
            run = lambda keys, xs: jax.lax.map(lambda key: _joined([self.network(key, xs)], self), keys)  # noqa: E731
            self._programs[shapes] = _compiled(run, keys, xs)
        return self._programs[shapes](keys, xs)

    def draw(self, key) -> dict[int, Any]:
        """Copies of every leaf: Gaussian where they sum over hidden channels, else as the initializer draws them."""
        copies, normal = {}, {}
        for i, (out, into) in self.plan.copies.items():
            leaf, one = self.leaves[i], jax.random.fold_in(key, i)
            shape = (out, max(1, into), *leaf.shape)
            if leaf.kind == "constant":
                copies[i] = jnp.broadcast_to(real(leaf.value), shape)
            elif into <= 1 and not leaf.gaussian and self.functional.values is None:
                init = lambda k, i=i: real(jax.tree.leaves(self.functional.init(k))[i])  # noqa: E731
                copies[i] = jax.vmap(init)(jax.random.split(one, out))[:, None]
            else:
                normal[i] = shape
        # one long draw for all: a stream for each leaf takes longer to compile than to run
        ends = np.cumsum([0, *(math.prod(shape) for shape in normal.values())])
        draw = jax.random.normal(key, (int(ends[-1]),))
        for start, stop, (i, shape) in zip(ends[:-1], ends[1:], normal.items(), strict=True):
            copies[i] = math.sqrt(self.leaves[i].variance) * draw[start:stop].reshape(shape)
        return copies

    def network(self, key, xs: list) -> dict[str, Any]:
        """Features of one network: what two examples need for their entry of each kernel."""
        weights_key, readout_key, input_key = jax.random.split(key, 3)
        copies = self.draw(weights_key)
        n = len(xs[0])
        taps = {site: jnp.zeros(self.plan.sites[site]) for site in self.plan.layers.values()}

        def run(copies, taps, xs):
            wide = Wide(self.leaves, self.width, self.plan, copies, taps)
            y = wide.run(self.closed, xs)
            return (jnp.moveaxis(y.array, 1, 0) if y.copies else y.array), wide.layers

        alone = xs if self.coupled else [x[:1] for x in xs]
        out, _ = jax.eval_shape(run, copies, taps, alone)
        v = jax.random.normal(readout_key, out.shape[1:])
        v = v / jnp.sqrt(jnp.sum(v**2))
        directions = [
            jax.random.normal(jax.random.fold_in(input_key, i), (DIRECTIONS, 1, *x.shape[1:])) for i, x in enumerate(xs)
        ]
        moving = [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def moved(xs):
            def at(reals):
                given = list(xs)
                for i, x in zip(moving, reals, strict=True):
                    given[i] = x
                return run(copies, {}, given)[1]

            reals = [xs[i] for i in moving]
            along = lambda *v: jax.jvp(at, (reals,), ([jnp.broadcast_to(a, r.shape) for a, r in zip(v, reals)],))[1]  # noqa: B905,E731
            return jax.vmap(along)(*[directions[i] for i in moving])

        if self.coupled:
            y, pullback, layers = jax.vjp(lambda c, t: run(c, t, xs), copies, taps, has_aux=True)
            cotangents = jax.vmap(lambda e: e.reshape(-1, *(1,) * (y.ndim - 1)) * v)(jnp.eye(n))
            gradients, at_taps = jax.vmap(pullback)(cotangents)
            example = lambda a, of: _examples(a, of, n)  # noqa: E731
            layers = {name: example(a, self.plan.layers[name]) for name, a in layers.items()}
            slopes = moved(xs) if moving else {}
            slopes = {
                name: jnp.moveaxis(jax.vmap(lambda a, name=name: example(a, self.plan.layers[name]))(a), 0, 1)
                for name, a in slopes.items()
            }
        else:

            def score(copies, taps, one):
                y, layers = run(copies, taps, [x[None] for x in one])
                return jnp.sum(y[0] * v), (y[0], layers)

            (gradients, at_taps), (y, layers) = jax.vmap(jax.grad(score, (0, 1), has_aux=True), (None, None, 0))(
                copies, taps, xs
            )
            slopes = jax.vmap(lambda one: moved([x[None] for x in one]))(xs) if moving else {}
        return dict(
            y=y.reshape(n, -1),
            gradients={i: g.reshape(n, -1) for i, g in gradients.items()},
            taps={site: (g.reshape(n, -1) ** 2).sum(1) for site, g in at_taps.items()},
            layers={name: a.reshape(n, -1) for name, a in layers.items()},
            slopes={name: a.reshape(n, -1) for name, a in slopes.items()},
        )

    def last_leaves(self) -> list[int] | None:
        """Leaves in which the output is linear, if all it is is a combination of them and they have mean zero."""
        if not self.plan.linear:
            return None
        counts: dict[int, int] = {}
        for leaf, _ in self.plan.linear:
            counts[leaf] = counts.get(leaf, 0) + 1
        for leaf, count in counts.items():
            stats = self.leaves[leaf]
            fixed = stats.kind == "constant" and np.any(stats.value)
            if count != self.plan.uses[leaf] or fixed or stats.kind == "structured" or stats.mean != 0.0 and not fixed:
                return None
        return list(counts)


def standard_error(samples):
    """Standard error of the mean over networks, the first axis."""
    return samples.std(0, ddof=1) / math.sqrt(samples.shape[0])


def _joined(parts: list[dict], prepared: _Prepared):
    """Kernels of one network between all examples of all batches."""
    many = {k: jax.tree.map(lambda *a: jnp.concatenate(a), *[p[k] for p in parts]) for k in parts[0]}
    n = many["y"].shape[0]
    kernels = {prepared.leaves[i].name: g @ g.T for i, g in many["gradients"].items()}
    last = prepared.last_leaves()
    if last is None:
        nngp = many["y"] @ many["y"].T / many["y"].shape[1]
    else:
        parts_ = [prepared.leaves[i].variance * kernels[prepared.leaves[i].name] for i in last]
        nngp = sum(parts_, jnp.zeros((n, n)))
    layers = {}
    for name, site in prepared.plan.layers.items():
        h = many["layers"][name]
        slope = many["slopes"].get(name)
        slope = jnp.full(n, jnp.nan) if slope is None else (slope**2).mean(1)
        layers[name] = ((h**2).mean(1), h @ h.T / h.shape[1], slope, many["taps"][site])
    return nngp, kernels, layers


def _examples(array, site, n: int):
    """An array of a whole batch by example, along its first axis of n; all of it for each example without one."""
    axis = next((i for i in (1, 0) if array.ndim > i and array.shape[i] == n), None)
    if axis is None:
        return jnp.broadcast_to(array, (n, *array.shape))
    return jnp.moveaxis(array, axis, 0)


def _compiled(function, *arguments):
    """Compiled for a few runs: LLVM's longest passes cost more than they save here."""
    quick = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
    lowered = jax.jit(function).lower(*arguments)
    return lowered.compile(compiler_options=quick if jax.default_backend() == "cpu" else None)
