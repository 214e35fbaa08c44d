"""Relearning at several learning rates and through adapters, of the models that a comparison has left.

    falcon-unlearn compare --grid recipes/ablations.yaml
    python benchmarks/relearning.py                      # seeds 0..4 of three rows, and the oracle of each seed

Ten epochs on the 5 known facts, accuracy on the 43 others at the last step; mean and standard deviation over seeds. The
headline of the attack, the strongest curve, is the last column. Needs peft.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from falcon_unlearn.attacks.base import ORACLE, UNLEARNED, AttackData, run_attacks
from falcon_unlearn.attacks.relearning import RelearnConfig
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.sources import load_corpus, load_records
from falcon_unlearn.model.loading import load_causal_lm, load_tokenizer, resolve_model
from falcon_unlearn.model.patch import read_patch
from falcon_unlearn.model.patched import load_patched
from falcon_unlearn.recipe import load_recipe

RATES = (3e-4, 1e-3, 3e-3)
SETTINGS = {"full": RATES, "lora": (1e-3,)}


def attacked(folder: Path, *, oracle: bool) -> dict[str, float]:
    """Relearned accuracy of a run's unlearned model, or of its oracle, by setting."""
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.evaluation.oracle is not None
    assert recipe.evaluation.forget is not None
    source = resolve_model(recipe.evaluation.oracle if oracle else recipe.model, folder, device="cpu")
    model = load_causal_lm(source) if oracle else load_patched(source, (read_patch(folder / "patch"),))
    corpus = load_corpus(recipe.corpus, folder)
    scored = load_records(recipe.evaluation.forget, folder, "evaluation.forget")
    forget, retain = (tuple(r for records in side.values() for r in records) for side in (corpus.forget, corpus.retain))
    attacks = {
        weights: RelearnConfig(weights=(weights,), lrs_at_width_128=rates, epochs=10, points=1)
        for weights, rates in SETTINGS.items()
    }
    runs = run_attacks(
        attacks,
        model,
        ORACLE if oracle else UNLEARNED,
        Encoder(load_tokenizer(source)),
        AttackData(forget, tuple(scored), retain, ()),
        batch_size=recipe.evaluation.batch_size,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        seed=recipe.seed,
    )
    found: dict[str, float] = {}
    for run in runs:
        assert run.outcome is not None, run
        for point in run.outcome.points:
            if point.setting["step"]:
                found[f"{point.setting['weights']} {point.setting['lr_at_width_128']:g}"] = point.accuracy
    return {**found, "strongest": max(found.values())}


def main() -> None:
    """Attack and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--rows", nargs="+", default=["falcon", "npo_nll-same-stream", "npo_nll"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*arguments.rows, ORACLE)}
    for seed in arguments.seeds:
        for name in arguments.rows:
            rows[name].append(attacked(arguments.runs / "runs" / name / f"seed-{seed}", oracle=False))
        rows[ORACLE].append(attacked(arguments.runs / "runs" / arguments.rows[0] / f"seed-{seed}", oracle=True))
    if arguments.json:
        print(json.dumps({"seeds": arguments.seeds, "rows": rows}, indent=2))
        return
    columns = list(rows[ORACLE][0])
    print(f"{'':24}" + "".join(f"{column:>18}" for column in columns))
    for name, found in rows.items():
        shown = []
        for column in columns:
            values = [each[column] for each in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{f'{statistics.mean(values):.3f} +- {spread:.3f}':>18}")
        print(f"{name:24}" + "".join(shown))


if __name__ == "__main__":
    main()
