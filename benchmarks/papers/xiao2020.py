"""Xiao, Pennington, Schoenholz 2020 (arXiv:1912.13053): conditioning of the tangent kernel by phase and depth.

    python benchmarks/papers/xiao2020.py [--small]

N inputs with equal correlations, tangent kernel in the NTK parameterization, one recursion in depth; beside it the
empirical kernel of networks of the given width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import Claim, main

import initjax as ij

N, C0 = 10, 0.3


def condition_numbers(phi, sigma_w, sigma_b, depths) -> dict[int, float]:
    """Depth -> kappa - 1 = N U / (T - U) for T on the diagonal and U off it; the difference is followed by itself."""
    path = ij.propagate(phi, sigma_w, sigma_b, max(depths), q0=1.0, c0=C0)
    q, delta = np.asarray(path.q), np.asarray(path.one_minus_c)
    other, gap = q[0] * (1 - delta[0]), q[0] * delta[0]
    found = {}
    for layer in range(1, max(depths) + 1):
        c = 1 - delta[layer - 1]
        slope = sigma_w**2 * float(ij.gaussian.moment_prime(phi, q[layer - 1]))
        cross = sigma_w**2 * float(ij.gaussian.dual_prime(phi, q[layer - 1], q[layer - 1], c))
        gap = q[layer] * delta[layer] + slope * gap + (slope - cross) * other
        other = q[layer] * (1 - delta[layer]) + cross * other
        if layer in depths:
            found[layer] = float(N * other / gap)
    return found


def measured(phi, sigma_w, sigma_b, depth, width) -> float:
    """The same of a network of finite width: weights of variance 1 behind factors sigma_w / sqrt(n)."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for layer in range(depth + 1):
                last = layer == depth
                kernel = self.param(f"w{layer}", nn.initializers.normal(1.0), (x.shape[-1], 1 if last else width))
                bias = self.param(f"b{layer}", nn.initializers.normal(1.0), (kernel.shape[-1],))
                x = sigma_w / np.sqrt(x.shape[-1]).astype(np.float32) * (x @ kernel) + sigma_b * bias
                x = x if last else phi(x)
            return x

    gram = (1 - C0) * np.eye(N) + C0
    # q = 1 and correlation C0 in the first layer
    root = np.linalg.cholesky((gram - sigma_b**2) / sigma_w**2).astype(np.float32) * np.float32(np.sqrt(N))
    values = []
    for seed in range(2):
        params = Network().init(jax.random.key(seed), root)["params"]
        values.append(float(ij.condition_number(np.asarray(ij.empirical_ntk(Network())(params, root), np.float64))))
    return float(np.exp(np.mean(np.log(values))))


def run(depths: tuple, width: int, measured_depth: int) -> list[Claim]:
    a, b = depths  # in the ordered phase a quarter of them: there 1 - c underflows against 1
    both = (measured_depth, a // 4, b // 4, a, b)
    edge = float(ij.critical(jnp.tanh, 0.3).sigma_w)
    settings = ((0.8, 0.05), (edge, 0.3), (1.5, 0.05))
    ordered, critical, chaotic = (condition_numbers(jnp.tanh, w, s, both) for w, s in settings)
    relu = condition_numbers(jax.nn.relu, np.sqrt(2.0), 0.0, both)
    chi = {w: float(ij.fixed_point(jnp.tanh, w, 0.05).chi_1) for w in (0.8, 1.5)}
    rate = np.log(ordered[b // 4] * (b // 4) / (ordered[a // 4] * (a // 4))) / (b // 4 - a // 4)
    fall = np.log(chaotic[b] / chaotic[a]) / (b - a)
    claims = [
        Claim(
            "ordered: kappa grows as chi^-l / l",
            f"d ln(l kappa) / dl = {rate:.4f} from depth {a // 4} to {b // 4}; -ln chi = {-np.log(chi[0.8]):.4f}",
            "within 2 %",
            bool(abs(rate / -np.log(chi[0.8]) - 1) < 0.02),
        ),
        Claim(
            "chaotic: kappa - 1 falls as chi^-l",
            f"d ln(kappa - 1) / dl = {fall:.4f} from depth {a} to {b}; -ln chi = {-np.log(chi[1.5]):.4f}",
            "within 5 %",
            bool(abs(fall / -np.log(chi[1.5]) - 1) < 0.05),
        ),
        Claim(
            "critical: kappa tends to a number that grows with N alone: (N + 2)/2 for tanh, (N + 3)/3 for relu",
            f"tanh {1 + critical[a]:.3f}, {1 + critical[b]:.3f} (limit {(N + 2) / 2:.3f}), relu {1 + relu[a]:.3f}, "
            f"{1 + relu[b]:.3f} "
            f"(limit {(N + 3) / 3:.3f}) at depth {a}, {b}",
            "closer at the larger depth, within 25 %",
            bool(
                all(
                    abs(1 + k[b] - limit) < abs(1 + k[a] - limit) and abs((1 + k[b]) / limit - 1) < 0.25
                    for k, limit in ((critical, (N + 2) / 2), (relu, (N + 3) / 3))
                )
            ),
        ),
    ]
    found = {
        "ordered": (measured(jnp.tanh, 0.8, 0.05, measured_depth, width), ordered),
        "chaotic": (measured(jnp.tanh, 1.5, 0.05, measured_depth, width), chaotic),
        "relu": (measured(jax.nn.relu, 2**0.5, 0.0, measured_depth, width), relu),
    }
    claims.append(
        Claim(
            f"networks of width {width} and depth {measured_depth} have these condition numbers",
            ", ".join(f"{k}: {v:.3g} (theory {1 + t[measured_depth]:.3g})" for k, (v, t) in found.items()),
            "within a factor 1.5, in the order of the theory",
            all(1 / 1.5 < v / (1 + t[measured_depth]) < 1.5 for v, t in found.values())
            and sorted(found, key=lambda k: found[k][0]) == sorted(found, key=lambda k: found[k][1][measured_depth]),
        )
    )
    return claims


if __name__ == "__main__":
    main(
        "Xiao, Pennington, Schoenholz 2020",
        "xiao2020",
        run,
        dict(depths=(128, 256), width=512, measured_depth=10),
        dict(depths=(16, 32), width=256, measured_depth=2),
    )
