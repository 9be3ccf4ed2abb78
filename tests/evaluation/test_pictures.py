from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dora_ray import export
from dora_ray.commands.show import run as show_command
from dora_ray.errors import CheckpointError, ConfigError, VideoError
from dora_ray.evaluation.pictures import figure, movie_frames, show, track
from dora_ray.evaluation.shots import Shot, draw_shot, read_window
from dora_ray.method.dora import track_objects
from dora_ray.method.vit import build_vit, tracked_features
from dora_ray.video.index import index_video
from tests.evaluation.checkpoints import small_config, write_checkpoint

TRACKING = {"block": -2, "normalize_patches": True, "num_iterations": 5, "epsilon": 0.05, "threshold": "clip"}


def moving_square(number: int, *, height: int = 96, width: int = 160) -> np.ndarray:
    """A bright square that moves over a gradient."""
    frame = np.linspace(40, 110, width, dtype=np.uint8)[None, :, None].repeat(height, axis=0).repeat(3, axis=2)
    frame[30:60, 10 + 2 * number : 40 + 2 * number] = (230, 60, 40)
    return frame


def write_video(path, frames, *, rate=20):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "10", "crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", [moving_square(n) for n in range(50)])


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    sizes = {"width": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "image_size": 32, "drop_path": 0.0}
    return build_vit(name="vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", small_config("tracking.num_objects=3"))


def test_show_writes_a_picture_and_a_movie_for_each_clip(checkpoint, video, tmp_path):
    written = show(checkpoint, video, out=tmp_path / "out", num_clips=2, num_frames=3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clip-0.mp4",
        "clip-0.png",
        "clip-1.mp4",
        "clip-1.png",
    ]
    assert written["pictures"] == [str(tmp_path / "out" / f"clip-{n}.png") for n in range(2)]
    assert [sorted(clip["heads"]) for clip in written["clips"]] == [[0, 1, 2]] * 2
    assert not any(clip["has_cut"] for clip in written["clips"])
    with Image.open(written["pictures"][0]) as picture:
        width, height = picture.size
    assert width > 4 * 230  # the attention and three frames
    assert height > (2 + 2 * 3) * 138  # frames, objects; a map and a view for each object
    with av.open(written["movies"][0]) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 11  # one second, ten a second, both ends
    assert (frames[0].height, frames[0].width) == (96, 2 * 160 + 12)


def test_the_seed_decides_what_is_shown(checkpoint, video, tmp_path):
    clips = [
        show(checkpoint, video, out=tmp_path / name, seed=seed)["clips"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert clips[0] == clips[1] != clips[2]
    assert (tmp_path / "a" / "clip-0.png").read_bytes() == (tmp_path / "b" / "clip-0.png").read_bytes()


def test_show_replaces_its_own_pictures_and_no_others(checkpoint, video, tmp_path):
    out = tmp_path / "out"
    first = show(checkpoint, video, out=out, num_clips=2)
    (out / "mine.png").write_bytes(b"mine")
    second = show(checkpoint, video, out=out, num_clips=1, seed=1)
    assert len(first["pictures"]) == 2
    assert {path.name for path in out.iterdir()} == {"clip-0.png", "clip-0.mp4", "mine.png"}, "no clip of the last time"
    assert second["clips"] != first["clips"][:1]
    Image.new("RGB", (8, 8)).save(out / "clip-0.png")
    with pytest.raises(ConfigError, match=r"clip-0\.png already exists, and `show` did not draw it"):
        show(checkpoint, video, out=out)


def test_show_overwrites_nothing(checkpoint, video, tmp_path):
    (tmp_path / "clip-1.mp4").write_text("mine")
    with pytest.raises(ConfigError, match=r"clip-1\.mp4 already exists"):
        show(checkpoint, video, out=tmp_path)
    assert not (tmp_path / "clip-0.png").exists()
    with pytest.raises(ConfigError, match="local folder"):
        show(checkpoint, video, out="s3://bucket/pictures")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_objects": 4}, "use 1 to 3"),
        ({"num_frames": 1}, "2 frames"),
        ({"num_clips": 0}, "1 clip"),
        ({"image_size": 33}, "patch size 8"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_anything_is_written(checkpoint, video, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        show(checkpoint, video, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_videos_and_exports_are_refused(checkpoint, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    short = write_video(tmp_path / "short.mp4", [moving_square(n) for n in range(4)])
    with pytest.raises(VideoError, match=r"a\.mp4"):
        show(checkpoint, tmp_path / "a.mp4", out=tmp_path / "a")
    with pytest.raises(VideoError, match=r"lasts 0\.15 s.*0\.5 s apart"):
        show(checkpoint, short, out=tmp_path / "b")
    with pytest.raises(CheckpointError, match="no such folder"):
        show(tmp_path / "nothing", short, out=tmp_path / "c")


def test_a_window_holds_the_frames_on_screen_at_its_times(video):
    window = read_window(index_video(str(video)), start=0.5, span=1.0)
    np.testing.assert_allclose(window.times, np.arange(11) / 10 + 0.5, atol=1e-9)
    for frame, seconds in zip(window.frames, window.times, strict=True):
        expected = moving_square(round(seconds * 20))
        assert np.abs(frame.astype(int) - expected).mean() < 3


def test_no_shot_runs_across_a_cut(tmp_path):
    """20 dark frames, 40 frames of another scene: shots of 1 s and 2 s at 20 frames a second."""
    first = [np.full((96, 160, 3), 30, np.uint8) + np.uint8(n) for n in range(20)]
    path = write_video(tmp_path / "cut.mp4", first + [moving_square(n) for n in range(40)])
    index = index_video(str(path))
    for seed in range(6):
        shot = draw_shot(index, np.random.default_rng(seed), num_frames=4, stride_seconds=0.5)
        assert not shot.has_cut
        assert 0.75 <= shot.seconds <= 1.5 + 1e-6
        assert shot.times[0] >= 1.0 - 1e-6 or shot.times[-1] < 1.0


def test_tracking_is_the_training_steps_own(vit):
    """A square frame of the encoder's own size: maps and masks are those of the method's functions."""
    frames = np.stack([moving_square(n)[:32, 16:48] for n in range(3)])
    heads = np.array([2, 0])
    tracks = track(vit, frames, heads, image_size=32, device="cpu", **TRACKING)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(frames).float() / 255 - mean) / std).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        tracked = tracked_features(vit, images, block=-2)
        arguments = {name: value for name, value in TRACKING.items() if name != "block"}
        objects = track_objects(tracked, torch.tensor([[2, 0]]), **arguments)
    np.testing.assert_allclose(tracks.maps.reshape(2, 3, 16), objects.maps[0], rtol=1e-5)
    np.testing.assert_array_equal(tracks.masks.reshape(2, 3, 16), objects.masks[0])
    np.testing.assert_allclose(tracks.attention.reshape(2, 16), tracked.cls_attention0[0, [2, 0]], rtol=1e-5)


def test_frames_that_are_not_square_are_seen_whole(vit):
    tracks = track(
        vit, np.stack([moving_square(n) for n in range(2)]), np.array([0]), image_size=32, device="cpu", **TRACKING
    )
    assert tracks.maps.shape == (1, 2, 4, 7)
    np.testing.assert_allclose(tracks.maps.sum(axis=(2, 3)), 1.0, rtol=1e-4)


def test_the_objects_look_different_in_the_pictures(vit):
    frames = np.stack([moving_square(n) for n in range(4)])
    shot = Shot(frames, np.arange(4) / 10, np.zeros(4, bool))
    tracks = track(
        vit, frames, np.array([0, 1, 2]), image_size=64, device="cpu", num_iterations=0, **_without("num_iterations")
    )
    assert len({tracks.maps[k].tobytes() for k in range(3)}) == 3
    swapped = track(
        vit, frames, np.array([1, 0, 2]), image_size=64, device="cpu", num_iterations=0, **_without("num_iterations")
    )
    first, second = (np.asarray(figure(shot, some, np.array([0, 3]), heading=["a"])) for some in (tracks, swapped))
    assert first.shape == second.shape
    assert (first != second).any()
    movie = list(movie_frames(shot, tracks))
    assert [frame.shape for frame in movie] == [(96, 332, 3)] * 4
    np.testing.assert_array_equal(movie[2][:, :160], frames[2])
    assert (movie[2][:, 172:] != frames[2]).any()


def test_a_run_is_shown_at_its_first_a_middle_and_its_last_checkpoint(video, tmp_path, capsys):
    run, config = tmp_path / "run", small_config()
    for step in (10, 20, 30, 40):
        write_checkpoint(run / "checkpoints" / f"step-{step:08d}", config, step=step)
    show_command(argparse.Namespace(checkpoint=str(run), video=str(video), out=None, clips=1, seed=3))
    pictures = {path.parent.relative_to(run).as_posix() for path in run.glob("pictures/**/clip-0.png")}
    assert pictures == {"pictures/step-00000010", "pictures/step-00000030", "pictures"}
    assert len(capsys.readouterr().out.splitlines()) == 6, "a picture and a movie each"


def _without(name):
    return {key: value for key, value in TRACKING.items() if key != name}


def test_encoders_without_a_run_are_shown_as_the_released_code_tracks(checkpoint, video, tmp_path):
    """An export knows no run; nor does a file of weights, whose sizes its tensors tell."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=192, depth=2, num_classes=0)
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "released.pth")
    for number, source in enumerate((export(checkpoint, tmp_path / "export"), tmp_path / "released.pth")):
        written = show(source, video, out=tmp_path / str(number), num_clips=1, num_frames=2)
        assert len(written["clips"][0]["heads"]) == 3
        assert Path(written["pictures"][0]).stat().st_size > 0
