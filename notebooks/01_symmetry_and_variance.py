# %% [markdown]
# # Why must weights be random, and how large?
#
# Two questions that every initialization answers first. May the units of a layer start as copies of each other, if
# only a tiny perturbation tells them apart? And if the weights are random, is it enough that the *mean* of the signal's
# square is kept from layer to layer?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

from initjax.applications import signal, symmetry

jax.config.update("jax_enable_x64", True)  # distances of 1e-8 between units are below float32's rounding
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
STEPS = 1200 if SMALL else 6000
DRAWS = 60 if SMALL else 600

# %% [markdown]
# ## Prediction 1: copies stay copies, near copies part in a time log(1/eps)
#
# A network 4-16-1 with tanh, all weights 0.3, each perturbed by a relative eps. On the symmetric manifold the network
# is one unit wide. Perturbations of the units that add up to zero leave the output unchanged to first order, so that
# their Hessian is that of one unit's function $u_\theta(x) = a \tanh(w x + b)$ against the residual of the symmetric
# network, $H_t = E[r_t\,\nabla^2_\theta u]$. Under gradient descent they are multiplied by
# $P_t = \prod_{s<t} (1 - \eta H_s)$, which does not depend on eps: the spread is eps times one curve, and it reaches
# a given size after a time that grows with log(1/eps), at the rate of that curve. For eps = 0 this time is infinite.

# %%
ETA = 0.1
x = jax.random.normal(jax.random.key(0), (64, 4))
y = jnp.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2]


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["a"]


def loss(params):
    return 0.5 * jnp.mean((network(params, x) - y) ** 2)


def start(eps, key):
    shapes = {"w": (4, 16), "b": (16,), "a": (16,)}
    keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
    return {name: 0.3 * (1 + eps * jax.random.normal(keys[name], shape)) for name, shape in shapes.items()}


def spread(params):
    units = jnp.concatenate([params["w"], params["b"][None], params["a"][None]])
    return jnp.sqrt(jnp.mean(jnp.sum((units - units.mean(1, keepdims=True)) ** 2, 0)) / jnp.sum(units.mean(1) ** 2))


def train(params):
    def step(params, _):
        new = jax.tree.map(lambda p, g: p - ETA * g, params, jax.grad(loss)(params))
        return new, (spread(params), loss(params))

    return jax.lax.scan(step, params, length=STEPS)


def unit(theta, point):
    return theta[5] * jnp.tanh(point @ theta[:4] + theta[4])


def growth(state, _):
    """One step of the symmetric network, and of a perturbation that adds up to zero over its units."""
    params, product = state
    theta = jnp.concatenate([params["w"][:, 0], params["b"][:1], params["a"][:1]])
    residual = network(params, x) - y
    hessian = jnp.mean(residual[:, None, None] * jax.vmap(jax.hessian(unit), (None, 0))(theta, x), 0)
    size = 0.3 * jnp.sqrt(15 / 16) * jnp.linalg.norm(product) / jnp.linalg.norm(theta)
    new = jax.tree.map(lambda p, g: p - ETA * g, params, jax.grad(loss)(params))
    return (new, product - ETA * hessian @ product), size


exact = start(0.0, jax.random.key(1))
symmetric, (distance, symmetric_loss) = jax.jit(train)(exact)
curve = np.asarray(jax.jit(lambda p: jax.lax.scan(growth, (p, jnp.eye(6)), length=STEPS)[1])(exact))
print(f"eps = 0: largest spread in {STEPS} steps {float(distance.max()):.1e}, loss stays at {symmetric_loss[-1]:.4f}")
print(symmetry.report({"hidden": {"kernel": symmetric["w"], "bias": symmetric["b"]}, "out": symmetric["a"][:, None]}))
epsilons = 10.0 ** -np.arange(2, 9, 2 if SMALL else 1)
PARTED = 0.03
reached = np.maximum.accumulate(curve)[None] * epsilons[:, None] > PARTED
expected = np.where(reached.any(1), reached.argmax(1), np.nan)
print("prediction: the units have parted after", [int(t) if np.isfinite(t) else None for t in expected], "steps")

# %% [markdown]
# ## Measurement 1

# %%
KEYS = 3 if SMALL else 8
starts = jax.vmap(jax.vmap(start, (0, None)), (None, 0))(
    jnp.asarray(epsilons), jax.random.split(jax.random.key(2), KEYS)
)
_, (distances, _) = jax.jit(jax.vmap(jax.vmap(train)))(starts)  # (keys, epsilons, steps)
distances = np.asarray(distances)
times = np.where((distances > PARTED).any(-1), (distances > PARTED).argmax(-1), np.nan)
print("measured:   the units have parted after", [int(t) if np.isfinite(t) else None for t in times.mean(0)], "steps")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for eps, line in zip(epsilons, distances[0], strict=True):
    (drawn,) = left.semilogy(line, lw=1.5, label=f"eps = {eps:.0e}")
    left.semilogy(np.where(eps * curve < 1, eps * curve, np.nan), color="0.2", lw=0.8, ls="--")
left.axhline(PARTED, color="0.6", lw=0.8)
left.set(xlabel="step of gradient descent", ylabel="relative spread of the units", ylim=(1e-9, 10))
left.set_title("one network each; dashed: eps times the predicted curve", fontsize=9)
left.legend(fontsize=7, ncols=2)
right.errorbar(
    np.log10(1 / epsilons), times.mean(0), times.std(0, ddof=1), fmt="o", color="#D55E00", label=f"{KEYS} networks each"
)
right.plot(np.log10(1 / epsilons), expected, color="#0072B2", label="predicted")
right.set(xlabel="log10(1 / eps)", ylabel=f"steps until the spread is {PARTED}")
_ = right.legend()

# %% [markdown]
# ## Prediction 2: the mean of the signal is not the signal
#
# Deep linear network, width n = 64 and depth L = 64, with $n\sigma^2 = 1$. The mean of $|x_L|^2/|x_0|^2$ is exactly 1.
# But it is a product of L independent $\chi^2_n/n$, so that its logarithm has mean $L(\psi(n/2) + \log(2/n)) \approx
# -L/n$ and variance $L\,\psi_1(n/2) \approx 2L/n$: the typical network loses a factor e.

# %%
n = depth = 64
predicted = signal.linear_gain(n**-0.5, [n] * (depth + 1))
print(f"mean {predicted.forward_norm:.3f}; logarithm: mean {predicted.log_mean:.4f}, var {predicted.log_variance:.4f}")

# %% [markdown]
# ## Measurement 2


# %%
@jax.jit
def ratio(key):
    layer = lambda v, k: (v @ jax.random.normal(k, (n, n), jnp.float32) / jnp.float32(np.sqrt(n)), None)  # noqa: E731
    out, _ = jax.lax.scan(layer, jnp.ones(n, jnp.float32), jax.random.split(key, depth))
    return jnp.sum(out**2) / n


log_ratio = np.array([np.log(ratio(key)) for key in jax.random.split(jax.random.key(3), DRAWS)], float)
error = log_ratio.std(ddof=1) / np.sqrt(DRAWS)
print(f"measured: mean of the logarithm {log_ratio.mean():.3f}({error:.3f}), variance {log_ratio.var(ddof=1):.3f}")
print(f"mean of the ratio {np.exp(log_ratio).mean():.2f}, median {np.median(np.exp(log_ratio)):.2f}")

figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
counts, edges = np.histogram(log_ratio, bins=18)
width, middle = np.diff(edges), (edges[1:] + edges[:-1]) / 2
density = counts / DRAWS / width
axes.errorbar(middle, density, np.sqrt(counts) / DRAWS / width, fmt="o", color="#D55E00", label=f"{DRAWS} networks")
grid = np.linspace(edges[0] - 1, edges[-1] + 1, 200)
theory = norm.pdf(grid, predicted.log_mean, predicted.log_variance**0.5)
axes.plot(grid, theory, color="#0072B2", label="normal with the exact mean and variance")
axes.axvline(0, color="0.6", ls="--", lw=0.8, label="log of the mean ratio")
axes.set(xlabel="log(|x_L|² / |x_0|²)", ylabel="density", ylim=(0, 0.42))
_ = axes.legend(fontsize=8, loc="upper left")

# %% [markdown]
# ## What would have falsified it
#
# A spread above rounding at eps = 0; parting times beside the predicted curve, or not growing with log(1/eps); a mean
# logarithm more than four standard errors from $L(\psi(n/2) + \log(2/n))$.
#
# So "an infinitesimal perturbation is enough" is true only in the limit of infinite time, and false in float32 once eps
# is below its rounding; and the depth divided by the width, not the mean, tells whether a network keeps its signal.

# %%
assert float(distance.max()) < 1e-12
assert abs(log_ratio.mean() - predicted.log_mean) < 4 * error
seen = np.isfinite(expected) & np.isfinite(times).all(0)
assert seen.any()  # the small size is too short for the smallest eps to part
assert np.all(np.abs(times.mean(0) - expected)[seen] < 4 * times.std(0)[seen] + 0.05 * expected[seen])
