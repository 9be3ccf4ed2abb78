"""The drawings of a sweep's page, as text."""

from __future__ import annotations

import math
import re

from dora_ray.reporting.charts import Bar, Costed, cost_and_quality, intervals

LONG = "num_objects 6, num_iterations 30, teacher_temperature 0.025"


def test_no_line_strikes_a_label_through_that_stands_above_its_bar():
    drawn = intervals([Bar(LONG, 0.3, 0.1), Bar(LONG, 0.2, 0.1)], title="", label="", references=[("chance", 0.25)])
    lines = [match.start() for match in re.finditer('class="(?:reference|rule)"', drawn)]
    grounds = [match.start() for match in re.finditer('class="ground"/><text[^>]*>num_objects 6', drawn)]
    assert len(grounds) == 2
    assert max(lines) < min(grounds), "what is drawn later covers what was drawn before"
    assert "ground" not in intervals([Bar("short", 0.3, 0.1)], title="", label="")


def test_cost_and_quality_has_intervals_and_numbers_the_front_from_the_cheapest():
    points = [
        Costed("dear", 90, 31.0, 0.5, True),
        Costed("cheap", 30, 30.0, 0.5, True),
        Costed("worse", 60, 29.0, math.inf, False),
    ]
    drawn = cost_and_quality(points, metric="knn, %", cost="seconds")
    assert drawn.count('class="outer c1 pale"') == 2
    assert 'class="outer c0 pale"' not in drawn, "an interval that is not known is not drawn"
    assert "Not beaten in both: cheap, dear." in drawn
    heights = dict(re.findall(r'y="([\d.]+)" text-anchor="(?:start|end)" class="halo">(\d)', drawn))
    first, second = (float(y) for y, _ in sorted(heights.items(), key=lambda entry: entry[1]))
    assert first > second, "the cheaper is the lower one here"
