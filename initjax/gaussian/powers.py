r"""Closed forms for rectified powers, monomials and polynomials; `closed.py` holds the other families.

Rectified powers f = a x_+^n + b (-x)_+^n: for unit variances E[u_+^n v_+^n] = K_n(c), with opposite signs K_n(-c), and
    2 pi K_n = A_n(c) (pi - theta) + s B_n(c),   theta = arccos c, s = sin theta   (arc-cosine kernel of order n).
A_n(c) = E[u^n v^n], and Price's theorem dK_n/dc = n^2 K_{n-1} makes B_n the polynomial of degree n - 1 with
    (1 - c^2) B_n' - c B_n = n^2 (1 - c^2) B_{n-1} - A_n.
Polynomials: Mehler's series, which is finite for them.

Sources: Cho and Saul 2009, eq. 6 (arc-cosine kernels); the recursion for B_n is derived here.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from initjax.gaussian.angle import angle

RECTIFIED = range(3, 9)  # orders 0, 1 and 2 are the families step, ramp and quadratic
DEGREE = 12  # of the largest polynomial that is recognised
_polynomial = np.polynomial.polynomial


def _hermite_of_power(j: int, k: int) -> float:
    """E[z^j he_k(z)] for orthonormal he_k."""
    if j < k or (j - k) % 2:
        return 0.0
    return math.sqrt(math.factorial(k)) * math.comb(j, k) * math.prod(range(j - k - 1, 0, -2))


@functools.cache
def _arc_cosine(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients of A_n and B_n, lowest power first."""
    a = np.array([_hermite_of_power(n, k) ** 2 for k in range(n + 1)])
    if n == 0:
        return tuple(a), (0.0,)
    below = np.array(_arc_cosine(n - 1)[1])
    right = np.zeros(n + 1)
    right += _polynomial.polysub(n * n * _polynomial.polymul([1.0, 0.0, -1.0], below), a)[: n + 1]
    # coefficient of c^m: (m + 1) B_{m+1} - m B_{m-1} = right_m, from the top down, since B_{n+1} = B_n = 0
    b = np.zeros(n + 2)
    for m in range(n, 0, -1):
        b[m - 1] = ((m + 1) * b[m + 1] - right[m]) / m
    return tuple(a), tuple(b[:n])


def _horner(coefficients, x):
    total = coefficients[-1] + 0 * x
    for a in coefficients[-2::-1]:
        total = total * x + a
    return total


def _rectified(n: int):
    def dual(xp, p, r, q1, q2, c, s):
        a, b = _arc_cosine(n)
        theta = angle(xp, s, c)
        even_a, sine = _horner(a, c), s * _horner(b, c)
        sign = (-1) ** n  # A_n(-c) = sign A_n(c), B_n(-c) = -sign B_n(c)
        same = even_a * (np.pi - theta) + sine
        opposite = sign * (even_a * theta - sine)
        norm = (xp.sqrt(q1) * xp.sqrt(q2)) ** n / (2 * np.pi)
        return norm * ((p[0] * r[0] + p[1] * r[1]) * same + (p[0] * r[1] + p[1] * r[0]) * opposite)

    return dual


def _hermite_row(xp, p, q):
    root = xp.sqrt(q)
    powers = [1.0 + 0 * root]
    for _ in range(DEGREE):
        powers.append(powers[-1] * root)
    return [sum(p[j] * _hermite_of_power(j, k) * powers[j] for j in range(k, DEGREE + 1, 2)) for k in range(DEGREE + 1)]


def _polynomial_dual(xp, p, r, q1, q2, c, s):
    left, right = _hermite_row(xp, p, q1), _hermite_row(xp, r, q2)
    total = left[-1] * right[-1]
    for a, b in zip(left[-2::-1], right[-2::-1], strict=True):
        total = total * c + a * b
    return total


def _mean_of_power(n: int):
    half = 2 ** (n / 2) * math.gamma((n + 1) / 2) / (2 * math.sqrt(math.pi))  # E z_+^n
    return lambda xp, p, q: (p[0] + p[1]) * half * xp.sqrt(q) ** n


def _rectified_model(n: int):
    return lambda x, a, b: np.where(x > 0, a, b) * np.abs(x) ** n


MODELS: dict[str, Callable] = {f"power{n}": _rectified_model(n) for n in RECTIFIED}
MODELS["polynomial"] = lambda x, *p: _polynomial.polyval(x, p)
FORMS = {f"power{n}": _rectified(n) for n in RECTIFIED} | {"polynomial": _polynomial_dual}
MEANS = {f"power{n}": _mean_of_power(n) for n in RECTIFIED}
MEANS["polynomial"] = lambda xp, p, q: _hermite_row(xp, p, q)[0]

_NODES = 3.0 * np.cos(np.pi * (np.arange(DEGREE + 5) + 0.5) / (DEGREE + 5))


def guesses(at) -> list[tuple[str, tuple]]:
    """Candidates (family, parameters) for the function whose values `at` gives."""
    one, minus = at(1.0, -1.0)
    out: list[tuple[str, tuple]] = [(f"power{n}", (one, minus)) for n in RECTIFIED]
    y = at(*_NODES)
    if not np.all(np.isfinite(y)):
        return out
    for degree in range(DEGREE + 1):
        fit = np.polynomial.chebyshev.Chebyshev.fit(_NODES, y, degree, domain=[-3.0, 3.0])
        if np.abs(fit(_NODES) - y).max() <= 1e-13 * np.abs(y).max():
            p = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
            p = np.where(np.abs(p) < 1e-13 * np.abs(p).max(), 0.0, p)
            near = np.round(p, 12)
            p = np.where(np.abs(p - near) < 1e-13 * np.maximum(np.abs(p), 1), near, p)
            small = at(*(_NODES / 10))
            if np.abs(_polynomial.polyval(_NODES / 10, p) - small).max() <= 4e-15 * np.abs(small).max():
                out.append(("polynomial", tuple(np.pad(p, (0, DEGREE + 1 - p.size)))))
            break  # otherwise the low coefficients are rounding beside the high ones: left to Mehler's series
    return out
