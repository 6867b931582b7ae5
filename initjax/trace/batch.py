r"""Statistics over a large batch at their expectation: normalization layers in training mode.

The mean m of a channel over the batch and its positions is a linear map of a Gaussian field, and stays exact. The
variance s^2 is a quadratic form: E s^2 = tr(K_c) / N for the centred covariance K_c of the N positions, with relative
variance 2 / r, where r = tr(K_c)^2 / tr(K_c^2) is the effective rank of the batch. As r grows, s^2 is a number and
u - m is Gaussian as before. Its tangent d s^2 = 2 / N sum_q v_q dv_q, v = u - m, stays: it is of the order 1 / r, but
one number for all positions, and a readout that averages over P of them brings everything else down to 1 / P. Source:
Yang et al. 2019 (arXiv:1902.08129), whose limit of large batches this is; the tangents are worked out in
`initjax/infinite/statistics.py`.
"""

from typing import Any

import numpy as np

from initjax.trace.domain import Atom, Const, Ew, Field, Lin, Product, Sum, Tangent, is_zero
from initjax.trace.graph import carries
from initjax.trace.maps import Relayout

LEAST_RANK = 8.0  # below, s^2 fluctuates by half of itself, and its expectation describes no channel
_LINEAR = frozenset("add add_any sub neg convert_element_type copy copy_p stop_gradient reduce_precision".split())


def averaged(walk, operands: list) -> list:
    """The operands of an elementwise step, nonlinear statistics of the batch replaced by their expectations."""
    name = walk.equation.name
    if name in _LINEAR or not (name == "select_n" or walk.is_pointwise()):
        return operands
    rest = operands[1:] if name == "div" else operands
    scaled = name in ("mul", "div") and any(isinstance(v, Const) for v in rest)
    return [_expected(walk, v, scaled) for v in operands]


def _expected(walk, value, scaled: bool) -> Any:
    """A statistic's expectation; while it is only scaled by known numbers more may be added, and it stays random."""
    if not isinstance(value, Field) or any(not a.channel and a.size > 1 for a in value.body.axes):
        return value
    body = value.body
    if isinstance(body, Tangent):
        coupled = any(over_examples(a) for _, g in body.parts for a in _atoms(g))
        if not coupled or all(c is None for c, _ in body.parts):
            return value
        step = Relayout("reshape", body.axes)  # one atom for the whole, so that it may have a factor in front
        atom = walk.arena.atom(Lin, (id(body), step), body.axes, step, body, False, True)
        whole = Tangent(body.axes, ((None, walk.arena.sum(body.axes, [(atom, 1.0)])),))
        return Field(whole, value.groups, value.near)
    if scaled or body.gaussian or not any(map(over_examples, _atoms(body))):
        return value
    if id(body) in walk.settled:
        return walk.settled[id(body)][0]
    mean, variance = walk.spread(body)
    value_of = 0.0 if mean is None else float(mean.reshape(-1)[0])
    spread = float(variance.reshape(-1)[0])
    rank = (2 * value_of**2 / spread if spread > 0 else np.inf) if value_of else 0.0
    if walk.judges and rank < LEAST_RANK:
        raise walk.refuse(
            value.near,
            f"the examples of this batch have effective rank {rank:.3g} here: what is computed from their mean and "
            "variance fluctuates from channel to channel, and its expectation describes no channel",
            f"give a batch of effective rank {LEAST_RANK:g} or more (many examples that are not alike); or "
            "on_unsupported='monte_carlo', which takes the statistics of the batch that is given",
            what="a statistic over the batch",
        )
    walk.ranks[_free_name(walk, value.near)] = rank
    known = Const(np.full((1,) * len(value.shape), value_of), value.shape)
    walk.settled[id(body)] = (known, body)
    return known


def _free_name(walk, near: str) -> str:
    """The layer before the statistics; numbered where one layer meets several."""
    name, count = near or "inputs", 2
    while name in walk.ranks:
        name, count = f"{near or 'inputs'} ({count})", count + 1
    return name


def _atoms(body: Sum) -> list[Atom]:
    return [atom for atom, _ in body.terms]


def pieces(body: Sum) -> list[tuple[Any, Sum, Sum]] | None:
    """(k, v, dv) with sum_j k_j sum_q v_j(q) dv_j(q) the tangent of a statistic of Gaussians; None if it is no such."""
    found: list[tuple[Any, Sum, Sum]] = []
    for atom, factor in body.terms:
        if not isinstance(atom, Lin) or not carries(atom) or not isinstance(factor, float):
            return None
        if not atom.map.commutes and atom.map.kind != "sum":
            return None
        parts = [(None, atom.source)] if isinstance(atom.source, Sum) else atom.source.parts
        for c, g in parts:
            if c is None:
                inner = pieces(g)
            else:
                plain = c.gaussian and is_zero(c.constant) and not any(map(carries, _atoms(g)))
                inner = [(1.0, c, g)] if plain else None
            if inner is None:
                return None
            found += [(factor * k, v, dv) for k, v, dv in inner]
    return found


def separated(walk, tangent: Tangent) -> Tangent:
    """The tangent with parts that are statistics of the batch apart from those that are not."""
    parts = []
    for c, g in tangent.parts:
        for kind in (True, False):
            terms = [(atom, k) for atom, k in g.terms if carries(atom) is kind]
            if terms:
                parts.append((c, g if len(terms) == len(g.terms) else walk.arena.sum(g.axes, terms)))
    return Tangent(tangent.axes, tuple(parts))


def over_examples(atom: Atom) -> bool:
    """Whether an atom holds a sum over the first axis, that of the examples."""
    if isinstance(atom, Product):
        return any(over_examples(a) for side in (atom.left, atom.right) for a in _atoms(side))
    if isinstance(atom, Ew):
        return any(map(over_examples, _atoms(atom.leaf)))
    if not isinstance(atom, Lin):
        return False
    if atom.map.kind == "sum" and 0 in atom.map.parameters and atom.source.axes[0].size > 1:
        return True
    sums = [atom.source] if isinstance(atom.source, Sum) else [g for _, g in atom.source.parts]
    return any(over_examples(a) for s in sums for a in _atoms(s))
