# %% [markdown]
# # How large are a PDE residual and its gradients before the first step?
#
# A physics-informed network u is trained on a residual R = D u. Is He initialization, made for u, right for R too?

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import initjax as ij
from initjax.applications import pinn

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
SMALL = os.environ.get("INITJAX_NOTEBOOKS") == "small"
DRAWS = 200 if SMALL else 4000
HE = nn.initializers.he_normal()


def network(phi, width):
    return nn.Sequential([nn.Dense(width, kernel_init=HE), phi, nn.Dense(1, kernel_init=HE)])


def advection(c):
    return lambda u: lambda x: jax.grad(u)(x)[1] + c * jax.grad(u)(x)[0]


# %% [markdown]
# ## Prediction: a stiff coefficient is a large gradient
#
# For He relu networks of any width and  + c\,u_x$:  R^2 = E|\partial R/\partial W_1|^2 = 1 + c^2$, and the
# gradient of ^2/2$ has |\partial L/\partial W_1|^2 = (1 + c^2)^2 (1 + 5/n)$. For tanh, residual and residual NTK
# follow from the kernels of u by D on both arguments.

# %%
WIDTH, POINT = 20, np.array([[0.3, 0.7]])
speeds = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
relu = network(nn.relu, WIDTH)
statistics = [pinn.initial_statistics(relu, POINT, advection(c)) for c in speeds]
predicted = {
    "E R²": [s.residual[0] for s in statistics],
    "E|dR/dW1|²": [s.gradient["layers_0/kernel"][0] for s in statistics],
    "E|dL/dW1|²": [s.loss_gradient["layers_0/kernel"][0] for s in statistics],
}
times = np.linspace(0, 1, 9 if SMALL else 17)
line = np.stack([np.full_like(times, 0.3), times], 1)
tanh = network(jnp.tanh, 512)
covariance = pinn.residual_kernel(ij.kernel_fn(tanh, line), advection(2.0))(line[:1], line).nngp[0]
for name, value in predicted.items():
    print(f"{name:12}", np.round(value, 3))

# %% [markdown]
# ## Measurement


# %%
def residual_of(model, params, c, x):
    return advection(c)(lambda y: model.apply(params, y[None])[0, 0])(x)


@jax.jit
def moments(key, c):
    params = relu.init(key, POINT)
    x = jnp.asarray(POINT[0], jnp.float32)
    r, grads = jax.value_and_grad(lambda p: residual_of(relu, p, c, x))(params)
    square = jnp.sum(grads["params"]["layers_0"]["kernel"] ** 2)
    return jnp.stack([r * r, square, r * r * square])


keys = jax.random.split(jax.random.key(0), DRAWS)
samples = np.asarray(
    jax.vmap(lambda c: jax.lax.map(lambda k: moments(k, c), keys, batch_size=200))(jnp.float32(speeds))
)
mean, error = samples.mean(1).T, samples.std(1).T / np.sqrt(DRAWS)  # (quantity, speed)


def along(key):
    params = tanh.init(key, line)
    r = jax.vmap(lambda x: residual_of(tanh, params, 2.0, x))(jnp.asarray(line, jnp.float32))
    return r[0] * r


products = np.asarray(jax.lax.map(along, keys[: DRAWS // 4], batch_size=100))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
grid = np.linspace(0.4, 9, 100)
theory = (1 + grid**2, 1 + grid**2, (1 + grid**2) ** 2 * (1 + 5 / WIDTH))
for i, (name, color) in enumerate(zip(predicted, ("#0072B2", "#009E73", "#D55E00"), strict=True)):
    left.plot(grid, theory[i], color=color, lw=1, ls="--" if i == 1 else "-")
    shift = (0.96, 1.04, 1.0)[i]  # the first two lie on one curve
    left.errorbar(speeds * shift, mean[i], 2 * error[i], fmt="o", ms=4, color=color, label=name)
left.set(xscale="log", yscale="log", xlabel="advection speed c (length / time)", ylabel="mean square")
left.set_title(f"relu, width {WIDTH}: lines theory, bars 2 standard errors", fontsize=9)
left.legend(fontsize=8)
right.plot(times, covariance, color="#0072B2", label="D D' K, infinite width")
spread = 2 * products.std(0) / np.sqrt(len(products))
right.errorbar(
    times, products.mean(0), spread, fmt="o", ms=4, color="#D55E00", label=f"{len(products)} networks, width 512"
)
right.set(xlabel="time t", ylabel="Cov(R(0.3, 0), R(0.3, t))")
_ = right.legend(fontsize=8)

# %% [markdown]
# ## What would have falsified it
#
# Means more than a few standard errors off the lines, at any speed or width; a covariance off the curve by more than
# its error and 1/width.

# %%
exact = np.array(list(predicted.values()))
assert (np.abs(mean - exact) < 5 * error).all()
assert (np.abs(products.mean(0) - covariance) < 2.5 * spread + 0.02 * covariance[0]).all()
