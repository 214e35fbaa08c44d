"""One self-contained HTML page that shows a run folder: what was forgotten, what was kept, and how it was done."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from falcon_unlearn.artifacts import (
    LayerSelection,
    StepRecord,
    layer_selection_from,
    read_jsonl,
    write_bytes,
)
from falcon_unlearn.errors import UserError
from falcon_unlearn.report import figures, robustness

REPORT_FILE = "report.html"
MODELS = ("before", "after", "oracle")
FORGET_SET = "forget"

MAX_CHARACTERS = 600
"""Longer questions, answers and generations are cut."""
SAMPLE_BYTES = 400_000
"""All generations of a page together; sets share it equally."""
MAX_TENSORS = 200
MAX_RECIPE = 60_000

_ROW_BYTES = 1_200
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class _Measure:
    """A row of the table of results."""

    key: str
    label: str
    better: Literal["lower", "higher"]
    meaning: str
    digits: int = 3
    bar: bool = True


_FORGET_MEASURES = (
    _Measure("forget_probability", "Answer probability", "lower", "Of the right answer, per token (geometric mean)."),
    _Measure("forget_accuracy", "Accuracy", "lower", "Share of greedy answers that contain the right value."),
    _Measure(
        "forget_accuracy_heldout",
        "Accuracy, held-out phrasing",
        "lower",
        "The same for a phrasing of the question that was never trained on.",
    ),
    _Measure(
        "forget_rouge",
        "ROUGE-L recall",
        "lower",
        "Share of the right answer's words that the answer has, in order. Far below the oracle is over-forgetting.",
    ),
    _Measure(
        "forget_truth_ratio",
        "Truth ratio",
        "higher",
        "Mean of min(R, 1/R), R = probability of wrong over right answers: 1 where the model prefers neither.",
    ),
    _Measure(
        "forget_quality",
        "Forget quality, p",
        "higher",
        "Kolmogorov-Smirnov test of truth ratios against the oracle's: above 0.05 it cannot tell the two apart.",
        bar=False,
    ),
    _Measure("log10_forget_quality", "Forget quality, log10 p", "higher", "The same; 0 is best.", digits=2, bar=False),
)
_UTILITY = _Measure(
    "model_utility", "Model utility", "higher", "Harmonic mean of the parts below, over every set but the forget set."
)
_PART_MEANINGS = {
    "probability": "probability",
    "rouge": "ROUGE-L recall",
    "truth_ratio": "truth ratio, max(0, 1 − R)",
}


@dataclass(frozen=True)
class _Cell:
    text: str
    bar: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class _Row:
    label: str
    better: Literal["lower", "higher"]
    meaning: str
    cells: Sequence[_Cell]


@dataclass(frozen=True)
class _Text:
    """A text as shown; ``cut`` characters of it are left out."""

    shown: str
    cut: int = 0


@dataclass(frozen=True)
class _Answer:
    """What one model said to one question."""

    text: _Text
    right: bool | None
    probability: str
    heldout: _Text | None
    heldout_right: bool | None


@dataclass(frozen=True)
class _Sample:
    prompt: _Text
    expected: _Text
    answers: Sequence[_Answer | None]


@dataclass(frozen=True)
class _SampleSet:
    name: str
    total: int
    samples: Sequence[_Sample]
    wanted: int


@dataclass(frozen=True)
class _SuiteTable:
    name: str
    rows: Sequence[tuple[str, Sequence[robustness.Shown]]]
    statements: Sequence[str]


def build_report(run: Path, *, samples: int = 12) -> str:
    """Render a run folder as HTML.

    A file that is missing makes its section say so. The same folder gives the same text.

    Args:
        run: run folder, complete or not.
        samples: generations shown per evaluation set, drawn without a look at the outcome; fewer where the page would
            become too large.

    Raises:
        UserError: ``run`` is no run folder, or one of its files is damaged.
    """
    if not (run / "recipe.yaml").is_file() and not (run / "metrics.json").is_file():
        raise UserError(f"report: {run} is no run folder (neither recipe.yaml nor metrics.json is in it)")
    metrics = _read_object(run / "metrics.json")
    chosen = _read_object(run / "layer_selection.json")
    selection = None if chosen is None else layer_selection_from(chosen)
    steps = _steps(run / "training.jsonl")
    scores = {name: rows for name in MODELS if (rows := _read_lines(run / "scores" / f"{name}.jsonl")) is not None}
    recipe = _read_text(run / "recipe.yaml")
    settings = _settings(recipe)
    attacked = _read_object(run / "attacks.json")
    provenance = _read_object(run / "provenance.json")
    shown_models = [name for name in MODELS if metrics and metrics.get(name)]
    page = {
        "name": run.resolve().name,
        "verdict": verdict(metrics, attacked) if metrics else None,
        "subject": _subject(provenance, selection),
        "models": shown_models,
        "forget_rows": [_row(measure, metrics or {}, shown_models) for measure in _FORGET_MEASURES],
        "utility_row": _row(_UTILITY, metrics or {}, shown_models),
        "part_rows": _part_rows(metrics or {}, shown_models),
        "unscorable": _unscorable(metrics or {}, shown_models),
        "suites": _suites(metrics or {}, shown_models),
        "attacks": _attacks(attacked),
        "limits": _limits(metrics, selection, scores, settings, attacked=attacked is not None),
        "score_models": list(scores),
        "sets": _sample_sets(scores, samples),
        "max_characters": MAX_CHARACTERS,
        "selection": selection,
        "layer_figures": _present(
            figures.layer_scores(selection) if selection and selection.selector == "sweep" else None,
            figures.mutual_information(selection.mutual_information, selection.layers)
            if selection and selection.mutual_information
            else None,
        ),
        "layer_table": _layer_table(selection),
        "steps": _step_facts(steps),
        "step_figures": _present(figures.losses(steps or ()), figures.gradient_conflict(steps or ())),
        "points_per_mean": figures.points_per_mean(len(steps or ())),
        "interpolation": (_section(settings, "training") or {}).get("interpolation"),
        "corpus": _corpus(_read_object(run / "corpus.json")),
        "patch": _patch(run, provenance),
        "provenance": _facts(provenance) if provenance is not None else None,
        "recipe": _cut(recipe, MAX_RECIPE) if recipe is not None else None,
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("falcon_unlearn.report").joinpath("template.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(page)


def write_report(run: Path, *, samples: int = 12) -> Path:
    """Write :func:`build_report` to ``run/report.html``, atomically, and return that path."""
    path = run / REPORT_FILE
    write_bytes(path, build_report(run, samples=samples).encode())
    return path


def verdict(metrics: Mapping[str, Any], attacked: Mapping[str, Any] | None = None) -> str:
    """The outcome in one sentence of numbers.

    Args:
        metrics: content of ``metrics.json``.
        attacked: content of ``attacks.json``.
    """
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    if not before and not after:
        return "Nothing was scored."
    parts = []
    for key, label in (("forget_accuracy", "Forget accuracy"), ("forget_probability", "forget probability")):
        change = _change(before.get(key), after.get(key))
        heldout = _change(before.get(f"{key}_heldout"), after.get(f"{key}_heldout"))
        if change:
            parts.append(f"{label} {change}" + (f" (held-out phrasing {heldout})" if heldout else ""))
    base, left = _float(before.get("model_utility")), _float(after.get("model_utility"))
    if change := _change(base, left):
        kept = f" ({100 * left / base:.0f} % kept)" if base else ""
        parts.append(f"model utility {change}{kept}")
    quality = _p_value(after.get("forget_quality"), after.get("log10_forget_quality"))
    if quality != _NOTHING:
        parts.append(f"forget quality p = {quality}")
    elif not metrics.get("oracle"):
        parts.append("forget quality needs an oracle, and this run has none")
    worst = robustness.worst_recovery(attacked["attacks"]) if attacked else None
    if worst is not None:
        parts.append(f"strongest recovery under attack {worst}")
    sentence = "; ".join(parts) or "no measure has a number"
    return f"{sentence[:1].upper()}{sentence[1:]}."


_NOTHING = "–"


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if _is_number(value) else _NOTHING


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _change(before: Any, after: Any) -> str | None:
    return f"{before:.2f} → {after:.2f}" if _is_number(before) and _is_number(after) else None


def _p_value(p: Any, log10_p: Any) -> str:
    """Three decimals, or mantissa and exponent where p is small; these come from log10 p, which never underflows."""
    if _is_number(p) and p >= 0.001:
        return f"{p:.3f}"
    if not _is_number(log10_p):
        return _NOTHING if not _is_number(p) else f"{p:.1e}"
    exponent = math.floor(log10_p)
    return f"{10 ** (log10_p - exponent):.1f}e{exponent}".replace("-", "−")


def _present(*values: str | None) -> list[Markup]:
    return [Markup(value) for value in values if value is not None]  # noqa: S704 (figures escape their one text)


# ---------------------------------------------------------------------------------------------------- reading


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"report: {path} cannot be read ({error})") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"report: {path} is not valid JSON ({error}); restore it or run the recipe again") from error
    if not isinstance(value, dict):
        raise UserError(f"report: {path} must hold a JSON object, it holds {type(value).__name__}")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        rows = read_jsonl(path)
    except (OSError, ValueError) as error:
        raise UserError(f"report: {path} is damaged ({error}); restore it or run the recipe again") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"report: {path} must hold one JSON object a line")
    return rows


def _float(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _steps(path: Path) -> list[StepRecord] | None:
    rows = _read_lines(path)
    if rows is None:
        return None
    names = [field.name for field in dataclasses.fields(StepRecord) if field.name not in {"step", "micro_batches"}]
    return [StepRecord(row.get("step", i), *[_float(row.get(n)) for n in names]) for i, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------- sections


def _subject(provenance: Mapping[str, Any] | None, selection: LayerSelection | None) -> str:
    """One line below the title: model, method, layers."""
    facts = provenance or {}
    model, method = facts.get("model") or {}, facts.get("method") or {}
    preset = f" ({method['preset']})" if method.get("preset") else ""
    layers = f"layer{'s' * (len(selection.layers) > 1)} {_listed(selection.layers)}" if selection else None
    parts = (model.get("name"), f"{method['name']}{preset}" if method.get("name") else None, layers)
    return " · ".join(str(part) for part in parts if part)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _row(measure: _Measure, metrics: Mapping[str, Any], models: Sequence[str]) -> _Row:
    cells = []
    for model in models:
        value = metrics[model].get(measure.key)
        if measure.key == "forget_quality":
            text = _p_value(value, metrics[model].get("log10_forget_quality"))
        else:
            text = _number(value, measure.digits)
        bar = min(max(value, 0), 1) * 100 if measure.bar and _is_number(value) else None
        cells.append(_Cell(text, bar, _interval(metrics[model], measure.key)))
    return _Row(measure.label, measure.better, measure.meaning, cells)


def _part_rows(metrics: Mapping[str, Any], models: Sequence[str]) -> list[_Row]:
    parts = {name: None for model in models for name in metrics[model].get("utility_parts") or {}}
    rows = []
    for part in parts:
        ending = next((end for end in _PART_MEANINGS if part.endswith(f"_{end}")), None)
        label = f"{part.removesuffix(f'_{ending}')}: {_PART_MEANINGS[ending]}" if ending else part
        cells = [
            _Cell(
                _number((metrics[model].get("utility_parts") or {}).get(part), 3), None, _interval(metrics[model], part)
            )
            for model in models
        ]
        rows.append(_Row(label, "higher", "", cells))
    return rows


def _interval(metrics: Mapping[str, Any], key: str) -> str:
    bounds = (metrics.get("intervals") or {}).get(key)
    return f"{_number(bounds[0], 2)} … {_number(bounds[1], 2)}" if bounds else ""


def _suites(metrics: Mapping[str, Any], models: Sequence[str]) -> list[_SuiteTable]:
    names = {name: None for model in models for name in metrics[model].get("suites") or {}}
    tables = []
    for name in names:
        results = [(metrics[model].get("suites") or {}).get(name) for model in models]
        keys = {key: None for result in results if result for key in result["metrics"]}
        rows = [
            (key, [robustness.shown((result or {}).get("metrics", {}).get(key)) for result in results]) for key in keys
        ]
        after = metrics.get("after") or {}
        tables.append(_SuiteTable(name, rows, ((after.get("suites") or {}).get(name) or {}).get("statements") or ()))
    return tables


def _attacks(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if content is None:
        return None
    results = content["attacks"]
    return {
        "rows": robustness.attack_rows(results),
        "worst": robustness.worst_recovery(results),
        "incomplete": robustness.incomplete(results),
        "scored": _listed(sorted({result["scored"] for result in results})),
        "notes": robustness.attack_notes(results),
        "figures": [(_present(figure)[0], caption) for figure, caption in robustness.attack_figures(results)],
    }


def _unscorable(metrics: Mapping[str, Any], models: Sequence[str]) -> str:
    counts = [(model, metrics[model].get("unscorable") or 0) for model in models]
    return _listed([f"{count} {model}" for model, count in counts if count])


def _limits(
    metrics: Mapping[str, Any] | None,
    selection: LayerSelection | None,
    scores: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    *,
    attacked: bool,
) -> list[str]:
    after = (metrics or {}).get("after") or {}
    if metrics and not after:
        return ["Nothing was scored: what this model has forgotten, kept or lost is not known."]
    limits = ["The numbers hold for the questions that were scored, answered greedily. Other questions were not asked."]
    if metrics and not _is_number(after.get("forget_accuracy_heldout")):
        limits.append("No held-out phrasing was scored: whether other wordings bring the answers out is not measured.")
    limits.append(
        "The attacks are those in the table, with their settings: others, or stronger ones, may bring back more."
        if attacked
        else "Forgotten knowledge may come back by finetuning on a little of it (relearning), by quantisation or by "
        "adversarial prompts. This report covers no such attack."
    )
    if metrics and not metrics.get("oracle"):
        limits.append(
            "Without an oracle (a model that never saw the forget data) there is no level to compare with: "
            "a number below what never-learned looks like is over-forgetting and cannot be seen here."
        )
    kept = _listed(list(dict.fromkeys(str(r.get("set")) for r in scores.get("after", ()) if r.get("set") != "forget")))
    if kept:
        limits.append(f"Model utility covers these sets and nothing else: {kept}.")
    evaluation, sweep = _section(settings, "evaluation"), _section(settings, "selection", "sweep") or {}
    if evaluation is not None and not evaluation.get("retain"):
        limits.append("The retain set was scored on the records that the run was trained to keep.")
    if selection and selection.selector == "sweep":
        share = f" ({100 * sweep['validation_share']:.0f} %)" if _is_number(sweep.get("validation_share")) else ""
        limits.append(
            "The layer was selected by short trial runs that trained on a part of the forget and retain records and "
            f"were judged on the rest{share}: numbers on these records are not independent of that choice."
        )
    return limits


def _settings(recipe: str | None) -> Mapping[str, Any]:
    """A resolved recipe as a mapping; empty where it cannot be read."""
    try:
        content = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _section(settings: Mapping[str, Any], *path: str) -> Mapping[str, Any] | None:
    """A section of a resolved recipe; None where it has none."""
    content: Any = settings
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else None


def _cut(text: Any, limit: int = MAX_CHARACTERS) -> _Text:
    """At most ``limit`` characters, control characters shown as symbols, halves of surrogate pairs replaced."""
    whole = str(text)
    shown = whole[:limit].translate(_CONTROL).encode("utf-8", "replace").decode()
    return _Text(shown) if len(whole) <= limit else _Text(shown.rstrip() + "…", len(whole) - limit)


def _verdict_of(value: Any) -> bool | None:
    return value >= 0.5 if _is_number(value) else None


def _answer(row: Mapping[str, Any]) -> _Answer:
    heldout = row.get("generation_heldout")
    return _Answer(
        text=_cut(row.get("generation") or ""),
        right=_verdict_of(row.get("accuracy")),
        probability=_number(row.get("probability"), 2),
        heldout=None if heldout is None else _cut(heldout),
        heldout_right=_verdict_of(row.get("accuracy_heldout")),
    )


def _sample(rows: Sequence[Mapping[str, Any] | None]) -> _Sample:
    known = next(row for row in rows if row is not None)
    return _Sample(
        _cut(known.get("prompt") or ""),
        _cut(known.get("answer") or ""),
        [None if row is None else _answer(row) for row in rows],
    )


def _bytes_of(sample: _Sample) -> int:
    texts = [sample.prompt, sample.expected]
    for answer in sample.answers:
        if answer is not None:
            texts += [answer.text, answer.heldout or _Text("")]
    return _ROW_BYTES + sum(len(str(escape(text.shown)).encode()) for text in texts)


def _drawn(total: int, count: int, name: str) -> list[int]:
    """``count`` indices below ``total``, in order; even steps could meet one kind of question only."""
    return sorted(random.Random(f"report {name}").sample(range(total), count))


def _sample_sets(scores: Mapping[str, Sequence[Mapping[str, Any]]], wanted: int) -> list[_SampleSet]:
    """The forget set first, then the others in their order; rows of all models stand together by set and index."""
    by_key = {model: {(row.get("set"), row.get("index")): row for row in rows} for model, rows in scores.items()}
    keys = list(dict.fromkeys(key for rows in by_key.values() for key in rows))
    names = sorted(dict.fromkeys(name for name, _ in keys), key=lambda name: name != FORGET_SET)
    sets = []
    for name in names:
        own = [key for key in keys if key[0] == name]
        shown = _fitting([[rows.get(key) for rows in by_key.values()] for key in own], wanted, str(name), len(names))
        sets.append(_SampleSet(str(name), len(own), shown, wanted))
    return sets


def _fitting(
    questions: Sequence[Sequence[Mapping[str, Any] | None]], wanted: int, name: str, sets: int
) -> list[_Sample]:
    """As many of ``wanted`` samples as fit into a set's share of :data:`SAMPLE_BYTES`; one row a model in each."""
    most_bytes = SAMPLE_BYTES // sets
    count = min(wanted, len(questions))
    while count:
        chosen = [_sample(questions[i]) for i in _drawn(len(questions), count, name)]
        size = sum(map(_bytes_of, chosen))
        if size <= most_bytes:
            return chosen
        count = min(count - 1, count * most_bytes // size)
    return []


def _layer_table(selection: LayerSelection | None) -> dict[str, Any] | None:
    """Every number of the layer figures: column labels and one row per layer."""
    if selection is None:
        return None
    curve = selection.mutual_information
    columns: dict[str, dict[int, float]] = {}
    if selection.scores and selection.selector != "mutual_information":
        columns["score"] = {s.layer: s.score for s in selection.scores}
        for part in {name: None for s in selection.scores for name in s.details}:
            columns[part.replace("_", " ")] = {s.layer: s.details.get(part, math.nan) for s in selection.scores}
    if curve is not None:
        for label, values in (
            ("mutual information", curve.value),
            ("null: retain data", curve.null_retain),
            ("null: shuffled", curve.null_permutation),
        ):
            columns[label] = dict(zip(curve.layers, values, strict=True))
    layers = sorted({layer for column in columns.values() for layer in column})
    if not layers:
        return None
    return {
        "columns": list(columns),
        "rows": [
            (layer, layer in selection.layers, [_number(column.get(layer), 3) for column in columns.values()])
            for layer in layers
        ],
    }


def _step_facts(steps: Sequence[StepRecord] | None) -> dict[str, Any] | None:
    if steps is None:
        return None
    seconds = [s.seconds for s in steps if math.isfinite(s.seconds)]
    conflicts = [s.conflicts for s in steps if math.isfinite(s.conflicts)]
    return {
        "count": len(steps),
        "seconds": f"{sum(seconds) / len(seconds):.2g}" if seconds else None,
        "conflicts": f"{100 * sum(conflicts) / len(conflicts):.0f} %" if conflicts else None,
    }


def _corpus(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if content is None:
        return None
    found = content.get("report") or {}
    lengths = content.get("lengths") or {}
    rows = []
    for name, count in (found.get("records") or {}).items():
        length = lengths.get(name, {})
        longer = str(length.get("longer", _NOTHING))
        if length.get("longer"):
            longer += f" ({_DONE.get(length['action'], length['action'])}; limit {length['limit']} tokens)"
        rows.append((name, count, (found.get("duplicates") or {}).get(name, 0), longer))
    return {
        "rows": rows,
        "overlap": found.get("overlap", 0),
        "overlap_example": found.get("overlap_example"),
        "on_overlap": found.get("on_overlap", _NOTHING),
        "template": content.get("template", _NOTHING),
        "loss_mask": {"answer": "answer tokens only", "all": "all tokens"}.get(
            content.get("loss_mask", _NOTHING), content.get("loss_mask", _NOTHING)
        ),
        "scored": content.get("scored_records") or {},
        "hashes": content.get("hashes") or {},
    }


_DONE = {"truncate": "truncated", "drop": "dropped"}


def _size(path: Path) -> str | None:
    if not path.is_file():
        return None
    size = float(path.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.1f} GB"


def _patch(run: Path, provenance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    folder = run.resolve() / "patch"
    document = _read_object(folder / "patch.json")
    if document is None:
        return None
    tensors = document.get("tensors") or {}
    base = ((provenance or {}).get("model") or {}).get("folder") or document.get("base_model") or "BASE"
    result = folder.parent.with_name(f"{folder.parent.name}-model")
    quoted = {"patch": folder, "base": base, "result": result, "back": result.with_name(f"{result.name}-reverted")}
    at = {key: shlex.quote(str(value)) for key, value in quoted.items()}
    original_size = _size(folder / "original.safetensors")
    stack = " --stack" if document.get("ancestry") else ""
    fits = ("Check that it fits the model", f"falcon-unlearn patch verify {at['patch']} --model {at['base']}")
    commands = [
        *(() if stack else (fits,)),
        (
            "Write the unlearned model",
            f"falcon-unlearn patch apply {at['patch']} --model {at['base']}{stack} --out {at['result']}",
        ),
    ]
    if original_size is not None:
        revert = f"falcon-unlearn patch revert {at['patch']} --model {at['result']} --out {at['back']}"
        commands.append((f"Get {'what it stands on' if stack else 'the original'} back, byte for byte", revert))
    return {
        "base_model": document.get("base_model", _NOTHING),
        "ancestry": [(ancestor["id"][:12], ancestor["folder"]) for ancestor in document.get("ancestry") or ()],
        "count": len(tensors),
        "parameters": f"{sum(math.prod(t.get('shape', ())) for t in tensors.values()):,}",
        "size": _size(folder / "patch.safetensors"),
        "original_size": original_size,
        "tensors": [
            (name, t.get("dtype", _NOTHING), " × ".join(map(str, t.get("shape", ()))), t.get("sha256_after", "")[:12])
            for name, t in list(tensors.items())[:MAX_TENSORS]
        ],
        "more": max(0, len(tensors) - MAX_TENSORS),
        "commands": commands,
    }


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str | list[tuple[str, str]]]]:
    """Keys and values for reading; a mapping becomes a list of pairs, anything deeper its JSON."""
    facts: list[tuple[str, str | list[tuple[str, str]]]] = []
    for key, value in content.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            facts.append((name, [(str(k), _cut(_plain(v)).shown) for k, v in value.items()]))
        else:
            facts.append((name, _cut(_plain(value)).shown))
    return facts


def _plain(value: Any) -> str:
    if value is None:
        return _NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
