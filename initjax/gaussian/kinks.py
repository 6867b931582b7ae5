"""Where an elementwise function is not smooth, read from its own program.

Every max, min, abs, sign, clamp and comparison in the traced function switches where a difference changes sign.
These differences are evaluated beside the function on a fine grid, and every sign change is bisected to the last bit.
A switch that turns out to be smooth costs one panel edge; one that this grid misses is found again by the
bisection in `activation.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from initjax.trace.jaxpr import ClosedJaxpr, Jaxpr, Literal, float64

_MAX_KINKS = 200


def _grid() -> np.ndarray:
    far = np.geomspace(20.0, 2e5, 1200)
    near = np.geomspace(1e-12, 1e-2, 400)
    return np.sort(np.concatenate([np.linspace(-20, 20, 4993), far, -far, near, -near]))


def switches(fn):
    """A function x -> list of the differences whose signs steer `fn`; x of the shape that it is traced with."""

    def collect(x):
        closed = jax.make_jaxpr(fn)(x)
        out: list = []
        _run(closed.jaxpr, closed.consts, [x], out)
        return [jnp.broadcast_to(s, x.shape) for s in out if jnp.issubdtype(s.dtype, jnp.floating)]

    return collect


def _inner(eqn):
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params and eqn.primitive.name not in ("scan", "while", "cond"):
            return eqn.params[key]
    return None


def _run(jaxpr: Jaxpr, consts, args, out: list):
    env: dict = {}

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in ("max", "min", "lt", "gt", "le", "ge", "eq", "ne"):
            if all(jnp.issubdtype(jnp.asarray(v).dtype, jnp.floating) for v in values):
                out.append(values[0] - values[1])
        elif name in ("abs", "sign"):
            out.append(jnp.asarray(values[0]))
        elif name == "clamp":
            out += [values[1] - values[0], values[1] - values[2]]
        elif name in ("floor", "ceil", "round"):
            out.append(jnp.sin(jnp.pi * jnp.asarray(values[0])))  # changes sign at every integer
        inner = _inner(eqn)
        if inner is not None:
            body, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            results = _run(body, inner_consts, values, out)
        else:
            results = eqn.primitive.bind(*values, **eqn.params)
            if not eqn.primitive.multiple_results:
                results = [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def find_kinks(fn) -> tuple[float, ...]:
    """Points of the real line, increasing, where a comparison inside `fn` switches."""
    grid = _grid()
    with float64():
        try:
            collect = jax.jit(switches(fn))
            signs = [np.sign(np.asarray(s)) for s in collect(jnp.asarray(grid))]
        except (NotImplementedError, TypeError, ValueError):
            return ()  # a program that cannot be replayed; bisection finds its kinks
        if not signs:
            return ()
        rows = np.stack(signs)
        which, at = np.nonzero(rows[:, 1:] != rows[:, :-1])
        order = np.argsort(np.abs(grid[at]), kind="stable")[:_MAX_KINKS]
        which, at = which[order], at[order]
        low, high, left = grid[at], grid[at + 1], rows[which, at]
        for _ in range(80):
            middle = (low + high) / 2
            probe = np.full(grid.shape, 0.5)
            probe[: middle.size] = middle
            here = np.stack([np.sign(np.asarray(s)) for s in collect(jnp.asarray(probe))])[
                which, np.arange(middle.size)
            ]
            same = here == left
            low, high = np.where(same, middle, low), np.where(same, high, middle)
    points = (low + high) / 2
    decimal = np.round(points, 9)  # relu6(x + 3) switches at -3, up to the rounding of x + 3
    points = np.where(np.abs(points - decimal) < 4e-15 * (1 + np.abs(points)), decimal, points) + 0.0
    return tuple(float(p) for p in np.unique(points))
