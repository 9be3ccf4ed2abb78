"""The tutorial's commands, run as they stand there on a film that is smaller than the reader's."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm

from dora_ray.cli import main
from scripts.notebook import NOTEBOOK, notebook
from tests.conftest import SMALL

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
COMMANDS = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    dora-ray ")]
# Commands that look at the whole machine, or at the network.
ELSEWHERE = ("dora-ray doctor", "timm:")
SMALLER = {
    "dora-ray data synth tour": ["--seconds", "8", "--size", "96x64", "--fps", "12", "--objects", "1"],
    "dora-ray train tiny": [*SMALL],
    "dora-ray eval": ["max_images=20"],
}


def test_the_notebook_is_the_page() -> None:
    assert NOTEBOOK.read_text() == notebook(PAGE.read_text()), "run `make notebook`"
    code = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [text.removeprefix("!") for text in code if text.startswith("!")] == COMMANDS
    assert [text for text in code if not text.startswith("!")] == ["%pip install -e '.[demo]'"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_tutorial_leads_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "synth", "photos", "photos"]) == 0  # named in the text
    ran = []
    for command in COMMANDS:
        if any(words in command for words in ELSEWHERE):
            continue
        smaller = next((words for start, words in SMALLER.items() if command.startswith(start)), [])
        capsys.readouterr()
        assert main(shlex.split(command)[1:] + smaller) == 0, command
        ran.append((command, capsys.readouterr().out))
        if "synth tour" in command:
            shutil.copy(tmp_path / "tour" / "film.mp4", tmp_path / "walk.mp4")
    printed = dict(ran)
    assert len(ran) > 9
    knn = next(text for command, text in ran if "eval knn" in command)
    assert "random encoder" in knn
    assert "runs/walk" in knn
    assert "done" in printed["dora-ray status runs/walk"]
    assert (tmp_path / "runs" / "walk" / "report.html").exists()
    features = pq.read_table(tmp_path / "features.parquet")
    assert features.num_rows == 8
    assert np.isfinite(features.column(features.num_columns - 1)[0].as_py()).all()
    assert timm.create_model("local-dir:encoder", pretrained=True).embed_dim == 48
