"""What do critical initializers and re-initialization cost, and does tuning make deep networks trainable?

    python benchmarks/initializers.py [init] [reinit] [train] [--json FILE] [--figure FILE]

init: `critical(tanh)` against `he_normal` inside the jitted init of a model of 100 layers (compile and run time apart,
alternating calls, median ratio). reinit: `ij.reinitialize` on 1e8 parameters against drawing as many normal numbers.
train: networks of 50 layers, tanh and relu, and a norm-free ResNet, at LeCun init and tuned, trained alike on
handwritten digits with plain gradient descent at one rate; accuracies and losses over the steps, and a figure with
--figure FILE. Seeds and sizes are fixed; every row says how far off its result is.
"""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import initjax as ij

SEED = 0
LAYERS, WIDTH = 100, 256  # of the model whose init is timed
MATRICES, SIDE = 25, 2000  # 1e8 parameters
REPEATS = {"init": 15, "reinit": 5}
DEPTH, BATCH, EVERY = 50, 64, 25  # of training


class MLP(nn.Module):
    kernel_init: object = nn.initializers.lecun_normal()
    depth: int = LAYERS
    width: int = WIDTH
    phi: object = jnp.tanh

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth - 1):
            x = self.phi(nn.Dense(self.width, kernel_init=self.kernel_init)(x))
        return nn.Dense(10)(x)


class Block(nn.Module):
    """A bottleneck without norms, as in a pre-activation ResNet-50."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(x)
        if x.shape[-1] != 4 * self.features or self.stride > 1:
            x = nn.Conv(4 * self.features, (1, 1), (self.stride,) * 2, name="projection")(y)
        y = nn.relu(nn.Conv(self.features, (1, 1))(y))
        y = nn.relu(nn.Conv(self.features, (3, 3), (self.stride,) * 2)(y))
        return x + nn.Conv(4 * self.features, (1, 1))(y)


class ResNet(nn.Module):
    features: int = 8
    stages: tuple = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4 * self.features, (3, 3))(x.reshape(-1, 8, 8, 1))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.features * 2**i, 2 if i in (1, 2) and not j else 1)(x)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def paired(ours, theirs, repeats):
    """First calls, medians of alternating calls, and the median of their ratios: the machine's load hits both alike."""
    first = seconds(ours), seconds(theirs)
    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(repeats)])
    ratios = pairs[:, 0] / pairs[:, 1]
    return dict(
        first_call_s=round(first[0], 3),
        peer_first_call_s=round(first[1], 3),
        run_s=round(float(np.median(pairs[:, 0])), 4),
        peer_run_s=round(float(np.median(pairs[:, 1])), 4),
        ratio=round(float(np.median(ratios)), 3),
        ratio_spread=round(float(np.subtract(*np.percentile(ratios, [75, 25]))), 3),
    )


def bench_init():
    x, key = jnp.ones((1, WIDTH)), jax.random.key(SEED)
    start = time.perf_counter()
    critical = ij.initializers.critical(jnp.tanh, 0.05)
    build = time.perf_counter() - start
    ours, theirs = (jax.jit(MLP(k).init) for k in (critical, nn.initializers.he_normal()))
    timing = paired(lambda: ours(key, x), lambda: theirs(key, x), REPEATS["init"])
    w = np.asarray(ours(key, x)["params"]["Dense_1"]["kernel"], float)
    error = abs(w.std() * WIDTH**0.5 / critical.sigma_w - 1)
    return [dict(benchmark="jitted init", case="critical / he_normal", layers=LAYERS, build_s=round(build, 3),
                 **timing, error=float(f"{error:.1e}"))]  # fmt: skip


def bench_reinit():
    key = jax.random.key(SEED)
    params = {f"layer{i}": {"kernel": jnp.zeros((SIDE, SIDE))} for i in range(MATRICES)}
    rules = [("kernel", ij.initializers.FanIn(2**0.5))]

    def ours():
        return ij.reinitialize(params, rules, key)

    def theirs():
        return [jax.random.normal(k, (SIDE, SIDE)) for k in jax.random.split(key, MATRICES)]

    timing = paired(ours, theirs, REPEATS["reinit"])
    w = np.asarray(ours()["layer3"]["kernel"], float)
    error = abs(w.std() * (SIDE / 2) ** 0.5 - 1)
    return [dict(benchmark="reinitialize", case="1e8 parameters / normal draws", layers=MATRICES, **timing,
                 error=float(f"{error:.1e}"))]  # fmt: skip


def bench_train():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.data - digits.data.mean()) / digits.data.std()
    order = np.random.default_rng(SEED).permutation(len(x))
    x, y = jnp.asarray(x[order], jnp.float32), jnp.asarray(digits.target[order])
    rows = []
    plain = {name: MLP(depth=DEPTH, width=128, phi=phi) for name, phi in (("tanh", jnp.tanh), ("relu", nn.relu))}
    cases = (
        ("tanh network of 50 layers", plain["tanh"], 0.03, 300),
        ("relu network of 50 layers", plain["relu"], 0.003, 600),
        ("norm-free ResNet-50-like", ResNet(), 0.05, 150),
    )
    for name, model, rate, count in cases:
        start = time.perf_counter()
        tuned = ij.tune(model, x[:32], key=jax.random.key(SEED + 1))
        spent = time.perf_counter() - start
        params = jax.jit(model.init)(jax.random.key(SEED + 2), x[:1])
        starts = {"LeCun": params, "tuned": ij.reinitialize(params, tuned, jax.random.key(SEED))}
        for label, start_params in starts.items():
            steps, accuracy, losses = train(model, start_params, x, y, rate, count)
            row = dict(benchmark="training", case=name, start=label, rate=rate, side=tuned.side, tune_s=round(spent, 1))
            row |= dict(worst_chi=round(tuned.worst, 4), steps=steps, test_accuracy=accuracy, loss=losses)
            rows.append(row)
            print(f"{name}, {label}: accuracy {accuracy}", flush=True)
    return rows


def train(model, params, x, y, rate, count):
    """Plain stochastic gradient descent by optax; test accuracy and mean training loss every 25 steps."""
    optimizer = optax.sgd(rate)
    held = 360

    def loss(p, batch, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(p, batch), labels).mean()

    @jax.jit
    def step(p, state, key):
        chosen = jax.random.randint(key, (BATCH,), held, len(x))
        value, gradient = jax.value_and_grad(loss)(p, x[chosen], y[chosen])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(p, updates), state, value

    test = jax.jit(lambda p: (model.apply(p, x[:held]).argmax(-1) == y[:held]).mean())
    state, steps, accuracy, losses, recent = optimizer.init(params), [0], [round(float(test(params)), 3)], [], []
    for i, key in enumerate(jax.random.split(jax.random.key(SEED + 3), count), 1):
        params, state, value = step(params, state, key)
        recent.append(value)
        if i % EVERY == 0:
            steps.append(i)
            accuracy.append(round(float(test(params)), 3))
            losses.append(round(float(np.mean(recent)), 3))
            recent = []
    return steps, accuracy, losses


def draw(rows, file):
    """Accuracy over the steps, one panel for each network."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows if row["benchmark"] == "training"))
    figure, axes = plt.subplots(1, len(cases), figsize=(3.6 * len(cases), 3), sharey=True, layout="constrained")
    for axis, case in zip(np.atleast_1d(axes), cases, strict=True):
        for row in rows:
            if row.get("case") == case:
                axis.plot(row["steps"], row["test_accuracy"], label=row["start"])
        axis.axhline(0.1, color="0.7", linewidth=0.8, linestyle=":")
        axis.set(title=case, xlabel="steps of gradient descent", ylim=(0, 1))
    np.atleast_1d(axes)[0].set_ylabel("test accuracy on digits")
    np.atleast_1d(axes)[0].legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["init", "reinit", "train"])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--figure", help="draw the training curves to this file")
    args = parser.parse_args()
    benches = {"init": bench_init, "reinit": bench_reinit, "train": bench_train}
    rows = []
    for name in args.which:
        for row in benches[name]():
            rows.append(row)
            print(row, flush=True)
    machine = dict(
        jax=jax.__version__, device=str(jax.devices()[0]), cpu=platform.machine(), dtype="float32", seed=SEED
    )
    print(machine)
    if args.figure:
        draw(rows, args.figure)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
