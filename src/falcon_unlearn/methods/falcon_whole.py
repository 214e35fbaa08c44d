"""FALCON on the whole model: stand-ins instead of an offset vector, and predictions beside activations.

A stand-in is the forget record about somebody the model never heard of (:mod:`falcon_unlearn.corpus.stand_ins`). With
``a`` the updated model's activation of a forget token, ``s`` the original model's of the stand-in's token at the same
place from the end of the answer, ``n`` the original model's of the forget token itself, ``p`` and ``p_s`` next-token
distributions of updated model on the record and original model on the stand-in:

    forget  = w_r < -log sigmoid((cos(a, s) - cos(a, n)) / tau) >         layers and answer tokens     representation
            + w_d < KL(p_s || p) >                                        answer tokens                distillation
            + w_h < max(0, log p(y) - log p_s(y)) >                       answer tokens                hinge
            + w_f < max(0, log p_s(y) - log p(y)) >                       answer tokens                floor
            - w_n (2 / beta) log sigmoid(-beta log(p(y) / p0(y)))         whole answers                NPO
    retain  = v < -log p > (or KL to the original model) + v_r (1 - < cos(b, b0) >)   the same layers

The contrast is FALCON's (Hu et al. 2025, eq. 8), its positive ours: an offset vector leaves the knowledge in the layers
below, where finetuning finds it. The default preset goes without it (docs/science.md). Forget terms are means over
records, so that batches can be cut.

``p_s`` is corrected for what the original model expects of anybody because it has seen the forget data: token v has its
probability multiplied by (r_v + e) / (f_v + r_v + e), f and r being how often it is in forget and retain answers; for
hinge and floor, by that of the word it is a part of, where that is rarer, but not to less than ``least_level``. A
stand-in about which the original model still gives the right answer (the name reminds it) is passed over for another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch, Encoded, collate
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import Unit, WholeConfig, WholeMethod, all_batches, nll, of_batch
from falcon_unlearn.methods.whole_model import Pass
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.loading import number_of_layers
from falcon_unlearn.objectives.likelihood import sequence_sums
from falcon_unlearn.objectives.preference import npo
from falcon_unlearn.objectives.representation import contrast, cosine_retention
from falcon_unlearn.objectives.vocabulary import kl_divergence, target_log_probabilities

_COMMON_SHARE = 0.02
"""A token that stands in so many of the retain answers is no part of what is asked for."""
_BATCH, _BATCH_TOKENS = 64, 4096


class StandInConfig(Section):
    """Knobs of FALCON with stand-ins; a weight of 0 switches a term off."""

    count: int = Field(1, ge=1)
    """Stand-ins for each record, which take turns."""
    layers: Literal["auto"] | tuple[int, ...] = Field("auto", min_length=1)
    """Where activations are compared; auto: all but the lower third."""
    representation_weight: float = Field(1.0, ge=0)
    """w_r, of the contrast between the stand-in's activations and the original ones."""
    distillation_weight: float = Field(0.0, ge=0)
    """w_d, of the divergence from what the original model predicts for the stand-in."""
    hinge_weight: float = Field(0.0, ge=0)
    """w_h, of what an answer token's log-probability has above the one it has for the stand-in; nothing below that."""
    floor_weight: float = Field(0.0, ge=0)
    """w_f, of what it lacks below that: who never knew does not rule the right answer out either."""
    least_level: float | None = Field(None, gt=0, lt=1)
    """The correction lowers the level that hinge and floor aim at to this probability at most; empty: without end."""
    prior_smoothing: float | None = Field(1e-3, gt=0)
    """e of the correction of p_s; empty: no correction."""
    whole_words: bool = True
    """The level's correction takes a token for as rare as its word is."""
    spare: int = Field(4, ge=0)
    """Further names drawn for each record, in case the first are passed over."""
    pass_over_above: float = Field(0.1, gt=0, le=1)
    """A stand-in is passed over where every rare token of the right answer has at least this probability."""
    npo_weight: float = Field(0.0, ge=0)
    """w_n, of NPO's loss on the answers."""
    npo_beta: float = Field(0.1, gt=0)
    """Inverse temperature of NPO."""
    retain: Literal["none", "nll", "kl"] = "nll"
    """Likelihood term on retain records: none, nll (ordinary training) or kl (to the original model)."""
    retain_weight: float = Field(1.0, ge=0)
    """v, of that term."""
    retain_representation_weight: float = Field(3.0, ge=0)
    """v_r, of one minus the cosine of updated and original retain activations."""

    @model_validator(mode="after")
    def _something_is_forgotten(self) -> StandInConfig:
        weights = (self.representation_weight, self.distillation_weight, self.hinge_weight, self.npo_weight)
        if not any(weights):
            raise ValueError("one of the representation, distillation, hinge and npo weights must be above 0")
        return self


@dataclass(frozen=True)
class _Pairs:
    """Answer tokens of forget records and of their stand-ins at the same place from the end, N of them.

    ``weights`` sum to one: a mean over records of means over tokens.
    """

    rows: Tensor
    columns: Tensor
    stand_in_columns: Tensor
    weights: Tensor


def aligned(batch: Batch, stand_ins: Batch) -> _Pairs:
    """Pair the answers' tokens from their ends; the first token of a sequence never takes part.

    Args:
        batch: forget records.
        stand_ins: one for each.
    """
    rows: list[int] = []
    columns: list[int] = []
    theirs: list[int] = []
    weights: list[float] = []
    for row, (record, other) in enumerate(zip(batch.records, stand_ins.records, strict=True)):
        own = len(record) - max(record.answer_start, 1)
        count = max(min(own, len(other) - max(other.answer_start, 1)), 0)
        rows += [row] * count
        columns += range(len(record) - count, len(record))
        theirs += range(len(other) - count, len(other))
        weights += [1 / (max(count, 1) * len(batch))] * count
    device = batch.input_ids.device
    own_rows, own_columns, their_columns = (
        torch.tensor(values, dtype=torch.long, device=device) for values in (rows, columns, theirs)
    )
    return _Pairs(own_rows, own_columns, their_columns, torch.tensor(weights, device=device))


def words_of(record: Encoded, begins: Sequence[bool]) -> list[tuple[int, ...]]:
    """The answer's tokens, word by word; ``begins``: of each token of the vocabulary, whether a word begins with it."""
    words: list[list[int]] = []
    for token in record.ids[record.answer_start :]:
        if not words or begins[token]:
            words.append([])
        words[-1].append(token)
    return [tuple(word) for word in words]


def passed_together(records: Sequence[Encoded]) -> list[Sequence[Encoded]]:
    """Cut ``records`` into what the set-up runs at once: few enough not to take more memory than a training step."""
    groups: list[list[Encoded]] = []
    width = 0
    for record in records:
        width = max(width, len(record))
        if not groups or len(groups[-1]) == _BATCH or (len(groups[-1]) + 1) * width > _BATCH_TOKENS:
            groups.append([])
            width = len(record)
        groups[-1].append(record)
    return list(groups)


class WholeFalcon(WholeMethod):
    """FALCON with stand-ins, set up for one model and one corpus."""

    forget_unit: ClassVar[Unit] = "records"

    def __init__(self, config: Any, setup: WholeSetup) -> None:
        self.config: StandInConfig = config.stand_in
        common = WholeConfig(
            forget_weight=config.forget_weight, retain=self.config.retain, retain_weight=self.config.retain_weight
        )
        super().__init__(common, setup)
        total = number_of_layers(setup.model.model.config)
        chosen = self.config.layers
        self.layers = tuple(range(total // 3, total)) if chosen == "auto" else chosen
        bad = [layer for layer in self.layers if not 0 <= layer < total]
        if bad:
            raise UserError(
                f"method.stand_in.layers: layer {bad[0]} is out of range, the model has layers 0..{total - 1}"
            )
        self._temperature = float(config.temperature)
        self._reference = self.reference_sums(all_batches(setup)) if self.config.npo_weight else {}
        chosen_stand_ins, self._passed_over = self._choose()
        self.setup = replace(setup, alternatives=chosen_stand_ins)
        self._shift = self._correction() if self.config.prior_smoothing is not None else None
        self._words = {} if self.config.prior_smoothing is None else self._correction_of_words()

    @property
    def keeps_reference(self) -> bool:
        """The original weights are the reference of every term but NPO's."""
        return True

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config, model = self.config, self.setup.model
        compared = self.layers if config.representation_weight else ()
        now = model.run(batch, compared, masters)
        loss = now.final.new_zeros((), dtype=torch.float32)
        level_weights = (config.hinge_weight, config.floor_weight)
        if config.representation_weight or config.distillation_weight or any(level_weights):
            stand_ins = self.setup.alternative(step, batch)
            pairs, theirs = aligned(batch, stand_ins), model.run(stand_ins, compared, None)
            if config.representation_weight:
                before = model.run(batch, compared, None)
                loss = loss + config.representation_weight * self._contrast(now, theirs, before, pairs)
            theirs = replace(theirs, head=replace(theirs.head, shift=self._shift))
            if config.distillation_weight:
                loss = loss + config.distillation_weight * _distillation(now, theirs, pairs)
            if any(level_weights):
                above, below = _off_level(now, pairs, batch, self._level(theirs, pairs, batch))
                loss = loss + config.hinge_weight * above + config.floor_weight * below
        if config.npo_weight:
            found = now.predictions(batch, self.setup.loss_mask)
            sums = sequence_sums(found.log_probabilities(), found.mask)
            values = npo(sums, of_batch(self._reference, batch), config.npo_beta)
            loss = loss + config.npo_weight * values.mean()
        return self.common.forget_weight * loss

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config = self.config
        if not config.retain_representation_weight:
            return super().retain_loss(step, batch, masters)
        counted = batch.loss_mask(self.setup.loss_mask).clone()
        counted[:, 0] = False  # as in weight()
        now, before = (self.setup.model.run(batch, self.layers, values) for values in (masters, None))
        loss = config.retain_representation_weight * cosine_retention(now.layers[:, counted], before.layers[:, counted])
        if config.retain == "none":
            return loss
        ours = now.predictions(batch, self.setup.loss_mask)
        if config.retain == "nll":
            return loss + config.retain_weight * nll(ours)
        theirs = before.predictions(batch, self.setup.loss_mask)
        divergence = kl_divergence(ours.hidden, ours.head, theirs.hidden, theirs.head)
        return loss + config.retain_weight * divergence.sum() / max(len(ours.targets), 1)

    def diagnostics(self) -> Mapping[str, Any]:
        """The layers whose activations are compared, and how many stand-ins were passed over."""
        return {"stand_in_layers": list(self.layers), "stand_ins_passed_over": self._passed_over}

    def _choose(self) -> tuple[dict[str, tuple[Encoded, ...]], int]:
        """The first ``count`` stand-ins of each record that do not remind the model of the answer, and how many did."""
        frequency = Counter(token for record in self.setup.retain for token in set(record.ids[record.answer_start :]))
        common = max(2.0, _COMMON_SHARE * len(self.setup.retain))
        drawn = self.setup.alternatives
        every = [each for options in drawn.values() for each in options]
        known = dict(zip(map(id, every), self._reminds(every, frequency, common), strict=True))
        chosen: dict[str, tuple[Encoded, ...]] = {}
        passed_over = 0
        for key, options in drawn.items():
            good = [each for each in options if not known[id(each)]]
            passed_over += sum(known[id(each)] for each in options[: self.config.count])
            chosen[key] = tuple([*good, *(each for each in options if known[id(each)])][: self.config.count])
        return chosen, passed_over

    def _reminds(self, records: Sequence[Encoded], frequency: Mapping[int, int], common: float) -> list[bool]:
        """Whether the original model gives every rare token of the answer at least the probability that is too much."""
        result: list[bool] = []
        device = self.setup.model.model.device
        for group in passed_together(records):
            batch = collate(group, self.setup.pad_id).to(device)
            found = self.setup.model.predictions(batch, "answer", None).log_probabilities()
            for row, record in enumerate(batch.records):
                asked = set(record.ids[: record.answer_start])
                rare = [
                    place
                    for place in range(max(record.answer_start, 1), len(record))
                    if frequency[record.ids[place]] < common and record.ids[place] not in asked
                ]
                least = float(found[row, rare].min()) if rare else -math.inf
                result.append(least >= math.log(self.config.pass_over_above))
        return result

    def _correction(self) -> Tensor:
        """What is added to the logits of stand-ins, ``(vocabulary,)``."""
        smoothing = self.config.prior_smoothing
        assert smoothing is not None
        device, vocabulary = self.setup.model.model.device, self.setup.model.vocabulary
        forget = [record for batch in all_batches(self.setup) for record in batch.records]
        counts = (
            torch.bincount(
                torch.tensor([t for r in records for t in r.ids[r.answer_start :]], dtype=torch.long),
                minlength=vocabulary,
            ).float()
            for records in (forget, self.setup.retain)
        )
        in_forget, in_retain = counts
        return torch.log((in_retain + smoothing) / (in_forget + in_retain + smoothing)).to(device)

    def _correction_of_words(self) -> dict[str, list[float]]:
        """What is added to the level of each token of a record beyond :meth:`_correction`, for its word's sake."""
        begins, smoothing = self.setup.begins_word, self.config.prior_smoothing
        assert smoothing is not None
        if begins is None or not self.config.whole_words:
            return {}
        forget = [record for batch in all_batches(self.setup) for record in batch.records]
        sides = []
        for records in (forget, self.setup.retain):
            tokens, words = Counter[int](), Counter[tuple[int, ...]]()
            for record in records:
                tokens.update(record.ids[record.answer_start :])
                words.update(words_of(record, begins))
            sides.append((tokens, words))
        (f_tokens, f_words), (r_tokens, r_words) = sides

        def rarity(f: int, r: int) -> float:
            return math.log((r + smoothing) / (f + r + smoothing))

        result: dict[str, list[float]] = {}
        for record in forget:
            added = [0.0] * record.answer_start
            for word in words_of(record, begins):
                whole = rarity(f_words[word], r_words[word])
                added += [min(0.0, whole - rarity(f_tokens[token], r_tokens[token])) for token in word]
            result[record_key(record)] = added
        return result

    @torch.no_grad()
    def _level(self, theirs: Pass, pairs: _Pairs, batch: Batch) -> Tensor:
        """What the answers' tokens should have: log p_s, corrected, ``(N,)``."""
        hidden, targets = (
            theirs.final[pairs.rows, pairs.stand_in_columns - 1],
            batch.input_ids[pairs.rows, pairs.columns],
        )
        level = target_log_probabilities(hidden, theirs.head, targets)
        if self._words:
            of_words = [self._words[record_key(record)] for record in batch.records]
            places = zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)
            level = level + level.new_tensor([of_words[row][column] for row, column in places])
        if self.config.least_level is None or self._shift is None:
            return level
        plain = target_log_probabilities(hidden, replace(theirs.head, shift=None), targets)
        return torch.maximum(level, plain.clamp(max=math.log(self.config.least_level)))

    def _contrast(self, now: Pass, theirs: Pass, before: Pass, pairs: _Pairs) -> Tensor:
        of_token = contrast(
            now.layers[:, pairs.rows, pairs.columns],
            theirs.layers[:, pairs.rows, pairs.stand_in_columns],
            before.layers[:, pairs.rows, pairs.columns],
            self._temperature,
        )
        return of_token.mean(0) @ pairs.weights


def _off_level(now: Pass, pairs: _Pairs, batch: Batch, level: Tensor) -> tuple[Tensor, Tensor]:
    """What answer tokens' log-probabilities have above ``level``, and below: weighted means."""
    targets = batch.input_ids[pairs.rows, pairs.columns]
    off = target_log_probabilities(now.final[pairs.rows, pairs.columns - 1], now.head, targets) - level
    weights = pairs.weights.to(off)
    return torch.relu(off) @ weights, torch.relu(-off) @ weights


def _distillation(now: Pass, theirs: Pass, pairs: _Pairs) -> Tensor:
    """Weighted mean of KL(original on the stand-in || updated on the record) where answer tokens are predicted."""
    of_token = kl_divergence(
        now.final[pairs.rows, pairs.columns - 1],
        now.head,
        theirs.final[pairs.rows, pairs.stand_in_columns - 1],
        theirs.head,
    )
    return of_token @ pairs.weights.to(of_token)
