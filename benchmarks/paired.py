"""Paired t-tests of a comparison's rows against one of them, over seeds.

    falcon-unlearn compare --grid recipes/ablations.yaml
    python benchmarks/paired.py                             # runs/ablations, against its row falcon
    python benchmarks/paired.py runs/methods --row npo_nll

One line a row: mean and standard deviation of S (its leak measured from the oracle's, and from nought), of the utility
kept and of relearned accuracy, and the two-sided p of their difference to the row named; then forget quality by seed.
Several folders hold the same rows over different seeds: they are pooled.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from scipy.stats import ttest_rel


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("runs/ablations")])
    parser.add_argument("--row", default="falcon")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, dict[int, float]]] = {}
    for folder in arguments.folders:
        for path in sorted(folder.glob("results/*/seed-*.json")):
            outcome = json.loads(path.read_text(encoding="utf-8"))
            for who, values in ((outcome["cell"], outcome["values"]), ("oracle", outcome["oracle"])):
                for key, value in values.items():
                    rows.setdefault(who, {}).setdefault(key, {})[outcome["seed"]] = value
    (relearned,) = {key for row in rows.values() for key in row if "relearn" in key}
    keys = ("oracle_score", "score", "kept", relearned)
    print(f"{'':26}" + "".join(f"{key:>34}" for key in keys) + "  forget quality by seed")
    for name, row in rows.items():
        shown = []
        for key in keys:
            values, other = row[key], rows[arguments.row][key]
            both = sorted(set(values) & set(other))
            mean = statistics.mean(values.values())
            spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            differ = name != arguments.row and any(values[seed] != other[seed] for seed in both)
            p = f"p = {ttest_rel([values[s] for s in both], [other[s] for s in both]).pvalue:.3f}" if differ else ""
            shown.append(f"{f'{mean:.3f} +- {spread:.3f}  {p:9}':>34}")
        quality = " ".join(f"{value:.2g}" for _, value in sorted(row["forget_quality"].items()))
        print(f"{name:26}{''.join(shown)}  {quality}")


if __name__ == "__main__":
    main()
