"""How fast are Jacobian spectra of many networks, and how close to their closed moments?

    python benchmarks/spectra.py [--rows theory,measured] [--json FILE]

Theory: 200 (sigma_w, depth) pairs of critical tanh networks, sigma_b from 0.02 to 0.5, depth 2 to 1000, 512 points of
the density each, for Gaussian and orthogonal weights. Errors are the largest over the 200: of the total mass, and of
the first two moments against their closed forms.

Measured: the Jacobian of one tanh network of 50 layers of 4096 units (3.4 GB of weights) from products alone, four
probes of 32 steps; to form J would take 4096 backward passes. Peak memory is that of the process up to there. Beside
each moment stands the law of infinite width; `mean_error` is over the four probes of this one network. The peer is one
jitted gradient of the same network, the least that a product costs.
"""

import argparse
import json
import platform
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

import initjax as ij

BIASES, DEPTHS, POINTS, REPEATS = np.linspace(0.02, 0.5, 20), (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000), 512, 5


WIDTH, DEPTH, SIGMA_B, PROBES, STEPS = 4096, 50, 0.05, 4, 32


def measured(width: int = WIDTH, depth: int = DEPTH, steps: int = STEPS) -> dict:
    w = float(ij.critical(jnp.tanh, SIGMA_B).sigma_w)
    q = float(ij.critical(jnp.tanh, SIGMA_B).q)

    def init(key):
        keys = jax.random.split(key, depth)
        scale = w / np.sqrt(width).astype(np.float32)
        bias = [SIGMA_B * jax.random.normal(k, (width,)) for k in jax.random.split(jax.random.fold_in(key, 1), depth)]
        return [scale * jax.random.normal(k, (width, width)) for k in keys], bias

    def apply(params, x):
        for weight, bias in zip(*params, strict=True):
            x = jnp.tanh(x) @ weight + bias
        return x

    x = np.sqrt(q) * jax.random.normal(jax.random.key(1), (1, width))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = ij.measured_jacobian(
        (init, apply), x, key=jax.random.key(0), seeds=1, blocks=False, method="golub-kahan", probes=PROBES, steps=steps
    ).whole
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    params = jax.jit(init)(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda x, params: apply(params, x).sum()))
    gradient(x, params).block_until_ready()
    times = []
    for _ in range(REPEATS):
        tick = time.perf_counter()
        gradient(x, params).block_until_ready()
        times.append(time.perf_counter() - tick)
    theory = ij.jacobian_spectrum(jnp.tanh, w, SIGMA_B, depth)
    (sample,) = found.samples
    probes = (sample.weights * sample.nodes).sum(1)
    return dict(
        benchmark=f"Jacobian of {depth} layers of {width} units, {PROBES} probes of {steps} steps",
        seconds=round(took, 1),
        gradients_in_that_time=round(took / float(np.median(times)), 1),
        gradient_s=round(float(np.median(times)), 3),
        weights_gb=round(depth * width * width * 4e-9, 2),
        peak_memory_gb=round(peak * 1.024e-6, 2),
        peak_before_gb=round(before * 1.024e-6, 2),
        mean=round(found.mean, 3),
        mean_theory=round(float(theory.mean), 3),
        mean_error=round(float(probes.std(ddof=1) / np.sqrt(PROBES)), 3),
        variance=round(found.variance, 1),
        variance_theory=round(float(theory.variance), 1),
        edge=round(found.edge, 2),
        edge_theory=round(float(theory.edge), 2),
        edge_residual=float(f"{found.edge_residual:.1e}"),
    )


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
    parser.add_argument("--rows", default="theory,measured")
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()
    wanted = args.rows.split(",")
    rows = [row(weights) for weights in ("gaussian", "orthogonal") if "theory" in wanted]
    rows += [measured()] if "measured" in wanted else []
    for r in rows:
        print("  ".join(f"{key}={value}" for key, value in r.items()))
    machine = dict(jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float64")
    print(machine)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
