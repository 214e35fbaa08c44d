"""A run folder: what stands where, who may write into it, and how finished stages are read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_unlearn.artifacts import (
    LayerSelection,
    Metrics,
    SampleScore,
    layer_selection_from,
    read_jsonl,
    sample_score_from,
    write_json,
    write_jsonl,
)
from falcon_unlearn.errors import UserError
from falcon_unlearn.output_folder import open_output
from falcon_unlearn.recipe import Recipe, dump_recipe, save_recipe
from falcon_unlearn.stages import with_sets
from falcon_unlearn.trackers import FOLDER as TRACKERS

_WRITTEN_LAST = "model_card.md"
_RESULTS = (
    "recipe.yaml",
    "corpus.json",
    "layer_selection.json",
    "training.jsonl",
    "patch/patch.json",
    "patch/patch.safetensors",
    "scores/before.jsonl",
    "scores/after.jsonl",
    "metrics.json",
    "report.html",
    _WRITTEN_LAST,
    "provenance.json",
)
_ATTACKS = "attacks.json"
_ORACLE_SCORES = "scores/oracle.jsonl"
SELF_SAMPLES = "self_samples.jsonl"
"""Retain records that the model wrote itself."""
CHECKPOINT = "checkpoint.safetensors"
_WORKING = re.compile(r"checkpoint(\.\d+)?\.safetensors|activations(\.rank\d+)?(\.json|\.between)?")
_ADAPTER = ("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_CONTENT = frozenset(
    (
        *_RESULTS,
        _ORACLE_SCORES,
        _ATTACKS,
        SELF_SAMPLES,
        "attacks",
        "patch",
        "scores",
        "patch/original.safetensors",
        *_ADAPTER,
    )
)
_NOT_COMPARED = ("output", "report", "trackers", "device", "attacks.seconds")


@dataclass(frozen=True)
class RunFolder:
    """Paths and typed reading and writing of one run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether every stage of exactly this recipe has left its result."""
        config = recipe.evaluation
        results = (*_RESULTS, *((_ORACLE_SCORES,) if config.oracle is not None else ()))
        results += (_ATTACKS,) if recipe.attacks.chosen() else ()
        if not config.enabled:
            results = tuple(name for name in results if not name.startswith("scores/"))
        return all((self.path / name).exists() for name in results) and dump_recipe(recipe) == (
            self.path / "recipe.yaml"
        ).read_text(encoding="utf-8")

    def write_scores(self, model: str, scores: Mapping[str, Sequence[SampleScore]]) -> None:
        """Write ``scores/<model>.jsonl``, one line per sample."""
        (self.path / "scores").mkdir(exist_ok=True)
        write_jsonl(self.path / "scores" / f"{model}.jsonl", [score for rows in scores.values() for score in rows])

    def read_scores(self, model: str) -> dict[str, list[SampleScore]] | None:
        """Scores by set, or None where that model was not scored yet."""
        path = self.path / "scores" / f"{model}.jsonl"
        return with_sets([sample_score_from(row) for row in read_jsonl(path)]) if path.exists() else None

    def write_selection(self, selection: LayerSelection) -> None:
        """Write ``layer_selection.json``."""
        write_json(self.path / "layer_selection.json", selection)

    def read_selection(self) -> LayerSelection | None:
        """The finished layer selection, or None."""
        path = self.path / "layer_selection.json"
        if not path.exists():
            return None
        return layer_selection_from(json.loads(path.read_text(encoding="utf-8")))

    def write_metrics(self, metrics: Mapping[str, Metrics | None]) -> None:
        """Write ``metrics.json``: before, after and oracle."""
        write_json(self.path / "metrics.json", metrics)

    def begin_again(self) -> None:
        """Something is about to be done again: the run is not finished before its last file is there again."""
        (self.path / _WRITTEN_LAST).unlink(missing_ok=True)

    def remove_working_files(self) -> None:
        """Remove what a resumed run goes on from."""
        for path in sorted(self.path.iterdir()):
            if _WORKING.fullmatch(path.name):
                path.unlink()


def open_run_folder(recipe: Recipe, *, resume: bool, overwrite: bool, allowed: Sequence[str] = ()) -> RunFolder:
    """Make the recipe's output folder ready, without writing anything but the folder itself.

    Args:
        recipe: validated, with an absolute output path.
        resume: go on in a folder of the same recipe.
        overwrite: remove what an earlier run left there (nothing else).
        allowed: names that may already stand there; they are never removed.

    Raises:
        UserError: the folder is not empty, is no folder, or holds a run of another recipe.
    """
    path = Path(recipe.output)
    open_output(
        path,
        "recipe.yaml",
        what="run",
        is_ours=_is_ours,
        settings=recipe.model_dump(mode="json"),
        not_compared=_NOT_COMPARED,
        resume=resume,
        overwrite=overwrite,
        allowed=allowed,
    )
    return RunFolder(path)


def _is_ours(name: Path) -> bool:
    model, parent = name.name.split(".")[0], name.parent.as_posix()
    of_suite = parent == "scores" and model in {"before", "after", "oracle"} and name.suffix == ".jsonl"
    of_attack = parent == "attacks" and model in {"original", "unlearned", "oracle"} and name.suffix == ".json"
    working = _WORKING.fullmatch(name.as_posix()) is not None
    return name.as_posix() in _CONTENT or of_suite or of_attack or working or name.parts[0] == TRACKERS


def start_run(folder: RunFolder, recipe: Recipe, corpus_facts: Mapping[str, Any]) -> None:
    """Write what is known before any stage ran: the resolved recipe and the facts about the corpus.

    Args:
        folder: from :func:`open_run_folder`.
        recipe: the resolved recipe.
        corpus_facts: JSON; their ``hashes`` tell whether a resumed run still has the data and models it began with.

    Raises:
        UserError: records or a model are others than when the run began.
    """
    path = folder / "corpus.json"
    hashes: Mapping[str, str] = corpus_facts["hashes"]
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))["hashes"]
        changed = [name for name, digest in hashes.items() if earlier.get(name) != digest]
        if changed:
            raise UserError(
                f"{changed[0]}: not what the run in {folder.path} began with; use --overwrite or another folder"
            )
    if not folder.is_finished(recipe):
        folder.begin_again()
        save_recipe(recipe, folder / "recipe.yaml")
        write_json(path, corpus_facts)
