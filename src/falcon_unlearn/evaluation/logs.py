"""Published TOFU evaluation logs, read and written: the TOFU authors' format and OpenUnlearning's.

============================  ======================================================================================
``tofu``                      ``eval_log_aggregated.json`` of github.com/locuslab/tofu: four sections of losses by index
``open-unlearning``           ``TOFU_EVAL.json`` of github.com/locuslab/open-unlearning: ``agg_value`` and
                              ``value_by_index`` by metric (its ``TOFU_SUMMARY.json`` holds the former alone)
============================  ======================================================================================

Both become sample scores, so that every number of a log is made by the code that makes our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from falcon_unlearn.artifacts import Estimate, SampleScore, to_plain
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.metrics import (
    FORGET_SET,
    TruthRatioDefinition,
    compute_metrics,
    estimates,
    forget_quality_of,
    forget_truth_ratio,
    harmonic_mean,
    normalised_probability,
    sample_truth_ratio,
    truth_ratio,
    utility_truth_ratio,
)

LogFormat = Literal["tofu", "open-unlearning"]

RECORDS_PER_AUTHOR = 20
"""TOFU's sets about fictitious authors hold twenty consecutive records of each."""

_PREFIXES = {FORGET_SET: "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
"""OpenUnlearning's name of each of TOFU's sets."""
_NORMALISED_SETS = ("real_authors", "world_facts")
_SECTIONS = {
    FORGET_SET: "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
_SECTION_KEYS = ("avg_gt_loss", "rougeL_recall", "avg_paraphrased_loss", "average_perturb_loss")
_UTILITY_SETS = tuple(name for name in _PREFIXES if name != FORGET_SET)


@dataclass(frozen=True)
class LogScores:
    """What one evaluation log says.

    Attributes:
        format: of the log.
        forget_quality: p-value of the two-sample KS test between the truth ratios of the log and of the retain log.
        log10_forget_quality: its logarithm, also where a double cannot hold the p-value; None where all there is is the
            log's own p-value of 0.
        model_utility: harmonic mean of ``parts``.
        parts: the nine parts by OpenUnlearning's names (``ra_Q_A_Prob_normalised``).
        forget_truth_ratio: mean of min(R, 1/R) over the forget set.
        forget_probability: mean probability of the forget set's answers; None where the log has none.
        forget_rouge: mean ROUGE-L recall on the forget set; None where the log has none.
        definition: of the truth ratio.
        intervals: 95 % bootstrap intervals by those names, where the log holds single samples; over TOFU's authors in
            ``tofu`` logs, over entities where our own logs name them, over samples otherwise.
        notes: what the reader of the numbers must know.
    """

    format: LogFormat
    forget_quality: float | None
    log10_forget_quality: float | None
    model_utility: float
    parts: Mapping[str, float]
    forget_truth_ratio: float | None
    forget_probability: float | None = None
    forget_rouge: float | None = None
    definition: TruthRatioDefinition = "code"
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Log:
    """A log as read: sample scores by set (NaN where it holds no such number), and its own aggregates."""

    path: Path
    format: LogFormat
    scores: Mapping[str, tuple[SampleScore, ...]]
    aggregates: Mapping[str, float] = field(default_factory=dict)


def part_name(set_name: str, measure: str, *, normalised: bool = False) -> str:
    """OpenUnlearning's name of a number.

    Args:
        set_name: ``forget``, ``retain``, ``real_authors``, ``world_facts``; any other name stands for itself.
        measure: ``probability``, ``rouge`` or ``truth_ratio``.
        normalised: whether the probability is the right answer's share.
    """
    prefix = _PREFIXES.get(set_name, set_name)
    if measure == "truth_ratio":
        return "forget_truth_ratio" if set_name == FORGET_SET else f"{prefix}_Truth_Ratio"
    return f"{prefix}_Q_A_ROUGE" if measure == "rouge" else f"{prefix}_Q_A_Prob{'_normalised' * normalised}"


_PARTS = {
    f"{name}_{measure}": part_name(name, measure, normalised=name in _NORMALISED_SETS)
    for name in _UTILITY_SETS
    for measure in ("probability", "rouge", "truth_ratio")
}
"""Our name of each of the nine parts -> OpenUnlearning's."""


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path of the log") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): check the path of the log") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): give an evaluation log") from None


def _number(value: Any, place: str) -> float:
    """A number of a log; null is NaN, a list (several answers) its mean."""
    if isinstance(value, list) and value:
        return math.fsum(_number(entry, place) for entry in value) / len(value)
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{place}: expected a number, found {type(value).__name__}: the log is damaged")
    return float(value)


def _numbers(value: Any, place: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: expected a list of numbers, one a wrong answer: the log is damaged")
    return tuple(_number(entry, place) for entry in value)


def _in_order(indices: Iterable[str], place: str) -> list[str]:
    try:
        return sorted(indices, key=int)
    except ValueError:
        raise UserError(f"{place}: its keys must be sample indices: the log is damaged") from None


def _section_scores(section: Any, name: str, place: str, keys: Sequence[str]) -> tuple[SampleScore, ...]:
    """One section of the TOFU authors' format, in the order of its indices."""
    if not isinstance(section, Mapping):
        raise UserError(f"{place}: expected an object, found {type(section).__name__}: the log is damaged")
    for key in keys:
        if not isinstance(section.get(key), Mapping):
            raise UserError(f"{place}: has no '{key}' by index: evaluate again with the TOFU authors' code")
        if not section[key]:
            raise UserError(f"{place}: '{key}' is empty: evaluate again, no sample was scored")
    wrong_key = "average_perturb_loss"
    indices = _in_order(section[wrong_key], f"{place}, {wrong_key}")
    for key in keys:
        for index in section[key].keys() ^ section[wrong_key].keys():
            raise UserError(f"{place}: sample {index} is not in both '{key}' and '{wrong_key}': the log is damaged")
    texts = section.get("generated_text")
    scores = []
    normalised = name in _NORMALISED_SETS
    for index in indices:
        losses = {key: _number(section[key][index], f"{place}, {key}, {index}") for key in keys if key != wrong_key}
        wrong = tuple(-x for x in _numbers(section[wrong_key][index], f"{place}, {wrong_key}, {index}"))
        right, answer = -losses["avg_paraphrased_loss"], -losses.get("avg_gt_loss", math.nan)
        text = texts.get(index) if isinstance(texts, Mapping) else None
        prompt, generation, reference = text if isinstance(text, list) and len(text) == 3 else ("", "", "")
        scores.append(
            SampleScore(
                set=name,
                index=int(index),
                prompt=str(prompt),
                answer=str(reference).strip(),
                generation=str(generation),
                probability=math.exp(answer),
                accuracy=math.nan,
                rouge=losses.get("rougeL_recall", math.nan),
                truth_ratio=truth_ratio(right, wrong),
                entity=None if normalised else f"author {int(index) // RECORDS_PER_AUTHOR}",
                normalised_probability=normalised_probability(answer, wrong) if normalised else None,
                log_probability=answer,
                paraphrased_log_probability=right,
                perturbed_log_probabilities=wrong,
            )
        )
    return tuple(scores)


def _tofu_log(value: Mapping[str, Any], path: Path, *, forget_only: bool) -> _Log:
    wanted = {FORGET_SET: _SECTIONS[FORGET_SET]} if forget_only else _SECTIONS
    missing = [section for section in wanted.values() if section not in value]
    if missing:
        raise UserError(f"{path}: section '{missing[0]}' is missing: give the aggregated log with all of its sections")
    keys = _SECTION_KEYS[2:] if forget_only else _SECTION_KEYS
    return _Log(
        path,
        "tofu",
        {name: _section_scores(value[key], name, f"{path}, {key}", keys) for name, key in wanted.items()},
    )


class _Metrics:
    """Per-sample values of an OpenUnlearning log by metric."""

    def __init__(self, value: Mapping[str, Any], path: Path) -> None:
        self._value, self._path = value, path

    def by_index(self, metric: str) -> Mapping[str, Any] | None:
        """Entries by index, or None where the log has an aggregate at most."""
        entry = self._value.get(metric)
        found = entry.get("value_by_index") if isinstance(entry, Mapping) else None
        if found is None:
            return None
        if not isinstance(found, Mapping) or not found:
            raise UserError(
                f"{self._path}, {metric}: 'value_by_index' is empty or no object: evaluate again, no sample was scored"
            )
        return found

    def entry(self, metric: str, index: str, key: str) -> Any:
        """One number of one sample; None where there is none."""
        entry = (self.by_index(metric) or {}).get(index)
        if entry is not None and not isinstance(entry, Mapping):
            raise UserError(f"{self._path}, {metric}, {index}: expected an object: the log is damaged")
        return None if entry is None else entry.get(key)

    def number(self, metric: str, index: str, key: str) -> float:
        return _number(self.entry(metric, index, key), f"{self._path}, {metric}, {index}, {key}")

    def log_probabilities(self, metric: str, index: str) -> tuple[float, ...]:
        value = self.entry(metric, index, "avg_loss")
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(-x for x in _numbers(values, f"{self._path}, {metric}, {index}"))


def _open_unlearning_scores(log: _Metrics, name: str, path: Path) -> tuple[SampleScore, ...]:
    prefix = _PREFIXES[name]
    probability, normalised = f"{prefix}_Q_A_Prob", f"{prefix}_Q_A_Prob_normalised"
    rouge, ratio = f"{prefix}_Q_A_ROUGE", part_name(name, "truth_ratio")
    right = probability if name in _NORMALISED_SETS else f"{prefix}_Q_A_PARA_Prob"
    wrong = f"{prefix}_Q_A_PERT_Prob"
    there = {metric: log.by_index(metric) for metric in (probability, normalised, rouge, ratio)}
    indices = _in_order({index for found in there.values() for index in found or ()}, f"{path}, {prefix}_*")
    scores = []
    for index in indices:
        paraphrase = log.log_probabilities(right, index)
        answer = log.log_probabilities(probability, index)
        share = None if there[normalised] is None else log.number(normalised, index, "prob")
        entity = log.entry(rouge, index, "entity")
        scores.append(
            SampleScore(
                set=name,
                index=int(index),
                prompt=str(log.entry(rouge, index, "input") or ""),
                answer=str(log.entry(rouge, index, "ground_truth") or "").strip(),
                generation=str(log.entry(rouge, index, "generation") or ""),
                probability=log.number(probability, index, "prob"),
                accuracy=math.nan,
                rouge=log.number(rouge, index, "rougeL_recall"),
                truth_ratio=None if there[ratio] is None else log.number(ratio, index, "score"),
                entity=None if entity is None else str(entity),
                normalised_probability=math.nan if share is None and name in _NORMALISED_SETS else share,
                log_probability=answer[0] if answer else None,
                paraphrased_log_probability=paraphrase[0] if paraphrase else None,
                perturbed_log_probabilities=log.log_probabilities(wrong, index),
            )
        )
    return tuple(scores)


def _open_unlearning_log(value: Mapping[str, Any], path: Path, *, forget_only: bool) -> _Log:
    aggregates = {}
    for name, entry in value.items():
        number = entry.get("agg_value") if isinstance(entry, Mapping) else entry
        if isinstance(number, int | float) and not isinstance(number, bool):
            aggregates[name] = float(number)
    log = _Metrics(value, path)
    sets = (FORGET_SET,) if forget_only else tuple(_PREFIXES)
    return _Log(path, "open-unlearning", {name: _open_unlearning_scores(log, name, path) for name in sets}, aggregates)


def _read_log(path: Path, *, forget_only: bool) -> _Log:
    """Read a log of either format, told apart by what is in it.

    Args:
        path: of the log.
        forget_only: read, and ask for, nothing but the truth ratios on the forget set.
    """
    value = _read_json(path)
    if isinstance(value, Mapping):
        if any(key in value for key in _SECTIONS.values()):
            return _tofu_log(value, path, forget_only=forget_only)
        if "average_perturb_loss" in value:
            raise UserError(
                f"{path}: a single section of a TOFU log: give the aggregated log, eval_log_aggregated.json"
            )
        known = {"model_utility", "forget_quality", "forget_truth_ratio", *_PARTS.values()}
        if any(key in known for key in value):
            return _open_unlearning_log(value, path, forget_only=forget_only)
    raise UserError(
        f"{path}: neither a TOFU log (eval_log_aggregated.json, with '{_SECTIONS[FORGET_SET]}') nor one of "
        "OpenUnlearning (TOFU_EVAL.json, with 'forget_truth_ratio'): give one of these"
    )


def _lacks_truth_ratios(log: _Log, definition: TruthRatioDefinition) -> str | None:
    """Why forget quality cannot be computed from this log, or None."""
    scores = log.scores[FORGET_SET]
    ratios = [sample_truth_ratio(score, definition) for score in scores]
    if any(ratio is not None and not math.isnan(ratio) for ratio in ratios):
        return None
    if definition == "code" or not any(score.truth_ratio is not None for score in scores):
        aggregate = " but as an aggregate" if "forget_truth_ratio" in log.aggregates else ""
        return f"{log.path}: has no forget_truth_ratio by sample{aggregate}"
    return f"{log.path}: has no forget_Q_A_PARA_Prob and forget_Q_A_PERT_Prob by sample (the paper's truth ratio)"


def read_oracle(path: Path, *, definition: TruthRatioDefinition = "code") -> tuple[SampleScore, ...]:
    """Forget scores of a published log, to stand in for an oracle of our own.

    Nothing but the truth ratio and what it is made of is sure to be there; other numbers may be NaN.

    Args:
        path: a log of either format; only its forget set is looked at.
        definition: of the truth ratio that must be there.

    Raises:
        UserError: missing file, no JSON, unknown format, no truth ratios of single samples, damaged content.
    """
    log = _read_log(path, forget_only=True)
    lacking = _lacks_truth_ratios(log, definition)
    if lacking:
        raise UserError(f"{lacking}: give a retain log that holds them")
    return log.scores[FORGET_SET]


def score_log(log: Path, retain: Path | None, *, definition: TruthRatioDefinition = "code") -> LogScores:
    """Forget quality and model utility of a published log.

    Everything is computed from single samples where the log holds them, and taken from its aggregates otherwise
    (``notes`` say so). Forget quality compares all forget samples of both logs, whatever their number: that is how
    the published figures are made.

    Args:
        log: of the unlearned model; either format.
        retain: of the model that never saw the forget set; either format, only its forget set is looked at.
        definition: of the truth ratio.

    Raises:
        UserError: missing file, no JSON, unknown format, a missing or empty section, damaged content.
    """
    ours = _read_log(log, forget_only=False)
    oracle = None if retain is None else read_oracle(retain, definition=definition)
    notes: list[str] = []
    quality = _log_forget_quality(ours, oracle, definition, notes)
    numbers = estimates({name: scores for name, scores in ours.scores.items() if scores}, definition=definition)
    names = {**_PARTS, **{name: name for name in ("forget_truth_ratio", "forget_probability", "forget_rouge")}}
    own = {theirs: numbers[mine] for mine, theirs in names.items() if mine in numbers and numbers[mine].n}
    aggregated = {part: _aggregate(ours, part, definition) for part in _PARTS.values() if part not in own}
    parts = {part: own[part].value if part in own else aggregated[part] for part in _PARTS.values()}
    found = {part: value for part, value in parts.items() if value is not None}
    absent = ", ".join(part for part in parts if part not in found)
    if not aggregated:
        own["model_utility"] = numbers["model_utility"]
    else:
        held = [part for part in aggregated if part in found]
        notes += [f"{part}: the log's own aggregate, it holds no single samples" for part in held]
    if not absent:
        utility = harmonic_mean(found.values())
    elif "model_utility" in ours.aggregates and definition == "code":
        utility = ours.aggregates["model_utility"]
        notes.append(f"model_utility: the log's own aggregate, it does not hold {absent}")
    else:
        raise UserError(f"{log}: {absent} missing: evaluate again with all nine parts of model utility")
    unscorable = {name: number.unscorable for name, number in own.items() if number.unscorable}
    if unscorable:
        notes.append("left out as unscorable: " + ", ".join(f"{n} samples of {name}" for name, n in unscorable.items()))
    notes += _contradictions(ours, own, definition)
    ratio = own.get("forget_truth_ratio")
    return LogScores(
        format=ours.format,
        forget_quality=quality[0],
        log10_forget_quality=quality[1],
        model_utility=utility,
        parts=found,
        forget_truth_ratio=ratio.value if ratio else ours.aggregates.get("forget_truth_ratio"),
        forget_probability=_value(own, "forget_probability", ours.aggregates.get("forget_Q_A_Prob")),
        forget_rouge=_value(own, "forget_rouge", ours.aggregates.get("forget_Q_A_ROUGE")),
        definition=definition,
        intervals={
            name: (number.low, number.high)
            for name, number in own.items()
            if number.low is not None and number.high is not None
        },
        notes=tuple(notes),
    )


def _value(numbers: Mapping[str, Estimate], name: str, otherwise: float | None) -> float | None:
    return numbers[name].value if name in numbers else otherwise


def _aggregate(log: _Log, part: str, definition: TruthRatioDefinition) -> float | None:
    """The log's own aggregate of a part, where it is the one asked for."""
    return None if definition == "paper" and part.endswith("_Truth_Ratio") else log.aggregates.get(part)


def _log_forget_quality(
    log: _Log,
    oracle: Sequence[SampleScore] | None,
    definition: TruthRatioDefinition,
    notes: list[str],
) -> tuple[float | None, float | None]:
    lacking = _lacks_truth_ratios(log, definition)
    published = log.aggregates.get("forget_quality")
    if oracle is not None and lacking is None:
        notes += _mismatches(log, oracle)
        return forget_quality_of(log.scores[FORGET_SET], oracle, definition)
    if oracle is not None and (published is None or definition == "paper"):
        raise UserError(f"{lacking}: evaluate again and keep all samples")
    if published is None or definition == "paper":
        notes.append("forget quality needs the log of a model that never saw the forget set: give a retain log")
        return None, None
    why = "no retain log was given" if oracle is None else "it holds no single truth ratios to compare"
    notes.append(f"forget_quality: the log's own aggregate, {why}")
    return published, math.log10(published) if published > 0 else None


def _mismatches(log: _Log, oracle: Sequence[SampleScore]) -> list[str]:
    ours = log.scores[FORGET_SET]
    notes = []
    if len(ours) != len(oracle):
        notes.append(f"forget quality compares {len(ours)} forget samples with {len(oracle)} of the retain log")
    answers, theirs = ({score.answer for score in side if score.answer} for side in (ours, oracle))
    if answers and theirs and not (answers <= theirs or theirs <= answers):
        notes.append("the retain log was evaluated on other forget questions than the log")
    return notes


def _contradictions(log: _Log, numbers: Mapping[str, Estimate], definition: TruthRatioDefinition) -> list[str]:
    """Where the samples of a log do not give its own aggregates (other aggregators of later versions, edited logs)."""
    if definition != "code":
        return []
    return [
        f"{name}: {number.value:.4g} from the samples, the log itself says {log.aggregates[name]:.4g}"
        for name, number in numbers.items()
        if name in log.aggregates
        and number.value is not None
        and not math.isclose(number.value, log.aggregates[name], rel_tol=1e-3, abs_tol=1e-6)
    ]


# --- writing ----------------------------------------------------------------------------------------------------------


def _metric(by_index: Mapping[str, Mapping[str, Any]], values: Iterable[float]) -> dict[str, Any]:
    scored = [value for value in values if not math.isnan(value)]
    return {"agg_value": math.fsum(scored) / len(scored) if scored else None, "value_by_index": to_plain(by_index)}


def _likelihood(log_probability: float) -> dict[str, float]:
    return {"prob": math.exp(log_probability), "avg_loss": -log_probability}


def _likelihoods(log_probabilities: Sequence[float]) -> dict[str, list[float]]:
    return {"prob": [math.exp(x) for x in log_probabilities], "avg_loss": [-x for x in log_probabilities]}


def _set_log(name: str, scores: Sequence[SampleScore]) -> dict[str, Any]:
    """Every number of one set that OpenUnlearning has a name for."""
    prefix = _PREFIXES.get(name, name)
    keyed = {str(score.index): score for score in scores}
    assert len(keyed) == len(scores)
    log = {
        f"{prefix}_Q_A_Prob": _metric(
            {
                i: {"prob": s.probability, "avg_loss": None if s.log_probability is None else -s.log_probability}
                for i, s in keyed.items()
            },
            [s.probability for s in scores],
        ),
        f"{prefix}_Q_A_ROUGE": _metric(
            {
                i: {
                    "rougeL_recall": s.rouge,
                    "input": s.prompt,
                    "ground_truth": s.answer,
                    "generation": s.generation,
                    "entity": s.entity,
                }
                for i, s in keyed.items()
            },
            [s.rouge for s in scores],
        ),
    }
    if any(s.normalised_probability is not None for s in scores):
        shares = {
            i: s.probability if s.normalised_probability is None else s.normalised_probability for i, s in keyed.items()
        }
        log[f"{prefix}_Q_A_Prob_normalised"] = _metric({i: {"prob": x} for i, x in shares.items()}, shares.values())
    paraphrased = {
        i: s.paraphrased_log_probability for i, s in keyed.items() if s.paraphrased_log_probability is not None
    }
    if paraphrased:
        entries = {i: _likelihood(x) for i, x in paraphrased.items()}
        log[f"{prefix}_Q_A_PARA_Prob"] = _metric(entries, [entry["prob"] for entry in entries.values()])
    perturbed = {
        i: _likelihoods(s.perturbed_log_probabilities) for i, s in keyed.items() if s.perturbed_log_probabilities
    }
    if perturbed:
        means = [math.fsum(entry["prob"]) / len(entry["prob"]) for entry in perturbed.values()]
        log[f"{prefix}_Q_A_PERT_Prob"] = _metric(perturbed, means)
    # OpenUnlearning takes no null here, so an unscorable sample has no entry.
    ratios = {i: s.truth_ratio for i, s in keyed.items() if s.truth_ratio is not None and not math.isnan(s.truth_ratio)}
    if ratios:
        aggregator = forget_truth_ratio if name == FORGET_SET else utility_truth_ratio
        log[part_name(name, "truth_ratio")] = _metric(
            {i: {"score": ratio} for i, ratio in ratios.items()}, map(aggregator, ratios.values())
        )
    return log


def open_unlearning_log(
    scores: Mapping[str, Sequence[SampleScore]], oracle: Sequence[SampleScore] | None = None
) -> dict[str, Any]:
    """Our own scores as OpenUnlearning's ``TOFU_EVAL.json``, which :func:`score_log` reads back to the same numbers.

    Its truth ratio is the one of the code. Unscorable numbers are null; an unscorable truth ratio is left out.

    Args:
        scores: by name of the set, ``forget`` among them; indices are distinct within a set.
        oracle: the oracle's forget scores; without them there is no ``forget_quality``.

    Returns:
        JSON: ``{"forget_truth_ratio": {"agg_value": ..., "value_by_index": {"0": {"score": ...}, ...}}, ...}``.
    """
    log = {metric: entry for name, samples in scores.items() for metric, entry in _set_log(name, samples).items()}
    metrics = compute_metrics(scores, oracle)
    for name, value in (("model_utility", metrics.model_utility), ("forget_quality", metrics.forget_quality)):
        if value is not None:
            log[name] = {"agg_value": to_plain(value)}
    return dict(sorted(log.items()))


def open_unlearning_summary(log: Mapping[str, Any]) -> dict[str, float]:
    """The ``TOFU_SUMMARY.json`` beside a log: metric -> aggregate, as far as there is one."""
    return {name: entry["agg_value"] for name, entry in log.items() if entry["agg_value"] is not None}
