"""Views compared with torchvision step by step; draws compared with their distributions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from dora_ray.clips import crop
from dora_ray.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dora_ray.views import augment

RATIO = (3 / 4, 4 / 3)
IDENTITY = (1.0, 1.0, 1.0, 0.0)


def draw(seed: int = 0, **changes):
    """Draw parameters of 2 clips x 3 views x 4 frames of 40 px that jitter everything; `changes` override them."""
    arguments = {
        "num_clips": 2,
        "num_views": 3,
        "num_frames": 4,
        "clip_size": 40,
        "scale": (0.05, 0.4),
        "ratio": RATIO,
        "per_frame_boxes": True,
        "flip_probability": 0.5,
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "jitter_probability": 0.8,
        "gray_probability": 0.2,
        "blur_probability": 0.5,
        "blur_sigma": (0.1, 2.0),
    }
    return augment.draw_views(np.random.default_rng(seed), **(arguments | changes))


def random_clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def smooth_image(size: int, *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Return (3, size, size) float32, colorful."""
    small = torch.from_numpy(np.random.default_rng(5).random((3, 5, 5), dtype=np.float32))
    return low + (high - low) * torch.nn.functional.interpolate(small[None], (size, size), mode="bilinear")[0]


def normalized(image: torch.Tensor) -> torch.Tensor:
    return tv.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def plain(parameters: augment.ViewParameters) -> augment.ViewParameters:
    """Return the same boxes and flips without blur and color."""
    lead = tuple(parameters.sigma.shape)
    color = augment.color_transform(np.broadcast_to(np.array(IDENTITY), (*lead, 4)), np.zeros(lead, dtype=bool))
    return dataclasses.replace(parameters, sigma=torch.zeros(lead), color=torch.from_numpy(color.astype(np.float32)))


# Boxes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    low=st.floats(0.01, 1.0),
    span=st.floats(0.0, 1.0),
)
def test_boxes_are_whole_and_inside(seed, height, width, low, span):
    boxes = crop.random_boxes(
        np.random.default_rng(seed), count=20, height=height, width=width, scale=(low, low + span), ratio=RATIO
    )
    assert boxes.shape == (20, 4)
    assert boxes.dtype == np.float64
    assert (boxes == np.round(boxes)).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_boxes_follow_the_law_of_random_resized_crop():
    boxes = crop.random_boxes(
        np.random.default_rng(3), count=20_000, height=1000, width=1000, scale=(0.1, 0.3), ratio=RATIO
    )
    area = boxes[:, 2] * boxes[:, 3] / 1e6
    aspect = np.log(boxes[:, 3] / boxes[:, 2])
    assert area.min() >= 0.0985
    assert area.max() <= 0.3015
    # Quartiles of the two uniform distributions; the standard error of a quartile is 0.0007 and 0.002.
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.15, 0.2, 0.25], atol=0.003)
    expected = math.log(4 / 3) * np.array([-0.5, 0.0, 0.5])
    np.testing.assert_allclose(np.quantile(aspect, [0.25, 0.5, 0.75]), expected, atol=0.01)
    # Given its size, a box is equally likely at every position.
    place = boxes[:, 0] / (1000 - boxes[:, 2])
    np.testing.assert_allclose(np.quantile(place, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.015)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (50, 50, (0, 0, 50, 50))],
)
def test_boxes_fall_back_to_the_largest_centered_one(height, width, box):
    """An area above the image's never fits, so all ten attempts fail."""
    boxes = crop.random_boxes(
        np.random.default_rng(0), count=3, height=height, width=width, scale=(1.5, 2.0), ratio=RATIO
    )
    assert boxes.tolist() == [list(box)] * 3


def test_later_draws_do_not_depend_on_how_many_attempts_failed():
    after = []
    for scale in [(0.1, 0.2), (1.5, 2.0)]:
        rng = np.random.default_rng(0)
        crop.random_boxes(rng, count=7, height=50, width=60, scale=scale, ratio=RATIO)
        after.append(rng.random())
    assert after[0] == after[1]


# Draws


def fields(parameters: augment.ViewParameters) -> dict[str, torch.Tensor]:
    return {field.name: getattr(parameters, field.name) for field in dataclasses.fields(parameters)}


def test_draws_repeat_with_the_seed_and_only_then():
    first, again, other = fields(draw(1)), fields(draw(1)), fields(draw(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_draws_have_the_documented_shapes():
    parameters = draw()
    assert parameters.boxes.shape == (2, 3, 4, 4)
    assert parameters.flip.shape == parameters.sigma.shape == (2, 3, 4)
    assert parameters.color.shape == (2, 3, 4, 3, 4)
    assert {tensor.dtype for tensor in fields(parameters).values()} == {torch.float32}


def test_global_views_share_box_and_flip_over_the_frames_but_not_color():
    parameters = draw(num_clips=16, per_frame_boxes=False)
    assert (parameters.boxes == parameters.boxes[:, :, :1]).all()
    assert (parameters.flip == parameters.flip[:, :, :1]).all()
    assert 0 < parameters.flip.mean() < 1
    assert (parameters.color != parameters.color[:, :, :1]).flatten(3).any(-1)[:, :, 1:].float().mean() > 0.9
    assert len(parameters.boxes[:, :, 0].reshape(-1, 4).unique(dim=0)) > 40


def test_local_views_draw_a_box_for_each_frame():
    boxes = draw(num_clips=16).boxes.reshape(-1, 4)
    assert len(boxes.unique(dim=0)) > 0.9 * len(boxes)


def test_probabilities_are_met():
    parameters = draw(num_clips=500, num_views=4, num_frames=5)
    colored = (parameters.color - plain(parameters).color).abs().flatten(3).amax(-1) > 1e-6
    rows = parameters.color[..., :3]
    gray = (rows[..., 0, :] - rows[..., 1, :]).abs().amax(-1) < 1e-6
    # With 10,000 frames, three standard errors are at most 0.015.
    assert parameters.flip.mean() == pytest.approx(0.5, abs=0.015)
    assert (parameters.sigma > 0).float().mean() == pytest.approx(0.5, abs=0.015)
    assert gray.float().mean() == pytest.approx(0.2, abs=0.015)
    assert colored.float().mean() == pytest.approx(1 - 0.2 * 0.8, abs=0.015)
    blurred = parameters.sigma[parameters.sigma > 0]
    assert blurred.min() >= 0.1
    assert blurred.max() <= 2.0
    assert blurred.mean() == pytest.approx(1.05, abs=0.03)


def test_jitter_stays_within_its_strengths():
    strengths = (0.4, 0.0, 0.0, 0.0)
    parameters = draw(num_clips=200, jitter=strengths, jitter_probability=1.0, gray_probability=0.0)
    brightness = parameters.color[..., 0, 0]
    torch.testing.assert_close(parameters.color[..., :3], brightness[..., None, None] * torch.eye(3))
    assert brightness.min() >= 0.6
    assert brightness.max() <= 1.4
    assert brightness.std() == pytest.approx(0.8 / math.sqrt(12), rel=0.05)


def test_strengths_above_one_never_give_a_negative_factor():
    parameters = draw(num_clips=50, jitter=(3.0, 0.0, 0.0, 0.0), jitter_probability=1.0, gray_probability=0.0)
    assert parameters.color[..., 0, 0].min() >= 0.0


# Color


def colored(image: torch.Tensor, factors: tuple[float, float, float, float], *, gray: bool = False) -> torch.Tensor:
    """Apply the color map to a (3, S, S) image in [0, 1], and clamp."""
    color = torch.from_numpy(augment.color_transform(np.array(factors), np.array(gray))).float()
    luma = (image.mean((1, 2)) * torch.tensor([0.299, 0.587, 0.114])).sum()
    return (torch.einsum("dc,chw->dhw", color[:, :3], image) + luma * color[:, 3, None, None]).clamp(0, 1)


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.9, 1.4])
@pytest.mark.parametrize(
    ("position", "reference"), [(0, tv.adjust_brightness), (1, tv.adjust_contrast), (2, tv.adjust_saturation)]
)
def test_each_color_step_alone_is_torchvisions(position, reference, factor):
    image = smooth_image(24)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[position] = factor
    # torchvision's luma weights sum to 0.9999.
    torch.testing.assert_close(colored(image, tuple(factors)), reference(image, factor), atol=2e-4, rtol=0)


def test_color_steps_compose_in_the_documented_order():
    image = smooth_image(24, low=0.4, high=0.6)
    expected = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, 1.2), 0.7), 1.4)
    torch.testing.assert_close(colored(image, (1.2, 0.7, 1.4, 0.0)), expected, atol=3e-4, rtol=0)


def test_gray_is_torchvisions_grayscale():
    image = smooth_image(24)
    expected = tv.rgb_to_grayscale(image, num_output_channels=3)
    torch.testing.assert_close(colored(image, IDENTITY, gray=True), expected, atol=2e-4, rtol=0)


def test_gray_comes_after_the_jitter():
    image = smooth_image(24, low=0.4, high=0.6)
    expected = tv.rgb_to_grayscale(colored(image, (1.2, 0.7, 1.4, 0.08)), num_output_channels=3)
    torch.testing.assert_close(colored(image, (1.2, 0.7, 1.4, 0.08), gray=True), expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize("hue", [-0.1, -0.05, 0.05, 0.1])
def test_hue_keeps_the_mean_and_turns_the_way_torchvision_does(hue):
    image = smooth_image(24, low=0.4, high=0.6)
    turned, reference = colored(image, (1.0, 1.0, 1.0, hue)), tv.adjust_hue(image, hue)
    torch.testing.assert_close(turned.mean(0), image.mean(0), atol=1e-6, rtol=0)
    wrong_way = (colored(image, (1.0, 1.0, 1.0, -hue)) - reference).abs().mean()
    assert (turned - reference).abs().mean() < (image - reference).abs().mean() < 0.7 * wrong_way


@pytest.mark.parametrize("hue", [-1 / 3, 1 / 3, 2 / 3, 1.0])
def test_hue_by_thirds_of_a_turn_is_torchvisions(hue):
    image = smooth_image(24)
    reference = tv.adjust_hue(image, math.remainder(hue, 1.0))
    torch.testing.assert_close(colored(image, (1.0, 1.0, 1.0, hue)), reference, atol=1e-5, rtol=0)


def test_identity_color_changes_nothing():
    image = smooth_image(24)
    torch.testing.assert_close(colored(image, IDENTITY), image, atol=1e-6, rtol=0)


# Rendering


def test_render_is_the_documented_chain():
    """Compare with separate crop, resize, flip, jitter, gray, blur and normalization, where nothing clamps."""
    clips = (100 + random_clips(2, 4, 40, 40) // 5).contiguous()
    parameters = draw(7, jitter=(0.2, 0.4, 0.0, 0.0), jitter_probability=1.0)
    views = augment.render(clips, parameters, size=16)
    for clip, view, frame in np.ndindex(2, 3, 4):
        box = parameters.boxes[clip, view, frame].int().tolist()
        image = tv.resized_crop(clips[clip, frame].permute(2, 0, 1), *box, [16, 16], antialias=True) / 255
        if parameters.flip[clip, view, frame]:
            image = tv.horizontal_flip(image)
        color = parameters.color[clip, view, frame]
        luma = (image.mean((1, 2)) * torch.tensor([0.299, 0.587, 0.114])).sum()
        image = torch.einsum("dc,chw->dhw", color[:, :3], image) + luma * color[:, 3, None, None]
        sigma = parameters.sigma[clip, view, frame].item()
        if sigma:
            # A side of 16 allows a reach of at most 15; the kernel is cut at four sigma, hence the loose tolerance.
            image = tv.gaussian_blur(image, [15, 15], [sigma, sigma])
        torch.testing.assert_close(views[clip, view, frame], normalized(image), atol=2e-3, rtol=0)


def test_blurring_all_frames_as_on_a_gpu_is_blurring_the_drawn_ones():
    pixels, sigma = (
        torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.0, 0.3, 2.0, 0]),
    )
    torch.testing.assert_close(
        augment._blur_all(pixels, sigma), augment._blur(pixels.clone(), sigma), atol=1e-6, rtol=0
    )
    assert torch.equal(augment._blur_all(pixels, sigma)[0], pixels[0])


def test_render_without_color_and_blur_is_torchvisions_normalized_crop():
    clips = random_clips(2, 4, 40, 40)
    parameters = plain(draw())
    views = augment.render(clips, parameters, size=16)
    box = parameters.boxes[1, 2, 3].int().tolist()
    expected = tv.resized_crop(clips[1, 3].permute(2, 0, 1), *box, [16, 16], antialias=True)
    if parameters.flip[1, 2, 3]:
        expected = tv.horizontal_flip(expected)
    torch.testing.assert_close(views[1, 2, 3], normalized(expected / 255), atol=1e-5, rtol=0)


def test_render_with_matrices_in_float16_as_on_a_gpu_is_within_a_level_of_the_cpus(monkeypatch):
    clips, parameters = (100 + random_clips(2, 4, 40, 40) // 5).contiguous(), draw(7)
    assert (parameters.sigma > 0).any()
    on_cpu = augment.render(clips, parameters, size=16)
    monkeypatch.setattr(augment, "resample_by_crop", augment.resample_by_matrix)
    as_on_gpu = augment.render(clips, parameters, size=16)
    assert as_on_gpu.dtype == torch.float32
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    in_float32 = augment.render(clips, parameters, size=16)

    def levels(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(((one - other).abs() * 255 * min(IMAGENET_STD)).max())

    # One level after the normalization, multiplied by up to 1.4 x 1.4 by brightness and contrast.
    assert levels(as_on_gpu, on_cpu) < 2.5
    assert 0 < levels(as_on_gpu, in_float32) < 0.5


def test_render_clamps_to_black_and_white():
    parameters = plain(draw())
    bright = dataclasses.replace(parameters, color=parameters.color * 9.0)
    views = augment.render(random_clips(2, 4, 40, 40), bright, size=16)
    white = normalized(torch.ones(3, 1, 1)).expand(3, 16, 16)
    black = normalized(torch.zeros(3, 1, 1)).expand(3, 16, 16)
    assert (views <= white + 1e-6).all()
    assert (views >= black - 1e-6).all()
    assert (views > white - 1e-6).float().mean() > 0.5


def test_render_gives_contiguous_float32_without_gradient():
    views = augment.render(random_clips(2, 4, 40, 40), draw(), size=16)
    assert views.shape == (2, 3, 4, 3, 16, 16)
    assert views.dtype == torch.float32
    assert views.is_contiguous()
    assert not views.requires_grad


@pytest.mark.parametrize("per_frame_boxes", [False, True])
def test_render_of_a_clip_does_not_depend_on_its_neighbors(per_frame_boxes):
    clips, parameters = random_clips(2, 4, 40, 40), draw(per_frame_boxes=per_frame_boxes)
    second = augment.ViewParameters(**{name: tensor[1:] for name, tensor in fields(parameters).items()})
    both = augment.render(clips, parameters, size=16)
    torch.testing.assert_close(augment.render(clips[1:], second, size=16)[0], both[1], atol=1e-5, rtol=0)


def test_render_repeats_bit_for_bit_and_leaves_the_clips_alone():
    clips = random_clips(2, 4, 40, 40)
    before = clips.clone()
    assert torch.equal(augment.render(clips, draw(), size=16), augment.render(clips, draw(), size=16))
    assert torch.equal(clips, before)


def test_render_ignores_autocast():
    clips = random_clips(2, 4, 40, 40)
    expected = augment.render(clips, draw(), size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.render(clips, draw(), size=16), expected)


def test_no_views_render_to_an_empty_tensor():
    views = augment.render(random_clips(2, 4, 40, 40), draw(num_views=0), size=16)
    assert views.shape == (2, 0, 4, 3, 16, 16)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(2, 4, 40, 40, 3), "uint8"),
        (torch.zeros(2, 4, 3, 40, 40, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 5, 40, 40, 3, dtype=torch.uint8), "2 clips of 4 frames"),
    ],
)
def test_render_refuses_other_clips(clips, message):
    with pytest.raises(ValueError, match=message):
        augment.render(clips, draw(), size=16)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], []])
def test_readable_clips_are_uploaded_whoever_owns_them(rows):
    """Clips from Ray's object store are read-only."""
    clips = random_clips(3, 2, 8, 8).numpy()
    clips.setflags(write=False)
    uploaded = augment.upload_clips(clips, np.array(rows, dtype=np.int64), torch.device("cpu"))
    assert np.array_equal(uploaded.numpy(), clips[rows])
