"""Files with misleading key-frame marks, fields, times and joins, ingested as a user would."""

from __future__ import annotations

import numpy as np
import pytest

from dora_ray.video.synthetic import read_counter
from tests.store.reading import read_frames
from tests.store.test_ingest import in_this_process, run  # noqa: F401
from tests.video import odd_videos

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_every_kept_frame_is_stored_at_its_time(tmp_path):
    paths = [
        odd_videos.marked_mpeg4(tmp_path),
        odd_videos.marked_hevc(tmp_path),
        odd_videos.fields(tmp_path, ".ts", "none"),
        odd_videos.intra_refresh(tmp_path),
        odd_videos.h264_in_avi(tmp_path),
        odd_videos.joined(tmp_path),
        odd_videos.upright(tmp_path, 90, mirrored=True),
    ]
    stored, _ = run(tmp_path / "store", *paths)
    for video in stored:
        twice = 2 if video.path.endswith("joined.ts") else 1
        numbers = np.arange(0, twice * 40, 3)
        assert (video.missing, len(video)) == (0, len(numbers)), video.path
        assert video.times == pytest.approx(numbers / 30, abs=2e-3)
        shown = [read_counter(frame) for frame in read_frames(video, range(len(video)))]
        assert shown == (numbers % 40).tolist()
