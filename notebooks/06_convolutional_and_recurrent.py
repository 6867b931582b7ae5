# %% [markdown]
# # Does the right fan make convolutional and recurrent networks keep their signals?
#
# He and LeCun initialization divide by the fan of a weight. A convolution with zero padding sums over fewer inputs at
# its borders, and a recurrent cell with one kernel on [x, h] counts the inputs in the fan of its memory. What is lost?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import recurrent

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
SEEDS = 40 if SMALL else 300

# %% [markdown]
# ## Prediction 1: zero padding loses energy at the borders
#
# The second moment at each position after L layers is $A^L 1$ with the tridiagonal A of ones/3 in each direction, whose
# rows at the border add up to 2/3: images of 8 x 8 keep 35 % after ten layers, circular padding keeps all.

# %%
H, DEPTH = 8, 10
share = np.full((3, 3), 1 / 9)
predicted = np.array([ij.layers.padding_gain(share, (H, H), depth).mean() for depth in range(DEPTH + 1)])
corner = ij.layers.padding_gain(share, (H, H), DEPTH)[0, 0]
print(f"kept after {DEPTH} layers: {predicted[-1]:.4f} on average, {corner:.4f} in the corner")

# %% [markdown]
# ## Measurement 1


# %%
def convolutions(padding):
    layer = dict(padding=padding, use_bias=False, kernel_init=nn.initializers.lecun_normal())
    return nn.Sequential([nn.Conv(24, (3, 3), **layer) for _ in range(DEPTH)])


figure, left = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
kept = {}
for padding, colour in (("SAME", "#0072B2"), ("CIRCULAR", "#D55E00")):
    found = ij.measure(convolutions(padding), jnp.ones((1, H, H, 24)), key=jax.random.key(0), seeds=SEEDS)
    samples = found.q_samples[:, :, 0]
    mean, error = samples.mean(0), samples.std(0, ddof=1) / np.sqrt(SEEDS)
    kept[padding] = mean[-1], error[-1]
    left.errorbar(np.arange(1, DEPTH + 1), mean, error, fmt="o", color=colour, label=padding)
left.plot(predicted, color="#0072B2")
left.plot([0, DEPTH], [1, 1], color="#D55E00")
left.set(xlabel="layer", ylabel="second moment, mean over positions", title=f"linear convolutions on {H} x {H}")
_ = left.legend()
print("measured:", {name: f"{m:.4f}({e:.4f})" for name, (m, e) in kept.items()})

# %% [markdown]
# ## Prediction 2: one kernel for input and state keeps the scale and forgets
#
# Linear units, 64 inputs, 192 states, $\sigma_w^2 = 1$ over the fan of both: second moment 1, but gradients through T
# steps keep $0.75^T$. Scaled by its own fan the recurrent kernel would keep them, and the state would grow with time.

# %%
STEPS = np.arange(0, 13, 2)
cell = recurrent.memory(lambda x: x, hidden=192, inputs=64)
print(f"q = {cell.q:.4f}, gain per step {cell.gain:.4f}, horizon {cell.horizon:.2f} steps")
for v in (0.0, 0.25, 1.0):
    print(f"tanh, input variance {v}: critical recurrent variance {recurrent.critical(jnp.tanh, v).variance:.5f}")

# %% [markdown]
# ## Measurement 2


# %%
@jax.jit
@jax.vmap
def draw(key):
    first, second, third = jax.random.split(key, 3)
    w = jax.random.normal(first, (256, 192)) / 16
    x = jax.random.normal(second, (40, 64))
    step = lambda h, x: (jnp.concatenate([x, h]) @ w, None)  # noqa: E731
    settled = jax.lax.scan(step, jnp.zeros(192), x)[0]
    back = lambda g, _: (g @ w[64:].T, jnp.mean(g**2))  # noqa: E731
    _, squares = jax.lax.scan(back, jax.random.normal(third, (192,)), length=13)
    return jnp.mean(settled**2), squares / squares[0]


q, squares = (np.asarray(a, float) for a in draw(jax.random.split(jax.random.key(1), SEEDS)))
mean, error = squares.mean(0)[STEPS], squares.std(0, ddof=1)[STEPS] / np.sqrt(SEEDS)
figure, right = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
right.errorbar(STEPS, mean, error, fmt="o", color="#D55E00", label=f"measured, {SEEDS} cells")
right.plot(STEPS, cell.rho**STEPS, color="#0072B2", label="predicted, 0.75$^T$")
right.set(xlabel="time steps T", ylabel="squared gradient through T steps", yscale="log", title="one kernel on [x, h]")
_ = right.legend()
print(f"measured: q = {q.mean():.3f}({q.std() / np.sqrt(SEEDS):.3f}), kept in 10 steps {mean[5]:.5f}({error[5]:.5f})")

# %% [markdown]
# ## What would have falsified it
#
# A SAME-padded network that keeps more than $A^L 1$, or a circular one that loses anything beyond its standard error; a
# cell whose gradients outlive $\rho^T$ with the combined fan; a critical recurrent variance that does not grow with the
# input.

# %%
assert abs(kept["SAME"][0] - predicted[-1]) < 4 * kept["SAME"][1]
assert abs(kept["CIRCULAR"][0] - 1) < 4 * kept["CIRCULAR"][1]
assert abs(mean[5] - cell.kept) < 4 * error[5] + 0.02 * cell.kept  # tied weights: corrections of order T^2 / n
