"""Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019 (arXiv:1902.08129): batch normalisation explodes gradients.

    python benchmarks/papers/yang2019.py [--small]

Plain networks with batch normalisation before the activation, without its gain and bias: growth of the gradient's
second moment per layer, at every weight scale the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Claim, main

import initjax as ij


def growth(phi, sigma_w: float, width: int, batch: int, depth: int, networks: int) -> tuple[float, float]:
    """Geometric mean of the growth per layer over the middle of the network, and its standard error."""

    def normal(h):
        return (h - h.mean(axis=0, keepdims=True)) / jnp.sqrt(h.var(axis=0, keepdims=True))

    @jax.jit
    def one(key):
        weights = sigma_w / np.float32(np.sqrt(width)) * jax.random.normal(key, (depth, width, width))
        h = jax.random.normal(jax.random.fold_in(key, 1), (batch, width))

        def forward(h, w):
            return phi(normal(h)) @ w, h

        last, inputs = jax.lax.scan(forward, h, weights)

        def backward(g, layer):
            h, w = layer
            (g,) = jax.vjp(lambda h: phi(normal(h)) @ w, h)[1](g)
            # h is rescaled by the weights; what counts is the gradient against h's own scale
            return g, jnp.log(jnp.mean(g**2) * jnp.mean(h**2))

        start = jax.random.normal(jax.random.fold_in(key, 2), last.shape)
        return jax.lax.scan(backward, start, (inputs, weights), reverse=True)[1]

    logs = np.stack([np.asarray(one(jax.random.key(s)), np.float64) for s in range(networks)])
    # of the inputs' side two layers are left out: there correlations have not settled
    rates = (logs[:, 2] - logs[:, -3]) / (depth - 5)
    return float(np.exp(rates.mean())), float(np.exp(rates.mean()) * rates.std(ddof=1) / np.sqrt(networks))


def run(width: int, batch: int, depth: int, networks: int) -> list[Claim]:
    claims = []
    for name, phi, w in (("relu", jax.nn.relu, 2**0.5), ("relu", jax.nn.relu, 0.5), ("tanh", jnp.tanh, 1.0)):
        mean = float(ij.gaussian.mean(phi, 1.0))
        law = float(ij.gaussian.moment_prime(phi, 1.0) / (ij.gaussian.moment(phi, 1.0) - mean**2))
        value, error = growth(phi, w, width, batch, depth, networks)
        tolerance = 5 * error / law + 3 / batch + 2 / width  # the law is that of large batches and widths
        claims.append(
            Claim(
                f"{name}, sigma_w = {w:.3g}: gradients grow by E phi'^2 / Var phi = {law:.4f} a layer",
                f"{value:.4f} +- {error:.4f} at batch {batch}, width {width}",
                f"within 5 standard errors and 3 / batch + 2 / width, {tolerance:.1%}",
                abs(value / law - 1) < tolerance,
            )
        )
    value, error = growth(lambda x: x, 1.0, width, batch, depth, networks)
    law = (batch - 2) / (batch - 3)
    claims.append(
        Claim(
            f"linear networks grow least, by (B - 2) / (B - 3) = {law:.4f}",
            f"{value:.4f} +- {error:.4f}",
            "within 5 standard errors and 2 / width",
            abs(value / law - 1) < 5 * error + 2 / width,
        )
    )
    return claims


if __name__ == "__main__":
    main(
        "Yang et al. 2019",
        "yang2019",
        run,
        dict(width=512, batch=128, depth=20, networks=4),
        dict(width=64, batch=32, depth=8, networks=2),
    )
