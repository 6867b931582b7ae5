"""How fast and how accurate are Gaussian expectations, single and on kernel matrices?

    python benchmarks/gaussian.py [--size 5000] [--json FILE]

Rows: the dual on a size x size kernel of random inputs with unequal norms, for one closed form (gelu) and one Hermite
series (tanh); second moments at 1000 values of q from 1e-8 to 1e8 against mpmath at some of them. The peer for kernels
is neural-tangents' Gauss-Hermite rule (`ElementwiseNumerical`), written out here as what it computes, degree^2
evaluations of phi an entry, compiled by jax.jit on the same machine (degree 25, float64): a lower bound of its cost.
Errors are the largest over sampled entries, relative to sqrt(K_ii K_jj), against nested quadrature, and on the
diagonal.
"""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import initjax as ij
from initjax.gaussian import bivariate

SEED, DIMENSION, DEGREE = 0, 20, 25
ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "tanh": jnp.tanh}


def hermite_rule(phi, degree):
    """E[phi(u) phi(v)] by degree x degree Gauss-Hermite nodes on the Cholesky factor of each 2 x 2 covariance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / np.sqrt(2 * np.pi)

    @jax.jit
    def rows(q1, q2, k):
        u = jnp.sqrt(q1)[:, None] * nodes
        values = phi(u) * weights  # (rows, degree)
        slope = k / jnp.sqrt(q1)[:, None]
        rest = jnp.sqrt(jnp.maximum(q2[None, :] - slope**2, 0.0))

        def add(i, total):
            def inner(j, s):
                return s + weights_[j] * phi(slope * nodes_[i] + rest * nodes_[j])

            return total + values[:, i][:, None] * jax.lax.fori_loop(0, degree, inner, jnp.zeros_like(k))

        return jax.lax.fori_loop(0, degree, add, jnp.zeros_like(k))

    nodes_, weights_ = jnp.asarray(nodes), jnp.asarray(weights)
    return rows


def kernel_rows(size: int, peer_rows: int) -> list[dict]:
    rng = np.random.default_rng(SEED)
    x = rng.normal(size=(size, DIMENSION))
    k = x @ x.T / DIMENSION
    q = np.diagonal(k).copy()
    table = []
    for name, phi in ACTIVATIONS.items():
        times = []
        for _ in range(4):
            start = time.perf_counter()
            ours = ij.gaussian.cross(phi, phi, q[:, None], q[None, :], k)
            times.append(time.perf_counter() - start)
        act = ij.gaussian.as_activation(phi)
        entries = rng.integers(0, size, (20, 2))
        entries = entries[entries[:, 0] != entries[:, 1]]
        scale = np.sqrt(np.diagonal(ours))
        error, peer_error = 0.0, 0.0
        rule = hermite_rule(phi, DEGREE)
        block = slice(0, peer_rows)
        args = (jnp.asarray(q[block]), jnp.asarray(q), jnp.asarray(k[block]))
        jax.block_until_ready(rule(*args))
        start = time.perf_counter()
        peer = np.asarray(rule(*args))
        peer_time = (time.perf_counter() - start) * size / peer_rows
        for i, j in entries:
            c = k[i, j] / np.sqrt(q[i] * q[j])
            exact = bivariate.direct(act, act, q[i], q[j], c, np.sqrt((1 - c) * (1 + c)))
            error = max(error, abs(ours[i, j] - exact) / (scale[i] * scale[j]))
        diagonal = ij.gaussian.moment(phi, q[block])
        peer_error = np.max(np.abs(peer[np.arange(peer_rows), np.arange(peer_rows)] / diagonal - 1))
        warm = float(np.median(times[1:]))
        table.append(
            dict(
                benchmark=f"dual {size} x {size}",
                activation=name,
                first_call_s=round(times[0], 3),
                warm_s=round(warm, 3),
                warm_spread_s=round(max(times[1:]) - min(times[1:]), 3),
                peer_s=round(peer_time, 2),
                times_faster=round(peer_time / warm, 1),
                error=float(f"{error:.1e}"),
                diagonal_error=float(f"{np.max(np.abs(np.diagonal(ours) / ij.gaussian.moment(phi, q) - 1)):.1e}"),
                peer_diagonal_error=float(f"{peer_error:.1e}"),
            )
        )
    return table


def moment_row() -> dict:
    q = np.geomspace(1e-8, 1e8, 1000)
    phi = jnp.tanh
    start = time.perf_counter()
    values = ij.gaussian.moment(phi, q)
    first = time.perf_counter() - start
    times = []
    for _ in range(5):
        start = time.perf_counter()
        ij.gaussian.moment(phi, q)
        times.append(time.perf_counter() - start)
    error = 0.0
    with mpmath.workdps(30):
        for i in (0, 250, 500, 750, 999):
            edges = [0] + [mpmath.mpf(10) ** (mpmath.mpf(n) / 4 - 6) for n in range(29)]
            root = mpmath.sqrt(mpmath.mpf(float(q[i])))
            f = lambda z: mpmath.tanh(root * z) ** 2 * mpmath.exp(-z * z / 2)  # noqa: B023, E731
            exact = 2 * mpmath.quad(f, edges) / mpmath.sqrt(2 * mpmath.pi)
            error = max(error, abs(float(values[i] / exact) - 1))
    return dict(
        benchmark="moment, 1000 q in [1e-8, 1e8]",
        activation="tanh",
        first_call_s=round(first, 3),
        warm_s=round(float(np.median(times)), 4),
        error=float(f"{error:.1e}"),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=5000)
    parser.add_argument("--peer-rows", type=int, default=100, help="rows that the peer computes; its time is scaled up")
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # for the peer; initjax does not need it
    rows = [*kernel_rows(args.size, args.peer_rows), moment_row()]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    machine = dict(
        jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float64", seed=SEED
    )
    print(machine)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
