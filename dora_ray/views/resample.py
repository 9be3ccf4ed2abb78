"""Batched crop, resize and blur: small matrix products on a GPU, torch's uint8 kernel on the CPU.

Cropping, antialiased resizing, mirroring and blurring are all linear and separable, so each is one small matrix per
side: ``rows @ frame @ columns.T``. A batch of frames with individual boxes needs two batched matrix products. They run
in float16, which a GPU multiplies much faster than float32 and whose 11 significant bits hold each of 256 levels; the
error is at most a quarter of a level.

Legend: B clips, V views, T frames, S the result's side in pixels.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dora_ray.clips.crop import Interpolation, resize_uint8

# Beyond four standard deviations, a Gaussian weighs less than a thousandth of one of 255 levels.
_BLUR_REACH = 4.0
# So narrow that a neighbor's weight is 0 in float32.
_LEAST_SIGMA = 0.01


def resample_by_matrix(
    clips: Tensor, boxes: Tensor, flip: Tensor, *, size: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Crop, resize and flip by two batched products: ``rows @ frame @ columns.T`` for each view of each frame.

    Args:
        clips: (B, T, H, W, 3) uint8, on any device; the other tensors are on the same.
        boxes: (B, V, T, 4) top, left, height, width.
        flip: (B, V, T) 1 to mirror left to right, else 0.
        size: S, in pixels.
        interpolation: kernel of the resize.

    Returns:
        (B, V, T, 3, S, S) float16 in [0, 255].
    """
    batch, frames, height, width, _ = clips.shape
    views = boxes.shape[1]
    top, left, box_height, box_width = boxes.unbind(-1)
    matrix = resize_matrix if interpolation == "bilinear" else cubic_matrix
    rows = matrix(top, box_height, in_size=height, out_size=size)
    columns = matrix(left, box_width, in_size=width, out_size=size)
    columns = torch.where(flip[..., None, None] > 0, columns.flip(-2), columns)
    # Stack all views of a frame into one product, which reads the frame once.
    stacked = rows.half().transpose(1, 2).reshape(batch * frames, views * size, height)
    strips = stacked @ clips.reshape(batch * frames, height, width * 3).half()
    strips = strips.view(batch, frames, views, size, width, 3).permute(0, 2, 1, 5, 3, 4)
    pixels = strips.reshape(-1, 3 * size, width) @ columns.half().reshape(-1, size, width).mT
    if interpolation == "bicubic":  # negative weights overshoot the range beside an edge
        pixels.clamp_(0, 255)
    return pixels.view(batch, views, frames, 3, size, size)


def resample_by_crop(
    clips: Tensor, boxes: Tensor, flip: Tensor, *, size: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Compute `resample_by_matrix` crop by crop, for the CPU, where matrix products would mostly multiply zeros.

    Takes the arguments of `resample_by_matrix`, with whole-number boxes, and returns the same values rounded to whole
    levels, in float32.
    """
    batch, views, frames, _ = boxes.shape
    pixels = torch.empty(batch, views, frames, 3, size, size)
    shared = bool((boxes == boxes[:, :, :1]).all() and (flip == flip[:, :, :1]).all())
    span = frames if shared else 1
    places, mirrored = boxes.int().tolist(), flip.tolist()
    for clip, view, frame in itertools.product(range(batch), range(views), range(0, frames, span)):
        top, left, height, width = places[clip][view][frame]
        crop = clips[clip, frame : frame + span, top : top + height, left : left + width]
        resized = resize_uint8(crop, size, interpolation)
        pixels[clip, view, frame : frame + span] = resized.flip(-1) if mirrored[clip][view][frame] else resized
    return pixels


def resize_matrix(start: Tensor, length: Tensor, *, in_size: int, out_size: int) -> Tensor:
    """Return the matrices that cut ``[start, start + length)`` out of a line and resize it (bilinear, antialiased).

    Row i is a triangle around the center of output pixel i that reaches one input or one output pixel to either side,
    whichever is wider, cut at the box and normalized: `torch.nn.functional.interpolate(antialias=True)` of the crop.

    Args:
        start: (...) first pixel of the box, a whole number.
        length: (...) number of pixels in the box, a whole number.
        in_size: length of the line.
        out_size: length of the result.

    Returns:
        (..., out_size, in_size) float32; each row sums to 1 and is 0 outside the box.
    """
    start, length = start[..., None], length[..., None]
    step = length / out_size
    reach = step.clamp_min(1.0)
    outputs = torch.arange(out_size, device=start.device)
    inputs = torch.arange(in_size, device=start.device)
    centers = (start + (outputs + 0.5) * step) / reach
    inside = (inputs >= start) & (inputs < start + length)
    pixels = ((inputs + 0.5) / reach).masked_fill(~inside, math.inf)
    # The weights are 1 minus the distances. The tensor is large, so it is traversed as rarely as possible.
    distances = (pixels[..., None, :] - centers[..., None]).abs_().clamp_(max=1.0)
    normalized = 1.0 / (in_size - distances.sum(-1, keepdim=True))
    return torch.addcmul(normalized, distances, normalized, value=-1.0)


def cubic_matrix(start: Tensor, length: Tensor, *, in_size: int, out_size: int) -> Tensor:
    """Return `resize_matrix` for Keys' cubic kernel with a = -1/2, as in PIL and torch's antialiased bicubic.

    The kernel reaches two pixels to either side; at distance x it is::

            (a + 2) x^3 - (a + 3) x^2 + 1         x <= 1
            a x^3 - 5 a x^2 + 8 a x - 4 a    1 <= x <= 2
    """
    start, length = start[..., None], length[..., None]
    step = length / out_size
    reach = step.clamp_min(1.0)
    outputs = torch.arange(out_size, device=start.device)
    inputs = torch.arange(in_size, device=start.device)
    centers = (start + (outputs + 0.5) * step) / reach
    inside = (inputs >= start) & (inputs < start + length)
    pixels = ((inputs + 0.5) / reach).masked_fill(~inside, math.inf)
    x = (pixels[..., None, :] - centers[..., None]).abs_().clamp_(max=2.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = torch.where(x < 1.0, near, far)
    return weights / weights.sum(-1, keepdim=True)


def blur_matrix(sigma: Tensor, *, size: int) -> Tensor:
    """Return the matrices that blur a line of pixels with reflected ends (the end pixel is not repeated).

    Reflected pixel j contributes to pixel i at distances |i - j|, i + j and 2 (size - 1) - i - j. The kernel is cut at
    four standard deviations, or at size - 1.

    Args:
        sigma: (n,) standard deviations in pixels; 0 gives the identity.
        size: length of the line.

    Returns:
        (n, size, size) float32; each row sums to 1.
    """
    sigma = sigma.clamp_min(_LEAST_SIGMA)
    reach = torch.ceil(_BLUR_REACH * sigma).clamp_max(size - 1)[:, None]
    distance = torch.arange(2 * size - 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance <= reach)
    pixel = distance[:size]
    # Sliding windows over the kernel form matrices that depend on i + j or, in reverse order, on j - i alone.
    both_sides = torch.cat([kernel[:, 1:size].flip(1), kernel[:, :size]], dim=1)
    near = both_sides.unfold(1, size, 1).flip(1)
    before = kernel.unfold(1, size, 1) * (pixel > 0)
    after = kernel.unfold(1, size, 1).flip(1, 2) * (pixel < size - 1)
    weights = near + before + after
    return weights / weights.sum(-1, keepdim=True)
