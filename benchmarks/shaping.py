"""How fast and how exact is activation shaping, beside the authors' package?

    python benchmarks/shaping.py [--peer PATH] [--json FILE]

Rows: DKS (zeta = 1.5) and TAT (tau = 0.3; eta = 0.9) for one activation at the depths in the table below. `first_s`
is the first solution of an activation (compilation and the branch), `warm_ms` a batch of all depths after that, the
median of repeats. The peer is the package `dks` (google-deepmind/dks; PATH is its checkout with its table of Legendre
roots; needs autograd and absl-py), called once a depth on the same machine, after a call that loads the table; its
time is the sum over the depths where it returns. `error` and `peer_error` are the largest of |Q(1) - 1|, |Q'(1) - 1|,
C(0) and the distance of the network's C_f'(1), C_f''(1) or C_f(0) from its target, by ij's quadrature of the shaped
function. All times are processor time of this process, so that what else runs on the machine does not enter.
"""

import argparse
import functools
import json
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import initjax as ij
from initjax.shaping import ShapedActivation, dks, tat

DEPTHS = (3, 10, 50, 200, 1000)
REPEATS = 200
SMOOTH = {"tanh": jnp.tanh, "softplus": jax.nn.softplus, "swish": jax.nn.swish, "gelu": jax.nn.gelu, "elu": jax.nn.elu}
CASES = [("dks", name, phi) for name, phi in {**SMOOTH, "selu": jax.nn.selu, "leaky_relu": jax.nn.leaky_relu}.items()]
CASES += [("tat", name, SMOOTH[name]) for name in ("softplus", "swish", "gelu")]
CASES += [("tat", "leaky_relu", jax.nn.leaky_relu)]


def plain(depth):
    """The subnetwork maximum of a plain network, as the peer takes it."""
    return lambda x, r: functools.reduce(lambda value, _: r(value), range(depth), x)


def error(shaped: ShapedActivation, method: str, depth: int) -> float:
    c = shaped.conditions()
    found = [abs(c.q - 1), abs(c.q_slope - 1)]
    if method == "dks":
        found += [c.c_zero, abs(c.c_slope**depth - 1.5)]
    elif shaped.negative_slope is None:
        found += [abs(c.c_slope - 1), abs(c.c_curvature * depth - 0.3)]
    else:
        value, s = 0.0, float(shaped.negative_slope)
        for _ in range(depth):
            bend = np.sqrt(1 - value**2) - value * np.arccos(value)
            value += (1 - s) ** 2 / (1 + s * s) / np.pi * bend
        found.append(abs(value - 0.9))
    return float(max(found))


def peer_solution(package, method: str, name: str, phi, depth: int) -> tuple[ShapedActivation, float]:
    start = time.process_time()
    found = package._get_activations_params([name], method=method.upper(), subnet_max_func=plain(depth))[name]
    took = time.process_time() - start
    keys = ("input_scale", "input_shift", "output_scale", "output_shift", "negative_slope")
    values = [found.get(k, default) for k, default in zip(keys, (1.0, 0.0, 1.0, 0.0, None), strict=True)]
    return ShapedActivation(*[v if v is None else np.float64(v) for v in values], np.float64(0), phi, method), took


def row(method: str, name: str, phi, package) -> dict:
    solve = {"dks": dks, "tat": tat}[method]
    depths = [
        d for d in DEPTHS if not (method == "tat" and name == "leaky_relu" and d < 20)
    ]  # relu itself is below eta
    start = time.process_time()
    shaped = solve(phi, depth=depths)
    first = time.process_time() - start
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        solve(phi, depth=depths)
        times.append(time.process_time() - start)
    warm = float(np.median(times))
    result = dict(
        method=method,
        activation=name,
        depths=len(depths),
        first_s=round(first, 2),
        warm_ms=round(1e3 * warm, 3),
        warm_spread_ms=round(1e3 * (max(times) - min(times)), 3),
        error=float(f"{max(error(shaped[i], method, d) for i, d in enumerate(depths)):.1e}"),
    )
    if package is not None:
        spent, errors = 0.0, []
        for depth in depths:
            try:
                found, took = peer_solution(package, method, name, phi, depth)
            except ValueError:
                continue
            spent += took
            errors.append(error(found, method, depth))
        if errors:
            result |= dict(
                peer_s=round(spent, 2),
                peer_depths=len(errors),
                times_faster=round(spent / len(errors) / (warm / len(depths))),
                peer_error=float(f"{max(errors):.1e}"),
            )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], help="folders to import the package dks and its needs from"
    )
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()
    package = None
    if args.peer:
        sys.path[:0] = args.peer
        from dks.base import activation_transform as package

        peer_solution(package, "dks", "tanh", jnp.tanh, 5)  # loads its quadrature
    ij.gaussian.moment(jnp.sin, 1.3)  # JAX itself starts
    machine = dict(jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float64")
    rows = []
    for case in CASES:
        rows.append(row(*case, package))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        if args.json:  # after each row: the peer can take hours on kinks
            with open(args.json, "w") as file:
                json.dump(dict(machine=machine, depths=DEPTHS, rows=rows), file, indent=1)
    print(machine)


if __name__ == "__main__":
    main()
