"""The figure of a comparison: what leaks against what is kept, with the Pareto front, as one SVG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT, RULE, _MARK, _FRONT, _REFERENCE = "#767676", "#d0d0d0", "#0072b2", "#d55e00", "#767676"
_MAX_NAME = 28
_INCHES_PER_NAME = 0.17


@dataclass(frozen=True)
class Point:
    """One row of the table.

    Attributes:
        name: shown beside the point.
        leak: mean of forget probability and forget accuracy, 0 to 1; less is better.
        kept: share of the model utility that is left; more is better.
        leak_sd: standard deviation over seeds, NaN where there is none.
        kept_sd: the same.
        reference: an original or oracle model, drawn hollow and never part of the front.
    """

    name: str
    leak: float
    kept: float
    leak_sd: float = math.nan
    kept_sd: float = math.nan
    reference: bool = False


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in one respect without being worse in the other, by falling leak.

    References are left out. Means alone count: a point on the front need not differ from its neighbours by more
    than the noise.
    """
    rated = [p for p in points if not p.reference]
    front = [
        p
        for p in rated
        if not any(o.leak <= p.leak and o.kept >= p.kept and (o.leak < p.leak or o.kept > p.kept) for o in rated)
    ]
    return sorted(front, key=lambda p: (-p.leak, -p.kept))


def pareto_figure(points: Sequence[Point]) -> str | None:
    """Draw the points with error bars, their names and the front; None without any finite point.

    Returns:
        An ``<svg>`` element that is a file of its own as well as a part of a page.
    """
    shown = [p for p in points if math.isfinite(p.leak) and math.isfinite(p.kept)]
    if not shown:
        return None
    front = pareto_front(shown)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pareto", "font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=(7.2, max(3.8, 0.9 + _INCHES_PER_NAME * len(shown))))
        ax = figure.subplots()
        figure.subplots_adjust(left=0.1, right=0.7, top=0.97, bottom=0.14)
        ax.plot(
            [p.leak for p in front], [p.kept for p in front], color=_FRONT, lw=1.2, ls="--", zorder=2, label="front"
        )
        for point in shown:
            _draw_point(ax, point, on_front=point in front)
        ax.set_xlabel("leak: (forget probability + forget accuracy) / 2, less is better", color=TEXT)
        ax.set_ylabel("share of model utility kept", color=TEXT)
        ax.grid(color=RULE, lw=0.5)
        ax.set_axisbelow(True)
        ax.tick_params(colors=TEXT, length=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(RULE)
        _draw_names(ax, shown)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    names = ", ".join(p.name for p in front)
    alt = f"Leak against utility kept of {len(shown)} rows. On the front, from most to least leak: {names}."
    return _standalone(buffer.getvalue(), alt)


def _draw_point(ax: Axes, point: Point, *, on_front: bool) -> None:
    color = _REFERENCE if point.reference else _FRONT if on_front else _MARK
    ax.errorbar(
        [point.leak],
        [point.kept],
        xerr=[point.leak_sd] if math.isfinite(point.leak_sd) else None,
        yerr=[point.kept_sd] if math.isfinite(point.kept_sd) else None,
        color=color,
        marker="D" if point.reference else "o",
        markerfacecolor="none" if point.reference else color,
        ms=5,
        lw=1,
        capsize=2,
        zorder=3,
    )


def _draw_names(ax: Axes, points: Sequence[Point]) -> None:
    """Names in a column on the right, in the order of the points' heights, so that they never lie on each other."""
    low, high = ax.get_ylim()
    gap = (high - low) / (len(points) + 1)
    for place, point in enumerate(sorted(points, key=lambda p: (p.kept, -p.leak)), start=1):
        ax.annotate(
            point.name[:_MAX_NAME],
            xy=(point.leak, point.kept),
            xytext=(1.03, low + place * gap),
            textcoords=ax.get_yaxis_transform(),
            va="center",
            color=TEXT,
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": RULE, "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def _standalone(svg: str, alt: str) -> str:
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {view_box[0]} role="img" aria-label="{html.escape(alt)}">{body.strip()}\n'
