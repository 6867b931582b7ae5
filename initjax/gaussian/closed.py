"""Closed forms of E[f(u) g(v)] for Gaussian (u, v), chosen by what f *does*, not by what it is called.

`recognise(f)` evaluates f at some points, solves for the parameters of each family and accepts a family only if it
reproduces f everywhere to 12 digits. `0.2 * jnp.maximum(x, 0)`, `jax.nn.relu` and a user's `jnp.where` are then one
function, and so are the derivatives that automatic differentiation makes of them.

A family member is a pair (family, parameters). `FORMS[family](xp, p, r, q1, q2, c, s)` gives E[f(u) g(v)] for two
members p, r of one family, with xp = numpy or jax.numpy and s = sqrt(1 - c^2) given apart, exact near |c| = 1.

Powers and polynomials: `powers.py`. Sources: Cho and Saul 2009 (arc-cosine kernels, orders 0 to 2); Williams 1997
(erf); Tsuchida et al. 2020 (gelu); the rest are Gaussian integrals.
"""

from typing import NamedTuple

import numpy as np

from initjax.gaussian import powers
from initjax.gaussian.activation import Activation
from initjax.gaussian.angle import angle, latitude

PI = np.pi


class Member(NamedTuple):
    """f as a member of a family of functions with a closed-form dual."""

    family: str
    parameters: tuple[float, ...]


# -- families as functions: what f must reproduce ----------------------------------------------------------------


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return 0.5 * (1 + np.vectorize(erf, otypes=[float])(x / np.sqrt(2)))


def _gelu(x):
    return x * _normal_cdf(x)


def _gelu_prime(x):
    return _normal_cdf(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * PI)


MODELS = {
    "ramp": lambda x, a, b: np.where(x > 0, a * x, b * x),
    "step": lambda x, a, b: np.where(x > 0, a, b),
    "quadratic": lambda x, a, b: np.where(x > 0, a * x * x, b * x * x),
    "wave": lambda x, w, a, b, m: a * np.sin(w * x) + b * np.cos(w * x) + m,
    "exp": lambda x, w, a: a * np.exp(w * x),
    "bell": lambda x, w, a: a * np.exp(-w * x * x),
    "odd_bell": lambda x, w, a: a * x * np.exp(-w * x * x),
    "odd_bell_prime": lambda x, w, a: a * (1 - 2 * w * x * x) * np.exp(-w * x * x),
    "erf": lambda x, w, a, m: a * (2 * _normal_cdf(np.sqrt(2) * w * x) - 1) + m,
    "gelu": lambda x, w, a: a * _gelu(w * x),
    "gelu_prime": lambda x, w, a: a * _gelu_prime(w * x),
    **powers.MODELS,
}

_POINTS = np.sort(
    np.concatenate(
        [
            np.array([-0.5, 0.5, -1.0, 1.0]),
            np.random.default_rng(7).normal(size=40) * 2.0,
            np.array([-9.1, 7.7, -31.3, 23.9]),
        ]
    )
)
_H = 1e-2


def recognise(act: Activation) -> Member | None:
    """The family that `act` belongs to, or None."""
    cached = act.__dict__.get("_member", 0)
    if cached == 0:
        cached = act.__dict__["_member"] = _recognise(act)
    return cached


def _recognise(act: Activation) -> Member | None:
    with np.errstate(all="ignore"):
        y = act.values(_POINTS)
        if not np.all(np.isfinite(y)):
            return None
        at = lambda *x: act.values(np.array(x, dtype=float))  # noqa: E731
        guesses = _guesses(at)
        for family, parameters in guesses:
            if not np.all(np.isfinite(parameters)):
                continue
            model = MODELS[family](_POINTS, *parameters)
            scale = np.maximum(np.abs(y), 1e-3 * np.abs(y[np.abs(_POINTS) < 4]).max(initial=0.0))
            if family in ("ramp", "step", "quadratic") or family.startswith("power"):
                scale = np.abs(y)
            if np.all(np.abs(model - y) <= 2e-12 * scale + 1e-300):
                return Member(family, _clean(parameters))
    return None


def _clean(parameters) -> tuple[float, ...]:
    """Parameters without rounding noise: 1.0000000000000002 -> 1, 3e-17 beside 1 -> 0."""
    largest = max(abs(float(p)) for p in parameters)
    out = []
    for p in map(float, parameters):
        nearest = round(p, 10)
        out.append(nearest + 0.0 if abs(p - nearest) < 4e-15 * max(1.0, largest) else p)
    return tuple(out)


def _guesses(at) -> list[tuple[str, tuple]]:
    one, minus, half, minus_half, zero, small, low, high = at(1.0, -1.0, 0.5, -0.5, 0.0, 1e-3, -1e3, 1e3)
    out: list[tuple[str, tuple]] = [("step", (one, minus)), ("ramp", (one, -minus)), ("quadratic", (one, minus))]
    # exp, bells: ratios
    ratio = one / half
    if ratio > 0:
        w = 2 * np.log(ratio)
        out.append(("exp", (w, one / np.exp(w))))
        w = -np.log(ratio) / 0.75
        out.append(("bell", (w, one / np.exp(-w))))
        w = -np.log(ratio / 2) / 0.75
        out.append(("odd_bell", (w, one / np.exp(-w))))
    # (1 - 2 w x^2) e^{-w x^2}: w by Newton from the curvature at 0
    if zero and np.isfinite(zero):
        w = (1 - small / zero) / 3e-6
        for _ in range(60):
            f = (1 - 2 * w * 0.25) * np.exp(-w * 0.25) - half / zero
            w -= f / (-(0.75 - 0.125 * w) * np.exp(-w * 0.25))
        out.append(("odd_bell_prime", (w, zero)))
    # sigmoidal: plateaus give a and m, the value at a small point gives w
    a, m = (high - low) / 2, (high + low) / 2
    if a and np.isfinite(a):
        out += [("erf", (w, a, m)) for w in [_solve_erf((half - m) / a, 0.5)] if w]
    # gelu and its derivative: far value gives a w; the even part gives w
    far = high / 1e3
    if far and np.isfinite(far):
        w = _solve_erf((half + minus_half) / (far * 0.5), 0.5 / np.sqrt(2))
        if w:
            out.append(("gelu", (w, far / w)))
    if high and np.isfinite(high):
        out += [("gelu_prime", (w, high)) for w in _solve_gelu_prime(half / high)]
    return out + powers.guesses(at) + _wave(at)


def _solve_erf(value: float, x: float) -> float | None:
    """w with erf(w x) = value."""
    from math import erf

    if not 0 < abs(value) < 1:
        return None
    low, high = 0.0, 6.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if erf(middle) < abs(value) else (low, middle)
    t = (low + high) / 2
    if t == 0 or t > 5:
        return None
    for _ in range(3):  # Newton: bisection alone loses digits where erf is flat
        t -= (erf(t) - abs(value)) / (2 / np.sqrt(PI) * np.exp(-t * t))
    return float(np.sign(value) * t / x)


def _solve_gelu_prime(value: float):
    """w > 0 with gelu'(w/2) = value; gelu' rises to 1.129 at sqrt(2), then falls to 1."""
    for start in (0.1, 2.0):
        t = start
        for _ in range(80):
            slope = (2 - t * t) * np.exp(-t * t / 2) / np.sqrt(2 * PI)
            t -= float(_gelu_prime(np.array([t]))[0] - value) / slope
            if not 0 < t < 6:
                break
        else:
            yield 2 * t


def _wave(at) -> list[tuple[str, tuple]]:
    """a sin(w x) + b cos(w x) + m: w from the recurrence f(x+h) - f(x-h) = 2 cos(wh) ..., refined by Gauss-Newton."""
    x = np.linspace(-1.3, 1.7, 41)
    f = at(*x)
    if not np.all(np.isfinite(f)):
        return []
    # differences obey d(x+h) + d(x-h) = 2 cos(w h) d(x), free of m
    d = at(*(x + _H)) - at(*(x - _H))
    d_up = at(*(x + 2 * _H)) - f
    d_down = f - at(*(x - 2 * _H))
    size = float(d @ d)
    if size == 0:
        return []
    cosine = float(d @ (d_up + d_down)) / (2 * size)
    if not -1 < cosine < 1:
        return []
    w = np.arccos(cosine) / _H
    for _ in range(40):
        basis = np.stack([np.sin(w * x), np.cos(w * x), np.ones_like(x)], 1)
        (a, b, m), *_ = np.linalg.lstsq(basis, f, rcond=None)
        slope = x * (a * np.cos(w * x) - b * np.sin(w * x))
        step, *_ = np.linalg.lstsq(np.column_stack([basis, slope]), f - basis @ [a, b, m], rcond=None)
        w += step[3]
        if not 0 < w < 1e3:
            return []
    nearest = round(w, 9)
    return [
        (
            "wave",
            (w0, *np.linalg.lstsq(np.stack([np.sin(w0 * x), np.cos(w0 * x), np.ones_like(x)], 1), f, rcond=None)[0]),
        )
        for w0 in (nearest, w)
    ]


# -- duals -----------------------------------------------------------------------------------------------------------


def _latitude(xp, cross, rest, x, y):
    """arctan2(cross, rest), where cross^2 + rest^2 = (1 + x)(1 + y) and rest > 0."""
    if xp is np:
        return np.arctan2(cross, rest)
    inverse = 1 / xp.sqrt(1 + x) * (1 / xp.sqrt(1 + y))  # of rows and columns, before it is of pairs
    return latitude(xp, rest * inverse, cross * inverse)


def _ramp(xp, p, r, q1, q2, c, s):
    # f = (a+b)/2 x + (a-b)/2 |x|
    even, odd = (p[0] - p[1]) * (r[0] - r[1]) / 4, (p[0] + p[1]) * (r[0] + r[1]) / 4
    norm = xp.sqrt(q1) * xp.sqrt(q2)
    return norm * (odd * c + even * (2 / PI) * (s + c * latitude(xp, s, c)))


def _step(xp, p, r, q1, q2, c, s):
    mean, half = (p[0] + p[1]) * (r[0] + r[1]) / 4, (p[0] - p[1]) * (r[0] - r[1]) / 4
    return mean + half * (2 / PI) * latitude(xp, s, c) + 0 * (q1 + q2)


def _quadratic(xp, p, r, q1, q2, c, s):
    # x^2 and x|x|; E[relu^2 relu^2] = (E[x^2 y^2] + E[x|x| y|y|]) / 4 = q1 q2 J2 / (2 pi)
    even, odd = (p[0] + p[1]) * (r[0] + r[1]) / 4, (p[0] - p[1]) * (r[0] - r[1]) / 4
    squares = 1 + 2 * c * c
    signed = (2 / PI) * (3 * s * c + (PI - angle(xp, s, c)) * squares) - squares
    return q1 * q2 * (even * squares + odd * signed)


def _wave_dual(xp, p, r, q1, q2, c, s):
    (w, a, b, m), (v, d, e, n) = p, r
    left, right = w * xp.sqrt(q1), v * xp.sqrt(q2)
    x, y, k = left * left, right * right, left * right * c
    # -(x + y)/2 +- k written so that nothing large cancels: at q = 1e8 its rounding would cost eight digits
    apart = -((left - right) ** 2) / 2
    plus, minus = xp.exp(apart - left * right * (1 - c)), xp.exp(apart - left * right * (1 + c))
    small = xp.clip(k, -1.0, 1.0)  # the difference of exponentials loses digits for small k, sinh overflows for large
    sinh = xp.where(xp.abs(k) < 1, xp.exp(-(x + y) / 2) * xp.sinh(small), (plus - minus) / 2)
    return a * d * sinh + b * e * (plus + minus) / 2 + m * n + m * e * xp.exp(-y / 2) + b * n * xp.exp(-x / 2)


def _exp_dual(xp, p, r, q1, q2, c, s):
    (w, a), (v, d) = p, r
    return a * d * xp.exp((w * w * q1 + v * v * q2) / 2 + w * v * c * xp.sqrt(q1) * xp.sqrt(q2))


def _bell_delta(xp, p, r, q1, q2, c, s):
    x, y = 2 * p[0] * q1, 2 * r[0] * q2
    return 1 + x + y + x * y * (1 - c) * (1 + c)  # (1 + x)(1 + y) - c^2 x y


def _bell(xp, p, r, q1, q2, c, s):
    return p[1] * r[1] / xp.sqrt(_bell_delta(xp, p, r, q1, q2, c, s))


def _odd_bell(xp, p, r, q1, q2, c, s):
    return p[1] * r[1] * c * xp.sqrt(q1) * xp.sqrt(q2) * _bell_delta(xp, p, r, q1, q2, c, s) ** -1.5


def _odd_bell_prime(xp, p, r, q1, q2, c, s):
    delta = _bell_delta(xp, p, r, q1, q2, c, s)
    square = 4 * p[0] * r[0] * c * c * q1 * q2
    return p[1] * r[1] * (delta**-1.5 + 3 * square * delta**-2.5)


def _erf_dual(xp, p, r, q1, q2, c, s):
    x, y = 2 * p[0] ** 2 * q1, 2 * r[0] ** 2 * q2
    cross = 2 * p[0] * r[0] * c * xp.sqrt(q1) * xp.sqrt(q2)
    rest = xp.sqrt(1 + x + y + x * y * (1 - c) * (1 + c))
    return p[1] * r[1] * (2 / PI) * _latitude(xp, cross, rest, x, y) + p[2] * r[2] + 0 * rest


def _gelu_parts(xp, p, r, q1, q2, c, s):
    """x, y, k of w u, r v; P(both > 0); and 1 / (2 pi sqrt(delta)), which both duals share."""
    x, y = p[0] ** 2 * q1, r[0] ** 2 * q2
    k = p[0] * r[0] * c * (xp.sqrt(q1) * xp.sqrt(q2))
    root = xp.sqrt(1 + x + y + x * y * ((1 - c) * (1 + c)))
    return x, y, k, 0.25 + _latitude(xp, k, root, x, y) / (2 * PI), 1 / (2 * PI * root)


def _gelu_dual(xp, p, r, q1, q2, c, s):
    x, y, k, quarter, inverse = _gelu_parts(xp, p, r, q1, q2, c, s)
    bracket = x * y * ((1 - c) * (1 + c)) + k * k * (1 / (1 + x) + 1 / (1 + y))
    return p[1] * r[1] * (k * quarter + bracket * inverse)


def _gelu_prime_dual(xp, p, r, q1, q2, c, s):
    x, y, k, quarter, inverse = _gelu_parts(xp, p, r, q1, q2, c, s)
    curved = 1 / (1 + x) + 1 / (1 + y) + (2 * PI) ** 2 * (inverse * inverse)
    return p[1] * r[1] * (quarter + k * inverse * curved)


FORMS = {
    "ramp": _ramp,
    "step": _step,
    "quadratic": _quadratic,
    "wave": _wave_dual,
    "exp": _exp_dual,
    "bell": _bell,
    "odd_bell": _odd_bell,
    "odd_bell_prime": _odd_bell_prime,
    "erf": _erf_dual,
    "gelu": _gelu_dual,
    "gelu_prime": _gelu_prime_dual,
    **powers.FORMS,
}


def mean_form(member: Member, xp, q):
    """E[f(sqrt(q) z)] in closed form, or None."""
    family, p = member
    if family in powers.MEANS:
        return powers.MEANS[family](xp, p, q)
    if family == "step":
        return (p[0] + p[1]) / 2 + 0 * q
    if family == "ramp":
        return (p[0] - p[1]) * xp.sqrt(q / (2 * PI))
    if family == "quadratic":
        return (p[0] + p[1]) * q / 2
    if family == "wave":
        return p[2] * xp.exp(-(p[0] ** 2) * q / 2) + p[3]
    if family == "exp":
        return p[1] * xp.exp(p[0] ** 2 * q / 2)
    if family == "bell":
        return p[1] / xp.sqrt(1 + 2 * p[0] * q)
    if family == "odd_bell":
        return 0 * q
    if family == "odd_bell_prime":
        return p[1] * (1 + 2 * p[0] * q) ** -1.5
    if family == "erf":
        return p[2] + 0 * q
    if family == "gelu":
        x = p[0] ** 2 * q
        return p[1] * x / xp.sqrt(2 * PI * (1 + x))
    return p[1] * 0.5 + 0 * q  # gelu_prime: x phi(x) is odd
