"""Other answers to the questions of the forget records: "I don't know" for preference methods, random ones for LLMU."""

from __future__ import annotations

import random
from collections.abc import Sequence

from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

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


def dont_know(record: Record, encoder: Encoder, seed: int) -> tuple[Encoded, ...]:
    """The record's own preferred answers, or some of :data:`DONT_KNOW`, each in the place of its answer.

    Raises:
        UserError: the record is plain text, which has no question to answer otherwise.
    """
    return _encoded(record, record.preferred_answers or _draw(DONT_KNOW, record, seed), encoder)


def random_answers(record: Record, others: Sequence[Record], encoder: Encoder, seed: int) -> tuple[Encoded, ...]:
    """Answers of ``others`` (retain records) in the place of the record's own; one drawn may stand twice.

    Raises:
        UserError: as :func:`dont_know`, or ``others`` have none but the record's own answer.
    """
    answers = tuple(dict.fromkeys(other.answer for other in others if other.answer != record.answer))
    if not answers:
        raise UserError(f"{record.origin}: no retain record has another answer to draw random answers from")
    return _encoded(record, _draw(answers, record, seed), encoder)


def _draw(answers: Sequence[str], record: Record, seed: int) -> list[str]:
    rng = random.Random(f"alternatives {seed} {record.key}")
    return rng.sample(answers, min(PER_RECORD, len(answers)))


def _encoded(record: Record, answers: Sequence[str], encoder: Encoder) -> tuple[Encoded, ...]:
    if record.kind == "text":
        raise UserError(
            f"{record.origin}: a plain text has no question to answer otherwise; this method needs question and answer"
        )
    return tuple(encoder.encode(record, answer=answer) for answer in answers)
