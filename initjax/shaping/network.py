r"""From a condition on the network to one on each layer.

Every subnetwork f must satisfy C_f'(1) <= zeta (DKS), C_f''(1) <= tau or C_f(0) <= eta (TAT). With local map r, the
maximum over subnetworks is a function M(x, r): r composed `depth` times for a plain network, weighted means where
branches are added.
    DKS     M(1, y -> psi y) = zeta                 psi = C'(1) of a layer
    TAT     M(0, y -> y + t) = tau                  t = C''(1) of a layer, smooth phi
    TAT     M(0, c -> C(c))  = eta                  C the map of a leaky relu
"""

from collections.abc import Callable

import numpy as np

from initjax.errors import InputError

Maximum = Callable[..., float]


def c_slope(maximum: Maximum, zeta: float) -> float:
    """psi > 1 with M(1, y -> psi y) = zeta."""
    return 1 + _increasing(lambda excess: maximum(1.0, lambda y: y + excess * y), zeta, 1e-3, np.inf, "zeta")


def c_curvature(maximum: Maximum, tau: float) -> float:
    """t with M(0, y -> y + t) = tau: curvatures add up, so M is proportional to t."""
    whole = float(maximum(0.0, lambda y: y + 1.0))
    if not whole > 0:
        raise _flat("tau", whole)
    return tau / whole


def leaky_share(maximum: Maximum, eta: float, c_map) -> float:
    """k in [0, 1] with M(0, C_k) = eta; nan where relu itself stays below eta."""
    if maximum(0.0, lambda c: c_map(np, np.float64(c), 1.0)) < eta:
        return np.nan
    return _increasing(lambda k: maximum(0.0, lambda c: c_map(np, np.float64(c), k)), eta, 0.1, 1.0, "eta")


def _increasing(f, target: float, start: float, ceiling: float, name: str) -> float:
    """x > 0 with f(x) = target for an increasing f with f(0) < target: regula falsi (Illinois), to rounding."""
    low, high = 0.0, min(start, ceiling)
    below, above = float(f(low)) - target, float(f(high)) - target
    while above < 0:
        if high >= ceiling or high > 1e12:
            raise _flat(name, above + target)
        low, below, high = high, above, min(4 * high, ceiling)
        above = float(f(high)) - target
    if below > 0:
        raise _flat(name, below + target)
    side = 0
    for _ in range(200):
        x = (low * above - high * below) / (above - below) if above > below else (low + high) / 2
        x = x if low < x < high else (low + high) / 2
        value = float(f(x)) - target
        if value == 0 or high - low < 4e-16 * high:
            return x
        if value > 0:
            high, above, below = x, value, below / 2 if side > 0 else below
            side = 1
        else:
            low, below, above = x, value, above / 2 if side < 0 else above
            side = -1
    return (low + high) / 2


def _flat(name: str, value: float) -> InputError:
    return InputError(
        f"the subnetwork maximum does not take the value {name}; it stays at {value:.6g}.",
        "a function maximum(x, r) that increases with r and applies r at least once.",
        f"{name} is distributed over the layers by solving maximum = {name}.",
        "check the function on a plain network: lambda x, r: r(r(r(x))) for three layers; or give depth or model.",
    )
