"""How fast are fixed points and critical points, against SciPy's quad + brentq in the same process?

    python benchmarks/meanfield.py [--points 40] [--grid 300] [--json FILE]

The peer is what a theorist writes: adaptive quadrature inside a bracketing root finder, one point at a time, for
(q*, chi_1) alone; `with c*` adds the correlation's fixed point, by nested quadrature (fewer points, it is slow).
First call (analysis of phi, table, compilation) and warm calls are reported apart; errors are relative, against the
peer's own answers at its tightest tolerance. Seeds and sizes are fixed.
"""

import argparse
import json
import platform
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, optimize

import initjax as ij

SEED = 0
ACTIVATIONS = {
    "tanh": (jnp.tanh, np.tanh, lambda x: 1 / np.cosh(np.clip(x, -300, 300)) ** 2),
    "user lambda": (
        lambda x: jnp.tanh(x) + 0.1 * x * jnp.exp(-x * x),
        lambda x: np.tanh(x) + 0.1 * x * np.exp(-x * x),
        lambda x: 1 / np.cosh(np.clip(x, -300, 300)) ** 2 + 0.1 * (1 - 2 * x * x) * np.exp(-x * x),
    ),
}


def expectation(f, q):
    """E[f(sqrt(q) z)] by SciPy, split at 0."""
    root = np.sqrt(q)
    g = lambda z: f(root * z) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    return sum(integrate.quad(g, *ends, epsabs=1e-14, epsrel=1e-12, limit=400)[0] for ends in ((-12, 0), (0, 12)))


def peer_point(f, slope, w, b):
    gap = lambda x: w * w * expectation(lambda u: f(u) ** 2, np.exp(x)) + b * b - np.exp(x)  # noqa: E731
    q = np.exp(optimize.brentq(gap, np.log(1e-6), np.log(1e3), xtol=1e-13, rtol=1e-14))
    return q, w * w * expectation(lambda u: slope(u) ** 2, q)


def peer_correlation(f, w, b, q):
    root = np.sqrt(q)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / np.sqrt(2 * np.pi)

    def overlap(c):
        v = root * (c * nodes[:, None] + np.sqrt(1 - c * c) * nodes)
        return weights @ (f(root * nodes)[:, None] * f(v)) @ weights

    return optimize.brentq(lambda c: (w * w * overlap(c) + b * b) / q - c, -1e-9, 1 - 1e-7, xtol=1e-13)


def peer_critical(f, slope, b):
    gap = lambda x: (  # noqa: E731
        np.exp(x)
        - expectation(lambda u: f(u) ** 2, np.exp(x)) / expectation(lambda u: slope(u) ** 2, np.exp(x))
        - b * b
    )
    q = np.exp(optimize.brentq(gap, np.log(1e-5), np.log(1e2), xtol=1e-13, rtol=1e-14))
    return expectation(lambda u: slope(u) ** 2, q) ** -0.5, q


def timed(call, repeats=5):
    """Value, first-call seconds, median and spread of the warm calls."""
    start = time.perf_counter()
    value = call()
    first = time.perf_counter() - start
    warm = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        warm.append(time.perf_counter() - start)
    return value, first, float(np.median(warm)), float(max(warm) - min(warm))


def row(name, activation, first, warm, spread, points, peer, error):
    return dict(
        benchmark=name,
        activation=activation,
        points=points,
        first_call_s=round(first, 3),
        warm_s=round(warm, 4),
        warm_spread_s=round(spread, 4),
        us_per_point=round(1e6 * warm / points, 3),
        peer_us_per_point=round(1e6 * peer, 1),
        times_faster=round(peer / (warm / points)),
        largest_error=float(f"{error:.2e}"),
    )


def run(points: int, grid: int) -> list[dict]:
    rng = np.random.default_rng(SEED)
    rows = []
    for name, (phi, f, slope) in ACTIVATIONS.items():
        w, b = np.linspace(0.5, 3.0, grid), np.linspace(0.02, 1.0, grid)
        diagram, first, warm, spread = timed(lambda: ij.phase_diagram(phi, w, b))  # noqa: B023
        at = rng.integers(0, grid, (points, 2))
        start = time.perf_counter()
        found = np.array([peer_point(f, slope, w[i], b[j]) for i, j in at])
        peer = (time.perf_counter() - start) / points
        ours = np.stack([diagram.q[at[:, 0], at[:, 1]], diagram.chi_1[at[:, 0], at[:, 1]]], 1)
        error = np.max(np.abs(ours / found - 1))
        rows.append(row("phase_diagram (q, chi)", name, first, warm, spread, grid * grid, peer, error))
        # points of moderate q, where 120-node Gauss-Hermite is itself good to 1e-9
        chaotic = [(i, j) for i, j in at if diagram.chi_1[i, j] > 1.05 and diagram.q[i, j] < 1.5][: max(3, points // 8)]
        if chaotic:
            start = time.perf_counter()
            c = [peer_correlation(f, w[i], b[j], diagram.q[i, j]) for i, j in chaotic]
            extra = (time.perf_counter() - start) / len(chaotic)
            error = max(abs(diagram.c[i, j] - value) for (i, j), value in zip(chaotic, c, strict=True))
            rows.append(row("phase_diagram (with c*)", name, first, warm, spread, grid * grid, peer + extra, error))
        sigma_b = np.geomspace(0.02, 1.0, 10_000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ij.UnstableCriticalPointWarning)
            critical, first, warm, spread = timed(lambda: ij.critical(phi, sigma_b))  # noqa: B023
        some = rng.integers(0, sigma_b.size, max(5, points // 4))
        start = time.perf_counter()
        found = np.array([peer_critical(f, slope, sigma_b[i]) for i in some])
        peer = (time.perf_counter() - start) / some.size
        error = np.max(np.abs(np.stack([critical.sigma_w[some], critical.q[some]], 1) / found - 1))
        rows.append(row("critical", name, first, warm, spread, sigma_b.size, peer, error))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=40, help="points that the peer computes")
    parser.add_argument("--grid", type=int, default=300, help="the diagram is grid x grid")
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()
    rows = run(args.points, args.grid)
    machine = dict(
        jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float64", seed=SEED
    )
    head = ("benchmark", "phi", "first call s", "warm s", "us/point", "SciPy us/point", "times faster", "error")
    print("{:24s} {:12s} {:>12s} {:>8s} {:>9s} {:>15s} {:>13s} {:>9s}".format(*head))
    for r in rows:
        print(
            f"{r['benchmark']:24s} {r['activation']:12s} {r['first_call_s']:12.2f} {r['warm_s']:8.3f} "
            f"{r['us_per_point']:9.2f} {r['peer_us_per_point']:15.0f} {r['times_faster']:13d} {r['largest_error']:9.1e}"
        )
    print(machine)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
