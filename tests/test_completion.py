"""Completion, as bash does it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from dora_ray.cli import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def completed(script: str, *words: str) -> set[str]:
    """The words that bash offers for the last one."""
    line = " ".join(f"'{word}'" for word in ("dora-ray", *words))
    program = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; compopt() {{ :; }}; _dora_ray"
    done = subprocess.run(
        ["bash", "-c", program + '; printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_bash_completes_commands_options_recipes_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "da") == {"data"}
    assert completed(script, "data", "synth", "") >= {"video", "tour", "photos"}
    assert completed(script, "train", "ti") == {"tiny"}
    assert completed(script, "train", "tiny", "walk [1].mp4", "optim.st") == {"optim.steps="}
    assert completed(script, "train", "--out", "data", "--re") == {"--resume"}, "a value that is called like a command"
    assert completed(script, "eval", "k") == {"knn"}


def test_zsh_reads_the_same_through_its_own_bridge(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n_dora_ray_words()")
