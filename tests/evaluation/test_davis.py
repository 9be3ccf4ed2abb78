"""DAVIS folders: lists, layouts, and masks of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.evaluation.davis import Objects, choose_sequences, find_sequences, read_mask, read_masks


@pytest.fixture
def davis(tmp_path):
    """Four sequences of three empty frames."""
    for name in ("a", "b", "c", "d"):
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
            folder = tmp_path / kind / "480p" / name
            folder.mkdir(parents=True)
            for t in range(3):
                Image.new("L", (16, 12)).save(folder / f"{t:05d}.{suffix}")
    return tmp_path


def write_list(davis, name, text):
    (davis / "ImageSets" / name).parent.mkdir(parents=True, exist_ok=True)
    (davis / "ImageSets" / name).write_text(text)


def chosen(davis, **options):
    found = choose_sequences(davis, **options)
    return [sequence.name for sequence in found.sequences], found.averaged


def test_the_validation_list_says_which_sequences_are_scored(davis):
    assert chosen(davis) == (["a", "b", "c", "d"], "all 4 sequences (no ImageSets/*/val.txt)")
    frames = "/JPEGImages/480p/{0}/00000.jpg /Annotations/480p/{0}/00000.png\n"
    write_list(davis, "480p/val.txt", frames.format("d") + frames.format("d").replace("00000", "00001"))
    assert chosen(davis) == (["d"], "the 1 sequences of ImageSets/480p/val.txt")
    write_list(davis, "2016/val.txt", "b\nc\n")
    assert chosen(davis) == (["b", "c"], "the 2 sequences of ImageSets/2016/val.txt")
    write_list(davis, "2017/val.txt", "b\nd\n\nelsewhere\n")
    assert chosen(davis) == (["b", "d"], "2 of the 3 sequences of ImageSets/2017/val.txt")
    assert chosen(davis, year="2016") == (["b", "c"], "the 2 sequences of ImageSets/2016/val.txt")


def test_lists_that_cannot_be_used_are_named(davis):
    with pytest.raises(ConfigError, match=r"year=2017 needs .*2017/val\.txt, which does not exist"):
        choose_sequences(davis, year="2017")
    write_list(davis, "2017/val.txt", "elsewhere\n")
    with pytest.raises(ConfigError, match="lists 1 sequences, none of which"):
        choose_sequences(davis)


def test_other_layouts_are_refused_and_hidden_files_do_not_count(davis, tmp_path_factory):
    with pytest.raises(ConfigError, match="does not have the DAVIS layout"):
        find_sequences(tmp_path_factory.mktemp("empty"))
    (davis / "JPEGImages" / "480p" / "a" / "._00000.jpg").write_bytes(b"-")
    (davis / "JPEGImages" / "480p" / ".cache").mkdir()
    (davis / "Annotations" / "480p" / ".cache").mkdir()
    assert len(find_sequences(davis)) == 4
    (davis / "Annotations" / "480p" / "a" / "00002.png").unlink()
    with pytest.raises(ConfigError, match="3 frames and 2 masks"):
        find_sequences(davis)


MASK = np.zeros((8, 10), np.uint8)
MASK[1:4, 2:6] = 1
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def palette_image(values, colors):
    image = Image.fromarray(values).convert("P")
    image.putpalette(colors)
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK),
        Image.fromarray(MASK * 255),
        Image.fromarray(MASK.astype(np.uint16)),
        Image.fromarray(MASK > 0),
        palette_image(MASK, PALETTE),
        Image.fromarray(np.stack([MASK * 255] * 3, axis=-1)),
        Image.fromarray(np.stack([MASK * 0, MASK * 0, MASK], axis=-1)),  # (0, 0, 1) looks black, and is gray 0
        Image.fromarray(np.stack([MASK * 128, MASK * 0, MASK * 0], axis=-1)),
        Image.fromarray(np.stack([MASK * 128, MASK * 0, MASK * 0], axis=-1)).quantize(),  # black need not be 0
        palette_image(1 - MASK, [128, 0, 0, 0, 0, 0]),
        Image.fromarray(np.stack([MASK * 0 + 200, MASK * 0, MASK * 0, MASK * 255], axis=-1)),
    ],
    ids=["1", "255", "16 bits", "bits", "palette", "white", "almost black", "red", "quantized", "inverse", "alpha"],
)
def test_a_single_object_is_read_from_every_kind_of_mask(tmp_path, image):
    image.save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png")
    objects = Objects.of(mask, tmp_path / "a.png", together=False)
    np.testing.assert_array_equal(objects.split(mask), MASK[None] > 0)
    assert not objects.void(mask).any()


def test_several_objects_are_told_apart_in_numbers_and_in_colors(tmp_path):
    values = MASK.copy()
    values[5:7, 1:3] = 2
    colors = np.array(PALETTE, np.uint8).reshape(-1, 3)[values]
    for name, image in (("numbers", palette_image(values, PALETTE)), ("colors", Image.fromarray(colors))):
        image.save(tmp_path / f"{name}.png")
        mask = read_mask(tmp_path / f"{name}.png")
        objects = Objects.of(mask, tmp_path, together=False)
        expected = {"numbers": ["1", "2"], "colors": ["#008000", "#800000"]}[name]
        assert objects.names == expected
        by_name = dict(zip(objects.names, objects.split(mask), strict=True))
        np.testing.assert_array_equal(by_name[expected[0] if name == "numbers" else "#800000"], values == 1)
        together = Objects.of(mask, tmp_path, together=True)
        np.testing.assert_array_equal(together.split(mask), values[None] > 0)
        assert together.names == ["all"]


def test_255_beside_other_objects_counts_for_nobody(tmp_path):
    values = MASK.copy()
    values[7] = 255
    for together in (False, True):
        objects = Objects.of(values, tmp_path, together=together)
        np.testing.assert_array_equal(objects.split(values), MASK[None] > 0)
        np.testing.assert_array_equal(objects.void(values), values == 255)


def test_masks_of_one_sequence_agree(tmp_path):
    """Quantized for itself, each mask numbers its colors as it likes: object 1 here is background 1 there."""
    small, large = np.zeros((8, 10), np.uint8), np.full((8, 10), 128, np.uint8)
    small[:2, :2], large[:2, :2] = 128, 0
    for name, red in (("small", small), ("large", large)):
        Image.fromarray(np.stack([red, red * 0, red * 0], axis=-1)).quantize().save(tmp_path / f"{name}.png")
    numbers = {tuple(np.unique(np.asarray(Image.open(tmp_path / f"{n}.png")))) for n in ("small", "large")}
    assert numbers == {(0, 1)}
    first, second = read_masks([tmp_path / "small.png", tmp_path / "large.png"])
    objects = Objects.of(first, tmp_path, together=False)
    np.testing.assert_array_equal(objects.split(second)[0], large > 0)


def test_what_is_no_mask_is_named(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "photo.png")
    soft = MASK * 255
    soft[4, 2:6] = 140
    Image.fromarray(soft).save(tmp_path / "soft.png")
    (tmp_path / "text.png").write_text("no image")
    for name, says in (
        ("photo", "256 values"),
        ("soft", r"\(140 \.\.\.\), too many for object numbers"),
        ("text", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.png.*{says}"):
            read_mask(tmp_path / f"{name}.png")
