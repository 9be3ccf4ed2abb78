"""report.html: what it says, that it holds all it shows, and that its sentence claims no more than the seeds carry."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from statistics import fmean

import pytest
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.reporting.figures import MAX_POINTS, PANELS, draw_panel, running_mean, thin
from dora_ray.reporting.pages import answer, caution, report
from dora_ray.tuning.results import read_csv
from dora_ray.tuning.space import load_sweep
from tests.tuning.folders import write_run, write_sweep


class Page(HTMLParser):
    """The visible text, the titles of cards, and every address that the page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self._hidden += tag in ("script", "style")
        values = dict(attributes)
        fetched = [values.get("src")] + ([values.get("href")] if tag == "link" else [])
        self.fetched += [address for address in fetched if address]

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden and data.strip():
            self.texts.append(" ".join(data.split()))


def read_page(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_runs_page_shows_curves_events_and_configuration(tmp_path):
    run = write_run(tmp_path / "venice")
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(run / "pictures" / "objects_of_a_clip.png")
    page = read_page(report(run))
    for text in (
        "venice",
        "done",
        *(panel.title for panel in PANELS),
        "resize",
        "clip.num_frames",
        "objects of a clip",
        "30.0 %",
        "1 to 2",
    ):
        assert text in page.texts, text
    assert all(address.startswith("data:") for address in page.fetched)
    assert len(page.fetched) == 1


def test_a_runs_page_says_what_its_videos_lack(tmp_path):
    run = write_run(tmp_path / "venice")
    line = {"time": 1.0, "event": "missing_frames", "video": "/films/a.mp4", "missing": "3 of 90 frames are missing"}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "Not whole: /films/a.mp4: 3 of 90 frames are missing" in read_page(report(run)).texts


def test_a_page_carries_plotly_once_and_fetches_nothing(tmp_path):
    html = report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert html.count("plotly.js v") == 1
    assert len(html) < 8_000_000
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", html)


def test_a_run_without_metrics_still_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    assert "nothing measured yet" in read_page(report(tmp_path)).texts


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"neither a run nor a sweep: it holds notes\.txt"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_sweeps_page_answers_its_question_and_names_failures(tmp_path):
    page = read_page(report(write_sweep(tmp_path / "objects", [[0.21, 0.22], [0.24, 0.25], [None, 0.3]])))
    for text in (
        "How many objects should a clip have?",
        "tracking.num_objects",
        "RuntimeError: <the disk> is full",
        "04_num-objects-3_seed-0",
    ):
        assert text in page.texts, text
    assert page.fetched == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[0.2, 0.21], [0.3, 0.31]], "No seed of another point reached its range"),
        ([[0.2, 0.31], [0.3, 0.32]], "overlap with those of 1 of the 1 other points"),
        ([[0.2], [0.3]], "with one seed a point: this sweep cannot tell how much of it is chance"),
        ([[None, None], [0.3, 0.3]], "the only point that finished"),
        ([[None, None], [None, None]], "No trial has finished with a knn yet"),
    ],
)
def test_the_sentence_claims_no_more_than_the_seeds_carry(tmp_path, values, says):
    folder = write_sweep(tmp_path / "sweep", values)
    sentence = answer(read_csv(str(folder / "results.csv")), load_sweep(folder / "sweep.yaml"))
    assert says in sentence
    if "best" in sentence:
        assert sentence.startswith("tracking.num_objects=2 gave the best knn")


def test_less_is_better_where_the_sweep_says_so(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[1.0, 1.1], [3.0, 3.1]], metric="loss", mode="min")
    spec = load_sweep(folder / "sweep.yaml")
    assert answer(read_csv(str(folder / "results.csv")), spec).startswith(
        "tracking.num_objects=1 gave the best loss: 1.05"
    )
    assert "not a better encoder" in caution(spec)


def test_thinning_keeps_the_mean_and_bounds_the_number():
    values = [float(i % 7) for i in range(10 * MAX_POINTS)]
    steps, thinned = thin(range(len(values)), values)
    assert len(thinned) == len(steps) == MAX_POINTS
    assert fmean(thinned) == pytest.approx(fmean(values))
    assert thin([1, 2], [0.5, 0.25]) == ([1.0, 2.0], [0.5, 0.25])


def test_the_running_mean_keeps_constants_and_lines():
    assert running_mean([2.0] * 9, 5) == [2.0] * 9
    assert running_mean([float(i) for i in range(9)], 3)[1:-1] == [float(i) for i in range(1, 8)]


def test_a_panel_without_figures_is_left_out():
    assert draw_panel(PANELS[0], [{"step": 1, "knn": 0.2}]) is None
    assert "plotly" in str(draw_panel(PANELS[0], [{"step": 1, "loss": 0.2}]))
