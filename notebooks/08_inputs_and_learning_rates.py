# %% [markdown]
# # How large may the inputs be before training explodes?
#
# Inputs that are not normalised make training diverge, it is said. From which scale on, at a given learning rate, and
# does the loss explode at once?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import input_scale

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
WIDTH, SEEDS = (96, 2) if SMALL else (512, 5)
RATE, N, STEPS = 1e-3, 8, 60

# %% [markdown]
# ## Prediction
#
# On $\frac1{2N}\sum(f-y)^2$ a step overshoots where $\eta\lambda_{max}(\Theta(sX))/N$ reaches 2, and a wide network
# diverges for good only near 4 (Lewkowycz et al. 2020). Between the two the loss rises, the kernel shrinks, and
# training recovers: a catapult. Without biases $\Theta(sX) = s^2\Theta(X)$, so both scales follow from one kernel.
# With tanh the largest eigenvalue grows more slowly the more units saturate.

# %%
x = jax.random.normal(jax.random.key(0), (N, 16))
x = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))
y = jax.random.normal(jax.random.key(1), (N, 1))


def network(phi, init):
    dense = lambda n: nn.Dense(n, use_bias=False, kernel_init=init)  # noqa: E731
    return nn.Sequential([dense(WIDTH), phi, dense(WIDTH), phi, dense(1)])


models = {
    "linear": network(lambda h: h, nn.initializers.lecun_normal()),
    "relu, He": network(nn.relu, nn.initializers.he_normal()),
}
predicted = {name: input_scale.critical(model, x, RATE, networks=0) for name, model in models.items()}
for name, found in predicted.items():
    print(f"{name}: overshoots at s = {found.critical:.3f}, diverges at {found.divergence:.3f}; first {found.layer}")
tanh = input_scale.critical(network(jnp.tanh, nn.initializers.lecun_normal()), x[:2] if SMALL else x, RATE, networks=0)
print(f"tanh: overshoots at s = {tanh.critical:.3f}, where lambda_max grows as s^{tanh.exponent:.2f}, not s^2")

# %% [markdown]
# ## Measurement
#
# Sixty steps of gradient descent from drawn networks, on inputs of scale s. $s_{crit}$ is that of each network's own
# kernel, which differs from the mean kernel's by a few percent; the prediction is about the ratio.

# %%
fine = [0.5, 0.7, 0.9, 0.97, 1.03, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.2]
factors = np.array([0.9, 1.1, 1.3, 2.2] if SMALL else fine)


def training(model, params, s):
    loss = lambda p: 0.5 * jnp.mean((model.apply({"params": p}, s * x) - y) ** 2)  # noqa: E731

    def step(p, _):
        value, gradient = jax.value_and_grad(loss)(p)
        return jax.tree.map(lambda a, g: a - RATE * g, p, gradient), value

    return jax.lax.scan(step, params, length=STEPS)[1]


figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
peaks, ends, ratio = {}, {}, {}
for axis, (name, model) in zip(axes, models.items(), strict=True):
    run = jax.jit(jax.vmap(lambda p, s, model=model: training(model, p, s), (None, 0)))
    ntk_fn = ij.empirical_ntk(model)
    rows = []
    for key in jax.random.split(jax.random.key(2), SEEDS):
        params = model.init(key, x)["params"]
        own = (2 * N / (RATE * np.linalg.eigvalsh(np.asarray(ntk_fn(params, x), float))[-1])) ** 0.5
        ratio.setdefault(name, []).append(own / predicted[name].critical)
        rows.append(np.asarray(run(params, jnp.asarray(own * factors, jnp.float32)), float))
    losses = np.where(np.isfinite(rows), rows, 1e12).clip(1e-12, 1e12)  # (seeds, factors, steps)
    rise = np.log10(losses.max(2) / losses[:, :, 0])
    end = np.log10(losses[:, :, -1] / losses[:, :, 0])
    peaks[name], ends[name] = rise, end
    for values, label, colour in ((rise, "highest loss", "#D55E00"), (end, "last loss", "#0072B2")):
        error = values.std(0, ddof=1) / np.sqrt(SEEDS)
        tell = f"{label}, {SEEDS} networks"
        axis.errorbar(factors, values.mean(0), error, fmt="o-", color=colour, label=tell, lw=0.7)
    axis.axvline(1, color="0.3", ls="--", lw=1, label="predicted: overshoots (2)")
    axis.axvline(2**0.5, color="0.3", ls=":", lw=1.5, label="predicted: diverges (4)")
    axis.set(xlabel="input scale s / s_crit", ylabel="log10 loss, relative to the first", title=name)
_ = axes[0].legend(fontsize=8)
for name, values in ratio.items():
    print(f"{name}: s_crit of drawn networks over the predicted one {np.mean(values):.3f}({np.std(values):.3f})")

# %% [markdown]
# ## What would have falsified it
#
# A loss that rises below $s_{crit}$, or does not rise above it; a linear network that recovers beyond
# $\sqrt2\,s_{crit}$. The relu network need not explode there: it can also die, and stop at a loss that it cannot leave.

# %%
below, above, lost = factors < 0.95, (factors > 1.05) & (factors < 1.35), factors > 2.1
assert np.all(peaks["linear"][:, below] < 0.05) and np.all(peaks["relu, He"][:, below] < 0.05)
assert np.all(peaks["linear"][:, above].max(1) > 0.3)
print("linear, last loss:", np.round(ends["linear"].mean(0), 1), "at", factors)
assert np.all(ends["linear"][:, lost] > 4)
assert all(abs(np.mean(values) - 1) < 0.15 for values in ratio.values())
