# %% [markdown]
# # Do skip connections keep signals stable?
#
# "The skip connection lets signals and gradients pass" is true of what passes, and says nothing about what each branch
# adds. How much do L blocks make signals and gradients grow, and what happens in the first steps if branches start at
# zero?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

from initjax.applications import residual

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
WIDTH, SEEDS, DEPTHS = (64, 8, (2, 6)) if SMALL else (256, 24, (1, 2, 4, 8, 12))

# %% [markdown]
# ## Prediction
#
# With independent, variance-preserving branches, $x + \alpha F(x)$ multiplies second moments and squared gradients by
# $1 + \alpha^2$ in each block: $2^L$ for $\alpha = 1$, at most e for $\alpha = L^{-1/2}$, 1 for $\alpha = 0$. In the
# last case the branch kernels have a gradient of exactly zero in the first step; the gain in front of them moves first.

# %%
rules = {"alpha = 1": lambda L: 1.0, "alpha = L$^{-1/2}$": lambda L: L**-0.5, "alpha = 0": lambda L: 0.0}
for name, alpha in rules.items():
    print(f"{name}: growth through 12 blocks {residual.growth(12, alpha(12)):.4g}")

# %% [markdown]
# ## Measurement 1: growth


# %%
class Net(nn.Module):
    blocks: int
    alpha: float

    @nn.compact
    def __call__(self, x):
        he = nn.initializers.he_normal()
        for i in range(self.blocks):
            gain = self.param(f"gain{i}", nn.initializers.constant(self.alpha), ())
            x = x + gain * nn.Dense(WIDTH, use_bias=False, kernel_init=he, name=f"branch{i}")(nn.relu(x))
        return nn.Dense(1, use_bias=False, name="head")(x)


x = jax.random.normal(jax.random.key(0), (8, WIDTH))
figure, left = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
worst = 0.0
for (name, alpha), colour in zip(rules.items(), ("#D55E00", "#009E73", "#0072B2"), strict=True):
    found = [residual.report(Net(L, alpha(L)), x, key=jax.random.key(L), seeds=SEEDS) for L in DEPTHS]
    line = np.arange(1, max(DEPTHS) + 1)
    left.plot(line, [residual.growth(int(L), alpha(L)) for L in line], color=colour)
    for shift, marker, attribute, what in (
        (-0.08, "o", "growth_measured", "signal"),
        (0.08, "s", "gradient_growth_measured", "gradient"),
    ):
        mean, error = np.array([getattr(one, attribute) for one in found]).T
        left.errorbar(np.array(DEPTHS) + shift, mean, error, fmt=marker, ms=4, color=colour, label=f"{name}, {what}")
        theory = np.array([residual.growth(L, alpha(L)) for L in DEPTHS])
        worst = max(worst, np.max(np.abs(mean - theory) / (error + theory * np.array(DEPTHS) / WIDTH)))
    print(name, found[-1])
left.set(xlabel="number of blocks L", ylabel="growth of the second moment", yscale="log")
left.set_title(f"lines: (1 + alpha$^2$)$^L$; points: {SEEDS} networks of width {WIDTH}", fontsize=9)
_ = left.legend(fontsize=7)

# %% [markdown]
# ## Measurement 2: the first steps with zero gains

# %%
model = Net(4, 0.0)
params = model.init(jax.random.key(1), x)["params"]
y = jnp.sin(x[:, :1])
step = jax.jit(jax.value_and_grad(lambda p: 0.5 * jnp.mean((model.apply({"params": p}, x) - y) ** 2)))
kernels, gains = [], []
for _ in range(8):
    _, gradient = step(params)
    kernels.append([float(jnp.abs(gradient[f"branch{i}"]["kernel"]).max()) for i in range(4)])
    gains.append([float(jnp.abs(gradient[f"gain{i}"])) for i in range(4)])
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
kernels, gains = np.array(kernels), np.array(gains)
figure, right = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
right.plot(gains.mean(1), "s-", color="#009E73", label="gains")
right.plot(kernels.mean(1), "o-", color="#D55E00", label="branch kernels: exactly 0 at step 0")
right.set(xlabel="step of gradient descent", ylabel="largest gradient entry, mean over blocks", title="zero gains")
right.set_yscale("symlog", linthresh=1e-3)
_ = right.legend()
print("largest kernel gradient at steps 0, 1, 2:", kernels.max(1)[:3])
print("silent at step 0:", residual.report(model, x, key=jax.random.key(2), seeds=2).silent)

# %% [markdown]
# ## What would have falsified it
#
# Growth of signals or gradients away from $(1+\alpha^2)^L$ by more than the standard error and O(L/width); a branch
# kernel that moves in the first step behind a zero gain, or one that does not in the second.

# %%
assert worst < 5
assert np.all(kernels[0] == 0) and np.all(gains[0] > 0) and np.all(kernels[1] > 0)
