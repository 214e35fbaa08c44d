"""The suite ``privacy``: can the forget records be told from records no model ever saw, and how much comes back?"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from falcon_unlearn.artifacts import Estimate, SuiteResult
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, content_hash, load_records
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.evaluation.membership import (
    auc_estimate,
    mean_loss,
    min_k,
    min_k_plus_plus,
    privleak_estimate,
    reference_difference,
    tpr_estimate,
    zlib_ratio,
)
from falcon_unlearn.evaluation.memorization import exact_memorization, extraction_strength
from falcon_unlearn.evaluation.suite import Rows, Subject
from falcon_unlearn.evaluation.token_scores import TokenScores, token_scores
from falcon_unlearn.model.loading import ModelSource, context_length, load_causal_lm, load_tokenizer, resolve_model

FORGET, HOLDOUT = "forget", "holdout"
SIGNALS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")

# A bootstrap of fewer perfectly sorted records would be sure of what chance does often enough.
_FEWEST_RECORDS = 10

# An AUC of the oracle beyond this says more about the holdout records than about unlearning.
_LARGEST_ORACLE_OFFSET = 0.1


@dataclass(frozen=True)
class PrivacyScore:
    """Membership signals and memorisation of one record; NaN where it is too short or too long to be scored.

    Attributes:
        set: ``forget`` or ``holdout``.
        tokens: how many were scored.
        loss: mean per token, in nats. This and the other signals are the lower, the more likely the record is a member.
        zlib: loss per byte of the compressed text.
        min_k: Min-K%.
        min_k_plus_plus: Min-K%++.
        extraction_strength: share of the text, from its end, that is given back.
        exact_memorization: share of tokens that are the most probable one.
        reference: loss minus the reference model's; None without a reference model.
        reference_loss: the reference model's loss.
        entity: what the record is about.
    """

    set: str
    index: int
    text: str
    tokens: int
    loss: float
    zlib: float
    min_k: float
    min_k_plus_plus: float
    extraction_strength: float
    exact_memorization: float
    reference: float | None = None
    reference_loss: float | None = None
    entity: str | None = None


def privacy_score_from(row: Mapping[str, Any], *, reference: bool = False) -> PrivacyScore:
    """Read a row back from JSON, which writes NaN as null.

    Args:
        row: column -> value.
        reference: whether there was a reference model.
    """
    optional = {"entity"} if reference else {"entity", "reference", "reference_loss"}
    values = {f.name: row[f.name] for f in dataclasses.fields(PrivacyScore)}
    missing = {name: math.nan for name, value in values.items() if value is None and name not in optional}
    return PrivacyScore(**(values | missing))


def privacy_scores(
    encoder: Encoder,
    encoded: Sequence[Encoded],
    scores: Sequence[TokenScores],
    share: float,
    *,
    set_name: str,
    first: int = 0,
    reference_losses: Sequence[float] | None = None,
    entities: Sequence[str | None] | None = None,
) -> list[PrivacyScore]:
    """Rows from token scores.

    Args:
        encoder: decodes what was scored, for zlib.
        encoded: the sequences; what stands from ``answer_start`` on was scored.
        scores: of each sequence.
        share: k of Min-K% and Min-K%++, in (0, 1].
        set_name: copied into the rows.
        first: index of the first row.
        reference_losses: the reference model's loss of each sequence.
        entities: what each is about.
    """
    rows = []
    for i, (item, token) in enumerate(zip(encoded, scores, strict=True)):
        text = encoder.tokenizer.decode(
            item.ids[item.answer_start :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        loss = mean_loss(token.log_probability)
        reference_loss = None if reference_losses is None else reference_losses[i]
        rows.append(
            PrivacyScore(
                set=set_name,
                index=first + i,
                text=text,
                tokens=len(token.log_probability),
                loss=loss,
                zlib=zlib_ratio(loss, text),
                min_k=min_k(token.log_probability, share),
                min_k_plus_plus=min_k_plus_plus(token, share),
                extraction_strength=extraction_strength(token.correct),
                exact_memorization=exact_memorization(token.correct),
                reference=None if reference_loss is None else reference_difference(loss, reference_loss),
                reference_loss=reference_loss,
                entity=None if entities is None else entities[i],
            )
        )
    return rows


def _sequence(encoder: Encoder, record: Record, limit: int | None) -> Encoded:
    """What is scored: the answer without its end-of-sequence token, or the text up to the context length."""
    encoded = encoder.encode(record)
    if limit is not None and len(encoded) > limit:
        if record.kind != "text":
            return Encoded((), 0)
        return dataclasses.replace(encoded, ids=encoded.ids[:limit])
    ends = encoded.ids[-1:] == (encoder.eos_id,)
    return dataclasses.replace(encoded, ids=encoded.ids[:-1]) if ends else encoded


class PrivacyConfig(Section):
    """Membership inference and extraction; forget records are the members, holdout records the non-members."""

    forget: SourceConfig
    """What was to be forgotten."""
    holdout: SourceConfig
    """Records of the same kind that no model ever saw."""
    reference: str | None = None
    """A model that saw neither (folder or hub id), with the same tokenizer; for the reference attack."""
    min_k: float = Field(0.4, gt=0, le=1)
    """Share of tokens in Min-K% and Min-K%++; MUSE and OpenUnlearning use 0.4."""
    max_records: int | None = Field(400, ge=1)
    """Score at most so many records of a set, drawn with the seed; empty: all."""

    def open(self, base_dir: Path, seed: int) -> PrivacySuite:
        """Read both sets and find the reference model.

        Raises:
            UserError: as :func:`~falcon_unlearn.corpus.sources.load_records`, a record in both sets, or no such model.
        """
        sets = {
            name: load_records(source, base_dir, f"privacy.{name}")
            for name, source in ((FORGET, self.forget), (HOLDOUT, self.holdout))
        }
        known = {record.key: record for record in sets[FORGET]}
        shared = next((record for record in sets[HOLDOUT] if record.key in known), None)
        if shared is not None:
            raise UserError(
                f"privacy.holdout: {shared.origin} also stands in the forget set ({known[shared.key].origin}): "
                "holdout records must be ones that no model ever saw"
            )
        most = self.max_records
        for name, records in sets.items():
            if most is not None and len(records) > most:
                chosen = random.Random(f"privacy {name} {seed}").sample(range(len(records)), most)
                sets[name] = [records[i] for i in sorted(chosen)]
        reference = None
        if self.reference is not None:
            reference = resolve_model(self.reference, base_dir, device="cpu", key="privacy.reference")
        return PrivacySuite(sets, self.min_k, reference, seed)


class PrivacySuite:
    """Two sets of records, and perhaps a reference model."""

    def __init__(
        self, sets: Mapping[str, Sequence[Record]], share: float, reference: ModelSource | None, seed: int
    ) -> None:
        self._sets = sets
        self._share = share
        self._reference = reference
        self._seed = seed
        self._reference_losses: dict[str, Mapping[str, list[float]]] = {}
        self.parts: Mapping[str, int] = {name: len(records) for name, records in sets.items()}
        settings = json.dumps([share, None if reference is None else reference.name])
        self.content: Mapping[str, str] = {
            **{name: content_hash(records) for name, records in sets.items()},
            "settings": sha256(settings.encode()).hexdigest(),
        }

    def score(self, part: str, units: range, subject: Subject) -> list[PrivacyScore]:
        """A row a record."""
        records = [self._sets[part][i] for i in units]
        encoded = self._encode(part, subject)[units.start : units.stop]
        return privacy_scores(
            subject.encoder,
            encoded,
            _scored(subject, encoded),
            self._share,
            set_name=part,
            first=units.start,
            reference_losses=None if self._reference is None else self._losses(part, subject)[units.start : units.stop],
            entities=[record.entity for record in records],
        )

    def row(self, part: str, plain: Mapping[str, Any]) -> PrivacyScore:
        """A row read back from JSON."""
        return privacy_score_from(plain, reference=self._reference is not None)

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """AUC and true-positive rate of each signal, memorisation of both sets, and PrivLeak where there is an oracle.

        The forget set's AUC says whether its records can still be told from never-seen ones; memorisation of the
        holdout set is what a model gives back of texts that it cannot know.
        """
        forget, holdout = rows[FORGET], rows[HOLDOUT]
        clusters = _entities(forget), _entities(holdout)
        metrics: dict[str, Estimate] = {}
        signals = [name for name in SIGNALS if name != "reference" or self._reference is not None]
        for name in signals:
            sides = _signal(forget, name), _signal(holdout, name)
            metrics[f"auc_{name}"] = auc_estimate(*sides, *clusters, seed=self._seed)
        for name in signals:
            sides = _signal(forget, name), _signal(holdout, name)
            metrics[f"tpr_at_1_percent_fpr_{name}"] = tpr_estimate(*sides, *clusters, seed=self._seed)
        for part, entities in zip((FORGET, HOLDOUT), clusters, strict=True):
            for name in ("extraction_strength", "exact_memorization"):
                key = name if part == FORGET else f"{name}_{part}"
                metrics[key] = mean_estimate(_signal(rows[part], name), entities, seed=self._seed)

        scorable = min(sum(not math.isnan(row.loss) for row in side) for side in (forget, holdout))
        statements = _told_apart({name: metrics[f"auc_{name}"] for name in signals}, scorable)
        if len(holdout) < 100:
            statements.append(
                f"1 % of {len(holdout)} holdout records is less than one: the true-positive rates allow no false alarm."
            )
        if self._reference is not None:
            sides = _signal(forget, "reference_loss"), _signal(holdout, "reference_loss")
            metrics["auc_of_reference_model"] = auc_estimate(*sides, *clusters, seed=self._seed)
            statements += _same_kind(metrics["auc_of_reference_model"], "the reference model, which saw neither set,")
        if oracle is not None:
            model = _signal(forget, "min_k"), _signal(holdout, "min_k")
            retrained = _signal(oracle[FORGET], "min_k"), _signal(oracle[HOLDOUT], "min_k")
            theirs = auc_estimate(*retrained, *clusters, seed=self._seed)
            metrics["privleak"] = privleak_estimate(model, retrained, *clusters, seed=self._seed)
            statements += _same_kind(theirs, "the oracle, which saw neither set,")
            statements.append(privleak_statement(metrics["privleak"], theirs.value))
        if oracle is None and self._reference is None:
            statements.append(
                "All of this rests on holdout records of the same kind as the forget records: an AUC away from .5 can "
                "also come from another style, length or time. A reference model or an oracle would show that."
            )
        unscorable = sum(math.isnan(row.loss) for row in (*forget, *holdout))
        if unscorable:
            total = len(forget) + len(holdout)
            statements.append(f"Not scored: {unscorable} of {total} records (no answer token, or beyond the context).")
        return SuiteResult(
            "privacy",
            {name: without_nan(estimate) for name, estimate in metrics.items()},
            tuple(statements),
            {
                **settings,
                "min_k": self._share,
                "reference": None if self._reference is None else self._reference.name,
                "zlib": "mean loss per token / bytes of the compressed text",
            },
        )

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """None."""
        return {}

    def _encode(self, part: str, subject: Subject) -> list[Encoded]:
        limit = context_length(subject.model.config)
        return [_sequence(subject.encoder, record, limit) for record in self._sets[part]]

    def _losses(self, part: str, subject: Subject) -> list[float]:
        """The reference model's losses: loaded once for both sets, and let go again."""
        assert self._reference is not None
        if subject.name not in self._reference_losses:
            source = dataclasses.replace(self._reference, device=subject.device, dtype=subject.model.dtype)
            if load_tokenizer(source).get_vocab() != subject.encoder.tokenizer.get_vocab():
                raise UserError(
                    f"privacy.reference: {source.name} has another tokenizer than {subject.name}, so their losses "
                    "cannot be compared: name a model of the same family, such as the base it was finetuned from"
                )
            reference = dataclasses.replace(subject, model=load_causal_lm(source))
            limit = context_length(reference.model.config)
            self._reference_losses[subject.name] = {
                name: [mean_loss(s.log_probability) for s in _scored(reference, self._encode(name, subject), limit)]
                for name in self._sets
            }
        return self._reference_losses[subject.name][part]


def _scored(subject: Subject, encoded: Sequence[Encoded], limit: int | None = None) -> list[TokenScores]:
    """Scores of the answers; of none that is beyond ``limit``."""
    fitting = [item if limit is None or len(item) <= limit else Encoded((), 0) for item in encoded]
    return token_scores(
        subject.model, fitting, subject.encoder.pad_id, subject.batch_size, subject.device, answer_only=True
    )


def _signal(rows: Sequence[PrivacyScore], name: str) -> list[float]:
    return [getattr(row, name) for row in rows]


def _entities(rows: Sequence[PrivacyScore]) -> list[Hashable | None]:
    return [row.entity for row in rows]


def without_nan(estimate: Estimate) -> Estimate:
    """The estimate with None in place of a value that the data does not allow."""
    undefined = estimate.value is not None and math.isnan(estimate.value)
    return dataclasses.replace(estimate, value=None) if undefined else estimate


def _side(estimate: Estimate) -> int:
    """1 where the whole interval is above 0.5, -1 where it is below, else 0."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0.5) - int(estimate.high < 0.5)


def _told_apart(aucs: Mapping[str, Estimate], records: int) -> list[str]:
    """What the AUCs of so many records a side allow to say; both tails count."""
    widths = [e.high - e.low for e in aucs.values() if e.high is not None and e.low is not None]
    if records < _FEWEST_RECORDS or not widths:
        return ["Too few records, or about too few entities, to say whether the two sets can be told apart."]

    def listed(side: int) -> str:
        found = [(name, estimate) for name, estimate in aucs.items() if _side(estimate) == side]
        return ", ".join(f"{name} {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for name, e in found)

    statements = []
    if above := listed(1):
        statements.append(
            f"The forget records can still be told from never-seen ones (AUC above .5: {above}): the model treats them "
            "as texts it was trained on."
        )
    if below := listed(-1):
        statements.append(
            f"The forget records look less likely than never-seen ones (AUC below .5: {below}): over-forgetting. That "
            "is as telling as remembering, since it shows that something was removed."
        )
    if not above and not below:
        statements.append(
            "No signal tells the forget records from never-seen ones: every interval contains .5. A difference of less "
            f"than about {max(widths) / 2:.2f} in AUC would not show here, and a stronger attack may see more."
        )
    return statements


def _same_kind(estimate: Estimate, who: str) -> list[str]:
    """A warning where a model that knows neither set tells them apart."""
    if not _side(estimate):
        return []
    warning = (
        f"Careful: {who} tells the sets apart, too (AUC {estimate.value:.2f}): forget and holdout records are not of "
        "the same kind, and .5 is not what to expect of a model that forgot."
    )
    return [warning]


def privleak_statement(estimate: Estimate, auc_retrain: float | None) -> str:
    """What PrivLeak says here, and where it says little.

    Args:
        estimate: PrivLeak in percent, value None or NaN where it has none.
        auc_retrain: AUC of the retrained model, forget records as members.
    """
    if auc_retrain is None or math.isnan(auc_retrain) or estimate.value is None or math.isnan(estimate.value):
        return (
            "PrivLeak has no value: it divides by 1 - AUC of the retrained model, which is 0 or unknown here; compare "
            "the AUCs themselves."
        )
    text = "PrivLeak near 0: as a retrained model; towards -100: recognised as trained on; far above 0: over-forgotten."
    if abs(auc_retrain - 0.5) > _LARGEST_ORACLE_OFFSET:
        text += (
            f" It is scaled by 1 - AUC of the retrained model = {1 - auc_retrain:.3f}, which should be near .5: "
            "compare the AUCs themselves."
        )
    return text
