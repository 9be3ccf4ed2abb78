"""Data benchmark on a small film: every path is measured, and the ratios follow from the rates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_ray.bench import data
from dora_ray.bench.films import ENCODERS, film
from dora_ray.video.index import index_video
from dora_ray.video.synthetic import make_video


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_reports_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"WIDTH": 320, "HEIGHT": 180, "RATE": 24}.items():
        monkeypatch.setattr(data, name, value)
    result = data.run(quick=quick)
    reference = result["reference_clips_per_core_second"]
    assert result["store_ratio"] == pytest.approx(result["store_clips_per_core_second"] / reference)
    assert result["store_decode_cores_a_gpu"] == pytest.approx(300 / result["store_clips_per_core_second"])
    for codec in ("",) if quick else ("", "vp9_", "av1_"):
        assert result[f"{codec}ingest_frames_per_core_second"] > 0
        assert result[f"{codec}ffmpeg_frames_per_core_second"] > 0
    assert ("decord_frames_per_core_second" in result) == bool(importlib.util.find_spec("decord"))
    assert "av1_decord_frames_per_core_second" not in result, "it has no AV1"
    assert result["jpeg_ms_a_kept_frame"] > 0
    assert result["write_ms_a_kept_frame"] > 0
    # Includes the films of other codecs.
    assert len(list(tmp_path.rglob("*.mp4"))) == (1 if quick else 3)


def test_films_are_in_the_codec_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    size = {"width": 160, "height": 96, "frames_per_second": 12, "seconds": 1, "group_size": 6}
    for codec in ENCODERS:
        index = index_video(film(**size, codec=codec))
        assert (index.codec, len(index.pts)) == (codec, 12)


def test_plain_decoding_says_what_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prefer the executable on PATH, then that of imageio-ffmpeg, then PyAV."""
    packaged, on_path = tmp_path / "ffmpeg-packaged", tmp_path / "bin" / "ffmpeg"
    on_path.parent.mkdir()
    for program in (packaged, on_path):
        program.write_text(f'#!/bin/sh\necho "$@" > {program}.arguments\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(get_ffmpeg_exe=lambda: str(packaged)))
    for program, name in ((on_path, "ffmpeg"), (packaged, "ffmpeg-packaged")):
        found, seconds = data._plain_decoder()
        assert found == f"{name} -threads 1"
        assert seconds("walk.mp4") >= 0
        assert "-threads 1 -i walk.mp4" in Path(f"{program}.arguments").read_text()
        on_path.unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    found, seconds = data._plain_decoder()
    assert found == "PyAV (no ffmpeg found)"
    assert seconds(str(make_video(tmp_path / "a.mp4", width=160, height=96, num_frames=4, frames_per_second=4, seed=0)))
