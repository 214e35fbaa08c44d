"""The front, and a figure that is well-formed whatever the rows are called."""

import math
import random
import xml.etree.ElementTree as ET

from falcon_unlearn.report.pareto import Point, pareto_figure, pareto_front


def test_the_front_is_what_nothing_dominates():
    rng = random.Random(0)
    for _ in range(50):
        points = [Point(str(i), rng.randrange(6) / 5, rng.randrange(6) / 5) for i in range(12)]
        front = pareto_front(points)
        for point in points:
            better = [
                o
                for o in points
                if (o.leak < point.leak and o.kept >= point.kept) or (o.leak <= point.leak and o.kept > point.kept)
            ]
            assert (point in front) == (not better)
        assert [p.leak for p in front] == sorted((p.leak for p in front), reverse=True)
        assert [p.kept for p in front] == sorted((p.kept for p in front), reverse=True)


def test_a_reference_is_never_on_the_front():
    oracle, method = Point("oracle", 0.0, 1.0, reference=True), Point("method", 0.1, 0.9)
    assert pareto_front([oracle, method]) == [method]


def test_the_figure_is_xml_with_every_name_once_and_the_same_each_time():
    points = [Point("a<b>&$x$", 0.1, 0.9, 0.01, 0.02), Point("c", 0.2, 0.8), Point("lost", math.nan, 0.8)]
    figure = pareto_figure(points)
    texts = [element.text for element in ET.fromstring(figure).iter() if element.tag.endswith("}text")]
    assert texts.count("a<b>&$x$") == 1
    assert texts.count("c") == 1
    assert "lost" not in texts
    assert figure == pareto_figure(points)


def test_no_figure_without_a_point():
    assert pareto_figure([]) is None
    assert pareto_figure([Point("a", math.nan, 1.0)]) is None
