"""The sustainability curve of a line of deletion requests: its records, its table, its figure and its page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from falcon_unlearn.artifacts import Estimate, write_bytes, write_json
from falcon_unlearn.console import in_columns, number
from falcon_unlearn.report.figures import METADATA, STYLES, TEXT, inline, plain_axes
from falcon_unlearn.report.robustness import shown

MEASURES = ("accuracy", "probability", "accuracy_heldout")
"""Of forget sets, as far as there is a number."""


@dataclass(frozen=True)
class Request:
    """One deletion request: its run folder, its patch's id, and how many forget records were scored."""

    number: int
    run: str
    patch: str
    scored: int


@dataclass(frozen=True)
class Point:
    """The model after ``requests`` requests.

    Attributes:
        requests: how many were carried out; 0 is the base.
        utility: model utility.
        forget: by number of the request, its forget set's measures; also of the request to come, before it.
    """

    requests: int
    utility: Estimate
    forget: Mapping[int, Mapping[str, Estimate]]

    def worst(self, measure: str = "accuracy") -> float | None:
        """The highest value of any forget set whose request was carried out."""
        known = [
            estimate.value
            for request, values in self.forget.items()
            if request <= self.requests and (estimate := values.get(measure)) is not None and estimate.value is not None
        ]
        return max(known, default=None)


@dataclass(frozen=True)
class Sustainability:
    """The curve, its requests, and what must be known to read it."""

    requests: Sequence[Request]
    points: Sequence[Point]
    notes: Sequence[str] = field(default_factory=tuple)


def sustainability_table(curve: Sustainability) -> str:
    """One row a number of requests: utility, and each forget set's accuracy and probability."""
    head = ["requests", "utility", "95 % interval", "worst accuracy"]
    head += [f"{request.number}: acc / prob" for request in curve.requests]
    rows = [head]
    for point in curve.points:
        bounds = "" if point.utility.low is None else f"{number(point.utility.low)} .. {number(point.utility.high)}"
        row = [str(point.requests), number(point.utility.value), bounds, number(point.worst())]
        rows.append(row + [_pair(point.forget.get(request.number)) for request in curve.requests])
    lines = [in_columns(rows)]
    lines += [f"{request.number}  {request.run}" for request in curve.requests]
    return "\n".join([*lines, *(f"- {note}" for note in curve.notes)])


def _pair(found: Mapping[str, Estimate] | None) -> str:
    if not found:
        return ""
    values = [found[name].value if name in found else None for name in ("accuracy", "probability")]
    return " / ".join(map(number, values))


def sustainability_figure(curve: Sustainability) -> str | None:
    """Utility with its interval, and each forget set's accuracy, over the number of requests; None without a number.

    A forget set's line begins before its request and bears the request's number. Hollow points are before it.
    """
    points = curve.points
    utility = [math.nan if p.utility.value is None else p.utility.value for p in points]
    if not any(map(math.isfinite, utility)) and not any(p.forget for p in points):
        return None
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "sustainability", "font.size": 10, "text.parse_math": False}
    ):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_utility(above, points, utility)
        for request in curve.requests:
            _draw_forget(below, points, request.number)
        below.set_ylabel("forget accuracy", color=TEXT)
        below.set_xlabel("requests carried out", color=TEXT)
        for ax in (above, below):
            ax.set_ylim(-0.04, 1.08)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            plain_axes(ax, "y")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    last = points[-1]
    alt = (
        f"Model utility {number(utility[0])} before and {number(utility[-1])} after {last.requests} requests; the "
        f"highest accuracy of a forget set is then {number(last.worst())}."
    )
    return inline(buffer.getvalue(), alt)


def _draw_utility(ax: Axes, points: Sequence[Point], utility: Sequence[float]) -> None:
    color, marker, _ = STYLES["retain"]
    ax.plot([p.requests for p in points], utility, color=color, marker=marker, lw=1.5, ms=4)
    for p in points:
        if p.utility.low is not None and p.utility.high is not None:
            ax.vlines(p.requests, p.utility.low, p.utility.high, color=color, lw=1)
    ax.set_ylabel("model utility", color=TEXT)


def _draw_forget(ax: Axes, points: Sequence[Point], request: int) -> None:
    color, marker, _ = STYLES["forget"]
    found = [
        (p.requests, p.forget[request]["accuracy"].value) for p in points if "accuracy" in p.forget.get(request, {})
    ]
    drawn = [(k, value) for k, value in found if value is not None]
    if not drawn:
        return
    ax.plot([k for k, _ in drawn], [value for _, value in drawn], color=color, lw=1)
    for k, value in drawn:
        ax.plot(k, value, color=color, marker=marker, ms=5, mfc="none" if k < request else color, ls="")
    ax.annotate(str(request), drawn[0], xytext=(0, 5), textcoords="offset points", ha="center", color=TEXT, fontsize=9)


def write_sustainability(curve: Sustainability, folder: Path) -> None:
    """Write ``sustainability.json`` and ``sustainability.html`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sustainability.json", curve)
    rows = [
        (point.requests, shown(_plain(point.utility)), [_cells(point, request.number) for request in curve.requests])
        for point in curve.points
    ]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(_PAGE)
    page = template.render(
        requests=curve.requests,
        rows=rows,
        notes=curve.notes,
        figure=Markup(sustainability_figure(curve) or ""),  # noqa: S704 (our own drawing)
    )
    write_bytes(folder / "sustainability.html", page.encode())


def _plain(estimate: Estimate | None) -> Mapping[str, float | None]:
    return {} if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _cells(point: Point, request: int) -> tuple[str, str, bool]:
    found = point.forget.get(request, {})
    accuracy, probability = (str(shown(_plain(found.get(name)))) for name in ("accuracy", "probability"))
    return accuracy, probability, request > point.requests


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Deletion requests, one after another</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 32px auto; padding: 0 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.before { opacity: .6; }
svg { max-width: 760px; width: 100%; height: auto; margin-top: 24px; }
</style>
</head>
<body>
<h1>Deletion requests, one after another</h1>
<p>Each request was trained on the model that the requests before it had left. A row is the model after so many of them;
grey is a forget set before its own request. Intervals are 95 % bootstrap intervals.</p>
<div class="scroll"><table>
<thead>
<tr><th scope="col" rowspan="2">requests</th><th scope="col" rowspan="2">model utility</th>
{% for request in requests %}<th scope="colgroup" colspan="2">forget set {{ request.number }}</th>{% endfor %}</tr>
<tr>{% for request in requests %}<th scope="col">accuracy</th><th scope="col">probability</th>{% endfor %}</tr>
</thead>
<tbody>
{% for k, utility, cells in rows %}
<tr><td>{{ k }}</td><td>{{ utility }}</td>
{% for accuracy, probability, before in cells %}<td{% if before %} class="before"{% endif %}>{{ accuracy }}</td>
<td{% if before %} class="before"{% endif %}>{{ probability }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{{ figure }}
<h2>Requests</h2>
<ol>
{% for request in requests %}
<li>{{ request.run }} (patch {{ request.patch[:12] }}, {{ request.scored }} forget records scored)</li>
{% endfor %}
</ol>
{% if notes %}<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<p>What is not shown: whether an earlier forget set comes back under attack. Attack the last run with its records:
<code>falcon-unlearn attack RUN --attack relearn logit-lens --out DIR forget=RECORDS</code>.</p>
</body>
</html>
"""
