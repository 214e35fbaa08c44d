"""Relearning at several learning rates and through adapters, of the models that a comparison has left.

    falcon-unlearn compare --grid recipes/ablations.yaml
    python benchmarks/relearning.py                      # seeds 0..4 of three rows, and the oracle of each seed
    python benchmarks/relearning.py --grid               # and the area under the curve over a grid of attacks

Ten epochs on 5 known facts, accuracy on the 43 others at the last step, and the probability of their answers in the
attack of a comparison (full, 1e-3). One fact in one draw of the known is .023, so the mean is taken over --draws of
them, the first being the comparison's own; then mean and standard deviation over seeds. Strongest: the best of the
columns for the attacker, seed by seed. Needs peft.

``--grid`` attacks with 5 and with 12 known facts, full and through adapters, at every learning rate. Columns:

- start: without attack; 2 epochs, 10 epochs: accuracy with 5 facts (--known's first), full, 1e-3; means over draws;
- strongest: after 10 epochs in the cell (facts, weights, rate) with the highest mean over the draws;
- area: under the curve of accuracy over steps, divided by the last step; area prob: of answer probability. The mean
  over all cells and draws.

Then the paired differences to the first row and to the oracle, with the two-sided p of a t-test over seeds. Curves are
kept in RUNS/relearning/ROW/seed-N.json after each draw, and measured again only where the weights have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_rel

from falcon_unlearn.artifacts import write_json
from falcon_unlearn.attacks.base import ORACLE, UNLEARNED, AttackData, Outcome, run_attacks, score_forget
from falcon_unlearn.attacks.relearning import RelearnConfig, Weights
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.sources import load_corpus, load_records
from falcon_unlearn.model.loading import load_causal_lm, load_tokenizer, resolve_model
from falcon_unlearn.model.patch import read_patch
from falcon_unlearn.model.patched import load_patched
from falcon_unlearn.recipe import load_recipe

RATES = (3e-4, 1e-3, 3e-3)
SETTINGS: dict[Weights, tuple[float, ...]] = {"full": RATES, "lora": (1e-3,)}
KNOWN = (5, 12)
WEIGHTS: tuple[Weights, ...] = ("full", "lora")
EPOCHS = 10
POINTS = 5
"""Every second epoch, so that the first is the attack of 2 epochs: batches and rate do not depend on what follows."""
DRAWS = 3
SCORED_AT_ONCE = 64

Curve = dict[str, Any]
"""known, weights, rate, draw; area and area_probability; points: step, accuracy and probability of each."""


def outcomes(
    folder: Path, attacks: Sequence[RelearnConfig], *, oracle: bool, draws: Sequence[int] = (0,)
) -> Iterator[list[Outcome]]:
    """Relearn a run's unlearned model, or its oracle, in every way: the outcomes of each draw of the known facts."""
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.evaluation.oracle is not None
    assert recipe.evaluation.forget is not None
    source = resolve_model(recipe.evaluation.oracle if oracle else recipe.model, folder, device="cpu")
    model = load_causal_lm(source) if oracle else load_patched(source, (read_patch(folder / "patch"),))
    corpus = load_corpus(recipe.corpus, folder)
    scored = load_records(recipe.evaluation.forget, folder, "evaluation.forget")
    forget, retain = (tuple(r for records in side.values() for r in records) for side in (corpus.forget, corpus.retain))
    encoder = Encoder(load_tokenizer(source))
    longest = recipe.evaluation.max_new_tokens
    before = score_forget(model, encoder, scored, batch_size=SCORED_AT_ONCE, max_new_tokens=longest)
    for draw in draws:
        runs = run_attacks(
            {str(number): attack for number, attack in enumerate(attacks)},
            model,
            ORACLE if oracle else UNLEARNED,
            encoder,
            AttackData(forget, tuple(scored), retain, ()),
            batch_size=SCORED_AT_ONCE,
            max_new_tokens=longest,
            seed=recipe.seed + 1000 * draw,
            before=before,
        )
        found = []
        for run in runs:
            assert run.outcome is not None, run
            found.append(run.outcome)
        yield found


def attacked(folder: Path, *, oracle: bool, draws: int) -> dict[str, float]:
    """Relearned accuracy of a run's unlearned model, or of its oracle, by setting: means over draws."""
    attacks = [
        RelearnConfig(weights=(weights,), lrs_at_width_128=rates, epochs=EPOCHS, points=1)
        for weights, rates in SETTINGS.items()
    ]
    accuracy: dict[str, list[float]] = {}
    probability: list[float] = []
    for draw in outcomes(folder, attacks, oracle=oracle, draws=range(draws)):
        for point in (point for outcome in draw for point in outcome.points):
            if point.setting["step"]:
                setting = f"{point.setting['weights']} {point.setting['lr_at_width_128']:g}"
                accuracy.setdefault(setting, []).append(point.accuracy)
                if setting == "full 0.001":
                    probability.append(point.probability)
    found = {setting: statistics.fmean(values) for setting, values in accuracy.items()}
    return {**found, "strongest": max(found.values()), "probability": statistics.fmean(probability)}


def curves_of(folder: Path, kept: Path, *, oracle: bool, known: Sequence[int], draws: int) -> list[Curve]:
    """The curves of the grid; those that the file ``kept`` holds of these weights are not measured again."""
    recipe = load_recipe(folder / "recipe.yaml")
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((Path(str(recipe.evaluation.oracle)) if oracle else folder / "patch").glob("*.safetensors")):
        digest.update(path.read_bytes())
    key = {"weights": digest.hexdigest(), "cells": [*WEIGHTS, *RATES], "epochs": EPOCHS, "points": POINTS}
    curves: list[Curve] = []
    if kept.exists():
        saved = json.loads(kept.read_text(encoding="utf-8"))
        curves = saved["curves"] if saved["key"] == key else []
    kept.parent.mkdir(parents=True, exist_ok=True)
    for facts in known:
        missing = sorted(set(range(draws)) - {curve["draw"] for curve in curves if curve["known"] == facts})
        if not missing:
            continue
        attacks = [
            RelearnConfig(known=facts, weights=(trained,), lrs_at_width_128=(rate,), epochs=EPOCHS, points=POINTS)
            for trained, rate in itertools.product(WEIGHTS, RATES)
        ]
        for draw, found in zip(missing, outcomes(folder, attacks, oracle=oracle, draws=missing), strict=True):
            curves += [
                {
                    "known": facts,
                    "weights": attack.weights[0],
                    "rate": attack.lrs_at_width_128[0],
                    "draw": draw,
                    **{name: estimate.value for name, estimate in outcome.numbers.items()},
                    "points": [[point.setting["step"], point.accuracy, point.probability] for point in outcome.points],
                }
                for attack, outcome in zip(attacks, found, strict=True)
            ]
            write_json(kept, {"key": key, "curves": curves})
    return [curve for curve in curves if curve["known"] in known and curve["draw"] < draws]


def summary(curves: Sequence[Curve], known: int) -> dict[str, float]:
    """The columns of the grid's table; those before the last three are with ``known`` facts, full, at 1e-3."""
    cells: dict[tuple[int, str, float], list[Curve]] = {}
    for curve in curves:
        cells.setdefault((curve["known"], curve["weights"], curve["rate"]), []).append(curve)

    def accuracy(cell: Sequence[Curve], point: int) -> float:
        return statistics.fmean(curve["points"][point][1] for curve in cell)

    headline = cells[known, "full", 1e-3]
    return {
        "start": accuracy(headline, 0),
        "2 epochs": accuracy(headline, 1),
        "10 epochs": accuracy(headline, -1),
        "strongest": max(accuracy(cell, -1) for cell in cells.values()),
        "area": statistics.fmean(curve["area"] for curve in curves),
        "area prob": statistics.fmean(curve["area_probability"] for curve in curves),
    }


def print_table(names: Iterable[str], columns: Iterable[str], shown: Callable[[str, str], str]) -> None:
    """Rows by columns, each entry as ``shown(row, column)`` has it."""
    print(f"{'':24}" + "".join(f"{column:>18}" for column in columns))
    for name in names:
        print(f"{name:24}" + "".join(f"{shown(name, column):>18}" for column in columns))


def main() -> None:
    """Attack and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--rows", nargs="+", default=["falcon", "npo_nll-same-stream", "npo_nll"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--known", type=int, nargs="+", default=KNOWN, help="with --grid: known facts")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the known facts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*arguments.rows, ORACLE)}
    for seed, name in itertools.product(arguments.seeds, rows):
        oracle = name == ORACLE
        folder = arguments.runs / "runs" / (arguments.rows[0] if oracle else name) / f"seed-{seed}"
        kept = arguments.runs / "relearning" / name / f"seed-{seed}.json"
        if arguments.grid:
            curves = curves_of(folder, kept, oracle=oracle, known=arguments.known, draws=arguments.draws)
            rows[name].append(summary(curves, arguments.known[0]))
        else:
            rows[name].append(attacked(folder, oracle=oracle, draws=arguments.draws))
    if arguments.json:
        print(json.dumps({"seeds": arguments.seeds, "rows": rows}, indent=2))
        return

    def mean(name: str, column: str) -> str:
        values = [each[column] for each in rows[name]]
        return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"

    def difference(name: str, column: str) -> str:
        mine, its = ([each[column] for each in rows[row]] for row in (name, reference))
        apart = f"{statistics.mean(mine) - statistics.mean(its):+.3f}"
        tested = len(mine) > 1 and len({a - b for a, b in zip(mine, its, strict=True)}) > 1
        return f"{apart} p = {ttest_rel(mine, its).pvalue:.3f}" if tested else apart

    columns = list(rows[ORACLE][0])
    print_table(rows, columns, mean)
    for reference in (arguments.rows[0], ORACLE):
        print(f"\nless {reference}:")
        print_table([name for name in rows if name != reference], columns, difference)


if __name__ == "__main__":
    main()
