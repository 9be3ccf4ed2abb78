"""Files behind plain paths and behind URIs."""

from __future__ import annotations

import errno
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dora_ray import files


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_write_read_list_remove(root: str) -> None:
    path = files.join(root, "a", "b.txt")
    assert not files.exists(path)
    assert files.list_names(files.join(root, "a")) == []
    files.write_text(path, "naïve")
    assert files.read_text(path) == "naïve"
    assert files.list_names(files.join(root, "a")) == ["b.txt"]
    files.remove(files.join(root, "a"))
    assert not files.exists(path)


def test_lines_survive_a_second_writer(root: str) -> None:
    path = files.join(root, "lines.jsonl")
    for line in ("one", "two"):
        writer = files.LineFile(path)
        writer.append(line)
        writer.flush()
    assert files.read_text(path) == "one\ntwo\n"


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    files.write_text(path, "old")
    with pytest.raises(TypeError):
        files.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert files.read_text(path) == "old"
    assert files.list_names(tmp_path) == ["kept.txt"]


def test_absolute_keeps_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.absolute("runs/a") == str(tmp_path / "runs" / "a")
    assert files.absolute("s3://bucket/a") == "s3://bucket/a"


def test_lines_that_cannot_be_written_come_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = files.LineFile(tmp_path / "run" / "a.jsonl")
    lines.append("first")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        lines.append("second")
        with pytest.raises(OSError, match="No space left"):
            lines.flush()
    lines.append("third")
    assert (tmp_path / "run" / "a.jsonl").read_text() == "first\nsecond\nthird\n"


def test_lines_of_two_threads_are_written_once_each(root: str) -> None:
    """As the training's and the checkpoint thread's are, on one file."""
    lines = files.LineFile(files.join(root, "a.jsonl"))
    texts = [[f"{thread} {number} " + "x" * 2000 for number in range(2000)] for thread in range(2)]

    def write(thread: int) -> None:
        for number, text in enumerate(texts[thread]):
            lines.append(text)
            if number % 100 == thread:
                lines.flush()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    lines.flush()
    assert sorted(files.read_text(lines.path).splitlines()) == sorted(texts[0] + texts[1])


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
