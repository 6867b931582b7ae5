r"""Condition number of NNGP and NTK against depth, in the ordered, critical and chaotic phase.

N inputs of equal second moment and equal correlations have kernels with one diagonal and one off-diagonal value, and

    kappa = (T_d + (M - 1) T_o) / (T_d - T_o),    M = N, or M = N d behind a global average over d positions.

Both values follow from the recursions (the first layer's kernels are K itself)
    K' = sigma_w^2 Gamma(K) + sigma_b^2,    Theta' = K' + sigma_w^2 Gamma'(K) Theta.
T_d - T_o is never formed: it has a recursion of its own, of positive terms, in which 1 - c and Gamma'(1) - Gamma'(c)
enter as they are, and its logarithm is carried. So the ordered phase, where kappa grows as chi^-L / L, has no last
depth at which rounding turns kappa negative.

Source: Xiao, Pennington, Schoenholz 2020 (arXiv:1912.13053); the laws for kinked activations are derived here.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from initjax.errors import InputError
from initjax.gaussian import dual_prime
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.dual import host_pair
from initjax.meanfield import fixed_point, propagate
from initjax.meanfield.layermap import LayerMap
from initjax.meanfield.table import ramp, raw_moments
from initjax.meanfield.taylor import one_sided

_MATCHED = 1e-6  # 1 - c below which a jump's crossing probability is expanded in the angle


class Law(NamedTuple):
    """How a condition number behaves in deep networks: kappa ~ exp(rate l) l^power, or that for kappa - limit.

    Attributes
    ----------
    limit : value of infinite depth; inf where it grows without end.
    rate : of the logarithm, per layer: > 0 growing; <= 0 the approach to the limit.
    power : of the depth l, up to logarithms of l; nan where it is not known.
    """

    limit: float
    rate: float
    power: float


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Condition numbers by depth; arrays (L,), entry l - 1 for a network of l weight layers.

    Attributes
    ----------
    depth : 1 ... L.
    log_nngp, log_ntk : natural logarithms of the condition numbers, finite at any depth.
    nngp, ntk : the condition numbers; inf where float64 ends, at 1e308.
    nngp_law, ntk_law : what they tend to.
    phase : "ordered", "critical" or "chaotic".
    chi : slope of the correlation map at c = 1, sigma_w^2 E[phi'^2] at the fixed point.
    matrix : size M of the matrix of equal correlations behind them.
    """

    depth: Any
    log_nngp: Any
    log_ntk: Any
    nngp: Any
    ntk: Any
    nngp_law: Law
    ntk_law: Law
    phase: str
    chi: float
    matrix: int

    def __repr__(self) -> str:
        last = f"at depth {self.depth[-1]}: nngp {self.nngp[-1]:.6g}, ntk {self.ntk[-1]:.6g}"
        return f"Conditioning({self.phase}, chi = {self.chi:.6g}; {last}; limit of the ntk {self.ntk_law.limit:.6g})"


def by_depth(
    phi,
    sigma_w,
    sigma_b=0.0,
    *,
    depth=64,
    n=10,
    architecture: str = "fcn",
    positions=1,
    correlation=0.5,
    q0=None,
) -> Conditioning:
    r"""Condition number of NNGP and NTK for networks of 1 ... `depth` layers.

    Ordered: kappa ~ chi^-l (NNGP), chi^-l / l (NTK); for kinked phi (hard_tanh, relu with biases) the NTK's grows only
    as chi^(-l/2). Critical: the NTK's tends to (M + 2) / 2 for smooth phi and (M + 3) / 3 for kinked, the NNGP's grows
    as l and l^2. Chaotic: the NTK's tends to 1, the best there is for training and the worst for generalization, since
    inputs then tell nothing about each other; the NNGP's to (1 + (M - 1) c*) / (1 - c*). At q* = 0 (tanh without
    biases) correlations freeze on the way, and both tend to (1 + (M - 1) c) / (1 - c).

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : standard deviations in mean-field scaling, one number each.
    depth : number of weight layers L of the deepest network.
    n : number of inputs N >= 2.
    architecture : "fcn"; "cnn": convolutions with a flattening readout, which behaves as "fcn"; "pooled": a global
        average over the positions in front of the readout. All correlations, within an input and between inputs, are
        taken to be equal, and padding circular.
    positions : number of positions d at the readout, for "pooled".
    correlation : of the first layer's pre-activations of two inputs, in [-1 / (M - 1), 1).
    q0 : their second moment; None: the fixed point (1 where every q is fixed, or none but 0).

    Returns
    -------
    Conditioning.

    Raises
    ------
    InputError : a second moment that diverges with the depth, equal inputs, fewer than two of them, traced or
        impossible values.

    Accuracy
    --------
    log kappa to 1e-10 at depths up to 1000; 1e-6 for kinked phi, whose phi' jumps, without closed form.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, initjax as ij
    >>> from initjax.applications import conditioning
    >>> edge = conditioning.by_depth(jax.nn.relu, 2**0.5, depth=256)
    >>> print(f"ntk {edge.ntk[255]:.3f}, tends to {edge.ntk_law.limit:.3f}; nngp {edge.nngp[255]:.0f}")
    ntk 4.562, tends to 4.333; nngp 16383
    >>> order = conditioning.by_depth(jnp.tanh, 0.8**0.5, 0.05**0.5, depth=2000)
    >>> print(f"log10 of the ntk's at depth 2000: {order.log_ntk[-1] / jnp.log(10):.1f}")
    log10 of the ntk's at depth 2000: 376.6

    References
    ----------
    Xiao, Pennington, Schoenholz 2020 (arXiv:1912.13053), sections 3 and 4, table 1.
    """
    act = as_activation(phi)
    size = _size(n, architecture, positions)
    w, b, c0 = _number(sigma_w, "sigma_w", 0.0), _number(sigma_b, "sigma_b", 0.0), _number(correlation, "correlation")
    if not -1 / (size - 1) <= c0 < 1:
        raise InputError(
            f"correlation = {c0}",
            f"a number in [{-1 / (size - 1):.3g}, 1)",
            f"{size} inputs of equal correlation have no kernel below that, and equal inputs a singular one",
            "the default, 0.5",
        )
    scale_free = ramp(act) is not None and b == 0
    if scale_free:  # the condition numbers do not depend on sigma_w: take the one that keeps q
        w = 1 / math.sqrt(float(raw_moments(act, np.ones(1))[0, 0])) if w > 0 else 0.0
    if w == 0:
        raise InputError(
            f"sigma_w = {sigma_w}, sigma_b = {b}",
            "sigma_w > 0",
            "without weights all inputs have the same output",
            "the critical scale: ij.critical(phi, sigma_b).sigma_w",
        )
    point = fixed_point(act, w, b)
    q = _number(q0, "q0", 0.0) if q0 is not None else float(point.q) if 0 < point.q < math.inf else 1.0
    path = propagate(act, w, b, _depth(depth) - 1, q, c0)
    if not np.all(np.isfinite(path.q)) or q == 0:
        raise InputError(
            f"sigma_w = {w:.6g}, sigma_b = {b:.6g}, q0 = {q:.6g}",
            "scales at which the second moment stays finite and does not start at 0",
            "it grows without end (or is 0), and there is no condition number to tell"
            if q
            else "inputs of second moment 0 are all the same",
            "ij.fixed_point(phi, sigma_w, sigma_b).phase tells where it does; use the critical sigma_w",
        )
    nngp, ntk = _recursion(act, w, path, size)
    laws = _laws(act, point, path, size, scale_free)
    with np.errstate(over="ignore"):
        values = np.exp(nngp), np.exp(ntk)
    phase = "critical" if scale_free else str(point.phase)
    chi = 1.0 if scale_free else float(point.chi_1)
    return Conditioning(np.arange(1, len(nngp) + 1), nngp, ntk, *values, *laws, phase, chi, size)


def _recursion(act: Activation, w: float, path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """log kappa of NNGP and NTK at every layer."""
    q, c, log_delta = path.q, path.c, path.log_one_minus_c
    slopes = _Slopes(act)
    log_q = np.log(q)
    nngp, ntk = np.empty((2, len(q)))
    # Theta's diagonal, off-diagonal and the logarithm of their difference, in units of exp(scale)
    scale, diagonal, off, log_gap = 0.0, q[0], q[0] * c[0], log_q[0] + log_delta[0]
    for layer in range(len(q)):
        nngp[layer] = _log_condition(q[layer], q[layer] * c[layer], log_q[layer] + log_delta[layer], size)
        ntk[layer] = _log_condition(diagonal, off, log_gap, size)
        if layer + 1 == len(q):
            break
        chi = path.chi[layer]
        chi_off, log_lost = slopes(w, q[layer], chi, c[layer], log_delta[layer])
        fresh = math.exp(-scale)
        new_off = q[layer + 1] * c[layer + 1] * fresh + chi_off * off
        new_diagonal = q[layer + 1] * fresh + chi * diagonal
        if chi_off > 0:
            terms = [log_q[layer + 1] + log_delta[layer + 1] - scale, math.log(chi_off) + log_gap]
            log_gap = float(np.logaddexp.reduce([*terms, log_lost + math.log(diagonal)]))
        else:  # c <= 0: nothing is lost in the difference
            log_gap = math.log(new_diagonal - new_off)
        diagonal, off = new_diagonal, new_off
        shift = math.log(diagonal)
        if abs(shift) > 200:
            scale, log_gap = scale + shift, log_gap - shift
            diagonal, off = 1.0, off / diagonal
    return nngp, ntk


def _log_condition(diagonal: float, off: float, log_gap: float, size: int) -> float:
    """log of the ratio of T_d + (M - 1) T_o and T_d - T_o, the larger over the smaller."""
    if off > 0:
        excess = math.log(size * off) - log_gap
        return excess + math.log1p(math.exp(-excess)) if excess > 0 else math.log1p(math.exp(excess))
    other = diagonal + (size - 1) * off
    return log_gap - math.log(other) if other > 1e-14 * diagonal else math.inf


class _Slopes:
    """sigma_w^2 Gamma'(q, c) and log of sigma_w^2 (D(q) - Gamma'(q, c)), the latter with all its digits."""

    def __init__(self, act: Activation):
        self.act, self.prime = act, act.prime
        self.flat = ramp(act) is not None and len(set(ramp(act) or ())) == 1
        self.map = LayerMap(self.prime)
        self.known: dict[float, float] = {}  # what belongs to the latest q

    def __call__(self, w: float, q: float, chi: float, c: float, log_delta: float) -> tuple[float, float]:
        if self.flat:
            return chi, -math.inf
        slope = chi / w**2
        if log_delta > math.log(0.5):
            off = float(dual_prime(self.act, q, q, c))
            return w**2 * off, math.log(w**2 * (slope - off)) if slope > off else -math.inf
        log_lost = math.log(w**2) + self._log_gap(q, slope, log_delta)
        return chi - math.exp(log_lost), log_lost

    def _log_gap(self, q: float, slope: float, log_delta: float) -> float:
        """log(D(q) - Gamma'(q, c)) for c >= 1/2."""
        log_angle = (math.log(2) + log_delta) / 2  # arccos(c) for small 1 - c
        delta = math.exp(max(log_delta, -650.0))
        step = self.map.member is not None and self.map.member.family == "step"
        if not self.prime.jumps or step:
            curvature = self._once(q, lambda: float(raw_moments(self.prime, np.array([q]))[1, 0]))
            width = float(self.map.width(q, slope, curvature, np.array([delta]))[0])
            late = log_delta + 650.0 if log_delta < -650 else 0.0
            return math.log(q * width) + math.log(delta) + (late / 2 if step else late)
        if log_delta >= math.log(_MATCHED):
            return math.log(self._difference(q, slope, delta))
        # crossing probability: E (jump)^2 theta / 2 pi, and the next order from a value that is known
        linear = sum(j * j * math.exp(-k * k / (2 * q)) for k, j in self.prime.jumps) / (2 * math.pi)
        angle = 2 * math.asin(math.sqrt(_MATCHED / 2))
        square = self._once(q, lambda: (self._difference(q, slope, _MATCHED) - linear * angle) / angle**2)
        return log_angle + math.log(max(linear + square * math.exp(log_angle), 1e-300))

    def _once(self, q: float, compute) -> float:
        if q not in self.known:
            self.known = {q: compute()}
        return self.known[q]

    def _difference(self, q: float, slope: float, delta: float) -> float:
        pair = host_pair(self.prime, self.prime, *(np.array([v]) for v in (q, q, 1 - delta)))
        return max(slope - float(pair[0]), 1e-300)


def _laws(act: Activation, point, path, size: int, scale_free: bool) -> tuple[Law, Law]:
    equal = lambda c: (1 + (size - 1) * c) / (1 - c) if c < 1 else math.inf  # noqa: E731
    kinked = bool(act.prime.jumps)
    frozen = Law(equal(float(path.c[-1])), 0.0, -1.0)
    edge = Law(math.inf, 0.0, 2.0 if kinked else 1.0), Law((size + 3) / 3 if kinked else (size + 2) / 2, 0.0, -1.0)
    if scale_free:
        slopes = ramp(act)
        assert slopes is not None
        return edge if slopes[0] != slopes[1] else (frozen, frozen)
    if point.q == 0:  # near 0 phi is its two slopes
        below, above = one_sided(act)[:, 1]
        odd = np.allclose(one_sided(act)[:, 2], 0, atol=1e-12)
        if below != above:
            return Law(math.inf, 0.0, 2.0), Law((size + 3) / 3, 0.0, -1.0)
        if point.phase == "ordered" or odd:
            return frozen, frozen
        unknown = Law(math.nan, 0.0, math.nan)
        return unknown, unknown
    chi = float(point.chi_1)
    if point.phase == "critical":
        return edge
    if point.phase == "ordered":
        rate = -math.log(chi) if chi > 0 else math.inf
        return Law(math.inf, rate, 0.0), Law(math.inf, rate / 2, 0.0) if kinked else Law(math.inf, rate, -1.0)
    c, chi_c = float(point.c), float(point.chi_c)
    approach = math.log(abs(chi_c)) if chi_c else -math.inf
    if abs(c) < 1e-12:
        return Law(1.0, approach, 0.0), Law(1.0, approach - math.log(chi), 1.0)
    return Law(equal(c), approach, 0.0), Law(1.0, -math.log(chi), 0.0)


def _size(n, architecture: str, positions) -> int:
    for name, value, least in (("n", n, 2), ("positions", positions, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(
                f"{name} = {value!r}",
                f"an integer >= {least}",
                "it counts",
                f"{name}={max(least, 10 if least > 1 else 1)}",
            )
    if architecture not in ("fcn", "cnn", "pooled"):
        raise InputError(
            f"architecture = {architecture!r}",
            '"fcn", "cnn" (flattening readout) or "pooled" (global average)',
            "the readout decides how positions enter the kernel",
            'architecture="fcn"',
        )
    if architecture == "fcn" and positions != 1:
        raise InputError(
            f"positions = {positions} of a fully connected network",
            "positions of a pooled convolutional network",
            "a vector has no positions",
            'architecture="pooled"',
        )
    return int(n * positions) if architecture == "pooled" else int(n)


def _depth(depth) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int | np.integer) or depth < 1:
        raise InputError(f"depth = {depth!r}", "an integer >= 1", "it counts weight layers", "depth=64")
    return int(depth)


def _number(value, name: str, least: float = -math.inf) -> float:
    try:
        number = float(value)
    except Exception:  # tracers, arrays of several entries, texts
        number = math.nan
    if not math.isfinite(number) or number < least:
        raise InputError(
            f"{name} = {value!r}",
            "one finite, concrete number" + ("" if least == -math.inf else f" >= {least:g}"),
            "every layer chooses its own exact method from values",
            "loop over several; call it outside jit",
        )
    return number
