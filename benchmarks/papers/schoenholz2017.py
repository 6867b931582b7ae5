"""Schoenholz, Gilmer, Ganguli, Sohl-Dickstein 2017 (arXiv:1611.01232): networks train down to a depth of about 6 xi.

    python benchmarks/papers/schoenholz2017.py [--small]

Reads the 120 tanh networks of benchmarks/trainability.py (results/trainability.csv): width 64, 250 steps of SGD, where
the paper has width 300 and up to 10^5 steps.
"""

import csv
from pathlib import Path

import numpy as np
from common import Claim, main

TABLE = Path(__file__).parents[1] / "results" / "trainability.csv"


def run(families=("tanh", "tanh orthogonal")) -> list[Claim]:
    best: dict = {}
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            if row["family"] in families:
                key = row["family"], float(row["sigma_w"]), float(row["depth"])
                new = float(row["accuracy"]), float(row["depth_scale"]), float(row["chi_1"])
                best[key] = max(best.get(key, (0.0, 0.0, 0.0)), new)
    accuracy, scale, chi = np.array(list(best.values())).T
    trained, within, ordered = accuracy > 0.5, scale <= 1, chi < 1
    beyond = trained[~within].mean()
    inside_ordered, inside_chaotic = trained[within & ordered].mean(), trained[within & ~ordered].mean()
    deepest: dict = {}
    for (family, w, depth), (a, s, c) in best.items():
        if c < 1 and a > 0.5:
            deepest[family, w] = max(deepest.get((family, w), (0, 0)), (depth, depth / s))
    ratio = [depth / six_xi for depth, six_xi in deepest.values() if six_xi < 80]
    return [
        Claim(
            "beyond 6 xi networks do not train",
            f"{beyond:.1%} of {np.sum(~within)} such networks trained",
            "at most 5 %",
            bool(beyond <= 0.05),
        ),
        Claim(
            "in the ordered phase they train up to it",
            f"{inside_ordered:.1%} of {np.sum(within & ordered)}; deepest trained over 6 xi: "
            f"{', '.join(f'{r:.2f}' for r in ratio)} (depths are a factor 2 apart)",
            "at least 90 %",
            bool(inside_ordered >= 0.9),
        ),
        Claim(
            "in the chaotic phase they train up to it as well",
            f"{inside_chaotic:.1%} of {np.sum(within & ~ordered)} within 250 steps; the paper gives them more",
            "at least 90 %",
            bool(inside_chaotic >= 0.9),
        ),
    ]


if __name__ == "__main__":
    main("Schoenholz et al. 2017", "schoenholz2017", run, {}, {})
