"""The training loop: batches -> two losses -> two gradients -> one update, logged, resumable, deterministic."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from falcon_unlearn.artifacts import StepRecord
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch, Encoded, batch_indices, collate
from falcon_unlearn.engine.checkpoint import Progress, load_newest, save_checkpoint
from falcon_unlearn.engine.gradient_conflict import GradientConfig, combine
from falcon_unlearn.engine.interpolation import drawn_share, on_the_way_back
from falcon_unlearn.engine.optimizers import OptimizerConfig, build_optimizer, learning_rate, scheduled
from falcon_unlearn.engine.parallel import Replicas
from falcon_unlearn.errors import UserError, is_out_of_memory
from falcon_unlearn.methods.base import Method
from falcon_unlearn.model.lora import LoraConfig


class TrainingConfig(Section):
    """How long, on what and with which optimiser."""

    steps: int = Field(60, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(16, ge=1)
    """Records per forget batch and per retain batch."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Records per forward pass; empty: the whole batch, halved whenever memory does not suffice."""
    modules: str | tuple[str, ...] = "mlp"
    """Trained matrices of each selected layer: mlp, down_proj, attention, all, or a list of name endings."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of those matrices instead (needs peft); empty: the matrices themselves."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    gradients: GradientConfig = GradientConfig()
    """How forget and retain gradients are combined."""
    interpolation: float = Field(0.0, ge=0, lt=1)
    """The forget gradient is taken up to this share of the way back to the original weights, drawn anew each step."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints on the disk; where the newest is found damaged, the one before it is used."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Keep frozen activations between epochs; auto: of every domain whose records are used more than once."""
    cache_gb: float | None = Field(None, ge=0)
    """Memory for kept activations, beyond which they lie on disk; empty: a quarter of the free memory.

    It is the host's, page-locked for CUDA; batches are copied to the GPU a step ahead.
    """
    streaming: Literal["auto", "always", "never"] = "auto"
    """Run the frozen layers one at a time, once, and train on what is kept of them; auto: where they do not fit."""
    shard: bool = True
    """Of several processes each holds a part of a model that is trained as a whole (FSDP2); false: all of it."""

    @model_validator(mode="after")
    def _streamed_is_kept(self) -> TrainingConfig:
        if self.streaming == "always" and self.cache == "never":
            raise ValueError("streaming is always, which keeps activations: set cache to auto or always")
        return self


@dataclass(frozen=True)
class TrainingData:
    """Encoded records by domain; each domain is an endless reshuffled stream."""

    forget: Mapping[str, Sequence[Encoded]]
    retain: Mapping[str, Sequence[Encoded]]
    pad_id: int
    device: torch.device
    ahead: Callable[[Sequence[Sequence[Encoded]], torch.device], None] | None = None
    """Told of the batches of a step, in the order they are used, before the step begins."""

    def _batch(self, stream: str, encoded: Sequence[Encoded], size: int, turn: int, *, seed: int) -> Batch:
        indices = batch_indices(len(encoded), size, turn, seed, stream)
        return collate([encoded[i] for i in indices], self.pad_id).to(self.device)

    def at(self, step: int, batch_size: int, seed: int) -> tuple[str, Batch, Batch]:
        """Forget domain, forget batch and retain batch of a step; domains take turns."""
        forget_names, retain_names = list(self.forget), list(self.retain)
        turn, domain = divmod(step, len(forget_names))
        retain_turn, retain_domain = divmod(step, len(retain_names))
        forget, retain = forget_names[domain], retain_names[retain_domain]
        batches = (
            self._batch(f"forget/{forget}", self.forget[forget], batch_size, turn, seed=seed),
            self._batch(f"retain/{retain}", self.retain[retain], batch_size, retain_turn, seed=seed),
        )
        if self.ahead is not None:
            self.ahead([batch.records for batch in batches], self.device)
        return forget, *batches

    def records(self) -> list[Encoded]:
        """All records of both sides."""
        return [record for side in (self.forget, self.retain) for records in side.values() for record in records]

    def repeated(self, steps: int, batch_size: int) -> list[Encoded]:
        """The records of every domain that ``steps`` go through more than once."""
        result: list[Encoded] = []
        for side in (self.forget, self.retain):
            for position, records in enumerate(side.values()):
                turns = len(range(position, steps, len(side)))
                if turns * min(batch_size, len(records)) > len(records):
                    result += records
        return result

    def first_batches(self, batch_size: int) -> dict[str, list[Batch]]:
        """The forget records of each domain in corpus order, for a method's set-up."""
        return {domain: self._in_order(encoded, batch_size) for domain, encoded in self.forget.items()}

    def retain_batches(self, batch_size: int) -> list[Batch]:
        """The retain records of all domains in corpus order."""
        return [batch for encoded in self.retain.values() for batch in self._in_order(encoded, batch_size)]

    def _in_order(self, encoded: Sequence[Encoded], size: int) -> list[Batch]:
        return [collate(encoded[i : i + size], self.pad_id).to(self.device) for i in range(0, len(encoded), size)]


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
    say: Callable[[str], None] = lambda _: None


class _MicroBatches:
    """How many records go through the model at once: halved when memory does not suffice, then kept."""

    def __init__(self, config: TrainingConfig, layout: Replicas, on_halved: Callable[[int], None] | None) -> None:
        self.size = min(config.micro_batch_size or config.batch_size, config.batch_size)
        self._layout = layout
        self._on_halved = on_halved
        self._instead = "set training.interpolation to 0, " if config.interpolation else ""

    def gradients(
        self,
        loss_of: Callable[[Batch], Tensor | None],
        weight_of: Callable[[Batch], int],
        batch: Batch,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of a whole batch, whatever its cutting, summed over the ranks.

        Raises:
            UserError: memory does not suffice for a single record.
        """
        while True:
            try:
                parts = self._layout.parts(batch, self.size, weight_of)
                found = _accumulated(loss_of, parts, parameters, self._layout.gradients)
            except RuntimeError as error:  # what the CPU's allocator raises is no OutOfMemoryError
                if not is_out_of_memory(error) or self._layout.in_step:
                    raise
            else:
                return self._layout.reduced(*found)
            # Outside the handler the failed attempt is unreachable, and so is its memory.
            _free_memory()
            if self.size == 1:
                raise UserError(
                    "out of memory with a single record; lower corpus.max_length, train fewer layers or modules, "
                    f"{self._instead}or use dtype bfloat16"
                )
            self.size = (min(self.size, len(batch)) + 1) // 2
            if self._on_halved is not None:
                self._on_halved(self.size)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _accumulated(
    loss_of: Callable[[Batch], Tensor | None],
    parts: Sequence[tuple[Batch, float]],
    parameters: Sequence[Tensor],
    gradients_of: Callable[[Tensor | None, Sequence[Tensor]], list[Tensor]],
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of ``parts`` of a batch, each times its factor; one graph is alive at a time."""
    total_loss = torch.zeros((), device=parameters[0].device)
    total: list[Tensor] = []
    for part, factor in parts:
        loss = loss_of(part)
        loss = loss if loss is None or factor == 1 else loss * factor
        gradients = gradients_of(loss, parameters)
        total_loss += _detached(loss).to(total_loss)
        del loss
        if total:
            torch._foreach_add_(total, gradients)
        else:
            total = gradients
    return total_loss, total or gradients_of(None, parameters)


def train(
    method: Method,
    masters: Mapping[str, Tensor],
    data: TrainingData,
    config: TrainingConfig,
    *,
    seed: int,
    hidden_size: int,
    layout: Replicas = Replicas(),  # noqa: B008 (frozen)
    checkpoint: CheckpointPlan | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    on_halved: Callable[[int], None] | None = None,
) -> None:
    """Train ``masters`` in place.

    A checkpoint of step k is written only after the losses and gradients at that state were seen to be finite (at
    the end and on Ctrl-C, where there are none yet: the weights), so the last one on disk is always a good state. With
    ``interpolation`` the forget side is seen on the way back from that state instead.
    Micro-batches are added up objective by objective, and conflicts resolved once a step on the sums.

    Args:
        method: gives the two losses.
        masters: fp32 leaves by name, as training begins also where a checkpoint is continued.
        data: the streams.
        config: length, optimiser and gradient combination.
        seed: order of the data.
        hidden_size: width of the model, for ``lr: auto``.
        layout: how the work lies on several processes; each has its share of every batch.
        checkpoint: None keeps no state (trial runs).
        on_step: called with the record of each finished step.
        on_resume: called once with the number of steps already done.
        on_halved: called with the new micro-batch size when memory did not suffice for the old one.

    Raises:
        DivergedError: a loss or gradient is not finite; nothing was updated with it.
        InterruptedTrainingError: Ctrl-C or SIGTERM; the state is saved.
        UserError: memory does not suffice for a single record.
    """
    parameters = list(masters.values())
    origin = [parameter.detach().clone() for parameter in parameters] if config.interpolation else []
    rate = learning_rate(config.optimizer, hidden_size)
    optimizer = build_optimizer(config.optimizer, parameters, hidden_size=hidden_size, batch_size=config.batch_size)
    micro = _MicroBatches(config, layout, on_halved)
    found: Progress | None = None
    if checkpoint is not None and checkpoint.resume:
        found = load_newest(checkpoint.path, checkpoint.fingerprint, masters, optimizer, checkpoint.say)
    start = 0 if found is None else found.step
    micro.size = micro.size if found is None else found.micro_batch_size
    if on_resume is not None:
        on_resume(start)

    def save(state: Progress) -> None:
        # What was just read need not push out the one before it.
        if checkpoint is not None and layout.saves and state != found:
            keep = config.keep_checkpoints
            save_checkpoint(checkpoint.path, state, checkpoint.fingerprint, masters, optimizer, keep=keep)

    with _interrupt_between_steps() as interrupted:
        for step in range(start, config.steps):
            began = time.perf_counter()
            state = Progress(step, micro.size)  # before memory runs out: a resumed step is cut as this one was
            domain, forget, retain = data.at(step, config.batch_size, seed)
            with contextlib.ExitStack() as elsewhere:
                if config.interpolation:
                    share = drawn_share(config.interpolation, seed, step)
                    elsewhere.enter_context(on_the_way_back(parameters, origin, share))
                forget_loss, forget_gradients = micro.gradients(
                    partial(method.forget_loss, step, domain, masters=masters),
                    partial(method.weight, "forget"),
                    forget,
                    parameters,
                )
            retain_loss, retain_gradients = micro.gradients(
                partial(method.retain_loss, step, masters=masters),
                partial(method.weight, "retain"),
                retain,
                parameters,
            )
            combined, statistics = combine(
                forget_gradients, retain_gradients, config.gradients, over_shards=layout.over_shards
            )
            record = StepRecord(
                step=step,
                forget_loss=float(forget_loss),
                retain_loss=float(retain_loss),
                forget_grad_norm=statistics.forget_norm,
                retain_grad_norm=statistics.retain_norm,
                cosine=statistics.cosine,
                conflicts=statistics.conflicts,
                seconds=0.0,
                micro_batches=math.ceil(layout.share(max(len(forget), len(retain))) / micro.size),
            )
            _check_finite(record, checkpoint)
            if step % config.checkpoint_every == 0:
                save(state)
            for parameter, gradient in zip(parameters, combined, strict=True):
                parameter.grad = gradient
            del forget_gradients, retain_gradients, combined
            for group in optimizer.param_groups:
                group["lr"] = scheduled(config.optimizer, rate, step, config.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(dataclasses.replace(record, seconds=time.perf_counter() - began))
            if layout.ranks.any(interrupted()):
                _check_weights(step, masters, checkpoint)
                save(Progress(step + 1, micro.size))
                raise InterruptedTrainingError(step + 1)
    _check_weights(config.steps - 1, masters, checkpoint)
    save(Progress(config.steps, micro.size))


def _detached(loss: Tensor | None) -> Tensor:
    return torch.zeros(()) if loss is None else loss.detach()


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
