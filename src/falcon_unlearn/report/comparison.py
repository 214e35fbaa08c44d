"""The table of a comparison: rows of numbers over seeds, what stands out of the noise, Markdown and one HTML page."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from scipy.stats import ttest_rel

from falcon_unlearn.artifacts import write_bytes, write_json
from falcon_unlearn.attacks.battery import ATTACKS
from falcon_unlearn.report.pareto import Point, pareto_figure

SIGNIFICANCE = 0.05
DEFECT = "defect: "
"""How the reason of a failure begins that is a defect of ours."""


@dataclass(frozen=True)
class Measure:
    """A column; only those of which more is always better can be won."""

    key: str
    label: str
    digits: int = 3
    won: bool = False


def recovered_key(attack: str) -> str:
    """Key of the accuracy under an attack, on records the attacker does not have."""
    return f"recovered {attack}"


MEASURES = (
    Measure("score", "S", won=True),
    Measure("oracle_score", "S to oracle", won=True),
    Measure("forget_probability", "forget prob"),
    Measure("forget_accuracy", "forget acc"),
    Measure("forget_accuracy_heldout", "held-out acc"),
    Measure("forget_rouge", "forget ROUGE-L"),
    Measure("model_utility", "utility"),
    Measure("kept", "kept", won=True),
    *(Measure(recovered_key(name), f"{name} acc") for name in ATTACKS),
    Measure("training_seconds", "train s", 1),
    Measure("peak_memory_mb", "peak MB", 0),
)
"""Columns that are means; forget quality stands among them seed by seed. Leaking less than the oracle is no merit."""
_QUALITY_AFTER = "forget_rouge"
_TO_ORACLE = (
    "S to oracle is S with forget prob and forget acc measured from the oracle's: 0 there and below, 1 at the original "
    "model. Knowing less than the oracle does not raise it."
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the cell.
        values: by measure (and ``leak``, ``forget_quality``, ``log10_forget_quality``), one number a seed of the
            comparison; None where there is none.
        failed: why, by seed.
        reference: the original model or the oracle.
        parameters: what tuning chose.
        validation_score: of the best trial.
        bold: keys of the measures in which this row is better than every other one beyond the noise.
    """

    name: str
    values: Mapping[str, tuple[float | None, ...]]
    failed: Mapping[int, str] = field(default_factory=dict)
    reference: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    validation_score: float | None = None
    bold: tuple[str, ...] = ()

    def present(self, key: str) -> list[float]:
        """The numbers there are, in the order of the seeds."""
        return [value for value in self.values.get(key, ()) if value is not None]

    def mean(self, key: str) -> float:
        """Over the seeds that have the number; NaN without any."""
        present = self.present(key)
        return statistics.fmean(present) if present else math.nan

    def sd(self, key: str) -> float:
        """Sample standard deviation; NaN below two numbers."""
        present = self.present(key)
        return statistics.stdev(present) if len(present) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """The table. ``rows`` stand by falling S, references first, rows without any number last."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    trials: int
    validation_share: float | None

    @property
    def defects(self) -> bool:
        """Whether a run failed by a defect of ours."""
        return any(reason.startswith(DEFECT) for row in self.rows for reason in row.failed.values())


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows by falling mean S, those without any number last, each with its clear wins."""
    by_score = sorted(rows, key=lambda row: -row.mean("score") if row.values else math.inf)
    return [dataclasses.replace(row, bold=_clear_wins(row, rows)) for row in by_score]


def _clear_wins(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    others = [other for other in rows if other is not row and other.values]
    return tuple(
        measure.key
        for measure in MEASURES
        if measure.won
        and others
        and not row.failed
        and all(beats(row.values.get(measure.key, ()), other.values.get(measure.key, ())) for other in others)
    )


def beats(ours: Sequence[float | None], theirs: Sequence[float | None]) -> bool:
    """Whether ``ours`` is higher beyond the noise: two-sided paired t-test over the seeds both have, p < .05.

    At least three such seeds. A row that must beat every other one needs no correction for their number.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    differences = [a - b for a, b in pairs]
    if len(pairs) < 3 or statistics.fmean(differences) <= 0:
        return False
    if len(set(differences)) == 1:
        return True  # the same at every seed: no noise at all
    return bool(ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue < SIGNIFICANCE)


def brief(value: Any) -> str:
    """A searched value as the table and the progress show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _mean_text(row: Row, measure: Measure) -> str:
    mean, sd = row.mean(measure.key), row.sd(measure.key)
    if not math.isfinite(mean):
        return "-"
    text = f"{mean:.{measure.digits}f}" + (f" +- {sd:.{measure.digits}f}" if math.isfinite(sd) else "")
    return f"**{text}**" if measure.key in row.bold else text


def _quality_text(row: Row) -> str:
    p_values = row.present("forget_quality")
    if not p_values:
        return "-"
    above = sum(p > SIGNIFICANCE for p in p_values)
    return " ".join(f"{p:.2g}" for p in p_values) + f" ({above} of {len(p_values)})"


def table_cells(comparison: Comparison) -> list[list[str]]:
    """The table as text, head first; ``**...**`` marks a clear win."""
    rows = comparison.rows
    names = [
        row.name + (f" ({len(row.failed)} failed)" if row.values else " (failed)") if row.failed else row.name
        for row in rows
    ]
    columns = [["", *names]]
    for measure in MEASURES:
        if any(math.isfinite(row.mean(measure.key)) for row in rows):
            columns.append([measure.label, *(_mean_text(row, measure) for row in rows)])
        if measure.key == _QUALITY_AFTER and any(row.present("forget_quality") for row in rows):
            columns.append(["forget quality p (> .05)", *map(_quality_text, rows)])
    return [list(line) for line in zip(*columns, strict=True)]


def notes_of(comparison: Comparison) -> list[str]:
    """What a reader of the table must know, a sentence or two each."""
    many = len(comparison.seeds) > 1
    notes = [
        (
            f"{'Mean +- standard deviation over seeds' if many else 'Seed'} {', '.join(map(str, comparison.seeds))}. "
            "S = kept - (forget prob + forget acc) / 2, kept = utility / utility before: 1 is perfect, doing nothing "
            "scores about 0. Forget quality is listed seed by seed, with how many are above .05."
        ),
        *([_TO_ORACLE] if any(row.present("oracle_score") for row in comparison.rows) else []),
        (
            "**Bold** (S, S to oracle and kept only) is better than every other row beyond the noise: paired t-test "
            "over the seeds, p < .05, at least three seeds. Where nothing is bold, the best value is not a finding."
        ),
    ]
    if noise := _within_noise(comparison.rows):
        notes.append(noise)
    if any(row.present(recovered_key(name)) for row in comparison.rows for name in ATTACKS):
        notes.append(
            "Columns named after an attack: accuracy under it on forget records the attacker does not have; before is "
            "the original model, oracle what one that never knew gives under the same attack."
        )
    if comparison.trials:
        notes.append(
            f"Each searched row was given {comparison.trials} trials, judged on {comparison.validation_share:.0%} of "
            "the facts; the table is made of the other facts alone."
        )
    for row in comparison.rows:
        seeds_of: dict[str, list[str]] = {}
        for seed, reason in row.failed.items():
            seeds_of.setdefault(reason, []).append(str(seed))
        notes += [f"{row.name} failed (seed {', '.join(seeds)}): {reason}" for reason, seeds in seeds_of.items()]
    for row in comparison.rows:
        if row.validation_score is not None:
            chosen = ", ".join(f"{key} {brief(value)}" for key, value in row.parameters.items())
            notes.append(f"{row.name}: {chosen} (validation S {row.validation_score:.3f})")
    return notes


def _within_noise(rows: Sequence[Row]) -> str:
    """Which rows' S cannot be told from the best one's; empty with fewer than three seeds or a single row."""
    ours = [row for row in rows if not row.reference and len(row.present("score")) >= 3]
    if len(ours) < 2:
        return ""
    best, *others = sorted(ours, key=lambda row: -row.mean("score"))
    alike = [row.name for row in others if not beats(best.values["score"], row.values["score"])]
    if not alike:
        return f"S of {best.name} is above every other row's beyond the noise (each against it alone)."
    return f"Within the noise of the best S ({best.name}), each tested against it alone: {', '.join(alike)}."


def comparison_table(comparison: Comparison) -> str:
    """The table in Markdown, aligned so that it reads well on a terminal too, and its notes."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in table_cells(comparison)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]

    def line_of(line: Sequence[str]) -> str:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        return "| " + " | ".join([line[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    lines = [line_of(cells[0]), rule, *map(line_of, cells[1:])]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes_of(comparison)), ""])


def _figure_of(comparison: Comparison) -> str | None:
    return pareto_figure(
        [
            Point(row.name, row.mean("leak"), row.mean("kept"), row.sd("leak"), row.sd("kept"), row.reference)
            for row in comparison.rows
            if row.name != "before" or not row.reference  # leaks everything: it would squeeze all others together
        ]
    )


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``table.md``, ``table.json``, ``pareto.svg`` and ``compare.html`` into ``folder``."""

    def bold(text: str) -> Markup:
        return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text))))  # noqa: S704 (escaped)

    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "table.md", comparison_table(comparison).encode())
    write_json(folder / "table.json", comparison)
    figure = _figure_of(comparison)
    if figure is not None:
        write_bytes(folder / "pareto.svg", figure.encode())
    head, *lines = ([bold(cell) for cell in line] for line in table_cells(comparison))
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(_PAGE)
    page = template.render(
        head=head,
        lines=lines,
        notes=[bold(note) for note in notes_of(comparison)],
        figure=Markup(figure or ""),  # noqa: S704 (our own drawing; matplotlib escapes the names)
    )
    write_bytes(folder / "compare.html", page.encode())


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Unlearning methods compared</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 32px auto; padding: 0 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 760px; width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Unlearning methods compared</h1>
<div class="scroll"><table>
<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in lines %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
{{ figure }}
</body>
</html>
"""
