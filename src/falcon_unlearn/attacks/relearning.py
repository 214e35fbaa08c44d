"""Relearning: finetune the unlearned model a little and see how much comes back that was not in the finetuning data.

What a few gradient steps bring back was hidden, not forgotten (Hu et al. 2025, "Unlearning or obfuscating?", arXiv
2406.13356; Łucki et al. 2024, arXiv 2409.18025, section 4.2). The headline is what is there at the last step of the
strongest curve, and the largest area under a curve of accuracy on the other forget facts against steps, over the steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.artifacts import Estimate, SampleScore
from falcon_unlearn.attacks.base import AttackConfig, Outcome, OutOfTimeError, Point, Target, point, strongest
from falcon_unlearn.corpus.batching import Encoded, LossMask, batch_indices, collate
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.engine.optimizers import OptimizerConfig, learning_rate
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.methods.whole_method import nll
from falcon_unlearn.methods.whole_model import WholeModel
from falcon_unlearn.model.decoder import replaced
from falcon_unlearn.model.loading import number_of_layers
from falcon_unlearn.model.lora import ADAPTER_TENSORS, LoraConfig, add_adapters

Source = Literal["forget", "retain", "neighbours"]
Weights = Literal["full", "lora"]
Rate = Annotated[float, Field(gt=0)]

Scored = tuple[Point, tuple[SampleScore, ...]]


class RelearnConfig(AttackConfig):
    """Finetuning on a few records, over a grid; every combination of the tuples is one curve."""

    name: Literal["relearn"] = "relearn"
    sources: tuple[Source, ...] = Field(("forget",), min_length=1)
    """What to finetune on: forget (the known facts), retain, or neighbours (public text, which must be given)."""
    weights: tuple[Weights, ...] = Field(("full",), min_length=1)
    """What is trained: full (every tensor) or lora (adapters on every matrix of attention and MLP; needs peft)."""
    lrs_at_width_128: tuple[Rate, ...] = Field((1e-3,), min_length=1)
    """AdamW's learning rates for a model of width 128; one of width d takes 128 / d of them."""
    lora_lr_factor: float = Field(10.0, gt=0)
    """Adapters take this many times the learning rate."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    epochs: int = Field(2, ge=1)
    """Passes over the known facts' records; every source gets the same number of steps."""
    batch_size: int = Field(4, ge=1)
    """Records a step."""
    loss_mask: LossMask = "answer"
    """Tokens that take part in the loss: answer, or all (of text records every token is answer)."""
    points: int = Field(4, ge=1)
    """Points of a curve after step 0, evenly spread; the last is the last step."""

    def run(self, target: Target) -> Outcome:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        data = {source: _encoded(target, source) for source in self.sources}
        steps = math.ceil(self.epochs * len(_encoded(target, "forget")) / self.batch_size)
        base = target.unattacked()
        curves: list[list[Scored]] = []
        tokens = "answer" if self.loss_mask == "answer" else "all"
        notes = [f"AdamW in fp32, {steps} steps of {self.batch_size} records, loss on {tokens} tokens"]
        done, complete = 0, True
        try:
            for source, weights, lr in itertools.product(self.sources, self.weights, self.lrs_at_width_128):
                setting = {"source": source, "weights": weights, "lr_at_width_128": lr}
                curve = [(point({**setting, "step": 0}, base), base)]
                curves.append(curve)
                for step, samples in _relearn(self, target, data[source], weights, lr=lr, steps=steps):
                    done += 1
                    if samples is not None:
                        curve.append((point({**setting, "step": step}, samples), samples))
                if curve[-1][0].setting["step"] != steps:
                    notes.append(f"{source}, {weights}, {lr:g}: a loss was not finite, the curve ends there")
        except OutOfTimeError:
            complete = False
        tried = [entry for curve in curves for entry in curve]
        if len(tried) == len(curves):
            raise OutOfTimeError
        areas = {
            measure: max((_area(c, measure) for c in curves), key=_value) for measure in ("accuracy", "probability")
        }
        best, samples = strongest([curve[-1] for curve in curves if len(curve) > 1])
        return Outcome(
            samples=samples,
            points=tuple(entry[0] for entry in tried),
            numbers={"area": areas["accuracy"], "area_probability": areas["probability"]},
            steps=done,
            artefacts={"strongest": dict(best.setting)},
            notes=tuple(notes),
            complete=complete,
        )


def _value(estimate: Estimate) -> float:
    return -math.inf if estimate.value is None or math.isnan(estimate.value) else estimate.value


def _area(curve: Sequence[Scored], measure: str) -> Estimate:
    """Trapezoidal area under a curve, over its last step: a mean over steps, with the interval over entities."""
    steps = [float(entry[0].setting["step"]) for entry in curve]
    last = curve[-1][1]
    if len(curve) == 1:
        values = [getattr(s, measure) for s in last]
    else:
        heights = torch.tensor([[getattr(s, measure) for s in samples] for _, samples in curve], dtype=torch.float64)
        areas: list[float] = (torch.trapezoid(heights, torch.tensor(steps).double(), dim=0) / steps[-1]).tolist()
        values = areas
    return mean_estimate(values, [s.entity for s in last])


def _encoded(target: Target, source: Source) -> list[Encoded]:
    records: Sequence[Record] = {
        "forget": target.known,
        "retain": target.retain,
        "neighbours": target.neighbours,
    }[source]
    if not records:
        raise UserError(f"attack relearn: there are no {source} records to finetune on: give some, or leave it out")
    return target.encode(records)


def _relearn(
    config: RelearnConfig,
    target: Target,
    encoded: Sequence[Encoded],
    weights: Weights,
    *,
    lr: float,
    steps: int,
) -> Iterator[tuple[int, tuple[SampleScore, ...] | None]]:
    """Finetune a copy of the trained tensors: step (from 1) and, where the curve has a point, the scores there."""
    with _trained(config, target, weights) as (model, masters):
        rate = learning_rate(OptimizerConfig(lr_at_width_128=lr), model.hidden_size)
        rate *= config.lora_lr_factor if weights == "lora" else 1
        optimizer = torch.optim.AdamW(masters.values(), lr=rate, weight_decay=0.0)
        scored = {math.ceil(steps * i / config.points) for i in range(1, config.points + 1)}
        for step in range(1, steps + 1):
            target.deadline.check()
            chosen = batch_indices(len(encoded), config.batch_size, step - 1, target.seed, "relearn")
            batch = collate([encoded[i] for i in chosen], target.encoder.pad_id).to(target.device)
            loss = nll(model.predictions(batch, config.loss_mask, masters))
            if not bool(torch.isfinite(loss)):
                return
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if step not in scored:
                yield step, None
                continue
            with replaced(model.model, masters):
                samples = target.score()
            yield step, samples


@contextmanager
def _trained(config: RelearnConfig, target: Target, weights: Weights) -> Iterator[tuple[WholeModel, dict[str, Tensor]]]:
    """The model and fp32 copies of the tensors to train; after the block the model is as it was."""
    if weights == "full":
        whole = WholeModel(target.model)
        yield whole, whole.masters()
        return
    layers = range(number_of_layers(target.model.config))
    adapters = add_adapters(target.model, config.lora, layers, ("attention", "mlp"), target.seed)
    try:
        whole = WholeModel(target.model, layers, ADAPTER_TENSORS)
        yield whole, whole.masters()
    finally:
        adapters.remove()
