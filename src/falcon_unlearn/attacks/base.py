"""What an attack is, the facts it may use and those it is scored on, and a battery of attacks on several models.

An attack gets a :class:`Target` and gives an :class:`Outcome`. It is run in the same way on the original model, the
unlearned one and (where there is one) the oracle, so that recovered knowledge can be read between the unlearned model
(0) and the original (1), with the oracle's own value beside it: what the oracle gives under the same attack was taught
or guessed, not recovered.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from falcon_unlearn.artifacts import Estimate, SampleScore
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Encoded, Encoder, fit_to_context
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError, is_out_of_memory
from falcon_unlearn.evaluation.intervals import Numbers, bootstrap, group, mean_estimate, weighted_means
from falcon_unlearn.evaluation.log_probabilities import answer_log_probabilities
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.model.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORIGINAL, UNLEARNED, ORACLE = "original", "unlearned", "oracle"

Status = Literal["done", "out of time", "out of memory", "not possible"]
"""An attack that is out of time may still have an outcome, from what it had finished."""


class OutOfTimeError(Exception):
    """An attack's time budget is spent."""


class Deadline:
    """A time budget that starts when it is made.

    Args:
        seconds: how long; None for as long as it takes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() >= self._end

    def check(self) -> None:
        """Called once a step by every attack.

        Raises:
            OutOfTimeError: the budget is spent.
        """
        if self.passed:
            raise OutOfTimeError


@dataclass(frozen=True)
class AttackData:
    """The records of a battery.

    Attributes:
        forget: the forget set as it was trained on, all phrasings; what an attacker could get hold of.
        scored: the forget set as it is scored (questions with ``value``, ``perturbed_answers`` and so on).
        retain: retain records to train on.
        utility: retain records that show what an attack breaks.
        neighbours: public text about neighbouring subjects, not about the forget set; may be empty.
    """

    forget: tuple[Record, ...]
    scored: tuple[Record, ...]
    retain: tuple[Record, ...]
    utility: tuple[Record, ...] = ()
    neighbours: tuple[Record, ...] = ()


@dataclass(frozen=True, eq=False)
class Target:
    """A model under attack. The attack leaves every tensor of ``model`` and ``original`` as it is.

    Attributes:
        model: in memory, on its device, in eval mode, without gradients.
        encoder: tokenizer and template.
        known: forget records in the attacker's hands, all phrasings of ``AttackConfig.known`` facts.
        rest: scored forget records, none of them about a known fact.
        retain: retain records to train on.
        utility: retain records to score.
        neighbours: public-like records to train on; may be empty.
        original: the model before unlearning, for attacks that compare with it (the same object as ``model`` where
            that is the original); None where it is not at hand.
        batch_size: sequences per forward pass.
        max_new_tokens: upper limit of generated answers.
        max_length: records to train on are cut to so many tokens, and to the context length.
        seed: everything random in an attack is a function of it.
        deadline: the attack's time budget.
        before: what :meth:`score` gives without an attack, where that is known already.
    """

    model: PreTrainedModel
    encoder: Encoder
    known: tuple[Record, ...]
    rest: tuple[Record, ...]
    retain: tuple[Record, ...] = ()
    utility: tuple[Record, ...] = ()
    neighbours: tuple[Record, ...] = ()
    original: PreTrainedModel | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    max_length: int | None = None
    seed: int = 0
    deadline: Deadline = field(default_factory=Deadline)
    before: tuple[SampleScore, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where batches are put."""
        device: torch.device = self.model.device
        return device

    def score(self, model: PreTrainedModel | None = None) -> tuple[SampleScore, ...]:
        """Accuracy, probability and ROUGE of ``rest``, in its order, as ``model`` (default: the target) is now."""
        return score_forget(
            self.model if model is None else model,
            self.encoder,
            self.rest,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )

    def unattacked(self) -> tuple[SampleScore, ...]:
        """Scores of ``rest`` without an attack."""
        return self.score() if self.before is None else self.before

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Records to train on, cut to ``max_length`` and the context length; those whose prompt fills it are left out.

        Raises:
            UserError: nothing is left.
        """
        encoded = [self.encoder.encode(record) for record in records]
        limit = min(filter(None, (context_length(self.model.config), self.max_length)), default=None)
        return encoded if limit is None else fit_to_context(encoded, records, limit, "truncate", "attacks")[0]

    def utility_probability(self, model: PreTrainedModel | None = None) -> float:
        """Mean answer probability on ``utility``; NaN where there is none."""
        encoded = self.encode(self.utility) if self.utility else []
        values = answer_log_probabilities(
            self.model if model is None else model, encoded, self.encoder.pad_id, self.batch_size, self.device
        )
        return mean([math.exp(value) for value in values])


@dataclass(frozen=True)
class Point:
    """One setting of an attack (a step of a learning rate, a layer, a template) and what it recovered on ``rest``.

    Attributes:
        setting: what was set, by name.
        accuracy: mean accuracy.
        probability: mean answer probability.
        numbers: further numbers by name (``loss``, ``utility``).
    """

    setting: Mapping[str, str | int | float]
    accuracy: float
    probability: float
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one attack did to one model.

    Attributes:
        samples: scores of ``Target.rest``, in its order, under the attack's strongest setting: the headline.
        points: all settings tried, in order (the curve).
        numbers: further headline numbers by name (``area``).
        steps: optimiser steps, candidates or forward passes of a batch, whatever costs; see ``notes``.
        artefacts: what an attacker would take home (attack strings, a chosen layer), JSON types.
        notes: what a reader must know, one line each.
        complete: False where the time budget ended it early.
    """

    samples: tuple[SampleScore, ...]
    points: tuple[Point, ...] = ()
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    steps: int = 0
    artefacts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    complete: bool = True


class AttackConfig(Section):
    """An attack and its knobs; subclasses add ``name: Literal[...]``."""

    known: int = Field(5, ge=1)
    """Forget facts in the attacker's hands, drawn by the seed; they are never scored."""

    @property
    def uses_original(self) -> bool:
        """Whether it needs the original model's weights, which an attacker seldom has: a diagnosis, no threat."""
        return False

    @abstractmethod
    def run(self, target: Target) -> Outcome:
        """Attack ``target.model``, leaving its tensors as they are.

        Raises:
            OutOfTimeError: the time budget ended before there was anything to report.
            UserError: this attack cannot be run here (an extra is missing, the architecture is not supported).
        """


@dataclass(frozen=True)
class AttackRun:
    """One attack on one model, with its samples; ``before`` are the scores of the same records without the attack."""

    attack: str
    model: str
    status: Status
    seconds: float
    before: tuple[SampleScore, ...]
    outcome: Outcome | None = None
    reason: str = ""


@dataclass(frozen=True)
class ModelUnderAttack:
    """The numbers of an :class:`AttackRun`; those after the attack are None where it has no outcome."""

    status: Status
    reason: str
    seconds: float
    steps: int
    accuracy_before: Estimate
    probability_before: Estimate
    accuracy: Estimate | None = None
    probability: Estimate | None = None
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    artefacts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttackResult:
    """One attack on all models: an entry of ``attacks.json``.

    Attributes:
        attack: its name.
        settings: its configuration, JSON types.
        known: facts in the attacker's hands.
        scored: records it was scored on.
        uses_original: see :class:`AttackConfig`.
        models: numbers by model (``original``, ``unlearned``, ``oracle``).
        recovery: ``accuracy`` and ``probability`` of the attacked unlearned model on the scale from the unlearned model
            (0) to the original (1), both without attack. No value where the original is not at hand or nothing had
            been forgotten.
        oracle: the attacked oracle on the same scale.
    """

    attack: str
    settings: Mapping[str, Any]
    known: int
    scored: int
    uses_original: bool
    models: Mapping[str, ModelUnderAttack]
    recovery: Mapping[str, Estimate]
    oracle: Mapping[str, Estimate]


def mean(values: Sequence[float]) -> float:
    """Mean without NaN; NaN if nothing is left."""
    scored = [value for value in values if not math.isnan(value)]
    return math.fsum(scored) / len(scored) if scored else math.nan


def point(
    setting: Mapping[str, str | int | float],
    samples: Sequence[SampleScore],
    numbers: Mapping[str, float] | None = None,
) -> Point:
    """The means of ``samples`` as a :class:`Point`."""
    return Point(
        setting, mean([s.accuracy for s in samples]), mean([s.probability for s in samples]), dict(numbers or {})
    )


def strongest(tried: Sequence[tuple[Point, tuple[SampleScore, ...]]]) -> tuple[Point, tuple[SampleScore, ...]]:
    """The setting with the highest accuracy, then probability, then the first.

    It is chosen on the scored records: an upper bound of what an attacker gets. The oracle's value is the maximum over
    the same settings, and shows what such a choice yields by chance.
    """
    assert tried

    def key(entry: tuple[Point, tuple[SampleScore, ...]]) -> tuple[float, float]:
        accuracy, probability = (-math.inf if math.isnan(v) else v for v in (entry[0].accuracy, entry[0].probability))
        return accuracy, probability

    return max(tried, key=key)


def score_forget(
    model: PreTrainedModel, encoder: Encoder, records: Sequence[Record], *, batch_size: int, max_new_tokens: int
) -> tuple[SampleScore, ...]:
    """Accuracy, probability and ROUGE of forget records; what attacks do not read (truth ratio) is not computed."""
    bare = [replace(r, heldout_question=None, paraphrased_answer=None, perturbed_answers=()) for r in records]
    scores = score_set(
        model, encoder, bare, "forget", batch_size=batch_size, max_new_tokens=max_new_tokens, device=model.device
    )
    return tuple(scores)


def split_facts(data: AttackData, known: int, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Draw the attacker's facts.

    A smaller ``known`` gives a part of what a larger one gives. Phrasings of one fact (same answer, and same entity
    where all such records have one) stay together.

    Returns:
        The training records of the known facts, and the scored records of all others.

    Raises:
        UserError: that leaves nothing to score.
    """
    # Entities tell facts with one answer apart, but only where every record with that answer names its own.
    shared = {record.key[1] for record in (*data.forget, *data.scored) if not record.entity}

    def fact(record: Record) -> tuple[str, str]:
        answer = record.key[1]
        return "" if answer in shared else record.entity or "", answer

    facts = list(dict.fromkeys(fact(record) for record in data.forget))
    random.Random(f"attack {seed}").shuffle(facts)
    drawn = set(facts[:known])
    rest = tuple(record for record in data.scored if fact(record) not in drawn)
    if known > len(facts) or not rest:
        raise UserError(
            f"attacks: {known} forget facts are for the attacker, and the forget set has {len(facts)} (records with "
            "the same answer count as one): lower known"
        )
    return tuple(record for record in data.forget if fact(record) in drawn), rest


@contextlib.contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model is in eval mode and its parameters need no gradients; after it, as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def run_attacks(
    attacks: Mapping[str, AttackConfig],
    model: PreTrainedModel,
    name: str,
    encoder: Encoder,
    data: AttackData,
    *,
    original: PreTrainedModel | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    max_length: int | None = None,
    seed: int = 0,
    seconds: float | None = None,
    before: Sequence[SampleScore] | None = None,
    on_attack: Callable[[str], None] | None = None,
) -> list[AttackRun]:
    """Attack one model in every way; one that fails for memory, time or an extra says so, and the rest go on.

    Args:
        attacks: configurations by the name they are reported under.
        model: in memory, on its device; it is left as it is.
        name: what it is: :data:`ORIGINAL`, :data:`UNLEARNED` or :data:`ORACLE`.
        encoder: tokenizer and template.
        data: the records.
        original: see :class:`Target`.
        batch_size: sequences per forward pass.
        max_new_tokens: upper limit of generated answers.
        max_length: see :class:`Target`.
        seed: of the split and of the attacks.
        seconds: time budget of each attack.
        before: scores of ``data.scored`` without attack, from :func:`score_forget`, where they are known.
        on_attack: called with its name before each attack.

    Raises:
        UserError: an attack wants more facts than there are.
    """
    splits = {attack: split_facts(data, config.known, seed) for attack, config in attacks.items()}
    runs = []
    with frozen(model), frozen(original) if original is not None else contextlib.nullcontext():
        if before is None:
            before = score_forget(model, encoder, data.scored, batch_size=batch_size, max_new_tokens=max_new_tokens)
        unattacked = {id(record): score for record, score in zip(data.scored, before, strict=True)}
        for attack, config in attacks.items():
            if on_attack is not None:
                on_attack(attack)
            known, rest = splits[attack]
            target = Target(
                model,
                encoder,
                known,
                rest,
                data.retain,
                data.utility,
                data.neighbours,
                original,
                batch_size,
                max_new_tokens,
                max_length,
                seed,
                Deadline(seconds),
                tuple(replace(unattacked[id(record)], index=i) for i, record in enumerate(rest)),
            )
            runs.append(_run(attack, config, target, name))
    return runs


def _run(attack: str, config: AttackConfig, target: Target, name: str) -> AttackRun:
    began = time.perf_counter()
    outcome: Outcome | None = None
    status: Status = "done"
    reason = ""
    try:
        outcome = config.run(target)
        assert len(outcome.samples) == len(target.rest)
    except OutOfTimeError:
        status, reason = "out of time", "nothing was finished within the time budget"
    except UserError as error:
        status, reason = "not possible", str(error)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        status, reason = "out of memory", "lower the batch size, or use a smaller setting of this attack"
    if outcome is not None and not outcome.complete:
        status, reason = "out of time", "the numbers are those of what was finished within the time budget"
    if status == "out of memory":  # outside the handlers a failed attempt is unreachable, and so is its memory
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return AttackRun(attack, name, status, time.perf_counter() - began, target.unattacked(), outcome, reason)


def _estimate(samples: Sequence[SampleScore], measure: str) -> Estimate:
    return mean_estimate([getattr(s, measure) for s in samples], [s.entity for s in samples])


def _numbers(run: AttackRun) -> ModelUnderAttack:
    before = _estimate(run.before, "accuracy"), _estimate(run.before, "probability")
    if run.outcome is None:
        return ModelUnderAttack(run.status, run.reason, run.seconds, 0, *before)
    return ModelUnderAttack(
        run.status,
        run.reason,
        run.seconds,
        run.outcome.steps,
        *before,
        accuracy=_estimate(run.outcome.samples, "accuracy"),
        probability=_estimate(run.outcome.samples, "probability"),
        numbers=run.outcome.numbers,
        points=run.outcome.points,
        artefacts=run.outcome.artefacts,
        notes=run.outcome.notes,
    )


def recovery(
    attacked: Sequence[SampleScore],
    unlearned: Sequence[SampleScore],
    original: Sequence[SampleScore],
    measure: str,
) -> Estimate:
    """(attacked - unlearned) / (original - unlearned), of means over the same records: 0 as unlearned, 1 as original.

    Args:
        attacked: scores under the attack, of the unlearned model or of the oracle.
        unlearned: scores of the unlearned model without attack.
        original: scores of the original model without attack.
        measure: ``accuracy`` or ``probability``.

    Returns:
        The ratio with its interval over entities; no value where the original knows no more than the unlearned model.
    """
    columns = np.array(
        [[getattr(s, measure) for s in samples] for samples in (attacked, unlearned, original)], dtype=np.float64
    ).T
    columns[np.isnan(columns).any(axis=1)] = math.nan
    only = group(columns, [s.entity for s in unlearned])

    def ratio(counts: Sequence[Any]) -> Numbers:
        means = weighted_means(only.values, counts[0])
        gap = means[:, 2] - means[:, 1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(gap > 0, (means[:, 0] - means[:, 1]) / gap, math.nan)

    result = bootstrap([only], ratio)
    return result if result.value is not None and not math.isnan(result.value) else replace(result, value=None)


def summarise(attacks: Mapping[str, AttackConfig], runs: Sequence[AttackRun]) -> list[AttackResult]:
    """Put the runs of each attack on all models side by side.

    Args:
        attacks: as they were run.
        runs: of :func:`run_attacks`, of all models, with the same data and seed.
    """
    results = []
    for attack, config in attacks.items():
        mine = {run.model: run for run in runs if run.attack == attack}
        if not mine:
            continue
        scales: dict[str, dict[str, Estimate]] = {UNLEARNED: {}, ORACLE: {}}
        for name, scale in scales.items():
            run = mine.get(name)
            if run is None or run.outcome is None or not {ORIGINAL, UNLEARNED} <= set(mine):
                continue
            for measure in ("accuracy", "probability"):
                scale[measure] = recovery(run.outcome.samples, mine[UNLEARNED].before, mine[ORIGINAL].before, measure)
        results.append(
            AttackResult(
                attack,
                config.model_dump(mode="json"),
                config.known,
                max(len(run.before) for run in mine.values()),
                config.uses_original,
                {name: _numbers(run) for name, run in mine.items()},
                scales[UNLEARNED],
                scales[ORACLE],
            )
        )
    return results


def worst(results: Sequence[AttackResult]) -> tuple[str, Estimate] | None:
    """The attack that recovered the most accuracy, and how much; None where no attack has a recovery.

    Attacks that need the original weights do not count.
    """
    found = [
        (result.attack, result.recovery["accuracy"])
        for result in results
        if not result.uses_original and "accuracy" in result.recovery and result.recovery["accuracy"].value is not None
    ]
    return max(found, key=lambda entry: entry[1].value or 0.0) if found else None
