"""What attacks brought back, as the report shows it: one table, one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from falcon_unlearn.report import attack_figures as figures

NOTHING = "–"


@dataclass(frozen=True)
class AttackRow:
    """One attack: accuracies on the records it was scored on, and what it recovered.

    ``before`` is the unlearned model without the attack, ``original`` the original model without it; the other models'
    numbers are under the attack. Texts are numbers with intervals, a dash where there is none.
    """

    attack: str
    recovery: Shown
    oracle_recovery: Shown
    before: Shown
    attacked: Shown
    oracle: Shown
    original: Shown
    seconds: str
    status: str


@dataclass(frozen=True)
class Shown:
    """A number and its interval as text; a dash and nothing where there is none."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


def shown(estimate: Mapping[str, Any] | None, *, percent: bool = False) -> Shown:
    """An estimate as text.

    Args:
        estimate: an :class:`~falcon_unlearn.artifacts.Estimate` as JSON.
        percent: whether 1 is shown as 100 %.
    """
    value = (estimate or {}).get("value")
    if not _is_number(value):
        return Shown(NOTHING)
    assert estimate is not None
    low, high = estimate.get("low"), estimate.get("high")
    digits, scale, unit = (0, 100, " %") if percent else (2, 1, "")
    text = f"{scale * value + 0.0:.{digits}f}{unit}"
    bounds = ""
    if _is_number(low) and _is_number(high):
        bounds = f"{scale * low:.{digits}f} … {scale * high:.{digits}f}"
    return Shown(text.replace("-", "−"), bounds.replace("-", "−"))


def attack_rows(results: Sequence[Mapping[str, Any]]) -> list[AttackRow]:
    """Rows of the robustness table, the strongest recovery first, attacks without one last.

    Args:
        results: ``attacks`` of ``attacks.json``.
    """
    return [_row(result) for result in sorted(results, key=_strength)]


def worst_recovery(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The one number: the strongest recovery and the attack that made it; None where no attack has one.

    As in :func:`falcon_unlearn.attacks.base.worst`, attacks that need the original weights do not count.
    """
    found = [
        result
        for result in results
        if not result["uses_original"] and _is_number((result["recovery"].get("accuracy") or {}).get("value"))
    ]
    if not found:
        return None
    result = min(found, key=_strength)
    text = f"{shown(result['recovery']['accuracy'], percent=True)} by {result['attack']}"
    oracle = result["oracle"].get("accuracy")
    return f"{text} (the oracle under the same attack: {shown(oracle, percent=True)})" if oracle else text


def attack_figures(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """All recoveries side by side, relearning by step, the logit lens by layer, as far as there are any.

    Returns:
        SVG and caption of each.
    """
    by_name = {result["attack"]: result for result in results}
    bars = [
        figures.AttackBar(
            result["attack"],
            _finite(found.get("value")),
            found.get("low"),
            found.get("high"),
            (result["oracle"].get("accuracy") or {}).get("value"),
        )
        for result in sorted(results, key=_strength)
        if (found := result["recovery"].get("accuracy") or {})
    ]
    drawn = [(figures.robustness(bars), "Knowledge recovered by each attack, with 95 % intervals.")]
    if "relearn" in by_name:
        curves = _relearn_curves(by_name["relearn"])
        drawn.append((figures.relearning(curves), "Accuracy on the rest of the forget set while a model is finetuned."))
    if "logit-lens" in by_name:
        lens = figures.logit_lens(_lens_curves(by_name["logit-lens"]), "accuracy")
        drawn.append((lens, "Accuracy of answers read off the parts of each layer."))
    return [(figure, caption) for figure, caption in drawn if figure is not None]


def _lens_curves(result: Mapping[str, Any]) -> list[figures.LensCurve]:
    curves = []
    for model, run in result["models"].items():
        for component in dict.fromkeys(p["setting"]["component"] for p in run["points"]):
            points = [p for p in run["points"] if p["setting"]["component"] == component]
            curves.append(
                figures.LensCurve(
                    model,
                    component,
                    tuple(p["setting"]["layer"] for p in points),
                    tuple(_finite(p["accuracy"]) for p in points),
                    tuple(_finite(p["probability"]) for p in points),
                )
            )
    return curves


def _relearn_curves(result: Mapping[str, Any]) -> list[figures.RelearnCurve]:
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for model, run in result["models"].items():
        for p in run["points"]:
            setting = p["setting"]
            name = f"{setting['weights']}, on {setting['source']}, lr {setting['lr_at_width_128']:g}"
            curves.setdefault((model, name), []).append(p)
    return [
        figures.RelearnCurve(
            model, name, tuple(p["setting"]["step"] for p in points), tuple(_finite(p["accuracy"]) for p in points)
        )
        for (model, name), points in curves.items()
    ]


def _finite(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def attack_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of each attack, one line an attack."""
    lines = []
    for result in results:
        notes = dict.fromkeys(note for run in result["models"].values() for note in run["notes"])
        if result["uses_original"]:
            notes["a diagnosis: with the original model's weights in hand, it is no recovery and does not count"] = None
        if notes:
            lines.append(f"{result['attack']}: {'; '.join(notes)}.")
    return lines


def incomplete(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each attack that did not finish on a model."""
    return [
        f"{result['attack']} on the {name} model: {run['status']} ({run['reason']})"
        for result in results
        for name, run in result["models"].items()
        if run["status"] != "done"
    ]


def _strength(result: Mapping[str, Any]) -> float:
    value = (result["recovery"].get("accuracy") or {}).get("value")
    return -value if _is_number(value) else math.inf


def _row(result: Mapping[str, Any]) -> AttackRow:
    models = result["models"]
    unlearned, original, oracle = (models.get(name) or {} for name in ("unlearned", "original", "oracle"))
    statuses = {run["status"] for run in models.values()}
    return AttackRow(
        attack=result["attack"],
        recovery=shown(result["recovery"].get("accuracy"), percent=True),
        oracle_recovery=shown(result["oracle"].get("accuracy"), percent=True),
        before=shown(unlearned.get("accuracy_before")),
        attacked=shown(unlearned.get("accuracy")),
        oracle=shown(oracle.get("accuracy")),
        original=shown(original.get("accuracy_before")),
        seconds=f"{sum(run['seconds'] for run in models.values()):.0f} s",
        status="done" if statuses == {"done"} else ", ".join(sorted(statuses - {"done"})),
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
