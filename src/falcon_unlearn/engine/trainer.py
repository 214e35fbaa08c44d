"""The training loop: batches -> two losses -> two gradients -> one update, logged, resumable, deterministic."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.artifacts import StepRecord
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch, Encoded, batch_indices, collate
from falcon_unlearn.engine.checkpoint import load_checkpoint, save_checkpoint
from falcon_unlearn.engine.gradient_conflict import GradientConfig, combine
from falcon_unlearn.engine.optimizers import OptimizerConfig, build_optimizer, learning_rate, scheduled
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods.base import Method


class TrainingConfig(Section):
    """How long, on what and with which optimiser."""

    steps: int = Field(60, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(16, ge=1)
    """Records per forget batch and per retain batch."""
    modules: str | tuple[str, ...] = "mlp"
    """Trained matrices of each selected layer: mlp, down_proj, attention, all, or a list of name endings."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    gradients: GradientConfig = GradientConfig()
    """How forget and retain gradients are combined."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""


@dataclass(frozen=True)
class TrainingData:
    """Encoded records by domain; each domain is an endless reshuffled stream."""

    forget: Mapping[str, Sequence[Encoded]]
    retain: Mapping[str, Sequence[Encoded]]
    pad_id: int
    device: torch.device

    def _batch(self, stream: str, encoded: Sequence[Encoded], size: int, turn: int, *, seed: int) -> Batch:
        indices = batch_indices(len(encoded), size, turn, seed, stream)
        return collate([encoded[i] for i in indices], self.pad_id).to(self.device)

    def at(self, step: int, batch_size: int, seed: int) -> tuple[str, Batch, Batch]:
        """Forget domain, forget batch and retain batch of a step; domains take turns."""
        forget_names, retain_names = list(self.forget), list(self.retain)
        turn, domain = divmod(step, len(forget_names))
        retain_turn, retain_domain = divmod(step, len(retain_names))
        forget, retain = forget_names[domain], retain_names[retain_domain]
        return (
            forget,
            self._batch(f"forget/{forget}", self.forget[forget], batch_size, turn, seed=seed),
            self._batch(f"retain/{retain}", self.retain[retain], batch_size, retain_turn, seed=seed),
        )

    def first_batches(self, batch_size: int) -> dict[str, list[Batch]]:
        """The forget records of each domain in corpus order, for a method's set-up."""
        return {
            domain: [
                collate(encoded[i : i + batch_size], self.pad_id).to(self.device)
                for i in range(0, len(encoded), batch_size)
            ]
            for domain, encoded in self.forget.items()
        }


class DivergedError(UserError):
    """A loss or gradient stopped being finite."""


class InterruptedTrainingError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; the state after ``step`` steps is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@contextlib.contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that no update is cut in half; a second one is let through."""
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class CheckpointPlan:
    """Where the state is kept and what it must match to be continued."""

    path: Path
    fingerprint: str
    resume: bool


def train(
    method: Method,
    masters: Mapping[str, Tensor],
    data: TrainingData,
    config: TrainingConfig,
    *,
    seed: int,
    hidden_size: int,
    checkpoint: CheckpointPlan | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
) -> None:
    """Train ``masters`` in place.

    A checkpoint of step k is written only after the losses and gradients at that state were seen to be finite (at
    the end and on Ctrl-C, where there are none yet: the weights), so the last one on disk is always a good state.

    Args:
        method: gives the two losses.
        masters: fp32 leaves by name.
        data: the streams.
        config: length, optimiser and gradient combination.
        seed: order of the data.
        hidden_size: width of the model, for ``lr: auto``.
        checkpoint: None keeps no state (trial runs).
        on_step: called with the record of each finished step.
        on_resume: called once with the number of steps already done.

    Raises:
        DivergedError: a loss or gradient is not finite; nothing was updated with it.
        InterruptedTrainingError: Ctrl-C or SIGTERM; the state is saved.
    """
    parameters = list(masters.values())
    rate = learning_rate(config.optimizer, hidden_size)
    optimizer = build_optimizer(config.optimizer, parameters, hidden_size=hidden_size, batch_size=config.batch_size)
    start = 0
    if checkpoint is not None and checkpoint.resume and checkpoint.path.exists():
        start = load_checkpoint(checkpoint.path, checkpoint.fingerprint, masters, optimizer)
    if on_resume is not None:
        on_resume(start)

    def save(step: int) -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint.path, step, checkpoint.fingerprint, masters, optimizer)

    with _interrupt_between_steps() as interrupted:
        for step in range(start, config.steps):
            began = time.perf_counter()
            domain, forget, retain = data.at(step, config.batch_size, seed)
            losses = method.losses(step, domain, forget, retain, masters)
            forget_gradients = _gradients(losses.forget, parameters)
            retain_gradients = _gradients(losses.retain, parameters)
            combined, statistics = combine(forget_gradients, retain_gradients, config.gradients)
            record = StepRecord(
                step=step,
                forget_loss=float(losses.forget.detach()),
                retain_loss=float(losses.retain.detach()),
                forget_grad_norm=statistics.forget_norm,
                retain_grad_norm=statistics.retain_norm,
                cosine=statistics.cosine,
                conflicts=statistics.conflicts,
                seconds=0.0,
            )
            _check_finite(record, checkpoint)
            if step % config.checkpoint_every == 0:
                save(step)
            for parameter, gradient in zip(parameters, combined, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = scheduled(config.optimizer, rate, step, config.steps)
            optimizer.step()
            if on_step is not None:
                on_step(dataclasses.replace(record, seconds=time.perf_counter() - began))
            if interrupted():
                _check_weights(step, masters, checkpoint)
                save(step + 1)
                raise InterruptedTrainingError(step + 1)
    _check_weights(config.steps - 1, masters, checkpoint)
    save(config.steps)


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


def _check_finite(record: StepRecord, checkpoint: CheckpointPlan | None) -> None:
    parts = ("forget_loss", "retain_loss", "forget_grad_norm", "retain_grad_norm")
    bad = [name for name in parts if not math.isfinite(getattr(record, name))]
    if bad:
        raise _diverged(record.step, " and ".join(bad), checkpoint)


def _check_weights(step: int, masters: Mapping[str, Tensor], checkpoint: CheckpointPlan | None) -> None:
    bad = [name for name, value in masters.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise _diverged(step, f"after its update {bad[0]}", checkpoint)


def _diverged(step: int, what: str, checkpoint: CheckpointPlan | None) -> DivergedError:
    saved = checkpoint is not None and checkpoint.path.exists()
    kept = f"the last good state is in {checkpoint.path}" if saved and checkpoint else "no state was saved before it"
    return DivergedError(
        f"step {step}: {what} not finite; {kept}; "
        "start again with --overwrite and a lower training.optimizer.lr or method.retain_weight, or dtype float32"
    )
