"""Figures of the attacks, as inline SVG in the style of the report's other figures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.figure import Figure

from falcon_unlearn.report.figures import (
    METADATA,
    RULE,
    STYLES,
    TEXT,
    Chart,
    Curve,
    Panel,
    Role,
    draw,
    inline,
    plain_axes,
)

Measure = Literal["accuracy", "probability"]

_ROLES: dict[str, Role] = {"original": "retain", "unlearned": "forget", "oracle": "score"}
_LIMITS = (-0.04, 1.04)
_MAX_NAME = 28
_INCHES_PER_PANEL = 1.5
_INCHES_PER_BAR = 0.3


@dataclass(frozen=True)
class LensCurve:
    """What the logit lens finds in one component of one model, layer by layer; NaN where there is no number.

    Attributes:
        model: ``original``, ``unlearned``, ``oracle``, or any other name.
        component: ``attention``, ``mlp`` or ``residual``.
        layers: in rising order.
        accuracy: of each layer, 0 to 1.
        probability: of each layer, 0 to 1.
    """

    model: str
    component: str
    layers: tuple[int, ...]
    accuracy: tuple[float, ...]
    probability: tuple[float, ...]


@dataclass(frozen=True)
class RelearnCurve:
    """What a model says again after some steps of relearning.

    Attributes:
        model: as in :class:`LensCurve`.
        setting: what was trained and how, one panel each (``lr 1e-3``).
        steps: in rising order; curves of one figure share them, or have gaps.
        recovered: recovered accuracy after so many steps.
    """

    model: str
    setting: str
    steps: tuple[int, ...]
    recovered: tuple[float, ...]


@dataclass(frozen=True)
class AttackBar:
    """The outcome of one attack.

    Attributes:
        attack: its name.
        recovered: 0 as the unlearned model, 1 as the original; NaN where the attack gave nothing.
        low: of its interval, None where there is none.
        high: the same.
        oracle: what the attacked oracle has on the same scale, None where there is none.
    """

    attack: str
    recovered: float
    low: float | None = None
    high: float | None = None
    oracle: float | None = None


def logit_lens(curves: Sequence[LensCurve], measure: Measure = "probability") -> str | None:
    """One panel a component, one line a model, over layers; None without any number."""
    layers = sorted({layer for curve in curves for layer in curve.layers})
    components = list(dict.fromkeys(curve.component for curve in curves))

    def values(curve: LensCurve) -> Sequence[float]:
        return curve.accuracy if measure == "accuracy" else curve.probability

    panels = [
        Panel(
            component,
            [
                Curve(c.model, _spread(c.layers, values(c), layers), _role(c.model))
                for c in curves
                if c.component == component
            ],
            limits=_LIMITS,
        )
        for component in components
    ]
    last = [(c.model, value) for c in curves if c.component == "residual" for value in values(c)[-1:]]
    alt = f"Logit lens: {measure} of the right answer at {len(layers)} layers, by {', '.join(components)}."
    alt += "".join(f" {model} {value:.2f} behind the last layer." for model, value in last if math.isfinite(value))
    return draw(
        Chart(f"lens-{measure}", alt, layers, "layer", panels, height=_INCHES_PER_PANEL * max(len(panels), 1) + 0.5)
    )


def relearning(curves: Sequence[RelearnCurve]) -> str | None:
    """One panel a setting, one line a model: recovered accuracy over steps; None without any number."""
    steps = sorted({step for curve in curves for step in curve.steps})
    settings = list(dict.fromkeys(curve.setting for curve in curves))
    panels = [
        Panel(
            setting,
            [
                Curve(c.model, _spread(c.steps, c.recovered, steps), _role(c.model))
                for c in curves
                if c.setting == setting
            ],
            limits=_LIMITS,
        )
        for setting in settings
    ]
    alt = f"Accuracy recovered by relearning over {len(steps)} step counts, for {', '.join(settings)}."
    highest = _highest(curves, lambda curve: max(filter(math.isfinite, curve.recovered), default=math.nan))
    if highest is not None:
        alt += f" Highest: {highest[1]:.2f} ({highest[0].model}, {highest[0].setting})."
    height = _INCHES_PER_PANEL * max(len(panels), 1) + 0.5
    return draw(Chart("relearning", alt, steps, "step", panels, height=height))


def robustness(bars: Sequence[AttackBar]) -> str | None:
    """A bar with its interval for each attack and a mark for the oracle under it, the worst on top; None without any.

    An attack without a result keeps its row.
    """
    if not any(math.isfinite(bar.recovered) for bar in bars):
        return None
    rows = sorted(bars, key=lambda bar: bar.recovered if math.isfinite(bar.recovered) else -math.inf)
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "robustness", "font.size": 10, "text.parse_math": False}
    ):
        figure = Figure(figsize=(4.8, 0.8 + _INCHES_PER_BAR * len(rows)), layout="constrained")
        ax = figure.subplots()
        for place, bar in enumerate(rows):
            if not math.isfinite(bar.recovered):
                ax.text(0.01, place, "no result", color=TEXT, va="center", fontsize=9)
                continue
            ax.barh(place, bar.recovered, height=0.55, color=STYLES["forget"][0], lw=0)
            if bar.low is not None and bar.high is not None:
                ax.plot([bar.low, bar.high], [place, place], color=TEXT, lw=1.2, marker="|", ms=5)
        oracles = [(bar.oracle, place) for place, bar in enumerate(rows) if bar.oracle is not None]
        if oracles:
            color, _, _ = STYLES["score"]
            ax.plot(*zip(*oracles, strict=True), color=color, ls="", marker="D", ms=5, label="oracle", zorder=3)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor=TEXT, borderpad=0)
        ax.set_yticks(range(len(rows)), [bar.attack[:_MAX_NAME] for bar in rows])
        ax.set_ylim(-0.6, len(rows) - 0.4)
        for x in (0, 1):
            ax.axvline(x, color=RULE, lw=1, zorder=0)
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, -0.04), max(high, 1.04))
        ax.set_xlabel("recovered: 0 as unlearned, 1 as the original", color=TEXT)
        plain_axes(ax, "x")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    worst = rows[-1]
    alt = f"Knowledge recovered by {len(rows)} attacks; the most by {worst.attack}: {worst.recovered:.2f}."
    return inline(buffer.getvalue(), alt)


def _role(model: str) -> Role:
    return _ROLES.get(model, "null")


def _spread(places: Sequence[int], values: Sequence[float], everywhere: Sequence[int]) -> list[float]:
    known = dict(zip(places, values, strict=True))
    return [known.get(place, math.nan) for place in everywhere]


def _highest(curves: Sequence[RelearnCurve], top: Callable[[RelearnCurve], float]) -> tuple[RelearnCurve, float] | None:
    found = [(curve, top(curve)) for curve in curves if math.isfinite(top(curve))]
    return max(found, key=lambda entry: entry[1]) if found else None
