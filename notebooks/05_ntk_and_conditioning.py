# %% [markdown]
# # Does criticality condition the tangent kernel well?
#
# The condition number of the NTK says how much slower the slowest direction of the training set is learnt than the
# fastest. Folklore has it that criticality is best. Is it, and what does depth do in each phase?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import conditioning

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
WIDTH, SEEDS, DEPTHS = (128, 3, (2, 6)) if SMALL else (384, 5, (2, 4, 8, 12))
N, SIGMA_B = 6, 0.05**0.5

# %% [markdown]
# ## Prediction
#
# Six inputs with equal correlations 0.5, tanh, three weight variances. Ordered: $\kappa \sim \chi^{-l}/l$, no end.
# Critical: $\kappa \to (N+2)/2 = 4$. Chaotic: $\kappa \to 1$, since inputs tell nothing about each other any more:
# chaos is conditioned best, and predicts nothing.

# %%
scales = {"ordered": 0.8**0.5, "critical": float(ij.critical(jnp.tanh, SIGMA_B).sigma_w), "chaotic": 4.0**0.5}
predicted = {name: conditioning.by_depth(jnp.tanh, w, SIGMA_B, depth=64, n=N) for name, w in scales.items()}
for name, found in predicted.items():
    print(f"{name}: chi = {found.chi:.4f}, kappa at depth 16 is {found.ntk[15]:.4g}, at 64 {found.ntk[63]:.4g}")
    limit, rate, power = found.ntk_law
    print(f"    law: limit {limit:g}, rate {rate:.4f} per layer, power of the depth {power:g}")

# %% [markdown]
# ## Measurement
#
# Tangent kernels of drawn networks, each leaf weighted with its variance (NTK parameterization), on inputs whose first
# pre-activations have the second moment q* and correlation 0.5.


# %%
def measured(name, depth):
    """log kappa of the kernel averaged over networks: the kernel has a limit, kappa of one draw is biased upwards."""
    w, q = scales[name], float(ij.fixed_point(jnp.tanh, scales[name], SIGMA_B).q)
    square, product = (q - SIGMA_B**2) / w**2, (0.5 * q - SIGMA_B**2) / w**2
    gram = product + (square - product) * np.eye(N)
    values, vectors = np.linalg.eigh(gram)
    x = jnp.asarray(vectors * np.sqrt(np.maximum(values, 0) * N), jnp.float32)
    dense = dict(
        kernel_init=nn.initializers.variance_scaling(w**2, "fan_in", "normal"),
        bias_init=nn.initializers.normal(SIGMA_B),
    )
    layers = []
    for _ in range(depth - 1):
        layers += [nn.Dense(WIDTH, **dense), jnp.tanh]
    model = nn.Sequential([*layers, nn.Dense(8, **dense)])
    ntk_fn = ij.empirical_ntk(model, by_leaf=True)
    kernels = []
    for key in jax.random.split(jax.random.key(depth), SEEDS):
        params = model.init(key, x)["params"]
        parts = ntk_fn(params, x)
        total = np.zeros((N, N))
        for path, part in parts.items():
            fan = N if "layers_0/" in path else WIDTH
            total += np.asarray(part, float) * (SIGMA_B**2 if path.endswith("bias") else w**2 / fan)
        kernels.append(total)
    kernels = np.stack(kernels)
    off = ~np.eye(N, dtype=bool)
    diagonal, away = kernels[:, ~off].mean(1), kernels[:, off].mean(1)  # all inputs are alike: means over entries
    log = lambda d, o: np.log((d + (N - 1) * o) / (d - o))  # noqa: E731
    left_out = [log(np.delete(diagonal, i).mean(), np.delete(away, i).mean()) for i in range(SEEDS)]
    return log(diagonal.mean(), away.mean()), np.sqrt((SEEDS - 1) * np.var(left_out))  # jackknife


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
worst = []
for (name, found), colour in zip(predicted.items(), ("#0072B2", "#009E73", "#D55E00"), strict=True):
    points = np.array([measured(name, depth) for depth in DEPTHS])
    axes.plot(found.depth[:20], found.log_ntk[:20] / np.log(10), color=colour)
    axes.errorbar(DEPTHS, points[:, 0] / np.log(10), points[:, 1] / np.log(10), fmt="o", color=colour, label=f"{name}")
    theory = found.log_ntk[np.array(DEPTHS) - 1]
    worst.append(np.max(np.abs(points[:, 0] - theory) / (points[:, 1] + np.array(DEPTHS) / WIDTH)))
axes.axhline(np.log10(predicted["critical"].ntk_law.limit), color="0.6", ls="--", lw=0.8, label="(N + 2) / 2")
axes.set(xlabel="depth (weight layers)", ylabel="log10 condition number of the NTK")
axes.set_title(f"tanh, N = {N}; lines: predicted; points: {SEEDS} networks of width {WIDTH}", fontsize=9)
_ = axes.legend()

# %%
print("largest deviations, in units of (standard error + depth / width):", np.round(worst, 2))
deep = conditioning.by_depth(jnp.tanh, scales["ordered"], SIGMA_B, depth=2000, n=N)
print(f"ordered, depth 128: {deep.ntk[127]:.3g}; depth 2000: 10^{deep.log_ntk[-1] / np.log(10):.1f}, still positive")

# %% [markdown]
# ## What would have falsified it
#
# Condition numbers of drawn networks away from the lines by more than their errors and O(depth/width); an ordered
# network that is conditioned better than a critical one; a critical one whose condition number grows with depth.

# %%
assert max(worst) < 5
assert deep.ntk[127] > 1e20
