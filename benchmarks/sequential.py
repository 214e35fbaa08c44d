"""Deletion requests one after another: the demo's six people in three requests of two, against one request of six.

    python benchmarks/sequential.py                           # seeds 0..2
    python benchmarks/sequential.py --seeds 0 --json
    python benchmarks/sequential.py --prepare runs/weeks      # only the data and recipes, to run by hand

As with real requests, nobody knows who will ask next: the retain set of every week holds all sixty people, and each
run leaves out those who asked so far (corpus.on_overlap: drop). Utility is scored on people who never ask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from falcon_unlearn.artifacts import write_jsonl
from falcon_unlearn.corpus.fictional import Fact, build_world
from falcon_unlearn.embedded import demo_recipe, write_corpora, write_models

REQUESTS = 3


def _rows(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    return [row for fact in facts for row in fact.training_rows()]


def prepare(seed: int, folder: Path) -> list[Path]:
    """Write models, data and recipes: ``week1.yaml`` to ``week3.yaml``, and ``all.yaml`` for one request of six."""
    inputs = folder / "inputs"
    world = build_world(seed)
    write_corpora(world, inputs)
    write_models(seed, inputs, retrain=False, say=lambda line: print(line, file=sys.stderr))
    write_jsonl(inputs / "everyone.jsonl", _rows((*world.forget, *world.retain)))
    people = list(dict.fromkeys(fact.entity for fact in world.forget))
    size = len(people) // REQUESTS
    asking = {f"week{week + 1}": people[week * size : (week + 1) * size] for week in range(REQUESTS)}
    recipes = []
    for name, entities in {**asking, "all": people}.items():
        facts = [fact for fact in world.forget if fact.entity in entities]
        write_jsonl(inputs / f"{name}.jsonl", _rows(facts))
        write_jsonl(inputs / f"score_{name}.jsonl", [fact.evaluation_row() for fact in facts])
        recipe: dict[str, Any] = demo_recipe((folder / name).resolve(), Path("inputs"), seed)
        del recipe["attacks"]
        recipe["corpus"] = {
            "forget": f"inputs/{name}.jsonl",
            "retain": "inputs/everyone.jsonl",
            "on_overlap": "drop",
        }
        recipe["selection"] = {"layers": "auto", "show_mutual_information": False}
        recipe["evaluation"] |= {"forget": f"inputs/score_{name}.jsonl"}
        if name != "all":  # the oracle has never seen any of the six
            del recipe["evaluation"]["oracle"]
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        recipes.append(path)
    return recipes


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "falcon_unlearn", *arguments], check=True, stdout=subprocess.DEVNULL)


def run_seed(seed: int, folder: Path) -> dict[str, float]:
    """Three requests in order, one of six beside them; the numbers of the table."""
    recipes = prepare(seed, folder)
    began = time.perf_counter()
    for number, recipe in enumerate(recipes[:REQUESTS], start=1):
        after = ["--after", str(folder / f"week{number - 1}")] if number > 1 else []
        _command("run", str(recipe), "--overwrite", *after)
    seconds = time.perf_counter() - began
    _command("run", str(recipes[-1]), "--overwrite")
    curve_folder = folder / "sustainability"
    _command("sustainability", str(folder / f"week{REQUESTS}"), "--out", str(curve_folder))
    curve = json.loads((curve_folder / "sustainability.json").read_text(encoding="utf-8"))
    row: dict[str, float] = {}
    for point in curve["points"]:
        row[f"utility {point['requests']}"] = point["utility"]["value"]
    last = curve["points"][-1]["forget"]
    for request in curve["requests"]:
        own = curve["points"][request["number"]]["forget"][str(request["number"])]
        row[f"acc {request['number']}"] = own["accuracy"]["value"]
        row[f"acc {request['number']} end"] = last[str(request["number"])]["accuracy"]["value"]
        row[f"prob {request['number']}"] = own["probability"]["value"]
        row[f"prob {request['number']} end"] = last[str(request["number"])]["probability"]["value"]
    once = json.loads((folder / "all" / "metrics.json").read_text(encoding="utf-8"))
    row["once utility"] = once["after"]["model_utility"]
    row["once acc"] = once["after"]["forget_accuracy"]
    row["once prob"] = once["after"]["forget_probability"]
    row["oracle prob"] = once["oracle"]["forget_probability"]
    row["seconds"] = seconds
    return row


def main() -> None:
    """Run the seeds and print the table, one column a seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/sequential"))
    parser.add_argument(
        "--prepare", type=Path, metavar="DIR", help="write data and recipes of the first seed, run none"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        for path in prepare(arguments.seeds[0], arguments.prepare):
            print(path)
        return
    rows = {}
    for seed in arguments.seeds:
        rows[seed] = run_seed(seed, arguments.out / f"seed-{seed}")
        print(f"seed {seed}: {rows[seed]}", file=sys.stderr)
    names = list(next(iter(rows.values())))
    mean = {name: statistics.mean(row[name] for row in rows.values()) for name in names}
    if arguments.json:
        print(json.dumps({"seeds": rows, "mean": mean}, indent=2))
        return
    print(f"{'':16}" + "".join(f"{f'seed {seed}':>10}" for seed in rows) + f"{'mean':>10}")
    for name in names:
        print(f"{name:16}" + "".join(f"{row[name]:>10.3f}" for row in rows.values()) + f"{mean[name]:>10.3f}")


if __name__ == "__main__":
    main()
