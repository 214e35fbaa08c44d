"""Figures of the report: line charts as inline SVG whose colours are the page's CSS variables."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from falcon_unlearn.artifacts import LayerSelection, MutualInformationCurve, StepRecord

MAX_POINTS = 300

Role = Literal["forget", "retain", "score", "null"]

# Okabe and Ito's palette, which stays apart for colour-blind readers; the page overrides each by its CSS variable.
_COLORS = {
    "#0072b2": "var(--retain, #0072b2)",
    "#d55e00": "var(--forget, #d55e00)",
    "#009e73": "var(--score, #009e73)",
    "#cc79a7": "var(--null, #cc79a7)",
    "#767676": "var(--muted, #767676)",
    "#d0d0d0": "var(--rule, #d0d0d0)",
    "#e8e8e8": "var(--band, #e8e8e8)",
}
_MAX_LABEL = 24
METADATA = ("Date", "Creator", "Format", "Type")
TEXT, RULE, _BAND = "#767676", "#d0d0d0", "#e8e8e8"
STYLES: dict[Role, tuple[str, str, str]] = {
    "retain": ("#0072b2", "s", "--"),
    "forget": ("#d55e00", "^", "-."),
    "score": ("#009e73", "o", "-"),
    "null": ("#cc79a7", "D", ":"),
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel; NaN leaves a gap. The role gives colour, marker and dash."""

    label: str
    y: Sequence[float]
    role: Role

    @property
    def is_drawable(self) -> bool:
        """Whether there is any number."""
        return any(math.isfinite(value) for value in self.y)


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``limits`` of None follow the data, ``zero`` draws the line y = 0."""

    label: str
    curves: Sequence[Curve]
    limits: tuple[float, float] | None = None
    zero: bool = False


@dataclass(frozen=True)
class Chart:
    """Panels above each other on one x axis.

    Attributes:
        name: keeps the ids of charts on one page apart.
        bands: x values to mark.
        plain: single solid lines that the panel's label names; else dashes, markers and a legend.
    """

    name: str
    alt: str
    x: Sequence[float]
    x_label: str
    panels: Sequence[Panel]
    bands: Sequence[int] = ()
    height: float = 3.0
    plain: bool = False


def layer_scores(selection: LayerSelection) -> str | None:
    """Score of each tried layer with its named parts, trained layers marked; None where nothing was scored."""
    scores = selection.scores
    if not any(math.isfinite(score.score) for score in scores):
        return None
    parts = {name: None for score in scores for name in score.details}
    roles: dict[str, Role] = {"forget_left": "forget", "retain_kept": "retain"}
    curves = [Curve("score", [s.score for s in scores], "score")]
    curves += [
        Curve(
            part.replace("_", " ")[:_MAX_LABEL],
            [s.details.get(part, math.nan) for s in scores],
            roles.get(part, "null"),
        )
        for part in parts
    ]
    best = max((s for s in scores if math.isfinite(s.score)), key=lambda s: s.score)
    return draw(
        Chart(
            "layers",
            f"Selection score of {len(scores)} layers: highest at layer {best.layer} ({best.score:.2f}). "
            + _trained(selection.layers),
            [s.layer for s in scores],
            "layer",
            [Panel("trial score", curves, zero=True)],
            bands=selection.layers,
        )
    )


def mutual_information(curve: MutualInformationCurve, trained: Sequence[int]) -> str | None:
    """The published estimate of each layer and its two nulls, trained layers marked; None without any number."""
    if not any(math.isfinite(value) for value in curve.value):
        return None
    curves = [
        Curve("estimate", curve.value, "score"),
        Curve("null: retain data", curve.null_retain, "retain"),
        Curve("null: shuffled", curve.null_permutation, "null"),
    ]
    low = min((value, layer) for value, layer in zip(curve.value, curve.layers, strict=True) if math.isfinite(value))
    return draw(
        Chart(
            "information",
            f"Estimated mutual information of {len(curve.layers)} layers with two nulls: lowest at layer {low[1]} "
            f"({low[0]:.1f} nats). " + _trained(trained),
            curve.layers,
            "layer",
            [Panel("nats", curves)],
            bands=trained,
        )
    )


def losses(steps: Sequence[StepRecord]) -> str | None:
    """Forget and retain loss over steps, each on its own scale; None without any number."""
    thin = _thinned(steps)
    panels = [
        Panel("forget loss", [Curve("forget loss", [s.forget_loss for s in thin], "forget")]),
        Panel("retain loss", [Curve("retain loss", [s.retain_loss for s in thin], "retain")]),
    ]
    first, last = (steps[0], steps[-1]) if steps else (None, None)
    alt = (
        f"Losses over {len(steps)} steps: forget {first.forget_loss:.3g} to {last.forget_loss:.3g}, "
        f"retain {first.retain_loss:.3g} to {last.retain_loss:.3g}."
        if first and last
        else ""
    )
    return draw(Chart("losses", alt, [s.step for s in thin], "step", panels, height=3.4, plain=True))


def gradient_conflict(steps: Sequence[StepRecord]) -> str | None:
    """Cosine of forget and retain gradient, and the share of tensors in conflict, over steps; None without any."""
    thin = _thinned(steps)
    panels = [
        Panel("cosine", [Curve("cosine", [s.cosine for s in thin], "score")], zero=True),
        Panel("conflicts", [Curve("share in conflict", [s.conflicts for s in thin], "null")], limits=(-0.04, 1.04)),
    ]
    known = [s.conflicts for s in steps if math.isfinite(s.conflicts)]
    mean = f" On average {sum(known) / len(known):.0%} of the tensors were in conflict." if known else ""
    alt = f"Cosine of forget and retain gradients and share of tensors in conflict over {len(steps)} steps.{mean}"
    return draw(Chart("conflict", alt, [s.step for s in thin], "step", panels, height=3.4, plain=True))


def points_per_mean(steps: int) -> int:
    """How many steps one point of a chart is the mean of."""
    return max(1, math.ceil(steps / MAX_POINTS))


def _trained(layers: Sequence[int]) -> str:
    return f"Trained: {', '.join(map(str, layers))}."


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _thinned(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """At most :data:`MAX_POINTS` records: means over consecutive steps, each standing at its first step."""
    width = points_per_mean(len(steps))
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    return [
        StepRecord(
            step=group[0].step,
            forget_loss=_mean([s.forget_loss for s in group]),
            retain_loss=_mean([s.retain_loss for s in group]),
            forget_grad_norm=_mean([s.forget_grad_norm for s in group]),
            retain_grad_norm=_mean([s.retain_grad_norm for s in group]),
            cosine=_mean([s.cosine for s in group]),
            conflicts=_mean([s.conflicts for s in group]),
            seconds=_mean([s.seconds for s in group]),
        )
        for group in groups
    ]


def draw(chart: Chart) -> str | None:
    """The chart as inline SVG in the page's colours; None without any number."""
    panels = [panel for panel in chart.panels if any(curve.is_drawable for curve in panel.curves)]
    if not panels:
        return None
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 10, "text.parse_math": False}
    ):
        figure = Figure(figsize=(4.8, chart.height), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            _draw_panel(chart, panel, ax)
        axes[-1].set_xlabel(chart.x_label, color=TEXT)
        figure.align_ylabels(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    return inline(buffer.getvalue(), chart.alt)


def _draw_panel(chart: Chart, panel: Panel, ax: Axes) -> None:
    for layer in chart.bands:
        ax.axvspan(layer - 0.3, layer + 0.3, color=_BAND, lw=0)
    if panel.zero:
        ax.axhline(0, color=RULE, lw=1)
    for curve in panel.curves:
        if curve.is_drawable:
            color, marker, dash = STYLES[curve.role]
            if chart.plain:
                marker, dash = "" if len(curve.y) > 1 else "o", "-"
            ax.plot(chart.x, curve.y, color=color, ls=dash, marker=marker, lw=1.5, ms=4, label=curve.label)
    ax.set_ylabel(panel.label, color=TEXT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if panel.limits is not None:
        ax.set_ylim(*panel.limits)
    plain_axes(ax, "y")
    if not chart.plain:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            frameon=False,
            labelcolor=TEXT,
            borderaxespad=0.2,
            columnspacing=1,
            handletextpad=0.5,
            borderpad=0,
        )


def plain_axes(ax: Axes, grid: Literal["x", "y"]) -> None:
    """Grid lines across one axis, a line below, no ticks."""
    ax.grid(axis=grid, color=RULE, lw=0.5)
    ax.set_axisbelow(True)
    ax.tick_params(colors=TEXT, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(RULE)


def inline(svg: str, alt: str) -> str:
    """Cut a standalone SVG down to what belongs into a page: no prologue, no foreign style, no ids but used ones."""
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    body = re.sub("|".join(_COLORS), lambda match: _COLORS[match[0]], body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg {view_box[0]} role="img" aria-label="{html.escape(alt)}">{body.strip()}'
