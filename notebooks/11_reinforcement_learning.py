# %% [markdown]
# # Does an optimistic network explore like an optimistic table?
#
# A greedy agent whose Q starts above every possible value tries each action at least once, if Q is a table. What bias
# does a network need, and how much of the guarantee survives?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import rl

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
NETWORKS, STEPS = (8, 200) if SMALL else (32, 800)
LENGTH, GAMMA = 12, 0.9
environment = rl.chain(LENGTH)
table_states = jnp.eye(LENGTH)
line_states = jnp.linspace(-1, 1, LENGTH)[:, None]
small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
table = nn.Dense(2, use_bias=False, kernel_init=small)
network = nn.Sequential(
    [nn.Dense(128, kernel_init=nn.initializers.he_normal()), nn.relu, nn.Dense(2, kernel_init=small)]
)

# %% [markdown]
# ## Prediction: the bias, and where an update goes
#
#  = V_{max} + z\sqrt{\max_s K(s, s)}$ keeps Q above {max} = 1/(1-\gamma)$. An update at s moves s' by
# $\Theta(s', s)/\Theta(s, s)$: not at all in the table, by much in the network, whose bias lifts and lowers all states
# together. So the table should try everything, and the network should lose its optimism before it does.

# %%
kernels = {"table": ij.kernel_fn(table, table_states), "network": ij.kernel_fn(network, line_states)}
states = {"table": table_states, "network": line_states}
bias = {
    name: rl.optimistic_bias(r_max=1.0, gamma=GAMMA, kernel_fn=kernel, states=states[name], z=3.0)
    for name, kernel in kernels.items()
}
leak = {name: rl.leakage(kernel, states[name]) for name, kernel in kernels.items()}
for name in kernels:
    print(f"{name:8} b0 = {bias[name].bias:.2f}, mean leakage {leak[name].mean:.2f}")

# %% [markdown]
# ## Measurement: one step, then exploration

# %%
middle = LENGTH // 2


@jax.jit
def one_step(key):
    params = network.init(key, line_states)
    value = lambda p, s: network.apply(p, s[None])[0, 0]  # noqa: E731
    grads = jax.vmap(jax.grad(value), (None, 0))(params, line_states)
    flat = jnp.concatenate([g.reshape(LENGTH, -1) for g in jax.tree.leaves(grads)], 1)
    return flat @ flat[middle] / jnp.sum(flat[middle] ** 2)


steps = np.asarray(jax.vmap(one_step)(jax.random.split(jax.random.key(0), 64)))
models = {"table": table, "network": network}
seen = {
    (name, label): rl.explore(
        models[name],
        states[name],
        environment,
        key=jax.random.key(1),
        bias=b,
        networks=NETWORKS,
        steps=STEPS,
        gamma=GAMMA,
    )
    for name in models
    for label, b in (("b0 optimistic", bias[name].bias), ("b0 = 0", 0.0))
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
at = np.arange(LENGTH)
left.plot(at, leak["network"].matrix[middle], color="#0072B2", label="network: predicted")
left.errorbar(at, steps.mean(0), steps.std(0), fmt="o", ms=4, color="#D55E00", label="64 networks, one std")
left.step(at, leak["table"].matrix[middle], where="mid", color="0.5", lw=1, label="table")
left.set(xlabel="state", ylabel="change of Q over change at the updated state")
left.legend(fontsize=8)
colors = {"table": "#0072B2", "network": "#D55E00"}
for (name, label), one in seen.items():
    style = "-" if "optimistic" in label else ":"
    mean, error = one.coverage.mean(0), one.coverage.std(0) / np.sqrt(NETWORKS)
    right.plot(mean, style, color=colors[name], label=f"{name}, {label}")
    right.fill_between(np.arange(STEPS), mean - 2 * error, mean + 2 * error, color=colors[name], alpha=0.15, lw=0)
right.axhline(1.0, color="0.6", lw=0.8)
right.set(xlabel="move", ylabel="share of state-action pairs tried", ylim=(0, 1.05))
right.set_title(f"chain of {LENGTH}, greedy; bands 2 standard errors", fontsize=9)
_ = right.legend(fontsize=7, loc="center right")
for key, one in seen.items():
    print(*key, f": {one.coverage[:, -1].mean():.2f} tried, goal reached by {np.isfinite(one.goal).mean():.0%}")

# %% [markdown]
# ## What would have falsified it
#
# An optimistic table that leaves pairs untried; an update in networks that follows another curve than
# $\Theta(s', s)/\Theta(s, s)$; a zero bias that explores as well as an optimistic one.

# %%
final = {key: one.coverage[:, -1].mean() for key, one in seen.items()}
assert np.abs(steps.mean(0) - leak["network"].matrix[middle]).max() < 0.1
assert final["table", "b0 optimistic"] > final["table", "b0 = 0"] + 0.1
