"""Per-token numbers of sequences under a model: what membership attacks and memorisation measures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Encoded, collate, length_sorted_batches
from falcon_unlearn.evaluation.log_probabilities import evaluating, logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class TokenScores:
    """Numbers of one sequence under one model, an entry for each scored token.

    Attributes:
        log_probability: of the token that stands there, in nats.
        mean: expectation of log p over the vocabulary under the model's own distribution, the mu of Min-K%++ (Zhang et
            al. 2024, "Min-K%++: improved baseline for detecting pre-training data").
        std: its standard deviation, Min-K%++'s sigma; 0 where one token has all the probability.
        correct: whether the token is the most probable one.
    """

    log_probability: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    correct: tuple[bool, ...]


def token_scores(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
    *,
    answer_only: bool,
) -> list[TokenScores]:
    """Score the tokens of each sequence, in the order of ``encoded``.

    The first token of a sequence has nothing to predict it and is never scored; a sequence without another token has
    no entries. Softmax runs in fp32, a few positions at a time.

    Args:
        model: causal language model on ``device``.
        encoded: sequences within the model's context length.
        pad_id: any token id.
        batch_size: sequences per forward pass; it does not change the scores.
        device: where batches are put.
        answer_only: score the tokens from ``answer_start`` on, not all.
    """

    def first(item: Encoded) -> int:
        return max(item.answer_start, 1) if answer_only else 1

    result = [TokenScores((), (), (), ())] * len(encoded)
    scorable = [i for i, item in enumerate(encoded) if len(item) > first(item)]
    with evaluating(model):
        for positions in length_sorted_batches([encoded[i] for i in scorable], batch_size):
            indices = [scorable[p] for p in positions]
            batch = collate([encoded[i] for i in indices], pad_id).to(device)
            counted = batch.attention_mask.bool()
            for row, i in enumerate(indices):
                counted[row, : first(encoded[i])] = False
            logits = logits_at(model, counted.roll(-1, 1), batch.input_ids, batch.attention_mask)
            log_probability, mean, std, correct = _numbers(logits, batch.input_ids[counted].to(logits.device))
            end = 0
            for i in indices:
                start, end = end, end + len(encoded[i]) - first(encoded[i])
                result[i] = TokenScores(
                    tuple(log_probability[start:end]),
                    tuple(mean[start:end]),
                    tuple(std[start:end]),
                    tuple(correct[start:end]),
                )
    return result


def _numbers(logits: Tensor, targets: Tensor) -> tuple[list[float], list[float], list[float], list[bool]]:
    """Lists of the fields of :class:`TokenScores`, from ``(N, V)`` and ``(N,)``."""
    floats, correct = [], []
    size = max(_BLOCK_ELEMENTS // logits.shape[1], 1)
    for rows, wanted in zip(torch.split(logits, size), torch.split(targets, size), strict=True):
        correct.append(rows.argmax(1) == wanted)
        log_p = rows.float().log_softmax(1)
        own = log_p.gather(1, wanted[:, None])
        p = log_p.exp()
        log_p.masked_fill_(p == 0, 0.0)  # 0 log 0
        mean = (p * log_p).sum(1, keepdim=True)
        std = (log_p - mean).square_().mul_(p).sum(1, keepdim=True).sqrt_()
        floats.append(torch.cat([own, mean, std], 1))
    own_list, means, stds = torch.cat(floats).double().T.tolist()
    return own_list, means, stds, torch.cat(correct).tolist()
