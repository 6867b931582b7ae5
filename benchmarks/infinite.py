"""How fast are infinite-width kernels of whole models, and how right?

    python benchmarks/infinite.py [--only NAME ...] [--rounds 5] [--json FILE]

Each row with a peer times `kernel_fn(model, x)(x, get=("nngp", "ntk"))` in float64, NumPy in and out, three ways: by
compiled tiles (`run_s`; `first_call_s` is the analysis of the model, compiling and one run), step by step
(`steps_first_call_s`, `steps_s`), and by neural-tangents 0.6.5 under jax.jit in the same process, in float64 too, where
it can do the model. `ratio` is compiled to peer, the median over rounds in which one runs straight after the other (the
machine may be busy), `cpu_ratio` that of the processor times, `steps_ratio` step by step to peer. Errors stand beside:
the largest difference to the peer and between our two routes, relative to the largest entry, and the error on the
diagonal, which is known to rounding. Memory: what NumPy and Python held at the peak of a call, results included
(tracemalloc), what XLA holds for the tiles that are computed at once, and XLA's own count of temporaries for the peer.
Rows without a peer measure compile time; one whose layers are outside the exact theory is also estimated, by the same
module's widened program.

Sizes and depths are in CASES. The peer is optional: rows without it say so.
"""

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

import initjax as ij

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

WIDTH, SIGMA_W, SIGMA_B = 512, 2**0.5, 0.1
DEPTH = 3
gelu = lambda x: nn.gelu(x, approximate=False)  # noqa: E731
ACTIVATIONS = {"relu": nn.relu, "gelu": gelu, "silu": nn.silu}
# name, model, activation, shape of the inputs, largest ratio to the peer that is called a success
CASES = [
    ("relu MLP", "mlp", "relu", (3000, 20), 0.8),
    ("gelu MLP", "mlp", "gelu", (2000, 20), 0.25),
    ("numeric MLP (silu)", "mlp", "silu", (500, 20), 0.01),
    ("CNN + flatten", "flatten", "relu", (64, 16, 16, 3), 1.0),
    ("CNN + GAP 8 x 8", "pool", "relu", (16, 8, 8, 3), 0.15),
    ("CNN + GAP 16 x 16", "pool", "relu", (8, 16, 16, 3), 0.15),
]
PARTICLES = 4096
COMPILE = [("ResNet-18-like", "resnet", (2, 8, 8, 3)), ("4-block transformer", "transformer", (2, 8, 32))]
ACCURACY = "numeric MLP against nested quadrature"


class Model(nn.Module):
    """DEPTH hidden layers, dense or convolutional, and a dense readout."""

    kind: str
    activation: str

    @nn.compact
    def __call__(self, x):
        weights = nn.initializers.variance_scaling(SIGMA_W**2, "fan_in", "normal")
        options = dict(kernel_init=weights, bias_init=nn.initializers.normal(SIGMA_B))
        for _ in range(DEPTH):
            x = nn.Dense(WIDTH, **options)(x) if self.kind == "mlp" else nn.Conv(WIDTH, (3, 3), **options)(x)
            x = ACTIVATIONS[self.activation](x)
        if self.kind == "flatten":
            x = x.reshape(x.shape[0], -1)
        if self.kind == "pool":
            x = x.mean(axis=(1, 2))
        readout = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        return nn.Dense(1, kernel_init=readout, use_bias=False)(x)


class ResNet(nn.Module):
    """Eighteen layers of pre-activation residual blocks."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3, 3))(x)
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                h = nn.relu(nn.LayerNorm()(x))
                skip = x if stride == 1 and x.shape[-1] == width else nn.Conv(width, (1, 1), stride)(h)
                h = nn.Conv(width, (3, 3), stride)(h)
                x = skip + nn.Conv(width, (3, 3))(nn.relu(nn.LayerNorm()(h)))
        return nn.Dense(10)(nn.relu(nn.LayerNorm()(x)).mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Pre-LN blocks of attention and a gelu MLP."""

    blocks: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(128)(x)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(128)(gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.Dense(1)(nn.LayerNorm()(x).mean(axis=1))


def peer_of(stax, kind, activation):
    """The same model in the peer's own layers; its NTK parameterization is made the standard one by the widths."""
    layer = {
        "relu": stax.Relu,
        "gelu": lambda: stax.Gelu(approximate=False),
        "silu": lambda: stax.ElementwiseNumerical(nn.silu, 25),
    }[activation]
    layers = []
    for _ in range(DEPTH):
        dense = stax.Dense(WIDTH, SIGMA_W, SIGMA_B)
        layers += [dense if kind == "mlp" else stax.Conv(WIDTH, (3, 3), padding="SAME", W_std=SIGMA_W, b_std=SIGMA_B)]
        layers += [layer()]
    layers += {"mlp": [], "flatten": [stax.Flatten()], "pool": [stax.GlobalAvgPool()]}[kind]
    return stax.serial(*layers, stax.Dense(1, 1.0, None))[2]


def timed(function):
    start = time.perf_counter()
    out = jax.block_until_ready(function())
    return out, time.perf_counter() - start


def processor(function):
    """Seconds of all threads of this process together."""
    start = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - start


def row_of(name, kind, activation, shape, goal, stax, rounds) -> dict:
    x = np.random.default_rng(0).normal(size=shape)
    # "ntk": the parameterization of the peer, free of widths
    build, make = timed(lambda: ij.kernel_fn(Model(kind, activation), x[:2], parameterization="ntk"))
    ours = lambda: build(x, get=("nngp", "ntk"), compiled=True)  # noqa: E731
    steps = lambda: build(x, get=("nngp", "ntk"), compiled=False)  # noqa: E731
    by_steps, steps_first = timed(steps)
    start = time.process_time()
    kernel, first = timed(ours)
    row: dict = dict(benchmark=name, examples=shape[0], first_call_s=round(make + first, 2))
    row["first_call_cpu_s"] = round(time.process_time() - start, 2)
    row["steps_first_call_s"] = round(make + steps_first, 2)
    (tiles,) = [route.tiles for route in build._routes.values() if route.tiles is not None]
    tracemalloc.start()
    ours()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    row["peak_mb"] = round(held / 2**20, 1)
    row["xla_mb"] = round(2 * (os.cpu_count() or 1) * tiles.temporaries / 2**20, 1)
    row["examples_of_a_tile"] = tiles.block
    pairs_of = ((kernel.nngp, by_steps.nngp), (kernel.ntk, by_steps.ntk))
    row["steps_difference"] = float(f"{max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs_of):.1e}")
    row["results_mb"] = round(2 * kernel.nngp.nbytes / 2**20, 1)
    act = ACTIVATIONS[activation]
    if kind == "mlp":
        q = (x * x).sum(axis=1) * SIGMA_W**2 / shape[1] + SIGMA_B**2
        for _ in range(DEPTH - 1):
            q = SIGMA_W**2 * ij.gaussian.moment(act, q) + SIGMA_B**2
        error = np.max(np.abs(np.diagonal(kernel.nngp) / ij.gaussian.moment(act, q) - 1))
        row["diagonal_error"] = float(f"{error:.1e}")
    if stax is None:
        return row | dict(run_s=round(min(timed(ours)[1] for _ in range(rounds)), 4), peer="absent")
    function = peer_of(stax, kind, activation)
    compiled = jax.jit(lambda x: function(x, None, ("nngp", "ntk")))
    theirs = lambda: compiled(x)  # noqa: E731
    peer, peer_first = timed(theirs)
    temporaries = compiled.lower(x).compile().memory_analysis()
    for key in ("nngp", "ntk"):
        mine, yours = getattr(kernel, key), np.asarray(getattr(peer, key))
        row[f"{key}_difference"] = float(f"{np.abs(mine - yours).max() / np.abs(mine).max():.1e}")

    def after(function):
        ours()  # the peer's temporaries, gigabytes of them, are given back to the system during the next call
        return function()

    pairs = [after(lambda: (timed(ours)[1], timed(theirs)[1])) for _ in range(rounds)]
    slow = [after(lambda: (timed(steps)[1], timed(theirs)[1])) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    row |= dict(
        run_s=round(float(np.median([a for a, _ in pairs])), 4),
        peer_s=round(float(np.median([b for _, b in pairs])), 4),
        ratio=round(float(np.median(ratios)), 4),
        ratio_spread=[round(ratios[0], 4), round(ratios[-1], 4)],
        cpu_ratio=round(after(lambda: processor(ours) / processor(theirs)), 4),
        goal=goal,
        steps_s=round(float(np.median([a for a, _ in slow])), 4),
        steps_ratio=round(float(np.median([a / b for a, b in slow])), 4),
        peer_first_call_s=round(peer_first, 2),
        peer_temporaries_mb=round(getattr(temporaries, "temp_size_in_bytes", 0) / 2**20, 1),
    )
    return row


def accuracy_row() -> dict:
    """A kernel of a numeric activation against the recursion of nested quadrature, entry by entry."""
    from initjax.gaussian import bivariate
    from initjax.gaussian.activation import as_activation

    x = np.random.default_rng(0).normal(size=(500, 20))
    kernel = ij.kernel_fn(Model("mlp", "silu"), x[:2], parameterization="ntk")(x, get="nngp").nngp
    act, error = as_activation(nn.silu), 0.0
    for i, j in [(0, 1), (3, 400), (17, 99), (250, 499)]:
        k = x[[i, j]] @ x[[i, j]].T * SIGMA_W**2 / 20 + SIGMA_B**2
        for layer in range(DEPTH):
            c = k[0, 1] / np.sqrt(k[0, 0] * k[1, 1])
            cross = bivariate.direct(act, act, k[0, 0], k[1, 1], c, np.sqrt((1 - c) * (1 + c)))
            own = ij.gaussian.moment(nn.silu, np.diag(k))
            k = np.array([[own[0], cross], [cross, own[1]]])
            k = k if layer == DEPTH - 1 else SIGMA_W**2 * k + SIGMA_B**2
        error = max(error, abs(kernel[i, j] - k[0, 1]) / np.sqrt(k[0, 0] * k[1, 1]))
    return dict(benchmark=ACCURACY, error=float(f"{error:.1e}"), goal=1e-9)


def compile_row(name, kind, shape) -> dict:
    x = np.random.default_rng(0).normal(size=shape)
    model = ResNet() if kind == "resnet" else Transformer()
    row: dict = dict(benchmark=name, examples=shape[0])
    start, busy = time.perf_counter(), time.process_time()
    try:
        kernel = ij.kernel_fn(model, x)
        row["route"] = "exact"
    except ij.errors.UnsupportedLayerError as error:
        row |= dict(refused_because=error.given[:90], refused_s=round(time.perf_counter() - start, 1))
        start, busy = time.perf_counter(), time.process_time()
        kernel = ij.kernel_fn(model, x, on_unsupported="monte_carlo", particles=PARTICLES)
        row |= dict(route="monte_carlo", particles=PARTICLES)
    tracemalloc.start()
    out = kernel(x, get=("nngp", "ntk"))
    row["peak_mb"] = round(tracemalloc.get_traced_memory()[1] / 2**20, 1)
    tracemalloc.stop()
    first, busy = time.perf_counter() - start, time.process_time() - busy
    _, again = timed(lambda: kernel(x, get=("nngp", "ntk")))
    assert np.all(np.isfinite(out.ntk))
    if out.standard_error is not None:
        for part in ("nngp", "ntk"):
            error, value = (np.asarray(getattr(k, part)) for k in (out.standard_error, out))
            row[f"{part}_standard_error"] = float(f"{error.max() / np.abs(value).max():.1e}")
    return row | dict(
        first_call_s=round(first, 1), first_call_cpu_s=round(busy, 1), run_s=round(again, 2), goal_first_call_s=60
    )


def peer_or_none():
    try:
        from oracles import neural_tangents_shim

        neural_tangents_shim.load()
        from neural_tangents import stax
    except BaseException as error:  # a skip of the test suite, or a peer that does not import
        print(f"neural-tangents: absent ({error})")
        return None
    return stax


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the table to this file; with --only, replace these rows in it")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # for the peer; initjax does not need it
    warnings.simplefilter("ignore")
    stax = peer_or_none()
    chosen = lambda name: not args.only or any(word in name for word in args.only)  # noqa: E731
    rows = []

    def add(row):
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append(row)

    for case in CASES:
        if chosen(case[0]):
            add(row_of(*case, stax, 3 if "numeric" in case[0] else args.rounds))
    if chosen("numeric"):
        add(accuracy_row())
    for case in COMPILE:
        if chosen(case[0]):
            add(compile_row(*case))
    machine = dict(
        jax=jax.__version__,
        device=str(jax.devices()[0]),
        cpu=platform.machine(),
        cores=os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        dtype="float64",
    )
    print(machine)
    if args.json and args.only and Path(args.json).exists():
        new = {row["benchmark"]: row for row in rows}
        old = [row for row in json.loads(Path(args.json).read_text())["rows"] if row["benchmark"] not in new]
        order = [case[0] for case in CASES] + [ACCURACY] + [case[0] for case in COMPILE]
        rows = sorted(old + rows, key=lambda row: order.index(row["benchmark"]))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
