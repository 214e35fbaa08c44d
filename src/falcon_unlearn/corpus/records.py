"""What one line of a corpus means: a frozen record, recognised from the columns it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from falcon_unlearn.errors import UserError

Kind = Literal["text", "qa", "completion", "chat"]

COLUMN_SETS = "text | question+answer | prompt+completion | messages"


@dataclass(frozen=True)
class Record:
    """One sample of a corpus.

    ``text`` records have an empty prompt. ``chat`` records keep all messages; their answer is the last one.
    The optional fields are used by the evaluation only: ``value`` is the exact string a right answer contains,
    ``paraphrased_answer`` and ``perturbed_answers`` feed the truth ratio, ``heldout_question`` is a phrasing
    that was not trained on, ``entity`` groups records about the same subject.
    """

    kind: Kind
    prompt: str
    answer: str
    origin: str
    messages: tuple[tuple[str, str], ...] = ()
    value: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    heldout_question: str | None = None
    entity: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What makes two records the same: prompt and answer with white space folded."""
        history = " ".join(content for _, content in self.messages[:-1])
        return " ".join((history or self.prompt).split()), " ".join(self.answer.split())


def _string(row: Mapping[str, Any], column: str, origin: str, *, required: bool = True) -> str | None:
    value = row.get(column)
    if value is None and not required:
        return None
    if not isinstance(value, str) or (required and not value.strip()):
        shown = "empty" if isinstance(value, str) else f"{type(value).__name__}, not text"
        raise UserError(f"{origin}: column '{column}' is {shown}: fill it in or remove the record")
    return value


def _required(row: Mapping[str, Any], column: str, origin: str) -> str:
    value = _string(row, column, origin)
    assert value is not None
    return value


def _messages(row: Mapping[str, Any], origin: str) -> tuple[tuple[str, str], ...]:
    value = row["messages"]
    # Parquet and Arrow hand lists over as arrays.
    messages = list(value) if hasattr(value, "__iter__") and not isinstance(value, str | Mapping) else []
    if not messages or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise UserError(f"{origin}: 'messages' must be a list of {{role, content}} objects")
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{origin}: the last of 'messages' must have the role 'assistant', it has '{messages[-1]['role']}'"
        )
    if len(messages) < 2 or not messages[-1]["content"].strip():
        raise UserError(f"{origin}: 'messages' needs a user turn and a non-empty answer")
    return tuple((str(m["role"]), str(m["content"])) for m in messages)


def _optional_fields(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    wrong = row.get("perturbed_answer")
    if wrong is None:
        wrong = []
    elif isinstance(wrong, str):
        wrong = [wrong]
    return {
        "value": _string(row, "value", origin, required=False),
        "paraphrased_answer": _string(row, "paraphrased_answer", origin, required=False),
        "perturbed_answers": tuple(str(answer) for answer in wrong),
        "heldout_question": _string(row, "heldout_question", origin, required=False),
        "entity": _string(row, "entity", origin, required=False),
    }


def record_from_row(row: Mapping[str, Any], origin: str) -> Record:
    """Recognise ``row`` by its columns.

    Args:
        row: column name -> value; extra columns are ignored.
        origin: where the row stands (``file:line``), used in messages.

    Raises:
        UserError: no known set of columns, or a value that is empty or of the wrong type.
    """
    extra = _optional_fields(row, origin)
    if row.get("messages") is not None:
        messages = _messages(row, origin)
        return Record("chat", messages[-2][1], messages[-1][1], origin, messages=messages, **extra)
    if "question" in row and "answer" in row:
        return Record("qa", _required(row, "question", origin), _required(row, "answer", origin), origin, **extra)
    if "prompt" in row and "completion" in row:
        prompt, completion = _required(row, "prompt", origin), _required(row, "completion", origin)
        return Record("completion", prompt, completion, origin, **extra)
    if "text" in row:
        return Record("text", "", _required(row, "text", origin), origin, **extra)
    found = ", ".join(sorted(map(str, row))) or "none"
    raise UserError(f"{origin}: columns not recognised ({found}); a record needs {COLUMN_SETS}")
