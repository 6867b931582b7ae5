"""Xiao, Bahri, Sohl-Dickstein, Schoenholz, Pennington 2018 (arXiv:1806.05393): plain CNNs of 10,000 layers.

    python benchmarks/papers/xiao2018.py [--small]

A plain tanh CNN (3 x 3, circular padding, one scan over layers) on the digits: signal, correlation of two images and
gradient through the depth for delta-orthogonal and for Gaussian kernels of the same variance; and some steps of SGD.
The paper trains 10,000 layers on MNIST and CIFAR-10; here as far as two cores reach.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Claim, main

import initjax as ij
from initjax.demo.data import load

SIGMA_B = 0.005
SHORT = 8  # layers behind which the place of the signal is looked at; deeper down every pixel has q*


def network(depth: int, channels: int):
    def apply(params, x):
        first, kernels, biases, readout = params
        h = x.reshape(-1, 8, 8, 1) @ first

        def layer(h, this):
            kernel, bias = this
            # circular padding: no border, so that the theory of the interior holds everywhere
            wide = jnp.pad(jnp.tanh(h), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
            out = jax.lax.conv_general_dilated(
                wide, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return out + bias[None, None, None], jnp.mean(out**2, axis=(1, 2, 3))

        h, q = jax.lax.scan(layer, h, (kernels, biases))
        return jnp.tanh(h).mean(axis=(1, 2)) @ readout, q, h

    def draw(key, weights, sigma_w):
        keys = jax.random.split(key, depth)
        shape = (3, 3, channels, channels)
        if weights == "delta-orthogonal":
            one = ij.initializers.delta_orthogonal(sigma_w)
        else:
            one = jax.nn.initializers.variance_scaling(sigma_w**2, "fan_in", "normal")
        kernels = jax.lax.map(lambda k: one(k, shape, jnp.float32), keys)
        first = jax.random.normal(jax.random.fold_in(key, 1), (1, channels))
        bias = SIGMA_B * jax.random.normal(jax.random.fold_in(key, 2), (depth, channels))
        readout = jax.random.normal(jax.random.fold_in(key, 3), (channels, 10)) / np.float32(np.sqrt(channels))
        return first, kernels, bias, readout

    return apply, draw


def run(depth: int, channels: int, train_depth: int, steps: int, batch: int) -> list[Claim]:
    point = ij.critical(jnp.tanh, SIGMA_B)
    w, q_star = float(point.sigma_w), float(point.q)
    data = load()
    x = jnp.asarray(data.x_train[:2] * np.sqrt(q_star, dtype=np.float32))
    claims, seen = [], {}
    apply, draw = network(depth, channels)

    @jax.jit
    def measure(params):
        out, q, h = apply(params, x)
        flat = h.reshape(2, -1)
        few = apply((params[0], params[1][:SHORT], params[2][:SHORT], params[3]), x)[2]
        before, after = ((v**2).mean(axis=-1).ravel() for v in (x.reshape(2, 8, 8, 1), few))
        where = jnp.corrcoef(before, after)[0, 1]
        cosine = (flat[0] @ flat[1]) / (jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1]))
        grads = jax.grad(lambda p: apply(p, x)[0].sum())(params)[1]
        norms = jnp.sqrt((grads**2).sum(axis=(1, 2, 3, 4)))
        return q, cosine, where, norms

    for weights in ("delta-orthogonal", "gaussian"):
        q, cosine, where, norms = (np.asarray(v) for v in measure(draw(jax.random.key(0), weights, w)))
        signal, ratio = float(q[-1].mean() / q_star), float(norms[0] / norms[-1])
        seen[weights] = dict(signal=signal, gradient=ratio, where=float(where), cosine=float(cosine))
    tell = "; ".join(
        f"{k}: q/q* {v['signal']:.2f}, gradient of the first layer over the last {v['gradient']:.2g}, cosine of two "
        f"images {v['cosine']:.2f}"
        for k, v in seen.items()
    )
    delta, gauss = seen["delta-orthogonal"], seen["gaussian"]
    claims.append(
        Claim(
            f"with delta-orthogonal kernels signal and gradient survive {depth} plain layers",
            tell,
            "q within a factor 2 of q*, gradient ratio within 30",
            bool(0.5 < delta["signal"] < 2 and 1 / 30 < delta["gradient"] < 30),
        )
    )
    claims.append(
        Claim(
            "delta kernels keep where the signal is, kernels spread over the window forget it",
            f"correlation over pixels of the energy at the input and behind {SHORT} layers: delta-orthogonal "
            f"{delta['where']:.2f}, Gaussian {gauss['where']:.2f}",
            "delta above 0.8, Gaussian at least 0.3 below it",
            bool(delta["where"] > 0.8 and gauss["where"] < delta["where"] - 0.3),
        )
    )
    apply, draw = network(train_depth, channels)
    images = jnp.asarray(data.x_train[:batch] * np.sqrt(q_star, dtype=np.float32))
    targets = jnp.asarray(np.eye(10, dtype=np.float32)[data.y_train[:batch]])

    def loss(params):
        return 0.5 * jnp.mean(jnp.sum((apply(params, images)[0] - targets) ** 2, axis=-1))

    @jax.jit
    def step(params, rate):
        value, gradient = jax.value_and_grad(loss)(params)
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        # a step of given length: the least that says whether the gradient points anywhere
        return jax.tree.map(lambda p, g: p - rate * g / size, params, gradient), value

    fall = {}
    for weights in ("delta-orthogonal", "gaussian"):
        params, losses = draw(jax.random.key(1), weights, w), []
        for _ in range(steps):
            params, value = step(params, np.float32(0.05))
            losses.append(float(value))
        fall[weights] = min(losses) / losses[0]
    claims.append(
        Claim(
            f"such a network trains ({train_depth} layers, {steps} steps on {batch} images)",
            ", ".join(f"{k}: best loss / first loss {v:.3f}" for k, v in fall.items()),
            "delta-orthogonal below 0.9, and below Gaussian",
            bool(fall["delta-orthogonal"] < 0.9 and fall["delta-orthogonal"] < fall["gaussian"]),
        )
    )
    return claims


if __name__ == "__main__":
    main(
        "Xiao et al. 2018",
        "xiao2018",
        run,
        dict(depth=1500, channels=16, train_depth=300, steps=10, batch=8),
        dict(depth=30, channels=4, train_depth=10, steps=2, batch=4),
    )
