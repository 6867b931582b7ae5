# %% [markdown]
# # Do steep tasks call for a saturated initialization?
#
# Let gradient descent choose the weight scale from which one step adapts best (MAML). It is said that steep tasks drive
# it into saturation. Is that so, and for which layers?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

from initjax.applications import meta

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
STEPS, SEEDS, WIDTH = (30, 1, 32) if SMALL else (250, 2, 32)
curvatures = (0.3, 30.0) if SMALL else (0.3, 3.0, 10.0, 30.0)


class Net(nn.Module):
    """f = v . tanh(W x) / sqrt(n), so that inner rates do not depend on the width."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        h = jnp.tanh(nn.Dense(WIDTH, use_bias=False, kernel_init=normal, name="hidden")(x))
        return nn.Dense(1, use_bias=False, kernel_init=normal, name="readout")(h) / np.sqrt(WIDTH)


def task(key):
    phase_key, angle_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (16,), maxval=2 * jnp.pi)
    x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    y = jnp.sin(angle + jax.random.uniform(phase_key, (), maxval=2 * jnp.pi))[:, None]
    return x[:8], y[:8], x[8:], y[8:]


# %% [markdown]
# ## Prediction: opposite signs
#
# The kernel of adaptation is $\Theta = E\phi^2 + \sigma_v^2 (x\cdot x')\,E\phi'^2$. One step of rate $\eta$ on $\kappa$
# MSE/2 is best at $\eta\kappa\lambda(\Theta) = 1$. If only the hidden layer adapts, saturation lowers \phi'^2$: sigma
# rises with kappa. On the circle the inputs' second moment is 1/2 along each axis, so that the kernel's eigenvalue is
# \phi'^2/2$: the readable estimate below. If all layers adapt, saturation raises the first block: the only brake is a
# smaller sigma, which must fall.

# %%
grid = np.geomspace(0.3, 40, 60)
estimate = np.array([meta.one_point_scale(jnp.tanh, kappa / 2, rate=0.3) for kappa in grid])
print("hidden alone, on the circle:", {k: round(meta.one_point_scale(jnp.tanh, k / 2), 2) for k in curvatures})
print("all layers, sigma that fits one point:", {k: meta.one_point_scale(jnp.tanh, k, adapt="all") for k in curvatures})

# %% [markdown]
# ## Measurement

# %%
designs = {"hidden": dict(adapt="hidden", learn="hidden"), "all": dict(adapt="all", learn="all", shared=True)}
runs = {
    (name, kappa): [
        meta.learn_init(task, Net(), key=jax.random.key(seed), curvature=kappa, meta_steps=STEPS, **design)
        for seed in range(SEEDS)
    ]
    for name, design in designs.items()
    for kappa in curvatures
}
learned = {key: np.array([next(iter(r.scales.values())) for r in group]) for key, group in runs.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, color in zip(designs, ("#D55E00", "#0072B2"), strict=True):
    mean = np.array([learned[name, k].mean() for k in curvatures])
    spread = np.array([np.ptp(learned[name, k]) / 2 for k in curvatures])
    left.errorbar(curvatures, mean, spread, fmt="o-", ms=4, color=color, label=f"{name} adapting")
    for kappa in (curvatures[0], curvatures[-1]):
        history = next(iter(runs[name, kappa][0].history.values()))
        right.plot(history, color=color, ls="-" if kappa > 1 else ":", label=f"{name}, kappa = {kappa:g}")
left.plot(grid, np.where(estimate > 0, estimate, np.nan), color="0.4", lw=1, label="hidden: eta kappa E phi'^2 / 2 = 1")
left.axhline(1, color="0.7", lw=0.8)
left.set(xscale="log", yscale="log", xlabel="curvature kappa of the tasks", ylabel="learned sigma / initial sigma")
left.set_title(f"bars: range over {SEEDS} runs", fontsize=9)
left.legend(fontsize=7)
right.set(yscale="log", xlabel="meta step", ylabel="sigma / initial sigma")
_ = right.legend(fontsize=7)
for key, value in learned.items():
    print(*key, value.round(3))

# %% [markdown]
# ## What would have falsified it
#
# A hidden scale that does not rise with kappa; or one that falls where all layers adapt and $\eta\kappa > 1$ turning
# upwards instead. The claim "steep tasks want saturation" holds only for the first design, and exceeds the initial
# scale only for the steepest family.

# %%
if not SMALL:
    low, high = (learned["hidden", k].mean() for k in (0.3, 30.0))
    assert low < 0.2 and high > 1.0
    assert learned["all", 30.0].mean() < learned["all", 10.0].mean()
