"""``model_card.md``: what was done to a model and what it is worth, in the hub's format, to go with the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from falcon_unlearn.artifacts import write_bytes
from falcon_unlearn.console import number
from falcon_unlearn.report.robustness import AttackRow, attack_notes, attack_rows, incomplete, shown, worst_recovery

CARD_FILE = "model_card.md"

_MEASURES = (
    ("forget_probability", "forget probability"),
    ("forget_accuracy", "forget accuracy"),
    ("forget_accuracy_heldout", "forget accuracy, held-out phrasing"),
    ("forget_rouge", "forget ROUGE-L"),
    ("forget_quality", "forget quality (p)"),
    ("model_utility", "model utility"),
)
_LIMITS = (
    "The numbers hold for the questions that were asked and the attacks that were run, with their settings. "
    "Unlearning that a finetuning attack or a look at the hidden states undoes is masking, not erasure."
)


def write_card(run: Path) -> Path:
    """Write ``model_card.md`` of a finished run from its files, atomically, and return its path."""
    metrics = _read(run / "metrics.json")
    attacks = _read(run / "attacks.json")
    provenance = _read(run / "provenance.json") or {}
    path = run / CARD_FILE
    write_bytes(path, build_card(metrics or {}, provenance, (attacks or {}).get("attacks") or ()).encode())
    return path


def build_card(metrics: Mapping[str, Any], provenance: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]]) -> str:
    """The card as Markdown.

    Args:
        metrics: content of ``metrics.json``.
        provenance: content of ``provenance.json``.
        attacks: ``attacks`` of ``attacks.json``; empty where none were run.
    """
    model, method = provenance.get("model") or {}, provenance.get("method") or {}
    name = str(model.get("name") or "")
    on_hub = {} if Path(name).is_absolute() or not name else {"base_model": name}
    front = yaml.safe_dump({**on_hub, "tags": ["unlearning", "falcon-unlearn"]}, sort_keys=False)
    parts = [
        f"---\n{front}---",
        "# Unlearned model",
        f"Made from `{model.get('name')}` with falcon-unlearn, method `{method.get('name')}`, preset "
        f"`{method.get('preset')}`, seed {provenance.get('seed')}. The forget data is named by its SHA-256 alone: "
        + ", ".join(f"{name} `{digest[:16]}`" for name, digest in (provenance.get("data") or {}).items())
        + ".",
        *_earlier(provenance.get("after") or ()),
        "## What it forgot and kept",
        _metrics_table(metrics),
        "Intervals are 95 % bootstrap intervals over entities, or over samples where records name no entity. "
        + (
            "The oracle is a model that never saw the forget data."
            if metrics.get("oracle")
            else "There was no oracle, so there is no forget quality."
        ),
        "## Attacks",
        _attacks_text(attacks),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _earlier(ids: Sequence[str]) -> list[str]:
    if not ids:
        return []
    return [
        f"It stands on {len(ids)} earlier deletion request{'s' * (len(ids) > 1)}, each a patch of the same base: "
        + ", ".join(f"`{name[:16]}`" for name in ids)
        + ". What is said below as *before* has those."
    ]


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    models = [name for name in ("before", "after", "oracle") if metrics.get(name)]
    if not models:
        return "Nothing was scored."
    rows = [["", *models]]
    for key, label in _MEASURES:
        cells = []
        for name in models:
            low, high = (metrics[name].get("intervals") or {}).get(key) or (None, None)
            value = {"value": metrics[name].get(key), "low": low, "high": high}
            cells.append(str(shown(value)) if low is not None else number(value["value"]))
        rows.append([label, *cells])
    return _table(rows)


def _attacks_text(attacks: Sequence[Mapping[str, Any]]) -> str:
    if not attacks:
        return "None were run: whether the knowledge comes back by finetuning, quantisation or prompts is not known."
    head = ["attack", "recovered", "oracle's", "accuracy before", "under attack", "oracle under attack", "original", ""]
    rows = [head, *(_cells(row) for row in attack_rows(attacks))]
    worst = worst_recovery(attacks)
    first = [f"**Strongest recovery: {worst}.** 0 % is the unlearned model, 100 % the original, both without attack."]
    lines = [f"- {line}" for line in (*incomplete(attacks), *attack_notes(attacks))]
    return "\n\n".join([*(first if worst else ()), _table(rows), "\n".join(lines)])


def _cells(row: AttackRow) -> list[str]:
    estimates = (row.recovery, row.oracle_recovery, row.before, row.attacked, row.oracle, row.original)
    return [row.attack, *map(str, estimates), "" if row.status == "done" else row.status]


def _table(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
