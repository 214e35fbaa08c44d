"""FALCON with one setting changed at a time, on worlds that the README's table does not use.

    python benchmarks/falcon_settings.py                 # seeds 5 and 6, target layers 3 and 4

Models are trained once and cached. Score S = utility kept - (forget probability + accuracy) / 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from falcon_unlearn import embedded
from falcon_unlearn.artifacts import Metrics
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.pipeline import run_recipe
from falcon_unlearn.recipe import apply_overrides, recipe_from

SETTINGS: dict[str, list[str]] = {
    "default": [],
    "loss on answer tokens only": ["corpus.loss_mask=answer"],
    "no conflict resolution (sum)": ["training.gradients.combination=sum"],
    "random offset vector": ["method.offset=random"],
    "linear learning-rate decay": ["training.optimizer.schedule=linear"],
    "down_proj only": ["training.modules=down_proj"],
    "rmu (its default)": ["method=rmu"],
}


def outcome(before: Metrics, after: Metrics) -> dict[str, float]:
    """The columns of the table."""
    assert before.model_utility is not None
    assert after.model_utility is not None
    assert after.forget_accuracy_heldout is not None
    assert after.forget_quality is not None
    kept = after.model_utility / before.model_utility
    return {
        "S": kept - (after.forget_probability + after.forget_accuracy) / 2,
        "acc": after.forget_accuracy,
        "held-out acc": after.forget_accuracy_heldout,
        "prob": after.forget_probability,
        "quality p": after.forget_quality,
        "kept": kept,
    }


def run(seed: int, layer: int, overrides: list[str], inputs: Path) -> dict[str, float]:
    """One run at a given layer."""
    with tempfile.TemporaryDirectory() as out:
        raw = apply_overrides(
            embedded.demo_recipe(Path(out), inputs, seed),
            ["method.preset=layer", "attacks={}", f"selection.layers=[{layer}]", *overrides],
        )
        metrics = run_recipe(recipe_from(raw)).metrics
    before, after = metrics["before"], metrics["after"]
    assert before is not None
    assert after is not None
    return outcome(before, after)


def main() -> None:
    """Run every setting on every seed and layer; print means, and how far from the mean they lie (sd)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            inputs = Path(folder) / str(seed)
            embedded.write_corpora(build_world(seed), inputs)
            embedded.write_models(seed, inputs, retrain=False, say=lambda line: print(line, file=sys.stderr))
            for layer in arguments.layers:
                for name, overrides in SETTINGS.items():
                    rows[name].append(run(seed, layer, overrides, inputs))
                    print(f"seed {seed}, layer {layer}, {name}: {rows[name][-1]}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    columns = list(next(iter(rows.values()))[0])
    print(f"{'':30}" + "".join(f"{name:>16}" for name in columns))
    for name, found in rows.items():
        cells = []
        for column in columns:
            values = [row[column] for row in found]
            cells.append(f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}")
        print(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
