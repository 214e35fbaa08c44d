"""Suite ``own``: does a model still know the user's documents? Judged against records it never saw, not an oracle.

Probes are made of the documents (:mod:`falcon_unlearn.corpus.probes`), in the same way of what was to be forgotten and
of a matched holdout. If nothing is left, the two sets of log-probabilities come from one distribution: membership
inference turned into a test, with the holdout in the place of the retrained model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.stats import beta, norm

from falcon_unlearn.artifacts import Estimate, SampleScore, SuiteResult, sample_score_from
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.probes import (
    Probe,
    ProbesConfig,
    build_probes,
    document,
    document_frequency,
    folded,
    sentences,
)
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, content_hash, load_records
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Numbers,
    bootstrap,
    difference_estimate,
    group,
    mean_estimate,
)
from falcon_unlearn.evaluation.membership import Counts, weighted_auc
from falcon_unlearn.evaluation.metrics import log10_ks_p_value
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.evaluation.suite import Rows, Subject

SUITE = "own"
FORGET, HOLDOUT, RETAIN = "forget", "holdout", "retain"

_SIGNIFICANT = 1 - CONFIDENCE
_POWER = 0.8
_FEW_CLUSTERS = 10
_LENGTH_RATIO = 1.5
_SHARED_SENTENCE_CHARACTERS = 30


_Statistic = Callable[[Numbers, Numbers, Counts, Counts], Numbers]


class OwnConfig(Section):
    """The user's own records, and how they are probed."""

    forget: SourceConfig
    """The records whose deletion was asked for."""
    holdout: SourceConfig | None = None
    """Matched records the model never saw, about others. Without them nothing tells memory from guessing."""
    retain: SourceConfig | None = None
    """Records that must survive; their probes are reported beside the others."""
    probes: ProbesConfig = ProbesConfig()
    """What is made of the records."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest greedy answer."""
    equivalence_margin: float = Field(0.1, gt=0, lt=0.5)
    """How far from 0.5 the AUC may lie for forget and holdout to count as the same."""

    def open(self, base_dir: Path, seed: int) -> OwnSuite:
        """Read the records and make the probes.

        Raises:
            UserError: as :func:`load_records`; a record in two of the sets; fewer than two probes of a set.
        """
        named = {FORGET: self.forget, HOLDOUT: self.holdout, RETAIN: self.retain}
        sources = {part: source for part, source in named.items() if source is not None}
        records = {
            part: _distinct(load_records(source, base_dir, f"{SUITE}.{part}")) for part, source in sources.items()
        }
        _refuse_overlap(records)
        frequency = document_frequency([record for found in records.values() for record in found])
        # Forget and holdout avoid each other alike, so that what is left of both is still comparable.
        avoid = {FORGET: records.get(HOLDOUT, ()), HOLDOUT: records[FORGET], RETAIN: records[FORGET]}
        probes = {}
        for part, found in records.items():
            made = build_probes(found, self.probes, seed=seed, frequency=frequency, avoid=avoid[part])
            if len(made) < 2:
                raise UserError(
                    f"{SUITE}.{part}: {len(made)} probes of kinds {', '.join(self.probes.kinds)} could be made of "
                    f"{len(found)} records in '{sources[part].source}', at least 2 are needed: "
                    "give longer or more records, or other own.probes.kinds (texts give continuation and cloze, "
                    "questions with answers give question and paraphrase)"
                )
            probes[part] = made
        return OwnSuite(self, probes, _matching_notes(records, probes), seed)


@dataclass(frozen=True)
class ProbeScore(SampleScore):
    """Scores of one probe: ``kind`` and ``form`` as in :class:`Probe`, ``origin`` of the record it was made of."""

    kind: str = field(default="", kw_only=True)
    form: str = field(default="", kw_only=True)
    origin: str = field(default="", kw_only=True)


class _GoesOnEncoder(Encoder):
    """Puts no end of sequence behind an answer: the document goes on there."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.tokenizer, template="plain")

    def encode_text(self, prompt: str, full: str, *, add_eos: bool) -> Encoded:
        """As in any encoder, but for the end."""
        return super().encode_text(prompt, full, add_eos=False)


@dataclass(frozen=True)
class OwnSuite:
    """Probes by part, made and counted.

    Attributes:
        config: what was asked for.
        probes: by name of the part.
        notes: what speaks against comparing forget with holdout.
        seed: of the bootstrap.
    """

    config: OwnConfig
    probes: Mapping[str, tuple[Probe, ...]]
    notes: tuple[str, ...]
    seed: int

    @property
    def parts(self) -> Mapping[str, int]:
        """Probes by part."""
        return {part: len(probes) for part, probes in self.probes.items()}

    @property
    def content(self) -> Mapping[str, str]:
        """Hashes of the probes, and the length of a generation."""
        hashes = {part: content_hash([probe.record for probe in probes]) for part, probes in self.probes.items()}
        return {**hashes, "max_new_tokens": str(self.config.max_new_tokens)}

    def score(self, part: str, units: range, subject: Subject) -> Sequence[ProbeScore]:
        """Scores of some probes, in their order."""
        probes = self.probes[part]
        found: dict[int, ProbeScore] = {}
        for goes_on in (True, False):
            chosen = [i for i in units if probes[i].goes_on == goes_on]
            if not chosen:
                continue
            scores = score_set(
                subject.model,
                _GoesOnEncoder(subject.encoder) if goes_on else subject.encoder,
                [probes[i].record for i in chosen],
                part,
                batch_size=subject.batch_size,
                max_new_tokens=self.config.max_new_tokens,
                device=subject.device,
            )
            for i, score in zip(chosen, scores, strict=True):
                probe = probes[i]
                found[i] = _probe_score(
                    dataclasses.replace(score, index=i), probe.kind, probe.form, probe.record.origin
                )
        return [found[i] for i in units]

    def row(self, part: str, plain: Mapping[str, Any]) -> ProbeScore:
        """A row read back from JSON."""
        return _probe_score(sample_score_from(plain), plain["kind"], plain["form"], plain["origin"])

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """Metrics and statements.

        ``auc`` is the probability that a forget probe is likelier than a holdout probe of the same kind (ties count
        half), the kinds weighted by their forget probes; ``log_probability_difference`` and ``recovered_difference``
        are forget minus holdout, weighted alike. ``log10_ks_p`` is the two-sample Kolmogorov-Smirnov test on the mean
        log-probability of each record's probes: the probes of one record are no independent samples. Intervals draw
        entities where both sets name several, else records; ``auc_p`` deals them out anew, and is what a difference is
        judged by. ``*_leaking_records`` is the share of records of which at
        least one probe brought the value back, with its exact interval (Clopper & Pearson 1934).
        """
        forget, holdout = rows[FORGET], rows.get(HOLDOUT)
        by_entity = all(_entities(rows[part]) > 1 for part in (FORGET, HOLDOUT) if part in rows)
        seed = self.seed

        metrics: dict[str, Estimate] = {}
        statements: list[str] = []
        kinds: list[str] = []
        if holdout is not None:
            present = {row.kind for row in holdout}
            kinds = sorted({row.kind for row in forget} & present)
            pair = _Pair(forget, holdout, kinds, by_entity, seed)
            metrics |= pair.metrics()
        for part, scores in rows.items():
            metrics |= _part_metrics(part, scores, by_entity, seed)
        if holdout is not None and len(kinds) > 1:
            for kind in kinds:
                metrics |= {f"{name}_{kind}": value for name, value in pair.of_kind(kind).metrics(brief=True).items()}
        if holdout is not None:
            statements += _compared(metrics, pair, self.config.equivalence_margin)
        else:
            statements.append(_NO_HOLDOUT)
        statements += _recovered(metrics, rows)
        if oracle is not None:
            found, said = _against_oracle(rows, oracle, kinds, by_entity, seed)
            metrics |= found
            statements += said
        statements += self.notes
        statements += _unscorable(rows)
        if holdout is not None:
            statements.append(_MATCHED)
        statements.append(_BLACK_BOX)
        counts = {
            part: dict(Counter(f"{probe.kind}: {probe.form}" for probe in probes))
            for part, probes in self.probes.items()
        }
        return SuiteResult(
            SUITE,
            metrics,
            tuple(statements),
            {
                **settings,
                "probes": counts,
                "max_new_tokens": self.config.max_new_tokens,
                "equivalence_margin": self.config.equivalence_margin,
                "resampled": "entities" if by_entity else "records",
                "seed": seed,
            },
        )

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """None."""
        return {}


_NO_HOLDOUT = (
    "There is no holdout (own.holdout): nothing here tells memory from a good guess. The numbers can be compared "
    "before and after unlearning, but whether the model is like one that never saw the records cannot be said."
)
_MATCHED = (
    "All of this rests on the holdout: records of the same kind, from the same source, about others, that no training "
    "of this model ever saw. That cannot be checked from here. Where they differ from the forget records in style, "
    "time or fame, an AUC off 0.5 may be that difference; evaluate a model that saw neither set to find out."
)
_BLACK_BOX = (
    "Probes ask questions and beginnings of documents, and read the answers. They do not exclude that the records come "
    "back after finetuning on related text, after quantisation or under other prompts: run `falcon-unlearn attack`."
)


def _probe_score(score: SampleScore, kind: str, form: str, origin: str) -> ProbeScore:
    values = {f.name: getattr(score, f.name) for f in dataclasses.fields(SampleScore)}
    return ProbeScore(**values, kind=kind, form=form, origin=origin)


def _distinct(records: Sequence[Record]) -> tuple[Record, ...]:
    first: dict[tuple[str, str], Record] = {}
    for record in records:
        first.setdefault(record.key, record)
    return tuple(first.values())


def _refuse_overlap(records: Mapping[str, Sequence[Record]]) -> None:
    seen: dict[tuple[str, str], tuple[str, Record]] = {}
    for part, found in records.items():
        for record in found:
            other, twin = seen.setdefault(record.key, (part, record))
            if other != part:
                raise UserError(
                    f"{SUITE}: a record stands in {other} and in {part} ({twin.origin} and {record.origin}): remove it "
                    f"from one of them"
                    + ("; the holdout must be records the model never saw" if HOLDOUT in (other, part) else "")
                )


def _matching_notes(records: Mapping[str, Sequence[Record]], probes: Mapping[str, Sequence[Probe]]) -> tuple[str, ...]:
    """What can be seen of a holdout that is no match, from the records alone."""
    if HOLDOUT not in records:
        return ()
    forget, holdout = records[FORGET], records[HOLDOUT]
    notes = []
    shared = _long_sentences(forget) & _long_sentences(holdout)
    if shared:
        example = min(shared)
        notes.append(
            f"Warning: {len(shared)} sentences stand in forget and in holdout (such as “{example[:60]}”): the holdout "
            "is not unseen, or the two share boilerplate."
        )
    people = {r.entity for r in forget if r.entity} & {r.entity for r in holdout if r.entity}
    if people:
        notes.append(f"Warning: {len(people)} entities stand in forget and in holdout (such as '{min(people)}').")
    lengths = [statistics.median(len(document(record)) for record in found) for found in (forget, holdout)]
    if max(lengths) > _LENGTH_RATIO * min(lengths):
        notes.append(
            f"Warning: forget records have {lengths[0]:.0f} characters and holdout records {lengths[1]:.0f} (medians): "
            "they are not matched in length, and probes of longer documents are easier."
        )
    mixes = [Counter(probe.kind for probe in probes[part]) for part in (FORGET, HOLDOUT)]
    notes += [
        f"Warning: {kind} probes could be made of only one of forget and holdout ({mixes[0][kind]} and "
        f"{mixes[1][kind]}); the comparison leaves them out."
        for kind in sorted(mixes[0].keys() ^ mixes[1].keys())
    ]
    return tuple(notes)


def _long_sentences(records: Sequence[Record]) -> set[str]:
    found = {folded(document(record)[a:b]) for record in records for a, b in sentences(document(record))}
    return {sentence for sentence in found if len(sentence) >= _SHARED_SENTENCE_CHARACTERS}


def _log_probability(row: ProbeScore) -> float:
    return math.nan if row.log_probability is None else row.log_probability


def _entities(rows: Sequence[ProbeScore]) -> int:
    return len({row.entity for row in rows if row.entity is not None})


def _clusters(rows: Sequence[ProbeScore], by_entity: bool) -> list[Hashable]:
    return [(row.entity,) if by_entity and row.entity is not None else row.origin for row in rows]


def _record_means(rows: Sequence[ProbeScore], kinds: Sequence[str]) -> list[float]:
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.kind in kinds and not math.isnan(_log_probability(row)):
            values[row.origin].append(_log_probability(row))
    return [math.fsum(found) / len(found) for found in values.values()]


@dataclass(frozen=True)
class _Pair:
    """Forget and holdout rows of some kinds, to be compared kind by kind."""

    forget: Sequence[ProbeScore]
    holdout: Sequence[ProbeScore]
    kinds: Sequence[str]
    by_entity: bool
    seed: int

    def of_kind(self, kind: str) -> _Pair:
        """The same of one kind."""
        return dataclasses.replace(self, kinds=[kind])

    def _sides(self) -> tuple[list[ProbeScore], list[ProbeScore]]:
        forget, holdout = ([row for row in rows if row.kind in self.kinds] for rows in (self.forget, self.holdout))
        return forget, holdout

    def metrics(self, *, brief: bool = False) -> dict[str, Estimate]:
        """AUC and differences; the tests too unless ``brief``."""
        found = {} if brief else {"log10_ks_p": self._log10_ks_p()}
        found["auc"] = self._estimate(lambda row: -_log_probability(row), weighted_auc)
        if not brief:
            found["auc_p"] = self.permutation_p()
            found["log_probability_difference"] = self._estimate(_log_probability, _mean_difference)
        found["recovered_difference"] = self._estimate(lambda row: row.accuracy, _mean_difference)
        return found

    def sizes(self) -> tuple[int, int]:
        """Independent things on each side: entities or records."""
        forget, holdout = (len(set(_clusters(side, self.by_entity))) for side in self._sides())
        return forget, holdout

    def _log10_ks_p(self) -> Estimate:
        ours, theirs = (_record_means(rows, self.kinds) for rows in (self.forget, self.holdout))
        if not (ours and theirs):
            return Estimate(None)
        return Estimate(log10_ks_p_value(ours, theirs), n=len(ours) + len(theirs))

    def smallest_p(self) -> float:
        """The p-value of the KS test if no value of one side lay among those of the other."""
        sizes = [len(_record_means(rows, self.kinds)) for rows in (self.forget, self.holdout)]
        return 10 ** log10_ks_p_value([0.0] * sizes[0], [1.0] * sizes[1]) if all(sizes) else 1.0

    def permutation_p(self) -> Estimate:
        """P-value of the AUC where whole entities (or records) are dealt out to the two sides anew.

        Exact whatever the number of entities, where the bootstrap of few is too narrow (Phipson & Smyth 2010).
        """
        forget, holdout = self._sides()
        rows = [*forget, *holdout]
        labels = [(i < len(forget), label) for i, label in enumerate(_clusters(rows, self.by_entity))]
        pooled = group([-_log_probability(row) for row in rows], labels)
        both = _Strata(pooled.values[:, 0], [np.array([row.kind == kind for row in rows]) for kind in self.kinds])
        first = np.zeros(pooled.n_clusters, dtype=np.int64)
        first[: self.sizes()[0]] = 1  # clusters are numbered in the order of the rows, forget before holdout
        rng = np.random.default_rng(self.seed)
        dealt = np.vstack([first, rng.permuted(np.tile(first, (RESAMPLES, 1)), axis=1)])[:, pooled.clusters]
        apart = np.abs(_by_kind(weighted_auc, (both, both), (dealt, 1 - dealt)) - 0.5)
        if math.isnan(apart[0]):
            return Estimate(None)
        known = apart[~np.isnan(apart)]
        return Estimate(float((known >= apart[0] - 1e-12).mean()), n=len(rows))

    def _estimate(self, value: Callable[[ProbeScore], float], statistic: _Statistic) -> Estimate:
        sides = self._sides()
        if not all(sides):
            return Estimate(None)
        groups = [group([value(row) for row in side], _clusters(side, self.by_entity)) for side in sides]
        forget, holdout = (
            _Strata(g.values[:, 0], [np.array([row.kind == kind for row in side]) for kind in self.kinds])
            for g, side in zip(groups, sides, strict=True)
        )
        return bootstrap(
            groups, lambda counts: _by_kind(statistic, (forget, holdout), (counts[0], counts[1])), seed=self.seed
        )


@dataclass(frozen=True)
class _Strata:
    """``values`` ``(samples,)``, and for each kind which of them are of it."""

    values: Numbers
    masks: Sequence[npt.NDArray[np.bool_]]

    def of(self, kind: int, counts: Counts) -> tuple[Numbers, Counts]:
        """Values of one kind that could be scored, and their counts."""
        chosen = self.masks[kind] & ~np.isnan(self.values)
        return self.values[chosen], counts[:, chosen]


def _by_kind(statistic: _Statistic, sides: tuple[_Strata, _Strata], counts: tuple[Counts, Counts]) -> Numbers:
    """Mean over kinds of a statistic of two sides, weighted by the first side's samples; ``(rows,)``."""
    total, weight = np.zeros(len(counts[0])), np.zeros(len(counts[0]))
    for kind in range(len(sides[0].masks)):
        (a, a_counts), (b, b_counts) = (side.of(kind, c) for side, c in zip(sides, counts, strict=True))
        n = np.where(b_counts.sum(1) > 0, a_counts.sum(1), 0).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            total += np.where(n > 0, statistic(a, b, a_counts, b_counts), 0.0) * n
        weight += n
    with np.errstate(invalid="ignore"):
        return np.asarray(total / weight)


def _mean_difference(a: Numbers, b: Numbers, a_counts: Counts, b_counts: Counts) -> Numbers:
    return np.asarray(a_counts @ a / a_counts.sum(1) - b_counts @ b / b_counts.sum(1))


def _part_metrics(part: str, rows: Sequence[ProbeScore], by_entity: bool, seed: int) -> dict[str, Estimate]:
    clusters = _clusters(rows, by_entity)
    metrics = {
        f"{part}_recovered": mean_estimate([row.accuracy for row in rows], clusters, seed=seed),
        f"{part}_leaking_records": _leaking(rows),
        f"{part}_log_probability": mean_estimate([_log_probability(row) for row in rows], clusters, seed=seed),
        f"{part}_rouge": mean_estimate([row.rouge for row in rows], clusters, seed=seed),
    }
    kinds = sorted({row.kind for row in rows})
    if len(kinds) > 1:
        for kind in kinds:
            chosen = [row for row in rows if row.kind == kind]
            metrics[f"{part}_recovered_{kind}"] = mean_estimate(
                [row.accuracy for row in chosen], _clusters(chosen, by_entity), seed=seed
            )
    return metrics


def _leaking(rows: Sequence[ProbeScore]) -> Estimate:
    records: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        records[row.origin].append(row.accuracy)
    best = [max((value for value in found if not math.isnan(value)), default=math.nan) for found in records.values()]
    scored = [value for value in best if not math.isnan(value)]
    n, k = len(scored), round(math.fsum(scored))
    if not n:
        return Estimate(math.nan, unscorable=len(best))
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Estimate(k / n, low, high, n=n, unscorable=len(best) - n)


def smallest_visible_auc(n: int, m: int) -> float:
    """The AUC above 0.5 that the rank-sum test finds 4 times in 5, at the 5 % level, with ``n`` and ``m`` samples.

    Normal approximation, with the variance under the null hypothesis (Mann & Whitney 1947); at most 1.
    """
    spread = math.sqrt((n + m + 1) / (12 * n * m))
    return min(1.0, 0.5 + float(norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(_POWER)) * spread)


def smallest_permutation_p(n: int, m: int) -> float:
    """Two-sided p-value of the most extreme of all ways to deal ``n`` and ``m`` things out to two sides."""
    return min(1.0, 2 / math.comb(n + m, n))


def _holdout_needed(n: int) -> int:
    return next(m for m in itertools.count(1) if smallest_permutation_p(n, m) <= _SIGNIFICANT)


def _p(log10_p: float) -> str:
    return f"p = {10**log10_p:.2g}" if log10_p > -300 else f"log10 p = {log10_p:.0f}"


def _range(estimate: Estimate, form: str = ".2f") -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _compared(metrics: Mapping[str, Estimate], pair: _Pair, margin: float) -> list[str]:
    auc, ks = metrics["auc"], metrics["log10_ks_p"]
    if auc.value is None or math.isnan(auc.value):
        return ["Forget and holdout cannot be compared: no kind of probe could be scored on both."]
    n, m = pair.sizes()
    what = "entities" if pair.by_entity else "records"
    statements = []
    p = metrics["auc_p"].value
    assert p is not None
    shown = f"AUC {auc.value:.2f} ({_range(auc)}; p = {p:.2g})"
    least = smallest_permutation_p(n, m)
    if auc.low is None or auc.high is None or least > _SIGNIFICANT:
        statements.append(
            f"{shown}: with {n} and {m} {what} even complete separation comes about by chance (p = {least:.2g}), so "
            f"the comparison with the holdout concludes nothing. It takes a holdout of {_holdout_needed(n)} {what}."
        )
    elif p <= _SIGNIFICANT and auc.value > 0.5:
        statements.append(
            f"The model still finds the forget records likelier than records it never saw: {shown}, the share of pairs "
            "in which a forget probe is the likelier one; 0.5 is no difference. If the holdout is matched, something "
            "of them is still in the model."
        )
    elif p <= _SIGNIFICANT:
        statements.append(
            f"Over-forgetting: the model finds the forget records less likely than records it never saw: {shown}, "
            "where 0.5 is no difference. If the holdout is matched, this tells an observer what was deleted."
        )
    elif min(n, m) >= _FEW_CLUSTERS and 0.5 - margin <= auc.low and auc.high <= 0.5 + margin:
        statements.append(
            f"Forget and never-seen records are alike within the margin: {shown} lies within 0.5 ± {margin:g} "
            "(own.equivalence_margin). A difference inside the interval is not excluded."
        )
    else:
        statements.append(
            "No difference between forget and never-seen records was found, and that is not proof that there is none: "
            f"{shown} leaves room for one larger than the margin (0.5 ± {margin:g}). More records would narrow it."
        )
    if ks.value is not None:
        smallest = pair.smallest_p()
        weak = (
            f" With so few records it could not have fallen below {smallest:.2g}, whatever the model knows."
            if smallest > _SIGNIFICANT
            else ""
        )
        clustered = " It takes the records of one entity for independent, the p of the AUC does not." * pair.by_entity
        statements.append(
            f"Same distribution test (Kolmogorov-Smirnov on the mean log-probability of {ks.n} records): "
            f"{_p(ks.value)}. A small p says that the two differ; a large one does not say that they are "
            f"the same.{weak}{clustered}"
        )
    visible = smallest_visible_auc(n, m)
    seen = (
        "cannot be relied on to find even an AUC of 1"
        if visible >= 1
        else f"finds an AUC of {visible:.2f} 4 times in 5"
    )
    statements.append(
        f"Power: a rank test with {n} and {m} {what} as independent samples {seen}; what lies nearer to 0.5 is missed "
        "more often."
    )
    if min(n, m) < _FEW_CLUSTERS:
        statements.append(f"The intervals rest on {min(n, m)} {what} on one side: they are likely too narrow.")
    if not pair.by_entity:
        statements.append(
            "Records were drawn as if independent. Where several are about one person, the intervals are too narrow "
            "for a statement about other people."
        )
    return statements


def _recovered(metrics: Mapping[str, Estimate], rows: Rows) -> list[str]:
    forget = metrics[f"{FORGET}_leaking_records"]
    if forget.value is None or math.isnan(forget.value):
        return ["No forget probe could be scored, so nothing can be said about what is recovered."]
    k = round(forget.value * forget.n)
    text = f"{k} of {forget.n} forget records gave their value back word for word to at least one probe"
    if HOLDOUT in rows:
        holdout = metrics[f"{HOLDOUT}_leaking_records"]
        if holdout.value is not None and not math.isnan(holdout.value):
            text += (
                f", and {round(holdout.value * holdout.n)} of {holdout.n} holdout records, which can only be guessed"
            )
    assert forget.high is not None
    if k < forget.n:
        text += f". Of such records, up to {forget.high:.0%} could give it back to such probes (95 % interval)"
    if not k:
        text += f"; by the rule of three, none of {forget.n} leaves room for {min(1.0, 3 / forget.n):.0%}"
    return [f"{text}."]


def _against_oracle(
    rows: Rows, oracle: Rows, kinds: Sequence[str], by_entity: bool, seed: int
) -> tuple[dict[str, Estimate], list[str]]:
    ours, theirs = rows[FORGET], oracle[FORGET]
    every_kind = sorted({row.kind for row in ours})
    clusters = _clusters(ours, by_entity)
    metrics: dict[str, Estimate] = {}
    means = [_record_means(found, every_kind) for found in (ours, theirs)]
    if all(means):
        metrics["log10_ks_p_against_oracle"] = Estimate(log10_ks_p_value(*means), n=len(means[0]))
    difference = difference_estimate(
        [_log_probability(row) for row in ours], [_log_probability(row) for row in theirs], clusters, seed=seed
    )
    metrics["log_probability_minus_oracle"] = difference
    metrics["recovered_minus_oracle"] = difference_estimate(
        [row.accuracy for row in ours], [row.accuracy for row in theirs], clusters, seed=seed
    )
    statements = []
    if difference.value is not None and not math.isnan(difference.value):
        shown = f"{difference.value:+.2f} ({_range(difference, '+.2f')})"
        statements.append(
            f"Against the oracle, on the same forget probes: log-probability per token differs by {shown}."
        )
    if HOLDOUT in oracle:
        pair = _Pair(theirs, oracle[HOLDOUT], kinds, by_entity, seed)
        auc, p = pair.metrics(brief=True)["auc"], pair.permutation_p().value
        if p is not None and p <= _SIGNIFICANT:
            statements.append(
                f"Warning: the oracle, which saw neither set, tells forget from holdout too (AUC {auc.value:.2f}, "
                f"p = {p:.2g}): they are not matched. Compare with the oracle's AUC, not with 0.5."
            )
    return metrics, statements


def _unscorable(rows: Rows) -> list[str]:
    statements = []
    for part, scores in rows.items():
        count = sum(math.isnan(_log_probability(row)) or math.isnan(row.accuracy) for row in scores)
        if count:
            statements.append(
                f"{count} of {len(scores)} {part} probes could not be scored (longer than the model's context): "
                "lower own.probes.prompt_characters."
            )
    return statements
