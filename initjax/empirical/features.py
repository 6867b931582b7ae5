"""What the examples of one block contribute to tiles of the kernel, and a tile from two blocks."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from initjax.empirical.program import run_steps
from initjax.empirical.routes import CACHE, Route
from initjax.empirical.taps import Plan, Term
from initjax.empirical.views import cotangent_view, data_view, weight_view

# gradients below this size are put side by side and multiplied together
THIN = 8192
# products of many small matrices whose operands are not in order are slower than a copy that orders them
_ordered = lax.optimization_barrier


class Pair(NamedTuple):
    """Data (n, g, T, I), or row indices (n, T); cotangents (n, o, g, T, J); the merged bias' scale.

    For the "streamed" route cotangents are (n, g, T, o, J)."""

    data: jax.Array
    cotangents: jax.Array
    bias: jax.Array | None


class Features(NamedTuple):
    """Of n examples and o outputs each.

    pairs : for each term on the "pair" route.
    rows : gradients, (n, size o) in any order for "trace", else (n, o, size).
    """

    pairs: list[Pair]
    rows: list[jax.Array]


def compute(
    plan: Plan,
    routes: tuple[Route, ...],
    params: Any,
    x: Any,
    start: Any,
    *,
    chunk: int,
    outputs: str,
    dtype: Any,
    by_leaf: bool = False,
) -> Features:
    """Features of outputs start .. start + chunk of each example of `x`."""
    program = plan.program
    shared = run_steps(plan.before, program.given(jax.tree.leaves(params)))
    terms = (*plan.direct, *plan.pulled)
    cotangents, offsets, seen = _record(plan, terms, shared, x, start, chunk)

    def scaled(value, scale):
        for divisor, factor in scale:
            factor = shared[factor] if isinstance(factor, int) and factor in shared else factor
            factor = jnp.asarray(factor).reshape(()).astype(value.dtype)
            value = value / factor if divisor else value * factor
        return value

    def data(use):
        a = data_view(use, seen[use.operand])
        return a if use.kind == "lookup" else a.astype(dtype)

    def cotangent(use):
        return cotangent_view(use, cotangents[use.value].astype(dtype))

    def gradient(term, whole):
        if not term.uses:
            g = offsets[term.weight].astype(dtype)
            return g if whole else g.reshape(*g.shape[:2], -1)
        parts = []
        for use in term.uses:
            part = _gradient(use, data(use), cotangent(use), outputs == "trace" and len(term.uses) == 1 and not whole)
            shape = program.avals[term.weight].shape
            parts.append(weight_view(use, part, shape) if whole or len(term.uses) > 1 else part)
        total = functools.reduce(jnp.add, parts)
        return total if whole else total.reshape(total.shape[0], *([chunk, -1] if total.ndim > 2 else [-1]))

    pairs, rows = [], []
    for term, route in zip(plan.direct, routes, strict=True):
        if route.name in ("pair", "streamed"):
            a = jnp.concatenate([data(use) for use in term.uses], -2)
            g = jnp.concatenate([cotangent(use) for use in term.uses], -2)
            if term.uses[0].kind == "lookup":
                a, g = a[:, 0, :, 0], scaled(g, term.scale)
            else:
                a = scaled(a, term.scale)
            bias = None
            if term.bias is not None and route.name == "pair":
                bias = scaled(jnp.ones((), dtype), term.bias[2])
            if route.name == "streamed":
                g = _ordered(g.transpose(0, 2, 3, 1, 4))
            pairs.append(Pair(a, g, bias))
        else:
            rows.append(scaled(gradient(term, whole=False), term.scale))
        if route.name != "pair" and term.bias is not None:
            if True:
                g = cotangent(term.uses[0]).sum(3)
                rows.append(scaled(g.reshape(*g.shape[:2], -1), term.bias[2]))
    if plan.pulled:
        rows += _pulled_back(plan, params, shared, {term.weight: gradient(term, whole=True) for term in plan.pulled})
    if outputs == "trace":
        rows = [row.reshape(row.shape[0], -1) for row in rows]
    return Features(pairs, rows if by_leaf else _joined(rows))


def _record(plan, terms, shared, x, start, chunk):
    """Cotangents of tapped values and of weights without uses, each (n, o, ...), and the data that meet weights."""
    program = plan.program
    tapped = {use.value for term in terms for use in term.uses}
    operands = {use.operand for term in terms for use in term.uses}
    alone = [term.weight for term in terms if not term.uses]
    zeros = {n: jnp.zeros((), program.avals[n].dtype) for n in (*tapped, *alone)}

    def one_example(x):
        leaves = [leaf[None] for leaf in jax.tree.leaves(x)]

        def forward(taps, offsets):
            env = {**shared, **dict(zip(program.data, leaves, strict=True))}
            env.update((n, shared[n] + offset) for n, offset in offsets.items())
            env = run_steps(plan.after, env, lambda n, value: value + taps[n] if n in taps else value)
            flat = [jnp.ravel(out) for out in program.results(env)]
            return jnp.concatenate([out.astype(jnp.result_type(*flat)) for out in flat]), {n: env[n] for n in operands}

        full = {n: jnp.broadcast_to(zero, program.avals[n].shape) for n, zero in zeros.items()}
        out, pullback, seen = jax.vjp(forward, {n: full[n] for n in tapped}, {n: full[n] for n in alone}, has_aux=True)
        basis = jax.nn.one_hot(start + jnp.arange(chunk, dtype=jnp.int32), out.size, dtype=out.dtype)
        return *jax.vmap(pullback)(basis), seen

    return jax.vmap(one_example)(x)


def _gradient(use, a, g, any_order):
    """sum_t a_t g_t^T, (n, o, g, I, J); (n, g, I, o, J) in `any_order`, which is faster."""
    if use.kind == "lookup":
        n, o, _, _, j = g.shape
        ids = _valid(use, a[:, 0, :, 0])
        table = jnp.zeros((n, use.inputs, o, j), g.dtype)
        add = lambda table, ids, g: table.at[ids].add(g.swapaxes(0, 1), mode="drop")  # noqa: E731
        return jax.vmap(add)(table, ids, g[:, :, 0]).transpose(0, 2, 1, 3)[:, :, None]
    if use.positions == 1:
        return a[:, None, :, 0, :, None] * g[:, :, :, 0, None, :]
    if any_order:
        return _product("ngti,ngtoj->ngioj", a, _ordered(g.transpose(0, 2, 3, 1, 4)))
    return _product("nogtj,ngti->nogij", g, a)


def _valid(use, ids):
    """Row indices as the look-up reads them, with those that read nothing past the end of the table."""
    mode = str(use.step.eqn.params["mode"])
    if "CLIP" in mode:
        return jnp.clip(ids, 0, use.inputs - 1)
    return jnp.where((ids < 0) | (ids >= use.inputs), use.inputs, ids)


def _pulled_back(plan, params, shared, gradients):
    """Gradients of leaves (n, o, size) from those of the weights that are made of them."""
    program, leaves = plan.program, jax.tree.leaves(params)

    def weights(values):
        env = program.given(leaves)
        env.update((program.params[leaf], value) for leaf, value in zip(plan.pulled_leaves, values, strict=True))
        env = run_steps(plan.before, env)
        return [env[n] for n in gradients]

    values, pullback = jax.vjp(weights, [leaves[leaf] for leaf in plan.pulled_leaves])
    given = [g.astype(value.dtype) for g, value in zip(gradients.values(), values, strict=True)]
    (found,) = jax.vmap(jax.vmap(pullback))(given)
    dtype = next(iter(gradients.values())).dtype
    return [g.reshape(*g.shape[:2], -1).astype(dtype) for g in found]


def _joined(rows):
    thin = [row for row in rows if math.prod(row.shape[1:]) <= THIN]
    thick = [row for row in rows if math.prod(row.shape[1:]) > THIN]
    return [*thick, *([jnp.concatenate(thin, -1)] if thin else [])]


def contract(
    plan: Plan,
    routes: tuple[Route, ...],
    left: Features,
    right: Features,
    outputs: str,
    same: bool = False,
    by_leaf: bool = False,
) -> jax.Array:
    """A tile of the kernel: (n, m) summed over outputs, (n, m, o, p), or (n, m, o); `same` if both blocks are one.

    `by_leaf` puts one such tile for each leaf of `leaves_of(plan)` along a first axis.
    """
    parts = [_inner(a, b, outputs) for a, b in zip(left.rows, right.rows, strict=True)]
    met = [(t, r.name) for t, r in zip(plan.direct, routes, strict=True) if r.name in ("pair", "streamed")]
    for (term, route), a, b in zip(met, left.pairs, right.pairs, strict=True):
        parts.append(_pair(term, a, b, outputs) if route == "pair" else _streamed(a, b, outputs, same))
    if by_leaf:
        labels = [t.leaves[0] for t, r in zip(plan.direct, routes, strict=True) if r.name not in ("pair", "streamed")]
        labels += [*plan.pulled_leaves, *(term.leaves[0] for term, _ in met)]
        total = jnp.stack([part for _, part in sorted(zip(labels, parts, strict=True), key=lambda pair: pair[0])])
    else:
        total = functools.reduce(jnp.add, parts)
    return total.swapaxes(-3, -2) if outputs == "full" else total


def leaves_of(plan: Plan) -> list[int]:
    """The leaves that the kernel sums over, in order."""
    return sorted({leaf for term in plan.direct for leaf in term.leaves} | set(plan.pulled_leaves))


def _inner(a, b, outputs):
    """Inner products of gradients (n, o, K), or (n, K) for "trace"; pairs of outputs as (n, o, m, p)."""
    return _product({"trace": "nk,mk->nm", "full": "nok,mpk->nomp", "diagonal": "nok,mok->nmo"}[outputs], a, b)


def _streamed(left: Pair, right: Pair, outputs: str, same: bool):
    """Gradients are formed for some inputs at a time, and multiplied while they are still in the cache."""
    n, groups, _, inputs = left.data.shape
    _, _, _, o, units = left.cotangents.shape
    m = right.data.shape[0]
    chunks = max(1, round(max(n, m) * o * groups * inputs * units * left.data.dtype.itemsize / CACHE))
    width = max(1, -(-inputs // chunks))
    width = next((w for w in range(width, 2 * width) if inputs % w == 0), width)
    chunks = -(-inputs // width)

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, chunks * width - inputs)))
        return jnp.moveaxis(a.reshape(*a.shape[:3], chunks, width), 3, 0)

    def gradients(a, g):
        if outputs == "trace":
            return _product("ngti,ngtoj->ngioj", a, g).reshape(a.shape[0], -1)
        return _product("ngti,ngtoj->nogij", a, g).reshape(a.shape[0], o, -1)

    def add(total, data):
        d = _ordered(gradients(data[0], left.cotangents))
        e = d if same else _ordered(gradients(data[1], right.cotangents))
        return total + _inner(d, e, outputs), None

    shape = {"trace": (n, m), "full": (n, o, m, right.cotangents.shape[3]), "diagonal": (n, m, o)}[outputs]
    data = (split(left.data), None if same else split(right.data))
    return lax.scan(add, jnp.zeros(shape, left.data.dtype), data)[0]


def _pair(term: Term, left: Pair, right: Pair, outputs: str):
    g, h = left.cotangents, right.cotangents
    if term.uses[0].kind == "lookup":
        ids, others = (_valid(term.uses[0], ids) for ids in (left.data, right.data))
        read = (ids < term.uses[0].inputs)[:, None, :, None]
        meet = ((ids[:, None, :, None] == others[None, :, None, :]) & read)[:, :, None].astype(g.dtype)
    else:
        meet = _product("ngti,mgsi->nmgts", left.data, right.data)
    if left.bias is not None:
        meet = meet + left.bias * left.bias
    if g.shape[2] == g.shape[3] == 1:
        g, h, meet = g[:, :, 0, 0], h[:, :, 0, 0], meet[:, :, 0, 0, 0]
        if outputs == "trace":
            return meet * _inner(g.reshape(len(g), -1), h.reshape(len(h), -1), outputs)
        return _inner(g, h, outputs) * (meet[:, None, :, None] if outputs == "full" else meet[:, :, None])
    if outputs == "trace":
        return jnp.sum(meet * _product("nogtj,mogsj->nmgts", g, h), (2, 3, 4))
    if outputs == "diagonal":
        return _product("nmgts,nmogts->nmo", meet, _product("nogtj,mogsj->nmogts", g, h))
    if g.shape[3] == 1:
        meet, g, h = meet[:, :, :, 0, 0], g[:, :, :, 0], h[:, :, :, 0]
        return _product("nmg,nmopg->nomp", meet, _product("nogj,mpgj->nmopg", g, h))
    return _product("nogtj,nmpgtj->nomp", g, _product("nmgts,mpgsj->nmpgtj", meet, h))


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, precision="highest")
