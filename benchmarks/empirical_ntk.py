"""What does the exact empirical NTK of a network cost, beside every implementation of neural-tangents?

    python benchmarks/empirical_ntk.py [--rows mlp_full,cnn32] [--json FILE]

Peers: Jacobian contraction, NTK-vector products and structured derivatives of neural-tangents 0.6.5 (loaded through
tests/oracles/neural_tangents_shim.py), and `vmap(jacrev)` with einsum. All run in this process, one after the other in
each round; kernels are compared first (relative to the largest entry). Times are medians of the rounds, compilation
apart (for initjax: first call less a later one, with its checks). Memory is what XLA sets aside for temporary values.
A peer that would need more than MEMORY, or takes longer than PATIENCE seconds, is reported with that number and not
repeated. `floor` is the arithmetic (forward pass, one backward pass for each output, cheapest contraction) at this
machine's rate for a large matrix product.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ntk_models import Mlp, case

import initjax as ij

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles import neural_tangents_shim  # noqa: E402

# network, examples (None: as in ntk_models), outputs, peers, goal for initjax / best peer
ROWS = {
    "mlp_full": ("mlp", None, "full", (3,), 0.30),
    "mlp_trace": ("mlp", None, "trace", (3,), 0.40),
    "mlp_slow": ("mlp", 64, "full", (1, 2, 3, 0), 0.30),
    "cnn32": ("cnn32", None, "trace", (1, 3), 0.65),
    "cnn8": ("cnn8", None, "trace", (1, 3), 0.75),
    "resnet": ("resnet", None, "trace", (1, 3), 0.75),
    "vit": ("vit", None, "trace", (1, 3), 0.80),
    "lm": ("lm", None, "trace", (0, 1, 3), 0.75),
}
# the slowest peers, at sizes they bear
ALL_PEERS = {
    "cnn32_all": ("cnn32", 4, "trace", (0, 1, 2, 3), None),
    "vit_all": ("vit", 2, "trace", (0, 1, 2, 3), None),
    "lm_all": ("lm", 2, "trace", (0, 1, 2), None),
}
NAMES = {
    0: "jacrev + einsum",
    1: "NT Jacobian contraction",
    2: "NT NTK-vector products",
    3: "NT structured derivatives",
}
ROUNDS, MEMORY, PATIENCE = 3, 8 * 2**30, 20.0
SCALING_EXAMPLES, SCALING_WIDTHS = (64, 128, 256, 512), (256, 512, 1024, 2048)


def jacrev_kernel(apply, outputs):
    def kernel(params, x):
        jacobian = jax.vmap(lambda x: jax.jacrev(lambda p: apply(p, x[None])[0])(params))(x)
        total = 0.0
        for leaf in jax.tree.leaves(jacobian):
            rows = leaf.reshape(*leaf.shape[:2], -1)
            spec = "nop,mop->nm" if outputs == "trace" else "nop,mqp->nmoq"
            total = total + jnp.einsum(spec, rows, rows, precision="highest")
        return total / rows.shape[1] if outputs == "trace" else total

    return kernel


def peer_kernel(number, apply, outputs):
    if number == 0:
        return jacrev_kernel(apply, outputs)
    nt = neural_tangents_shim.load()
    axes = (-1,) if outputs == "trace" else ()
    ntk_fn = nt.empirical_ntk_fn(apply, vmap_axes=0, trace_axes=axes, implementation=number)
    return lambda params, x: ntk_fn(x, None, params)


def seconds(function, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, out


def matmul_rate():
    """Operations per second of a large float32 product."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2 * 2048**3 / min(seconds(product, a)[0] for _ in range(5))


def row(name, network, n, outputs, peers, goal):
    model, params, x = case(network)
    x = x if n is None else x[:n]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    ntk_fn = ij.empirical_ntk(apply, outputs=outputs)
    first, ours = seconds(ntk_fn, params, x)
    table = ntk_fn.explain(params, x)
    found = {}
    for number in peers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peer has no rules for some primitives, and says so
            start = time.perf_counter()
            try:
                compiled = jax.jit(peer_kernel(number, apply, outputs)).lower(params, x).compile()
            except Exception as error:
                found[number] = dict(failed=f"{type(error).__name__}: {str(error)[:120]}")
                continue
        compile_s, temporary = time.perf_counter() - start, compiled.memory_analysis().temp_size_in_bytes
        found[number] = dict(compile_s=round(compile_s, 2), temporary_mb=round(temporary / 1e6, 1))
        if temporary > MEMORY:
            found[number]["not_run"] = f"needs {temporary / 2**30:.1f} GiB"
            continue
        once, kernel = seconds(compiled, params, x)
        found[number] |= dict(run=compiled, times=[], once=once)
        found[number]["difference"] = float(f"{abs(kernel - ours).max() / abs(ours).max():.1e}")
        assert found[number]["difference"] < 1e-5, (name, NAMES[number], found[number]["difference"])
    times = []
    for _ in range(ROUNDS):
        times.append(seconds(ntk_fn, params, x)[0])
        for peer in found.values():
            if "run" in peer and peer["once"] < PATIENCE:
                peer["times"].append(seconds(peer["run"], params, x)[0])
    run_s = float(np.median(times))
    k = table.outputs
    forward = jax.jit(apply).lower(params, x).compile().cost_analysis()["flops"]
    floor = (forward * (1 + k) + sum(r.flops for r in table.rows)) / matmul_rate()
    result = dict(
        benchmark=name,
        examples=len(x),
        outputs=outputs,
        run_s=round(run_s, 4),
        first_call_s=round(first, 2),
        compile_s=round(first - run_s, 2),
        temporary_mb=round(table.bytes / 1e6, 1),
        floor_s=round(floor, 4),
        floor_share=round(floor / run_s, 2),
        goal=goal,
        load=round(os.getloadavg()[0], 1),
        peers={},
    )
    best, least, quickest = float("inf"), float("inf"), float("inf")
    for number, peer in found.items():
        peer.pop("run", None)
        once = peer.pop("once", None)
        if once is not None:
            peer["run_s"] = round(float(np.median(peer.pop("times") or [once])), 4)
            peer["ratio"] = round(run_s / peer["run_s"], 3)
            best, least = min(best, peer["run_s"]), min(least, peer["temporary_mb"])
            quickest = min(quickest, peer["compile_s"])
        result["peers"][NAMES[number]] = peer
    result |= dict(
        ratio=round(run_s / best, 3),
        compile_ratio=round(result["compile_s"] / quickest, 2),
        temporary_ratio=round(result["temporary_mb"] / least, 2),
    )
    print(f"{name:10} {result['run_s']:.3f} s  ratio {result['ratio']} (goal {goal})", end="  ")
    print(f"compile {result['compile_s']} s ({result['compile_ratio']})  memory {result['temporary_mb']} MB", end=" ")
    print(f"({result['temporary_ratio']})  floor {result['floor_share']}  load {result['load']}", flush=True)
    for peer, values in result["peers"].items():
        print(f"           {peer}: {values}", flush=True)
    return result


def scaling():
    """Time against the number of examples and the width, for an MLP, with the exponents of the last two points."""
    found = []
    for what, values in (("examples", SCALING_EXAMPLES), ("width", SCALING_WIDTHS)):
        times = []
        for value in values:
            n, width = (value, 256) if what == "examples" else (64, value)
            model, x = Mlp(width), jax.random.normal(jax.random.key(0), (n, 256))
            params = model.init(jax.random.key(1), x[:1])["params"]
            ntk_fn = ij.empirical_ntk(model, outputs="full")
            jax.block_until_ready(ntk_fn(params, x))
            times.append(float(np.median([seconds(ntk_fn, params, x)[0] for _ in range(5)])))
        exponent = np.log(times[-1] / times[-2]) / np.log(values[-1] / values[-2])
        found.append(
            {
                "against": what,
                "values": values,
                "run_s": [round(t, 4) for t in times],
                "exponent": round(float(exponent), 2),
            }
        )
        print(found[-1], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ROWS | ALL_PEERS
    parser.add_argument("--rows", default=",".join(every), help="comma-separated names of rows; 'scaling' is one")
    parser.add_argument("--json", default=str(Path(__file__).parent / "results" / "empirical_ntk-cpu-2core.json"))
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    names = [name for name in args.rows.split(",") if name != "scaling"]
    rows = [row(name, *every[name]) for name in names]
    table = scaling() if "scaling" in args.rows or len(names) == len(every) else []
    machine = dict(
        jax=jax.__version__,
        device=str(jax.devices()[0]),
        cores=os.cpu_count(),
        cpu=platform.machine(),
        dtype="float32",
        matmul_gflops=round(matmul_rate() / 1e9, 1),
    )
    print(machine)
    Path(args.json).parent.mkdir(exist_ok=True)
    Path(args.json).write_text(json.dumps(dict(machine=machine, rows=rows, scaling=table), indent=1) + "\n")


if __name__ == "__main__":
    main()
