"""What one line of a corpus means: a frozen record, recognised from the columns it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from falcon_unlearn.errors import UserError

Kind = Literal["text", "qa", "completion", "chat"]

RECORD_COLUMNS = (("text",), ("question", "answer"), ("prompt", "completion"), ("messages",))
COLUMN_SETS = " | ".join("+".join(columns) for columns in RECORD_COLUMNS)


@dataclass(frozen=True)
class Record:
    """One sample of a corpus.

    ``text`` records have an empty prompt. ``chat`` records keep all messages; their answer is the last one.
    The optional fields are used by the evaluation only: ``value`` is the exact string a right answer contains,
    ``paraphrased_answer`` and ``perturbed_answers`` feed the truth ratio, ``heldout_question`` is a phrasing
    that was not trained on, ``entity`` groups records about the same subject. ``preferred_answers`` are answers that
    preference methods should teach instead.
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
    preferred_answers: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What makes two records the same: prompt and answer with white space folded."""
        history = " ".join(content for _, content in self.messages[:-1])
        return " ".join((history or self.prompt).split()), " ".join(self.answer.split())


def _encodable(text: str, what: str, origin: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        raise UserError(
            f"{origin}: {what} holds half of a surrogate pair at character {error.start}: it is no valid Unicode"
        ) from None
    return text


def _string(row: Mapping[str, Any], column: str, origin: str, *, required: bool = True) -> str | None:
    value = row.get(column)
    if not required and (value is None or (isinstance(value, str) and not value.strip())):
        return None
    if not isinstance(value, str) or (required and not value.strip()):
        shown = "empty" if isinstance(value, str) else f"{type(value).__name__}, not text"
        raise UserError(f"{origin}: column '{column}' is {shown}: fill it in or remove the record")
    return _encodable(value, f"column '{column}'", origin)


def _required(row: Mapping[str, Any], column: str, origin: str) -> str:
    value = _string(row, column, origin)
    assert value is not None
    return value


def _messages(row: Mapping[str, Any], origin: str) -> tuple[tuple[str, str], ...]:
    value = row["messages"]
    messages = value if isinstance(value, Sequence) and not isinstance(value, str) else []
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
    if messages[-2]["role"] != "user":
        raise UserError(
            f"{origin}: the turn before the answer must be the user's, its role is '{messages[-2]['role']}'"
        )
    return tuple((m["role"], _encodable(m["content"], "'messages'", origin)) for m in messages)


def _answers(row: Mapping[str, Any], column: str, origin: str) -> tuple[str, ...]:
    value = row.get(column)
    if value is None or value == "":
        return ()
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, Sequence) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(f"{origin}: column '{column}' must be a text or a list of texts, none of them empty")
    return tuple(_encodable(answer, f"column '{column}'", origin) for answer in answers)


def _optional_fields(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    return {
        "value": _string(row, "value", origin, required=False),
        "paraphrased_answer": _string(row, "paraphrased_answer", origin, required=False),
        "perturbed_answers": _answers(row, "perturbed_answer", origin),
        "preferred_answers": _answers(row, "preferred_answer", origin),
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
