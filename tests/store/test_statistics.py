"""Statistics from the store, compared with the decoded pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dora_ray.cli import main
from dora_ray.store import datasets
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import open_videos
from dora_ray.store.indexes import load_index
from dora_ray.store.statistics import analyze
from dora_ray.video.decoders import get_decoder
from dora_ray.video.synthetic import encode_video
from tests.store.reading import FORM


@pytest.fixture
def film(tmp_path):
    """Return a file, gray for 2 s and then noise twice as bright for 2 s, with its store and decoded frames."""
    rng = np.random.default_rng(0)
    dark = [np.full((96, 160, 3), 50, np.uint8)] * 20
    bright = rng.integers(60, 140, (96, 160, 3), np.uint8)
    path = encode_video(tmp_path / "v.mp4", dark + [bright] * 20, frames_per_second=10, codec="libx264", group_size=10)
    store = str(tmp_path / "store")
    index = load_index(str(path), store=store)
    uri = frame_store.dataset_uri(store, index.video_id, FORM)
    datasets.create_dataset(uri)
    frames = list(get_decoder("pyav").decode(index, index.pts, short_side=64))
    rows = [datasets.frame_row(frame, segment=0, jpeg_quality=90) for frame in frames]
    datasets.commit(uri, datasets.write_rows(uri, rows))
    return path, store, frames


def test_light_and_shots_of_a_video_that_is_known(film):
    path, store, frames = film
    (video,) = open_videos([str(path)], store=store, form=FORM)
    facts = analyze(video, interval_seconds=1.0)
    expected = [np.mean([frame.y.mean() / 255 for frame in frames[first : first + 10]]) for first in (0, 10, 20, 30)]
    assert facts["lightness"]["by_interval"] == pytest.approx(expected, abs=5e-3)
    assert facts["lightness"]["change"] == pytest.approx(abs(expected[2] - expected[1]) / 3, abs=5e-3)
    assert (facts["shots"]["changes"], facts["shots"]["times"]) == (1, [2.0])
    assert (facts["frames"], facts["missing"]) == (40, 0)


def test_the_command_prints_and_writes_it(film, tmp_path, capsys):
    path, store, _ = film
    settings = [f"data.{name}={value}" for name, value in vars(FORM).items()]
    out = tmp_path / "facts.json"
    assert main(["data", "analyze", str(path), *settings, "--store", store, "--json", str(out)]) == 0
    assert "shot changes" in capsys.readouterr().out
    assert main(["data", "analyze", str(path), *settings, "--store", store, "--interval", "2"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("lightness per 2 s")]
    assert line.count(",") == 1, "the four seconds are two intervals"
    assert json.loads(out.read_text())[0]["shots"]["times"] == [2.0]
    assert main(["data", "analyze", str(path), "--store", store]) == 3
    assert "run: dora-ray data ingest" in capsys.readouterr().err
