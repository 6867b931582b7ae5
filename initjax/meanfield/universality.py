r"""How a network at criticality forgets: the universality class of an activation and its power laws.

At chi_1 = 1 nothing decays exponentially; what decides is the first term of the maps beyond the linear one.
  V(q) = q - kappa q^(n/2)                   =>  q^l ~ [2 / ((n - 2) kappa l)]^(2 / (n - 2))
  1 - C = delta - A delta^(3/2)  (kinks)     =>  1 - c^l ~ 4 / (A^2 l^2)
  1 - C = delta - C''(1) delta^2 / 2         =>  1 - c^l ~ 2 / (C''(1) l)
Near q = 0 the cosine map is c + q (s^2/4) (1 - c)(1 - 2c), phi = x + s x^2/2 + ...: odd functions freeze the cosine,
others draw it to 1/2. Derived in docs/theory.md.

Sources: Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), chapter 5; Hayou, Doucet, Rousseau 2019 (arXiv:1902.06853).
"""

from typing import Any

import numpy as np

from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.expect import host_rule
from initjax.meanfield.criticality import _points, _primary, _refusal
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.line import critical_line
from initjax.meanfield.results import CriticalPoint, result
from initjax.meanfield.table import ramp, raw_moments, table_of
from initjax.meanfield.taylor import ORDER, one_sided, second_moments

_ZERO = 1e-11  # relative size below which a Taylor coefficient is rounding


@result
class Universality:
    """The class of an activation at criticality, and the power laws of depth l that follow.

    Attributes
    ----------
    kind : "scale-invariant" (every q is fixed), "zero" (q* = 0, smooth), "zero-kinked" (q* = 0, a kink at 0),
        "zero-flat" (q* = 0, linear around 0), "half-stable" (chi_1 = chi_q = 1 at q* > 0), "regular" (q* > 0,
        |chi_q| < 1), "unstable" (q* repels) or "none" (no criticality).
    sigma_w, sigma_b, q : the critical point; q is nan where every q is fixed.
    q_exponent, q_amplitude : q^l - q ~ q_amplitude / l^q_exponent. Exponent 0: q_amplitude / ln l ("zero-flat"), or q
        keeps its first value ("scale-invariant", amplitude nan). Exponent inf: exponentially fast. At a half-stable
        point the approach is from the side of the amplitude's sign; the other side is repelled.
    c_limit : limit of the correlation; nan where it freezes at a value that depends on the input.
    c_exponent, c_amplitude : |c_limit - c^l| ~ c_amplitude / l^c_exponent, for inputs that start at q where q > 0;
        amplitude nan where it depends on the input; exponent 0 where the correlation freezes.
    gradient_exponent : E|dL/dh_0|^2 / E|dL/dh_l|^2 ~ l^-gradient_exponent; at q > 0 for inputs that start at q
        (`note` has the law for others at a half-stable point).
    note : the same in a sentence; for kind "none" the reason.
    """

    kind: Any
    sigma_w: Any
    sigma_b: Any
    q: Any
    q_exponent: Any
    q_amplitude: Any
    c_limit: Any
    c_exponent: Any
    c_amplitude: Any
    gradient_exponent: Any
    note: Any


def universality(phi, sigma_b=None) -> Universality:
    """The universality class of an activation at criticality, with its power laws in depth.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_b : bias standard deviation >= 0 of the critical point asked about. None (default): the point that names the
        class: sigma_b = 0 where that is attracting, else the isolated half-stable point with chi_1 = chi_q = 1.

    Returns
    -------
    Universality with kind, sigma_w, sigma_b, q, q_exponent, q_amplitude, c_limit, c_exponent, c_amplitude,
    gradient_exponent, note. Where no critical point exists, kind is "none" and note says why.

    Raises
    ------
    InputError : sigma_b negative, complex, NaN, infinite or not a scalar; phi not elementwise.
    QuadratureError : the moments of phi are not resolved.

    Accuracy
    --------
    Amplitudes 1e-9 relative, q_amplitude of a half-stable point 1e-5. The laws are leading orders: corrections are of
    relative order log(l) / l, at "zero-flat" log(log l) / log l.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, initjax as ij
    >>> tanh = ij.universality(jnp.tanh)
    >>> print(f"{tanh.kind} {tanh.q_amplitude:.6f} {tanh.q_exponent}")  # q ~ 1 / (2 l)
    zero 0.500000 1.0
    >>> relu = ij.universality(jax.nn.relu)
    >>> print(f"{relu.kind} {relu.c_amplitude:.4f} {relu.c_exponent}")  # 1 - c ~ (9 pi^2 / 2) / l^2
    scale-invariant 44.4132 2.0

    References
    ----------
    Roberts, Yaida, Hanin 2021 (arXiv:2106.10165), section 5.3; Hayou, Doucet, Rousseau 2019 (arXiv:1902.06853),
    propositions 2 and 3.
    """
    act = as_activation(phi)
    if act.jumps:
        return _none(0.0, f"{act.name} jumps: infinitely near inputs part at once (chi_1 is infinite at every q).")
    if sigma_b is None:
        point = _naming_point(act)
        at = 0.0
    else:
        b = check_sigma(sigma_b, "sigma_b")
        if b.size != 1:
            from initjax.meanfield.criticality import _refuse_batch

            _refuse_batch(b)
        at = float(b.reshape(()))
        point = _primary(_points(act, at))
    if point is None:
        return _none(at, _refusal(act, at).why)
    if point.kind == "scale-invariant":
        return _scale_invariant(act, point)
    if point.kind == "zero":
        return _zero(act, point)
    return _positive(act, point)


# -- which point names the class ------------------------------------------------------------------------------------


def _naming_point(act: Activation) -> CriticalPoint | None:
    points = _points(act, 0.0)
    stable = [p for p in points if p.stable]
    if stable:
        return stable[0]
    return _half_stable(act) or _primary(points)


def _half_stable(act: Activation) -> CriticalPoint | None:
    """The point of smallest q > 0 with chi_1 = chi_q = 1 and sigma_b^2 >= 0."""
    line, table = critical_line(act), table_of(act)
    t = table(np, line.q)
    excess = t.m * t.r / (line.q * np.maximum(t.d, 1e-300)) - 1
    cross = np.flatnonzero(
        (np.sign(excess[1:]) * np.sign(excess[:-1]) < 0) & (np.abs(excess[1:] - excess[:-1]) > 1e-9) & (line.f[1:] > 0)
    )
    for i in cross:
        low, high = np.log(line.q[i]), np.log(line.q[i + 1])
        rising = excess[i + 1] > 0
        for _ in range(60):  # bisection: chi_q is known to 1e-13, its root in log q to no better
            middle = (low + high) / 2
            q = np.exp(np.array([middle]))
            _, d, energy = raw_moments(act, q)
            if (energy[0] / (q[0] * d[0]) > 1) == rising:
                high = middle
            else:
                low = middle
        q = np.exp(np.array([(low + high) / 2]))
        m, d, energy = raw_moments(act, q)
        variance_b = q[0] - m[0] / d[0]
        if variance_b >= 0:
            root = np.sqrt(variance_b)
            return CriticalPoint(
                np.float64(1 / np.sqrt(d[0])), np.float64(root), q[0], energy[0] / (q[0] * d[0]), True, "half-stable"
            )
    return None


# -- the laws -------------------------------------------------------------------------------------------------------


def _answer(kind, point, q_law, c_law, gradient, note) -> Universality:
    numbers = [np.float64(v) for v in (*q_law, *c_law, gradient)]
    return Universality(kind, point.sigma_w, point.sigma_b, point.q, *numbers, note=note)  # pyright: ignore


def _law(exponent, amplitude) -> str:
    power = f"^{exponent:.4g}" if exponent != 1 else ""
    return f"{amplitude:.6g} / l{power}"


def _none(sigma_b, why) -> Universality:
    nan = np.float64(np.nan)
    return Universality("none", nan, np.float64(sigma_b), nan, nan, nan, nan, nan, nan, nan, f"No criticality: {why}")


def _ramp_coefficient(right: float, left: float) -> float:
    """A in 1 - C = delta - A delta^(3/2) for slopes right and left of 0 (relu: 2 sqrt 2 / (3 pi))."""
    return 2 * np.sqrt(2) / 3 * (right - left) ** 2 / (np.pi * (right**2 + left**2))


def _scale_invariant(act, point) -> Universality:
    right, left = ramp(act)  # pyright: ignore[reportGeneralTypeIssues]
    if right == left:
        return _answer(
            "scale-invariant", point, (0, np.nan), (np.nan, 0, np.nan), 0, "Linear: every q and every c is fixed."
        )
    amplitude = 4 / _ramp_coefficient(right, left) ** 2
    note = f"Every q is fixed; 1 - c ~ {amplitude:.6g} / l^2, from the kink at 0."
    return _answer("scale-invariant", point, (0, np.nan), (1, 2, amplitude), 0, note)


def _zero(act: Activation, point: CriticalPoint) -> Universality:
    taylor = one_sided(act)
    variance_w = float(point.sigma_w) ** 2
    m, d = (variance_w * s for s in second_moments(act))
    left, right = taylor[:, 1]
    kink = abs(right - left) > _ZERO * (abs(right) + abs(left))
    if not np.all(np.isfinite(taylor)):
        note = "q* = 0, but the Taylor coefficients of phi at 0 are not available: no power law is predicted."
        return _answer("zero", point, (np.nan, np.nan), (np.nan, np.nan, np.nan), np.nan, note)
    scale = np.abs(taylor).max() ** 2 * variance_w
    order = next((n for n in range(3, ORDER + 2) if abs(m[n]) > _ZERO * scale), None)
    if order is None:
        return _flat(act, point, right, left)
    kappa, power = -m[order], order / 2 - 1
    if kappa < 0:
        note = "q* = 0 repels: without biases the variance map leaves it upwards."
        return _answer("unstable", point, (np.nan, np.nan), (np.nan, np.nan, np.nan), np.nan, note)
    q_law = (1 / power, (1 / (power * kappa)) ** (1 / power))
    gradient = -d[order - 2] / (power * kappa)
    note = f"q ~ {_law(*q_law)}; "
    drift = variance_w * np.mean(taylor[:, 2] ** 2)  # (s^2 / 4), s = 2 x the coefficient of x^2
    if kink:
        # where q ~ 1 / l, its share e / l in the slope at c = 1 is of the order of the kink's term
        share = (d[2] - m[4]) / kappa if order == 4 else 0.0
        amplitude = ((2 + share) / _ramp_coefficient(right, left)) ** 2
        c_law, note = (1, 2, amplitude), note + f"1 - c ~ {_law(2, amplitude)}."
    elif order == 3 or drift < _ZERO * scale:
        c_law, note = (np.nan, 0, np.nan), note + "correlations freeze."
    elif order == 4:
        c_law = (0.5, drift / kappa, np.nan)
        note += f"correlations tend to 1/2 as l^-{c_law[1]:.4g}."
    else:
        c_law, note = (0.5, np.inf, np.nan), note + "correlations tend to 1/2."
    return _answer("zero-kinked" if order % 2 or kink else "zero", point, q_law, c_law, gradient, note)


def _flat(act: Activation, point, right, left) -> Universality:
    """Linear up to the nearest kink at distance k: V - q ~ -exp(-k^2 / 2q), so q ~ k^2 / (2 ln l)."""
    kinks = np.abs([k for k in act.kinks if k != 0])
    size = float(np.min(kinks, initial=np.inf))
    x = np.concatenate([-np.linspace(0.05, 0.999, 20), np.linspace(0.05, 0.999, 20)]) * min(size, 1e3)
    line = np.where(x > 0, right, left) * x
    if not np.isfinite(size) or np.any(np.abs(act.values(x) - line) > 1e-12 * np.abs(line).max()):
        note = f"q* = 0, and V(q) - q vanishes to order q^{(ORDER + 1) / 2:g}: no power law is predicted."
        return _answer("zero", point, (np.nan, np.nan), (np.nan, np.nan, np.nan), np.nan, note)
    if not point.stable:
        note = "q* = 0 repels: without biases the variance map leaves it upwards."
        return _answer("unstable", point, (np.nan, np.nan), (np.nan, np.nan, np.nan), np.nan, note)
    q_law = (0, size**2 / 2)
    note = f"q ~ {q_law[1]:.6g} / ln l (linear for |x| < {size:g}); "
    if abs(right - left) > _ZERO * (abs(right) + abs(left)):
        amplitude = 4 / _ramp_coefficient(right, left) ** 2
        return _answer("zero-flat", point, q_law, (1, 2, amplitude), 0, note + f"1 - c ~ {amplitude:.6g} / l^2.")
    return _answer("zero-flat", point, q_law, (np.nan, 0, np.nan), 0, note + "correlations freeze.")


def _positive(act: Activation, point: CriticalPoint) -> Universality:
    """Criticality at q > 0: the shape of the correlation map at c = 1, and of the variance map at q."""
    q, variance_w = float(point.q), float(point.sigma_w) ** 2
    jumps = np.array([j for _, j in act.prime.jumps])
    if jumps.size:
        at = np.array([k for k, _ in act.prime.jumps])
        density = np.exp(-(at**2) / (2 * q)) / np.sqrt(2 * np.pi * q)
        coefficient = 2 / 3 * variance_w * float(np.sum(jumps**2 * density)) * np.sqrt(q / np.pi)
        c_law = (1, 2, 4 / coefficient**2)
    else:
        curvature = host_rule(act.prime, lambda u, f, slope: [slope * slope], np.array([q]), 1)[0, 0]
        bend = variance_w * q * curvature  # C''(1)
        c_law = (1, 1, 2 / bend) if bend > 0 else (np.nan, 0, np.nan)
    text = f"1 - c ~ {_law(*c_law[1:])}." if c_law[1] else "correlations freeze."
    if point.kind == "half-stable":
        t = table_of(act)(np, np.array([q]))
        second = variance_w * float((t.m * (t.r * t.r - t.r + t.dr))[0]) / q**2  # V''
        q_law = (1, -2 / second)
        side = "below" if second > 0 else "above"
        note = f"q* = {q:.6g} attracts from {side}, q - q* ~ {_law(*q_law)}, and repels on the other side; "
        # away from q*, chi_1 = 1 + (d ln D / dq)(q - q*) ~ 1 - p / l, which multiplies up to l^-p
        p = 2 * float(t.dlog_d[0]) / (q * second)
        text += f" From elsewhere on that side gradients go like l^{-p:.4g}"
        if p < 1 and c_law[1] == 1:
            text += f" and 1 - c ~ {_law(1, (1 - p) * c_law[2])}"
        return _answer("half-stable", point, q_law, c_law, 0, note + text + ".")
    if not point.stable:
        note = f"q* = {q:.6g} repels (chi_q = {float(point.chi_q):.6g}): a deep network does not stay there."
        return _answer("unstable", point, (np.nan, np.nan), c_law, 0, note)
    note = f"q* = {q:.6g} is reached exponentially (chi_q = {float(point.chi_q):.6g}); "
    return _answer("regular", point, (np.inf, np.nan), c_law, 0, note + text)
