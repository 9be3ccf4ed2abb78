"""report.html: that it says what it must, holds all that it shows, and stays small."""

from __future__ import annotations

import json
import platform
import random
import re
from html.parser import HTMLParser
from statistics import fmean

import pytest
import yaml
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.reporting.curves import MAX_POINTS, PANELS, draw_panel, running_mean, thin
from dora_ray.reporting.pages import report
from dora_ray.reporting.render import describe_machine
from dora_ray.tuning.results import read_csv
from tests.tuning.folders import write_crossed, write_run, write_sweep


class Page(HTMLParser):
    """The visible text, alternative texts, and every address that the page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.spoken: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self._hidden += tag in ("script", "style")
        values = dict(attributes)
        fetched = [values.get("src")] + ([values.get("href")] if tag == "link" else [])
        self.fetched += [address for address in fetched if address]
        if tag in ("img", "svg", "video"):
            self.spoken.append(values.get("alt") or values.get("aria-label") or "")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden and data.strip():
            self.texts.append(" ".join(data.split()))


def read_page(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_runs_page_shows_health_curves_events_and_configuration(tmp_path):
    run = write_run(tmp_path / "venice")
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(run / "pictures" / "clip-0.png")
    page = read_page(report(run))
    drawn = {panel.title for panel in PANELS if any(f'"{name}"' in _first_line(run) for name, _ in panel.measures)}
    assert len(drawn) > 8
    for text in ("venice", "done", *drawn, "resize", "clip.num_frames", "clip 0", "30.0 %", "1 to 2"):
        assert text in page.texts, text
    assert "Objects are distinct" in page.texts
    assert "Data keeps up" in page.texts
    assert page.texts.index("Data keeps up") < page.texts.index("Curves")
    assert all(address.startswith("data:") for address in page.fetched)
    assert all(len(words) > 10 for words in page.spoken)
    assert any(re.fullmatch(r"2023-11-14 22:\d\d:\d\d", text) for text in page.texts), "dates stand beside clocks"


def test_a_runs_page_shows_its_objects_at_the_first_a_middle_and_the_last_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    for place in ("step-00000010", "step-00000050", "step-00000070", "step-00000200", ""):
        (run / "pictures" / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(run / "pictures" / place / "clip-0.png")
    captions = [text for text in read_page(report(run)).texts if text.startswith("clip 0")]
    told = ["at step 10", "at step 70", "at step 200", "at the last checkpoint"]
    assert captions == [f"clip 0, {when}" for when in told]


def test_a_runs_page_says_what_its_videos_lack(tmp_path):
    run = write_run(tmp_path / "venice")
    line = {"time": 1.0, "event": "missing_frames", "video": "/films/a.mp4", "missing": "3 of 90 frames are missing"}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "Missing frames: /films/a.mp4: 3 of 90 frames are missing" in read_page(report(run)).texts


def _first_line(run):
    return (run / "metrics.jsonl").read_text().splitlines()[99]


def test_one_object_is_not_compared_with_another_and_one_measurement_is_no_curve(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "knn"} for line in lines]
    lines[-1]["knn"] = 0.31
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = read_page(report(run)).texts
    assert "31.0 %" in texts, "it is a tile"
    assert "kNN accuracy" not in texts
    assert "Objects are distinct" in texts
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tracking"] = {**config.get("tracking", {}), "num_objects": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "Objects are distinct" not in read_page(report(run)).texts


def test_a_sick_run_says_so_first(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    sick = [line | {"object_overlap": 0.97, "exposed_wait_seconds": 0.5, "teacher_diversity": 0.001} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sick))
    with (run / "events.jsonl").open("a") as events:
        events.write(
            json.dumps({"time": 1.7e9, "event": "warning", "step": 9, "message": "the masks are alike"}) + "\n"
        )
    page = read_page(report(run))
    for text in ("Collapsed", "Objects overlap", "Waits for data", "Warnings", "the masks are alike"):
        assert text in page.texts, text


def test_the_evaluations_of_a_run_stand_beside_random_encoders(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    result = {
        "task": "knn",
        "time": "2026-11-26T15:00:00+00:00",
        "data": "/photos",
        "settings": {"random_init": False, "seed": 0},
    }
    trained = result | {"results": {"top1": 0.31, "chance": 0.1, "num_test": 200}}
    random = result | {
        "settings": {"random_init": True, "seed": 1},
        "results": {"top1": 0.14, "chance": 0.1, "num_test": 200},
    }
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (trained, random)))
    page = read_page(report(run))
    assert "knn: this run and random encoders" in page.texts
    assert "random, seed 1" in page.texts
    assert "2026-11-26 15:00:00" in page.texts
    assert any("31.0 % for this run, 14.0 %" in words for words in page.spoken)


def test_a_page_fetches_nothing_and_is_small(tmp_path):
    html = report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert len(html) < 300_000
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", html)


def test_a_run_without_metrics_still_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    assert "nothing measured yet" in read_page(report(tmp_path)).texts


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"neither a run nor a sweep: it holds notes\.txt"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_sweeps_page_answers_first_and_names_failures(tmp_path):
    folder = write_sweep(tmp_path / "objects", [[0.21, 0.25], [0.24, 0.22], [None, 0.3]])
    page = read_page(report(folder))
    failed = next(row for row in read_csv(str(folder / "results.csv")) if row.status == "failed")
    for text in (
        "How many objects should a clip have?",
        "tracking.num_objects",
        "RuntimeError: <the disk> is full",
        failed.short_id,
    ):
        assert text in page.texts, text
    assert page.texts.index("Points") > next(i for i, text in enumerate(page.texts) if "not separable" in text)
    assert all(address.startswith("data:") for address in page.fetched)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "not separable" in markdown
    assert "<the disk> is full" in markdown


@pytest.mark.parametrize("moves", [True, False])
def test_a_sweeps_page_and_text_share_out_effects_and_not_noise(tmp_path, moves):
    rng = random.Random(0)
    space = {"tracking.num_objects": [1, 3], "tracking.num_iterations": [0, 30]}
    figures = {"knn": lambda trial: 0.1 * moves * trial.values["tracking.num_objects"] + 0.01 * rng.gauss(0, 1)}
    write_crossed(tmp_path / "sweep", space, figures)
    page = " ".join(read_page(report(tmp_path / "sweep")).texts)
    markdown = (tmp_path / "sweep" / "report.md").read_text(encoding="utf-8")
    said = "No factor is told apart at this scale"
    assert (said in page, said in markdown) == (not moves, not moves)
    assert bool(re.search(r"tracking\.num_objects \d+ %", page)) == moves
    assert bool(re.search(r"Importance: `tracking\.num_objects` \d+ %", markdown)) == moves


@pytest.mark.parametrize("act", [True, False])
def test_a_sweeps_page_and_text_say_whether_factors_act_on_each_other(tmp_path, act):
    rng = random.Random(0)
    space = {"tracking.num_objects": [1, 6], "tracking.num_iterations": [0, 30]}

    def figure(trial):
        both = trial.values == trial.values | {"tracking.num_objects": 6, "tracking.num_iterations": 30}
        return 0.3 + 0.1 * act * both + 0.005 * rng.gauss(0, 1)

    write_crossed(tmp_path / "sweep", space, {"knn": figure})
    page = " ".join(read_page(report(tmp_path / "sweep")).texts)
    said = "The two act on each other: num_iterations 30 over 0 adds" if act else "No interaction is shown: num_iter"
    for text in (page, (tmp_path / "sweep" / "report.md").read_text(encoding="utf-8")):
        assert said in text
        if act:
            assert re.search(r"adds (9|10)\.\d ± 1\.\d points more knn at num_objects 6 than at num_objects 1\.", text)


def test_the_environment_does_not_name_the_kernels_release():
    assert platform.system() in describe_machine()["machine"]
    assert platform.release() not in " ".join(describe_machine().values())


def test_each_trial_that_ended_has_a_page_of_its_own(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[0.21], [0.24]])
    rows = read_csv(str(folder / "results.csv"))
    write_run(folder / rows[0].path, steps=20)
    html = report(folder).read_text(encoding="utf-8")
    assert f'href="{rows[0].path}/report.html"' in html
    assert (folder / rows[0].path / "report.html").is_file()


def test_thinning_keeps_the_mean_and_bounds_the_number():
    values = [float(i % 7) for i in range(10 * MAX_POINTS)]
    steps, thinned = thin(range(len(values)), values)
    assert len(thinned) == len(steps) == MAX_POINTS
    assert fmean(thinned) == pytest.approx(fmean(values), rel=0.01)
    assert thin([1, 2], [0.5, 0.25]) == ([1.0, 2.0], [0.5, 0.25])


def test_the_running_mean_keeps_constants_and_lines():
    assert running_mean([2.0] * 9, 5) == [2.0] * 9
    assert running_mean([float(i) for i in range(9)], 3)[1:-1] == [float(i) for i in range(1, 8)]


def test_a_panel_without_figures_is_left_out():
    assert draw_panel(PANELS[0], [{"step": 1, "knn": 0.2}]) is None
    assert "<svg" in str(draw_panel(PANELS[0], [{"step": 1, "loss": 0.2}]))
