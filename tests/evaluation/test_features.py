from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import (
    extract,
    final_cls,
    find_images,
    find_splits,
    image_batches,
    last_cls,
    normalize,
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
    with pytest.raises(ConfigError, match="no class folders"):
        find_images(labeled / "train" / "dark")
    (labeled / "test" / "blue").mkdir()
    with pytest.raises(ConfigError, match="training split lacks: blue"):
        find_splits(labeled)
    (labeled / "train" / "blue").mkdir()
    with pytest.raises(ConfigError, match=r"blue has no image"):
        find_splits(labeled)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_named(labeled, content):
    (labeled / "train" / "dark" / "2.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dark/2\.png cannot be read"):
        list(image_batches(find_images(labeled / "train").paths, size=16, batch_size=3, num_workers=2))


def test_normalization_is_imagenets():
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(normalize(pixels)[0, :, 0, 0], expected)


def test_all_unreadable_images_are_named_and_can_be_left_out(labeled, vit, caplog):
    images = find_images(labeled / "train")
    for number in (1, 6):
        images.paths[number].write_bytes(b"no image")
    options = {"size": 32, "num_workers": 2, "device": "cpu", "batch_size": 3}
    with pytest.raises(ConfigError, match=r"2 of 8 files.*dark/1\.png.*light/2\.png.*skip_unreadable=true"):
        extract(final_cls(vit), images, **options)
    with caplog.at_level("WARNING"):
        features, kept = extract(final_cls(vit), images, skip_unreadable=True, **options)
    assert "2 of 8 files are skipped" in caplog.text
    assert kept.num_unreadable == 2
    assert kept.paths == tuple(path for number, path in enumerate(images.paths) if number not in (1, 6))
    assert kept.labels.tolist() == [0, 0, 0, 1, 1, 1]
    good, _ = extract(final_cls(vit), images.only([0, 2, 3, 4, 5, 7]), **options)
    torch.testing.assert_close(features, good, rtol=1e-4, atol=1e-5)


def test_images_of_which_none_can_be_read_are_an_error_all_the_same(labeled):
    paths = [labeled / "train" / "dark" / f"{n}.png" for n in range(4)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="4 of 4 files"):
        list(image_batches(paths, size=16, batch_size=3, num_workers=2, skip_unreadable=True))


def test_of_very_many_unreadable_images_the_first_are_named(tmp_path):
    paths = [tmp_path / f"{n:03}.png" for n in range(40)]
    with pytest.raises(ConfigError, match=r"40 of 40 files.*019\.png.*And 20 more"):
        list(image_batches(paths, size=16, batch_size=7, num_workers=2))


def test_linked_class_folders_are_classes_and_loops_are_not(labeled, tmp_path_factory):
    far = tmp_path_factory.mktemp("far") / "gray"
    paint(far / "deep" / "a.png", (9, 9, 9))
    (labeled / "train" / "gray").symlink_to(far)
    (labeled / "train" / "loop").symlink_to(labeled)
    (labeled / "train" / "dark" / "again").symlink_to(labeled / "train")
    images = find_images(labeled / "train")
    assert images.classes == ("dark", "gray", "light")
    assert images.labels.tolist() == [0] * 4 + [1] + [2] * 4


def test_hidden_files_are_no_images(labeled):
    (labeled / "train" / "dark" / "._0.png").write_bytes(bytes(200))
    paint(labeled / "train" / "dark" / ".thumbnails" / "0.png", (0, 0, 0))
    assert len(find_images(labeled / "train").paths) == 8


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled", "no_label", "unsup"])
def test_a_folder_of_images_without_labels_is_named(labeled, name):
    paint(labeled / "train" / name / "a.png", (9, 9, 9))
    with pytest.raises(ConfigError, match=rf"train/{name} looks like unlabeled images"):
        find_splits(labeled)


def test_a_single_class_is_refused(labeled):
    for part in ("train", "test"):
        (labeled / part / "light").rename(labeled / f"light-{part}")
    with pytest.raises(ConfigError, match="a single class, dark"):
        find_splits(labeled)


def test_features_keep_the_order_of_the_images(labeled, vit):
    images = find_images(labeled / "train")
    options = {"size": 32, "num_workers": 3, "device": "cpu"}
    whole, kept = extract(final_cls(vit), images, batch_size=100, **options)
    parts, _ = extract(final_cls(vit), images, batch_size=3, **options)
    single = torch.cat([extract(final_cls(vit), images.only([n]), batch_size=1, **options)[0] for n in range(8)])
    assert kept.paths == images.paths
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


def test_a_large_class_that_is_never_asked_for_is_named(labeled, caplog):
    with caplog.at_level("WARNING"):
        find_splits(labeled)
        assert caplog.text == ""
        for number in range(9):
            paint(labeled / "train" / "misc" / f"{number}.png", (9, 9, 9))
        train, test = find_splits(labeled)
    assert "train/misc has 9 of 17 training images and no test image" in caplog.text
    assert (len(train.paths), len(test.paths)) == (17, 4)
