"""One line per claim of a paper: what it says, what came out here, and whether the two agree; printed and saved."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "results" / "papers"


class Claim(NamedTuple):
    """`agrees` is decided by the rule that `test` states, before the number is seen."""

    claim: str
    ours: str
    test: str
    agrees: bool


def main(paper: str, name: str, run: Any, full: dict, small: dict) -> None:
    """`run(**sizes) -> [Claim]`, with the sizes of a table or of a smoke test; the table is written for the former."""
    parser = argparse.ArgumentParser(description=paper)
    parser.add_argument("--small", action="store_true", help="a smoke test: tiny sizes, nothing is written")
    args = parser.parse_args()
    sizes = small if args.small else full
    claims = run(**sizes)
    print(paper)
    for c in claims:
        print(f"- {c.claim}\n    ours: {c.ours}\n    {'agrees' if c.agrees else 'DOES NOT AGREE'} ({c.test})")
    if not args.small:
        RESULTS.mkdir(parents=True, exist_ok=True)
        record = dict(paper=paper, sizes={k: str(v) for k, v in sizes.items()}, claims=[c._asdict() for c in claims])
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
