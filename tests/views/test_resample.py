"""Crop, resize and blur compared with torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from dora_ray.clips import crop
from dora_ray.views import resample


def random_clips(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def random_boxes(*shape: int, side: int, shared: bool = False) -> torch.Tensor:
    """Draw (B, V, T, 4) boxes inside side x side, one for all frames if shared."""
    rng = np.random.default_rng(1)
    extent = rng.integers(3, side + 1, (*shape, 2))
    corner = np.floor(rng.random((*shape, 2)) * (side - extent + 1))
    boxes = torch.from_numpy(np.concatenate([corner, extent], axis=-1).astype(np.float32))
    return boxes[:, :, :1].expand_as(boxes) if shared else boxes


def checkered_flip(*shape: int) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).view(shape) % 2).float()


@pytest.mark.parametrize(("kernel", "mode"), [(resample.resize_matrix, "bilinear"), (resample.cubic_matrix, "bicubic")])
@settings(max_examples=40, deadline=None)
@given(in_size=st.integers(1, 50), out_size=st.integers(1, 40), data=st.data())
def test_resize_matrix_is_the_antialiased_resize_of_the_box(kernel, mode, in_size, out_size, data):
    start = data.draw(st.integers(0, in_size - 1))
    length = data.draw(st.integers(1, in_size - start))
    line = torch.from_numpy(np.random.default_rng(0).random((1, 1, 1, in_size)))
    matrix = kernel(
        torch.tensor(start, dtype=torch.float64),
        torch.tensor(length, dtype=torch.float64),
        in_size=in_size,
        out_size=out_size,
    )
    expected = torch.nn.functional.interpolate(
        line[..., start : start + length], (1, out_size), mode=mode, antialias=True
    )
    torch.testing.assert_close(line[0, 0] @ matrix.T, expected[0, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("half", "tolerance"), [(torch.Tensor.half, 0.25 / 255), (torch.Tensor.float, 1e-5)])
def test_resampling_by_matrix_is_torchvisions_resized_crop_and_flip(monkeypatch, half, tolerance):
    """Within a quarter of a level in float16; equal up to rounding in float32."""
    monkeypatch.setattr(torch.Tensor, "half", half)
    clips, boxes, flip = random_clips(2, 4, 40, 30), random_boxes(2, 3, 4, side=30), checkered_flip(2, 3, 4)
    views = resample.resample_by_matrix(clips, boxes, flip, size=16).float() / 255
    for clip, view, frame in np.ndindex(2, 3, 4):
        box = boxes[clip, view, frame].int().tolist()
        expected = tv.resized_crop(clips[clip, frame].permute(2, 0, 1) / 255, *box, [16, 16], antialias=True)
        if flip[clip, view, frame]:
            expected = tv.horizontal_flip(expected)
        torch.testing.assert_close(views[clip, view, frame], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [8, 24])
def test_resampling_by_crop_rounds_what_matrices_give(shared, size):
    clips, boxes = random_clips(2, 4, 30, 40), random_boxes(2, 3, 4, side=30, shared=shared)
    flip = checkered_flip(2, 3, 1).expand(2, 3, 4) if shared else checkered_flip(2, 3, 4)
    exact = resample.resample_by_matrix(clips, boxes, flip, size=size).float()
    rounded = resample.resample_by_crop(clips, boxes, flip, size=size)
    # Two passes, each rounded to whole levels, halves upward.
    torch.testing.assert_close(rounded, exact, atol=1.2, rtol=0)
    assert (rounded - exact).mean().abs() < 0.1


@pytest.mark.parametrize("size", [8, 24])
def test_bicubic_crops_are_pils(size):
    """The released code resizes local crops with PIL's antialiased bicubic kernel.

    The reduced contrast leaves room for the kernel's overshoot: libraries differ in clamping it between two passes.
    """
    clips = (90 + random_clips(2, 4, 30, 40) // 4).contiguous()
    boxes, flip = random_boxes(2, 3, 4, side=30), checkered_flip(2, 3, 4)
    crops = resample.resample_by_crop(clips, boxes, flip, size=size, interpolation="bicubic")
    products = resample.resample_by_matrix(clips, boxes, flip, size=size, interpolation="bicubic").float()
    bilinear = resample.resample_by_crop(clips, boxes, flip, size=size)
    for clip, view, frame in np.ndindex(2, 3, 4):
        top, left, height, width = boxes[clip, view, frame].int().tolist()
        image = Image.fromarray(clips[clip, frame, top : top + height, left : left + width].numpy())
        expected = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        expected = (expected.flip(-1) if flip[clip, view, frame] else expected).float()
        torch.testing.assert_close(crops[clip, view, frame], expected, atol=1.0, rtol=0)
        torch.testing.assert_close(products[clip, view, frame], expected, atol=1.5, rtol=0)
    assert (bilinear - crops).abs().max() > 5


def test_bicubic_matrices_stay_in_the_range_of_pixels():
    clips, boxes = 255 * (random_clips(1, 2, 30, 40) // 128), random_boxes(1, 3, 2, side=30)
    views = resample.resample_by_matrix(clips, boxes, torch.zeros(1, 3, 2), size=24, interpolation="bicubic")
    assert (views.min(), views.max()) == (0, 255)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_blur_matrix_is_torchvisions_gaussian_blur(sigma):
    image = random_clips(24, 24).permute(2, 0, 1) / 255
    matrix = resample.blur_matrix(torch.tensor([sigma]), size=24)[0]
    kernel_size = 2 * math.ceil(4 * sigma) + 1
    expected = tv.gaussian_blur(image, [kernel_size, kernel_size], [sigma, sigma])
    torch.testing.assert_close(matrix @ image @ matrix.T, expected, atol=2e-6, rtol=0)


def test_blur_of_an_image_smaller_than_the_kernel_reflects_once():
    image = random_clips(5, 5).permute(2, 0, 1) / 255
    matrix = resample.blur_matrix(torch.tensor([2.0]), size=5)[0]
    torch.testing.assert_close(
        matrix @ image @ matrix.T, tv.gaussian_blur(image, [9, 9], [2.0, 2.0]), atol=2e-6, rtol=0
    )


def test_blur_by_nothing_is_the_identity():
    assert torch.equal(resample.blur_matrix(torch.tensor([0.0, 1.0]), size=9)[0], torch.eye(9))


def test_blur_of_a_frame_does_not_depend_on_its_neighbors():
    alone = resample.blur_matrix(torch.tensor([0.3]), size=12)[0]
    beside = resample.blur_matrix(torch.tensor([2.0, 0.3]), size=12)[1]
    torch.testing.assert_close(alone, beside, atol=1e-7, rtol=0)


def test_crop_clip_is_torchvisions_resized_crop():
    frames = list(random_clips(3, 64, 90).numpy())
    cropped = crop.crop_clip(frames, np.array([5.0, 20.0, 50.0, 60.0]), 32)
    assert cropped.shape == (3, 32, 32, 3)
    assert cropped.dtype == np.uint8
    for frame, result in zip(frames, cropped, strict=True):
        image = torch.from_numpy(frame).permute(2, 0, 1)
        expected = tv.resized_crop(image, 5, 20, 50, 60, [32, 32], antialias=True).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(result, expected)


def test_crop_clip_takes_read_only_frames_and_returns_its_own_memory():
    """Decoders return views of their buffers; torch warns of those, and warnings are errors here."""
    frame = random_clips(40, 40).numpy()
    frame.setflags(write=False)
    cropped = crop.crop_clip([frame], (0, 0, 40, 40), 40)
    np.testing.assert_array_equal(cropped[0], frame)
    assert cropped.flags.c_contiguous
    assert not np.shares_memory(cropped, frame)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 41, 5), (0, 36, 5, 5), (0, 0, 0, 5)])
def test_crop_clip_refuses_a_box_outside_the_frame(box):
    with pytest.raises(ValueError, match="not inside a frame of 40 x 40"):
        crop.crop_clip([np.zeros((40, 40, 3), np.uint8)], box, 16)


def test_crop_clip_refuses_frames_of_two_sizes():
    with pytest.raises(ValueError, match="the same size"):
        crop.crop_clip([np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41, 3), np.uint8)], (0, 0, 5, 5), 16)
