from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import (
    center_crop,
    extract,
    final_cls,
    find_images,
    find_splits,
    image_batches,
    last_cls,
    normalize,
    read_image,
    training_size,
)


def paint(path, color, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def labeled(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for level, name in ((200, "light"), (20, "dark")):
            for index in range(count):
                paint(tmp_path / part / name / f"{index}.png", (level + index, level, level))
    return tmp_path


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        embed_dim=24,
        depth=3,
        num_heads=3,
        patch_size=8,
        img_size=32,
        dynamic_img_size=True,
        num_classes=0,
    ).eval()


def test_images_are_found_in_a_fixed_order(labeled):
    images = find_images(labeled / "train")
    assert images.classes == ("dark", "light")
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    assert [path.name for path in images.paths] == ["0.png", "1.png", "2.png", "3.png"] * 2


def test_nested_and_upper_case_images_count_and_others_do_not(labeled):
    paint(labeled / "train" / "dark" / "more" / "a.JPG", (0, 0, 0))
    (labeled / "train" / "dark" / "notes.txt").write_text("no image")
    (labeled / "train" / ".cache").mkdir()
    assert find_images(labeled / "train").labels.tolist() == [0] * 5 + [1] * 4


def test_thinning_keeps_the_share_of_every_class(labeled):
    thinned = find_images(labeled / "train").thinned(4)
    assert thinned.labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in thinned.paths] == ["0.png", "2.png"] * 2
    assert find_images(labeled / "train").thinned(100).labels.shape == (8,)


def test_splits_share_the_training_classes(labeled):
    (labeled / "test").rename(labeled / "val")
    for path in (labeled / "val" / "dark").iterdir():
        path.unlink()
    (labeled / "val" / "dark").rmdir()
    train, test = find_splits(labeled)
    assert train.classes == test.classes
    assert test.labels.tolist() == [1, 1]


def test_layout_errors_explain_the_layout(labeled):
    with pytest.raises(ConfigError, match=r"No folder .*train/CLASS"):
        find_splits(labeled / "nothing")
    with pytest.raises(ConfigError, match=r"holds dark, light.*train/CLASS"):
        find_splits(labeled / "train")
    with pytest.raises(ConfigError, match="no folder of a class"):
        find_images(labeled / "train" / "dark")
    (labeled / "test" / "blue").mkdir()
    with pytest.raises(ConfigError, match="training part lacks: blue"):
        find_splits(labeled)
    (labeled / "train" / "blue").mkdir()
    with pytest.raises(ConfigError, match=r"blue has no image"):
        find_splits(labeled)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_named(labeled, content):
    (labeled / "train" / "dark" / "2.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dark/2\.png cannot be read"):
        list(image_batches(find_images(labeled / "train").paths, size=16, batch_size=3, num_workers=2))


def test_a_cut_off_image_is_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"a\.jpg cannot be read"):
        read_image(tmp_path / "a.jpg", size=16)


def test_the_crop_is_the_center_of_the_resized_image():
    """Columns tell their place. 64 x 32: short side to 16 x 256/224 = 18, so 36 x 18, of which 16 x 16."""
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 32, axis=0).repeat(3, axis=2)
    crop = np.asarray(center_crop(Image.fromarray(ramp), size=16))
    assert crop.shape == (16, 16, 3)
    expected = (10 + np.arange(16) + 0.5) * 64 / 36 * 4 - 2
    assert np.abs(crop[8, :, 0].astype(float) - expected).max() < 2


def test_normalization_is_imagenets():
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(normalize(pixels)[0, :, 0, 0], expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    assert read_image(path, size=16).shape == (16, 16, 3)
    assert read_image(path, size=16).min() > 250


def test_features_keep_the_order_of_the_images(labeled, vit):
    images = find_images(labeled / "train")
    options = {"size": 32, "num_workers": 3, "device": "cpu"}
    whole = extract(final_cls(vit), images.paths, batch_size=100, **options)
    parts = extract(final_cls(vit), images.paths, batch_size=3, **options)
    single = torch.cat([extract(final_cls(vit), [path], batch_size=1, **options) for path in images.paths])
    assert whole.shape == (8, 24)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[4], atol=1e-3)


@torch.no_grad()
def test_cls_tokens_of_the_last_blocks_stand_side_by_side(vit):
    images = torch.randn(2, 3, 32, 32)
    tokens = vit._pos_embed(vit.patch_embed(images))
    expected = []
    for block in vit.blocks:
        tokens = block(tokens)
        expected.append(vit.norm(tokens)[:, 0])
    torch.testing.assert_close(last_cls(vit, num_blocks=2)(images), torch.cat(expected[1:], dim=-1))
    torch.testing.assert_close(final_cls(vit)(images), expected[-1])
    assert training_size(vit) == 32
