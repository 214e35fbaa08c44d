"""Well-formed figures that show every attack and curve there is, the same each time."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from falcon_unlearn.report import figures
from falcon_unlearn.report.attack_figures import AttackBar, LensCurve, RelearnCurve, logit_lens, relearning, robustness

LENS = [
    LensCurve(model, component, (0, 1, 2), (0.0, low, high), (0.1, low, high))
    for model, low, high in (("original", 0.6, 1.0), ("unlearned", 0.4, 0.2), ("oracle", 0.05, 0.04))
    for component in ("attention", "mlp", "residual")
]
RELEARN = [
    RelearnCurve(model, setting, (0, 5, 20), (0.0, 0.1, high))
    for model, high in (("unlearned", 0.6), ("oracle", 0.05))
    for setting in ("lr 1e-4", "lr 1e-3")
]
BARS = [
    AttackBar("relearn", 0.6, 0.4, 0.8, 0.02),
    AttackBar("gcg <b>&", 0.1, None, None, None),
    AttackBar("quantize", math.nan),
    AttackBar("probe", -0.05, -0.2, 0.1, -0.1),
]
ALL = {
    "lens": lambda: logit_lens(LENS),
    "lens accuracy": lambda: logit_lens(LENS, "accuracy"),
    "relearning": lambda: relearning(RELEARN),
    "robustness": lambda: robustness(BARS),
}


def words(svg):
    return [element.text for element in ET.fromstring(svg.replace("xlink:href", "href")).iter() if element.text]


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_xml_the_same_each_time_and_takes_the_pages_colours(name):
    svg = ALL[name]()
    assert svg == ALL[name]()
    ET.fromstring(svg.replace("xlink:href", "href"))
    assert svg.startswith("<svg viewBox=")
    assert 'role="img"' in svg
    assert len(svg) < 40_000
    colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}", svg))
    assert not colours & set(figures._COLORS)


def test_the_lens_has_a_panel_for_each_component_and_a_line_for_each_model():
    found = words(logit_lens(LENS))
    for word in ("attention", "mlp", "residual"):
        assert found.count(word) == 1
    for model in ("original", "unlearned", "oracle"):
        assert found.count(model) == 3
    assert "unlearned 0.20 behind the last layer" in logit_lens(LENS)
    assert logit_lens(LENS, "accuracy") != logit_lens(LENS)


def test_curves_over_different_layers_share_an_axis():
    shorter = [LensCurve("original", "residual", (0, 2), (0.0, 1.0), (0.0, 1.0)), LENS[5]]
    assert "at 3 layers" in logit_lens(shorter)


def test_relearning_has_a_panel_for_each_setting():
    svg = relearning(RELEARN)
    found = words(svg)
    assert found.count("lr 1e-4") == found.count("lr 1e-3") == 1
    assert "Highest: 0.60 (unlearned, lr 1e-4)" in svg


def test_every_attack_has_its_row_and_the_worst_is_named():
    svg = robustness(BARS)
    found = words(svg)
    for bar in BARS:
        assert found.count(bar.attack) == 1
    assert found.count("no result") == 1
    assert found.count("oracle") == 1
    assert "the most by relearn: 0.60" in svg
    assert words(robustness([BARS[1]])).count("oracle") == 0


def test_no_figure_without_a_number():
    nothing = (math.nan,) * 3
    assert logit_lens([]) is None
    assert logit_lens([LensCurve("original", "residual", (0, 1, 2), nothing, nothing)]) is None
    assert relearning([]) is None
    assert relearning([RelearnCurve("oracle", "lr 1", (0, 1, 2), nothing)]) is None
    assert robustness([]) is None
    assert robustness([AttackBar("probe", math.nan)]) is None
