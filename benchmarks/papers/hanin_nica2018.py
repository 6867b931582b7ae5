"""Hanin and Nica 2018 (arXiv:1812.05994): norms in deep relu networks are log-normal, with variance depth / width.

    python benchmarks/papers/hanin_nica2018.py [--small]

|h_L|^2 of random He networks by matrix products, in NumPy, against the exact moments of `ij.finite_width`.
"""

import jax
import numpy as np
from common import Claim, main

import initjax as ij


def run(width: int, depths: tuple, networks: int) -> list[Claim]:
    rng = np.random.default_rng(0)
    h = np.sqrt(2) * rng.normal(size=(networks, width))  # of the first layer, input of unit second moment
    logs, table = {}, ij.finite_width(jax.nn.relu, np.sqrt(2.0), widths=[width] * max(depths), q0=2.0)
    for layer in range(1, max(depths) + 1):
        a = np.maximum(h, 0)
        # given the layer, the next pre-activations are i.i.d.: W a needs no W, only |a|
        s = 2 * np.mean(a**2, axis=1)
        h = np.sqrt(s)[:, None] * rng.normal(size=(networks, width))
        if layer in depths:
            logs[layer] = np.log(s[s > 0] / 2)
    claims = []
    for layer, values in logs.items():
        exact, leading = float(table.log_variance[layer]), 5 * layer / width
        mean = float(table.log_mean[layer])
        error, spread = values.std() / np.sqrt(networks), exact * np.sqrt(2 / networks)
        skew = float(np.mean((values - values.mean()) ** 3) / values.std() ** 3)
        right = abs(values.var() - exact) < 5 * spread and abs(values.mean() - mean) < 5 * error
        claims.append(
            Claim(
                f"depth {layer}, width {width}: ln of the norm is normal, variance 5 L/n, mean -5 L/(2 n)",
                f"variance {values.var():.3f} (exact {exact:.3f}, leading {leading:.3f}), mean {values.mean():.3f} "
                f"(exact {mean:.3f}, leading {-leading / 2:.3f}), skewness {skew:.2f}",
                "both within 5 standard errors of the exact law, skewness below 0.5",
                bool(right and abs(skew) < 0.5),
            )
        )
    return claims


if __name__ == "__main__":
    main(
        "Hanin and Nica 2018",
        "hanin_nica2018",
        run,
        dict(width=50, depths=(10, 50, 100), networks=20_000),
        dict(width=20, depths=(5,), networks=2000),
    )
