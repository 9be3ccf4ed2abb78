"""scripts/keep_answer.py: what stays in docs/results of a finished sweep."""

from __future__ import annotations

import json
import platform
import sys
import xml.etree.ElementTree as ET

import pytest

from scripts import keep_answer
from tests.tuning.folders import write_crossed


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder that an answer is kept in: IoU depends on the number of objects, and so do random encoders."""
    space = {"tracking.num_objects": [1, 6], "tracking.num_iterations": [0, 30]}
    figures = {
        "j_and_f": lambda trial: 0.31 + 0.001 * trial.values["run.seed"],
        "object_iou": lambda trial: 0.02 * trial.values["tracking.num_objects"] + 0.01 * trial.values["run.seed"],
    }
    write_crossed(tmp_path / "sweep", space, figures)
    points = [
        {"values": {"tracking.num_objects": k, "tracking.num_iterations": n}, "random": [0.01 * k]}
        for k in (1, 6)
        for n in (0, 30)
    ]
    facts = {"j_and_f": {"random": [0.24, 0.25]}, "object_iou": {"points": points}}
    (tmp_path / "sweep" / "baseline.json").write_text(json.dumps(facts))
    monkeypatch.setattr(keep_answer, "RESULTS", tmp_path / "results")
    words = ["keep_answer.py", str(tmp_path / "sweep"), "objects", "--commit", "abc1234", "--machine", "two cores"]
    monkeypatch.setattr(sys, "argv", words)
    keep_answer.main()
    return tmp_path / "results"


def test_the_page_says_what_ran_it_and_no_kernels_release(kept):
    page = (kept / "objects.md").read_text()
    assert "commit abc1234, two cores." in page
    assert "not separable from 3 of 3 others" in page
    assert "No factor is told apart at this scale" in page
    assert platform.release() not in page
    assert len((kept / "objects.csv").read_text().splitlines()) == 13


def test_the_figure_has_a_panel_a_measure_and_random_encoders_where_they_belong(kept):
    figure = (kept / "objects.svg").read_text()
    panels = ET.fromstring(figure).findall("{http://www.w3.org/2000/svg}svg")
    rings = [ET.tostring(panel, encoding="unicode").count('class="ring"') for panel in panels]
    lines = [ET.tostring(panel, encoding="unicode").count('class="reference"') for panel in panels]
    assert (rings, lines) == ([0, 5], [1, 0]), "one line for all points, or a ring a point and the legend's"
    used = set(figure.split('class="')[1:])
    for word in {name for part in used for name in part.split('"')[0].split()} - {"plot", "cell"}:
        assert f".{word}" in keep_answer.STYLE, f"{word} has no style outside a page"
