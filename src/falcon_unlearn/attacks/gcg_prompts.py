"""Where a trigger stands in a prompt, and which of its token sequences survive being written down as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

PLACEMENTS = {"prefix": "{trigger} {question}", "suffix": "{question} {trigger}"}

# Texts that share neither their first nor their last token with a trigger show where the trigger's tokens begin and
# end; three, since a trigger may share one with one of them.
_CONTRASTS = ("0", "# 7 #", "Zebra")
_ANCHOR_TOKENS = 8


def placement_template(placement: str) -> str:
    """``prefix``, ``suffix`` or a template of one's own, as a template.

    Raises:
        ValueError: not exactly one {question} and one {trigger}.
    """
    template = PLACEMENTS.get(placement, placement)
    if template.count("{question}") != 1 or template.count("{trigger}") != 1:
        raise ValueError(
            f"placement '{placement}' must be prefix, suffix, or a text with {{question}} and {{trigger}} once each"
        )
    return template


def place(question: str, trigger: str, placement: str) -> str:
    """The question with the trigger in its place."""
    before, after = placement_template(placement).split("{question}")
    return before.replace("{trigger}", trigger) + question + after.replace("{trigger}", trigger)


def apply_trigger(records: Sequence[Record], trigger: str, placement: str) -> tuple[Record, ...]:
    """The same records, asked with the trigger; held-out phrasings as well.

    Raises:
        UserError: a plain text has no question.
    """
    result = []
    for record in records:
        if record.kind == "text":
            raise UserError(f"{record.origin}: a plain text has no question to put a trigger to; use question records")
        placed = place(record.prompt, trigger, placement)
        heldout = record.heldout_question
        messages = record.messages
        if messages:
            messages = (*messages[:-2], (messages[-2][0], placed), messages[-1])
        result.append(
            dataclasses.replace(
                record,
                prompt=placed,
                messages=messages,
                heldout_question=None if heldout is None else place(heldout, trigger, placement),
            )
        )
    return tuple(result)


@dataclass(frozen=True)
class Prompt:
    """Token ids around a trigger: ``before``, trigger, ``after``, ``target``.

    ``choices`` are the letters of a multiple-choice question, the right one first: what may stand in the place of the
    target's last token. Empty for an open answer.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    choices: tuple[int, ...] = ()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


class TriggerSlot:
    """Records with one trigger text in all of them, and the way from its token ids to that text and back.

    Args:
        encoder: tokenizer and template.
        records: questions, at least one.
        placement: see :func:`placement_template`.
        start: a trigger text with at least one token, that shows where the trigger's tokens stand.
        target_tokens: an answer's tokens beyond these do not count.

    Attributes:
        prompts: the records cut around the trigger, those left out in which its tokens are not those of the first.
        start: the token ids of ``start``.

    Raises:
        UserError: a record is plain text, or the tokenizer has no stable place for ``start``.
    """

    def __init__(
        self, encoder: Encoder, records: Sequence[Record], placement: str, start: str, target_tokens: int
    ) -> None:
        assert records
        self._encoder = encoder
        self._placement = placement
        cuts = [self._cut(record, start) for record in records]
        before, self.start, after = cuts[0]
        if not self.start:
            raise UserError(f"gcg: the start {start!r} has no token of its own between question and template")
        kept = [i for i, (_, trigger, _) in enumerate(cuts) if trigger == self.start]
        self._records = [records[i] for i in kept]
        self.prompts = tuple(self._prompt(records[i], start, cuts[i], target_tokens) for i in kept)
        self._left, self._right = before[-_ANCHOR_TOKENS:], after[:_ANCHOR_TOKENS]
        # Characters of the template that belong to the trigger's first and last token, usually a space.
        whole = self._between(self.start)
        position = -1 if whole is None else whole.find(start)
        if whole is None or position < 0:
            raise UserError(f"gcg: the start {start!r} is not the same text after tokenising: choose another start")
        self._absorbed = whole[:position], whole[position + len(start) :]

    def _ids(self, record: Record, trigger: str, answer: str | None = None) -> tuple[tuple[int, ...], int]:
        placed = apply_trigger([record], trigger, self._placement)[0]
        encoded = self._encoder.encode(placed, answer=answer)
        return encoded.ids, encoded.answer_start

    def _cut(self, record: Record, trigger: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        ids, _ = self._ids(record, trigger)
        others = [self._ids(record, contrast)[0] for contrast in _CONTRASTS]
        start = min(_common(ids, other) for other in others)
        end = len(ids) - min(_common(ids[::-1], other[::-1]) for other in others)
        return ids[:start], ids[start : max(end, start)], ids[max(end, start) :]

    def _prompt(
        self,
        record: Record,
        start: str,
        cut: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        target_tokens: int,
    ) -> Prompt:
        before, _, _ = cut
        ids, answer_start = self._ids(record, start)
        first = len(before) + len(self.start)
        assert first <= answer_start < len(ids), "an answer has tokens, and the trigger stands before it"
        answers = [
            ids[answer_start:],
            *(self._ids(record, start, w)[0][answer_start:] for w in record.perturbed_answers),
        ]
        # A, B, C, D: they differ in one token and in nothing else; before it may stand a space.
        at = min(_common(answers[0], other) for other in answers[1:]) if len(answers) > 1 else 0
        letters = tuple(answer[at] for answer in answers if len(answer) > at)
        alike = len({answer[at + 1 :] for answer in answers}) == 1
        choices = letters if len(answers) > 1 and alike and len(set(letters)) == len(answers) else ()
        target = answers[0][: at + 1 if choices else target_tokens]
        return Prompt(before, ids[first:answer_start], target, choices)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._encoder.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _between(self, trigger: Sequence[int]) -> str | None:
        """The text of ``trigger`` in its place, with what its tokens hold of the template."""
        left, right = self._decode(self._left), self._decode(self._right)
        text = self._decode((*self._left, *trigger, *self._right))
        if not (text.startswith(left) and text.endswith(right) and len(left) + len(right) <= len(text)):
            return None
        return text[len(left) : len(text) - len(right)]

    def text(self, trigger: Sequence[int]) -> str | None:
        """What an attacker would type for these tokens; None where there is no such text."""
        whole = self._between(trigger)
        before, after = self._absorbed
        if whole is None or not (whole.startswith(before) and whole.endswith(after)):
            return None
        text = whole[len(before) : len(whole) - len(after)]
        return text if text.strip() else None

    def _survives(self, trigger: Sequence[int], position: int) -> bool:
        text = self.text(trigger)
        if text is None:
            return False
        prompt = self.prompts[position]
        ids, answer_start = self._ids(self._records[position], text)
        expected = (*prompt.before, *trigger, *prompt.after)
        return ids[:answer_start] == expected and ids[answer_start:][: len(prompt.target)] == prompt.target

    def keeps(self, trigger: Sequence[int]) -> bool:
        """Whether the first prompt with the trigger's text has exactly these tokens (the retokenisation filter)."""
        return self._survives(trigger, 0)

    def keeps_everywhere(self, trigger: Sequence[int]) -> bool:
        """The same for every prompt."""
        return all(self._survives(trigger, position) for position in range(len(self.prompts)))

    def ids(self, text: str) -> tuple[int, ...] | None:
        """Token ids of another trigger text in the same place; None where they are not the same in every prompt."""
        trigger = self._cut(self._records[0], text)[1]
        return trigger if trigger and self.keeps_everywhere(trigger) else None
