"""Scoring with a suite: parts, chunks, interruption, memory."""

from dataclasses import dataclass, field

import pytest
import torch

from falcon_unlearn import suite_scores
from falcon_unlearn.artifacts import SuiteResult
from falcon_unlearn.console import Console
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.suite import Subject
from falcon_unlearn.suite_scores import read_suite, score_suite

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Row:
    unit: int
    value: float
    text: str = "line\u2028separator"


@dataclass
class Counting:
    """A suite that remembers what it was asked for, and stops where it is told."""

    parts: dict = field(default_factory=lambda: {"forget": 7, "retain": 3, "nothing": 0})
    content: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    stop_at: int | None = None
    fits: int = 10**9

    def score(self, part, units, subject):
        if subject.batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.stop_at in units and part == "forget":
            raise KeyboardInterrupt
        self.asked.append((part, units))
        return [Row(unit, float("nan") if unit == 2 else unit / 3) for unit in units]

    def row(self, part, plain):
        return Row(plain["unit"], float("nan") if plain["value"] is None else plain["value"], plain["text"])

    def summarise(self, rows, oracle, settings):
        return SuiteResult("counting", {})

    def exports(self, rows, oracle):
        return {}


def subject(batch_size=8):
    return Subject(None, None, batch_size, "a model")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(suite_scores, "_UNITS_PER_CHUNK", 3)


def test_every_unit_is_scored_once_and_read_back(tmp_path):
    suite = Counting()
    rows = score_suite(suite, subject(), tmp_path / "scores" / "model.counting", QUIET)
    assert [row.unit for row in rows["forget"]] == list(range(7))
    assert rows["nothing"] == []
    assert rows["forget"][1] == Row(1, 1 / 3)
    assert rows["forget"][2].value != rows["forget"][2].value
    assert suite.asked == [("forget", range(3)), ("forget", range(3, 6)), ("forget", range(6, 7)), ("retain", range(3))]
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "model.counting.forget.jsonl",
        "model.counting.nothing.jsonl",
        "model.counting.retain.jsonl",
    ]
    assert repr(read_suite(suite, tmp_path / "scores" / "model.counting")) == repr(rows)


def test_an_interrupted_scoring_goes_on_behind_the_last_chunk(tmp_path):
    stem = tmp_path / "model.counting"
    whole = score_suite(Counting(), subject(), tmp_path / "whole.counting", QUIET)
    with pytest.raises(KeyboardInterrupt):
        score_suite(Counting(stop_at=4), subject(), stem, QUIET)
    assert read_suite(Counting(), stem) is None
    partial = next(tmp_path.glob(".model*"))
    with partial.open("ab") as handle:  # killed in the middle of a line
        handle.write(b'{"unit": 3, "val')
    again = Counting()
    rows = score_suite(again, subject(), stem, QUIET)
    assert again.asked[0] == ("forget", range(3, 6))
    assert repr(rows) == repr(whole)
    assert (tmp_path / "model.counting.forget.jsonl").read_bytes() == (
        tmp_path / "whole.counting.forget.jsonl"
    ).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_memory_that_does_not_suffice_halves_the_batch_and_says_so(tmp_path, capsys):
    rows = score_suite(Counting(fits=3), subject(), tmp_path / "model.counting", Console())
    assert len(rows["forget"]) == 7
    assert "2 sequences per forward pass" in capsys.readouterr().err


def test_a_single_sequence_that_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(UserError, match="single sequence"):
        score_suite(Counting(fits=0), subject(), tmp_path / "model.counting", QUIET)
