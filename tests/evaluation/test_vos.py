from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dora_ray import evaluate
from dora_ray.errors import ConfigError
from dora_ray.evaluation.davis import find_sequences
from dora_ray.evaluation.vos import score_sequence
from tests.evaluation.checkpoints import small_config, write_checkpoint


@pytest.fixture
def davis(tmp_path):
    """Two sequences of a bright square that moves over noise."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        images, masks = tmp_path / "JPEGImages" / "480p" / name, tmp_path / "Annotations" / "480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        background = rng.integers(30, 90, size=(48, 80, 3), dtype=np.uint8)
        for t in range(5):
            frame, mask = background.copy(), np.zeros((48, 80), np.uint8)
            frame[12:36, 10 + 4 * t : 34 + 4 * t], mask[12:36, 10 + 4 * t : 34 + 4 * t] = (230, 200, 40), 255
            Image.fromarray(frame).save(images / f"{t:05d}.jpg", quality=95)
            Image.fromarray(mask).save(masks / f"{t:05d}.png")
    return tmp_path


def test_vos_through_evaluate(davis, tmp_path_factory):
    """An untrained encoder keeps color, so it follows a square whose color is its own."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())
    result = evaluate(checkpoint, "vos", data=davis, short_side=96)
    assert json.loads(json.dumps(result)) == result
    numbers = result["results"]
    assert sorted(numbers["sequences"]) == ["one", "two"]
    assert numbers["sequences"]["one"]["num_frames"] == 5
    assert numbers["j_mean"] > 0.6
    assert numbers["j_and_f"] == pytest.approx((numbers["j_mean"] + numbers["f_mean"]) / 2)
    assert (
        evaluate(checkpoint, "vos", data=davis, short_side=48, max_frames=3)["results"]["sequences"]["two"][
            "num_frames"
        ]
        == 3
    )
    assert numbers["averaged"] == "all 2 sequences (no ImageSets/*/val.txt), 2 objects"
    assert numbers["num_objects"] == 2
    assert numbers["still_j_and_f"] < numbers["j_and_f"]


def write_sequence(folder, masks, *, name="s", size=None):
    """A sequence of these masks, (T, H, W), over gray frames."""
    for kind in ("JPEGImages", "Annotations"):
        (folder / kind / "480p" / name).mkdir(parents=True)
    for t, mask in enumerate(masks):
        Image.new("RGB", size or mask.shape[::-1], (90, 90, 90)).save(
            folder / "JPEGImages" / "480p" / name / f"{t:05d}.jpg"
        )
        Image.fromarray(mask).save(folder / "Annotations" / "480p" / name / f"{t:05d}.png")


def two_objects():
    """(6, 48, 64): object 1 stays, object 2 moves right by 4 pixels a frame, and both are 12 x 12."""
    masks = np.zeros((6, 48, 64), np.uint8)
    for t in range(6):
        masks[t, 4:16, 4:16] = 1
        masks[t, 30:42, 4 + 4 * t : 16 + 4 * t] = 2
    return masks


def score(folder, found, *, together=False) -> dict:
    """The scores of given masks (T - 1, K, H, W)."""
    (sequence,) = find_sequences(folder)
    return score_sequence(sequence, lambda path: torch.zeros(1), lambda features, first: iter(found), together=together)


def test_scores_of_several_objects_are_those_worked_out_by_hand(tmp_path):
    """Both are said to stay where they were. After 4 t pixels, 12 - 4 t of 12 columns of the second one overlap."""
    masks = two_objects()
    write_sequence(tmp_path, masks)
    found = [np.stack([masks[0] == 1, masks[0] == 2])] * 5
    scores = score(tmp_path, found)["objects"]
    overlaps = [(12 - 4 * t) / (12 + 4 * t) if t < 3 else 0.0 for t in (1, 2, 3, 4)]  # without the first and last frame
    assert scores["1"]["j_mean"] == scores["1"]["f_mean"] == scores["1"]["j_recall"] == 1.0
    assert scores["2"]["j_mean"] == pytest.approx(np.mean(overlaps))
    assert scores["2"]["j_recall"] == 0.0
    assert scores["2"]["j_decay"] == pytest.approx(np.mean(overlaps[:2]) - np.mean(overlaps[-2:]))
    for name in ("1", "2"):
        assert scores[name]["still_j_mean"] == scores[name]["j_mean"]
        assert scores[name]["still_f_mean"] == scores[name]["f_mean"]


def test_scores_are_those_of_vos_benchmark(tmp_path):
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    masks, rng = two_objects(), np.random.default_rng(0)
    write_sequence(tmp_path, masks)
    guesses = [np.roll(mask, rng.integers(-3, 4, size=2), axis=(0, 1)) for mask in masks[1:]]
    scores = score(tmp_path, [np.stack([guess == 1, guess == 2]) for guess in guesses])
    for guess, mask in zip(guesses[:-1], masks[1:-1], strict=True):
        evaluator.feed_frame(guess, mask)
    j, f = evaluator.conclude()
    for k in (1, 2):
        assert 100 * scores["objects"][str(k)]["j_mean"] == pytest.approx(j[k])
        assert 100 * scores["objects"][str(k)]["f_mean"] == pytest.approx(f[k])
    assert 100 * scores["j"] == pytest.approx(np.mean(list(j.values())))


def test_pixels_that_count_for_nobody_change_no_score(tmp_path):
    masks = two_objects()
    found = [np.stack([masks[0] == 1, masks[0] == 2])] * 5
    write_sequence(tmp_path / "without", masks)
    masks[:, 20:26] = 255
    write_sequence(tmp_path / "with", masks)
    guess = [masks_of.copy() for masks_of in found]
    for masks_of in guess:
        masks_of[0, 20:26] = True
    expected, without = score(tmp_path / "without", found), score(tmp_path / "with", guess)
    assert without["objects"]["1"]["j_mean"] == expected["objects"]["1"]["j_mean"] == 1.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())


def test_the_score_is_a_mean_over_objects_not_over_sequences(checkpoint, tmp_path):
    write_sequence(tmp_path, two_objects(), name="two")
    write_sequence(tmp_path, (two_objects() == 1).astype(np.uint8), name="one")
    numbers = evaluate(checkpoint, "vos", data=tmp_path, short_side=48)["results"]
    scores = [score for s in numbers["sequences"].values() for score in s["objects"].values()]
    assert len(scores) == numbers["num_objects"] == 3
    for name in ("j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"):
        assert numbers[name] == pytest.approx(np.mean([score[name] for score in scores]))


def test_davis_2016_takes_all_objects_as_one(checkpoint, tmp_path):
    write_sequence(tmp_path, two_objects(), name="two")
    (tmp_path / "ImageSets" / "2016").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2016" / "val.txt").write_text("two\n")
    each = evaluate(checkpoint, "vos", data=tmp_path, short_side=48)
    assert list(each["results"]["sequences"]["two"]["objects"]) == ["1", "2"]
    merged = evaluate(checkpoint, "vos", data=tmp_path, short_side=48, year=2016)
    assert list(merged["results"]["sequences"]["two"]["objects"]) == ["all"]
    assert merged["settings"]["year"] == "2016"
    with pytest.raises(ConfigError, match=r"year='?2018"):
        evaluate(checkpoint, "vos", data=tmp_path, year=2018)


def test_masks_that_would_give_a_meaningless_score_are_errors(checkpoint, tmp_path):
    empty_first, vanished = two_objects(), two_objects()
    empty_first[0] = 0
    vanished[1:] = 0
    renumbered = two_objects()
    renumbered[1:][renumbered[1:] > 0] = 7
    cut = [mask[:-4] if t == 2 else mask for t, mask in enumerate(two_objects())]
    for number, (masks, says) in enumerate(
        (
            (empty_first, r"00000\.png shows no object"),
            (np.zeros_like(vanished), r"00000\.png shows no object"),
            (vanished, r"no object of the first mask \(1, 2\) appears in a scored"),
            (renumbered, "must use the same object numbers"),
            (cut, r"00002\.png has 64x44 pixels.*64x48"),
        )
    ):
        write_sequence(tmp_path / str(number), masks, size=(64, 48))
        with pytest.raises(ConfigError, match=says):
            evaluate(checkpoint, "vos", data=tmp_path / str(number), short_side=48)


def test_frames_of_another_shape_are_named(checkpoint, tmp_path):
    write_sequence(tmp_path / "all", two_objects(), size=(64, 64))
    with pytest.raises(ConfigError, match=r"00000\.jpg has 64x64 pixels, but its mask another shape, 64x48"):
        evaluate(checkpoint, "vos", data=tmp_path / "all", short_side=48)
    write_sequence(tmp_path / "one", two_objects())
    Image.new("RGB", (64, 96)).save(tmp_path / "one" / "JPEGImages" / "480p" / "s" / "00003.jpg")
    with pytest.raises(ConfigError, match=r"00003\.jpg differs in size from"):
        evaluate(checkpoint, "vos", data=tmp_path / "one", short_side=48)


def test_sequences_that_cannot_be_read_are_all_named_and_can_be_left_out(checkpoint, tmp_path):
    for name in ("a", "b", "c"):
        write_sequence(tmp_path, two_objects(), name=name)
    (tmp_path / "JPEGImages" / "480p" / "a" / "00004.jpg").write_bytes(b"-")
    (tmp_path / "JPEGImages" / "480p" / "a" / "00005.jpg").write_bytes(b"-")
    (tmp_path / "Annotations" / "480p" / "c" / "00001.png").write_bytes(b"-")
    with pytest.raises(ConfigError, match=r"a/00004\.jpg.*a/00005\.jpg.*c/00001\.png.*skip_unreadable=true"):
        evaluate(checkpoint, "vos", data=tmp_path, short_side=48)
    numbers = evaluate(checkpoint, "vos", data=tmp_path, short_side=48, skip_unreadable=True)["results"]
    assert list(numbers["sequences"]) == ["b"]
    assert "2 left out" in numbers["averaged"]
