"""What do products with a tangent kernel cost, how much memory do they take, and what do they save over eigh?

    python benchmarks/spectrum.py [--json FILE] [--only ntk_vp,rows_50k,lanczos]

ntk_vp: one NTK-vector product against one gradient of the squared error over the same examples (the peer), alternating
in one process, float32; the error is against the formed kernel on 64 of the examples, relative to its largest entry.
rows_50k: one product of the trace kernel of a small CNN on 50,000 images of 32 x 32 x 3, in a process of its own whose
peak resident memory is measured whole, images included. lanczos: largest eigenvalue, condition number and
log-determinant of a formed MLP kernel by products alone, against numpy.linalg.eigvalsh (the peer), float64 on the host.
First calls (compilation) and warm calls are reported apart. Seeds and sizes are fixed.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import initjax as ij

SEED = 0
REPEATS = 7
ROWS = 50_000
MEMORY = 256 * 2**20
OUTPUTS = 10  # a product of the trace kernel takes as many passes as there are outputs
SIZES = {"mlp 3 x 512": 1024, "cnn 32 x 32": 512, "transformer d 64": 256}
LANCZOS = (1024, 2048)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class Cnn(nn.Module):
    channels: int = 16
    outputs: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.channels, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(2 * self.channels, (3, 3), strides=2)(x))
        return nn.Dense(self.outputs)(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64)(x)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4, deterministic=True)(nn.LayerNorm()(x))
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


def models():
    key = jax.random.key(SEED)
    yield "mlp 3 x 512", Mlp(), jax.random.normal(key, (SIZES["mlp 3 x 512"], 784))
    yield "cnn 32 x 32", Cnn(), jax.random.normal(key, (SIZES["cnn 32 x 32"], 32, 32, 3))
    yield "transformer d 64", Transformer(), jax.random.normal(key, (SIZES["transformer d 64"], 16, 24))


def once(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def ntk_vp():
    for name, model, x in models():
        params = model.init(jax.random.key(1), x[:1])["params"]
        some = ij.ntk_operator(model, params, x[:64], outputs="full")
        v = jax.random.normal(jax.random.key(2), (640,))
        dense = np.asarray(ij.empirical_ntk(model, outputs="full")(params, x[:64])).transpose(0, 2, 1, 3)
        expected = dense.reshape(640, 640).astype(np.float64) @ np.asarray(v, np.float64)
        error = np.abs(np.asarray(some @ v) - expected).max() / np.abs(expected).max()
        gradient = jax.jit(jax.grad(lambda p, model=model, x=x: 0.5 * (model.apply({"params": p}, x) ** 2).sum()))
        gradient_first = once(lambda: gradient(params))  # noqa: B023
        for blocks in ("default blocks", "a quarter of them"):
            op = ij.ntk_operator(model, params, x, outputs="full")
            if blocks != "default blocks":  # a budget that holds a quarter of the examples
                setting = op._setting
                per_example = setting.bytes_per_example + setting.bytes_per_tangent
                op = ij.ntk_operator(
                    model, params, x, outputs="full", memory=3 * setting.params_bytes + len(x) // 4 * per_example
                )
            v = jnp.ones(op.shape[1])
            first = once(lambda: op @ v)  # noqa: B023
            pairs = [(once(lambda: op @ v), once(lambda: gradient(params))) for _ in range(REPEATS)]  # noqa: B023
            ratios = [a / b for a, b in pairs]
            yield dict(
                benchmark="ntk_vp",
                model=f"{name}, {blocks}",
                size=len(x),
                first_call_s=round(first, 3),
                warm_s=round(float(np.median([a for a, _ in pairs])), 4),
                peer="one loss gradient",
                peer_first_call_s=round(gradient_first, 3),
                peer_s=round(float(np.median([b for _, b in pairs])), 4),
                ratio=round(float(np.median(ratios)), 2),
                ratio_spread=round(float(max(ratios) - min(ratios)), 2),
                error=float(f"{error:.1e}"),
            )


def rows_50k_alone():
    """In its own process: one product, its time and the peak memory of the process."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = jnp.asarray(np.random.default_rng(SEED).standard_normal((ROWS, 32, 32, 3), np.float32))
    model = Cnn(8, OUTPUTS)
    params = model.init(jax.random.key(1), x[:1])["params"]
    op = ij.ntk_operator(model, params, x, memory=MEMORY)
    v = jnp.zeros(ROWS).at[: ROWS // 2 : 1000].set(1.0)
    start = time.perf_counter()
    product = jax.block_until_ready(op @ v)  # seconds of compilation among minutes
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # the product's rows 0..15 against the formed rectangular kernel of those with the 25 examples that v picks
    rows = np.asarray(ij.empirical_ntk(model)(params, x[:16], x[: ROWS // 2 : 1000])).sum(1)
    error = np.abs(np.asarray(product)[:16] - rows).max() / np.abs(rows).max()
    print(json.dumps(dict(took=took, error=float(error), peak=peak / 2**20, base=base / 2**20)))


def rows_50k():
    done = subprocess.run(
        [sys.executable, __file__, "--alone"], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    found = json.loads(done.stdout.splitlines()[-1])
    yield dict(
        benchmark="rows_50k",
        model=f"cnn 32 x 32, 8 channels, {OUTPUTS} outputs, budget {MEMORY >> 20} MiB",
        size=ROWS,
        warm_s=round(found["took"], 1),
        peak_gib=round(found["peak"], 3),
        images_gib=round(ROWS * 3072 * 4 / 2**30, 3),
        bare_process_gib=round(found["base"], 3),
        error=float(f"{found['error']:.1e}"),
    )


def lanczos():
    for n in LANCZOS:
        x = jax.random.normal(jax.random.key(SEED), (n, 64))
        model = Mlp()
        params = model.init(jax.random.key(1), x[:1])["params"]
        kernel = np.asarray(ij.empirical_ntk(model)(params, x), np.float64)
        kernel = (kernel + kernel.T) / 2
        start = time.perf_counter()
        values = np.linalg.eigvalsh(kernel)
        peer = time.perf_counter() - start
        # the answer's error: of the largest eigenvalue, of the condition number (from below), of the log-determinant
        for what, call, exact in (
            ("largest eigenvalue", lambda k: ij.extreme_eigenvalues(k, method="lanczos", max_products=20), values[-1]),
            ("condition number", lambda k: ij.condition_number(k, method="lanczos"), values[-1] / values[0]),
            ("log-determinant", lambda k: ij.log_determinant(k, method="lanczos"), np.log(values).sum()),
        ):
            start = time.perf_counter()
            answer = call(kernel)
            took, products = time.perf_counter() - start, answer.products
            answer = getattr(answer, "largest", answer)
            yield dict(
                benchmark="lanczos",
                model=f"mlp 3 x 512, {what}, {products} products",
                size=n,
                warm_s=round(took, 3),
                peer="numpy eigvalsh",
                peer_s=round(peer, 3),
                ratio=round(took / peer, 3),
                error=float(f"{float(answer) / exact - 1:.1e}"),
                own_error=float(f"{abs(getattr(answer, 'error', 0.0) / exact):.1e}"),
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the table to this file")
    parser.add_argument("--only", default="ntk_vp,rows_50k,lanczos", help="which parts, separated by commas")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        rows_50k_alone()
        return
    rows = []
    machine = dict(
        jax=jax.__version__,
        device=str(jax.devices()[0]),
        cpu=platform.machine(),
        dtype="float32 products, float64 Lanczos",
        seed=SEED,
        load=round(os.getloadavg()[0], 1),
    )
    heads = ("benchmark", "model", "size", "first s", "warm s", "peer s", "ratio", "error")
    print("{:10s} {:58s} {:>6s} {:>8s} {:>8s} {:>8s} {:>6s} {}".format(*heads))
    for part in args.only.split(","):
        for row in {"ntk_vp": ntk_vp, "rows_50k": rows_50k, "lanczos": lanczos}[part]():
            rows.append(row)
            print(
                f"{row['benchmark']:10s} {row['model']:58s} {row['size']:6d} {row.get('first_call_s', '-'):>8} "
                f"{row['warm_s']:>8} {row.get('peer_s', '-'):>8} {row.get('ratio', '-'):>6} {row['error']:.1e}"
                + (f"  peak {row['peak_gib']} GiB" if "peak_gib" in row else ""),
                flush=True,
            )
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(dict(machine=machine, rows=rows), file, indent=1)
    print(machine)


if __name__ == "__main__":
    main()
