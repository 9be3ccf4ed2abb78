"""What the doctor says of this machine, and of paths where no cluster is named."""

from __future__ import annotations

import pytest

from dora_ray.cli import main


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def storage(said: str) -> list[str]:
    return [line for line in said.splitlines() if " storage " in line]


def test_without_a_cluster_paths_are_looked_for_here(tmp_path, capsys):
    (tmp_path / "walk.mp4").write_bytes(b"film")
    main(["doctor", str(tmp_path / "walk.mp4")])
    assert storage(capsys.readouterr().out) == ["ok       storage        readable here; --address asks every node"]
    assert main(["doctor", str(tmp_path / "walk.mp4"), str(tmp_path / "other.mp4")]) == 1
    captured = capsys.readouterr()
    assert storage(captured.out) == [
        f"PROBLEM  storage        {tmp_path / 'other.mp4'}: there is no such file or folder"
    ]
    assert "storage: correct the path" in captured.out
    assert "storage" in captured.err


def test_without_paths_nothing_is_said_of_storage(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    assert " Python " in said
    assert storage(said) == []
