# %% [markdown]
# # How deep can two inputs stay apart?
#
# A random tanh network either makes all inputs alike (order), or tears apart even nearly equal ones (chaos). At which
# depth is the difference between two inputs lost, and do gradients reach as far as signals?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
WIDTH, SEEDS, DEPTH = (128, 8, 12) if SMALL else (384, 24, 24)
SIGMA_B = 0.3

# %% [markdown]
# ## Prediction
#
# Correlations follow a map whose slope at c = 1 is $\chi = \sigma_w^2 E[\phi'^2]$. Below 1 they tend to 1, above 1 to a
# fixed value below it, within $\xi_c$ layers; squared gradients change by $\chi$ per layer, with $\xi_\nabla =
# -1/\log\chi$. At the critical $\sigma_w$ both scales are infinite and 1 - c falls only as a power.

# %%
edge = float(ij.critical(jnp.tanh, SIGMA_B).sigma_w)
scales = {"ordered": 0.75 * edge, "critical": edge, "chaotic": 1.6 * edge}
paths = {}
for name, w in scales.items():
    point = ij.fixed_point(jnp.tanh, w, SIGMA_B)
    paths[name] = ij.propagate(jnp.tanh, w, SIGMA_B, DEPTH - 1, q0=float(point.q), c0=0.6)
    print(
        f"{name}: sigma_w = {w:.4f}, c* = {point.c:.4f}, xi_c = {point.xi_c:.2f} layers, "
        f"gradients e-fold in {point.xi_grad:.2f}"
    )

# %% [markdown]
# ## Measurement
#
# Flax networks with two inputs whose first pre-activations have the fixed point's second moment and correlation 0.6.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
deviations = {}
for (name, path), colour in zip(paths.items(), ("#0072B2", "#009E73", "#D55E00"), strict=True):
    w, q = scales[name], float(path.q[0])
    # E h^2 = w^2 |x|^2 / n + sigma_b^2, and likewise for the pair
    square, product = (q - SIGMA_B**2) / w**2, (0.6 * q - SIGMA_B**2) / w**2
    gram = np.array([[square, product], [product, square]])
    x = np.linalg.cholesky(gram) @ np.repeat(np.eye(2), WIDTH // 2, axis=1) * np.sqrt(2)
    dense = dict(
        kernel_init=nn.initializers.variance_scaling(w**2, "fan_in", "normal"),
        bias_init=nn.initializers.normal(SIGMA_B),
    )
    layers = [nn.Dense(WIDTH, **dense)]
    for _ in range(DEPTH - 1):
        layers += [jnp.tanh, nn.Dense(WIDTH, **dense)]
    found = ij.measure(nn.Sequential(layers), jnp.asarray(x, jnp.float32), key=jax.random.key(0), seeds=SEEDS)
    layer = np.arange(1, DEPTH + 1)
    c, error = found.correlation[:, 0, 1], found.correlation_error[:, 0, 1]
    left.plot(layer, path.c, color=colour)
    left.errorbar(layer, c, error, fmt="o", ms=3, color=colour, label=name)
    logs = np.log10(found.gradient_samples[:, :, 0])
    mean, spread = logs.mean(0), logs.std(0, ddof=1) / np.sqrt(SEEDS)
    right.plot(layer, path.log_gradient / np.log(10), color=colour)
    right.errorbar(layer, mean - mean[-1], spread, fmt="o", ms=3, color=colour, label=name)
    deviations[name] = (
        np.max(np.abs(c - path.c) / (error + layer / WIDTH)),
        np.max(np.abs(mean - mean[-1] - path.log_gradient / np.log(10)) / (spread + 3 * (DEPTH - layer + 1) / WIDTH)),
    )
left.set(xlabel="layer", ylabel="correlation of two inputs", title=f"tanh, width {WIDTH}; lines: predicted")
right.set(xlabel="layer", ylabel="log10 of squared gradient over the last")
left.legend()
_ = right.legend()

# %%
for name, (signal, gradient) in deviations.items():
    print(f"{name}: largest deviation in units of (standard error + O(depth / width)): {signal:.2f}, {gradient:.2f}")

# %% [markdown]
# ## What would have falsified it
#
# Correlations or gradients that leave the predicted curves by more than their standard errors and the corrections of
# order depth / width; a critical network in which either settles exponentially; two inputs that stay apart in the
# ordered phase beyond a few $\xi_c$.

# %%
assert all(value < 4 for pair in deviations.values() for value in pair)
