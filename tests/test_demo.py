"""The demo, in small: everything it promises is there when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from dora_ray.demo import main
from tests.conftest import SMALL


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_demo_makes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("kNN, trained", "kNN, random", "clips/s", "waiting for data", "The demo cannot show more"):
        assert words in printed
    run = tmp_path / "run"
    assert (run / "report.html").stat().st_size > 1_000_000
    assert {path.suffix for path in (run / "pictures").iterdir() if path.is_file()} == {".png", ".mp4"}
    assert len(list((run / "pictures").glob("step-*/objects.png"))) == 3, "drawn while it trained"
    encoder = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    assert encoder.embed_dim == 48
    assert main([*SMALL, "optim.steps=3", "--out", str(tmp_path)]) == 0, "a second demo replaces the first"


def test_demo_answers_bad_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lrr=1", "--out", str(tmp_path / "out")]) == 2
    assert "Did you mean optim.lr?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
