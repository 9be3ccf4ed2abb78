"""Random views of clips, rendered in batches on the clips' device, with per-sample parameters drawn on the CPU.

A view of a frame is a crop, an antialiased resize, optionally a flip and a Gaussian blur, then color. All but color are
linear and separable (see `dora_ray.views.resample`); color is one 3 x 4 affine map per frame, with the normalization
folded in. A whole batch is therefore rendered in a few passes, although every frame has its own parameters.

Deviations from the color jitter of torchvision and PIL, which the released code used: brightness, contrast, saturation
and hue come in this fixed order (theirs is random); the result is clamped to [0, 1] once at the end (theirs also after
each of the four); hue is a rotation about the axis of grays, a linear map that keeps the mean of R, G and B (theirs
shifts the angle in HSV, which keeps the largest of them: the two agree on 0, 1/3 and 2/3 of a turn).

Legend: B clips, V views, T frames, S the view's side in pixels, n frames of all views (B x V x T).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import Tensor

from dora_ray.clips.crop import Interpolation, Range, random_boxes
from dora_ray.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dora_ray.method.upload import upload_beside
from dora_ray.views.resample import blur_matrix, resample_by_crop, resample_by_matrix

# ITU-R BT.601, as in PIL.
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclasses.dataclass(frozen=True)
class ViewParameters:
    """Parameters of each view of each frame, for `render`; float32 tensors.

    Attributes:
        boxes: (B, V, T, 4) top, left, height, width of the crop, in pixels of the clip.
        flip: (B, V, T) 1 where the view is mirrored left to right, else 0.
        color: (B, V, T, 3, 4) maps RGB in [0, 1] to ``color[..., :3] @ rgb + color[..., 3] * g``, g being the mean luma
            of the cropped frame (the contrast's pivot).
        sigma: (B, V, T) standard deviation of the Gaussian blur in pixels of the view; 0 means no blur.
    """

    boxes: Tensor
    flip: Tensor
    color: Tensor
    sigma: Tensor


def draw_views(
    rng: np.random.Generator,
    *,
    num_clips: int,
    num_views: int,
    num_frames: int,
    clip_size: int,
    scale: Range,
    ratio: Range,
    per_frame_boxes: bool,
    flip_probability: float,
    jitter: tuple[float, float, float, float],
    jitter_probability: float,
    gray_probability: float,
    blur_probability: float,
    blur_sigma: Range,
) -> ViewParameters:
    """Draw the parameters of all views of a batch of clips.

    Boxes and flips are shared by the frames of a clip (global views) or drawn for each frame (``per_frame_boxes``,
    local views); color, gray and blur are always drawn per frame.

    Args:
        rng: the only source of randomness.
        num_clips: B.
        num_views: V, may be 0.
        num_frames: T.
        clip_size: side of the square clips, in pixels.
        scale: lowest and highest share of the clip's area that a view shows.
        ratio: lowest and highest width / height of a crop.
        per_frame_boxes: draw box and flip for each frame.
        flip_probability: probability of mirroring left to right.
        jitter: strengths of brightness, contrast, saturation (factors drawn from 1 - strength to 1 + strength, at least
            0) and hue (turns, drawn from -strength to strength).
        jitter_probability: probability of jittering a frame's color.
        gray_probability: probability of turning a frame gray.
        blur_probability: probability of blurring a frame.
        blur_sigma: lowest and highest standard deviation of the blur, in pixels of the view.

    Returns:
        The parameters, on the CPU.
    """
    shape = (num_clips, num_views, num_frames)
    drawn = shape if per_frame_boxes else (num_clips, num_views, 1)
    boxes = random_boxes(rng, count=math.prod(drawn), height=clip_size, width=clip_size, scale=scale, ratio=ratio)
    flip = rng.random(drawn) < flip_probability
    jittered = rng.random(shape) < jitter_probability
    low = [max(0.0, 1.0 - strength) for strength in jitter[:3]] + [-jitter[3]]
    high = [1.0 + strength for strength in jitter[:3]] + [jitter[3]]
    factors = np.where(jittered[..., None], rng.uniform(low, high, (*shape, 4)), [1.0, 1.0, 1.0, 0.0])
    gray = rng.random(shape) < gray_probability
    blurred = rng.random(shape) < blur_probability
    sigma = np.where(blurred, rng.uniform(blur_sigma[0], blur_sigma[1], shape), 0.0)
    return ViewParameters(
        boxes=_float32(np.broadcast_to(boxes.reshape(*drawn, 4), (*shape, 4))),
        flip=_float32(np.broadcast_to(flip, shape)),
        color=_float32(color_transform(factors, gray)),
        sigma=_float32(sigma),
    )


def color_transform(factors: np.ndarray, gray: np.ndarray) -> np.ndarray:
    """Return the affine map that applies brightness, contrast, saturation, hue and gray in this order.

    With x a color, l(x) its luma and g the mean luma of its frame::

            x = brightness * x
            x = contrast * x + (1 - contrast) * brightness * g
            x = saturation * x + (1 - saturation) * l(x)
            x = x turned by hue about the axis of grays, red toward green
            x = l(x) if gray else x

    Grays are fixed points of the last three steps, so only the contrast adds a constant, the same to all channels.

    Args:
        factors: (..., 4) brightness, contrast, saturation (1 changes nothing), hue in turns (0 changes nothing).
        gray: (...) True to drop the color.

    Returns:
        (..., 3, 4) see `ViewParameters.color`.
    """
    brightness, contrast, saturation, hue = np.moveaxis(factors, -1, 0)[..., None, None]
    to_gray = np.broadcast_to(_LUMA, (3, 3))
    matrix = saturation * _hue_rotation(hue) + (1.0 - saturation) * to_gray
    matrix = brightness * contrast * np.where(gray[..., None, None], to_gray @ matrix, matrix)
    pivot = np.broadcast_to((1.0 - contrast) * brightness, (*gray.shape, 3, 1))
    return np.concatenate([matrix, pivot], axis=-1)


def upload_clips(clips: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Copy selected clips to a device, with the single host copy that pinned memory needs anyway.

    Args:
        clips: (M, T, H, W, 3) uint8.
        rows: (B,) indices of the selected clips.
        device: device that renders them.

    Returns:
        (B, T, H, W, 3) uint8.
    """
    chosen = torch.empty((len(rows), *clips.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    # With mode="raise", numpy would write to a buffer first.
    np.take(clips, rows, axis=0, out=chosen.numpy(), mode="clip")
    return upload_beside(chosen, device) if device.type == "cuda" else chosen.to(device)


@torch.no_grad()
def render(
    clips: Tensor, parameters: ViewParameters, *, size: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Render the views of clips: crop, antialiased resize, flip, color, blur, clamp, ImageNet normalization.

    On the CPU, crops go one by one through torch's uint8 kernel, which reads only the box and rounds to whole levels.
    On other devices, two batched float16 matrix products render all crops. The results differ by at most about one
    level of 255. Blur and color commute (one is linear across pixels and keeps constants, the other acts within a
    pixel) up to the clamp.

    Args:
        clips: (B, T, H, W, 3) uint8, on any device.
        parameters: the views, see `draw_views`, on the clips' device; V may be 0.
        size: S, in pixels.
        interpolation: kernel of the resize.

    Returns:
        (B, V, T, 3, S, S) float32, contiguous, on the clips' device, without gradient.

    Raises:
        ValueError: the clips are not uint8 of shape (B, T, H, W, 3), or the parameters do not match them.
    """
    lead = tuple(parameters.sigma.shape)
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"clips must be uint8 (B, T, H, W, 3), got {clips.dtype} {tuple(clips.shape)}")
    if (lead[0], lead[2]) != tuple(clips.shape[:2]):
        raise ValueError(f"parameters are for {lead[0]} clips of {lead[2]} frames, clips are {tuple(clips.shape[:2])}")
    if not math.prod(lead):
        return torch.empty(*lead, 3, size, size, device=clips.device)
    # bfloat16 has 8 significant bits, too few for sums of weighted pixels.
    with torch.autocast(clips.device.type, enabled=False):
        resample = resample_by_crop if clips.device.type == "cpu" else resample_by_matrix
        pixels = resample(clips, parameters.boxes, parameters.flip, size=size, interpolation=interpolation).flatten(
            0, 2
        )
        color = _normalized_color(pixels, parameters.color.flatten(0, 2))
        blurred = _blur(pixels, parameters.sigma.flatten())
        return _paint(blurred.float(), *color).view(*lead, 3, size, size)


def _hue_rotation(turns: np.ndarray) -> np.ndarray:
    """Return the (..., 3, 3) rotations of RGB about the axis of grays by (..., 1, 1) turns (Rodrigues' formula)."""
    cosine, sine = np.cos(2 * math.pi * turns), np.sin(2 * math.pi * turns)
    across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return cosine * np.eye(3) + (1.0 - cosine) / 3 + sine * across


def _float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ImageNet's mean (3, 1) and standard deviation (3, 1), and luma weights (3,), copied once per device."""
    mean, std, luma = (
        torch.tensor(v, dtype=torch.float32, device=device) for v in (IMAGENET_MEAN, IMAGENET_STD, _LUMA)
    )
    return mean[:, None], std[:, None], luma


def _normalized_color(pixels: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, 3, 3) matrices and (n, 3, 1) offsets that map (n, 3, S, S) pixels in [0, 255] to normalized colors."""
    mean, std, luma = _constants(pixels.device)
    mean_luma = pixels.mean((2, 3), dtype=torch.float32) @ luma / 255
    offset = (color[..., 3:] * mean_luma[:, None, None] - mean) / std
    return color[..., :3] / (255 * std), offset


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Return the frames (n, 3, S, S) blurred by sigma (n,); on a CPU in place."""
    if pixels.device.type != "cpu":
        # Here sigma's values would have to be waited for, and blurring by 0 is cheap.
        return _blur_all(pixels, sigma)
    chosen = sigma.nonzero().flatten()
    return pixels.index_copy_(0, chosen, _blur_all(pixels[chosen], sigma[chosen])) if len(chosen) else pixels


def _blur_all(pixels: Tensor, sigma: Tensor) -> Tensor:
    size = pixels.shape[-1]
    matrix = blur_matrix(sigma, size=size).to(pixels.dtype)
    across = pixels.reshape(-1, 3 * size, size) @ matrix.mT
    # Multiply per channel: a broadcast product would copy the matrices.
    channels = across.view(-1, 3, size, size).unbind(1)
    return torch.stack([matrix @ channel for channel in channels], dim=1)


def _paint(pixels: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Apply the color maps to pixels (n, 3, S, S), and clamp to black and white after normalization."""
    mean, std, _ = _constants(pixels.device)
    painted = torch.bmm(matrix, pixels.flatten(2)).add_(offset)
    # clamp_ with tensors is several times slower on the CPU.
    torch.maximum(painted, -mean / std, out=painted)
    torch.minimum(painted, (1 - mean) / std, out=painted)
    return painted.view_as(pixels)
