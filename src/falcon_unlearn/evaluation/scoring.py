"""From a model and records to per-sample scores: batched log-probabilities and greedy generation."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.corpus.batching import Encoded, Encoder, collate, length_sorted_batches
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.evaluation.metrics import normalised_probability, truth_ratio
from falcon_unlearn.evaluation.rouge import rouge_l_recall
from falcon_unlearn.model.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TEXT_ANSWER_TOKENS = 128

_GENERATION_SLACK = 8
_ROWS_PER_LOG_SOFTMAX = 512


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _batch_log_probabilities(
    model: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, device: torch.device | str
) -> list[float]:
    batch = collate(encoded, pad_id).to(device)
    # Position t predicts token t + 1; what stands before the first answer in the batch needs no logits.
    first = max(min(item.answer_start for item in encoded), 1) - 1
    keep = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep["logits_to_keep"] = batch.input_ids.shape[1] - first
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **keep
    ).logits
    if not keep:
        logits = logits[:, first:]
    answer = batch.answer_mask[:, first + 1 :]
    rows = logits[:, :-1][answer]
    targets = batch.input_ids[:, first + 1 :][answer]
    del logits
    losses = [
        F.cross_entropy(
            rows[i : i + _ROWS_PER_LOG_SOFTMAX].float(), targets[i : i + _ROWS_PER_LOG_SOFTMAX], reduction="none"
        )
        for i in range(0, len(rows), _ROWS_PER_LOG_SOFTMAX)
    ]
    per_token = torch.cat(losses).double().cpu()
    ends = answer.sum(1).cumsum(0).tolist()
    return [-float(per_token[start:end].mean()) for start, end in zip([0, *ends], ends, strict=False)]


def answer_log_probabilities(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[float]:
    """Mean log-probability (nats) per answer token, in the order of ``encoded``.

    Log-softmax runs in fp32 and on answer positions only. The first token of a sequence has nothing to predict it and
    never counts; an item without a countable answer token gets NaN.
    """
    result = [math.nan] * len(encoded)
    scorable = [i for i, item in enumerate(encoded) if len(item) > max(item.answer_start, 1)]
    with _evaluating(model):
        for positions in length_sorted_batches([encoded[i] for i in scorable], batch_size):
            indices = [scorable[p] for p in positions]
            values = _batch_log_probabilities(model, [encoded[i] for i in indices], pad_id, device)
            for i, value in zip(indices, values, strict=True):
                result[i] = value
    return result


def _batch_generate(
    model: PreTrainedModel,
    prompts: Sequence[Encoded],
    pad_id: int,
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    device: torch.device | str,
) -> list[list[int]]:
    from transformers import GenerationConfig

    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt.ids)
        attention[row, length - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(stops) or None,
    )
    # generate() fills what this config leaves open from the model's own one: sampling settings, repetition penalty.
    inherited, model.generation_config = model.generation_config, config
    try:
        output = model.generate(
            input_ids=input_ids.to(device), attention_mask=attention.to(device), generation_config=config
        )
    finally:
        model.generation_config = inherited
    generated: list[list[int]] = output[:, length:].tolist()
    return [list(itertools.takewhile(lambda token: token not in stops, ids)) for ids in generated]


def stop_ids(model: PreTrainedModel, encoder: Encoder) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end-of-sequence and those in the model's generation config.

    Chat models list their end-of-turn token in the latter only.
    """
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list | tuple) else [configured]
    return tuple(sorted({int(end) for end in (encoder.eos_id, *ends) if end is not None}))


def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Encoded],
    pad_id: int,
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
) -> list[list[int]]:
    """Greedy continuation of each prompt, up to and without the first of ``stops``, in the order of ``prompts``.

    Batches are left-padded and of similar length. A continuation ends at the model's context length if that comes
    before ``max_new_tokens``; an empty prompt, or one that leaves no room, gives an empty one.
    """
    result: list[list[int]] = [[] for _ in prompts]
    limit = context_length(model.config)
    by_room: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        if len(prompt) and room > 0:
            by_room[room].append(i)
    with _evaluating(model):
        for room, members in by_room.items():
            for positions in length_sorted_batches([prompts[i] for i in members], batch_size):
                indices = [members[p] for p in positions]
                outputs = _batch_generate(
                    model, [prompts[i] for i in indices], pad_id, stops, max_new_tokens=room, device=device
                )
                for i, output in zip(indices, outputs, strict=True):
                    result[i] = output
    return result


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


def _text_halves(encoded: Encoded, limit: int | None) -> Encoded:
    ids = encoded.ids[:limit]
    start = (len(ids) + 1) // 2
    return Encoded(ids[: start + MAX_TEXT_ANSWER_TOKENS], start)


def _prompt_of(encoded: Encoded) -> Encoded:
    return Encoded(encoded.ids[: encoded.answer_start], encoded.answer_start)


def _decode(encoder: Encoder, ids: Sequence[int]) -> str:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _request(encoder: Encoder, record: Record, limit: int | None) -> _Request:
    def encode(answer: str, question: str | None = None) -> Encoded:
        encoded = encoder.encode(record, question=question, answer=answer)
        if record.kind == "text":
            return _text_halves(encoded, limit)
        return Encoded((), 0) if limit is not None and len(encoded) > limit else encoded

    answer = encode(record.answer)
    paraphrase, wrong, heldout = record.paraphrased_answer, record.perturbed_answers, record.heldout_question
    others = [] if paraphrase is None or not wrong else [encode(paraphrase)]
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
    wrong = others[1:] if has_paraphrase else others
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
        truth_ratio=truth_ratio(others[0] if has_paraphrase else answer, wrong) if wrong else None,
        generation_heldout=generation_heldout,
        accuracy_heldout=accuracy_heldout,
        entity=record.entity,
        normalised_probability=normalised_probability(answer, wrong) if wrong and not has_paraphrase else None,
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
) -> list[SampleScore]:
    """Score every record of one evaluation set.

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
        max_new_tokens: upper limit; generation stops 8 tokens after the length of the set's longest answer.
        device: where batches are put.
    """
    limit = context_length(model.config)
    requests = [_request(encoder, record, limit) for record in records]
    values = iter(
        answer_log_probabilities(
            model, [s for request in requests for s in request.sequences], encoder.pad_id, batch_size, device
        )
    )
    log_probabilities = [[next(values) for _ in request.sequences] for request in requests]

    answers = [request.sequences[0] for request in requests]
    longest = max((len(answer) - answer.answer_start for answer in answers), default=0)
    heldout = {i: r.heldout_prompt_ids for i, r in enumerate(requests) if r.heldout_prompt_ids is not None}
    generated = generate_greedy(
        model,
        [*(request.prompt_ids for request in requests), *heldout.values()],
        encoder.pad_id,
        stop_ids(model, encoder),
        max_new_tokens=min(max_new_tokens, longest + _GENERATION_SLACK),
        batch_size=batch_size,
        device=device,
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
            index=i,
        )
        for i, record in enumerate(records)
    ]
