r"""Taylor expansion of a kernel program in shifts of its two inputs: all derivatives of K(x1 + s, x2 + t) at once.

The program of a kernel is short: sums, products and one opaque call for each Gaussian pair expectation
(gaussian/taylor.py). Here every value of it becomes a polynomial in the shifts s and t, cut at chosen monomials: linear
steps act on each coefficient, products multiply polynomials, pair expectations compose with their own Taylor series.
One pass gives d^alpha/ds^alpha d^beta/dt^beta K for all alpha, beta, exact to rounding, whatever the order, also at
x1 = x2, where arccos and sqrt in kernel formulas are 0/0.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from initjax import gaussian
from initjax.errors import InputError, UnsupportedLayerError
from initjax.gaussian.activation import Activation
from initjax.gaussian.closed import recognise
from initjax.gaussian.dual import SNAP
from initjax.gaussian.taylor import MEAN, PAIR, derivative, factorials, jump_order, slope_pair, times_power
from initjax.trace.inline import call_body
from initjax.trace.jaxpr import ClosedJaxpr, Literal

Index = tuple[int, ...]
Key = tuple[Index, Index]
Poly = dict[Key, np.ndarray]  # monomial -> coefficient array; what is missing is zero


def monomials(highest: set[Index], size: int) -> frozenset[Index]:
    """All monomials that divide one of `highest`, of `size` variables."""
    out = {(0,) * size}
    for top in highest:
        out |= set(itertools.product(*(range(n + 1) for n in top)))
    return frozenset(out)


class Expansion:
    """Evaluates a recorded kernel program on polynomials.

    Parameters
    ----------
    program, met : from `gaussian.taylor.recording`.
    left, right : monomials of the shifts of the first and the second input that are kept.
    """

    def __init__(self, program: ClosedJaxpr, met: list, left: frozenset[Index], right: frozenset[Index]):
        self.program, self.met, self.left, self.right = program, met, left, right
        self.orders = tuple(max(map(sum, side)) for side in (left, right))
        size = len(next(iter(left)))
        self.zero: Key = ((0,) * size, (0,) * size)
        self.singular = 0.0  # stands for the infinite slope of E[f' g'] of relu at |c| = 1
        self._known: dict = {}
        self._roots = _roots({f for functions in met for f in functions})

    def run(self, x1: np.ndarray, x2: np.ndarray, singular: float = 0.0) -> list[Poly]:
        """The polynomials of all results of the program at the points x1 (n1, d) and x2 (n2, d)."""
        self.singular = singular
        inputs = [self._shifted(x1, 0), self._shifted(x2, 1)]
        return self._evaluate(self.program, inputs)

    def _shifted(self, x, side: int) -> Poly:
        out = {self.zero: np.asarray(x, np.float64)}
        for i in range(x.shape[-1]):
            unit = tuple(int(i == j) for j in range(x.shape[-1]))
            if unit in (self.left, self.right)[side]:
                direction = np.broadcast_to(np.eye(x.shape[-1])[i], x.shape)
                out[(unit, self.zero[1]) if side == 0 else (self.zero[0], unit)] = np.ascontiguousarray(direction)
        return out

    def _evaluate(self, closed: ClosedJaxpr, inputs: list[Poly]) -> list[Poly]:
        jaxpr = closed.jaxpr
        values: dict = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {v: {self.zero: np.asarray(c)} for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
        read = lambda atom: {self.zero: np.asarray(atom.val)} if isinstance(atom, Literal) else values[atom]  # noqa: E731
        for eqn in _needed(jaxpr):
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, operands: list[Poly]) -> list[Poly]:
        name, body = eqn.primitive.name, call_body(eqn)
        if body is not None:
            called = str(eqn.params.get("name", ""))
            if called.startswith(PAIR):
                return [self._pair(int(called.removeprefix(PAIR)), *operands)]
            if called.startswith(MEAN):
                return [self._mean(self.met[int(called.removeprefix(MEAN))][0], operands[0])]
            return self._evaluate(ClosedJaxpr(body[0], body[1]), operands)
        bind = lambda *arrays: _bound(eqn, arrays)  # noqa: E731
        if all(set(p) <= {self.zero} for p in operands) or name in _CONSTANT:
            out = bind(*(p[self.zero] for p in operands))
            return [{self.zero: o} for o in (out if eqn.primitive.multiple_results else [out])]
        if name in ("mul", "dot_general"):
            return [self.times(*operands, product=np.multiply if name == "mul" else bind)]
        if name == "div":
            return [self.times(operands[0], self._power(operands[1], -1.0))]
        if name in ("sqrt", "rsqrt", "integer_pow", "square"):
            power = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}.get(name) or float(eqn.params["y"])
            return [self._power(operands[0], power)]
        if name == "select_n":
            which = operands[0][self.zero]
            keys = set().union(*operands[1:])
            cases = [[p.get(k, np.zeros_like(p[self.zero])) for p in operands[1:]] for k in keys]
            return [{k: bind(which, *case) for k, case in zip(keys, cases, strict=True)}]
        if name in ("max", "min"):
            a, b = (p.get(self.zero, np.float64(0)) for p in operands)
            first = np.broadcast_to(a >= b if name == "max" else a <= b, eqn.outvars[0].aval.shape)
            chosen = {
                k: np.where(first, operands[0].get(k, 0.0), operands[1].get(k, 0.0))
                for k in {*operands[0], *operands[1]}
            }
            return [chosen]
        if name in _LINEAR:
            keys = set().union(*operands)
            zeros = [np.zeros_like(next(iter(p.values()))) for p in operands]
            return [{k: bind(*(p.get(k, z) for p, z in zip(operands, zeros, strict=True))) for k in keys}]
        raise UnsupportedLayerError(
            f"a kernel whose program contains {name}",
            "kernels made of sums, products and Gaussian expectations",
            "its Taylor series is not known here",
            "use a model of dense layers, activations and residual sums on inputs (n, d)",
            primitive=name,
        )

    # ------------------------------------------------------------------ polynomials

    def times(self, a: Poly, b: Poly, product: Callable = np.multiply) -> Poly:
        """The product, cut at the monomials that are kept."""
        out: Poly = {}
        for (alpha, beta), x in a.items():
            for (gamma, delta), y in b.items():
                key = tuple(map(sum, zip(alpha, gamma, strict=True))), tuple(map(sum, zip(beta, delta, strict=True)))
                if key[0] in self.left and key[1] in self.right:
                    value = product(x, y)
                    out[key] = out[key] + value if key in out else value
        return out

    def _compose(self, p: Poly, taylor: Callable[[int], np.ndarray]) -> Poly:
        """g(p), where taylor(n) is the n-th derivative of g at the constant part of p, over n!."""
        rest = {k: v for k, v in p.items() if k != self.zero}
        out, power, n = {self.zero: taylor(0)}, dict(rest), 1
        while power:
            out = _added(out, {k: taylor(n) * v for k, v in power.items()})
            power, n = self.times(power, rest), n + 1
        return out

    def _power(self, p: Poly, exponent: float) -> Poly:
        base = p[self.zero]

        def taylor(n):
            factor = math.prod(exponent - i for i in range(n)) / math.factorial(n)
            return factor * base ** (exponent - n) if factor else np.zeros_like(base)

        return self._compose(p, taylor)

    # ------------------------------------------------------------------ Gaussian expectations

    def _mean(self, f: Activation, q: Poly) -> Poly:
        base = q[self.zero]
        if jump_order(f, 2 * max(self.orders)) is None:
            return self._compose(q, lambda n: _expect(derivative(f, 2 * n), base) / factorials(n) / 2.0**n)
        _positive(base)
        return self._compose(
            q, lambda n: _expect(f, base) if n == 0 else _expect(times_power(f.prime, 1), base) / (2 * base)
        )

    def _pair(self, place: int, q1: Poly, q2: Poly, k: Poly) -> Poly:
        f, g = self.met[place]
        m, n = self.orders
        if jump_order(f, 2 * m + n - 1) is None and jump_order(g, 2 * n + m - 1) is None:
            return self._smooth(f, g, q1, q2, k)
        _positive(q1[self.zero], q2[self.zero])
        p, r = recognise(f), recognise(g)
        if p and r and p.family == r.family and p.family in ("ramp", "step"):
            return self._homogeneous(p, r, q1, q2, k)
        return self._first_order(f, g, q1, q2, k)

    def _smooth(self, f, g, q1: Poly, q2: Poly, k: Poly) -> Poly:
        """sum over i, j, l of (dq1/2)^i (dq2/2)^j dk^l E_{2i+l, 2j+l} / (i! j! l!)."""
        at = [p[self.zero] for p in (q1, q2, k)]
        powers = [self._powers(p) for p in (q1, q2, k)]
        out: Poly = {}
        for i, a in enumerate(powers[0]):
            for j, b in enumerate(powers[1]):
                ab = self.times(a, b)
                for order, c in enumerate(powers[2]):
                    term = self.times(ab, c)
                    if term:
                        value = self._cross(f, g, 2 * i + order, 2 * j + order, at)
                        value = value / factorials(i, j, order) / 2.0 ** (i + j)
                        out = _added(out, {key: value * v for key, v in term.items()})
        return out

    def _powers(self, p: Poly) -> list[Poly]:
        """1, d, d^2, ... of the non-constant part d of p, as long as anything is left."""
        rest = {key: v for key, v in p.items() if key != self.zero}
        out = [{self.zero: np.ones_like(p[self.zero])}]
        while out[-1]:
            out.append(self.times(out[-1], rest))
        return out[:-1]

    def _cross(self, f, g, i: int, j: int, at, powers=(0, 0)) -> np.ndarray:
        """E[u^a f^(i)(u) v^b g^(j)(v)] for powers = (a, b)."""
        (f, start), (g, first) = self._roots[f], self._roots[g]
        key = (f, start + i, g, first + j, powers, *(a.tobytes() for a in at))
        if key not in self._known:
            left = times_power(derivative(f, start + i), powers[0])
            right = times_power(derivative(g, first + j), powers[1])
            q1, q2, k = np.broadcast_arrays(*at)
            still = (q1 < _NOTHING) | (q2 < _NOTHING)
            # where a variance is nothing its function is a number, and the two are independent
            safe = [np.where(still, fill, value) for value, fill in ((q1, 1.0), (q2, 1.0), (k, 0.0))]
            value = np.asarray(gaussian.cross(left, right, *safe))
            if still.any():
                value = np.where(still, _at_rest(left, q1) * _at_rest(right, q2), value)
            self._known[key] = value
        return self._known[key]

    def _homogeneous(self, p, r, q1: Poly, q2: Poly, k: Poly) -> Poly:
        """sqrt(q1 q2) kappa(c) of two ramps, kappa(c) of two steps, c = k / sqrt(q1 q2)."""
        shrink = self.times(self._power(q1, -0.5), self._power(q2, -0.5))
        c = self.times(k, shrink)
        base = c[self.zero]
        base = c[self.zero] = np.clip(np.where(np.abs(base) > 1 - SNAP, np.sign(base), base), -1.0, 1.0)
        slopes = slope_pair(p.parameters, r.parameters, sum(self.orders), p.family, base, self.singular)
        out = self._compose(c, lambda n: slopes[n] / factorials(n))
        if p.family == "step":
            return out
        return self.times(self.times(self._power(q1, 0.5), self._power(q2, 0.5)), out)

    def _first_order(self, f, g, q1: Poly, q2: Poly, k: Poly) -> Poly:
        """First derivatives alone: d_s d_t E[f(u) g(v)] = E[f'(u) g'(v) du dv] with (u, v, du, dv) Gaussian.

        du = p1 z1 + e1 z2 + noise in the unit variables z1 = u / sqrt(q1), z2 = v / sqrt(q2); likewise dv. No second
        derivative of f is needed. Where |c| = 1, du is a multiple of z1 and noise, e1 = 0.
        """
        x, y, cov = (p[self.zero] for p in (q1, q2, k))
        x, y, cov = np.broadcast_arrays(x, y, cov)
        root1, root2 = np.sqrt(x), np.sqrt(y)
        c = cov / (root1 * root2)
        c = np.where(np.abs(c) > 1 - SNAP, np.sign(c), c)
        s2 = (1 - c) * (1 + c)
        invert = np.where(s2 > 0, 1 / np.where(s2 > 0, s2, 1.0), 0.0)

        def moment(i, j, a, b):  # E[f^(i)(u) g^(j)(v) z1^a z2^b]
            return self._cross(f, g, i, j, (x, y, cov), (a, b)) / root1**a / root2**b

        out = {self.zero: moment(0, 0, 0, 0)}
        fits: dict = {}
        none = self.zero[0]
        for alpha in self.left - {none}:
            own, other = q1.get((alpha, none), 0.0) / (2 * root1), k.get((alpha, none), 0.0) / root2
            off = np.where(s2 > 0, other - c * own, 0.0)
            fits[0, alpha] = own, off, own - c * off * invert, off * invert
            out[alpha, none] = fits[0, alpha][2] * moment(1, 0, 1, 0) + fits[0, alpha][3] * moment(1, 0, 0, 1)
        for beta in self.right - {none}:
            own, other = q2.get((none, beta), 0.0) / (2 * root2), k.get((none, beta), 0.0) / root1
            off = np.where(s2 > 0, other - c * own, 0.0)
            fits[1, beta] = own, off, own - c * off * invert, off * invert
            out[none, beta] = fits[1, beta][2] * moment(0, 1, 0, 1) + fits[1, beta][3] * moment(0, 1, 1, 0)
        for alpha, beta in itertools.product(self.left - {none}, self.right - {none}):
            (a1, d1, p1, e1), (a2, d2, p2, e2) = fits[0, alpha], fits[1, beta]
            noise = k.get((alpha, beta), 0.0) - (a1 * a2 * c + a1 * d2 + d1 * a2 - e1 * d2 * c)
            value = noise * moment(1, 1, 0, 0) + (p1 * p2 + e1 * e2) * moment(1, 1, 1, 1)
            out[alpha, beta] = value + p1 * e2 * moment(1, 1, 2, 0) + e1 * p2 * moment(1, 1, 0, 2)
        return out


_LINEAR = {"add", "sub", "add_any", "neg", "reshape", "broadcast_in_dim", "transpose", "reduce_sum", "squeeze"}
_LINEAR |= {"expand_dims", "slice", "rev", "concatenate", "pad", "convert_element_type", "copy", "copy_p", "cumsum"}
_CONSTANT = {"gt", "lt", "ge", "le", "eq", "ne", "sign", "stop_gradient", "is_finite", "and", "or", "not"}


def _needed(jaxpr) -> list:
    """The equations on which a result depends, in order."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return kept[::-1]


def _bound(eqn, arrays) -> Any:
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **eqn.params)
    return [np.asarray(o) for o in out] if eqn.primitive.multiple_results else np.asarray(out)


def _added(a: Poly, b: Poly) -> Poly:
    return {k: a[k] + b[k] if k in a and k in b else a[k] if k in a else b[k] for k in {*a, *b}}


def _expect(f: Activation, q) -> np.ndarray:
    return np.asarray(gaussian.expect(f, q))


def _roots(functions: set[Activation]) -> dict[Activation, tuple[Activation, int]]:
    """Each function as a derivative of one of them: the program has tanh and, as another expression, tanh'."""
    x = np.linspace(-6.0, 6.0, 254)
    roots = {f: (f, 0) for f in functions}
    values = {f: f.values(x) for f in functions}
    for f in functions:
        if not f.kinks:
            slope = f.prime.values(x)
            for g in functions - {f}:
                if (
                    not g.kinks
                    and roots[g][1] == 0
                    and roots[f][0] is not g
                    and np.allclose(values[g], slope, 1e-12, 1e-13)
                ):
                    roots[g] = f, 1
    return roots


_NOTHING = 1e-20  # a variance below which f(u) is f(0) to rounding


def _at_rest(f: Activation, q) -> np.ndarray:
    return np.where(q < _NOTHING, f.values(np.zeros(1))[0], _expect(f, np.where(q < _NOTHING, 1.0, q)))


def _positive(*variances) -> None:
    if any(np.any(q <= 0) for q in variances):
        raise InputError(
            "a point at which a pre-activation is 0 for all weights, under an activation with a kink",
            "points with |x| > 0, or random biases",
            "the derivative at the kink is not defined there",
            "move the point off the origin, or give the biases a variance",
        )
