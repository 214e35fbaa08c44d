"""What a comparison is made of: cells times seeds as a grid file says, or recipes, made ready to run.

All cells of a grid share models, data and the split of the facts: what trials are judged on is never in the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from falcon_unlearn import embedded
from falcon_unlearn.artifacts import to_plain, write_jsonl
from falcon_unlearn.config import Section
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import content_hash, load_corpus
from falcon_unlearn.earlier import earlier_requests
from falcon_unlearn.errors import UserError, did_you_mean
from falcon_unlearn.model.shards import fingerprint
from falcon_unlearn.presets import deep_merge
from falcon_unlearn.recipe import Recipe, key_places, load_recipe, recipe_from, with_absolute_paths
from falcon_unlearn.selection.sweep import split_validation
from falcon_unlearn.stages import evaluation_sets

if TYPE_CHECKING:
    from optuna import Trial

EMBEDDED = "embedded"
_SPLIT_SEED = 0
_SHARED_BY_ALL = ("model", "after", "output", "seed", "evaluation")
_CELL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


# the grid


class Search(Section):
    """Values to try for one key of the recipe: a range, or a list."""

    low: int | float | None = None
    """Least value; low and high both whole numbers: whole numbers only."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Draw evenly in the logarithm."""
    choices: tuple[Any, ...] | None = Field(None, min_length=1)
    """Instead of a range: any values."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> Search:
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError("give low and high, or choices")
        if self.choices is None:
            if self.low is None or self.high is None or self.low >= self.high:
                raise ValueError("low must be below high")
            if self.log and self.low <= 0:
                raise ValueError("with log, low must be above 0")
        return self

    @property
    def first(self) -> Any:
        """Some value of it, to check a recipe with."""
        return self.low if self.choices is None else self.choices[0]

    def suggest(self, trial: Trial, key: str) -> Any:
        """Let a trial choose."""
        if self.choices is not None:  # as JSON: Optuna keeps plain values only
            return json.loads(str(trial.suggest_categorical(key, [json.dumps(choice) for choice in self.choices])))
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


class TuningConfig(Section):
    """How the searched keys of each cell are chosen."""

    trials: int = Field(12, ge=1)
    """Trials of each cell that searches anything."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """A trial's score is its mean over these seeds."""
    validation_share: float = Field(0.25, gt=0, lt=1)
    """Share of each scored set's facts that trials are judged on; the table is made of the others alone."""


class Cell(Section):
    """One row of the table: what it lays on the shared recipe, and what of it is searched."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Every other key of the cell, nested or dotted."""
    search: dict[str, Search] = Field(default_factory=dict)
    """By dotted key of the recipe."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        if raw is None or isinstance(raw, Mapping):
            raw = dict(raw or {})
            return {"search": raw.pop("search", {}) or {}, "overrides": raw}
        return raw


class Grid(Section):
    """Cells times seeds."""

    base: str = EMBEDDED
    """embedded: the demo's world and models of each seed; else a recipe, from the grid's folder."""
    output: str = Field("runs/compare", min_length=1)
    """Where everything goes, from the current directory."""
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Of the table."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Laid on the base for every cell, nested or dotted."""
    tuning: TuningConfig = TuningConfig()
    """Used where a cell searches anything."""
    cells: dict[str, Cell] = Field(min_length=1)
    """By the name of the row."""

    @model_validator(mode="after")
    def _plain_names(self) -> Grid:
        for name in self.cells:
            if not _CELL_NAME.fullmatch(name):
                raise ValueError(f"cell '{name}': a name is made of letters, digits and _ . + -")
        return self


def load_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        UserError: missing, not YAML, or anything wrong with its keys (all mistakes at once).
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"grid {path}: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UserError(f"{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: a grid is a mapping of keys; see benchmarks/methods.yaml")
    places = key_places(text, str(path))
    try:
        return Grid.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_grid_mistake(item, places, str(path)) for item in error.errors())) from error


def _grid_mistake(error: Mapping[str, Any], places: Mapping[str, str], where: str) -> str:
    location = [str(part) for part in error["loc"] if part not in {"int", "float"}]
    key = ".".join(location)
    stands = next(
        (places[".".join(location[:n])] for n in range(len(location), 0, -1) if ".".join(location[:n]) in places), where
    )
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"tuning": TuningConfig, "cells": Search}
        section = sections.get(location[0], Grid)
        message = "unknown key" + did_you_mean(location[-1], section.model_fields)
    return f"{stands}: {key + ': ' if key else ''}{message[:1].lower()}{message[1:]}"


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``, at the top level; a method's bare name becomes its section."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        if key == "method" and isinstance(value, str):
            parents, last = ["method"], "name"
        inner: Any = {last: value}
        for parent in reversed(parents):
            inner = {parent: inner}
        result = deep_merge(result, inner)
    return result


def lay_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``over`` (nested or dotted) on a raw recipe; another method begins without the knobs of the one below."""
    below, above = _nested(under), _nested(over)
    methods = [raw.get("method") for raw in (below, above)]  # what is no mapping is named by validation
    names = [method.get("name") if isinstance(method, Mapping) else None for method in methods]
    if names[1] is not None and names[0] != names[1]:
        below.pop("method", None)
    return deep_merge(below, above)


# facts that are scored, facts that trials are judged on


def split_facts(
    sets: Mapping[str, Sequence[Record]], share: float
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Split scored sets into (scored, validation) so that no fact stands on both sides, in whatever set.

    Records with the same answer are one fact. The split depends on the records alone, not on any seed.

    Args:
        sets: records by set.
        share: wanted share of facts in the validation part of each set.

    Raises:
        UserError: a set is too small to have facts on both sides.
    """
    seen: set[str] = set()
    held: set[str] = set()
    for records in sets.values():
        new = [fact for fact in dict.fromkeys(record.key[1] for record in records) if fact not in seen]
        seen |= set(new)
        if len(new) > 1:
            held |= {new[i] for i in split_validation(new, share, _SPLIT_SEED)[1]}
    scored = {name: [r for r in records if r.key[1] not in held] for name, records in sets.items()}
    validation = {name: [r for r in records if r.key[1] in held] for name, records in sets.items()}
    for name in sets:
        if not scored[name] or not validation[name]:
            raise UserError(f"evaluation: set '{name}' has too few facts to keep some of them back for tuning")
    return scored, validation


def _row_of(record: Record) -> dict[str, Any]:
    """The row that :func:`~falcon_unlearn.corpus.records.record_from_row` reads this record from."""
    rows: Mapping[str, Mapping[str, Any]] = {
        "text": {"text": record.answer},
        "qa": {"question": record.prompt, "answer": record.answer},
        "completion": {"prompt": record.prompt, "completion": record.answer},
        "chat": {"messages": [{"role": role, "content": content} for role, content in record.messages]},
    }
    optional = {
        "value": record.value,
        "paraphrased_answer": record.paraphrased_answer,
        "perturbed_answer": list(record.perturbed_answers) or None,
        "heldout_question": record.heldout_question,
        "entity": record.entity,
    }
    return {**rows[record.kind], **{name: value for name, value in optional.items() if value is not None}}


# what is to be run


@dataclass(frozen=True)
class CellPlan:
    """One row, ready to run.

    Attributes:
        name: of the row.
        final: raw recipe of each seed of the table.
        trial: raw recipe of each tuning seed; it scores validation facts only.
        search: what the trials choose.
        base_dir: where relative paths of the raw recipes start.
        folders: run folder of each seed, where a recipe named it.
    """

    name: str
    final: Mapping[int, Mapping[str, Any]]
    trial: Mapping[int, Mapping[str, Any]]
    search: Mapping[str, Search]
    base_dir: Path
    folders: Mapping[int, Path] = field(default_factory=dict)

    def recipe(self, raw: Mapping[str, Any], parameters: Mapping[str, Any], output: Path) -> Recipe:
        """A recipe of this row with the searched keys set.

        Raises:
            UserError: anything wrong with it.
        """
        laid = lay_over(lay_over(raw, parameters), {"output": str(output)})
        return with_absolute_paths(recipe_from(laid, f"cells.{self.name}"), self.base_dir)


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know; it is sent to other processes as it is."""

    output: Path
    cells: tuple[CellPlan, ...]
    seeds: tuple[int, ...]
    trials: int = 0
    validation_share: float | None = None
    weights: str = ""
    """Hash of the models of a recipe base and of the patches below, which may be made anew under the same path."""

    def path(self, *parts: str) -> Path:
        """Below the output folder."""
        return self.output.joinpath(*parts)


def _base_of(grid: Grid, grid_path: Path, inputs: Path, seed: int) -> tuple[dict[str, Any], Path]:
    if grid.base == EMBEDDED:
        raw = embedded.demo_recipe(inputs, inputs, seed)
        return {key: raw[key] for key in raw if key not in {"method", "selection"}}, inputs  # each method has its own
    path = next((p for p in (grid_path.parent / grid.base, Path(grid.base)) if p.exists()), None)
    if path is None:
        raise UserError(f"{grid_path}: base: no recipe at {grid.base}; name one, or 'embedded'")
    load_recipe(path)  # its own mistakes first, where they stand
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lay_over(raw, {"seed": seed}), path.parent.resolve()


def _scored_from(raw: Mapping[str, Any], folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Point the evaluation of a raw recipe to the files of ``folder``."""
    files = {name: {"source": str(folder / f"{name}.jsonl")} for name in names}
    evaluation = {**raw.get("evaluation", {}), "forget": files.pop("forget"), "retain": files.pop("retain")}
    return {**raw, "evaluation": {**evaluation, "utility": files}}


def plan_grid(grid: Grid, grid_path: Path, console: Console) -> Plan:
    """Check every cell, then make ready what all of them share: models, data, the split of the facts.

    Args:
        grid: from :func:`load_grid`.
        grid_path: where it was read from.
        console: says when a training of minutes begins.

    Raises:
        UserError: a cell is no valid recipe, or the data cannot be read or split; nothing was run then.
    """
    output = Path(grid.output).expanduser().resolve()
    searched = any(cell.search for cell in grid.cells.values())
    share = grid.tuning.validation_share if searched else None
    seeds = tuple(dict.fromkeys((*grid.seeds, *(grid.tuning.seeds if searched else ()))))
    _check_cells(grid, grid_path, output)
    finals: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in grid.cells}
    trials: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in grid.cells}
    base_dir = output
    for seed in seeds:
        inputs = output / "inputs" / f"seed-{seed}"
        raw, base_dir = _base_of(grid, grid_path, inputs, seed)
        raw = lay_over(raw, grid.shared)
        if grid.base == EMBEDDED and not (inputs / "oracle" / "model.safetensors").exists():
            embedded.write_corpora(build_world(seed), inputs)
            embedded.write_models(seed, inputs, retrain=False, say=console.say)
        facts, names = _write_sets(raw, base_dir, inputs, share)
        for name, cell in grid.cells.items():
            laid = lay_over(raw, cell.overrides)
            if seed in grid.seeds:
                finals[name][seed] = _scored_from(laid, facts / "scored", names)
            if cell.search and seed in grid.tuning.seeds:
                judged = _scored_from(laid, facts / "validation", names)
                trials[name][seed] = _without_extras(judged)
    cells = tuple(
        CellPlan(name, finals[name], trials[name], cell.search, base_dir) for name, cell in grid.cells.items()
    )
    trials_of_each = grid.tuning.trials if searched else 0
    weights = _weights(finals, base_dir, embedded=grid.base == EMBEDDED)
    return Plan(output, cells, tuple(dict.fromkeys(grid.seeds)), trials_of_each, share, weights)


def _without_extras(judged: Mapping[str, Any]) -> dict[str, Any]:
    """A trial is judged by S alone: no oracle, no suites or earlier sets, no attacks, no trackers, no generations."""
    evaluation = {key: value for key, value in judged.get("evaluation", {}).items() if key not in {"oracle", "suites"}}
    kept = {key: value for key, value in judged.items() if key not in {"attacks", "trackers"}}
    return lay_over(kept | {"evaluation": evaluation}, {"report.samples": 0, "evaluation.earlier": False})


def _weights(finals: Mapping[str, Mapping[int, Mapping[str, Any]]], base_dir: Path, *, embedded: bool) -> str:
    """Hash of every local model and oracle that the runs name, and of the patches they stand on.

    Empty for embedded models alone: their seed says what they are.

    Raises:
        UserError: what ``after`` names is not there, or no patch.
    """
    runs = [raw for recipes in finals.values() for raw in recipes.values()]
    after = runs[0].get("after") or ()  # the same for all
    named = [after] if isinstance(after, str) else after
    requests = earlier_requests([str(path if (path := base_dir / name).exists() else name) for name in named])
    if embedded and not requests:
        return ""
    names = {
        str(name) for raw in runs for name in (raw.get("model"), (raw.get("evaluation") or {}).get("oracle")) if name
    }
    folders = sorted(path for name in names if (path := base_dir / name).is_dir())
    return digest([*map(fingerprint, folders), *(request.patch.id for request in requests)])


def _check_cells(grid: Grid, grid_path: Path, output: Path) -> None:
    mistakes = []
    places = key_places(grid_path.read_text(encoding="utf-8"), str(grid_path))
    raw, _ = _base_of(grid, grid_path, output, grid.seeds[0])
    raw = lay_over(raw, grid.shared)
    for name, cell in grid.cells.items():
        place = f"{places.get(f'cells.{name}', grid_path)}: cells.{name}"
        own = _nested(lay_over(cell.overrides, {key: search.first for key, search in cell.search.items()}))
        taken = [key for key in _SHARED_BY_ALL if key in own]
        taken += [f"corpus.{side}" for side in ("forget", "retain") if side in own.get("corpus", {})]
        if taken:
            mistakes.append(f"{place}: {taken[0]} is the same for all cells: put it under shared, or into the grid")
            continue
        try:
            recipe = recipe_from(lay_over(raw, {**own, "output": str(output)}), place)
        except UserError as error:
            mistakes.append(str(error))
            continue
        if not recipe.evaluation.enabled:
            mistakes.append(f"{place}: evaluation.enabled is false, so there is nothing to compare")
    if mistakes:
        raise UserError("\n".join(mistakes))


def _write_sets(raw: Mapping[str, Any], base_dir: Path, inputs: Path, share: float | None) -> tuple[Path, list[str]]:
    """Write the scored and the validation facts of a seed; return their folder and the names of the sets.

    The folder is named after all records, those to train on too: where they change, every recipe changes with them.
    """
    recipe = recipe_from(lay_over(raw, {"output": str(inputs), "evaluation.max_records": None}))
    corpus = load_corpus(recipe.corpus, base_dir)
    sets = evaluation_sets(recipe, corpus, base_dir)
    scored, validation = (dict(sets), {}) if share is None else split_facts(sets, share)
    hashes = [*corpus.hashes.values(), *map(content_hash, scored.values()), *map(content_hash, validation.values())]
    facts = inputs / f"facts-{digest(hashes)[:12]}"
    for part, records_of in (("scored", scored), ("validation", validation)):
        (facts / part).mkdir(parents=True, exist_ok=True)
        for name, records in records_of.items():
            write_jsonl(facts / part / f"{name}.jsonl", [_row_of(record) for record in records])
    return facts, list(sets)


def plan_recipes(paths: Sequence[Path], output: Path) -> Plan:
    """One row a recipe, named like its file; each runs in its own output folder.

    Raises:
        UserError: a recipe is not valid, does not score, or writes where another one does.
    """
    cells: list[CellPlan] = []
    outputs: dict[str, Path] = {}
    for path in paths:
        recipe = load_recipe(path)
        if recipe.output in outputs:
            raise UserError(f"{path}: output: {recipe.output} is also that of {outputs[recipe.output]}; name another")
        if not recipe.evaluation.enabled:
            raise UserError(f"{path}: evaluation.enabled is false, so there is nothing to compare")
        outputs[recipe.output] = path
        taken = {cell.name for cell in cells}
        names = (path.stem, *(f"{path.stem}-{n}" for n in range(2, len(paths) + 1)))
        name = next(name for name in names if name not in taken)
        raw = recipe.model_dump(mode="json")
        folders = {recipe.seed: Path(recipe.output)}
        cells.append(CellPlan(name, {recipe.seed: raw}, {}, {}, path.parent, folders))
    seeds = tuple(dict.fromkeys(seed for cell in cells for seed in cell.final))
    return Plan(output.expanduser().resolve(), tuple(cells), seeds)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()
