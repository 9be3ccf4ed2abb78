"""Decoding without secrets and with limited memory, in real Ray processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dora_ray.store.shield import USUAL, blanked, memory_limit
from tests.video import videos

GIB = 2**30


def test_variables_that_look_like_secrets_are_blanked():
    mine = {"MY_DB_PASSWORD": "a", "stripe_api_key": "b", "HOME": "/root", "RAY_AUTH_TOKEN": "c"}
    found = blanked(["/films/a.mp4", "/store"], mine)
    assert set(found) == {*USUAL, "MY_DB_PASSWORD", "stripe_api_key"}
    assert set(found.values()) == {""}


@pytest.mark.parametrize("paths", [["s3://bucket/a.mp4", "/store"], ["/a.mp4", "gs://bucket/store"]])
def test_remote_paths_keep_the_credentials(paths):
    assert blanked(paths, {"AWS_SECRET_ACCESS_KEY": "a"}) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux alone")
def test_memory_is_limited_inside_and_only_there():
    with memory_limit(GIB):
        assert np.ones(2**20, np.uint8).sum() == 2**20
        with pytest.raises(MemoryError):
            np.ones(4 * GIB, np.uint8)
    assert np.empty(4 * GIB, np.uint8).size == 4 * GIB


# Prints what an ingest task sees after decoding: the environment at its process's start, and the current one.
INGEST = """
import json, os, sys
from dora_ray.store import ingest
from dora_ray.store.frames import FrameFormat

film, store, seen = sys.argv[1:]
decode = ingest.ingest_segment

def noting(item, **options):
    result = decode(item, **options)
    started = dict(pair.split("=", 1) for pair in open("/proc/self/environ").read().split(chr(0)) if "=" in pair)
    with open(seen, "a") as file:
        file.write(json.dumps([result["frames"], started, dict(os.environ)]) + chr(10))
    return result

ingest.ingest_segment = noting
form = FrameFormat(frames_per_second=6.0, short_side=48, jpeg_quality=90)
options = dict(store=store, decoder="pyav", form=form, segment_seconds=60, decode_seconds=60)
(video,) = ingest.ingest([film], **options)
print(len(video))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_film_is_decoded_without_secrets(tmp_path: Path):
    secrets = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-of-aws", "MY_DB_PASSWORD": "s3cr3t-of-mine", "OUR_CITY": "Venice"}
    words = [str(videos.h264(tmp_path)), str(tmp_path / "store"), str(tmp_path / "seen")]
    done = subprocess.run(
        [sys.executable, "-c", INGEST, *words],
        env=os.environ | secrets,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "seen").read_text().splitlines()
    assert "s3cr3t" not in line
    frames, *environments = json.loads(line)
    assert frames == int(done.stdout.split()[-1]) > 0
    for environment in environments:
        assert environment["AWS_SECRET_ACCESS_KEY"] == environment["MY_DB_PASSWORD"] == ""
        assert environment["OUR_CITY"] == "Venice", "what is no secret stays"
