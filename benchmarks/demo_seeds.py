"""The demo over several seeds: each invents other people and trains other models.

    python benchmarks/demo_seeds.py                      # seeds 0..4, about two minutes a seed the first time
    python benchmarks/demo_seeds.py --seeds 0 1 --json

The models of a seed are trained once and cached; the runs lie in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from falcon_unlearn.embedded import write_models

COLUMNS = (
    ("acc before", "before", "forget_accuracy"),
    ("acc", "after", "forget_accuracy"),
    ("held-out acc", "after", "forget_accuracy_heldout"),
    ("prob", "after", "forget_probability"),
    ("ROUGE-L", "after", "forget_rouge"),
    ("quality p", "after", "forget_quality"),
    ("utility", "after", "model_utility"),
    ("oracle acc", "oracle", "forget_accuracy"),
    ("oracle prob", "oracle", "forget_probability"),
)


def run_seed(seed: int, out: Path) -> dict[str, float]:
    """One demo in a fresh process; the values of ``COLUMNS`` and how long it took without training its models."""
    with tempfile.TemporaryDirectory() as warm:
        write_models(seed, Path(warm), retrain=False, say=lambda line: print(line, file=sys.stderr))
    folder = out / f"seed-{seed}"
    command = [sys.executable, "-m", "falcon_unlearn", "demo", "--seed", str(seed), "--out", str(folder)]
    began = time.perf_counter()
    subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    row = {label: metrics[model][key] for label, model, key in COLUMNS}
    row["kept"] = metrics["after"]["model_utility"] / metrics["before"]["model_utility"]
    row["S"] = row["kept"] - (row["prob"] + row["acc"]) / 2
    for label, attack in (("relearn", "relearn"), ("lens", "logit-lens"), ("int8", "quantize")):
        row[label] = metrics["after"]["attacks"][attack]["recovered_accuracy"]
        row[f"{label} or."] = metrics["oracle"]["attacks"][attack]["recovered_accuracy"]
    row["seconds"] = seconds
    return row


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    for seed in arguments.seeds:
        rows[seed] = run_seed(seed, arguments.out)
        print(f"seed {seed}: {rows[seed]}", file=sys.stderr)
    columns = list(next(iter(rows.values())))
    values = {name: [row[name] for row in rows.values()] for name in columns}
    mean = {name: statistics.mean(v) for name, v in values.items()}
    spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
    if arguments.json:
        print(json.dumps({"seeds": rows, "mean": mean, "sd": spread}, indent=2))
        return
    print("seed  " + "".join(f"{name:>13}" for name in columns))
    for seed, row in rows.items():
        print(f"{seed:<6}" + "".join(f"{row[name]:>13.3g}" for name in columns))
    print("mean  " + "".join(f"{mean[name]:>13.3g}" for name in columns))
    print("sd    " + "".join(f"{spread[name]:>13.2g}" for name in columns))
    passed = sum(value > 0.05 for value in values["quality p"])
    print(f"forget quality above .05 in {passed} of {len(rows)} seeds")


if __name__ == "__main__":
    main()
