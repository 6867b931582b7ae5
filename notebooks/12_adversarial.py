# %% [markdown]
# # Does a larger initialization make a network easier to fool?
#
# Folklore: multiplying all variances by alpha multiplies the input gradient by alpha^(L/2). When is that so, and does
# the gradient at initialization still matter once the network is trained?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

from initjax.applications import adversarial
from initjax.demo.data import load

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
DRAWS, SEEDS, STEPS, EXAMPLES = (8, 1, 60, 300) if SMALL else (100, 3, 250, 800)
digits = load()
x = digits.x_train[:4]


def network(phi, layers, out):
    parts = [part for _ in range(layers - 1) for part in (nn.Dense(64, use_bias=False), phi)]
    return nn.Sequential([*parts, nn.Dense(out, use_bias=False)])


# %% [markdown]
# ## Prediction: a power of alpha for relu, chi(alpha) for tanh
#
# |\nabla f|^2$ is the product of all chi. For relu without biases it is homogeneous: alpha^(L/2) exactly, L = 6
# matrices with the readout. For tanh each layer contributes $\chi(q^*(\alpha))$, which grows far more slowly.

# %%
alphas = np.array([0.5, 1.0, 2.0, 4.0])
scaling = {
    "relu": adversarial.alpha_scaling(network(nn.relu, 6, 1), x, alphas, draws=DRAWS),
    "tanh": adversarial.alpha_scaling(network(jnp.tanh, 6, 1), x, alphas, draws=DRAWS),
}
for name, found in scaling.items():
    print(name, "predicted", found.predicted.round(3), "alpha^(L/2)", found.power_law.round(3))

# %% [markdown]
# ## Measurement: random networks, then trained ones under attack

# %%
train = digits.x_train[:EXAMPLES], digits.y_train[:EXAMPLES]
test = digits.x_test[:300], digits.y_test[:300]
trained = adversarial.attack(
    network(jnp.tanh, 3, 10),
    train,
    test,
    (0.25, 1.0, 4.0, 16.0),
    size=0.1,
    key=jax.random.key(1),
    seeds=SEEDS,
    steps=STEPS,
)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, found), color in zip(scaling.items(), ("#0072B2", "#D55E00"), strict=True):
    left.plot(alphas, found.predicted, color=color, label=f"{name}: predicted")
    left.errorbar(
        alphas, found.measured, 2 * found.standard_error, fmt="o", ms=4, color=color, label=f"{name}: {DRAWS} draws"
    )
left.plot(alphas, scaling["tanh"].power_law, color="0.6", ls="--", lw=1, label="alpha^(L/2)")
left.set(xscale="log", yscale="log", xlabel="alpha (factor on all variances)", ylabel="growth of |grad f|")
left.legend(fontsize=7)
turned = 1 - trained.attacked / trained.accuracy
spread = turned.std(1) / np.sqrt(SEEDS) if SEEDS > 1 else np.zeros(len(turned))
right.errorbar(
    trained.initial, turned.mean(1), 2 * spread, fmt="o-", ms=4, color="#D55E00", label=f"FGSM, {SEEDS} networks"
)
for alpha, a, b in zip(trained.alpha, trained.initial, turned.mean(1), strict=True):
    right.annotate(f"alpha = {alpha:g}", (a, b), fontsize=7, xytext=(4, -9), textcoords="offset points")
right.set(
    xscale="log", xlabel="|grad f| at initialization, predicted (per unit of x)", ylabel="share of right answers turned"
)
right.set_title(f"digits, tanh, attack of {trained.size} a pixel", fontsize=9)
_ = right.legend(fontsize=8)
print("test accuracy", trained.accuracy.mean(1).round(3), "under attack", trained.attacked.mean(1).round(3))
print(f"correlation with the gradient at initialization {trained.correlation:.2f}, ", end="")
print(
    f"with that of the trained network {trained.correlation_trained:.2f}; error at zero {trained.correlation_error:.2f}"
)

# %% [markdown]
# ## What would have falsified it
#
# A relu draw off alpha^(L/2) by more than rounding; a tanh network on that line instead of its own; no correlation,
# over networks, of the share of answers turned with the gradients.

# %%
relu, tanh = scaling["relu"], scaling["tanh"]
assert np.allclose(relu.measured, relu.power_law, rtol=1e-4) and relu.homogeneous and not tanh.homogeneous
assert (np.abs(tanh.measured - tanh.predicted) < 5 * tanh.standard_error + 0.1 * tanh.predicted).all()
assert max(trained.correlation, trained.correlation_trained) > 0
