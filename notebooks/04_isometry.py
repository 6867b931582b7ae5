# %% [markdown]
# # Is a mean gain of one enough?
#
# He and orthogonal initialization both keep the mean square of a signal. Training cares about every direction: how far
# do the singular values of the input-output Jacobian spread around that mean, and which choice of weights and
# activation keeps them together?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import initjax as ij

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
N, DRAWS = (100, 6) if SMALL else (300, 24)
DEPTH = 8

# %% [markdown]
# ## Prediction
#
# At criticality the squared singular values have mean 1 and variance $L(\mu_2/\mu_1^2 - 1 - s_1)$, with
# $\mu_k = E\,\phi'^{2k}$ and $s_1 = -1$ for Gaussian, 0 for orthogonal weights. For L = 8: linear 8 and 0, relu 16 and
# 8. Relu is never isometric; tanh with orthogonal weights can be, at small q.

# %%
cases = {
    "linear, Gaussian": (lambda x: x, 1.0, 0.0, "gaussian"),
    "linear, orthogonal": (lambda x: x, 1.0, 0.0, "orthogonal"),
    "relu, Gaussian": (jax.nn.relu, 2**0.5, 0.0, "gaussian"),
    "relu, orthogonal": (jax.nn.relu, 2**0.5, 0.0, "orthogonal"),
    "tanh, orthogonal": (jnp.tanh, float(ij.critical(jnp.tanh, 0.05).sigma_w), 0.05, "orthogonal"),
}
predicted = {}
for name, (phi, w, b, weights) in cases.items():
    predicted[name] = ij.jacobian_spectrum(phi, w, b, depth=DEPTH, weights=weights)
    print(f"{name}: mean {predicted[name].mean:.3f}, variance {predicted[name].variance:.3f}")

# %% [markdown]
# ## Measurement


# %%
def squared_singular_values(name, seed):
    phi, w, b, weights = cases[name]
    rng = np.random.default_rng(seed)
    draw = {"gaussian": lambda: rng.normal(size=(N, N)) / np.sqrt(N)}.get(
        weights, lambda: np.linalg.qr(rng.normal(size=(N, N)))[0]
    )
    slope = {jax.nn.relu: lambda h: (h > 0) * 1.0, jnp.tanh: lambda h: 1 / np.cosh(h) ** 2}.get(phi, np.ones_like)
    q = float(ij.critical(jnp.tanh, b).q) if b else 1.0
    h, jacobian = rng.normal(size=N) * np.sqrt(q), np.eye(N)
    for _ in range(DEPTH):  # diag(phi') W from layer to layer, at the fixed point of q
        matrix = w * draw()
        jacobian = slope(h)[:, None] * jacobian
        jacobian = matrix @ jacobian
        h = matrix @ np.asarray(phi(h)) + b * rng.normal(size=N)
    return np.linalg.svd(jacobian, compute_uv=False) ** 2


figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
deviation = {}
colours = dict(zip(cases, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73"), strict=True))
for number, name in enumerate(cases):
    draws = np.stack([squared_singular_values(name, seed) for seed in range(DRAWS)])
    variance = draws.var(1) / draws.mean(1) ** 2  # the mean of one network is itself random, by L / n
    error = variance.std(ddof=1) / np.sqrt(DRAWS)
    deviation[name] = abs(variance.mean() - predicted[name].variance) / (
        error + predicted[name].variance * DEPTH / N + 1e-9
    )
    axes[0].errorbar(number, variance.mean(), error, fmt="o", color=colours[name])
    axes[0].plot([number - 0.3, number + 0.3], [predicted[name].variance] * 2, color=colours[name])
    print(f"{name}: variance {variance.mean():.3f}({error:.3f}), predicted {predicted[name].variance:.3f}")
    if name in ("relu, Gaussian", "relu, orthogonal", "tanh, orthogonal"):
        values = np.sort(draws.ravel())
        tail = 1 - np.arange(1, values.size + 1) / values.size
        keep = np.unique(np.geomspace(1, values.size - 1, 60).astype(int))
        axes[1].plot(values[-keep], tail[-keep], "o", ms=3, color=colours[name], label=f"{name}, {DRAWS} networks")
        spectrum = predicted[name]
        order = np.argsort(spectrum.eigenvalue)
        above = np.cumsum(spectrum.mass[order][::-1])[::-1]
        axes[1].plot(spectrum.eigenvalue[order], above, color=colours[name])
axes[0].set(ylabel="variance of squared singular values", xticks=range(len(cases)))
axes[0].set_xticklabels([name.replace(", ", "\n") for name in cases], fontsize=8)
axes[0].set_title("bars: predicted; points: measured", fontsize=9)
axes[1].set(xlabel="squared singular value", ylabel="share above it", xscale="log", yscale="log")
axes[1].set(xlim=(1e-2, 40), ylim=(2e-4, 1.2))
_ = axes[1].legend(fontsize=8)

# %% [markdown]
# ## What would have falsified it
#
# A measured variance away from $L(\mu_2/\mu_1^2 - 1 - s_1)$ by more than its error and corrections of order L/n; an
# orthogonal linear network with any spread at all; relu with orthogonal weights as narrow as tanh. A mean of 1 is all
# that He or Xavier promise, and does not tell these networks apart.

# %%
assert all(value < 5 for value in deviation.values())
