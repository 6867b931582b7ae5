"""Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735): singular values of deep networks, orthogonal or Gaussian.

    python benchmarks/papers/pennington2017.py [--small]

Jacobians of random networks (a scan over layers, `ij.measured_jacobian`) against the density of free probability.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Claim, main

import initjax as ij


def measured(phi, sigma_w, sigma_b, q, width, depth, weights, networks):
    def init(key):
        keys = jax.random.split(key, depth)
        draw = jax.nn.initializers.orthogonal() if weights == "orthogonal" else jax.nn.initializers.lecun_normal()
        kernels = sigma_w * jax.vmap(lambda k: draw(k, (width, width), jnp.float32))(keys)
        return kernels, sigma_b * jax.random.normal(jax.random.fold_in(key, 1), (depth, width))

    def apply(params, h):
        step = lambda h, layer: (phi(h) @ layer[0] + layer[1][None], None)  # noqa: E731
        return jax.lax.scan(step, h, params)[0]

    x = np.sqrt(q) * np.random.default_rng(0).normal(size=(networks, width)).astype(np.float32)
    return ij.measured_jacobian((init, apply), x, key=jax.random.key(2), seeds=networks, blocks=False).whole


def distance(found, theory) -> float:
    """Kolmogorov-Smirnov distance of the pooled singular values and the law."""
    values = np.sort(np.concatenate([s.nodes[0] for s in found.samples]))
    # the table runs from the edge down; what is below its last node, and at zero, lies in front
    below = theory.zero + theory.below + np.cumsum(theory.mass[::-1])
    cdf = np.interp(np.log(np.maximum(values, 1e-300)), theory.log_eigenvalue[::-1], below, left=theory.zero)
    positive = values > 1e-9 * values.max()
    steps = np.arange(1, len(values) + 1) / len(values)
    return float(np.abs(steps - cdf)[positive].max())


def run(width: int, depth: int, networks: int) -> list[Claim]:
    claims = []
    critical = {b: float(ij.critical(jnp.tanh, b).sigma_w) for b in (0.01, 0.3)}
    cases = [
        ("tanh, Gaussian", jnp.tanh, critical[0.3], 0.3, "gaussian"),
        ("tanh, orthogonal", jnp.tanh, critical[0.3], 0.3, "orthogonal"),
        ("relu, orthogonal", jax.nn.relu, 2**0.5, 0.0, "orthogonal"),
    ]
    variances = {}
    for name, phi, w, b, weights in cases:
        q = 1.0 if phi is jax.nn.relu else float(ij.fixed_point(phi, w, b).q)
        found = measured(phi, w, b, q, width, depth, weights, networks)
        theory = ij.jacobian_spectrum(phi, w, b, depth, weights)
        gap, variances[name] = distance(found, theory), float(theory.variance)
        limit = 0.04 + depth / width
        claims.append(
            Claim(
                f"{name}: the density of squared singular values is that of free probability",
                f"KS distance {gap:.3f} at width {width}, depth {depth}; variance {found.variance:.3g} +- "
                f"{found.variance_error:.1g} (law {float(theory.variance):.3g}), largest {found.edge:.3g} +- "
                f"{found.edge_error:.1g} (law {float(theory.edge):.3g})",
                f"distance below 0.04 + depth / width = {limit:.2f}",
                gap < limit,
            )
        )
    near = ij.jacobian_spectrum(jnp.tanh, critical[0.01], 0.01, [depth, 8 * depth], "orthogonal").variance
    gauss = ij.jacobian_spectrum(jnp.tanh, critical[0.01], 0.01, [depth, 8 * depth], "gaussian").variance
    claims.append(
        Claim(
            "only orthogonal weights with q* -> 0 come near isometry; Gaussian ones never do",
            f"variance at sigma_b = 0.01, depth {depth} and {8 * depth}: orthogonal {near[0]:.3g}, {near[1]:.3g}; "
            f"Gaussian {gauss[0]:.3g}, {gauss[1]:.3g}",
            "Gaussian at least depth, orthogonal at most a tenth of that",
            bool(np.all(gauss >= [depth, 8 * depth]) and np.all(near < 0.1 * gauss)),
        )
    )
    claims.append(
        Claim(
            "relu is not isometric with orthogonal weights either",
            f"variance {variances['relu, orthogonal']:.4g} at depth {depth}",
            "variance = depth",
            abs(variances["relu, orthogonal"] / depth - 1) < 1e-9,
        )
    )
    return claims


if __name__ == "__main__":
    main(
        "Pennington, Schoenholz, Ganguli 2017",
        "pennington2017",
        run,
        dict(width=384, depth=16, networks=4),
        dict(width=64, depth=4, networks=2),
    )
