"""Counts of a workload, compared with an index: decoded frames and kept frames."""

from __future__ import annotations

import numpy as np
import pytest

import dora_ray
from dora_ray.planning.workload import film_of, workload_of
from dora_ray.video.index import index_video
from tests.video import odd_videos, videos


def test_a_clock_that_jumps_by_years_is_no_longer_film(tmp_path):
    index = index_video(str(odd_videos.clock_jumps(tmp_path)))
    assert index.real_seconds > 1e8
    film = film_of(index)
    assert 0.5 < film.seconds < 5, "40 frames at 24 a second"
    assert film.pixels == pytest.approx(len(index.pts) * index.coded_width * index.coded_height)


@pytest.mark.parametrize("rate", [3.0, 6.0, 240.0])
def test_frames_are_kept_once_however_high_the_rate(rate, tmp_path):
    index = index_video(str(videos.h264(tmp_path)))
    config = dora_ray.load_config("tiny", f"data.frames_per_second={rate}")
    kept = len(np.unique(index.kept_frames(rate)))
    assert workload_of(config, [film_of(index)]).kept_frames == pytest.approx(kept, abs=1)
