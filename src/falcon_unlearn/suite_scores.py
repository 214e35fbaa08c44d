"""Score a model with a suite, part by part; an interrupted scoring goes on behind the last units that were kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from falcon_unlearn.artifacts import read_jsonl, to_plain, write_jsonl
from falcon_unlearn.console import Console
from falcon_unlearn.errors import UserError, is_out_of_memory
from falcon_unlearn.evaluation.suite import Rows, Subject, Suite
from falcon_unlearn.model.loading import quiet_transformers
from falcon_unlearn.ranks import ALONE, Ranks

_UNITS_PER_CHUNK = 256
_DONE = "units_done"


def score_suite(suite: Suite, subject: Subject, stem: Path, console: Console, ranks: Ranks = ALONE) -> Rows:
    """Score every part that has no file yet, and read the others back.

    Rows are kept in chunks whose bounds do not depend on where scoring was interrupted, so a resumed scoring gives
    the numbers of an uninterrupted one.

    Args:
        suite: read and checked.
        subject: the model.
        stem: ``<folder>/<model>.<suite>``; a part's rows go to ``<stem>.<part>.jsonl``.
        console: progress.
        ranks: they take turns at the chunks; rank 0 keeps them.

    Raises:
        UserError: out of memory at a single sequence.
    """
    ranks.on_first(lambda: stem.parent.mkdir(parents=True, exist_ok=True))
    rows: dict[str, Sequence[Any]] = {}

    def score(part: str, chunk: range) -> Sequence[Any]:
        nonlocal subject
        found, subject = _score_fitting(suite, part, chunk, subject, console)
        return found

    with console.bar(sum(suite.parts.values()), f"scoring {stem.name}") as bar:
        for part, units in suite.parts.items():
            path = _file(stem, part)
            kept = path.with_name(f".{path.name}.partial.tmp")
            done = ranks.on_first(partial(_units_done, path, kept, units))
            bar.update(done)
            chunks = [
                range(start, min(start + _UNITS_PER_CHUNK, units)) for start in range(done, units, _UNITS_PER_CHUNK)
            ]
            for first in range(0, len(chunks), ranks.world):
                turn = chunks[first : first + ranks.world]
                for chunk, found in zip(turn, ranks.spread(turn, partial(score, part)), strict=True):
                    ranks.on_first(partial(_append, kept, found, chunk.stop))
                    bar.update(len(chunk))
            rows[part] = ranks.on_first(partial(_finished_rows, suite, part, path, kept))
    return rows


def _units_done(path: Path, kept: Path, units: int) -> int:
    return units if path.exists() else _kept_units(kept)


def _finished_rows(suite: Suite, part: str, path: Path, kept: Path) -> list[Any]:
    if not path.exists():
        write_jsonl(path, _kept_rows(kept))
        kept.unlink(missing_ok=True)
    return [suite.row(part, plain) for plain in read_jsonl(path)]


def read_suite(suite: Suite, stem: Path) -> Rows | None:
    """Rows of a finished scoring, or None where a part is missing."""
    paths = {part: _file(stem, part) for part in suite.parts}
    if not all(path.exists() for path in paths.values()):
        return None
    return {part: [suite.row(part, plain) for plain in read_jsonl(path)] for part, path in paths.items()}


def _file(stem: Path, part: str) -> Path:
    return stem.with_name(f"{stem.name}.{part}.jsonl")


def _score_fitting(
    suite: Suite, part: str, units: range, subject: Subject, console: Console
) -> tuple[Sequence[Any], Subject]:
    """Score with as large a batch as fits; what had to be halved stays halved."""
    while True:
        try:
            with quiet_transformers():  # what is too long is counted, not warned about
                return suite.score(part, units, subject), subject
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if subject.batch_size == 1:
                raise UserError(
                    "out of memory scoring a single sequence: shorten the records, or use dtype bfloat16"
                ) from error
        subject = dataclasses.replace(subject, batch_size=subject.batch_size // 2)
        console.say(f"out of memory: scoring goes on with {subject.batch_size} sequences per forward pass")


def _append(path: Path, rows: Sequence[Any], done: int) -> None:
    lines = [json.dumps(to_plain(row), ensure_ascii=False, allow_nan=False) for row in rows]
    with path.open("a", encoding="utf-8") as handle:
        handle.write("".join(f"{line}\n" for line in [*lines, json.dumps({_DONE: done})]))
        handle.flush()
        os.fsync(handle.fileno())


def _chunks(path: Path) -> tuple[bytes, int]:
    """Whole chunks of a partial file, and how many units they hold."""
    content = path.read_bytes() if path.exists() else b""
    end, done = 0, 0
    position = 0
    for line in content.splitlines(keepends=True):
        position += len(line)
        if line.startswith(f'{{"{_DONE}"'.encode()) and line.endswith(b"}\n"):
            end, done = position, json.loads(line)[_DONE]
    return content[:end], done


def _kept_units(path: Path) -> int:
    """Units of whole chunks; what was cut off behind them is dropped."""
    kept, done = _chunks(path)
    if path.exists():
        os.truncate(path, len(kept))
    return done


def _kept_rows(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [row for row in read_jsonl(path) if _DONE not in row]
