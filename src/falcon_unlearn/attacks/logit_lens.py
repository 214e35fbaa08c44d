"""The logit lens: what each layer, and each part of a layer, would say if it were the last (nostalgebraist 2020).

The residual stream after a layer, and what attention and MLP add to it there, go through the model's own final norm and
head. Where a layer in the middle still names an answer that the model no longer gives, it was hidden, not forgotten.
One forward pass a batch shows all layers; the vocabulary is walked in blocks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from falcon_unlearn.artifacts import Estimate, SampleScore
from falcon_unlearn.attacks.base import AttackConfig, Deadline, Outcome, Point, Target, mean, strongest
from falcon_unlearn.corpus.batching import Batch, Encoded, Encoder, collate, length_sorted_batches
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.evaluation.scoring import fitted
from falcon_unlearn.methods.whole_model import WholeModel
from falcon_unlearn.model.decoder import find_layers, first_tensor
from falcon_unlearn.model.loading import context_length
from falcon_unlearn.objectives.vocabulary import BLOCK_BYTES, Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = npt.NDArray[np.float64]

RESIDUAL = "residual"
BRANCHES = ("attention", "mlp")

_PROBE_TOKENS = 8


def decode(hidden: Tensor, head: Head, targets: Tensor, *, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Read hidden states out through the head, a block of the vocabulary at a time.

    Args:
        hidden: behind the final norm, ``(N, D)``.
        head: of the model.
        targets: token ids, ``(N,)``.
        block: rows of the vocabulary at a time (default: as many as
            :data:`~falcon_unlearn.objectives.vocabulary.BLOCK_BYTES` of logits hold).

    Returns:
        ``log p(target)`` in nats and the id of the most probable token (the lowest of equals), both ``(N,)``.
    """
    size = head.weight.shape[0]
    rows = block or max(BLOCK_BYTES // (4 * max(len(hidden), 1)), 64)
    log_sums, tops, ids = [], [], []
    own = torch.zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for start in range(0, size, rows):
        logits = head.rows(start, min(start + rows, size)).logits(hidden)
        log_sums.append(logits.logsumexp(1))
        top, at = logits.max(1)
        tops.append(top)
        ids.append(at + start)
        inside = (targets >= start) & (targets < start + logits.shape[1])
        column = (targets - start).clamp(0, logits.shape[1] - 1)[:, None]
        own += torch.where(inside, logits.gather(1, column)[:, 0], 0)
    winner = torch.stack(tops).argmax(0, keepdim=True)
    return own - torch.stack(log_sums).logsumexp(0), torch.stack(ids).gather(0, winner)[0]


def _tensor(output: Any) -> Tensor | None:
    lead = output[0] if isinstance(output, tuple) and output else output
    return lead if isinstance(lead, Tensor) else None


def _branches(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The attention and the MLP of a layer; empty where it is not made of one of each."""
    weighty = [(n.lower(), child) for n, child in layer.named_children() if any(p.ndim > 1 for p in child.parameters())]
    attention = [child for name, child in weighty if "attn" in name or "attention" in name]
    others = [child for name, child in weighty if not ("attn" in name or "attention" in name)]
    return (attention[0], others[0]) if len(attention) == len(others) == 1 else ()


class Lens:
    """A model read out layer by layer. The model is not modified.

    Attributes:
        components: what is read of every layer: ``attention`` and ``mlp``, as they are added to the residual stream,
            and the ``residual`` stream behind the layer; the latter alone where the parts do not add up to it.
        layers: how many there are.

    Args:
        model: any decoder from transformers, in eval mode.

    Raises:
        UserError: the head, or the way from the last layer to it, is not of a known kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._whole = WholeModel(model)
        name, self._stack = find_layers(model)
        self.layers = len(self._stack)
        found = [_branches(layer) for layer in self._stack]
        self._parts: list[tuple[nn.Module, ...]] = found if all(found) else [()] * self.layers
        self._way_out = self._find_way_out(model, model.get_submodule(name.rpartition(".")[0]))
        if all(self._parts) and not self._adds_up(model):
            self._parts = [()] * self.layers

    @property
    def components(self) -> tuple[str, ...]:
        """See the class."""
        return (*BRANCHES, RESIDUAL) if self._parts[0] else (RESIDUAL,)

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What every layer makes of the answer tokens of a batch, N of them in the order of ``x[answer_mask]``.

        A token in the first column, which nothing predicts, is left out.

        Returns:
            Log-probability of each token (nats) and the most probable token, both ``(layers, components, N)``.
        """
        counted = batch.answer_mask[:, 1:]
        with self._watching(lambda states: states[:, :-1][counted]) as seen:
            predictions = self._whole.predictions(batch, "answer", None)
        head, targets = predictions.head, predictions.targets
        decoded = [
            decode(self._out(torch.cat(parts)).to(head.weight.dtype), head, targets.repeat(len(parts)))
            for parts in seen
        ]
        shape = (self.layers, len(self.components), len(targets))
        return torch.stack([d[0] for d in decoded]).view(shape), torch.stack([d[1] for d in decoded]).view(shape)

    def _out(self, states: Tensor) -> Tensor:
        for module in self._way_out:
            states = first_tensor(module(states))
        return states

    @contextmanager
    def _watching(self, keep: Callable[[Tensor], Tensor]) -> Iterator[list[list[Tensor]]]:
        """Gives a list that a forward pass fills with the kept components of each layer."""
        seen: list[list[Tensor]] = []
        handles = []
        for layer, parts in zip(self._stack, self._parts, strict=True):
            added: dict[int, Tensor] = {}

            def follow(
                child: nn.Module,
                inputs: tuple[Any, ...],
                output: Any,
                parts: tuple[nn.Module, ...] = parts,
                added: dict[int, Tensor] = added,
            ) -> None:
                result = _tensor(output)
                for i, part in enumerate(parts):
                    # Gemma norms what attention gives before it is added; others drop out some of it.
                    behind = i in added and bool(inputs) and inputs[0] is added[i]
                    if result is not None and (child is part or behind):
                        added[i] = result

            def leave(
                _layer: nn.Module,
                _inputs: tuple[Any, ...],
                output: Any,
                parts: tuple[nn.Module, ...] = parts,
                added: dict[int, Tensor] = added,
            ) -> None:
                states = first_tensor(output)
                shown = [added[i].reshape(states.shape) for i in range(len(parts)) if i in added]
                seen.append([keep(value) for value in (*shown, states)])
                added.clear()

            if parts:
                handles += [child.register_forward_hook(follow) for child in layer.children()]
            handles.append(layer.register_forward_hook(leave))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _run_probe(self, model: PreTrainedModel) -> Tensor:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % vocabulary
        states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _find_way_out(self, model: PreTrainedModel, parent: nn.Module) -> list[nn.Module]:
        """The modules that the last layer's output goes through on its way to the head."""
        way: list[nn.Module] = []
        now: list[Tensor | None] = [None]

        def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module is self._stack[-1]:
                now[0] = _tensor(output)
            elif now[0] is not None and inputs and inputs[0] is now[0]:
                way.append(module)
                now[0] = _tensor(output)

        watched = [self._stack[-1], *(child for child in parent.children() if child is not self._stack)]
        handles = [module.register_forward_hook(follow) for module in watched]
        try:
            final = self._run_probe(model)
        finally:
            for handle in handles:
                handle.remove()
        if now[0] is None or now[0].shape != final.shape or not torch.equal(now[0], final):
            raise UserError(
                f"logit-lens: {type(model).__name__} does something unknown between its last layer and its head: "
                "not supported"
            )
        return way

    def _adds_up(self, model: PreTrainedModel) -> bool:
        """Whether attention and MLP are what each layer adds to the residual stream."""
        config = model.config.get_text_config(decoder=True)
        scale = float(getattr(config, "residual_multiplier", None) or 1)
        try:
            with self._watching(torch.Tensor.double) as seen:
                self._run_probe(model)
        except RuntimeError:  # a part that is not shaped like the stream
            return False
        if any(len(parts) != len(BRANCHES) + 1 for parts in seen):
            return False
        rounding = 4 * torch.finfo(model.dtype).eps
        for before, (attention, mlp, after) in itertools.pairwise(seen):
            missing = after - before[-1] - scale * (attention + mlp)
            # Of finite precision is the sum, which outliers of the stream can dwarf.
            allowed = 1e-3 * scale * (attention.norm() + mlp.norm()) + rounding * after.norm()
            if not missing.norm() <= allowed:
                return False
        return True


@dataclass(frozen=True, eq=False)
class Reading:
    """What every layer makes of one answer.

    Attributes:
        log_probability: of each answer token in nats, ``(layers, components, tokens)``.
        top: the most probable token in its place, the same shape.
        tokens: the answer itself, ``(tokens,)``.
    """

    log_probability: Floats
    top: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def read_all(
    lens: Lens,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    *,
    device: torch.device | str,
    deadline: Deadline | None = None,
) -> tuple[list[Reading | None], int]:
    """Read every sequence.

    Args:
        lens: of the model.
        encoded: sequences within the model's context length.
        pad_id: any token id.
        batch_size: sequences per forward pass; it does not change the readings.
        device: where batches are put.
        deadline: checked before each batch.

    Returns:
        Readings in the order of ``encoded``, None for a sequence without a countable answer token, and the number of
        forward passes.

    Raises:
        OutOfTimeError: the deadline passed.
    """
    result: list[Reading | None] = [None] * len(encoded)
    scorable = [i for i, item in enumerate(encoded) if len(item) > max(item.answer_start, 1)]
    batches = length_sorted_batches([encoded[i] for i in scorable], batch_size)
    for positions in batches:
        if deadline is not None:
            deadline.check()
        indices = [scorable[p] for p in positions]
        log_probability, top = lens.read(collate([encoded[i] for i in indices], pad_id).to(device))
        numbers, ids = log_probability.double().cpu().numpy(), top.cpu().numpy()
        end = 0
        for i in indices:
            tokens = np.array(encoded[i].ids[max(encoded[i].answer_start, 1) :])
            start, end = end, end + len(tokens)
            result[i] = Reading(numbers[..., start:end], ids[..., start:end], tokens)
    return result, len(batches)


def value_tokens(encoder: Encoder, tokens: Sequence[int], value: str | None) -> list[int]:
    """Which of an answer's tokens spell ``value``, where it first stands in the answer (case is ignored).

    A later occurrence could be copied from the first. A whole word is preferred to a part of one.

    Args:
        encoder: of the model.
        tokens: the answer.
        value: what is looked for; None, or a value that is not there, gives every token that is text.

    Returns:
        Positions in ``tokens``.
    """

    def text(count: int) -> str:
        part = encoder.tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(part)

    parts = [text(count) for count in range(len(tokens) + 1)]
    full = parts[-1]
    # A token may end inside a character, whose bytes so far show as replacement characters.
    starts = [len(part.rstrip("\ufffd")) for part in parts[:-1]]
    found = None
    if value is not None and value.strip():
        word = re.escape(value.strip())
        found = re.search(rf"(?<!\w){word}(?!\w)", full, re.IGNORECASE) or re.search(word, full, re.IGNORECASE)
    start, end = found.span() if found else (0, len(full))
    return [i for i, at in enumerate(starts) if at < end and len(parts[i + 1]) > max(start, at)]


@dataclass(frozen=True, eq=False)
class _Scores:
    """Numbers of one record, each ``(layers, components)``; NaN where there is no such number."""

    accuracy: Floats
    probability: Floats
    value_probability: Floats
    token_accuracy: Floats
    option_accuracy: Floats


def _scores(
    encoder: Encoder, record: Record, answer: Reading | None, options: Sequence[Reading | None], shape: tuple[int, int]
) -> _Scores:
    nothing = np.full(shape, math.nan)
    if answer is None:
        return _Scores(nothing, nothing, nothing, nothing, nothing)
    at = value_tokens(encoder, [int(t) for t in answer.tokens], record.value)
    right = np.where(np.isnan(answer.log_probability), math.nan, answer.top == answer.tokens)[..., at]
    among = nothing
    if options and all(option is not None for option in options):
        means = np.stack([option.log_probability.mean(-1) for option in options if option is not None])
        among = np.where(np.isnan(means).any(0), math.nan, means[0] > means[1:].max(0))
    return _Scores(
        accuracy=right.min(-1) if at else nothing,
        probability=np.exp(answer.log_probability.mean(-1)),
        value_probability=np.exp(answer.log_probability[..., at].mean(-1)) if at else nothing,
        token_accuracy=right.mean(-1) if at else nothing,
        option_accuracy=among,
    )


class LogitLensConfig(AttackConfig):
    """Read every layer, and attention and MLP of each, through the model's final norm and head."""

    name: Literal["logit-lens"] = "logit-lens"
    options: bool = True
    """Also ask each layer which of the right and the wrong answers is likelier, where records have wrong ones."""

    def run(self, target: Target) -> Outcome:
        """Find the layer and component that knows most.

        Answers are given token by token (teacher forcing). A record counts as known where every token of its value, as
        it stands in the answer, is the most probable one; where it has no value, every token of the answer. Probability
        is that of the whole answer, as without the attack; ``value_probability`` that of the value alone.

        Raises:
            OutOfTimeError: before all records were read.
            UserError: the architecture is not supported.
        """
        lens = Lens(target.model)
        records = [*target.rest, *target.known]
        readings, options, passes = self._read(lens, target, records)
        shape = (lens.layers, len(lens.components))
        scores = [
            _scores(target.encoder, record, reading, others, shape)
            for record, reading, others in zip(records, readings, options, strict=True)
        ]
        rest, known = scores[: len(target.rest)], scores[len(target.rest) :]
        places = [(layer, c) for layer in range(lens.layers) for c in range(len(lens.components))]
        tried = {place: (_point(lens, place, rest), _samples(target, readings, rest, place)) for place in places}
        best, samples = strongest(list(tried.values()))
        last = (lens.layers - 1, len(lens.components) - 1)
        numbers = {"last_layer_accuracy": self._accuracy(tried[last][1])}
        if known:
            by_known = strongest([(_point(lens, place, known), tried[place][1]) for place in places])
            numbers["accuracy_where_known_is_best"] = self._accuracy(by_known[1])
        notes = [
            "answers are teacher-forced: what stands before the value is given",
            f"the best of {len(places)} layers and components on the scored records",
            "accuracy_where_known_is_best is that of the place chosen on the attacker's own facts",
        ]
        if lens.components == (RESIDUAL,):
            notes.append(
                f"attention and MLP of {type(target.model).__name__} do not add up to what its layers do: "
                "the residual stream alone is read"
            )
        return Outcome(
            samples,
            tuple(entry[0] for entry in tried.values()),
            numbers,
            passes,
            {"layer": best.setting["layer"], "component": best.setting["component"]},
            tuple(notes),
        )

    def _read(
        self, lens: Lens, target: Target, records: Sequence[Record]
    ) -> tuple[list[Reading | None], list[list[Reading | None]], int]:
        """Answer of each record, right and wrong options of each, forward passes."""
        encoder, limit = target.encoder, context_length(target.model.config)
        groups: list[list[Encoded]] = []
        for record in records:
            texts = [record.answer]
            if self.options and record.perturbed_answers:
                texts += [record.paraphrased_answer or record.answer, *record.perturbed_answers]
            groups.append([fitted(encoder.encode(record, answer=text), record, limit) for text in texts])
        flat = [item for group in groups for item in group]
        read, passes = read_all(
            lens, flat, encoder.pad_id, target.batch_size, device=target.device, deadline=target.deadline
        )
        values = iter(read)
        readings = [[next(values) for _ in group] for group in groups]
        return [first for first, *_ in readings], [others for _, *others in readings], passes

    @staticmethod
    def _accuracy(samples: Sequence[SampleScore]) -> Estimate:
        return mean_estimate([s.accuracy for s in samples], [s.entity for s in samples])


def _point(lens: Lens, place: tuple[int, int], scores: Sequence[_Scores]) -> Point:
    def average(name: str) -> float:
        return mean([float(getattr(score, name)[place]) for score in scores])

    further = {name: average(name) for name in ("value_probability", "token_accuracy", "option_accuracy")}
    return Point(
        {"layer": place[0], "component": lens.components[place[1]]},
        average("accuracy"),
        average("probability"),
        {name: value for name, value in further.items() if name != "option_accuracy" or not math.isnan(value)},
    )


def _samples(
    target: Target, readings: Sequence[Reading | None], scores: Sequence[_Scores], place: tuple[int, int]
) -> tuple[SampleScore, ...]:
    """Of ``rest``; the generation is what the layer says in the place of each answer token."""
    result = []
    for i, (record, score) in enumerate(zip(target.rest, scores, strict=True)):
        reading = readings[i]
        said = "" if reading is None else target.encoder.tokenizer.decode(reading.top[place], skip_special_tokens=True)
        result.append(
            SampleScore(
                set="forget",
                index=i,
                prompt=record.prompt,
                answer=record.answer,
                generation=str(said).strip(),
                probability=float(score.probability[place]),
                accuracy=float(score.accuracy[place]),
                rouge=math.nan,
                entity=record.entity,
            )
        )
    return tuple(result)
