"""GPU check: each part is killed at its limit, keeps its measurements, and the table reports failures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dora_ray.bench.gpu import check, pack, part_learning, part_step
from dora_ray.bench.gpu.figures import Figures, read_figures
from dora_ray.bench.gpu.kit import ArrayVideo, Kit, Labeled, Sequence, load_kit, plan_of, read_steps, save_kit
from dora_ray.bench.gpu.table import render
from dora_ray.bench.gpu.trace import summarize
from dora_ray.config import load_config
from dora_ray.errors import ConfigError
from dora_ray.training.step import initial_state
from dora_ray.video.synthetic import make_video

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ["ray", "av", "decord", "lance", "pyarrow", "simplejpeg", "rich", "plotly", "tensorboardX", "hypothesis"]


def event(name: str, category: str, begin: float, duration: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": duration, "tid": tid}


def test_a_trace_tells_kernels_gaps_and_waits() -> None:
    """Two overlapping kernels, a gap of 30 us, a third kernel; the host waits once inside a part and once outside."""
    events = [
        event("gemm", "kernel", 0, 40),
        event("norm", "kernel", 30, 20),
        event("gemm", "kernel", 80, 20),
        event("loss", "user_annotation", 0, 50),
        event("inner", "user_annotation", 5, 10),
        event("loss", "gpu_user_annotation", 0, 50),
        event("cudaStreamSynchronize", "cuda_runtime", 7, 2),
        event("cudaStreamSynchronize", "cuda_runtime", 7, 2, tid=2),
        event("cudaLaunchKernel", "cuda_runtime", 1, 2),
        {"ph": "M", "name": "process_name"},
    ]
    found = summarize(events, steps=2)
    assert found["kernels"] == 1.5
    assert found["wall_ms"] == pytest.approx(0.05)
    assert found["busy_ms"] == pytest.approx(0.035)
    assert found["gap_share"] == pytest.approx(0.3)
    assert (found["long_gaps"], found["long_gaps_ms"]) == (0.5, pytest.approx(0.015))
    assert [(top["name"], top["calls"]) for top in found["top"]] == [("gemm", 1.0), ("norm", 0.5)]
    assert found["top"][0]["share"] == pytest.approx(0.75)
    assert found["parts_ms"] == {"loss": pytest.approx(0.025)}
    assert {(wait["call"], wait["part"]) for wait in found["waits"]} == {
        ("cudaStreamSynchronize", "inner"),
        ("cudaStreamSynchronize", "between parts"),
    }
    assert summarize([], steps=1)["kernels"] == 0


def test_figures_stay_when_a_part_is_cut_off(tmp_path: Path) -> None:
    figures, path = Figures(tmp_path / "part.jsonl"), tmp_path / "part.jsonl"

    def fail() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    figures.put("one", 1.0)
    figures.put("one", {"seconds": 2.0})
    figures.attempt("two", fail)
    path.write_text(path.read_text() + '{"name": "thr')
    assert read_figures(path) == {
        "one": {"seconds": 2.0},
        "two": {"failed": "OutOfMemoryError: CUDA out of memory"},
    }
    assert read_figures(tmp_path / "none") == {}


HANG = "print('began', flush=True); import time; time.sleep(600)"
CRASH = "import os; os.abort()"
FINE = "pass"


@pytest.mark.parametrize(
    ("code", "state"),
    [(HANG, "ended after its 10 s"), (CRASH, "ended with -6"), (FINE, "done")],
    ids=["hang", "crash", "fine"],
)
def test_a_part_that_hangs_or_crashes_ends_and_keeps_what_it_had(monkeypatch, tmp_path, code: str, state: str) -> None:
    """The part's whole process group is killed."""
    first = f'open({str(tmp_path / "step.jsonl")!r}, \'a\').write(\'{{"name": "exact", "value": 3}}\\n\');'
    monkeypatch.setattr(check, "command", lambda *_, **__: [sys.executable, "-c", first + code])
    settings = check.Settings(
        out=tmp_path, clips=tmp_path / "clips.npz", rehearse=True, factor=10 / check.LIMITS["step"]
    )
    found = check.run_part("step", settings, root=ROOT)
    assert found["state"] == state
    assert found["figures"] == {"exact": 3}
    assert ("log" in found) == (state != "done")


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys) -> None:
    states = {"tests": "ended with 1", "step": "done", "profile": "done", "learning": "done"}
    monkeypatch.setattr(
        check, "run_part", lambda part, settings, root: {"state": states[part], "seconds": 1.0, "figures": {}}
    )
    assert check.main(["--out", str(tmp_path), "--rehearse"], root=ROOT) == 1
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(written["parts"]) == ["tests", "step", "profile", "learning"]
    assert "== tests: ended with 1" in (tmp_path / "gpu_check.txt").read_text()
    assert "== learning: done" in capsys.readouterr().out
    states["tests"] = "done"
    assert check.main(["--out", str(tmp_path), "--rehearse", "tests"], root=ROOT) == 0
    with pytest.raises(SystemExit):
        check.main(["nonsense"], root=ROOT)


def test_the_table_puts_the_anchors_beside_the_figures() -> None:
    form = {"seconds": 0.1, "noise": 0.02, "steps": 10, "first_seconds": 3.0, "clips_per_second": 160.0, "peak_mb": 9e3}
    rates = {"tflop_per_second": 300.0, "share_of_own_shapes": 0.5, "share_of_square": 0.4}
    step = {
        "setting": {"network": "vit_small"},
        "reference": form | {"seconds": 0.5, "peak_mb": 36e3},
        "exact": form,
        "fp8_teacher": {"failed": "RuntimeError: no kernel"},
        "rates": rates,
        "vit_base": form | rates,
        "parts": {"loss": 0.02},
        "timm": {"share_of_own_shapes": 0.6},
    }
    learning = {
        "setting": {"chance_knn": 0.1},
        "random_0": {"knn": 0.2, "matching": 0.3, "j_and_f": 0.3},
        "dora": {"steps": 100, "knn": 0.3, "matching": 0.4, "j_and_f": 0.35, "last": {"loss": 2.0}},
    }
    tests = {"test_step.one": {"outcome": "failed", "reason": "E\nassert 1 == 2"}, "two": {"outcome": "passed"}}
    parts = {"tests": tests, "step": step, "learning": learning, "profile": {"exact": {"failed": "no CUPTI"}}}
    result = {
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "rehearsal": False,
        "parts": {name: {"state": "done", "seconds": 1.0, "figures": figures} for name, figures in parts.items()},
    }
    text = render(result)
    exact = next(line for line in text.splitlines() if line.startswith("exact"))
    assert "100.0" in exact
    assert "5.00 x" in exact
    assert "0.25" in exact
    # Share of 989 TFLOP/s.
    assert "30%" in text
    assert "ViT-S 23 %" in text
    assert "RuntimeError: no kernel" in text
    assert "FAILED test_step.one: assert 1 == 2" in text
    assert "0.300 (+0.100)" in text
    assert "no CUPTI" in text
    assert check.failures(result["parts"]["tests"]) == ["test_step.one"]
    assert check.failures(result["parts"]["step"]) == ["fp8_teacher"]


def small_kit(num_frames: int = 40) -> Kit:
    rng = np.random.default_rng(0)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    video = ArrayVideo("walk", pixels(num_frames, 48, 64, 3), np.arange(num_frames) / 6)
    labeled = Labeled(pixels(12, 32, 32, 3), np.arange(12) % 3)
    masks = np.zeros((5, 48, 64), np.bool_)
    masks[:, 8:30, 8:30] = True
    return Kit((video,), labeled, labeled, (Sequence("dog", pixels(5, 48, 64, 3), masks),))


def test_a_clips_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    kit, path = small_kit(), tmp_path / "clips.npz"
    save_kit(kit, path)
    again = load_kit(path)
    assert np.array_equal(again.videos[0].frames, kit.videos[0].frames)
    assert np.array_equal(again.train.images, kit.train.images)
    assert np.array_equal(again.sequences[0].masks, kit.sequences[0].masks)
    with pytest.raises(ConfigError, match="make gpu-kit"):
        load_kit(tmp_path / "none.npz")


def test_nothing_is_trained_on_what_is_held_out() -> None:
    kit = small_kit()
    (trained,), (held,) = kit.trained_on(), kit.held_out()
    assert len(trained.times) == 32
    assert trained.times[-1] < held.times[0]
    assert len(trained.times) + len(held.times) == 40
    assert len(part_learning._scenes(kit)[0]) == 8 - part_learning.LATER


def test_every_step_gets_the_plans_clips_in_order() -> None:
    config = load_config("tiny", "crops.clip_size=24", "optim.slots=2", "optim.clips_per_slot=3")
    plan = plan_of(small_kit().trained_on(), config)
    steps = list(read_steps(plan, 3))
    assert [[(batch.step, batch.slot) for batch in step] for step in steps] == [[(s, 0), (s, 1)] for s in range(3)]
    assert steps[0][0].clips.shape == (3, 2, 24, 24, 3)
    again = next(read_steps(plan, 1))[1]
    assert np.array_equal(again.clips, steps[0][1].clips)


def test_a_teacher_is_trained_and_evaluated() -> None:
    """Equal frames match, and a static mask is propagated better than by chance."""
    words = (*part_learning.BASE, *part_learning.REHEARSAL, "cluster.num_workers=0", "optim.slots=1")
    config = load_config("tiny", *words, "crops.clip_size=40", "crops.global_size=32", "crops.local_size=16")
    found = part_learning._learn(config, small_kit(), torch.device("cpu"), 0.0)
    assert part_learning.TRIAL_STEPS <= found["steps"] <= found["planned_steps"]
    assert found["first"]["loss"] > 0
    assert all(0 <= found[name] <= 1 for name in ("knn", "matching", "j", "f"))
    kit, backbone = small_kit(), initial_state(config, torch.device("cpu")).teacher.backbone
    # The test images are the training images: each is its own nearest neighbor.
    still = Kit(
        (ArrayVideo("still", kit.videos[0].frames[:1].repeat(40, axis=0), kit.videos[0].times),),
        kit.train,
        kit.test,
        (Sequence("still", kit.sequences[0].frames[:1].repeat(5, axis=0), kit.sequences[0].masks),),
    )
    same = part_learning.evaluate(backbone, still, torch.device("cpu"))
    # All scenes are alike, so each of the five matches with a chance of one in five.
    assert same["matching"] == pytest.approx(1 / (8 - part_learning.LATER))
    assert same["j"] > 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Make a video, labeled images and a DAVIS sequence."""
    root = tmp_path_factory.mktemp("data")
    make_video(root / "walk.mp4", width=160, height=96, num_frames=144, frames_per_second=12, seed=0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / "images" / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 40), (number * 9, 0, 0)).save(root / "images" / part / name / f"{number}.png")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        folder = root / "davis" / kind / "480p" / "dog"
        folder.mkdir(parents=True)
        for number in range(30):
            picture = Image.new("L", (320, 240))
            picture.paste(255, (number, 0, number + 80, 90))
            (picture.convert("RGB") if suffix == "jpg" else picture).save(folder / f"{number:05d}.{suffix}")
    return SimpleNamespace(videos=[str(root / "walk.mp4")], images=root / "images", sequences=root / "davis")


def test_a_clips_file_is_made_of_folders(folders, tmp_path: Path) -> None:
    kit = pack.pack(**vars(folders), out=tmp_path / "clips.npz", limit_mb=30)
    (video,) = load_kit(tmp_path / "clips.npz").videos
    assert video.frames.shape == (72, 96, 160, 3)
    assert video.times[:3] == pytest.approx([0, 1 / 6, 2 / 6], abs=0.01)
    assert video.frames.std() > 5
    assert (len(kit.train.images), len(kit.test.images)) == (4, 4)
    (sequence,) = kit.sequences
    assert sequence.frames.shape == (20, 120, 160, 3)
    assert 0.05 < sequence.masks.mean() < 0.2
    with pytest.raises(ConfigError, match=r"only \d+ frames of .* fit"):
        pack.pack(**vars(folders), out=tmp_path / "small.npz", limit_mb=1.5)


def test_a_long_video_is_taken_in_stretches(folders, tmp_path: Path) -> None:
    """With 72 frames of 46 KB, 2.7 MB hold 60, which is one stretch."""
    kit = pack.pack(**vars(folders), out=tmp_path / "clips.npz", limit_mb=2.8)
    assert [len(video.times) for video in kit.videos] == [pack.STRETCH_FRAMES]


def test_every_form_of_the_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_step, "MOST_STEPS", 3)
    figures = tmp_path / "step.jsonl"
    device, paper = torch.device("cpu"), load_config("paper", *part_step.REHEARSAL, *part_step.ALONE)
    part_step._exact(Figures(figures), paper, device)
    found = read_figures(figures)
    assert found["exact"]["steps"] == 3
    assert found["rates"]["tflop"] > 0
    assert {"loss", "teacher", "backward"} <= set(found["parts"])
    packed = part_step._form(load_config(paper, "tracking.views=packed"), device, None)
    assert packed["clips_per_second"] == pytest.approx(paper.optim.clips_per_slot / packed["seconds"])


def test_needs_little_more_than_torch() -> None:
    """The machine that runs the parts has no Ray, no decoder, no store and no rich."""
    names = "check, kit, part_learning, part_profile, part_step, part_tests"
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from dora_ray.bench.gpu import {names}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_tests_of_a_gpu_are_rehearsed(tmp_path: Path) -> None:
    """The GPU tests are skipped everywhere else, where their decay would go unnoticed."""
    settings = check.Settings(out=tmp_path, clips=tmp_path / "clips.npz", rehearse=True, factor=15.0)
    found = check.run_part("tests", settings, root=ROOT)
    outcomes = [test["outcome"] for test in found["figures"].values()]
    assert check.failures(found) == []
    assert outcomes.count("passed") >= 9


def test_a_wheel_is_used_where_its_package_is_missing_or_older(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    installed = {"timm": "1.0.9", "pydantic_core": "2.50.4", "torch": "2.11.0+cu130"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(script, "version", version)
    assert script.is_needed(Path("timm-1.0.31-py3-none-any.whl"))
    assert script.is_needed(Path("annotated_types-0.8.0-py3-none-any.whl"))
    assert not script.is_needed(Path("pydantic_core-2.50.4-cp312-cp312-manylinux_2_17_x86_64.whl"))
    assert script.has("torch") == (2, 11, 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_kit_names_the_folders_that_it_needs_and_takes_the_wheels_from_the_lock() -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--dry-run", "gpu-kit", "STAMP=", "BIN=bin", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = make("VIDEOS=a b", "IMAGES=c d", "DAVIS=e")
    assert done.returncode == 0, done.stderr
    assert '--videos a b --images "c d" --davis "e" --out .gpu-kit/clips.npz' in done.stdout
    for package in ("annotated-types", "pydantic", "pydantic-core", "timm", "typing-extensions", "typing-inspection"):
        assert f" {package}==" in done.stdout
    missing = subprocess.run(["make", "gpu-kit", "STAMP="], cwd=ROOT, capture_output=True, text=True, check=False)
    assert missing.returncode != 0
    assert "IMAGES=DIR_WITH_train_AND_test" in missing.stdout
