"""E[f(u) g(v)] of traced variances and covariances, for programs that are compiled once and called often.

Closed forms where there are any; factors of rows and columns stay vectors until they meet. For other functions Hermite
coefficients are tabulated beforehand, over a range of variances that has to be known: `Ranges` holds those met in a run
on concrete arrays. A traced sum is right wherever its variances lie in that range; whether they do is one of the
results (`inside`), for the caller to look at.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.closed import FORMS, mean_form, recognise
from initjax.gaussian.dual import SNAP, host_pair
from initjax.gaussian.expect import expect
from initjax.gaussian.matrix import _interpolation
from initjax.gaussian.tile import CUT, closed_form, table_of

_STEP = 4  # ends of tables are whole fractions of an octave, one step beyond the variances met
_CHUNK = 8  # terms of Horner's rule in one pass over a tile
_WIDEST = 40  # octaves that a table may span


class NotTabulated(Exception):
    """A function has no table: its variances are unknown, or its series is not resolved (a kink)."""


class Ranges:
    """Variances met by every function, and (`inside`) whether traced ones lie among them."""

    def __init__(self):
        self._met: dict[Activation, tuple[float, float]] = {}
        self.inside: list[Any] = []
        self.holds: Any = None  # a traced boolean that is true

    def meet(self, f, q) -> None:
        """f acts on Gaussians of these (concrete) variances."""
        act = as_activation(f)
        low, high = self._met.get(act, (math.inf, 0.0))
        self._met[act] = (min(low, float(np.min(q, initial=low))), max(high, float(np.max(q, initial=high))))

    def octaves(self, *acts: Activation) -> tuple[float, float]:
        """Powers of two that enclose the variances of all these functions."""
        known = [self._met[act] for act in acts if act in self._met]
        if len(known) < len(acts):
            raise NotTabulated
        low, high = min(k[0] for k in known), max(k[1] for k in known)
        if not 0 < low <= high < math.inf:
            raise NotTabulated
        ends = (math.floor(_STEP * math.log2(low)) - 1) / _STEP, (math.ceil(_STEP * math.log2(high)) + 1) / _STEP
        if ends[1] - ends[0] > _WIDEST:
            raise NotTabulated
        return ends


_current: contextvars.ContextVar[Ranges | None] = contextvars.ContextVar("ranges", default=None)


@contextlib.contextmanager
def using(ranges: Ranges) -> Iterator[Ranges]:
    """Traced expectations are served from tables over these ranges."""
    token = _current.set(ranges)
    try:
        yield ranges
    finally:
        _current.reset(token)


def served() -> bool:
    """Whether traced expectations of these functions are to come from here."""
    return _current.get() is not None


def mean(f, q):
    """E[f(sqrt(q) z)] for traced q."""
    act = as_activation(f)
    member = recognise(act)
    return _interpolated(act, None, q) if member is None else mean_form(member, jnp, q)


def moment(f, g, q):
    """E[f(u) g(u)] for traced q = Var u."""
    f, g = as_activation(f), as_activation(g)
    form = closed_form(f, g)
    if form is None:
        return _interpolated(f, g, q)
    c = jnp.where(q > 0, jnp.ones_like(q), 0.0)  # as the pairs of examples have it
    return FORMS[form[0]](jnp, *form[1:], q, q, c, 1 - c)


def duals(pairs: list[tuple[Any, Any]], q1, q2, k) -> list:
    """E[f(u) g(v)] for every (f, g) and traced Var u = q1, Var v = q2, Cov = k, of one rank, which broadcast."""
    acts = [(as_activation(f), as_activation(g)) for f, g in pairs]
    forms = [closed_form(f, g) for f, g in acts]
    for (f, g), form in zip(acts, forms, strict=True):
        if form is None:
            ends = _octaves(f, g)
            _look(q1, ends)
            _look(q2, ends)

    def all_at_once(q1, q2, k):
        raw = k * (1 / _root(q1) * (1 / _root(q2)))
        c = jnp.where(jnp.abs(raw) > 1 - SNAP, jnp.sign(raw), raw)
        s, out = jnp.sqrt((1 - c) * (1 + c)), []
        for (f, g), form in zip(acts, forms, strict=True):
            dual = _by_series(f, g, q1, q2, c) if form is None else FORMS[form[0]](jnp, *form[1:], q1, q2, c, s)
            out.append(jnp.broadcast_to(dual, k.shape))
        return out

    return apart(all_at_once, [k.shape] * len(acts), q1, q2, k)


def apart(function, shapes: list[tuple[int, ...]], *arrays) -> list:
    """The list `function(*arrays)` of arrays of these shapes, compiled as a computation of its own.

    XLA computes cheap producers again for each of their users, through all layers if nothing stops it. It stops at the
    branches of a condition, here one that holds, which it does not know.
    """
    ranges = _current.get()
    if ranges is None or ranges.holds is None:
        return function(*arrays)
    nothing = lambda *_: [jnp.zeros(shape, arrays[-1].dtype) for shape in shapes]  # noqa: E731
    return jax.lax.cond(ranges.holds, function, nothing, *arrays)


def _root(q):
    return jnp.sqrt(jnp.maximum(q, 1e-300))


# ------------------------------------------------------------------ functions of one variance


def _interpolated(f: Activation, g: Activation | None, q):
    low, high = _octaves(f, *([] if g is None else [g]))
    cache = f.__dict__.setdefault("_moment_tables", {})
    key = (g, low, high)
    if key not in cache:
        cache[key] = _moments(f, g, low, high)
    if cache[key] is None:
        raise NotTabulated
    _look(q, (low, high))
    return jnp.reshape(cache[key] @ _weights(len(cache[key]), q, low, high), q.shape)


def _moments(f: Activation, g: Activation | None, low: float, high: float) -> np.ndarray | None:
    """E[f] or E[f g] at Chebyshev nodes of log2 q, doubled until the values between them are right to 13 digits."""
    count = 12
    while count <= 200:
        nodes, halfway = (np.cos(np.pi * (np.arange(n) + 0.5) / n) for n in (count, 3))
        q = 2.0 ** ((low + high + (high - low) * np.concatenate([nodes, halfway])) / 2)
        values = np.asarray(expect(f, q) if g is None else host_pair(f, g, q, q, np.ones_like(q)))
        error = np.abs(_interpolation(nodes, halfway) @ values[:count] - values[count:])
        if np.all(error < 1e-13 * np.abs(values).max()):
            return values[:count]
        count *= 2
    return None


def _octaves(*acts: Activation) -> tuple[float, float]:
    ranges = _current.get()
    assert ranges is not None
    return ranges.octaves(*acts)


def _look(q, ends: tuple[float, float]) -> None:
    """Remember whether all variances lie in the range of a table."""
    ranges = _current.get()
    assert ranges is not None
    ranges.inside.append(jnp.all((q >= 2.0 ** ends[0]) & (q <= 2.0 ** ends[1])))


def _weights(count: int, q, low: float, high: float):
    """(count, q.size): how Chebyshev nodes in log2 q make up the values at every q, by the barycentric formula."""
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    weight = (-1.0) ** np.arange(count) * np.sin(np.pi * (np.arange(count) + 0.5) / count)
    place = (2 * jnp.log2(jnp.clip(jnp.ravel(q), 2.0**low, 2.0**high)) - low - high) / (high - low)
    gap = place[None, :] - nodes[:, None]
    gap = jnp.where(gap == 0, jnp.finfo(gap.dtype).tiny, gap)  # at a node its own value outweighs all others
    ratio = weight[:, None] / gap
    return ratio / jnp.sum(ratio, axis=0, keepdims=True)


# ------------------------------------------------------------------ Mehler's series


def _by_series(f: Activation, g: Activation, q1, q2, c):
    """sum_k a_k(q1) b_k(q2) c^k, even and odd powers apart."""
    ends = _octaves(f, g)
    left, right = table_of(f, *ends), table_of(g, *ends)
    if left is None or right is None:
        raise NotTabulated
    terms = max(left.shape[1], right.shape[1])
    left, right = (t if t.shape[1] == terms else table_of(h, *ends, terms) for h, t in ((f, left), (g, right)))
    if left is None or right is None:
        raise NotTabulated
    at = _weights(len(left), q1, *ends), _weights(len(right), q2, *ends)
    # bounds over the whole range of variances; twice, for what lies between the nodes
    size = 2 * np.abs(left).max(axis=0) * np.abs(right).max(axis=0)
    allowed = CUT * np.sqrt((left**2).sum(axis=1).min() * (right**2).sum(axis=1).min())
    square, largest = c * c, jnp.max(jnp.abs(c))
    out = None
    for start in (0, 1):
        reach = size[start::2] * largest ** np.arange(start, terms, 2, dtype=float)
        count = jnp.sum(jnp.cumsum(reach[::-1]) > allowed)
        if not (np.cumsum(size[start::2]) > allowed).any():
            continue
        part = _horner(left.T[start::2], right.T[start::2], at, (q1.shape, q2.shape), square, count)
        part = c * part if start else part
        out = part if out is None else out + part
    return jnp.zeros_like(c) if out is None else out


def _horner(left, right, at, shapes, x, count):
    """sum_k a_k b_k x^k for k < count, a few terms in one pass; a and b are made from their tables as it goes."""
    pad = [(0, -len(left) % _CHUNK), (0, 0)]
    left, right = jnp.asarray(np.pad(left, pad)), jnp.asarray(np.pad(right, pad))
    chunks = (count + _CHUNK - 1) // _CHUNK

    def more(i, total):
        start = (chunks - 1 - i) * _CHUNK
        a, b = (
            jnp.reshape(jax.lax.dynamic_slice_in_dim(table, start, _CHUNK) @ weights, (_CHUNK, *shape))
            for table, weights, shape in zip((left, right), at, shapes, strict=True)
        )
        for k in range(_CHUNK - 1, -1, -1):
            total = total * x + a[k] * b[k]
        return total

    return jax.lax.fori_loop(0, chunks, more, jnp.zeros_like(x))


__all__ = ["NotTabulated", "Ranges", "apart", "duals", "mean", "moment", "served", "using"]
