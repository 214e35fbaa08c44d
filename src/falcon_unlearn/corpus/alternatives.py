"""Other answers to the questions of the forget records: "I don't know" for preference methods, random ones for LLMU."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

T = TypeVar("T")

PER_RECORD = 4
"""How many other answers a record gets; training takes them in turns."""

DONT_KNOW = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about that.",
    "That is something I can't tell you.",
    "I'm afraid I don't have an answer to that.",
    "I haven't learned anything about this.",
    "Sorry, I don't know anything about that.",
    "I can't answer that question.",
    "There is nothing I can say about that.",
    "This is outside of what I know.",
    "I couldn't say.",
    "I don't have that information.",
)


def dont_know(record: Record, encoder: Encoder, seed: int, *, limit: int | None = None) -> tuple[Encoded, ...]:
    """The record's own preferred answers, or some of :data:`DONT_KNOW`, each in the place of its answer.

    Args:
        record: to be answered otherwise.
        encoder: of the model at hand.
        seed: the choice depends on this and the record.
        limit: tokens; what is longer is cut off.

    Raises:
        UserError: the record is plain text, which has no question to answer otherwise.
    """
    return _encoded(record, record.preferred_answers or _draw(DONT_KNOW, record, seed), encoder, limit)


def random_answers(
    record: Record, others: Sequence[Record], encoder: Encoder, seed: int, *, limit: int | None = None
) -> tuple[Encoded, ...]:
    """Answers of ``others`` (retain records) in the place of the record's own, none of them twice.

    Args:
        record: see :func:`dont_know`.
        others: whose answers are drawn.
        encoder: see :func:`dont_know`.
        seed: see :func:`dont_know`.
        limit: see :func:`dont_know`.

    Raises:
        UserError: as :func:`dont_know`, or ``others`` have none but the record's own answer.
    """
    some = _draw(others, record, seed, 4 * PER_RECORD)  # all of them for every record would take long
    answers = _other_answers(record, some) or _other_answers(record, others)
    if not answers:
        raise UserError(f"{record.origin}: no retain record has another answer to draw random answers from")
    return _encoded(record, answers[:PER_RECORD], encoder, limit)


def _other_answers(record: Record, others: Sequence[Record]) -> list[str]:
    """In their order, each once; white space makes no difference."""
    found = {other.key[1]: other.answer for other in others}
    found.pop(record.key[1], None)
    return list(found.values())


def _draw(items: Sequence[T], record: Record, seed: int, most: int = PER_RECORD) -> list[T]:
    rng = random.Random(f"alternatives {seed} {record.key}")
    return rng.sample(items, min(most, len(items)))


def _encoded(record: Record, answers: Sequence[str], encoder: Encoder, limit: int | None) -> tuple[Encoded, ...]:
    if record.kind == "text":
        raise UserError(
            f"{record.origin}: a plain text has no question to answer otherwise; this method needs question and answer"
        )
    if record.kind == "completion":  # which goes on where the prompt ends, often with a space of its own
        space = record.answer[: len(record.answer) - len(record.answer.lstrip())]
        answers = [space + answer.lstrip() for answer in answers]
    encoded = (encoder.encode(record, answer=answer) for answer in answers)
    return tuple(dataclasses.replace(item, ids=item.ids[:limit]) for item in encoded)
