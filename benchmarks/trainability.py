"""Which prediction tells, before training, whether a deep network will train?

    python benchmarks/trainability.py [--seconds 240] [--summary]

240 networks: FAMILIES x ten sigma_w x DEPTHS, width 64, each trained at three learning rates (720 runs) on the digits:
plain SGD on the mean squared error of one-hot targets, 250 steps of 64 images, the same for all, fixed before any
result was seen. A network counts as trained if its test accuracy passes 50 % (guessing: 10 %) at one of the rates. All
networks of one family and depth are one compiled program, vmapped over sigma_w and rates.

Results are appended to results/trainability.csv, one part (family, depth) after the other, for `--seconds`; run again
to go on. Once all parts are there the summary is written to results/trainability.json, the figure to
docs/trainability.png: area under the ROC curve (AUC) of every predictor, over all networks and within each family;
0.5 is a coin, 1 perfect, below 0.5 worse than a coin. The error of an AUC is over 500 resamplings of the networks.

Predictors, none of which has seen a trained network (theory: infinite width, q and chi layer by layer from the data):
    depth_scale     depth / (6 xi), xi of correlations, Schoenholz et al. 2017
    chi_to_depth    |log of the product of chi over the layers|
    gradient_std    measured: standard deviation over layers of log10 of the weight gradients' norm, one random draw
    isometry        sum over layers of mu_2 / mu_1^2 - 1 - s, the relative variance of squared singular values
    mean_and_isometry  the two sides of isometry: |log chi product| + log(1 + isometry)
    conditioning    log10 of the condition number of the tangent kernel on 32 digits, Xiao et al. 2020
    rate            log10 of learning rate / largest stable one (of the predicted kernel); for single runs
"""

import argparse
import csv
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import initjax as ij
from initjax.demo.data import load


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


WIDTH, STEPS, BATCH, RATES, TRAINED, SIGMA_B = 64, 250, 64, (3e-4, 3e-3, 3e-2), 0.5, 0.05
DEPTHS = (2, 5, 10, 20, 40, 80)
FAMILIES = {  # activation, weights, sigma_w
    "tanh": (jnp.tanh, "gaussian", np.linspace(0.6, 2.4, 10)),
    "tanh orthogonal": (jnp.tanh, "orthogonal", np.linspace(0.6, 2.4, 10)),
    "relu": (jax.nn.relu, "gaussian", np.linspace(0.8, 2.15, 10)),
    "gelu": (gelu, "gaussian", np.linspace(0.8, 2.6, 10)),
}
E_FOLDS = (1.0, 3.0, 6.0, 12.0, 1e6)
EXAMPLES = 32  # of the predicted kernel
LOWER_IS_BETTER = ("depth_scale", "chi_to_depth", "gradient_std", "isometry", "mean_and_isometry", "conditioning")
HERE = Path(__file__).parent
TABLE, SUMMARY = HERE / "results/trainability.csv", HERE / "results/trainability.json"
FIGURE = HERE.parent / "docs/trainability.png"


SQUARED_SLOPES = {
    jnp.tanh: ij.Activation(lambda x: (1 - jnp.tanh(x) ** 2) ** 2),
    gelu: ij.Activation(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1] ** 2),
}


def predictions(family: str, depths, x: np.ndarray) -> dict[int, dict[str, np.ndarray]]:
    """Depth -> predictor -> (sigma_w,). One recursion serves all depths."""
    phi, weights, sigma_w = FAMILIES[family]
    n = len(x)
    i, j = np.triu_indices(n)
    w2, b2 = (sigma_w**2)[:, None], SIGMA_B**2
    point = ij.fixed_point(phi, sigma_w, SIGMA_B)
    xi = np.abs(np.where(np.isfinite(point.xi_c), point.xi_c, point.xi_grad))  # no fixed point: that of gradients
    gram = np.where(i == j, 1.0, (x.astype(np.float64) @ x.T / x.shape[1])[i, j])  # every image has mean square 1
    k = w2 * gram + b2
    theta = np.broadcast_to(x.shape[1] * gram + 1.0, k.shape).copy()
    log_chi, spread = np.zeros(len(sigma_w)), np.zeros(len(sigma_w))
    found = {}
    for layer in range(1, max(depths) + 1):
        q = k[:, :1]  # the same for every image
        c = np.where(i == j, 1.0, np.clip(k / q, -1, 1))
        mu_1 = np.asarray(ij.gaussian.moment_prime(phi, q[:, 0]))
        mu_2 = np.asarray(ij.gaussian.moment(SQUARED_SLOPES[phi], q[:, 0])) if phi in SQUARED_SLOPES else 0.5  # relu
        log_chi += np.log(sigma_w**2 * mu_1)
        spread += mu_2 / mu_1**2 - 1 + (weights == "gaussian")
        second = np.asarray(ij.gaussian.dual(phi, q, q, c))
        # of the next layer: its own weights and bias, and all before through its slope
        theta = WIDTH * second + 1 + w2 * np.asarray(ij.gaussian.dual_prime(phi, q, q, c)) * theta
        k = w2 * second + b2
        k = np.where(i == j, k[:, :1], k)
        if layer in depths:
            full = np.zeros((len(sigma_w), n, n))
            full[:, i, j] = full[:, j, i] = theta
            found[layer] = dict(
                depth_scale=layer / (6 * xi),
                chi_to_depth=np.abs(log_chi),
                log_chi_product=log_chi.copy(),
                isometry=spread.copy(),
                mean_and_isometry=np.abs(log_chi) + np.log1p(spread),
                conditioning=np.log10(np.minimum(ij.condition_number(full), 1e18)),
                max_rate=np.asarray(ij.max_learning_rate(full, n)),
                chi_1=np.asarray(point.chi_1),
            )
    return found


def draw(family: str, depth: int, rng) -> tuple[np.ndarray, ...]:
    """Weights (sigma_w, depth, width, width), biases and readouts, float32."""
    _, weights, sigma_w = FAMILIES[family]
    inner = rng.normal(size=(len(sigma_w), depth, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    if weights == "orthogonal":
        inner, r = np.linalg.qr(inner)
        inner = inner * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    scale = sigma_w[:, None, None]
    readout = scale * rng.normal(size=(len(sigma_w), WIDTH, 10)) / np.sqrt(WIDTH)
    bias = SIGMA_B * rng.normal(size=(len(sigma_w), depth, WIDTH))
    last = SIGMA_B * rng.normal(size=(len(sigma_w), 10))
    return tuple(np.asarray(a, np.float32) for a in (scale[..., None] * inner, bias, readout, last))


def trainer(phi):
    """`train(params, rate, images, targets, test images, labels)` of one network."""

    def apply(params, x):
        weights, bias, readout, last = params
        h, _ = jax.lax.scan(lambda h, layer: (phi(h @ layer[0] + layer[1][None]), None), x, (weights, bias))
        return h @ readout + last[None]

    def loss(params, x, y):
        return 0.5 * jnp.mean(jnp.sum((apply(params, x) - y) ** 2, axis=-1))

    def train(params, rate, images, targets, x_test, y_test):
        def step(params, some):
            value, gradient = jax.value_and_grad(loss)(params, *some)
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

        first = jax.grad(loss)(params, images[0], targets[0])[0]
        # scaled, so that squares do not underflow
        size = jnp.abs(first).max(axis=(1, 2))
        safe = jnp.where(size > 0, size, 1.0)[:, None, None]
        norms = jnp.log10(jnp.sqrt(((first / safe) ** 2).sum(axis=(1, 2)))) + jnp.log10(size)
        params, losses = jax.lax.scan(step, params, (images, targets))
        accuracy = jnp.mean((jnp.argmax(apply(params, x_test), axis=-1) == y_test).astype(jnp.float32))
        return losses[0], losses[-10:].mean(), accuracy, norms

    return train


def part(family: str, depth: int, predicted: dict, data, steps: int = STEPS) -> list[dict]:
    """All networks of one family and depth, at every rate."""
    phi, _, sigma_w = FAMILIES[family]
    rng = np.random.default_rng([depth, list(FAMILIES).index(family)])
    params = draw(family, depth, rng)
    order = np.concatenate([rng.permutation(len(data.x_train)) for _ in range(-(-steps * BATCH // len(data.x_train)))])
    order = order[: steps * BATCH].reshape(steps, BATCH)
    images, targets = data.x_train[order], np.eye(10, dtype=np.float32)[data.y_train[order]]
    each = jax.vmap(trainer(phi), (None, 0, None, None, None, None))
    each = jax.jit(jax.vmap(each, (0, None, None, None, None, None)))
    arrays = (params, np.asarray(RATES, np.float32), images, targets, data.x_test, data.y_test)
    first, last, accuracy, norms = (np.asarray(a, np.float64) for a in each(*arrays))
    rows = []
    for s, w in enumerate(sigma_w):
        spread = norms[s, 0].std() if np.all(np.isfinite(norms[s, 0])) else np.inf
        common = {name: values[s] for name, values in predicted.items()} | dict(gradient_std=spread)
        for r, rate in enumerate(RATES):
            row = dict(family=family, sigma_w=w, depth=depth, learning_rate=rate, accuracy=accuracy[s, r])
            row |= dict(first_loss=first[s, r], last_loss=last[s, r]) | common
            row |= dict(rate=np.log10(rate / common["max_rate"]))
            rows.append({k: v if isinstance(v, str) else f"{v:.6g}" for k, v in row.items()})
    return rows


def area(score: np.ndarray, label: np.ndarray) -> float:
    """Probability that a trained network scores above an untrained one; ties count half."""
    if label.all() or not label.any():
        return float("nan")
    _, rank, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    hits, total = label.sum(), len(label)
    return float((middle[rank][label].sum() - hits * (hits + 1) / 2) / (hits * (total - hits)))


def with_error(score, label, rng, draws: int = 500) -> dict:
    values = [area(score[at], label[at]) for at in (rng.integers(0, len(label), len(label)) for _ in range(draws))]
    return dict(auc=round(area(score, label), 3), error=round(float(np.nanstd(values)), 3))


def read() -> list[dict]:
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "family" else float(v) for k, v in row.items()} for row in rows]


def networks(rows: list[dict]) -> list[dict]:
    """One row a network: trained at the best of the rates."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["family"], row["sigma_w"], row["depth"]
        if key not in best or row["accuracy"] > best[key]["accuracy"]:
            best[key] = row
    return list(best.values())


def summary(rows: list[dict]) -> dict:
    rng = np.random.default_rng(0)
    nets = networks(rows)
    column = lambda name, some: np.array([row[name] for row in some], np.float64)  # noqa: E731
    answer: dict = dict(networks=len(nets), runs=len(rows), trained=int((column("accuracy", nets) > TRAINED).sum()))
    groups = {"all": nets} | {
        f: [n for n in nets if n["family"] == f] for f in dict.fromkeys(n["family"] for n in nets)
    }
    groups |= {"ordered": [n for n in nets if n["chi_1"] < 1], "chaotic": [n for n in nets if n["chi_1"] >= 1]}
    groups["depth 20 or less"] = [n for n in nets if n["depth"] <= 20]
    for group, some in groups.items():
        label = column("accuracy", some) > TRAINED
        answer[group] = dict(networks=len(some), trained=int(label.sum())) | {
            name: with_error(-column(name, some), label, rng) for name in LOWER_IS_BETTER
        }
    # single runs: does the rate decide whether the loss explodes? also without those that explode at any rate
    for name, some in (("rate", rows), ("rate, ordered", [r for r in rows if r["chi_1"] < 1])):
        burst = np.array([not np.isfinite(r["last_loss"]) or r["last_loss"] > 2 * r["first_loss"] for r in some])
        ratio = column("rate", some)
        answer[name] = dict(
            runs=len(some),
            exploded=int(burst.sum()),
            **with_error(ratio, burst, rng),
            exploded_below_half_the_limit=round(float(np.mean(burst[ratio < np.log10(0.5)])), 3),
            exploded_above_twice_the_limit=round(float(np.mean(burst[ratio > np.log10(2)])), 3),
        )
    # what trains, by e-folds of the gradient: the table that ij.trainability quotes
    gain, label, lower = column("chi_to_depth", nets), column("accuracy", nets) > TRAINED, 0.0
    answer["e-folds"] = []
    for upper in E_FOLDS:
        here = (gain >= lower) & (gain < upper)
        answer["e-folds"].append(
            dict(below=upper, networks=int(here.sum()), trained=round(float(label[here].mean()), 3))
        )
        lower = upper
    # the rules as they stand, without a fitted threshold
    label = column("accuracy", nets) > TRAINED
    rules = dict(depth_scale=1.0, chi_to_depth=6.0, conditioning=6.0)
    answer["rules"] = {
        name: dict(
            rule=f"{name} <= {limit:.4g}",
            right=round(float(np.mean((column(name, nets) <= limit) == label)), 3),
            trained_if_promised=round(float(np.mean(label[column(name, nets) <= limit])), 3),
            trained_if_not=round(float(np.mean(label[column(name, nets) > limit])), 3),
        )
        for name, limit in rules.items()
    }
    return answer


def draw_figure(rows: list[dict], found: dict) -> None:
    """AUC of each predictor; the tanh networks beside the line depth = 6 xi; share trained against e-folds."""
    from initjax.drawing import blank_figure

    nets = networks(rows)
    figure = blank_figure(14, 4.2)
    left, middle, right = figure.subplots(1, 3)
    groups = ("all", "ordered", "chaotic")
    for g, (group, colour) in enumerate(zip(groups, ("#0072B2", "#56B4E9", "#D55E00"), strict=True)):
        values = [found[group][name] for name in LOWER_IS_BETTER]
        at = np.arange(len(values)) + 0.27 * (g - 1)
        left.barh(at, [v["auc"] for v in values], 0.25, xerr=[v["error"] for v in values], color=colour, label=group)
    left.axvline(0.5, color="k", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(LOWER_IS_BETTER)), LOWER_IS_BETTER)
    left.invert_yaxis()
    left.set(xlabel="area under the ROC curve (0.5: a coin)", xlim=(0, 1.45), title=f"{len(nets)} networks")
    left.legend(loc="lower right")
    tanh = [n for n in nets if n["family"] == "tanh"]
    dots = middle.scatter(
        [n["sigma_w"] for n in tanh],
        [n["depth"] for n in tanh],
        c=[n["accuracy"] for n in tanh],
        cmap="viridis",
        vmin=0.1,
        vmax=1,
        s=45,
    )
    figure.colorbar(dots, ax=middle, label="test accuracy at the best rate")
    w = np.linspace(0.6, 2.4, 200)
    middle.plot(w, 6 * np.asarray(ij.fixed_point(jnp.tanh, w, SIGMA_B).xi_c), color="#D55E00", label="depth = 6 xi")
    middle.set(yscale="log", xlabel="sigma_w", ylabel="depth", ylim=(1.6, 110), title="tanh, Gaussian weights")
    middle.legend(loc="lower right")
    edges = np.array([0, 0.5, 1, 2, 3, 4.5, 6, 9, 12, 20, 40, 1e6])
    for family in FAMILIES:
        some = [n for n in nets if n["family"] == family]
        gain = np.array([n["chi_to_depth"] for n in some])
        label = np.array([n["accuracy"] > TRAINED for n in some])
        which = np.digitize(gain, edges) - 1
        there = [k for k in range(len(edges) - 1) if (which == k).sum() > 2]
        right.plot(
            [np.median(gain[which == k]) for k in there], [label[which == k].mean() for k in there], "o-", label=family
        )
    right.axvline(6, color="k", linewidth=0.8, linestyle=":")
    right.set(
        xscale="log", xlabel="|log of the product of chi|, e-folds", ylabel="share that trained", title="by e-folds"
    )
    right.legend()
    figure.savefig(FIGURE, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="stop before the next part after that time")
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    args = parser.parse_args()
    start = time.perf_counter()
    data = load()
    done = {(r["family"], int(r["depth"])) for r in read()} if TABLE.exists() else set()
    for family in FAMILIES if not args.summary else ():
        missing = [d for d in DEPTHS if (family, d) not in done]
        if not missing or time.perf_counter() - start > args.seconds:
            continue
        predicted = predictions(family, DEPTHS, data.x_train[:EXAMPLES])
        print(f"{family}: predicted after {time.perf_counter() - start:.0f} s", flush=True)
        for depth in missing:
            if time.perf_counter() - start > args.seconds:
                break
            rows = part(family, depth, predicted[depth], data)
            fresh = not TABLE.exists()
            with TABLE.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerows(rows)
            best = [n for n in networks([{**r, "accuracy": float(r["accuracy"])} for r in rows])]
            told = " ".join(f"{n['accuracy']:.2f}" for n in best)
            print(f"{family} depth {depth}: {told}  ({time.perf_counter() - start:.0f} s)", flush=True)
    rows = read()
    if len({(r["family"], r["depth"]) for r in rows}) == len(FAMILIES) * len(DEPTHS):
        found = summary(rows)
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n")
        draw_figure(rows, found)
        for name, value in found.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
