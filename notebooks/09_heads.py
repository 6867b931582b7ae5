# %% [markdown]
# # How should a new head on a frozen trunk start?
#
# Xavier, says folklore, for a classifier on top of a pretrained network, and for each of the heads of a multi-task
# network, where it is also said to balance the tasks. What are the logits, the first loss, and the gradient that
# reaches the trunk?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from initjax.applications import heads

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
DRAWS, EXAMPLES = (40, 40) if SMALL else (400, 300)

# %% [markdown]
# ## Prediction
#
# Logits have second moment $s^2|h|^2$, so that Xavier's $s^2 = 2/(D + C)$ suits features with $|h|^2 = D$ alone. The
# first cross-entropy is $E\log\sum e^z$ of independent normal logits, $\log C + v(1-1/C)/2$ only while v is small.
# Matching s to the features gives the same start whatever their scale.

# %%
rng = np.random.default_rng(0)
C, D = 10, 128
base = np.maximum(rng.normal(size=(EXAMPLES, 64)) @ rng.normal(size=(64, D)) / 8, 0)
labels = rng.integers(0, C, EXAMPLES)
scales = np.array([0.3, 3.0] if SMALL else [0.3, 1.0, 3.0, 6.0])
fine = np.geomspace(0.25, 7, 7 if SMALL else 25)
predicted = {s: [heads.transfer(f * base, C, scheme=s, variance=0.1) for f in fine] for s in ("xavier", "matched")}
one = heads.transfer(base, C, scheme="xavier")
print(f"features at scale 1: |h|^2 = {one.second_moment:.1f} for D = {D}")
print(f"logits: second moment {one.logit_second_moment:.3f}, of which {one.logit_variance:.3f} varies over the data")
print(f"first loss {one.initial_loss:.3f}, quadratic {one.quadratic_loss:.3f}")

# %% [markdown]
# ## Measurement 1: the first loss

# %%
figure, left = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
worst = 0.0
for scheme, colour in (("xavier", "#D55E00"), ("matched", "#0072B2")):
    left.plot(fine, [report.initial_loss for report in predicted[scheme]], color=colour)
    rows = []
    for f in scales:
        report = heads.transfer(f * base, C, scheme=scheme, variance=0.1)
        h = jnp.asarray(f * base, jnp.float32)
        model = nn.Dense(C, kernel_init=report.head.kernel, bias_init=report.head.bias)

        @jax.jit
        @jax.vmap
        def loss(key, model=model, h=h):
            logits = model.apply(model.init(key, h), h)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        values = np.asarray(loss(jax.random.split(jax.random.key(0), DRAWS)), float)
        rows.append((values.mean(), values.std(ddof=1) / np.sqrt(DRAWS)))
        worst = max(worst, abs(values.mean() - report.initial_loss) / rows[-1][1])
    mean, error = np.array(rows).T
    left.errorbar(scales, mean, error, fmt="o", color=colour, label=f"{scheme}, {DRAWS} heads")
quadratic = [report.quadratic_loss for report in predicted["xavier"]]
left.plot(fine, quadratic, color="#D55E00", ls=":", label="xavier, log C + v (1 - 1/C) / 2")
left.axhline(np.log(C), color="0.6", ls="--", lw=0.8, label="log C")
left.set(xlabel="scale of the features", ylabel="first cross-entropy", xscale="log", ylim=(2, 12))
left.set_xticks(scales, [f"{scale:g}" for scale in scales])
left.minorticks_off()
_ = left.legend(fontsize=8)

# %% [markdown]
# ## Prediction and measurement 2: many tasks
#
# Heads add up in the trunk, $E|\nabla_h|^2 = \sum_t \lambda_t^2 D C_t s_t^2 E g_t^2$, since cross terms have mean zero:
# equal tasks grow the trunk's gradient as $\sqrt T$, and $\lambda = T^{-1/2}$ would keep it.

# %%
counts = [1, 2, 4, 8, 16]
names = [f"task {i}" for i in range(max(counts))]
measured, theory = [], []
for T in counts:
    report = heads.multi_task(dict.fromkeys(names[:T], base), dict.fromkeys(names[:T], C))
    theory.append(report.growth)
    gradients = np.zeros((DRAWS, D))
    for task in names[:T]:
        w = report.tasks[task].std * rng.normal(size=(DRAWS, D, C))
        g = np.full((DRAWS, C), 1 / C)
        g[np.arange(DRAWS), rng.integers(0, C, DRAWS)] -= 1  # softmax at uniform
        gradients += np.einsum("ndc,nc->nd", w, g)
    square = np.sum(gradients**2, 1) / report.tasks["task 0"].feature_gradient
    measured.append((np.sqrt(square.mean()), square.std(ddof=1) / np.sqrt(DRAWS) / (2 * np.sqrt(square.mean()))))
mean, error = np.array(measured).T
figure, right = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
right.errorbar(counts, mean, error, fmt="o", color="#D55E00", label=f"measured, {DRAWS} draws")
right.plot(counts, theory, color="#0072B2", label="predicted, sqrt(T)")
right.set(xlabel="number of equal tasks T", ylabel="trunk gradient (rms), relative to one task")
right.set(xscale="log", yscale="log")
right.set_xticks(counts, [f"{count}" for count in counts])
right.set_yticks([1, 2, 4], ["1", "2", "4"])
right.minorticks_off()
_ = right.legend()
print("predicted growth", np.round(theory, 3), "measured", np.round(mean, 3))

# %% [markdown]
# ## What would have falsified it
#
# A first loss away from the curve by more than four standard errors, at any scale of the features; a matched head whose
# first loss depends on that scale; trunk gradients that grow as T, which they would if the heads were correlated.

# %%
print(f"largest deviation of the first loss: {worst:.2f} standard errors")
assert worst < 4
assert np.all(np.abs(mean - theory) < 4 * error)
