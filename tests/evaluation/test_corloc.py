from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dora_ray import evaluate
from dora_ray.errors import ConfigError
from dora_ray.evaluation import corloc
from dora_ray.evaluation.corloc import (
    attention_patches,
    box_iou,
    component,
    discover_box,
    evaluate_corloc,
    find_boxes,
    lost_patches,
    patch_box,
)
from dora_ray.method.vit import build_vit, tracked_features
from tests.evaluation.checkpoints import small_config, write_checkpoint

VOC_XML = """<annotation><object><name>dog</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>60</ymax>
</bndbox></object><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>8</ymax></bndbox>
</object></annotation>"""


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32, "drop_path": 0.0}
    return build_vit(name="vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48), (90, 120, 60)).save(tmp_path / "images" / name)
    boxes = {"b.png": [[0, 0, 64, 48]], "a.png": [[0, 0, 8, 8], [10, 10, 20, 20]], "c.png": []}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


def test_overlap_is_that_of_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(rng.integers(0, 12, size=(2, 2, 2)), axis=1) + np.array([[0, 0], [1, 1]])
        grids = np.zeros((2, 14, 14), bool)
        for grid, ((x0, y0), (x1, y1)) in zip(grids, corners, strict=True):
            grid[y0:y1, x0:x1] = True
        expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
        assert box_iou(*(tuple(box.ravel()) for box in corners)) == pytest.approx(expected)


def test_a_component_is_connected_by_sides():
    patches = np.array([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]], bool)
    assert component(patches, (0, 3)).tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert component(patches, (2, 0)).sum() == 1
    assert component(patches, (2, 1)).sum() == 2  # a start outside the patches counts, and joins its neighbor


def test_a_box_encloses_its_patches_in_pixels():
    patches = np.zeros((4, 5), bool)
    patches[1:3, 2:5] = True
    assert patch_box(patches, width=100, height=60) == (40.0, 15.0, 100.0, 45.0)


def test_lost_finds_the_small_group_of_like_patches():
    """Four object patches point one way, twelve background patches the other."""
    key = torch.tensor([[-1.0, 0.1]]).repeat(16, 1)
    key[[5, 6, 9, 10]] = torch.tensor([1.0, 0.1])
    patches, seed = lost_patches(key, num_seeds=3)
    assert seed == 5
    assert patches.nonzero().flatten().tolist() == [5, 6, 9, 10]


def test_attention_takes_what_is_above_its_mean():
    attention = torch.tensor([[0.0, 0.2, 0.5, 0.1], [0.1, 0.4, 0.3, 0.0]])
    patches, seed = attention_patches(attention)
    assert patches.tolist() == [False, True, True, False]
    assert seed == 2


def test_both_layouts_are_read(listed, tmp_path_factory):
    assert [(path.name, len(boxes)) for path, boxes in find_boxes(listed)] == [("a.png", 2), ("b.png", 1)]
    voc = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    for name in ("000002", "000001"):
        (voc / "Annotations" / f"{name}.xml").write_text(VOC_XML)
    assert [path.name for path, _ in find_boxes(voc)] == ["000001.jpg", "000002.jpg"]
    assert find_boxes(voc)[0][1] == [(10, 20, 30, 60), (0, 0, 8, 8)]
    (voc / "Annotations" / "._000001.xml").write_bytes(b"what macOS keeps beside a file")
    assert len(find_boxes(voc)) == 2
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("000002\n")
    assert [path.name for path, _ in find_boxes(voc)] == ["000002.jpg"]
    (voc / "Annotations" / "000002.xml").write_text("<annotation>")
    with pytest.raises(ConfigError, match=r"000002\.xml"):
        find_boxes(voc)


def test_other_layouts_are_refused(listed, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"boxes\.json"):
        find_boxes(tmp_path_factory.mktemp("empty"))
    for content in ("{", '{"a.png": [[1, 2, 3]]}', '{"a.png": 3}', "{}"):
        (listed / "boxes.json").write_text(content)
        with pytest.raises(ConfigError, match=r"boxes\.json"):
            find_boxes(listed)


@pytest.mark.parametrize("method", ["attention", "lost"])
@pytest.mark.parametrize("size", [(64, 48), (50, 70)])
def test_a_found_box_lies_in_the_image(vit, method, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, size=(*size[::-1], 3), dtype=np.uint8))
    with torch.no_grad():
        left, top, right, bottom = discover_box(
            vit, image, method=method, short_side=None, long_side=640, num_seeds=5, device="cpu"
        )
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_corloc_counts_the_images_whose_box_hits(vit, listed):
    """The truth of `a` is what the encoder finds there; that of `b` is nowhere near."""
    settings = {"method": "lost", "short_side": None, "long_side": 640, "num_seeds": 100, "device": "cpu"}
    with torch.no_grad():
        box = discover_box(vit, Image.open(listed / "images" / "a.png"), **settings)
    (listed / "boxes.json").write_text(json.dumps({"a.png": [[0, 0, 1, 1], box], "b.png": [[0, 0, 1, 1]]}))
    assert evaluate_corloc(vit, listed, max_images=None, **settings)["corloc"] == 0.5
    first = evaluate_corloc(vit, listed, max_images=1, **settings)
    assert (first["corloc"], first["num_images"], first["num_unreadable"]) == (1.0, 1, 0)
    assert 0.2 < first["corloc_interval"][0] < first["corloc_interval"][1] == 1.0


def test_corloc_through_evaluate(listed, tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())
    result = evaluate(checkpoint, "corloc", data=listed, method="attention", short_side=32)
    assert json.loads(json.dumps(result)) == result
    assert result["results"]["num_images"] == 2
    assert result["results"]["whole_image"] == 0.5
    with pytest.raises(ConfigError, match="method"):
        evaluate(checkpoint, "corloc", data=listed, method="magic")


def seen_sizes(vit, monkeypatch, size, **options):
    """Sizes (height, width) of what the encoder is shown of a photograph."""
    sizes = []

    def watched(model, frames, *, block):
        sizes.append(tuple(frames.shape[-2:]))
        return tracked_features(model, frames, block=block)

    monkeypatch.setattr(corloc, "tracked_features", watched)
    settings = {"method": "attention", "num_seeds": 5, "device": "cpu", "short_side": None, "long_side": 640, **options}
    with torch.no_grad():
        discover_box(vit, Image.new("RGB", size), **settings)
    return sizes


def test_a_photograph_is_seen_within_a_bounded_size(vit, monkeypatch):
    """12 megapixels, which took 16 GB as 187,500 patches, are 80 x 60 of them; Pascal VOC's keep their size."""
    assert seen_sizes(vit, monkeypatch, (4000, 3000)) == [(480, 640)]
    assert seen_sizes(vit, monkeypatch, (500, 375)) == [(376, 496)]
    assert seen_sizes(vit, monkeypatch, (4000, 3000), short_side=96) == [(96, 128)]
    assert seen_sizes(vit, monkeypatch, (20000, 10)) == [(8, 640)]


def test_too_many_patches_are_refused_with_the_files_name(listed, tmp_path_factory):
    Image.new("RGB", (3000, 300)).save(listed / "images" / "b.png")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())
    with pytest.raises(ConfigError, match=r"b\.png: 3200x320 pixels are [\d,]+ patches .* lower short_side"):
        evaluate(checkpoint, "corloc", data=listed, short_side=320, method="attention")


def test_all_unreadable_images_are_named_and_can_be_left_out(listed, tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())
    (listed / "boxes.json").write_text(
        json.dumps({f"{name}.png": [[0, 0, 64, 48]] for name in ("a", "b", "gone", "text")})
    )
    (listed / "images" / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"2 of 4 files.*gone\.png.*text\.png"):
        evaluate(checkpoint, "corloc", data=listed, short_side=32)
    numbers = evaluate(checkpoint, "corloc", data=listed, short_side=32, skip_unreadable=True)["results"]
    assert (numbers["num_images"], numbers["num_unreadable"]) == (2, 2)
    assert numbers["whole_image"] == 1.0


def test_a_box_without_an_area_is_named(listed):
    (listed / "boxes.json").write_text(json.dumps({"a.png": [[5, 5, 5, 9]]}))
    with pytest.raises(ConfigError, match=r"a\.png has an empty box \(left 5, top 5, right 5"):
        find_boxes(listed)
