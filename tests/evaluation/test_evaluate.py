from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dora_ray import evaluate, export
from dora_ray.errors import CheckpointError, ConfigError
from tests.evaluation.checkpoints import small_config, write_checkpoint

COLORS = {"blue": (30, 60, 220), "green": (40, 190, 60), "red": (220, 50, 40)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of noisy color fields: an untrained encoder keeps color, so even it tells them apart."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for name, color in COLORS.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(color, 20, size=(36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000007", small_config())


def test_knn_tells_colors_apart_and_says_what_it_did(checkpoint, images):
    result = evaluate(checkpoint, "knn", data=images)
    assert json.loads(json.dumps(result)) == result
    assert result["task"] == "knn"
    assert result["checkpoint"] == str(checkpoint)
    assert result["data"] == str(images)
    assert result["settings"]["neighbors"] == [20, 10, 100, 200]
    assert result["settings"]["image_size"] == 32
    numbers = result["results"]
    assert numbers["top1"] == numbers["top1_by_k"]["20"]
    assert sorted(numbers["top1_by_k"]) == ["10", "20", "36"]
    assert numbers["k_lowered_to"] == 36
    assert numbers["chance"] == pytest.approx(1 / 3)
    assert numbers["top1_by_k"]["10"] > 0.8
    assert (numbers["num_train"], numbers["num_test"], numbers["num_classes"]) == (36, 15, 3)


def test_linear_tells_colors_apart(checkpoint, images):
    result = evaluate(checkpoint, "linear", data=images, lr=0.1, epochs=30)
    assert json.loads(json.dumps(result)) == result
    assert result["results"]["top1"] > 0.8
    assert result["results"]["top5"] == 1.0
    assert result["results"]["num_blocks"] == 3  # the encoder has no fourth


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_an_evaluation_repeats_itself_from_an_export_too(checkpoint, images, tmp_path, task):
    options = {"epochs": 5} if task == "linear" else {}
    first = evaluate(checkpoint, task, data=images, **options)
    again = evaluate(export(checkpoint, tmp_path / "export"), task, data=images, **options)
    assert first["results"] == again["results"]
    assert first["settings"] == again["settings"]


def test_a_random_encoder_ignores_the_weights(checkpoint, images, tmp_path):
    other = write_checkpoint(tmp_path / "step-00000009", small_config(), step=9)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-4000:] = bytes(4000)
    (other / "model.safetensors").write_bytes(bytes(content))
    drawn = [evaluate(path, "knn", data=images, random_init=True, neighbors=(1, 2, 3)) for path in (checkpoint, other)]
    assert drawn[0]["results"] == drawn[1]["results"]
    assert drawn[0]["settings"]["random_init"] is True


def test_fewer_images_and_another_size_can_be_asked_for(checkpoint, images):
    result = evaluate(
        checkpoint, "knn", data=images, max_images=9, image_size=48, neighbors=[3], batch_size=4, num_workers=1
    )
    assert (result["results"]["num_train"], result["results"]["num_test"]) == (9, 9)
    assert result["results"]["k_lowered_to"] is None


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("nearest", {}, "choose from knn, linear, corloc, vos"),
        ("knn", {"epochs": 3}, "option of evaluation .knn.: epochs.*neighbors"),
        ("knn", {"neighbours": (3,)}, "Did you mean neighbors"),
        ("knn", {"neighbors": ()}, "neighbors"),
        ("knn", {"neighbors": (0,)}, "neighbors"),
        ("linear", {"lr": -1}, "lr=-1"),
        ("knn", {"device": "toaster"}, "device='toaster'"),
        (
            "knn",
            {"image_size": 50},
            "image_size=50 is not a multiple of the encoder's patch size of 8 px; use 48 or 56",
        ),
        ("linear", {"image_size": 3}, "patch size of 8 px; use 8"),
    ],
)
def test_what_is_not_known_or_allowed_is_refused(checkpoint, images, task, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(checkpoint, task, data=images, **options)


def test_missing_data_and_checkpoints_have_their_own_errors(checkpoint, images, tmp_path):
    with pytest.raises(ConfigError, match="train/CLASS"):
        evaluate(checkpoint, "knn", data=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(tmp_path / "nothing", "knn", data=images)


def test_wide_gray_images_give_the_score_of_the_same_images_in_8_bits(checkpoint, tmp_path):
    """Light and dark stripes: cut off at 255, as Pillow converts them, all would be white."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 6)):
        for name, level in (("dark", 60), ("light", 150)):
            for index in range(count):
                gray = np.clip(rng.normal(level, 30, size=(40, 40)), 0, 255).astype(np.uint8)
                for kind, values in (("8", gray), ("16", gray.astype(np.uint16) * 257)):
                    folder = tmp_path / kind / part / name
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(values).save(folder / f"{index}.png")
    scores = [evaluate(checkpoint, "knn", data=tmp_path / kind, neighbors=(3,))["results"] for kind in ("8", "16")]
    assert scores[0] == scores[1]
    assert scores[0]["top1"] > 0.8


def test_progress_is_shown_unless_it_is_not_wanted(checkpoint, images, caplog):
    with caplog.at_level("INFO"):
        evaluate(checkpoint, "knn", data=images, progress=False)
        assert "images" not in caplog.text
        evaluate(checkpoint, "knn", data=images)
    assert "eval knn: 51/51 images (100%)" in caplog.text


def test_unreadable_images_of_both_parts_are_named_together_and_counted(checkpoint, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for name in ("train/blue/03.png", "test/red/01.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"2 of 51 files.*train/blue/03\.png.*test/red/01\.png"):
        evaluate(checkpoint, "knn", data=tmp_path / "images")
    numbers = evaluate(checkpoint, "knn", data=tmp_path / "images", skip_unreadable=True)["results"]
    assert (numbers["num_train"], numbers["num_test"], numbers["num_unreadable"]) == (35, 14, 2)
    for path in (tmp_path / "images" / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the test images can be read"):
        evaluate(checkpoint, "knn", data=tmp_path / "images", skip_unreadable=True)
