"""Which selector finds the layer for FALCON in one layer (`preset: layer`)? Every layer is run, so the best is known.

    python benchmarks/layer_selectors.py truth            # one run at every layer of every setting; 20 minutes of CPU
    python benchmarks/layer_selectors.py scores           # every selector on every setting
    python benchmarks/layer_selectors.py table            # from what the two left in --out

A setting is a seed of the embedded benchmark and a size. Results are kept line by line in --out, so that a run that
was stopped goes on; models of other sizes than the demo's are trained once, and kept there too.
S = model utility kept - (forget probability + accuracy) / 2, on all facts the demo scores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from falcon_unlearn import embedded
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoded, Encoder, collate, length_sorted_batches
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import load_corpus
from falcon_unlearn.corpus.stand_ins import stand_ins
from falcon_unlearn.engine.pretraining import LlamaShape
from falcon_unlearn.evaluation.metrics import compute_metrics
from falcon_unlearn.model.decoder import replaced
from falcon_unlearn.model.loading import ModelSource, load_causal_lm, load_config, load_tokenizer, resolve_model
from falcon_unlearn.recipe import Recipe, apply_overrides, recipe_from
from falcon_unlearn.selection.gradients import gradient_relations
from falcon_unlearn.selection.mutual_information import published_mutual_information, rank_correlation
from falcon_unlearn.selection.separation import linear_cka, mmd_squared, probe
from falcon_unlearn.stages import (
    CachePlan,
    EncodedCorpus,
    Watch,
    encode_corpus,
    evaluation_sets,
    given_layers,
    resident_means,
    score_model,
    select_layers,
    unlearn_layers,
)

ACTIVATION_RECORDS = 96
"""A side, for what looks at activations; published MI needs more records than dimensions."""

GRADIENT_RECORDS = 32
"""A side, for what looks at gradients."""

SWEEPS: dict[str, tuple[str, ...]] = {
    "sweep (40 steps of 32)": (),
    "sweep (10 steps of 8)": (
        "selection.sweep.steps=10",
        "selection.sweep.max_validation=32",
        "training.batch_size=8",
        "training.optimizer.lr_at_width_128=0.02",
    ),
}

QUIET = Console(quiet=True)
REPEAT = 1000
"""Repeat r of a run has the recipe's seed plus r times this: other batches, another offset vector."""


WITHIN = 0.01
"""A choice is a hit if its layer's S is at most this share below the best layer's."""

HOPELESS = 0.1
"""A layer whose first run ends so far below the best one's is not run again."""


@dataclass(frozen=True)
class Setting:
    """A world and the shape of the model that learned it; ``judged`` ones had no part in choosing a selector."""

    seed: int
    layers: int = 6
    hidden: int = 128
    judged: bool = True

    @property
    def name(self) -> str:
        """Such as ``8x96/seed-8``."""
        return f"{self.layers}x{self.hidden}/seed-{self.seed}"

    @property
    def is_demo(self) -> bool:
        """Whether the demo's own models serve."""
        return (self.layers, self.hidden) == (6, 128)


SETTINGS = (
    Setting(5, judged=False),
    Setting(6, judged=False),
    *(Setting(seed) for seed in range(5)),
    Setting(10),
    Setting(11),
    Setting(12, 8, 96, judged=False),
    Setting(7, 4, 128),
    Setting(8, 8, 96),
    Setting(9, 5, 96),
)


@dataclass(frozen=True)
class Opened:
    """A setting, ready to be run."""

    recipe: Recipe
    source: ModelSource
    encoder: Encoder
    encoded: EncodedCorpus
    sets: dict[str, list[Record]]


def model_folder(setting: Setting, out: Path) -> Path:
    """The setting's model, trained where there is none yet."""
    if setting.is_demo:
        with tempfile.TemporaryDirectory() as warm:
            embedded.write_models(
                setting.seed, Path(warm), retrain=False, say=lambda line: print(line, file=sys.stderr)
            )
        cached = embedded.cache_folder() / f"seed-{setting.seed}" / "model"
        if setting.seed != embedded.SHIPPED_SEED and cached.is_dir():
            return cached
    folder = out / "models" / setting.name.replace("/", "-")
    if not (folder / "model.safetensors").exists():
        if setting.is_demo:
            embedded.write_models(setting.seed, folder.parent / "shipped", retrain=False, say=print)
            return folder.parent / "shipped" / "model"
        shape = LlamaShape(layers=setting.layers, hidden=setting.hidden, mlp=2 * setting.hidden)
        staging = folder.with_name(f".{folder.name}.tmp")
        embedded.train_part(setting.seed, "model", staging, shape)
        staging.rename(folder)
    return folder


def open_setting(setting: Setting, out: Path, *overrides: str, repeat: int = 0) -> Opened:
    """The demo's recipe with preset layer on the setting's model."""
    inputs = out / "corpora" / f"seed-{setting.seed}"
    embedded.write_corpora(build_world(setting.seed), inputs)
    raw = apply_overrides(
        embedded.demo_recipe(out / "none", inputs, setting.seed + REPEAT * repeat),
        ["method.preset=layer", "attacks={}", f"model={model_folder(setting, out)}", *overrides],
    )
    recipe = recipe_from(raw)
    corpus = load_corpus(recipe.corpus, Path.cwd())
    source = resolve_model(recipe.model, Path.cwd(), device="cpu", dtype=recipe.dtype)
    encoder = Encoder(load_tokenizer(source))
    encoded = encode_corpus(recipe, corpus, encoder, load_config(source))
    return Opened(recipe, source, encoder, encoded, evaluation_sets(recipe, corpus, Path.cwd()))


def scored(opened: Opened, model: Any) -> tuple[float, float]:
    """Model utility, and what is left of the forget data: the mean of probability and accuracy."""
    metrics = compute_metrics(score_model(model, opened.encoder, opened.sets, opened.recipe, QUIET), None)
    assert metrics.model_utility is not None
    return metrics.model_utility, (metrics.forget_probability + metrics.forget_accuracy) / 2


@contextmanager
def timed(row: dict[str, Any], key: str) -> Iterator[None]:
    """Write the seconds of a block into ``row``; CPU time, as others may work on the same core."""
    began = time.process_time()
    yield
    row[key] = time.process_time() - began


def truth(setting: Setting, layer: int, repeat: int, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One whole run at one layer."""
    opened = open_setting(setting, out, f"selection.layers=[{layer}]", *overrides, repeat=repeat)
    row: dict[str, Any] = {"setting": setting.name, "layer": layer, "repeat": repeat}
    model = load_causal_lm(opened.source)
    selection = given_layers(opened.recipe, setting.layers)
    assert selection is not None
    watch = Watch(lambda *_: None, lambda _: None, lambda _: None, lambda _: None)  # type: ignore[arg-type]
    with timed(row, "train_seconds"), tempfile.TemporaryDirectory() as folder:
        cache = CachePlan(Path(folder) / "activations", resume=False, say=lambda _: None)
        trained = unlearn_layers(opened.recipe, model, opened.encoded, selection, cache=cache, watch=watch)
    model = load_causal_lm(opened.source)
    with timed(row, "score_seconds"), replaced(model, trained.tensors):
        row["utility"], row["left"] = scored(opened, model)
    return row


def before(setting: Setting, out: Path) -> dict[str, Any]:
    """The original model."""
    opened = open_setting(setting, out)
    utility, left = scored(opened, load_causal_lm(opened.source))
    return {"setting": setting.name, "layer": -1, "repeat": 0, "utility": utility, "left": left}


@dataclass(frozen=True)
class Sampled:
    """What the selectors that do not train look at: equally many records of both sides, and stand-ins of the first."""

    forget: list[Encoded]
    retain: list[Encoded]
    groups: list[str]
    strangers: list[Encoded]


def sampled(opened: Opened, most: int) -> Sampled:
    """At most ``most`` records a side."""
    encoded, rng = opened.encoded, random.Random(f"selectors {opened.recipe.seed}")
    sides: dict[str, list[int]] = {}
    for side in ("forget", "retain"):
        count = len(encoded.groups[f"{side}.{side}"])
        sides[side] = sorted(rng.sample(range(count), min(most, count, len(encoded.groups["forget.forget"]))))
    records = [encoded.records["forget.forget"][i] for i in sides["forget"]]
    others = stand_ins(records, encoded.records["retain.retain"], opened.encoder, opened.recipe.seed, count=1)
    return Sampled(
        [encoded.forget["forget"][i] for i in sides["forget"]],
        [encoded.retain["retain"][i] for i in sides["retain"]],
        [encoded.groups[f"{side}.{side}"][i] for side in sides for i in sides[side]],
        [option for (option,) in others],
    )


def without_training(setting: Setting, out: Path) -> Iterator[dict[str, Any]]:
    """Selectors that look at activations or gradients, each oriented so that the layer with the largest is chosen."""
    opened = open_setting(setting, out)
    model, layers = load_causal_lm(opened.source), range(setting.layers)
    shared: dict[str, Any] = {}
    drawn = sampled(opened, ACTIVATION_RECORDS)
    means = resident_means(model, opened.encoded, 32)
    with timed(shared, "seconds"):
        forget = means(drawn.forget, layers)
        retain = means(drawn.retain, layers)
    with timed(shared, "strangers"):
        strangers = means(drawn.strangers, layers)

    def row(name: str, scores: Sequence[float], seconds: float) -> dict[str, Any]:
        return {"setting": setting.name, "selector": name, "scores": list(scores), "seconds": seconds}

    def by_activations(name: str, score: Callable[[int], float], more: float = 0.0) -> dict[str, Any]:
        own: dict[str, Any] = {}
        with timed(own, "seconds"):
            scores = [score(layer) for layer in layers]
        return row(name, scores, shared["seconds"] + own["seconds"] + more)

    yield by_activations("published MI", lambda n: -published_mutual_information(forget[n], retain[n]))
    yield by_activations("domain MI", lambda n: probe(forget[n], retain[n], drawn.groups).information)
    yield by_activations("probe error", lambda n: -probe(forget[n], retain[n], drawn.groups).error)
    yield by_activations("MMD", lambda n: mmd_squared(forget[n], retain[n]))
    # Retain means are not looked at here.
    saved = shared["strangers"] - shared["seconds"] / 2
    yield by_activations("CKA with stand-ins", lambda n: -linear_cka(forget[n], strangers[n]), saved)

    few = sampled(opened, GRADIENT_RECORDS)
    forget_batches, retain_batches = (
        [collate([side[i] for i in at], opened.encoded.pad_id) for at in length_sorted_batches(side, 32)]
        for side in (few.forget, few.retain)
    )
    own: dict[str, Any] = {}
    with timed(own, "seconds"):
        relations = gradient_relations(model, forget_batches, retain_batches, layers)
    yield row("gradient conflict", [-r.cosine for r in relations], own["seconds"])
    yield row("gradient selectivity", [r.selectivity for r in relations], own["seconds"])
    yield row("last layer", list(layers), 0.0)
    yield row("depth 1/2", [-abs(n - setting.layers / 2) for n in layers], 0.0)
    yield row("depth 3/4", [-abs(n - 3 * setting.layers / 4) for n in layers], 0.0)


def by_trial(setting: Setting, name: str, out: Path) -> dict[str, Any]:
    """The sweep with the given settings, as the command ``layers`` runs it."""
    opened = open_setting(setting, out, f"selection.max_candidates={setting.layers}", *SWEEPS[name])
    opened = replace(
        opened,
        recipe=opened.recipe.model_copy(
            update={"selection": opened.recipe.selection.model_copy(update={"show_mutual_information": False})}
        ),
    )
    model = load_causal_lm(opened.source)
    row: dict[str, Any] = {"setting": setting.name, "selector": name}
    with timed(row, "seconds"):
        found = select_layers(
            opened.recipe,
            opened.encoded,
            QUIET,
            total=setting.layers,
            model=lambda: model,
            means=lambda: resident_means(model, opened.encoded, 32),
        )
    row["scores"] = [score.score for score in found.scores]
    row["details"] = [dict(score.details) for score in found.scores]
    return row


def run_scores(out: Path, names: list[str]) -> None:
    """Run what is missing."""
    path = out / "scores.jsonl"
    done = {(row["setting"], row["selector"]) for row in read(path)}
    for setting in SETTINGS:
        if names and setting.name not in names:
            continue
        if (setting.name, "published MI") not in done:
            for row in without_training(setting, out):
                keep(path, row)
        for name in SWEEPS:
            if (setting.name, name) not in done:
                keep(path, by_trial(setting, name, out))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows kept so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> None:
    """Append a row."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    print(row, file=sys.stderr, flush=True)


def outcomes(out: Path) -> dict[str, dict[int, list[float]]]:
    """S of every run so far, by setting and layer, the first repeat first."""
    rows = read(out / "truth.jsonl")
    original = {row["setting"]: row["utility"] for row in rows if row["layer"] < 0}
    found: dict[str, dict[int, list[float]]] = {}
    for row in sorted((row for row in rows if row["layer"] >= 0), key=lambda row: row["repeat"]):
        kept = row["utility"] / original[row["setting"]]
        found.setdefault(row["setting"], {}).setdefault(row["layer"], []).append(kept - row["left"])
    return found


def run_truth(out: Path, repeats: int, names: list[str], overrides: Sequence[str]) -> None:
    """Run what is missing."""
    path = out / "truth.jsonl"
    done = {(row["setting"], row["layer"], row["repeat"]) for row in read(path)}
    for repeat in range(repeats):
        for setting in SETTINGS:
            if names and setting.name not in names:
                continue
            if (setting.name, -1, 0) not in done:
                keep(path, before(setting, out))
                done.add((setting.name, -1, 0))
            first = {layer: rows[0] for layer, rows in outcomes(out).get(setting.name, {}).items()}
            for layer in range(setting.layers):
                hopeless = repeat > 0 and first[layer] < max(first.values()) - HOPELESS
                if (setting.name, layer, repeat) not in done and not hopeless:
                    keep(path, truth(setting, layer, repeat, out, overrides))


ONE_RUN = "one whole run a layer"


@dataclass(frozen=True)
class Judged:
    """A selector on one setting: how far below the best layer's S its choice is, as a share; and the rest."""

    regret: float
    correlation: float
    of_training: float
    of_run: float


def judged(found: dict[int, list[float]], scores: dict[int, float], seconds: float, costs: dict[str, float]) -> Judged:
    """Judge by the mean S of each layer's runs; layers without a score count as not chosen."""
    means = {layer: statistics.mean(values) for layer, values in found.items()}
    chosen = min(scores, key=lambda layer: (-scores[layer], layer))
    correlation = rank_correlation([scores[n] for n in scores], [means[n] for n in scores])
    return Judged(
        1 - means[chosen] / max(means.values()),
        math.nan if correlation is None else correlation,
        seconds / costs["train"],
        seconds / (costs["train"] + 2 * costs["score"]),
    )


def costs_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean seconds of training and of scoring once, by setting."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["layer"] >= 0:
            seconds = found.setdefault(row["setting"], {"train": [], "score": []})
            for part, values in seconds.items():
                values.append(row[f"{part}_seconds"])
    return {setting: {part: statistics.mean(v) for part, v in seconds.items()} for setting, seconds in found.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over settings."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return math.nan, math.nan
    draws = np.random.default_rng(0).choice(known, (10_000, len(known))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def table(out: Path, *, chosen_on: bool) -> None:
    """Print, for the judged settings or for those that a selector was chosen on."""
    truths, costs = outcomes(out), costs_of(read(out / "truth.jsonl"))
    names = [s.name for s in SETTINGS if s.judged is not chosen_on and s.name in truths]
    found: dict[str, list[Judged]] = {}
    for row in read(out / "scores.jsonl"):
        if row["setting"] in names:
            scores = dict(enumerate(row["scores"]))
            found.setdefault(row["selector"], []).append(
                judged(truths[row["setting"]], scores, row["seconds"], costs[row["setting"]])
            )
    for name in names:
        runs = truths[name]
        again = {layer: values[1:] for layer, values in runs.items() if len(values) > 1}
        if again:
            first = {layer: runs[layer][0] for layer in again}
            every = len(runs) * (costs[name]["train"] + costs[name]["score"])
            found.setdefault(ONE_RUN, []).append(judged(again, first, every, costs[name]))
    print(f"{'':26}{'regret':>9}{'within 1 %':>12}{'rank correlation':>24}{'of training':>13}{'of run':>9}")
    for selector, rows in found.items():
        low, high = interval([row.correlation for row in rows])
        known = [row.correlation for row in rows if not math.isnan(row.correlation)]
        mean = statistics.mean(known) if known else math.nan
        within = sum(row.regret <= WITHIN for row in rows)
        print(
            f"{selector:26}{statistics.mean(row.regret for row in rows):>9.3f}{f'{within} of {len(rows)}':>12}"
            f"{f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]':>24}{statistics.mean(row.of_training for row in rows):>13.0%}"
            f"{statistics.mean(row.of_run for row in rows):>9.0%}"
        )
    means = [[statistics.mean(values) for _, values in sorted(truths[name].items())] for name in names]
    regrets = [[1 - mean / max(of_setting) for mean in of_setting[1:]] for of_setting in means]
    hits = sum(statistics.mean(regret <= WITHIN for regret in row) for row in regrets)
    regret = statistics.mean(statistics.mean(row) for row in regrets)
    print(f"{'any but the first layer':26}{regret:>9.3f}{f'{hits:.1f} of {len(names)}':>12}  (what chance would get)")


def table_of_layers(out: Path) -> None:
    """Print the mean S of every layer of every setting, and how much S differs between runs of one layer."""
    truths = outcomes(out)
    variances, between = [], []
    for setting in SETTINGS:
        runs = truths.get(setting.name, {})
        best = max((statistics.mean(values) for values in runs.values()), default=math.nan)
        cells = []
        for _, values in sorted(runs.items()):
            mean = statistics.mean(values)
            cells.append(f"{mean:.3f}{'*' if mean >= (1 - WITHIN) * best else ' '}")
            if len(values) > 1 and mean >= best - HOPELESS:
                variances.append((statistics.variance(values), len(values) - 1))
        above = [statistics.mean(values) for layer, values in runs.items() if layer > 0]
        if len(above) > 1:
            between.append((statistics.variance(above), len(above) - 1))
        repeats = max((len(values) for values in runs.values()), default=0)
        print(f"{setting.name:16}{'' if setting.judged else 'chosen on':>10}{repeats:>3} " + " ".join(cells))
    print("(*: within 1 % of the best)")
    for what, found in (("runs of one layer", variances), ("layers' means, the first left out", between)):
        freedom = sum(n for _, n in found)
        if freedom:
            sd = math.sqrt(sum(v * n for v, n in found) / freedom)
            print(f"standard deviation of S within a setting between {what}: {sd:.4f} ({freedom} df)")


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["models", "truth", "scores", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/selectors"))
    parser.add_argument("--settings", nargs="*", default=[], help="only these, such as 8x96/seed-8")
    parser.add_argument("--repeats", type=int, default=1, help="truth: runs at every layer")
    parser.add_argument("--override", nargs="*", default=[], help="truth: other training; wants an --out of its own")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if arguments.part == "models":
        for setting in SETTINGS:
            model_folder(setting, arguments.out)
    elif arguments.part == "truth":
        run_truth(arguments.out, arguments.repeats, arguments.settings, arguments.override)
    elif arguments.part == "scores":
        run_scores(arguments.out, arguments.settings)
    else:
        table_of_layers(arguments.out)
        for chosen_on in (True, False):
            print("\nsettings a selector was chosen on" if chosen_on else "\njudged settings")
            table(arguments.out, chosen_on=chosen_on)


if __name__ == "__main__":
    main()
