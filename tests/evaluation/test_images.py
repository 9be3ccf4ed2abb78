"""Image files of every kind are read as a viewer shows them, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dora_ray.errors import ConfigError
from dora_ray.evaluation import images
from dora_ray.evaluation.images import center_crop, open_rgb, read_image, whole_size

GRAY = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)).resize((96, 64), Image.BICUBIC)
)


def error_levels(path, expected):
    """Mean distance of a read picture from (H, W) or (H, W, 3) levels."""
    found = np.asarray(open_rgb(path)).astype(float)
    expected = np.broadcast_to(expected if expected.ndim == 3 else expected[..., None], found.shape)
    return np.abs(found - expected).mean()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", GRAY.astype(np.uint16) * 257),
        ("a.tif", GRAY.astype(np.uint16) * 257),
        ("big-endian.tif", (GRAY.astype(np.uint16) * 257).astype(">u2")),
        ("a.pgm", GRAY.astype(np.uint16) * 257),
        ("float.tif", GRAY.astype(np.float32) / 255),
        ("two-levels.png", (GRAY > 90).astype(np.uint16) * 65535),
        ("black.png", np.zeros((64, 96), np.uint16)),
    ],
)
def test_wide_gray_levels_are_those_of_8_bits(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    assert error_levels(tmp_path / name, values.astype(float) / (1 if name == "float.tif" else 65535) * 255) < 0.6


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("camera.png", GRAY.astype(np.uint16) * 16, "16-bit values reach only 40"),
        ("heat.tif", GRAY.astype(np.float32), r"floating-point values from .* not 0 \(black\) to 1 \(white\)"),
        ("hole.tif", np.where(GRAY > 90, np.nan, 0.5).astype(np.float32), "floating-point values from nan"),
        ("scan.tif", GRAY.astype(np.int32) - 1024, "32-bit integers from -10"),
    ],
)
def test_values_without_a_known_white_are_refused_by_name(tmp_path, name, values, says):
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read as an image \({says}.*8 bits"):
        open_rgb(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    assert read_image(path, size=16).shape == (16, 16, 3)
    assert read_image(path, size=16).min() > 250


def test_a_palette_gives_its_colors_not_its_numbers(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[4:] = 1
    image = Image.fromarray(pixels, mode=None).convert("P")
    image.putpalette([200, 30, 30, 20, 60, 240])
    image.save(tmp_path / "a.png")
    found = np.asarray(open_rgb(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [200, 30, 30]
    assert found[7, 0].tolist() == [20, 60, 240]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette with many"])
def test_transparent_parts_are_white(tmp_path, kind):
    """Under the transparent upper half lies black, which no viewer shows."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[4:] = 255
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 4, 8, 8))
    if kind == "LA":
        image = image.convert("LA")
    if kind.startswith("palette"):
        image = Image.fromarray(alpha // 255).convert("P")
        image.putpalette([0, 0, 0, 10, 10, 10])
    image.save(tmp_path / "a.png", **({"transparency": 0} if kind == "palette" else {}))
    if kind == "palette with many":
        image.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    found = np.asarray(open_rgb(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[7, 0].tolist() == [10, 10, 10]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_the_cameras_orientation_is_applied(tmp_path, name, orientation):
    """The stored picture that is shown, by the given orientation, with its red corner at the upper left."""
    shown = np.full((16, 32, 3), 40, np.uint8)
    shown[:8, :8] = (250, 20, 20)
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: np.rot90,
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(shown))).save(tmp_path / name, exif=exif, quality=95)
    assert error_levels(tmp_path / name, shown) < 12


def test_a_cut_off_image_is_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.tif", "a.webp", "a.gif", "a.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match=rf"{name} cannot be read as an image \(.+\)"):
            read_image(tmp_path / name, size=16)


def test_damage_anywhere_is_a_sentence_or_a_picture(tmp_path):
    """Whatever Pillow's readers raise, the file is named."""
    rng = np.random.default_rng(1)
    pixels = np.random.default_rng(0).integers(0, 255, size=(24, 24, 3), dtype=np.uint8)
    for name in ("a.png", "a.tif", "a.gif", "a.webp", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for _ in range(30):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), size=8):
                damaged[place] = rng.integers(0, 256)
            (tmp_path / name).write_bytes(bytes(damaged))
            try:
                found = open_rgb(tmp_path / name).mode
            except ConfigError as error:
                found = str(error)
            assert found == "RGB" or name in found


def test_a_picture_above_the_limit_is_named_and_below_it_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    with pytest.raises(ConfigError, match=r"huge\.png cannot be read .*20000x10000 pixels.*make it smaller"):
        open_rgb(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 20)).save(tmp_path / "large.png")
    assert open_rgb(tmp_path / "large.png").size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert images.LARGEST_PIXELS == 178_956_970  # where Pillow's own error begins


def test_another_thread_that_crops_meanwhile_finds_a_limit_that_is_a_number(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    opened, crops = Image.open, []

    def open_slowly(path):
        crops.append(Image.new("RGB", (9, 9)).crop((0, 0, 5, 5)).size)
        assert isinstance(Image.MAX_IMAGE_PIXELS, int), "Pillow looks for None, and then multiplies"
        return opened(path)

    monkeypatch.setattr(Image, "open", open_slowly)
    assert open_rgb(tmp_path / "small.png").size == (30, 20)
    assert crops == [(5, 5)]


def test_a_huge_text_is_named(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * (70 << 20), zip=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(ConfigError, match=r"text\.png cannot be read"):
        open_rgb(tmp_path / "text.png")


def test_the_crop_is_the_center_of_the_resized_image():
    """Columns tell their place. 64 x 32: short side to 16 x 256/224 = 18, so 36 x 18, of which 16 x 16."""
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 32, axis=0).repeat(3, axis=2)
    crop = np.asarray(center_crop(Image.fromarray(ramp), size=16))
    assert crop.shape == (16, 16, 3)
    expected = (10 + np.arange(16) + 0.5) * 64 / 36 * 4 - 2
    assert np.abs(crop[8, :, 0].astype(float) - expected).max() < 2


@pytest.mark.parametrize("size", [(10, 30000), (30000, 10), (1, 1), (1, 500)])
def test_strips_and_specks_give_their_center(size):
    """A strip of 10 x 30000 pixels, resized whole, would be one of 256 x 768000."""
    image = Image.new("RGB", size, (30, 60, 90))
    crop = np.asarray(center_crop(image, size=224))
    assert crop.shape == (224, 224, 3)
    assert (crop == (30, 60, 90)).all()


def test_whole_images_are_rounded_to_patches():
    assert whole_size((640, 480), short_side=100, patch_size=8) == (136, 96)
    assert whole_size((480, 640), short_side=3, patch_size=8) == (8, 8)
