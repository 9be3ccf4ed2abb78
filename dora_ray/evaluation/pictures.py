"""Pictures of a checkpoint's objects in a video: the attention that discovers them, and their tracked maps and masks.

Legend: T frames, K objects, H x W pixels of a frame, h x w patches of it, N = h w.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_ray import files
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.errors import ConfigError
from dora_ray.evaluation import drawing
from dora_ray.evaluation.features import normalize
from dora_ray.evaluation.images import whole_size
from dora_ray.evaluation.shots import FRAMES_PER_SECOND, Shot, draw_shot
from dora_ray.imagenet import IMAGENET_MEAN
from dora_ray.method.objects import track_objects
from dora_ray.method.tracking import Threshold
from dora_ray.method.vit import tracked_features
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.weights import Origin, load_backbone, read_origin

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

CELL_HEIGHT, CELL_WIDTH = 150, 230
MASK_STRENGTH = 0.55
# PNG text that marks pictures drawn by `show`, which a later `show` may replace.
MARK = "Software"


@dataclass(frozen=True, eq=False)
class Tracks:
    """Tracked objects of a shot.

    Attributes:
        heads: (K,) attention heads that discovered them.
        attention: (K, h, w), CLS attention of these heads in frame 0.
        maps: (K, T, h, w), tracked maps T' (equation 4), each summing to 1.
        masks: (K, T, h, w) in [0, 1].
    """

    heads: np.ndarray
    attention: np.ndarray
    maps: np.ndarray
    masks: np.ndarray


def show(
    checkpoint: str | os.PathLike[str],
    video: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    seed: int = 0,
    num_clips: int = 2,
    num_frames: int = 6,
    num_objects: int | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw the objects that a checkpoint's teacher discovers and tracks in a video.

    For each clip it writes clip-0.png, with the frames, the attention of the heads that discovered the objects, the
    tracked maps and the masks; and clip-0.mp4, which follows the objects through all frames in between.

    Args:
        checkpoint: Any checkpoint that `load_backbone` accepts. Tracking settings come from a run's configuration; for
            other encoders from the recipe `released`.
        video: A video file.
        out: Folder of the pictures.
        seed: Seed of the clips' positions in the video and of the heads.
        num_clips: Number of clips to draw.
        num_frames: Frames per picture, `clip.stride_seconds` apart; fewer if the video is too short.
        num_objects: K; None: as trained.
        image_size: Short side of the encoder's input, pixels (a multiple of its patch size); None: as trained.
        device: Device of the encoder.

    Returns:
        pictures and movies (lists of paths), and clips: seconds, heads and has_cut of each.

    Raises:
        ConfigError: A number is out of range, or `out` holds a file with the same name that `show` did not draw; files
            that an earlier `show` drew are replaced.
        CheckpointError: The checkpoint cannot be loaded.
        VideoError: The video cannot be read, or is shorter than two frames of a clip.
    """
    folder = resolve_checkpoint(checkpoint)
    backbone = load_backbone(folder).to(device)
    origin = read_origin(folder, backbone)
    config = origin.config
    size, objects = _check_numbers(config, num_objects, image_size, num_clips=num_clips, num_frames=num_frames)
    if files.is_remote(out):
        raise ConfigError(f"pictures are written to a local folder, not to {out}. Give a local folder.")
    index = index_video(files.absolute(video))
    paths = _free_paths(Path(out), num_clips)
    rng = np.random.default_rng(seed)
    stride = float(config["clip"]["stride_seconds"])
    clips = []
    for picture, movie in paths:
        shot = draw_shot(index, rng, num_frames=num_frames, stride_seconds=stride)
        heads = rng.permutation(config["model"]["num_heads"])[:objects]
        arguments = tracking_arguments(config["tracking"])
        tracks = track(backbone, shot.frames, heads, image_size=size, device=device, **arguments)
        columns = np.unique(np.abs(shot.times[:, None] - _column_times(shot, stride)).argmin(axis=0))
        figure(shot, tracks, columns, heading=_heading(origin, index, shot)).save(picture, pnginfo=_marked())
        drawing.write_movie(movie, list(movie_frames(shot, tracks)), frames_per_second=FRAMES_PER_SECOND)
        clips.append({"seconds": float(shot.times[0]), "heads": heads.tolist(), "has_cut": shot.has_cut})
    return {"pictures": [str(path) for path, _ in paths], "movies": [str(path) for _, path in paths], "clips": clips}


def _check_numbers(
    config: dict[str, Any], num_objects: int | None, image_size: int | None, *, num_clips: int, num_frames: int
) -> tuple[int, int]:
    """Return the image size and the number of objects, as given or as trained."""
    model = config["model"]
    size = config["crops"]["global_size"] if image_size is None else image_size
    objects = config["tracking"]["num_objects"] if num_objects is None else num_objects
    if num_clips < 1 or num_frames < 2:
        raise ConfigError(f"num_clips={num_clips}, num_frames={num_frames}: use at least 1 clip and 2 frames.")
    if size < 1 or size % model["patch_size"]:
        raise ConfigError(f"image_size={size} is not a multiple of the encoder's patch size {model['patch_size']}.")
    if not 1 <= objects <= model["num_heads"]:
        raise ConfigError(f"num_objects={objects}: use 1 to {model['num_heads']}, the encoder's attention heads.")
    return size, objects


def _free_paths(out: Path, num_clips: int) -> list[tuple[Path, Path]]:
    paths = [(out / f"clip-{number}.png", out / f"clip-{number}.mp4") for number in range(num_clips)]
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file. Give a folder.")
    old = [picture for picture in out.glob("clip-*.png") if _is_ours(picture)]
    ours = {path for picture in old for path in (picture, picture.with_suffix(".mp4"))}
    used = [str(path) for pair in paths for path in pair if path.exists() and path not in ours]
    if used:
        raise ConfigError(f"{used[0]} already exists, and `show` did not draw it. Give another folder.")
    for path in ours:  # remove all: clips of an older checkpoint beside new ones would be misleading
        path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    return paths


def _is_ours(picture: Path) -> bool:
    """Return whether `show` has drawn this picture."""
    try:
        with Image.open(picture) as image:
            return image.info.get(MARK) == __name__
    except OSError:
        return False


def _marked() -> PngInfo:
    info = PngInfo()
    info.add_text(MARK, __name__)
    return info


def tracking_arguments(tracking: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `track` from a `tracking` section."""
    names = ("block", "normalize_patches", "num_iterations", "epsilon", "threshold")
    return {name: tracking[name] for name in names}


@torch.inference_mode()
def track(
    vit: VisionTransformer,
    frames: np.ndarray,
    heads: np.ndarray,
    *,
    image_size: int,
    device: str,
    block: int,
    normalize_patches: bool,
    num_iterations: int,
    epsilon: float,
    threshold: Threshold,
) -> Tracks:
    """Discover objects in the first frame and track them through all, as a training step does for one clip.

    Args:
        vit: The teacher's encoder, on `device`.
        frames: (T, H, W, 3) uint8; not cropped.
        heads: (K,) attention heads.
        image_size: Short side of the encoder's input, pixels.
        device: Device of the encoder.
        block: As `tracked_features`.
        normalize_patches: As `track_objects`.
        num_iterations: As `track_objects`.
        epsilon: As `track_objects`.
        threshold: As `track_objects`.
    """
    patch = int(vit.patch_embed.patch_size[0])
    size = (frames.shape[2], frames.shape[1])
    width, height = whole_size(size, short_side=image_size, patch_size=patch)
    small = np.stack([drawing.resize(frame, height=height, width=width) for frame in frames])
    images = normalize(torch.from_numpy(small).to(device))
    tracked = tracked_features(vit, images[None], block=block)
    objects = track_objects(
        tracked,
        torch.from_numpy(heads).to(device)[None],
        normalize_patches=normalize_patches,
        num_iterations=num_iterations,
        epsilon=epsilon,
        threshold=threshold,
    )
    shape = (height // patch, width // patch)
    attention = tracked.cls_attention0[0].cpu().numpy()[heads].reshape(len(heads), *shape)
    maps, masks = (
        part[0].cpu().numpy().reshape(len(heads), len(frames), *shape) for part in (objects.maps, objects.masks)
    )
    return Tracks(heads, attention, maps, masks)


def _column_times(shot: Shot, stride_seconds: float) -> np.ndarray:
    """Return the times of the picture's columns in seconds: every stride from the shot's first frame on."""
    return np.arange(shot.times[0], shot.times[-1] + stride_seconds / 2, stride_seconds)


def _heading(origin: Origin, index: VideoIndex, shot: Shot) -> list[str]:
    model, tracking = origin.config["model"], origin.config["tracking"]
    lines = [
        f"{Path(index.path).name} from {shot.times[0]:.2f} s: objects found in the first frame and tracked",
        f"{origin.words} ({model['name']}, {model['width']} wide, {model['depth']} deep); "
        f"block {tracking['block']}, {tracking['num_iterations']} Sinkhorn-Knopp iterations, "
        f"masks: {tracking['threshold']}",
    ]
    return lines + (["a shot cut runs through this clip: no shot of the video was long enough"] if shot.has_cut else [])


def cell_size(frame: np.ndarray) -> tuple[int, int]:
    """Return the height and width of a cell for frames (H, W, 3), with their aspect ratio, as large as allowed."""
    height, width = frame.shape[:2]
    scale = min(CELL_HEIGHT / height, CELL_WIDTH / width)
    return round(height * scale), round(width * scale)


def figure(shot: Shot, tracks: Tracks, columns: np.ndarray, *, heading: list[str]) -> Image.Image:
    """Draw a shot as one picture, with time from left to right after a first column for the attention.

    Rows: the frames; the masks of all objects over them; and for each object two rows: its head's CLS attention in the
    first frame with its tracked maps, and its object view, the student's input (equation 5).

    Args:
        shot: The frames.
        tracks: The objects.
        columns: Indices of the frames to draw.
        heading: Lines above the picture.
    """
    height, width = cell_size(shot.frames[0])
    frames = [drawing.resize(shot.frames[t], height=height, width=width) for t in columns]
    covered = [
        drawing.overlay(frame, tracks.masks[:, t], strength=MASK_STRENGTH)
        for frame, t in zip(frames, columns, strict=True)
    ]
    rows = [drawing.Row("frame", drawing.INK, [None, *frames]), drawing.Row("objects", drawing.INK, [None, *covered])]
    for k, head in enumerate(tracks.heads.tolist()):
        cells = [_heat(tracks.attention[k], height, width), *(_heat(tracks.maps[k, t], height, width) for t in columns)]
        seen = [_object_view(frame, tracks.masks[k, t]) for frame, t in zip(frames, columns, strict=True)]
        rows.append(drawing.Row(f"object {k + 1}\n(head {head})", drawing.object_color(k), cells))
        rows.append(drawing.Row("its view", drawing.object_color(k), [None, *seen]))
    titles = ["CLS attention", *(f"{shot.times[t] - shot.times[0]:+.1f} s" for t in columns)]
    notes = [
        "CLS attention: of the head that discovered the object, in the first frame. Other columns: the object's",
        "tracked map, and its view, which is what the student sees. Stripes: objects overlap.",
    ]
    scale = ("attention and maps: 0", "each one's largest value")
    return drawing.grid(rows, titles=titles, heading=heading, notes=notes, scale=scale)


def _heat(values: np.ndarray, height: int, width: int) -> np.ndarray:
    return drawing.enlarge(drawing.heat_colors(values / max(float(values.max()), 1e-12)), height=height, width=width)


def _object_view(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the frame (H, W, 3) where the mask (h, w) is 1, else the mean color (0 after normalization)."""
    kept = drawing.enlarge(mask, height=frame.shape[0], width=frame.shape[1])[..., None]
    pixels: np.ndarray = kept * frame + (1 - kept) * 255 * np.array(IMAGENET_MEAN)
    return pixels.round().astype(np.uint8)


def movie_frames(shot: Shot, tracks: Tracks) -> Iterator[np.ndarray]:
    """Yield each frame side by side with its object overlay, (H, 2 W + gap, 3) uint8."""
    gap = np.full((shot.frames.shape[1], 2 * drawing.GAP, 3), 255, dtype=np.uint8)
    for t, frame in enumerate(shot.frames):
        yield np.concatenate([frame, gap, drawing.overlay(frame, tracks.masks[:, t], strength=MASK_STRENGTH)], axis=1)
