"""From records to token batches: templates, beginning-of-sequence, loss masks, padding, order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LossMask = Literal["answer", "all"]
TemplateChoice = Literal["auto", "plain", "chat"]
LongRecords = Literal["error", "drop", "truncate"]

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"

# Rendered in the answer's place, it shows where the answer begins: not every template opens an answer as it
# prompts for one (Qwen3 puts an empty thought before it).
_ANSWER_MARK = "\ue000answer\ue000"
_QUESTION_MARK = "\ue000question\ue000"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record.

    Tokens from ``answer_start`` on are the answer (end-of-sequence included); before ``content_start`` stands the
    beginning-of-sequence token, where there is one.
    """

    ids: tuple[int, ...]
    answer_start: int
    content_start: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Right-padded token batch, all tensors of shape ``(batch, length)``.

    ``answer_mask`` is true on answer tokens, ``content_mask`` on every token of the record. Padding is in neither, and
    neither is beginning-of-sequence: its activation is the same in every record, and in large models so large that
    it would be the only principal direction. ``records`` are the rows as they were before padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    content_mask: Tensor
    records: tuple[Encoded, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def loss_mask(self, mask: LossMask) -> Tensor:
        """Boolean ``(batch, length)``: the tokens that take part in a loss or a statistic."""
        return self.answer_mask if mask == "answer" else self.content_mask

    def to(self, device: torch.device | str) -> Batch:
        """Copy to ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.answer_mask.to(device),
            self.content_mask.to(device),
            self.records,
        )

    def parts(self, most: int) -> list[Batch]:
        """Cut into batches of at most ``most`` rows, each as wide as its longest row."""
        if most >= len(self):
            return [self]
        return [self.rows(slice(start, start + most)) for start in range(0, len(self), most)]

    def rows(self, rows: slice) -> Batch:
        """Some of the rows (one at least), as wide as the longest of them."""
        width = max(len(record) for record in self.records[rows])
        return Batch(
            self.input_ids[rows, :width],
            self.attention_mask[rows, :width],
            self.answer_mask[rows, :width],
            self.content_mask[rows, :width],
            self.records[rows],
        )


_SPACES = ("\u0120", "\u2581", " ")
"""How tokenizers write the space before a word: byte-level BPE, SentencePiece, plainly."""


class Encoder:
    """Turns records into token ids with one tokenizer and one stated template.

    ``auto`` uses the tokenizer's chat template where it has one and :data:`PLAIN_TEMPLATE` otherwise. Plain
    prompt+completion and text records are taken as they are. The beginning-of-sequence token stands exactly
    once, and only if this tokenizer adds one by itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: TemplateChoice = "auto",
        plain_template: str = PLAIN_TEMPLATE,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("the model's tokenizer has no tokenizer.json (fast tokenizer): save one beside the model")
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_chat:
            raise UserError("corpus.template is 'chat', but the tokenizer has no chat template: use 'plain' or 'auto'")
        if not ("{question}" in plain_template and plain_template.rstrip().endswith("{answer}")):
            raise UserError("corpus.plain_template must contain {question} and end with {answer}")
        self.tokenizer = tokenizer
        self.uses_chat_template = has_chat and template != "plain"
        self._before_question, rest = plain_template.split("{question}", 1)
        self._before_answer = rest.rstrip()[: -len("{answer}")]
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        first = tokenizer("a")["input_ids"][:1]
        self._adds_bos = self._bos is not None and list(first) == [self._bos]

    @property
    def pad_id(self) -> int:
        """A token id to pad with; padding is masked everywhere, so any id serves."""
        for token_id in (self.tokenizer.pad_token_id, self._eos, self._bos):
            if token_id is not None:
                return int(token_id)
        return 0

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id, or None where the tokenizer has none."""
        return self._eos

    def begins_word(self) -> tuple[bool, ...] | None:
        """Of each token of the vocabulary, whether a word begins with it; None where the tokenizer does not say.

        Tokens before which there is a space do, and special ones, and those without a letter or digit.
        """
        tokens = [str(token) for token in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))]
        special = set(self.tokenizer.all_special_ids)
        if any(token.startswith("##") for token in tokens):
            return tuple(not token.startswith("##") for token in tokens)
        if not any(token.startswith(_SPACES) for token in tokens):
            return None
        return tuple(
            i in special or token.startswith(_SPACES) or not any(map(str.isalnum, token))
            for i, token in enumerate(tokens)
        )

    def describe(self) -> str:
        """One line for reports: which template is in use."""
        if self.uses_chat_template:
            return "the tokenizer's chat template"
        return repr(self._before_question + "{question}" + self._before_answer + "{answer}")

    def _render(self, turns: list[dict[str, str]], answer: str, record: Record) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], tokenize=False
            )
        except TemplateError as error:
            raise UserError(
                f"{record.origin}: the tokenizer's chat template refuses this conversation ({error}); "
                "change its roles or set corpus.template to plain"
            ) from error
        assert isinstance(text, str)
        return text

    def _prompt_and_full(self, record: Record, question: str, answer: str) -> tuple[str, str, bool]:
        """Prompt text, full text, and whether an end-of-sequence token must be added."""
        if record.kind == "text":
            return "", answer, False
        if record.kind == "completion":
            return question, question + answer, True
        turns = [{"role": role, "content": content} for role, content in record.messages[:-2]]
        if self.uses_chat_template:
            turns += [{"role": "user", "content": question}]
            full = self._render(turns, answer, record)
            prompt, mark, _ = self._render(turns, _ANSWER_MARK, record).rpartition(_ANSWER_MARK)
            if not (mark and full.startswith(prompt) and answer.strip() in full[len(prompt) :]):
                raise UserError(
                    f"{record.origin}: the tokenizer's chat template changes the answer; set corpus.template to plain"
                )
            return prompt, full, False
        history = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns)
        prompt = history + self._before_question + question + self._before_answer
        return prompt, prompt + answer, True

    def encode_text(self, prompt: str, full: str, *, add_eos: bool) -> Encoded:
        """Tokenise ``full`` as one string and mark where ``prompt`` ends."""
        encoding = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoding["input_ids"])
        offsets = encoding["offset_mapping"]
        # A space before the answer is part of its first token; a line break is a token of the prompt.
        boundary = len(prompt.rstrip(" "))
        # Without a prompt all is answer, the first token too, whose offsets some tokenizers trim to nothing.
        start = next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(ids)) if boundary else 0
        if self._bos is not None and self._adds_bos:
            lead = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
            ids = [self._bos, *ids[lead:]]
            start = max(start - lead, 0) + 1
        if add_eos and self._eos is not None and (not ids or ids[-1] != self._eos):
            ids.append(self._eos)
        return Encoded(tuple(ids), start, int(self._bos is not None and ids[:1] == [self._bos]))

    def encode(self, record: Record, *, question: str | None = None, answer: str | None = None) -> Encoded:
        """Encode a record, optionally with another question or answer in its place."""
        prompt, full, add_eos = self._prompt_and_full(
            record, record.prompt if question is None else question, record.answer if answer is None else answer
        )
        return self.encode_text(prompt, full, add_eos=add_eos)

    def encode_beginning(self) -> Encoded:
        """What text is sampled after: beginning-of-sequence, or where there is none the end of another (or padding)."""
        first = (
            self._bos if self._adds_bos and self._bos is not None else self.pad_id if self._eos is None else self._eos
        )
        return Encoded((first,), 1, 1)

    def encode_before_question(self) -> Encoded:
        """What stands before the first question of a conversation, for generation (``answer_start`` = length)."""
        before = self._before_question
        if self.uses_chat_template:
            asked = Record("chat", _QUESTION_MARK, "?", "")
            before = self._render([{"role": "user", "content": _QUESTION_MARK}], "?", asked).partition(_QUESTION_MARK)[
                0
            ]
        found = self.encode_text("", before.rstrip(" "), add_eos=False).ids or self.encode_beginning().ids
        return Encoded(found, len(found), int(self._bos is not None and found[:1] == (self._bos,)))

    def encode_prompt(self, record: Record, *, question: str | None = None, answer: str | None = None) -> Encoded:
        """Encode only what stands before the answer, for generation (``answer_start`` = length)."""
        encoded = self.encode(record, question=question, answer=answer)
        return dataclasses.replace(encoded, ids=encoded.ids[: encoded.answer_start])


@dataclass(frozen=True)
class LengthReport:
    """How many records were longer than the limit, what was done with them, and how many are left out for it.

    Truncation leaves out records whose prompt alone fills the limit.
    """

    longer: int
    limit: int
    action: LongRecords
    left_out: int = 0


def fit_to_context(
    encoded: Sequence[Encoded], records: Sequence[Record], limit: int, on_long: LongRecords, where: str
) -> tuple[list[Encoded], list[Record], LengthReport]:
    """Apply the ``on_long`` rule to records longer than ``limit`` tokens.

    Raises:
        UserError: with ``on_long = "error"``, naming the count and the first offender.
    """
    long = [i for i, item in enumerate(encoded) if len(item) > limit]
    report = LengthReport(len(long), limit, on_long)
    if not long:
        return list(encoded), list(records), report
    if on_long == "error":
        first = long[0]
        raise UserError(
            f"{where}: {len(long)} of {len(encoded)} records are longer than {limit} tokens (first: "
            f"{records[first].origin}, {len(encoded[first])} tokens); set corpus.on_long to truncate or drop"
        )
    if on_long == "drop":
        kept = [(e, r) for e, r in zip(encoded, records, strict=True) if len(e) <= limit]
    else:
        kept = [
            (dataclasses.replace(e, ids=e.ids[:limit]), r)
            for e, r in zip(encoded, records, strict=True)
            if len(e) <= limit or e.answer_start < limit
        ]
    if not kept:
        raise UserError(f"{where}: no record is left after corpus.on_long={on_long} at {limit} tokens")
    left_out = len(encoded) - len(kept)
    return [e for e, _ in kept], [r for _, r in kept], dataclasses.replace(report, left_out=left_out)


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Right-pad ``encoded`` into one batch."""
    import torch

    length = max(len(item) for item in encoded)
    input_ids = torch.full((len(encoded), length), pad_id, dtype=torch.long)
    attention = torch.zeros((len(encoded), length), dtype=torch.long)
    answer = torch.zeros((len(encoded), length), dtype=torch.bool)
    content = torch.zeros((len(encoded), length), dtype=torch.bool)
    for row, item in enumerate(encoded):
        input_ids[row, : len(item)] = torch.tensor(item.ids)
        attention[row, : len(item)] = 1
        answer[row, item.answer_start : len(item)] = True
        content[row, item.content_start : len(item)] = True
    return Batch(input_ids, attention, answer, content, tuple(encoded))


def length_sorted_batches(encoded: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Indices of ``encoded`` in batches of similar length (for scoring, where order does not matter)."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_order(n: int, epoch: int, seed: int, stream: str) -> list[int]:
    """A permutation of ``range(n)`` that depends on nothing but its arguments, so any step can be replayed."""
    order = list(range(n))
    random.Random(f"{stream} {seed} {epoch}").shuffle(order)
    return order


def batch_indices(n: int, batch_size: int, step: int, seed: int, stream: str) -> list[int]:
    """The sample indices of batch ``step`` of an endless stream that reshuffles every epoch.

    Every sample is used equally often; a batch may span the end of an epoch, and a set smaller than
    ``batch_size`` gives batches of its own size rather than repeating a sample within one batch.
    """
    size = min(batch_size, n)
    first = step * size
    epochs = sorted({position // n for position in range(first, first + size)})
    stream_part = [index for epoch in epochs for index in epoch_order(n, epoch, seed, stream)]
    offset = first - epochs[0] * n
    return stream_part[offset : offset + size]


def shuffled_batches(
    encoded: Sequence[Encoded], batch_size: int, epoch: int, seed: int, window: int = 8
) -> Iterator[list[int]]:
    """One epoch of batches of similar length: shuffle, sort by length inside windows, shuffle the batches."""
    order = epoch_order(len(encoded), epoch, seed, "pretraining")
    batches = []
    for start in range(0, len(order), batch_size * window):
        chunk = sorted(order[start : start + batch_size * window], key=lambda i: len(encoded[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    random.Random(f"batches {seed} {epoch}").shuffle(batches)
    yield from batches
