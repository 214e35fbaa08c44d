"""A run folder: what stands where, who may write into it, and how finished stages are read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from falcon_unlearn.artifacts import (
    LayerScore,
    LayerSelection,
    Metrics,
    MutualInformationCurve,
    SampleScore,
    read_jsonl,
    to_plain,
    write_json,
    write_jsonl,
)
from falcon_unlearn.errors import UserError
from falcon_unlearn.recipe import Recipe, save_recipe
from falcon_unlearn.stages import score_from_row, with_sets

_CONTENT = (
    "recipe.yaml",
    "corpus.json",
    "layer_selection.json",
    "training.jsonl",
    "checkpoint.safetensors",
    "patch",
    "scores",
    "metrics.json",
    "report.html",
    "provenance.json",
    "inputs",
)
_NOT_COMPARED = ("output", "report", "device")


@dataclass(frozen=True)
class RunFolder:
    """Paths and typed reading and writing of one run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_scores(self, model: str, scores: Mapping[str, Sequence[SampleScore]]) -> None:
        """Write ``scores/<model>.jsonl``, one line per sample."""
        (self.path / "scores").mkdir(exist_ok=True)
        write_jsonl(self.path / "scores" / f"{model}.jsonl", [score for rows in scores.values() for score in rows])

    def read_scores(self, model: str) -> dict[str, list[SampleScore]] | None:
        """Scores by set, or None where that model was not scored yet."""
        path = self.path / "scores" / f"{model}.jsonl"
        return with_sets([score_from_row(row) for row in read_jsonl(path)]) if path.exists() else None

    def write_selection(self, selection: LayerSelection) -> None:
        """Write ``layer_selection.json``."""
        write_json(self.path / "layer_selection.json", selection)

    def read_selection(self) -> LayerSelection | None:
        """The finished layer selection, or None."""
        path = self.path / "layer_selection.json"
        if not path.exists():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        curve = row["mutual_information"]
        return LayerSelection(
            selector=row["selector"],
            layers=tuple(row["layers"]),
            target_layer=row["target_layer"],
            criterion=row["criterion"],
            scores=tuple(
                LayerScore(s["layer"], float("-inf") if s["score"] is None else s["score"], s["details"])
                for s in row["scores"]
            ),
            mutual_information=None
            if curve is None
            else MutualInformationCurve(**{k: tuple(v) if isinstance(v, list) else v for k, v in curve.items()}),
            notes=tuple(row["notes"]),
        )

    def write_metrics(self, metrics: Mapping[str, Metrics | None]) -> None:
        """Write ``metrics.json``: before, after and oracle."""
        write_json(self.path / "metrics.json", metrics)


def open_run_folder(recipe: Recipe, *, resume: bool, overwrite: bool, allowed: Sequence[str] = ()) -> RunFolder:
    """Make the recipe's output folder ready, without writing anything but the folder itself.

    Args:
        recipe: validated, with an absolute output path.
        resume: go on in a folder of the same recipe.
        overwrite: remove what an earlier run left there (nothing else).
        allowed: names that may already stand there.

    Raises:
        UserError: the folder is not empty, is no folder, or holds a run of another recipe.
    """
    path = Path(recipe.output)
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path} is a file; name a folder")
    present = sorted(p.name for p in path.iterdir() if p.name not in allowed) if path.is_dir() else []
    if present and overwrite:
        foreign = [name for name in present if name not in _CONTENT and not name.endswith(".tmp")]
        if foreign or not (path / "recipe.yaml").exists():
            shown = (foreign or present)[0]
            raise UserError(f"output: {path} holds '{shown}', which no run wrote; --overwrite leaves it alone")
        for name in present:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    elif present and not resume:
        raise UserError(f"output: {path} is not empty; go on there with --resume, replace it with --overwrite")
    elif present:
        _same_recipe(recipe, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {path} cannot be created ({error.strerror})") from error
    return RunFolder(path)


def _same_recipe(recipe: Recipe, path: Path) -> None:
    file = path / "recipe.yaml"
    if not file.exists():
        raise UserError(f"output: {path} is not empty and holds no run to resume; choose another folder")
    earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    changed = [key for key in _differing(earlier, recipe.model_dump(mode="json")) if key not in _NOT_COMPARED]
    if changed:
        raise UserError(
            f"output: {path} holds a run of another recipe ({', '.join(changed)} differ); "
            "use --overwrite or another folder"
        )


def _differing(left: Any, right: Any, prefix: str = "") -> list[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = dict.fromkeys((*left, *right))
        return [
            name
            for key in keys
            if f"{prefix}{key}" not in _NOT_COMPARED
            for name in _differing(left.get(key), right.get(key), f"{prefix}{key}.")
        ]
    return [] if left == right else [prefix.rstrip(".")]


def start_run(folder: RunFolder, recipe: Recipe, corpus_facts: Mapping[str, Any]) -> None:
    """Write what is known before any stage ran: the resolved recipe and the facts about the corpus."""
    save_recipe(recipe, folder / "recipe.yaml")
    write_json(folder / "corpus.json", to_plain(corpus_facts))
