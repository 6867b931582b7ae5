"""How fast are Jacobian spectra of many networks, and how close to their closed moments?

    python benchmarks/spectra.py [--json FILE]

Rows: 200 (sigma_w, depth) pairs of critical tanh networks, sigma_b from 0.02 to 0.5, depth 2 to 1000, 512 points of the
density each, for Gaussian and orthogonal weights. Errors are the largest over the 200: of the total mass, and of the
first two moments against their closed forms.
"""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

import initjax as ij

BIASES, DEPTHS, POINTS, REPEATS = np.linspace(0.02, 0.5, 20), (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000), 512, 5


def row(weights: str) -> dict:
    w = np.asarray(ij.critical(jnp.tanh, BIASES).sigma_w)
    arguments = (jnp.tanh, w[:, None], BIASES[:, None], np.array(DEPTHS)[None, :], weights)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        s = ij.jacobian_spectrum(*arguments, points=POINTS)
        times.append(time.perf_counter() - start)
    first, second = ((s.mass * s.eigenvalue**k).sum(axis=-1) for k in (1, 2))
    return dict(
        benchmark=f"{w.size * len(DEPTHS)} densities of {POINTS} points",
        weights=weights,
        first_call_s=round(times[0], 3),
        warm_s=round(float(np.median(times[1:])), 3),
        warm_spread_s=round(max(times[1:]) - min(times[1:]), 3),
        mass_error=float(f"{np.abs(s.mass.sum(axis=-1) + s.below - 1).max():.1e}"),
        mass_below_the_last_node=float(f"{s.below.max():.1e}"),
        mean_error=float(f"{np.abs(first / s.mean - 1).max():.1e}"),
        second_moment_error=float(f"{np.abs(second / (s.variance + s.mean**2) - 1).max():.1e}"),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()
    rows = [row(weights) for weights in ("gaussian", "orthogonal")]
    for r in rows:
        print("  ".join(f"{key}={value}" for key, value in r.items()))
    machine = dict(jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float64")
    print(machine)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
