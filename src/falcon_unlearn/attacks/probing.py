"""A linear probe: can the answer be read off the hidden states of the question, whether or not the model says it?

At the last prompt token of each layer a ridge regression is taught, on retained facts only, to give the mean input
embedding of the answer's tokens. On a forget question the option (the right answer or one of the wrong ones) whose
embedding agrees most with what the probe gives is its choice. The options are never shown to the model. The control
task (Hewitt & Liang 2019, "Designing and interpreting probes with control tasks") is the same probe taught with the
answers dealt out at random among the questions; accuracy minus the control's is its selectivity.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.attacks.base import AttackConfig, Deadline, Outcome, Point, Target, mean, strongest
from falcon_unlearn.corpus.batching import Encoded, Encoder, collate, length_sorted_batches
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.model.decoder import find_layers, first_tensor
from falcon_unlearn.model.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTROLS = 8
_FEWEST = 8


def ridge_predictions(train: Tensor, values: Tensor, test: Tensor, strength: float) -> Tensor:
    """What ridge regression with an intercept, on standardised features, predicts.

    Solved in its dual form, since there are often fewer samples than features, and in fp64.

    Args:
        train: features, ``(n, D)``.
        values: what to predict, ``(n, K)``.
        test: features, ``(m, D)``.
        strength: of the penalty, per sample: the loss is the mean squared error plus ``strength`` times the squared
            norm of the weights.

    Returns:
        ``(m, K)`` in fp64.
    """
    train, values, test = train.double(), values.double(), test.double()
    centre, spread = train.mean(0), train.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1)
    known, new = (train - centre) / spread, (test - centre) / spread
    offset = values.mean(0)
    kernel = known @ known.T
    kernel.diagonal().add_(strength * len(known))
    weights: Tensor = torch.linalg.solve(kernel, known @ new.T)
    return weights.T @ (values - offset) + offset


@torch.no_grad()
def last_prompt_states(
    model: PreTrainedModel, prompts: Sequence[Encoded], pad_id: int, batch_size: int, deadline: Deadline
) -> tuple[Tensor, int]:
    """The residual stream behind each layer at the last token of each prompt.

    Args:
        model: any decoder from transformers, in eval mode.
        prompts: none of them empty, within the context length.
        pad_id: any token id.
        batch_size: sequences per forward pass.
        deadline: checked before each batch.

    Returns:
        ``(layers, prompts, D)`` in fp32 on the CPU, and the number of forward passes.

    Raises:
        OutOfTimeError: the deadline passed.
        UserError: the architecture has no layer stack that is known.
    """
    _, stack = find_layers(model)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    batches = length_sorted_batches(prompts, batch_size)
    parts: list[list[Tensor]] = [[] for _ in stack]
    now: list[Tensor] = []

    def keeper(layer: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            states = first_tensor(output)
            rows = torch.arange(len(states), device=states.device)
            parts[layer].append(states[rows, now[0].to(states.device)].float().cpu())

        return keep

    handles = [layer.register_forward_hook(keeper(i)) for i, layer in enumerate(stack)]
    try:
        for indices in batches:
            deadline.check()
            now[:] = [ends[indices]]
            batch = collate([prompts[i] for i in indices], pad_id).to(model.device)
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    back = torch.tensor([i for indices in batches for i in indices]).argsort()
    return torch.stack([torch.cat(part)[back] for part in parts]), len(batches)


@dataclass(frozen=True, eq=False)
class _Questions:
    """Prompts and what belongs to them; ``options`` has the right answer first."""

    places: list[int]
    prompts: list[Encoded]
    options: list[list[Encoded]]


def _questions(encoder: Encoder, records: Sequence[Record], limit: int | None, *, with_options: bool) -> _Questions:
    found = _Questions([], [], [])
    for i, record in enumerate(records):
        if record.kind == "text" or (with_options and not record.perturbed_answers):
            continue
        texts = [record.answer]
        if with_options:
            texts = [record.paraphrased_answer or record.answer, *record.perturbed_answers]
        encoded = [encoder.encode(record, answer=text) for text in texts]
        start = encoded[0].answer_start
        if not start or (limit is not None and start > limit) or any(len(e) <= e.answer_start for e in encoded):
            continue
        found.places.append(i)
        found.prompts.append(Encoded(encoded[0].ids[:start], start))
        found.options.append(encoded)
    return found


@torch.no_grad()
def _answer_vector(model: PreTrainedModel, answer: Encoded) -> Tensor:
    ids = torch.tensor(answer.ids[answer.answer_start :], device=model.device)
    vectors: Tensor = model.get_input_embeddings()(ids)
    return vectors.float().mean(0).cpu()


class ProbeConfig(AttackConfig):
    """Read the answer off the hidden states of the question with a linear probe, beside a control task."""

    name: Literal["probe"] = "probe"
    retain_records: int = Field(1000, ge=_FEWEST)
    """Retain questions that the probe is taught with, at most."""
    ridge: float = Field(0.1, gt=0)
    """Strength of its penalty."""

    def run(self, target: Target) -> Outcome:
        """Probe every layer.

        Accuracy is corrected for guessing: a right choice counts 1, a wrong one among k options -1 / (k - 1), so that
        its mean is 0 by chance. ``choice_accuracy``, ``control_accuracy`` and ``selectivity`` are as they are.

        Raises:
            OutOfTimeError: before all states were there.
            UserError: there are no wrong answers to choose from, or too few retain questions.
        """
        encoder, limit = target.encoder, context_length(target.model.config)
        asked = _questions(encoder, target.rest, limit, with_options=True)
        if not asked.places:
            raise UserError(
                "probe: no forget question has wrong answers to choose from: add a perturbed_answer column to the "
                "forget set of the evaluation"
            )
        forgotten = {record.entity for record in (*target.rest, *target.known) if record.entity}
        retain = [record for record in target.retain if record.entity not in forgotten]
        random.Random(f"probe {target.seed}").shuffle(retain)
        taught = _questions(encoder, retain[: self.retain_records], limit, with_options=False)
        if len(taught.places) < _FEWEST:
            raise UserError(f"probe: {len(taught.places)} retain questions are too few to teach a probe: give more")
        n = len(taught.places)
        states, passes = last_prompt_states(
            target.model, [*taught.prompts, *asked.prompts], encoder.pad_id, target.batch_size, target.deadline
        )
        answers = torch.stack([_answer_vector(target.model, options[0]) for options in taught.options])
        answers = answers - answers.mean(0)
        choices = [torch.stack([_answer_vector(target.model, o) for o in options]) for options in asked.options]
        generator = torch.Generator().manual_seed(target.seed)
        dealt = [torch.randperm(n, generator=generator) for _ in range(_CONTROLS)]
        columns = torch.cat([answers, *(answers[order] for order in dealt)], 1)
        tried, selectivity = [], {}
        for layer, here in enumerate(states):
            target.deadline.check()
            given = ridge_predictions(here[:n], columns, here[n:], self.ridge)
            own, *controls = given.chunk(1 + _CONTROLS, 1)
            right = _choices(own, choices)
            control = torch.tensor([_choices(c, choices) for c in controls], dtype=torch.double).mean(0).tolist()
            selectivity[layer] = [a - b for a, b in zip(right, control, strict=True)]
            numbers = {
                "choice_accuracy": mean(right),
                "control_accuracy": mean(control),
                "selectivity": mean(selectivity[layer]),
            }
            samples = _samples(target, asked, right)
            accuracy = mean([s.accuracy for s in samples])
            tried.append((Point({"layer": layer}, accuracy, math.nan, numbers), samples))
        best, samples = strongest(tried)
        entities = [target.rest[i].entity for i in asked.places]
        chance = mean([1 / len(options) for options in choices])
        return Outcome(
            samples,
            tuple(entry[0] for entry in tried),
            {"selectivity": mean_estimate(selectivity[int(best.setting["layer"])], entities)},
            passes,
            {"layer": best.setting["layer"]},
            (
                f"taught with {n} retain questions; accuracy is corrected for guessing (chance: {chance:.2f})",
                f"the best of {len(tried)} layers on the scored records",
                "a probe gives no probability of the answer",
            ),
        )


def _choices(given: Tensor, choices: Sequence[Tensor]) -> list[float]:
    """1.0 for each question whose right option, the first, agrees most with what is given; NaN where nothing does."""
    result = []
    for row, options in zip(given, choices, strict=True):
        agreement = (options - options.mean(0)).double() @ row
        # Equal options (a state that is the same for all) are no choice.
        right = agreement[0] > agreement[1:].max()
        result.append(float(right) if bool(agreement.isfinite().all()) else math.nan)
    return result


def _samples(target: Target, asked: _Questions, right: Sequence[float]) -> tuple[SampleScore, ...]:
    """Scores of ``rest``: NaN where there was nothing to choose from."""
    chosen = dict(zip(asked.places, zip(right, asked.options, strict=True), strict=True))
    result = []
    for i, record in enumerate(target.rest):
        picked, options = chosen.get(i, (math.nan, []))
        wrong = -1 / max(len(options) - 1, 1)
        result.append(
            SampleScore(
                set="forget",
                index=i,
                prompt=record.prompt,
                answer=record.answer,
                generation="",
                probability=math.nan,
                accuracy=wrong if picked == 0 else picked,
                rouge=math.nan,
                entity=record.entity,
            )
        )
    return tuple(result)
