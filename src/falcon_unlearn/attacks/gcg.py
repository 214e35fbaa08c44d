"""Greedy coordinate gradient: one trigger for many questions (Zou et al. 2023, arXiv 2307.15043, algorithms 1 and 2).

A step takes the gradient of the mean loss with respect to the one-hot trigger tokens, draws candidates that differ in
one token out of the ``topk`` with the most negative gradient, and keeps the best. ``enhanced`` follows Lucki et al.
(2024, arXiv 2409.18025) and the FLRT code they build on (Thompson & Sklar 2024, arXiv 2407.17447): questions that are
answered right with probability .6 do not count any more, the trigger's own likelihood is part of the loss,
multiple-choice questions count by the distribution over their letters, the search starts from known triggers and goes
on from the best one found. Left out: their insertions and deletions (a trigger keeps its length), and their loss on
hidden states against the original model, which their attack on RMU leans on.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.attacks.base import (
    AttackConfig,
    Deadline,
    Outcome,
    OutOfTimeError,
    Point,
    Target,
    frozen,
    point,
    score_forget,
    strongest,
)
from falcon_unlearn.attacks.gcg_prompts import Prompt, TriggerSlot, apply_trigger, placement_template
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError, is_out_of_memory
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.model.loading import context_length

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

Trigger = tuple[int, ...]
Stopped = Literal["steps", "match", "loss", "time", "no candidates"]

_LOGIT_BYTES = 1 << 29
_PASS_TOKENS = 1 << 15
_VOCABULARY_ROWS = 1 << 14
_DRAWS = 4
# Largest difference of a loss with and without cache before the cache is not used.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1


@dataclass(frozen=True)
class Loss:
    """What counts in the search.

    Attributes:
        solved_at: a prompt whose target has this probability (geometric mean per token) adds no more to the loss; 1
            counts every prompt to the end.
        fluency_weight: of the mean negative log-likelihood of the trigger's tokens but the first, under the model.
    """

    solved_at: float = 1.0
    fluency_weight: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` triggers, on the CPU.

    Attributes:
        loss: what is minimised, fp64 ``(n,)``.
        nll: mean over prompts of the mean negative log-likelihood per target token (nats), fp64 ``(n,)``.
        matched: whether every prompt's target is the model's greedy answer, bool ``(n,)``.
    """

    loss: Tensor
    nll: Tensor
    matched: Tensor


class TriggerScorer:
    """Loss of triggers on all prompts, and its gradient.

    Rows of a forward pass are candidates on one prompt, hence of one length: there is no padding and no mask. What
    stands before the trigger is run once for all steps; where several prompts begin with the same tokens, the trigger
    is run once for all of them. Logits are made for target tokens only.

    Args:
        model: on its device, in eval mode.
        prompts: at least one.
        start: token ids on which the cache is tried out, against passes without one.
        loss: what counts.
        deadline: looked at before every forward pass over candidates.
        use_cache: False runs every token every time.

    Attributes:
        cached: whether keys and values are kept.
        rows: candidates in a forward pass; halved when memory runs out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        start: Trigger,
        *,
        loss: Loss | None = None,
        deadline: Deadline | None = None,
        use_cache: bool = True,
    ) -> None:
        assert prompts
        assert all(prompt.target for prompt in prompts)
        self.model = model
        self.prompts = tuple(prompts)
        self.rows = 1 << 16
        self._loss = loss or Loss()
        self._deadline = deadline or Deadline()
        self._embed = model.get_input_embeddings()
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._groups: dict[tuple[int, ...], list[Prompt]] = {}
        for prompt in self.prompts:
            self._groups.setdefault(prompt.before, []).append(prompt)
        self.cached = False
        if use_cache:
            self._caches = {before: self._cache(before) for before in self._groups}
            self.cached = all(cache is not None or not before for before, cache in self._caches.items())
        if self.cached:
            with_cache = self.score([start]).loss
            self.cached = False
            difference = float((with_cache - self.score([start]).loss).abs())
            self.cached = difference <= _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)
            if not self.cached:
                self._caches.clear()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._embed.weight.shape[0])

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """``(1, length, hidden)``."""
        embedded: Tensor = self._embed(torch.tensor([list(ids)], device=self.model.device, dtype=torch.long))
        return embedded

    def _cache(self, before: tuple[int, ...]) -> DynamicCache | None:
        if not before:
            return None
        with torch.no_grad():
            output = self.model(inputs_embeds=self._embedded(before), use_cache=True, **self._keep(1))
        cache = getattr(output, "past_key_values", None)
        return cache if _is_plain(cache) else None

    def _keep(self, positions: int) -> dict[str, int]:
        return {"logits_to_keep": positions} if self._keeps_logits else {}

    def _logits(
        self, embeds: Tensor, past: DynamicCache | None, keep: int, *, grow: bool = False
    ) -> tuple[Tensor, DynamicCache | None]:
        """Logits of the last ``keep`` positions, and keys and values if ``grow``."""
        output = self.model(
            inputs_embeds=embeds, past_key_values=past, use_cache=past is not None or grow, **self._keep(keep)
        )
        return output.logits[:, -keep:], output.past_key_values if grow else None

    def _values(
        self, prompts: Sequence[Prompt], embeds: Tensor, trigger: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over ``prompts``, which begin alike.

        Args:
            prompts: one group.
            embeds: ``(n, length, hidden)`` of the trigger's tokens.
            trigger: ``(n, length)``.

        Returns:
            Clamped loss, loss without clamp, fluency, and prompts matched, each ``(n,)``.
        """
        n, length = trigger.shape
        before = prompts[0].before
        fluent = self._loss.fluency_weight > 0 and length > 1
        past = None
        lead = embeds
        if self.cached:
            past = _expanded(self._caches[before], n) if before else None
        elif before:
            lead = torch.cat([self._embedded(before).expand(n, -1, -1), embeds], 1)
        # The trigger on its own, where that saves running it again for each prompt.
        shared = self.cached and len(prompts) > 1 and all(prompt.after for prompt in prompts)
        trigger_logits = None
        if shared:
            trigger_logits, past = self._logits(lead, past, length if fluent else 1, grow=True)
        sums = [torch.zeros(n, device=embeds.device, dtype=torch.float32) for _ in range(4)]
        for prompt in prompts:
            tail = (*prompt.after, *prompt.target[:-1])
            parts = [] if shared else [lead]
            if tail:
                parts.append(self._embedded(tail).expand(n, -1, -1))
            keep = len(tail) + length if fluent and not shared else len(prompt.target)
            rest = past
            if past is not None:
                rest = _expanded(past, n)
            logits, _ = self._logits(torch.cat(parts, 1), rest, keep)
            if fluent and not shared:
                trigger_logits = logits[:, :length]
            nll, matched = _target_loss(logits[:, -len(prompt.target) :], prompt)
            sums[0] = sums[0] + nll.clamp(min=-math.log(self._loss.solved_at))
            sums[1] = sums[1] + nll
            if fluent:
                assert trigger_logits is not None
                sums[2] = sums[2] + F.cross_entropy(
                    trigger_logits[:, :-1].float().flatten(0, 1), trigger[:, 1:].flatten(), reduction="none"
                ).view(n, -1).mean(1)
            sums[3] = sums[3] + matched
        return sums[0], sums[1], sums[2], sums[3]

    def _most_rows(self, length: int) -> int:
        """Candidates a pass whose logits stay below half a gibibyte, and whose keys and values within bounds."""
        logits = max(len(prompt.target) + (length if self._loss.fluency_weight else 0) for prompt in self.prompts)
        tokens = max(len(prompt.before) + length + len(prompt.after) + len(prompt.target) for prompt in self.prompts)
        return max(min(_LOGIT_BYTES // (4 * logits * self.vocabulary), _PASS_TOKENS // tokens), 1)

    def score(self, triggers: Sequence[Trigger]) -> Scores:
        """Scores of ``triggers``, all of one length.

        Raises:
            OutOfTimeError: the deadline has passed.
        """
        n = len(triggers)
        ids = torch.tensor(triggers, dtype=torch.long)
        totals = torch.zeros(4, n, dtype=torch.float64)
        self.rows = min(self.rows, self._most_rows(ids.shape[1]))
        with torch.no_grad():
            for group in self._groups.values():
                start = 0
                while start < n:
                    self._deadline.check()
                    part = ids[start : start + self.rows].to(self.model.device)
                    values = self._tried(group, part)
                    if values is None:
                        self.rows = (min(self.rows, len(part)) + 1) // 2
                        continue
                    totals[:, start : start + len(part)] += values
                    start += len(part)
        count = len(self.prompts)
        loss = (totals[0] + self._loss.fluency_weight * totals[2]) / count
        return Scores(loss, totals[1] / count, totals[3] == count)

    def _tried(self, group: Sequence[Prompt], part: Tensor) -> Tensor | None:
        """Values ``(4, n)`` on the CPU; None where memory does not suffice for more than one row."""
        try:
            return torch.stack(self._values(group, self._embed(part), part)).double().cpu()
        except RuntimeError as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler the failed attempt is unreachable, and so is its memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def gradient(self, trigger: Trigger) -> Tensor:
        """Gradient of the loss with respect to the one-hot trigger, ``(length, vocabulary)`` fp32.

        The embedding is linear in the one-hot vector: it is the gradient with respect to the embedded tokens times the
        transposed embedding.
        """
        ids = torch.tensor([trigger], device=self.model.device, dtype=torch.long)
        embeds = self._embed(ids).detach()
        total = torch.zeros_like(embeds, dtype=torch.float32)
        for prompt in self.prompts:
            self._deadline.check()
            with torch.enable_grad():
                leaf = embeds.clone().requires_grad_()
                clamped, _, fluency, _ = self._values([prompt], leaf, ids)
                loss = (clamped + self._loss.fluency_weight * fluency).sum()
            total += torch.autograd.grad(loss, leaf)[0].float()
        total /= len(self.prompts)
        parts = []
        with torch.no_grad():
            for first in range(0, self.vocabulary, _VOCABULARY_ROWS):
                rows = torch.arange(first, min(first + _VOCABULARY_ROWS, self.vocabulary), device=ids.device)
                parts.append(total[0] @ self._embed(rows).float().T)
        return torch.cat(parts, 1)


def _target_loss(logits: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Mean loss per target token ``(n,)`` and whether each is the most likely one, from ``(n, target, vocabulary)``.

    Of a multiple-choice question only the letters count, against each other.
    """
    if prompt.choices:
        letters = logits[:, -1, list(prompt.choices)].float()
        return F.cross_entropy(letters, torch.zeros_like(letters[:, 0], dtype=torch.long), reduction="none"), (
            letters.argmax(-1) == 0
        )
    n = len(logits)
    target = torch.tensor(prompt.target, device=logits.device)
    nll = F.cross_entropy(logits.float().flatten(0, 1), target.repeat(n), reduction="none").view(n, -1).mean(1)
    return nll, (logits.argmax(-1) == target).all(-1)


def _is_plain(cache: Any) -> bool:
    """Whether the cache is of a kind that :func:`_expanded` understands."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.keys is not None for layer in cache.layers
    )


def _expanded(cache: DynamicCache, rows: int) -> DynamicCache:
    """The cache for ``rows`` sequences, without copying: a layer replaces its tensors when it grows."""
    result = copy.copy(cache)
    result.layers = []
    for layer in cache.layers:
        wider = copy.copy(layer)
        assert layer.keys is not None
        assert layer.values is not None
        wider.keys = layer.keys.expand(rows, -1, -1, -1)
        wider.values = layer.values.expand(rows, -1, -1, -1)
        result.layers.append(wider)
    return result


@dataclass(frozen=True)
class SearchSettings:
    """Knobs of the search.

    Attributes:
        steps: at most so many.
        candidates: triggers scored a step.
        topk: a new token is one of so many, by the gradient.
        replace: tokens a candidate differs in.
        from_best: go on from the best trigger so far; False: from the step's best candidate, as Zou et al. do.
        early_stop: stop when every prompt's target is the model's greedy answer.
        stop_loss: stop at this loss.
    """

    steps: int = 100
    candidates: int = 256
    topk: int = 128
    replace: int = 1
    from_best: bool = False
    early_stop: bool = True
    stop_loss: float = 0.0


@dataclass(frozen=True)
class SearchStep:
    """A step of the search; step 0 is the start.

    Attributes:
        loss: of the best trigger so far.
        probability: of the targets under it: geometric mean over prompts and their tokens.
        step_loss: of the trigger the search goes on from, or would without ``from_best``.
        scored: candidates scored.
    """

    step: int
    loss: float
    probability: float
    step_loss: float
    scored: int
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        trigger: the best one.
        loss: its loss.
        probability: of the targets under it (see :class:`SearchStep`).
        matched: whether every prompt's target is the greedy answer under it.
        stopped: why the search ended.
        trace: how it went.
    """

    trigger: Trigger
    loss: float
    probability: float
    matched: bool
    stopped: Stopped
    trace: tuple[SearchStep, ...]


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, *, ascii_only: bool = True) -> Tensor:
    """Boolean ``(vocabulary,)``: tokens a trigger may be made of: none that are special or unknown to the tokenizer.

    Args:
        tokenizer: whose tokens.
        vocabulary: rows of the embedding, which may be more than there are tokens.
        ascii_only: only tokens that are printable ASCII text, alone.
    """
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    for token in range(min(vocabulary, len(tokenizer))):
        if token in special:
            continue
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        allowed[token] = bool(text) and (not ascii_only or (text.isascii() and text.isprintable()))
    return allowed


def propose(
    trigger: Trigger,
    gradient: Tensor,
    allowed: Tensor,
    settings: SearchSettings,
    *,
    generator: torch.Generator,
    keep: Callable[[Trigger], bool],
) -> list[Trigger]:
    """Draw candidates, none twice and none the trigger itself.

    Args:
        trigger: the current one.
        gradient: ``(length, vocabulary)``, any device; the drawing itself is on the CPU.
        allowed: ``(vocabulary,)``.
        settings: how many, and from how many tokens.
        generator: on the CPU.
        keep: the retokenisation filter.

    Returns:
        At most ``settings.candidates``: fewer where the filter takes out most of several draws.
    """
    blocked = (~allowed).to(gradient.device).expand_as(gradient).clone()
    blocked[torch.arange(len(trigger), device=gradient.device), torch.tensor(trigger, device=gradient.device)] = True
    width = min(settings.topk, int((~blocked).sum(1).min()))
    if width == 0:
        return []
    top = gradient.masked_fill(blocked, math.inf).topk(width, largest=False).indices.cpu()
    replace = min(settings.replace, len(trigger))
    seen = {trigger}
    candidates: list[Trigger] = []
    for _ in range(_DRAWS):
        missing = settings.candidates - len(candidates)
        if missing == 0:
            break
        positions = torch.rand(missing, len(trigger), generator=generator).argsort(1)[:, :replace]
        ranks = torch.randint(width, positions.shape, generator=generator)
        tokens = top[positions, ranks]
        drawn = torch.tensor(trigger).repeat(missing, 1).scatter_(1, positions, tokens)
        for row in drawn.tolist():
            candidate = tuple(row)
            if candidate not in seen:
                seen.add(candidate)
                if keep(candidate):
                    candidates.append(candidate)
    return candidates


def search(
    scorer: TriggerScorer,
    starts: Sequence[Trigger],
    settings: SearchSettings,
    *,
    allowed: Tensor,
    seed: int,
    keep: Callable[[Trigger], bool] = lambda trigger: True,
    keep_everywhere: Callable[[Trigger], bool] = lambda trigger: True,
    deadline: Deadline | None = None,
) -> SearchResult:
    """Search for a trigger; equal arguments give an equal result on one device.

    Args:
        scorer: model, prompts and loss.
        starts: at least one, of any lengths; the search begins at the best.
        settings: knobs.
        allowed: ``(vocabulary,)`` tokens that may enter.
        seed: of the candidates.
        keep: candidates for which it is false are not scored.
        keep_everywhere: the trigger of a step must also pass this, dearer, test.
        deadline: looked at once a step, beside the scorer's own.
    """
    deadline = deadline or Deadline()
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    scored = [(start, scorer.score([start])) for start in starts]
    current, scores = min(scored, key=lambda entry: _finite(float(entry[1].loss)))
    best = current
    loss, nll, matched = _finite(float(scores.loss)), float(scores.nll), bool(scores.matched)
    trace = [SearchStep(0, loss, _probability(nll), loss, len(starts), time.perf_counter() - began)]
    stopped: Stopped = "steps"
    for step in range(1, settings.steps + 1):
        if (settings.early_stop and matched) or loss <= settings.stop_loss:
            stopped = "match" if settings.early_stop and matched else "loss"
            break
        began = time.perf_counter()
        try:
            deadline.check()
            candidates = propose(current, scorer.gradient(current), allowed, settings, generator=generator, keep=keep)
            scores = scorer.score(candidates) if candidates else scores
        except OutOfTimeError:
            stopped = "time"
            break
        order = scores.loss.nan_to_num(nan=math.inf).argsort(stable=True).tolist() if candidates else []
        chosen = next((i for i in order if keep_everywhere(candidates[i])), None)
        if chosen is None:
            stopped = "no candidates"
            break
        step_loss = _finite(float(scores.loss[chosen]))
        if step_loss < loss:
            best, loss = candidates[chosen], step_loss
            nll, matched = float(scores.nll[chosen]), bool(scores.matched[chosen])
        current = best if settings.from_best else candidates[chosen]
        seconds = time.perf_counter() - began
        trace.append(SearchStep(step, loss, _probability(nll), step_loss, len(candidates), seconds))
    else:
        if settings.early_stop and matched:
            stopped = "match"
    return SearchResult(best, loss, _probability(nll), matched, stopped, tuple(trace))


def _finite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _probability(nll: float) -> float:
    return math.exp(-nll)


NEUTRAL_STARTS = (
    "x x x x x x x x x x x x x x x x x x x x",
    "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !",
    "Here is a question from a textbook, with the answer that the book itself gives for it.",
    "The next question was answered right by everybody who had read the text before.",
)
"""Harmless triggers to begin with; sentences disturb a small model less than repeated letters."""


class GcgConfig(AttackConfig):
    """A universal trigger, optimised on the known facts and scored on all others.

    A trigger also disturbs: a model that knows everything may answer less with it than without.
    """

    name: Literal["gcg"] = "gcg"
    variant: Literal["plain", "enhanced"] = "plain"
    """plain: Zou et al. 2023; enhanced: after Lucki et al. 2024. It fills in what is left open below."""
    placement: str = "prefix"
    """prefix, suffix, or a text with {question} and {trigger}."""
    starts: tuple[str, ...] = ()
    """Triggers to begin with, the best of them; a trigger keeps its number of tokens. None: neutral ones."""
    length: int = Field(20, ge=1)
    """The neutral starts are cut to at most so many tokens."""
    prompts: int = Field(6, ge=1)
    """At most so many of the known questions are optimised on."""
    target_tokens: int = Field(32, ge=1)
    """An answer's tokens beyond these do not count in the search."""
    steps: int = Field(100, ge=1)
    """At most so many steps."""
    candidates: int = Field(128, ge=1)
    """Triggers scored a step (Zou et al.: 512)."""
    topk: int = Field(128, ge=1)
    """A new token is one of so many with the most negative gradient (Zou et al.: 256)."""
    replace: int = Field(1, ge=1)
    """Tokens a candidate differs in."""
    solved_at: float | None = Field(None, gt=0, le=1)
    """A question answered right with this probability does not count any more (plain: 1, enhanced: .6)."""
    fluency_weight: float | None = Field(None, ge=0)
    """Weight of the trigger's own negative log-likelihood per token (plain: 0, enhanced: .1)."""
    from_best: bool | None = None
    """Go on from the best trigger so far, not from the step's best (plain: false, enhanced: true)."""
    early_stop: bool = True
    """Stop when every known question is answered right."""
    stop_loss: float = Field(0.0, ge=0)
    """Stop at this loss."""
    ascii_only: bool = True
    """Only printable ASCII in the trigger."""

    @field_validator("placement")
    @classmethod
    def _placement(cls, placement: str) -> str:
        placement_template(placement)
        return placement

    def loss(self) -> Loss:
        """What counts, the variant's values where nothing else is said."""
        enhanced = self.variant == "enhanced"
        return Loss(
            (0.6 if enhanced else 1.0) if self.solved_at is None else self.solved_at,
            (0.1 if enhanced else 0.0) if self.fluency_weight is None else self.fluency_weight,
        )

    def settings(self) -> SearchSettings:
        """The knobs of the search."""
        return SearchSettings(
            self.steps,
            self.candidates,
            self.topk,
            self.replace,
            self.variant == "enhanced" if self.from_best is None else self.from_best,
            self.early_stop,
            self.stop_loss,
        )

    def find(self, target: Target) -> tuple[TriggerSlot, TriggerScorer, SearchResult]:
        """Search on the known questions only.

        Raises:
            OutOfTimeError: the budget ended before the start was scored.
            UserError: no start has the same tokens in every question, or the records are plain text.
        """
        records = [record for record in target.known if record.kind != "text"]
        if not records:
            raise UserError("gcg: plain texts have no question to put a trigger to; use question records")
        texts = self.starts or [_cut_to(text, self.length, target.encoder.tokenizer) for text in NEUTRAL_STARTS]
        limit = context_length(target.model.config) or math.inf
        records = [
            record
            for record in records
            if max(len(target.encoder.encode(apply_trigger([record], t, self.placement)[0])) for t in texts) <= limit
        ]
        if not records:
            raise UserError(f"gcg: every known question is longer than {limit} tokens with a trigger; shorten starts")
        random.Random(f"gcg {target.seed}").shuffle(records)
        slot = TriggerSlot(target.encoder, records[: self.prompts], self.placement, texts[0], self.target_tokens)
        starts = [ids for ids in map(slot.ids, texts) if ids is not None]
        if not starts:
            raise UserError("gcg: no start has the same tokens in every question; give others in starts")
        scorer = TriggerScorer(target.model, slot.prompts, starts[0], loss=self.loss(), deadline=target.deadline)
        result = search(
            scorer,
            starts,
            self.settings(),
            allowed=allowed_tokens(target.encoder.tokenizer, scorer.vocabulary, ascii_only=self.ascii_only),
            seed=target.seed,
            keep=slot.keeps,
            keep_everywhere=slot.keeps_everywhere,
            deadline=target.deadline,
        )
        return slot, scorer, result

    def run(self, target: Target) -> Outcome:
        """Find a trigger on the known facts, ask the others with it."""
        with frozen(target.model):
            slot, scorer, result = self.find(target)
        text = slot.text(result.trigger)
        assert text is not None, "a trigger that has no text does not pass the filter"
        samples = score_with_trigger(target, target.rest, text, self.placement)
        # Which questions were optimised on is the attacker's choice: what he had is reported beside, never mixed in.
        known = score_with_trigger(target, target.known, text, self.placement)
        tried = sum(step.scored for step in result.trace)
        notes = [
            f"{len(slot.prompts)} known questions optimised on, {tried} triggers tried; stopped for: {result.stopped}",
            "keys and values before the trigger kept" if scorer.cached else "without cache: slower, same numbers",
        ]
        return Outcome(
            samples=samples,
            points=(point({"trigger": text}, samples, {"loss": result.loss, "known_probability": result.probability}),),
            numbers={
                "known_accuracy": mean_estimate([s.accuracy for s in known], [s.entity for s in known]),
                "known_probability": mean_estimate([s.probability for s in known], [s.entity for s in known]),
            },
            steps=len(result.trace) - 1,
            artefacts={
                "trigger": text,
                "trigger_ids": list(result.trigger),
                "placement": self.placement,
                "trace": [[step.step, step.loss, step.probability, step.scored] for step in result.trace],
            },
            notes=tuple(notes),
            complete=result.stopped != "time",
        )


def score_with_trigger(
    target: Target, records: Sequence[Record], trigger: str, placement: str
) -> tuple[SampleScore, ...]:
    """Scores of ``records`` asked with a trigger, in their order."""
    return score_forget(
        target.model,
        target.encoder,
        apply_trigger(records, trigger, placement),
        batch_size=target.batch_size,
        max_new_tokens=target.max_new_tokens,
    )


def _cut_to(text: str, length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first words of ``text``, at least one, as many as make at most ``length`` tokens."""
    words = text.split()
    counts = [len(tokenizer(" ".join(words[:n]), add_special_tokens=False)["input_ids"]) for n in range(len(words) + 1)]
    return " ".join(words[: max(sum(count <= length for count in counts) - 1, 1)])


class TransferConfig(AttackConfig):
    """Triggers found elsewhere, tried on this model."""

    name: Literal["transfer"] = "transfer"
    triggers: tuple[str, ...] = Field(min_length=1)
    """Trigger texts, from the artefacts of gcg on another model."""
    placement: str = "prefix"
    """As they were found with."""

    @field_validator("placement")
    @classmethod
    def _placement(cls, placement: str) -> str:
        placement_template(placement)
        return placement

    def run(self, target: Target) -> Outcome:
        """Ask with every trigger; the strongest is the headline."""
        tried: list[tuple[Point, tuple[SampleScore, ...]]] = []
        for trigger in self.triggers:
            if tried and target.deadline.passed:
                break
            samples = score_with_trigger(target, target.rest, trigger, self.placement)
            tried.append((point({"trigger": trigger}, samples), samples))
        best, samples = strongest(tried)
        return Outcome(
            samples=samples,
            points=tuple(entry for entry, _ in tried),
            steps=len(tried),
            artefacts={"trigger": best.setting["trigger"], "placement": self.placement},
            complete=len(tried) == len(self.triggers),
        )
