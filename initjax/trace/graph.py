"""What stands behind a body, and which fields are independent of each other."""

from typing import Any

from initjax.trace.domain import Atom, Base, Ew, Lin, Noise, Product, Sum, Tangent, Taps, is_zero


def related(a: Base | Noise, b: Base | Noise) -> bool:
    """Whether two bases share weights: the walk has made sure that views of one leaf are equal or disjoint."""
    if isinstance(a, Noise) or isinstance(b, Noise):
        return isinstance(a, Noise) and isinstance(b, Noise) and a.key == b.key
    u, v = a.view, b.view
    if (u.leaf, u.tangent, a.kind) != (v.leaf, v.tangent, b.kind):
        return False
    return u.offset == v.offset or a.kind == "vector" and u.overlaps(v)


def parts_of(body) -> list:
    """A body and everything that stands directly in it."""
    if isinstance(body, Sum):
        return [body, *(atom for atom, _ in body.terms)]
    things: list[Any] = [body]
    for c, g in body.parts:
        things += parts_of(g) + (parts_of(c) if c is not None else [])
    return things


def sources(atom: Atom) -> list:
    """The bodies an atom is made of."""
    if isinstance(atom, Base):
        return [] if atom.operand is None else [atom.operand]
    if isinstance(atom, Ew):
        return [atom.leaf]
    if isinstance(atom, Product):
        return [atom.left, atom.right]
    if isinstance(atom, Taps):
        return [] if atom.source is None else [atom.source]
    if isinstance(atom, Noise):
        return []
    assert isinstance(atom, Lin)
    return [atom.source]


def reachable(bodies: list) -> list[Atom]:
    """Every atom behind the bodies, oldest first."""
    found: dict[int, Atom] = {}
    stack = list(bodies)
    while stack:
        for thing in parts_of(stack.pop()):
            if isinstance(thing, Atom) and thing.number not in found:
                found[thing.number] = thing
                stack += sources(thing)
    return [found[number] for number in sorted(found)]


def carries(atom: Atom) -> bool:
    """Whether a tangent atom is a map of tangents with coefficients, so that it depends on primal fields."""
    if not isinstance(atom, Lin):
        return False
    if isinstance(atom.source, Tangent):
        return any(c is not None for c, _ in atom.source.parts) or any(
            carries(a) for _, g in atom.source.parts for a, _ in g.terms
        )
    return any(carries(a) for a, _ in atom.source.terms)


def bases_of(body: Sum) -> list[Base | Noise]:
    """The Gaussians and draws that a primal body is a function of."""
    found: dict[int, Base | Noise] = {}
    stack: list[Any] = [atom for atom, _ in body.terms]
    while stack:
        atom = stack.pop()
        if isinstance(atom, (Base, Noise)):
            found[atom.number] = atom
        elif isinstance(atom, Taps):
            found |= {base.number: base for base in atom.bases}
        else:
            stack += [a for part in sources(atom) for a, _ in part.terms]
    return list(found.values())


def independent(left: Sum, right: Sum) -> bool:
    """Whether no Gaussian of the one shares weights with a Gaussian of the other."""
    return not any(related(a, b) for a in bases_of(left) for b in bases_of(right))


def factors_of(atom: Atom) -> list[Sum]:
    """A product's factors, down to those that are no products; any other atom is one factor.

    Maps over positions are looked through.
    """
    if isinstance(atom, Product):
        return split_factors(atom.left) + split_factors(atom.right)
    if isinstance(atom, Lin) and isinstance(atom.source, Sum) and len(atom.source.terms) == 1:
        return factors_of(atom.source.terms[0][0])
    return [Sum(atom.axes, ((atom, 1.0),))]


def split_factors(side: Sum) -> list[Sum]:
    """A factor that is itself a plain product as its factors."""
    atom, c = side.terms[0] if len(side.terms) == 1 else (None, 0.0)
    if not isinstance(atom, Product) or not isinstance(c, float) or c != 1.0 or not is_zero(side.constant):
        return [side]
    return split_factors(atom.left) + split_factors(atom.right)


def separable(first: Atom, second: Atom) -> bool:
    """Whether E[first second] splits into expectations of at most two factors, one of either atom."""
    return pairing(factors_of(first), factors_of(second)) is not None


def pairing(ours: list[Sum], theirs: list[Sum]) -> list[tuple[int | None, int | None]] | None:
    """Which factor meets which: dependent pairs and single factors; None where three depend on each other."""
    partners: list[tuple[int | None, int | None]] = []
    taken: set[int] = set()
    for i, mine in enumerate(ours):
        dependent = [j for j, yours in enumerate(theirs) if not independent(mine, yours)]
        if len(dependent) > 1 or taken.intersection(dependent):
            return None
        taken.update(dependent)
        partners.append((i, dependent[0] if dependent else None))
    return partners + [(None, j) for j in range(len(theirs)) if j not in taken]
