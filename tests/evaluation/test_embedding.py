"""Features in files: right rows, right times, and nothing half written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from dora_ray import embed, load_backbone
from dora_ray.cli import main
from dora_ray.errors import CheckpointError, ConfigError, VideoError
from dora_ray.evaluation.features import normalize
from dora_ray.evaluation.images import read_image
from tests.evaluation.checkpoints import small_config, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of three sizes, in two folders."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(7):
        folder = root / f"part-{number % 2}"
        folder.mkdir(exist_ok=True)
        size = (40 + 8 * (number % 3), 50, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def gray_video(path: Path, levels: list[int], *, rate: int = 10, keys: int = 5) -> Path:
    """A frame of each gray level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": str(keys), "crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def features(checkpoint: Path, pixels: np.ndarray) -> torch.Tensor:
    """(M, 1 + N, D) of pixels (M, S, S, 3)."""
    with torch.inference_mode():
        return load_backbone(checkpoint).forward_features(normalize(torch.from_numpy(pixels.copy())))


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_images_are_those_of_the_knn_protocol(checkpoint: Path, images: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / "deep" / f"features.{ending}"
    told: list[tuple[int, int]] = []
    result = embed(
        checkpoint, images, out=out, patches=True, batch_size=3, progress=lambda *numbers: told.append(numbers)
    )
    assert result == {
        "out": str(out),
        "checkpoint": str(checkpoint),
        "rows": 7,
        "width": 24,
        "image_size": 32,
        "missing": 0,
    }
    paths = sorted(images.rglob("*.png"))
    expected = features(checkpoint, np.stack([read_image(path, size=32) for path in paths])).numpy()
    found = read(out)
    assert list(found["path"]) == [str(path) for path in paths]
    assert np.isnan(found["seconds"]).all()
    np.testing.assert_allclose(found["cls"], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["patches"].reshape(7, 16, 24), expected[:, 1:], atol=1e-5)
    assert set(found["patch_rows"]) == set(found["patch_columns"]) == {4}
    assert json.loads(found["about"])["checkpoint"] == str(checkpoint)
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def read(path: Path) -> dict[str, Any]:
    """Either kind of file as arrays."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        return {**found, "about": str(found["dora_ray"])}
    table = parquet.read_table(path)
    found = {name: table[name].to_pylist() for name in table.column_names}
    found["seconds"] = np.array([np.nan if second is None else second for second in found["seconds"]])
    for name in set(found) & {"cls", "patches"}:
        found[name] = np.array(found[name], np.float32)
    return {**found, "about": table.schema.metadata[b"dora_ray"].decode()}


@pytest.mark.parametrize(("rate", "seconds"), [(2.0, [0.0, 0.5, 1.0, 1.5, 2.0]), (0.4, [0.0])])
def test_a_videos_frames_are_those_on_screen(
    checkpoint: Path, tmp_path: Path, rate: float, seconds: list[float]
) -> None:
    levels = list(range(20, 240, 10))
    video = gray_video(tmp_path / "gray.mp4", levels)
    result = embed(checkpoint, video, out=tmp_path / "gray.npz", frames_per_second=rate)
    found = read(tmp_path / "gray.npz")
    np.testing.assert_allclose(found["seconds"], seconds, atol=1e-6)
    assert set(found["path"]) == {str(video)}
    shown = [levels[round(10 * second)] for second in seconds]
    expected = features(checkpoint, np.stack([np.full((32, 32, 3), level, np.uint8) for level in shown]))[:, 0]
    np.testing.assert_allclose(found["cls"], expected.numpy(), atol=0.1)
    assert (result["rows"], result["missing"]) == (len(seconds), 0)
    assert "patches" not in found


def test_pictures_can_be_seen_whole(checkpoint: Path, tmp_path: Path) -> None:
    video = gray_video(tmp_path / "gray.mp4", [100] * 11)
    embed(checkpoint, video, out=tmp_path / "whole.parquet", patches=True, whole=True, image_size=16)
    found = read(tmp_path / "whole.parquet")
    assert (found["patch_rows"][0], found["patch_columns"][0]) == (2, 3)
    assert len(found["patches"][0]) == 2 * 3 * 24


def test_unlike_images_seen_whole_go_to_parquet_alone(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    embed(checkpoint, images, out=tmp_path / "whole.parquet", patches=True, whole=True)
    table = parquet.read_table(tmp_path / "whole.parquet")
    grids = set(zip(table["patch_rows"].to_pylist(), table["patch_columns"].to_pylist(), strict=True))
    assert len(grids) > 1
    counts = [
        rows * columns * 24
        for rows, columns in zip(*(table[n].to_pylist() for n in ("patch_rows", "patch_columns")), strict=True)
    ]
    assert [len(patches) for patches in table["patches"].to_pylist()] == counts
    with pytest.raises(ConfigError, match=r"write patches of different grids to FILE\.parquet"):
        embed(checkpoint, images, out=tmp_path / "whole.npz", patches=True, whole=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.parquet"]


def test_a_folder_may_hold_both(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    gray_video(tmp_path / "mixed" / "a.mp4", [50] * 11)
    Image.new("RGB", (40, 40)).save(tmp_path / "mixed" / "b.png")
    embed(checkpoint, tmp_path / "mixed", out=tmp_path / "mixed.parquet")
    found = read(tmp_path / "mixed.parquet")
    assert [Path(path).name for path in found["path"]] == ["b.png", "a.mp4", "a.mp4"]
    np.testing.assert_allclose(found["seconds"], [np.nan, 0, 1])


def test_frames_that_damage_reached_are_left_out_and_said(checkpoint: Path, tmp_path: Path, caplog) -> None:
    """One packet's content is zeros: the frames that lean on it are not taken for sound ones."""
    rng, video = np.random.default_rng(0), tmp_path / "noise.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for _ in range(30):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(video)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
        start, size = packet.pos, packet.size
    content = bytearray(video.read_bytes())
    content[start + 8 : start + size] = bytes(size - 8)
    video.write_bytes(bytes(content))
    result = embed(checkpoint, video, out=tmp_path / "noise.npz", frames_per_second=10.0)
    seconds = read(tmp_path / "noise.npz")["seconds"].round(3).tolist()
    assert 1 <= result["missing"] <= 3
    assert result["rows"] == len(seconds) == 30 - result["missing"]
    assert {n / 10 for n in range(30)} - set(seconds) <= {1.2, 1.3, 1.4}
    assert f"{result['missing']} of 30 pictures could not be read" in caplog.text


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing may be left."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_unreadable_images_are_named_or_left_out(checkpoint: Path, unchanged: Path, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"bad\.png cannot be read as an image.*skip_unreadable"):
        embed(checkpoint, folder, out=unchanged / "x.npz")
    result = embed(checkpoint, folder, out=tmp_path / "x.npz", skip_unreadable=True)
    assert (result["rows"], result["missing"]) == (1, 1)
    assert "bad.png" in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": "x.csv"}, ConfigError, r"FILE\.parquet or FILE\.npz"),
        ({"image_size": 33}, ConfigError, "patch size 8"),
        ({"frames_per_second": 0.0}, ConfigError, "frames_per_second=0"),
        ({"data": "nothing.mp4"}, VideoError, r"nothing\.mp4"),
        ({"data": "empty"}, ConfigError, "neither images nor videos"),
        ({"checkpoint": "nowhere"}, CheckpointError, "no such folder"),
        ({"device": "tpu"}, ConfigError, "device='tpu'"),
    ],
)
def test_what_cannot_work_is_refused(
    checkpoint: Path,
    images: Path,
    unchanged: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    given = {"checkpoint": checkpoint, "data": images, "out": "x.npz"} | changes
    out = unchanged / given.pop("out")
    with pytest.raises(error, match=message):
        embed(given.pop("checkpoint"), given.pop("data"), out=out, **given)


def test_the_command_prints_what_it_wrote(checkpoint: Path, images: Path, tmp_path: Path, capsys) -> None:
    arguments = ["embed", str(checkpoint), str(images), "--out", str(tmp_path / "f.parquet"), "--size", "16"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "rows        7" in printed.out
    assert "embed: 7/7 pictures (100%)" in printed.err
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_an_object_store_gets_the_whole_file(checkpoint: Path, images: Path) -> None:
    import fsspec

    embed(checkpoint, images, out="memory://features/f.parquet")
    remote = fsspec.filesystem("memory")
    try:
        with remote.open("memory://features/f.parquet") as file:
            assert parquet.read_table(file).num_rows == 7
    finally:
        remote.rm("memory://features", recursive=True)
