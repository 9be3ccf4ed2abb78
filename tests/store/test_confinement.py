"""Decoding without credentials and with bounded memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from dora_ray.errors import VideoError
from dora_ray.store.confinement import confined

GIB = 2**30
SECRET = {
    "AWS_SECRET_ACCESS_KEY": "a",
    "AWS_SESSION_TOKEN": "b",
    "HF_TOKEN": "c",
    "DB_PASSWORD": "d",
    "MY_API_KEY": "e",
}


def seen_by_a_child() -> set[str]:
    """Names that the C library, and so a decoder or a process that it starts, finds in the environment."""
    program = "import os; print(' '.join(os.environ))"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_no_secret_is_in_the_environment_meanwhile(monkeypatch):
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "needed")
    with confined(["walk.mp4"], memory_bytes=GIB):
        seen = seen_by_a_child()
        assert not seen & set(SECRET)
        assert "RAY_AUTH_TOKEN" in seen
        assert "PATH" in seen
    assert {name: os.environ[name] for name in SECRET} == SECRET


def test_a_file_behind_a_uri_is_opened_with_them(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    with confined(["s3://bucket/walk.mp4"], memory_bytes=GIB):
        assert "AWS_SECRET_ACCESS_KEY" in os.environ


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux limits a process's address space")
def test_memory_without_end_is_an_error_that_names_the_file():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(VideoError, match=r"bomb.mp4: the decoder asked for more than 0.2 GiB"):  # noqa: SIM117
        with confined(["bomb.mp4"], memory_bytes=GIB // 4):
            bytearray(GIB)
    with confined(["walk.mp4"], memory_bytes=GIB):
        assert len(bytearray(GIB // 2)) == GIB // 2
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_what_else_goes_wrong_passes_and_nothing_is_lost(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "c")
    with pytest.raises(KeyError), confined(["walk.mp4"], memory_bytes=GIB):
        raise KeyError("mine")
    assert os.environ["HF_TOKEN"] == "c"
