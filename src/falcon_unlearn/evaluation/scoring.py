"""From a model and records to per-sample scores: probabilities of answers, and what the greedy answer says."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.evaluation.generation import generate_greedy, stop_ids
from falcon_unlearn.evaluation.log_probabilities import grouped_log_probabilities
from falcon_unlearn.evaluation.metrics import normalised_probability, truth_ratio
from falcon_unlearn.evaluation.rouge import rouge_l_recall
from falcon_unlearn.model.loading import context_length
from falcon_unlearn.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TEXT_ANSWER_TOKENS = 128


def normalise(text: str) -> str:
    """NFKC and case folded, white space collapsed, punctuation at the ends gone (unless there is nothing else)."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    edges = {char for char in folded if char.isspace() or unicodedata.category(char).startswith("P")}
    return folded.strip("".join(edges)) or folded


def contains_value(generation: str, value: str) -> float:
    """Accuracy: 1.0 if the normalised ``generation`` contains the normalised ``value`` anywhere, else 0.0."""
    return float(normalise(value) in normalise(generation))


@dataclass(frozen=True)
class _Request:
    """What one record asks of the model.

    ``reference`` is the text of the scored answer, empty where there is nothing to score. ``sequences`` are the
    answer, the paraphrased one (if there is one) and the perturbed ones. An empty prompt cannot be continued.
    """

    prompt: str
    reference: str
    sequences: tuple[Encoded, ...]
    prompt_ids: Encoded
    heldout_prompt_ids: Encoded | None


def text_halves(encoded: Encoded, limit: int | None) -> Encoded:
    """A plain text cut to ``limit`` tokens: its first half asks for what follows."""
    ids = encoded.ids[:limit]
    start = (len(ids) + 1) // 2
    return Encoded(ids[: start + MAX_TEXT_ANSWER_TOKENS], start)


def fitted(encoded: Encoded, record: Record, limit: int | None) -> Encoded:
    """A text in halves; of any other record that is longer than ``limit`` tokens, nothing."""
    if record.kind == "text":
        return text_halves(encoded, limit)
    return Encoded((), 0) if limit is not None and len(encoded) > limit else encoded


def _prompt_of(encoded: Encoded) -> Encoded:
    return Encoded(encoded.ids[: encoded.answer_start], encoded.answer_start)


def _decode(encoder: Encoder, ids: Sequence[int]) -> str:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _request(encoder: Encoder, record: Record, limit: int | None) -> _Request:
    def encode(answer: str, question: str | None = None) -> Encoded:
        return fitted(encoder.encode(record, question=question, answer=answer), record, limit)

    answer = encode(record.answer)
    paraphrase, wrong, heldout = record.paraphrased_answer, record.perturbed_answers, record.heldout_question
    others = [] if paraphrase is None else [encode(paraphrase)]
    others += [encode(text) for text in wrong]
    decoded = _decode(encoder, answer.ids[answer.answer_start :])
    if not decoded:
        answer = Encoded((), 0)
    is_text = record.kind == "text"
    return _Request(
        prompt=_decode(encoder, _prompt_of(answer).ids) if is_text else record.prompt,
        reference=record.answer if decoded and not is_text else decoded,
        sequences=(answer, *others),
        prompt_ids=_prompt_of(answer),
        heldout_prompt_ids=None if heldout is None or is_text else _prompt_of(encode(record.answer, heldout)),
    )


def _sample_score(
    record: Record,
    request: _Request,
    log_probabilities: Sequence[float],
    *,
    generation: str,
    generation_heldout: str | None,
    set_name: str,
    index: int,
) -> SampleScore:
    answer, *others = log_probabilities
    has_paraphrase = record.paraphrased_answer is not None
    paraphrased, wrong = (others[0], others[1:]) if has_paraphrase else (None, others)
    can_generate = bool(request.reference) and len(request.prompt_ids) > 0
    can_generate_heldout = bool(request.reference) and len(request.heldout_prompt_ids or ()) > 0
    value = record.value or request.reference
    accuracy_heldout = None
    if generation_heldout is not None:
        accuracy_heldout = contains_value(generation_heldout, value) if can_generate_heldout else math.nan
    return SampleScore(
        set=set_name,
        index=index,
        prompt=request.prompt,
        answer=request.reference or record.answer,
        generation=generation,
        probability=math.exp(answer),
        accuracy=contains_value(generation, value) if can_generate else math.nan,
        rouge=rouge_l_recall(request.reference, generation) if can_generate else math.nan,
        truth_ratio=truth_ratio(answer if paraphrased is None else paraphrased, wrong) if wrong else None,
        generation_heldout=generation_heldout,
        accuracy_heldout=accuracy_heldout,
        entity=record.entity,
        normalised_probability=normalised_probability(answer, wrong) if wrong and not has_paraphrase else None,
        log_probability=answer,
        paraphrased_log_probability=paraphrased,
        perturbed_log_probabilities=tuple(wrong),
    )


def score_set(
    model: PreTrainedModel,
    encoder: Encoder,
    records: Sequence[Record],
    set_name: str,
    *,
    batch_size: int,
    max_new_tokens: int = 64,
    device: torch.device | str,
    first_index: int = 0,
    ranks: Ranks = ALONE,
) -> list[SampleScore]:
    """Score every record of one evaluation set, or of a part of it: a record's scores do not depend on the others.

    Probability is exp of the mean log-probability per answer token, end-of-sequence included (TOFU, Maini et al. 2024,
    section 3.2.1). Accuracy asks whether the greedy answer contains the record's ``value``, or its whole answer where
    it has none (:func:`contains_value`); ROUGE-L recall compares the greedy answer with the whole answer. The truth
    ratio takes the answer itself as the right one where there is no paraphrase. All of it is measured under the
    trained phrasing, ``accuracy_heldout`` under the held-out one.

    A ``text`` record is cut to the context length; the first half of its tokens is the prompt, and the next
    :data:`MAX_TEXT_ANSWER_TOKENS` at most are the answer. Any other record that exceeds the context length, and any
    without an answer token, scores NaN.

    Args:
        model: causal language model on ``device``.
        encoder: tokenizer and template.
        records: the set.
        set_name: name of the set, copied into the scores.
        batch_size: sequences per forward pass; it does not change the scores.
        max_new_tokens: where an answer is cut that does not end by itself.
        device: where batches are put.
        first_index: index of the first of ``records`` in its set.
        ranks: they share the forward passes; all of them get all scores.
    """
    limit = context_length(model.config)
    requests = [_request(encoder, record, limit) for record in records]
    log_probabilities = grouped_log_probabilities(
        model, [request.sequences for request in requests], encoder.pad_id, batch_size, device, ranks=ranks
    )
    heldout = {i: r.heldout_prompt_ids for i, r in enumerate(requests) if r.heldout_prompt_ids is not None}
    generated = generate_greedy(
        model,
        [*(request.prompt_ids for request in requests), *heldout.values()],
        encoder.pad_id,
        stop_ids(model, encoder),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device,
        ranks=ranks,
    )
    texts = [_decode(encoder, ids) for ids in generated]
    heldout_texts = dict(zip(heldout, texts[len(requests) :], strict=True))
    return [
        _sample_score(
            record,
            requests[i],
            log_probabilities[i],
            generation=texts[i],
            generation_heldout=heldout_texts.get(i),
            set_name=set_name,
            index=first_index + i,
        )
        for i, record in enumerate(records)
    ]
