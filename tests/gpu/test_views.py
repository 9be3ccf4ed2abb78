"""Views rendered on a GPU: equal to the CPU's up to rounding, without host synchronization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dora_ray.views import augment

pytestmark = pytest.mark.gpu


def draw(device: str | torch.device = "cpu") -> augment.ViewParameters:
    """Draw parameters of 2 clips x 3 views x 4 frames of 40 px that jitter everything."""
    arguments: dict[str, Any] = {"num_clips": 2, "num_views": 3, "num_frames": 4, "clip_size": 40}
    drawn = augment.draw_views(
        np.random.default_rng(0),
        **arguments,
        scale=(0.05, 0.4),
        ratio=(3 / 4, 4 / 3),
        per_frame_boxes=True,
        flip_probability=0.5,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        gray_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
    )
    return augment.ViewParameters(**{name: tensor.to(device) for name, tensor in vars(drawn).items()})


def clips() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 4, 40, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_agree_with_the_cpus(gpu, interpolation):
    # A cubic kernel overshoots; the clamping between the CPU's two passes is visible at full contrast.
    pixels = torch.from_numpy(clips() if interpolation == "bilinear" else 90 + clips() // 4)
    expected = augment.render(pixels, draw(), size=16, interpolation=interpolation)
    views = augment.render(pixels.to(gpu), draw(gpu), size=16, interpolation=interpolation)
    # One side is rounded to whole levels, up to 1.2 levels apart; brightness and contrast at most double that.
    torch.testing.assert_close(views.cpu(), expected, atol=0.06, rtol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_host_waits_for_nothing(gpu, interpolation):
    """The first rendering may synchronize: it copies the constants."""
    rows = np.arange(2)
    parameters = draw(gpu)
    augment.render(augment.upload_clips(clips(), rows, gpu), parameters, size=16, interpolation=interpolation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment.render(augment.upload_clips(clips(), rows, gpu), parameters, size=16, interpolation=interpolation)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_clips_that_are_uploaded_while_the_gpu_computes_arrive_whole(gpu):
    """Each tensor is consumed and its memory freed before the next one, with much work queued in between."""
    busy = torch.randn(2048, 2048, device=gpu)
    sums, expected = [], []
    for number in range(30):
        some = np.random.default_rng(number).integers(0, 256, (4, 4, 160, 160, 3), dtype=np.uint8)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(augment.upload_clips(some, np.array([3, 1]), gpu).long().sum())
        expected.append(int(some[[3, 1]].sum(dtype=np.int64)))
    assert torch.stack(sums).tolist() == expected
