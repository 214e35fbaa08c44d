"""TOFU, the suite (Maini et al., COLM 2024, arXiv 2401.06121): forget quality and model utility on invented authors.

Probability and ROUGE are those of the original answer, the truth ratio is made of the paraphrased and the perturbed
ones. Real authors and world facts have no paraphrase: the answer takes its place, and the probability is its share
among itself and the wrong answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from falcon_unlearn.artifacts import Estimate, SampleScore, SuiteResult, sample_score_from
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, content_hash, load_records
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.logs import (
    RECORDS_PER_AUTHOR,
    open_unlearning_log,
    open_unlearning_summary,
    read_oracle,
)
from falcon_unlearn.evaluation.metrics import FORGET_SET, estimates, forget_quality_of
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.evaluation.suite import Rows, Subject

PAGE = "https://huggingface.co/datasets/locuslab/TOFU"

_UTILITY_PARTS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
"""Configuration of the dataset by part."""
_PARAPHRASED = (FORGET_SET, "retain")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_AUTHORS_RECORDS = {"forget01": 40, "forget05": 200, "forget10": 400, "retain": 400}
_FEW_AUTHORS = 10
_SIGNIFICANCE = 0.05


class TofuConfig(Section):
    """Forget quality, model utility and their parts on TOFU."""

    data: str = Field(default="locuslab/TOFU", min_length=1)
    """Dataset id of the hub, a folder in hub layout, or a folder with one file a configuration
    (forget10_perturbed.jsonl, ...)."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """What the model was to forget."""
    retain_log: str | None = None
    """Published evaluation log of a model that never saw the forget split (TOFU authors' or OpenUnlearning's
    TOFU_EVAL.json); it takes the place of an oracle of your own."""
    max_records: int | None = Field(default=None, ge=1)
    """Score a random draw of this many records of each part; published figures need all of them."""
    max_new_tokens: int = Field(default=200, ge=1)
    """Longest generated answer."""

    def open(self, base_dir: Path, seed: int) -> TofuSuite:
        """Read and check the four configurations and the retain log.

        Raises:
            UserError: data missing, gated or without TOFU's columns; no usable retain log.
        """
        configurations = {FORGET_SET: f"{self.split}_perturbed", **_UTILITY_PARTS}
        records = {
            part: _with_authors(
                _load(self.data, configuration, part, base_dir), self.split if part == FORGET_SET else part
            )
            for part, configuration in configurations.items()
        }
        oracle = None if self.retain_log is None else read_oracle(_log_path(self.retain_log, base_dir))
        drawn = {
            part: {i: of_part[i] for i in _draw(len(of_part), self.max_records, part, seed)}
            for part, of_part in records.items()
        }
        return TofuSuite(self, drawn, {part: len(of_part) for part, of_part in records.items()}, oracle, seed)


def _log_path(name: str, base_dir: Path) -> Path:
    for place in (base_dir, Path.cwd()):
        path = place / Path(name).expanduser()
        if path.is_file():
            return path
    raise UserError(f"tofu.retain_log: missing file '{name}' (looked in {base_dir} and {Path.cwd()})")


def _source(data: str, configuration: str, base_dir: Path) -> tuple[SourceConfig, bool]:
    """Where one configuration is, and whether that is on the hub."""
    folders = [place / Path(data).expanduser() for place in (base_dir, Path.cwd())]
    folder = next((path for path in folders if path.exists()), None)
    if folder is None:
        return SourceConfig(source=data, config=configuration), True
    for name in (configuration, *(configuration + suffix for suffix in _SUFFIXES)):
        if (folder / name).exists():
            return SourceConfig(source=f"{data.rstrip('/')}/{name}"), False
    if folder.is_dir() and (folder / "README.md").is_file():
        return SourceConfig(source=data, config=configuration), False
    raise UserError(
        f"tofu.data: '{data}' holds no configuration '{configuration}' ({configuration}.jsonl, or a folder of that "
        f"name): download the dataset from {PAGE}"
    )


def _load(data: str, configuration: str, part: str, base_dir: Path) -> list[Record]:
    source, on_hub = _source(data, configuration, base_dir)
    try:
        records = load_records(source, base_dir, "tofu.data")
    except UserError as error:
        page = f" (dataset page: {PAGE})" if on_hub and PAGE not in str(error) else ""
        raise UserError(f"{error}{page}") from error
    for record in records:
        lacking = [
            column
            for column, there in (
                ("question and answer", record.kind == "qa"),
                ("perturbed_answer", record.perturbed_answers),
                ("paraphrased_answer", record.paraphrased_answer or part not in _PARAPHRASED),
            )
            if not there
        ]
        if lacking:
            raise UserError(
                f"tofu.data: {record.origin}: has no {lacking[0]}, which TOFU's '{configuration}' has: compare the "
                f"columns with {PAGE}"
            )
    return records


def _with_authors(records: list[Record], name: str) -> list[Record]:
    """Name the author of each record, where these are TOFU's own sets of twenty questions an author."""
    if len(records) != _AUTHORS_RECORDS.get(name) or any(record.entity is not None for record in records):
        return records
    return [dataclasses.replace(record, entity=f"author {i // RECORDS_PER_AUTHOR}") for i, record in enumerate(records)]


def _draw(n: int, most: int | None, part: str, seed: int) -> list[int]:
    if most is None or most >= n:
        return list(range(n))
    return sorted(random.Random(f"tofu {part} {seed}").sample(range(n), most))


@dataclass(frozen=True)
class TofuSuite:
    """TOFU with its records read; see :class:`falcon_unlearn.evaluation.suite.Suite`.

    Attributes:
        config: the section it was opened with.
        records: by part, the records to score by their index in the configuration.
        available: by part, number of records that the configuration holds.
        published_oracle: forget scores of ``retain_log``.
        seed: of the draw.
    """

    config: TofuConfig
    records: Mapping[str, Mapping[int, Record]]
    available: Mapping[str, int]
    published_oracle: tuple[SampleScore, ...] | None
    seed: int

    @property
    def parts(self) -> Mapping[str, int]:
        """Number of questions by part."""
        return {part: len(records) for part, records in self.records.items()}

    @property
    def content(self) -> Mapping[str, str]:
        """SHA-256 of the records of each part with their indices, and of the generation's length."""
        hashes = {part: content_hash(list(records.values())) for part, records in self.records.items()}
        settings = {
            "indices": {part: list(records) for part, records in self.records.items()},
            "max_new_tokens": self.config.max_new_tokens,
        }
        return {**hashes, "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}

    def score(self, part: str, units: range, subject: Subject) -> Sequence[SampleScore]:
        """Score some questions of a part; ``index`` is the record's place in TOFU's configuration."""
        chosen = list(self.records[part].items())[units.start : units.stop]
        scores = score_set(
            subject.model,
            subject.encoder,
            [record for _, record in chosen],
            part,
            batch_size=subject.batch_size,
            max_new_tokens=self.config.max_new_tokens,
            device=subject.device,
        )
        return [dataclasses.replace(score, index=i) for (i, _), score in zip(chosen, scores, strict=True)]

    def row(self, part: str, plain: Mapping[str, Any]) -> SampleScore:
        """A score read back; every record of TOFU has a truth ratio, so null there is NaN."""
        score = sample_score_from(plain)
        wrong = score.perturbed_log_probabilities or ()
        changes: dict[str, Any] = {
            "perturbed_log_probabilities": tuple(math.nan if value is None else value for value in wrong)
        }
        if score.truth_ratio is None:
            changes["truth_ratio"] = math.nan
        if score.normalised_probability is None and part not in _PARAPHRASED:
            changes["normalised_probability"] = math.nan
        return dataclasses.replace(score, **changes)

    def _oracle(self, oracle: Rows | None) -> Sequence[SampleScore] | None:
        """The oracle's forget scores: our own before the published ones."""
        return (oracle or {}).get(FORGET_SET) or self.published_oracle

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """Forget quality, model utility and their parts; ``*_paper`` are made with the paper's truth ratio.

        The others use the ratio of the code, with which all published tables are made (see
        :mod:`falcon_unlearn.evaluation.metrics`).
        """
        theirs = self._oracle(oracle)
        code = estimates(rows)
        paper = estimates(rows, definition="paper")
        metrics = {
            **_quality(rows[FORGET_SET], theirs, "code"),
            "model_utility": code.pop("model_utility"),
            **{name: number for name, number in code.items() if not name.startswith("forget_accuracy")},
            **{f"{name}_paper": number for name, number in _quality(rows[FORGET_SET], theirs, "paper").items()},
            **{
                f"{name}_paper": number
                for name, number in paper.items()
                if name == "model_utility" or name.endswith("truth_ratio")
            },
        }
        own = {
            "data": self.config.data,
            "split": self.config.split,
            "retain_log": self.config.retain_log,
            "max_records": self.config.max_records,
            "max_new_tokens": self.config.max_new_tokens,
            "truth_ratio": "code; *_paper: paper",
            "seed": self.seed,
        }
        return SuiteResult("tofu", metrics, tuple(self._statements(metrics, rows, oracle)), {**settings, **own})

    def _statements(self, metrics: Mapping[str, Estimate], rows: Rows, oracle: Rows | None) -> list[str]:
        ours, theirs = rows[FORGET_SET], self._oracle(oracle)
        whose = "the oracle" if oracle and oracle.get(FORGET_SET) else f"the model of {self.config.retain_log}"
        said = [_verdict(metrics["forget_quality"].value, whose if theirs else None)]
        if theirs and len(theirs) != len(ours):
            said.append(f"Forget quality compares {len(ours)} questions here with {len(theirs)} of the oracle.")
        if any(len(rows[part]) < self.available[part] for part in rows):
            said.append(
                f"Scored on at most {self.config.max_records} questions a part: not comparable with published figures."
            )
        authors = {score.entity for score in ours if score.entity is not None}
        if authors:
            few = f", and {len(authors)} authors are few: take it as a rough one" if len(authors) < _FEW_AUTHORS else ""
            said.append(f"Intervals on forget and retain are over authors (20 questions each), not questions{few}.")
        unscorable = {name: number.unscorable for name, number in metrics.items() if not name.endswith("_paper")}
        name, most = max(unscorable.items(), key=lambda item: item[1])
        if most:
            said.append(f"Unscorable questions were left out: {most} of {name} (longer than the model's context?).")
        return said

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """The scores as OpenUnlearning's two files."""
        log = open_unlearning_log(rows, self._oracle(oracle))
        return {"TOFU_EVAL.json": log, "TOFU_SUMMARY.json": open_unlearning_summary(log)}


def _quality(
    ours: Sequence[SampleScore], oracle: Sequence[SampleScore] | None, definition: Literal["code", "paper"]
) -> dict[str, Estimate]:
    """Forget quality and its logarithm; a p-value has no interval."""
    p, log10_p = forget_quality_of(ours, oracle, definition)
    n = sum(score.truth_ratio is not None and not math.isnan(score.truth_ratio) for score in ours)
    counted = {"n": n, "unscorable": len(ours) - n}
    return {"forget_quality": Estimate(p, **counted), "log10_forget_quality": Estimate(log10_p, **counted)}


def _verdict(p: float | None, whose: str | None) -> str:
    """What forget quality says about the model beside ``whose``; None: there was nobody to compare with."""
    if whose is None:
        return (
            "No oracle: without a model that never saw the forget set (one of your own, or tofu.retain_log) there is "
            "no forget quality. Forget probability, ROUGE and truth ratio say how far the answers are gone, not "
            "whether the model behaves as if it had never seen them."
        )
    if p is None:
        return f"Forget quality cannot be given: of this model or of {whose} no truth ratio could be scored."
    if p < _SIGNIFICANCE:
        return f"On the forget set the truth ratios differ from those of {whose} (p = {p:.2g})."
    return (
        f"On the forget set this model cannot be told from {whose} by its truth ratios (p = {p:.2g}); that is no proof "
        "that nothing is left: few questions find little."
    )
