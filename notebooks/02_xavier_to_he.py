# %% [markdown]
# # What do Xavier and He initialization keep, and where?
#
# Xavier's variance 2/(fan_in + fan_out) is said to keep signals forward and gradients backward, He's 2/fan_in to do the
# same for relu, and tanh networks under Xavier to lose their gradients. Which of this is true, in which layer, and how
# fast is it lost where it is not?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import signal

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
SEEDS = 8 if SMALL else 48
DEPTH = 6 if SMALL else 24

# %% [markdown]
# ## Prediction
#
# Between layers that are not square Xavier multiplies second moments by 2 fan_in/(fan_in + fan_out) forward and
# 2 fan_out/(fan_in + fan_out) backward: in a net that narrows from 512 to 32 every layer gains 4/3 forward and loses a
# factor 2/3 backward. Square relu layers under Xavier halve the second moment, $2^{-l}$; He keeps it. Square tanh
# layers under Xavier lose it as a power, $q_l \approx 1/(2l)$, and not exponentially.

# %%
widths = [512, 256, 128, 64, 32]
taper = signal.xavier_report(widths)
print("forward per layer ", taper.forward.round(4), " q of each layer", taper.q.round(3))
print("backward per layer", taper.backward.round(4), " gradient at each layer", taper.gradient.round(3))
n = 256
square = {
    "relu, Xavier": (nn.relu, nn.initializers.glorot_normal(), signal.xavier_report([n] * (DEPTH + 1), nn.relu).q),
    "relu, He": (nn.relu, nn.initializers.he_normal(), ij.propagate(nn.relu, 2**0.5, 0.0, DEPTH - 1, q0=2.0).q),
    "tanh, Xavier": (jnp.tanh, nn.initializers.glorot_normal(), signal.xavier_report([n] * (DEPTH + 1), jnp.tanh).q),
}
for name, (_, _, q) in square.items():
    print(f"{name}: q of layer {DEPTH} is {q[-1]:.3g}")

# %% [markdown]
# ## Measurement


# %%
def network(sizes, phi, init):
    layers = [nn.Dense(sizes[0], use_bias=False, kernel_init=init)]
    for size in sizes[1:]:
        layers += [phi, nn.Dense(size, use_bias=False, kernel_init=init)]
    return nn.Sequential(layers)


def over_networks(samples):
    """Mean and standard error of (networks, layers) samples."""
    return samples.mean(0), samples.std(0, ddof=1) / np.sqrt(len(samples))


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
linear = network(widths[1:], lambda x: x, nn.initializers.glorot_normal())
found = ij.measure(linear, jnp.ones((1, 512)), key=jax.random.key(0), seeds=4 * SEEDS)
worst = []
entry = found.gradient_samples[:, :, 0] * widths[-1] / np.array(widths[1:])  # of one unit, not of all of a layer
for samples, theory, colour, name in (
    (found.q_samples[:, :, 0], taper.q, "#0072B2", "signal"),
    (entry, taper.gradient, "#D55E00", "gradient"),
):
    mean, error = over_networks(samples)
    left.plot(np.arange(1, 5), theory, color=colour, label=f"{name}, predicted")
    left.errorbar(np.arange(1, 5), mean, error, fmt="o", color=colour, label=f"{name}, {4 * SEEDS} networks")
    worst += [np.max(np.abs(mean - theory) / np.maximum(error, 1e-9 * theory))]
left.set(xlabel="layer", ylabel="second moment", xticks=[1, 2, 3, 4], title="linear, widths 512-256-128-64-32, Xavier")
left.legend(fontsize=8)
for (name, (phi, init, theory)), colour in zip(square.items(), ("#0072B2", "#009E73", "#D55E00"), strict=True):
    found = ij.measure(network([n] * DEPTH, phi, init), jnp.ones((1, n)), key=jax.random.key(1), seeds=SEEDS)
    mean, error = over_networks(found.q_samples[:, :, 0])
    layer = np.arange(1, DEPTH + 1)
    right.plot(layer, theory, color=colour)
    right.errorbar(layer, mean, error, fmt="o", ms=3, color=colour, label=name)
    # the mean over networks has corrections of order depth / width beside its standard error
    worst.append(np.max(np.abs(mean - theory) / (error + theory * layer / n)))
right.plot(layer, 1 / (2 * layer), color="0.6", ls="--", label="1 / (2 l)")
right.set(xlabel="layer l", ylabel="second moment q of a pre-activation", yscale="log", xscale="log")
right.set_title(f"square layers of width {n}; lines: predicted")
_ = right.legend(fontsize=8)

# %%
print("largest deviation from the prediction, in standard errors:", np.round(worst, 2))

# %% [markdown]
# ## What would have falsified it
#
# A signal or gradient in the narrowing net more than a few standard errors from the products of the factors above; a
# relu net under Xavier that does not halve; a tanh net whose second moment falls exponentially instead of as 1/(2l).
# "Xavier keeps the variance" is right for square linear layers, and for no others.

# %%
assert max(worst) < 5
assert abs(2 * 1000 * ij.propagate(jnp.tanh, 1.0, 0.0, 1000).q[-1] - 1) < 0.01
