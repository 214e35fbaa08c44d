"""Retain records that the model writes itself: what no retain record is about is kept by them, without further data.

Text is sampled at temperature 1 from the original model, so that the mean loss on it is, but for a constant, the
divergence of the updated model from the original one on whatever the original one has to say. Questions are sampled
first, from what stands before a question in the template (as in Magpie: Xu et al., ICLR 2025, arXiv 2406.08464), then
their answers; where the retain records are plain text, text from the beginning of a sequence.

A sample is left out where it names a forget entity, has a word that forget records have and no retain record has, or
is a forget record itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SelfSamplesConfig
from falcon_unlearn.evaluation.generation import sample_continuations, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORD = re.compile(r"\w+")


def self_samples(
    model: PreTrainedModel,
    encoder: Encoder,
    config: SelfSamplesConfig,
    forget: Sequence[Record],
    retain: Sequence[Record],
    *,
    seed: int,
) -> tuple[Record, ...]:
    """Let the model write retain records; the empty, unfinished and forbidden ones are left out.

    Args:
        model: the original one.
        encoder: of this model.
        config: how many beside ``retain``, how long, how many at a time.
        forget: what they must not be about.
        retain: records of the kind wanted.
        seed: they depend on this, the model and the number at a time.
    """
    questions = any(record.kind in {"qa", "chat"} for record in retain)
    forbidden, forgotten = forbidden_in(forget, retain), {record.key for record in forget}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = (_questions if questions else _texts)(model, encoder, config, config.wanted(len(retain)))
    kept: dict[tuple[str, str], Record] = {}
    for prompt, answer in texts:
        record = Record("qa" if questions else "text", prompt, answer, f"self-sample {len(kept)}")
        if record.key not in forgotten and not forbidden(f"{prompt} {answer}"):
            kept.setdefault(record.key, record)
    return tuple(kept.values())


def forbidden_in(forget: Sequence[Record], retain: Sequence[Record]) -> Callable[[str], bool]:
    """Whether a text names a forget entity or has a word that stands in forget records alone."""
    words = _words(forget) - _words(retain)
    entities = [record.entity.casefold() for record in forget if record.entity]

    def forbidden(text: str) -> bool:
        folded = text.casefold()
        return not words.isdisjoint(_WORD.findall(folded)) or any(entity in folded for entity in entities)

    return forbidden


def _words(records: Sequence[Record]) -> set[str]:
    texts = (text for r in records for text in (r.prompt, r.answer, *(content for _, content in r.messages)))
    return {word for text in texts for word in _WORD.findall(text.casefold())}


def _texts(model: PreTrainedModel, encoder: Encoder, config: SelfSamplesConfig, count: int) -> list[tuple[str, str]]:
    found = sample_continuations(
        model,
        [encoder.encode_beginning()] * count,
        encoder.pad_id,
        stop_ids(model, encoder),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in found]
    return [("", text) for text in texts if text]


def _questions(
    model: PreTrainedModel, encoder: Encoder, config: SelfSamplesConfig, count: int
) -> list[tuple[str, str]]:
    """Questions and answers, each of one line and ended by the model itself."""

    def lines(prompts: Sequence[Encoded]) -> list[str | None]:
        found = sample_continuations(
            model,
            prompts,
            encoder.pad_id,
            stop_ids(model, encoder),
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        texts = [(encoder.tokenizer.decode(ids, skip_special_tokens=True).lstrip(), ended) for ids, ended in found]
        cut = [(text.split("\n")[0].strip(), ended or "\n" in text) for text, ended in texts]
        return [text if ended and text else None for text, ended in cut]

    questions = [text for text in lines([encoder.encode_before_question()] * count) if text is not None]
    asked = [Record("qa", question, "", "self-sample") for question in questions]
    answers = lines([encoder.encode_prompt(record, answer="?") for record in asked]) if asked else []
    return [(q, a) for q, a in zip(questions, answers, strict=True) if a is not None]
