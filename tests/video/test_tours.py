"""Labeled tours: the labels match the drawn pictures to the pixel."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dora_ray.errors import ConfigError
from dora_ray.evaluation.corloc import find_boxes
from dora_ray.video.cutouts import Cutout, Photographs, packaged_photographs, photographs_of
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import index_video
from dora_ray.video.tour_files import make_tour, voc_palette
from dora_ray.video.tours import Tour

SIZE = (96, 64)
COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
needs_photographs = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no photographs")


@functools.cache
def flat_photographs(gray: int = 150) -> Photographs:
    """Return gray scenes, and objects in unique plain colors."""
    scenes = tuple(Image.new("RGB", size, (gray, gray, gray)) for size in ((200, 100), (90, 120)))
    cutouts = []
    for number, (name, color) in enumerate(COLORS.items()):
        mask = Image.new("L", (60, 30 + 20 * number))
        ImageDraw.Draw(mask).ellipse((0, 0, mask.width - 1, mask.height - 1), fill=255)
        cutouts.append(Cutout(name, Image.new("RGB", mask.size, color), mask))
    return Photographs(scenes, tuple(cutouts))


def flat_tour(**changes) -> Tour:
    settings = {"frames_per_second": 6.0, "seed": 3, "num_objects": 4, "light_drift": 0.0}
    return Tour(*SIZE, photographs=flat_photographs(), **(settings | changes))


@pytest.mark.parametrize("seed", range(2))
def test_a_mask_is_what_was_drawn_of_the_object_pixel_for_pixel(seed):
    tour, covered = flat_tour(seed=seed), Counter()
    for number in range(0, 240, 4):
        frame = tour.frame(number)
        names = {entry.instance: entry.name for entry in frame.objects}
        assert set(np.unique(frame.instances)) - {0} == set(names)
        for name, color in COLORS.items():
            drawn = (frame.picture == color).all(axis=-1)
            of_class = np.isin(frame.instances, [instance for instance, other in names.items() if other == name])
            assert np.array_equal(drawn, of_class)
            covered[name] += int(drawn.sum())
    assert min(covered[name] for name in COLORS) > 0


def test_boxes_sizes_and_edges_are_those_of_the_masks():
    tour, cut, hidden = flat_tour(), 0, 0
    for number in range(0, 240, 5):
        frame = tour.frame(number)
        for entry in frame.objects:
            rows, columns = np.nonzero(frame.instances == entry.instance)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (entry.box, entry.pixels) == (box, len(rows))
            assert 0 <= entry.hidden < 1
            cut, hidden = cut + entry.truncated, hidden + (entry.hidden > 0)
    assert cut > 5
    assert hidden > 5


def test_objects_come_go_and_keep_their_numbers():
    """An instance has one class, is visible during one interval, and moves."""
    tour, classes, seen, places = flat_tour(), {}, {}, {}
    for number in range(360):
        for entry in tour.frame(number).objects:
            assert classes.setdefault(entry.instance, entry.name) == entry.name
            seen.setdefault(entry.instance, []).append(number)
            places.setdefault(entry.instance, []).append(entry.box[0] + entry.box[2])
    assert len(seen) > 12
    # An object is visible for at most 13 seconds.
    assert all(numbers[-1] - numbers[0] <= 13 * 6 for numbers in seen.values())
    moved = [max(place) - min(place) for place in places.values() if len(place) > 20]
    assert min(moved) > SIZE[0] // 3


def test_a_frame_can_be_drawn_alone_however_late():
    tour = flat_tour(light_drift=1.0)
    forward = [tour.frame(number) for number in (0, 1, 70000)]
    alone = [flat_tour(light_drift=1.0).frame(number) for number in (70000, 1, 0)]
    for one, other in zip(forward, reversed(alone), strict=True):
        assert np.array_equal(one.picture, other.picture)
        assert np.array_equal(one.instances, other.instances)
        assert one.objects == other.objects


def test_the_seed_decides():
    one, same, other = (flat_tour(seed=seed).frame(40) for seed in (0, 0, 1))
    assert np.array_equal(one.picture, same.picture)
    assert not np.array_equal(one.instances, other.instances)


@pytest.mark.parametrize("size", [(96, 64), (40, 100)])
def test_the_camera_never_sees_the_end_of_the_world(size):
    """Scenes of 150 are tinted to 112 and more; pixels outside the world would be 0."""
    for seed in range(4):
        tour = Tour(*size, 1.0, seed, 1, flat_photographs(), 0.0)
        for number in range(0, 400, 7):
            frame = tour.frame(number)
            assert frame.picture[frame.instances == 0].min() >= 110


def test_light_drifts_slowly():
    tour = flat_tour(light_drift=1.0, num_objects=1)
    light = np.array([np.median(tour.frame(number).picture, axis=(0, 1)) for number in range(0, 60 * 6, 6)])
    assert np.ptp(light.mean(axis=1)) > 20
    still = flat_tour(num_objects=1)
    assert np.array_equal(still.frame(5).picture, flat_tour(num_objects=1, light_drift=0.0).frame(5).picture)


def read_ids(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()
        return np.asarray(image)


def test_the_layouts_hold_what_was_drawn(tmp_path):
    """DAVIS's ids, VOC's boxes and the film match the frames named in tour.json."""
    out = tmp_path / "tour"
    settings = {"width": 96, "height": 64, "frames_per_second": 6.0, "seed": 5, "num_objects": 3}
    film = make_tour(out, num_frames=50, sequence_seconds=3.0, photographs=flat_photographs(), **settings)
    tour = Tour(96, 64, 6.0, 5, 3, flat_photographs())
    facts = json.loads((out / "tour.json").read_text())
    assert (out / "davis/ImageSets/2017/val.txt").read_text().split() == ["tour-000", "tour-001", "tour-002"]
    assert [entry["num_frames"] for entry in facts["sequences"]] == [6, 6, 5]
    boxes = dict(find_boxes(out / "voc"))
    for sequence in facts["sequences"]:
        ids = {entry["instance"]: entry["id"] for entry in sequence["objects"]}
        assert sorted(ids.values()) == list(range(1, len(ids) + 1))
        for position in range(sequence["num_frames"]):
            number = sequence["first_frame"] + position * facts["label_every"]
            frame = tour.frame(number)
            expected = np.zeros((64, 96), np.uint8)
            for entry in frame.objects:
                expected[frame.instances == entry.instance] = ids[entry.instance]
            name = f"480p/{sequence['name']}/{position:05d}"
            assert np.array_equal(read_ids(out / "davis/Annotations" / f"{name}.png"), expected)
            found = boxes[out / "voc/JPEGImages" / f"{number:06d}.jpg"]
            assert found == [tuple(map(float, entry.box)) for entry in frame.objects]
            for folder, stem in (("davis/JPEGImages", name), ("voc/JPEGImages", f"{number:06d}")):
                with Image.open(out / folder / f"{stem}.jpg") as image:
                    assert np.abs(np.asarray(image).astype(int) - frame.picture).mean() < 8
    index = index_video(str(film))
    assert len(index.pts) == 50
    frames = get_decoder("pyav").decode(index, index.pts[:6], short_side=64)
    for number, decoded in enumerate(frames):
        gray = np.asarray(Image.fromarray(tour.frame(number).picture).convert("L")).astype(int)
        assert np.abs(gray - decoded.y).mean() < 6


def test_ids_of_a_sequence_begin_with_what_its_first_frame_shows(tmp_path):
    make_tour(
        tmp_path, width=96, height=64, num_frames=120, frames_per_second=6.0, seed=1, photographs=flat_photographs()
    )
    for first, later in itertools.pairwise(sorted((tmp_path / "davis/Annotations/480p/tour-000").iterdir())[:2]):
        there = sorted(set(np.unique(read_ids(first))) - {0})
        assert there == list(range(1, len(there) + 1))
        assert set(np.unique(read_ids(later)))


def test_a_long_film_needs_no_more_memory_than_a_short_one(tmp_path):
    """Keeping 300 frames would take 32 MB."""
    code = (
        "import resource, sys; from dora_ray.video.tour_files import make_tour; from tests.video.test_tours import *;"
        "make_tour(sys.argv[1], num_frames=int(sys.argv[2]), width=160, height=96, frames_per_second=2.0, seed=0,"
        " photographs=flat_photographs()); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, tmp_path / str(number), str(number)], check=True,
                           capture_output=True, cwd=Path(__file__).parents[2]).stdout)
        for number in (30, 330)
    ]  # fmt: skip
    unit = 1024 if sys.platform == "linux" else 1  # of getrusage
    assert (peaks[1] - peaks[0]) * unit < 16e6


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"width": 97}, "must be even"), ({"num_frames": 1}, "2 frames"), ({"labels_per_second": 0}, "above 0")],
)
def test_invalid_tours_are_refused(tmp_path, changes, told):
    settings = {"width": 96, "height": 64, "num_frames": 10, "frames_per_second": 6.0, "seed": 0}
    with pytest.raises(ConfigError, match=told):
        make_tour(tmp_path / "x", photographs=flat_photographs(), **(settings | changes))
    assert not (tmp_path / "x").exists()


class TestOwnPhotographs:
    """Folder of a user's photographs."""

    def test_transparent_pictures_are_objects_and_others_scenes(self, tmp_path):
        (tmp_path / "dog").mkdir()
        Image.new("RGB", (80, 60), (9, 9, 9)).save(tmp_path / "street.jpg")
        picture = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
        picture.paste((200, 10, 10, 255), (10, 20, 40, 45))
        picture.save(tmp_path / "dog" / "rex.png")
        picture.save(tmp_path / "ball.png")
        found = photographs_of(tmp_path)
        assert found.classes == ["ball", "dog"]
        assert [scene.size for scene in found.scenes] == [(80, 60)]
        assert [cutout.picture.size for cutout in found.cutouts] == [(30, 25)] * 2

    def test_without_transparent_pictures_outlines_are_cut_out(self, tmp_path):
        for name in ("a", "b"):
            Image.new("RGB", (120, 90), (90, 90, 90)).save(tmp_path / f"{name}.png")
        found = photographs_of(tmp_path)
        assert found.classes == ["a", "b"]
        shares = [np.mean(np.asarray(cutout.mask) > 127) for cutout in found.cutouts]
        assert all(0.4 < share < 1 for share in shares)

    def test_invalid_folders_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="not a folder of photographs"):
            photographs_of(tmp_path)
        (tmp_path / "a.png").write_bytes(b"no picture")
        with pytest.raises(ConfigError, match=r"a\.png cannot be read as an image"):
            photographs_of(tmp_path)


@needs_photographs
def test_the_packaged_objects_are_many_and_textured():
    found = packaged_photographs()
    assert len(found.scenes) == 12
    assert len(found.classes) == len(found.cutouts) == 8
    for cutout in found.cutouts:
        inside = np.asarray(cutout.picture)[np.asarray(cutout.mask) > 127]
        assert len(inside) > 5000
        assert inside.std(axis=0).mean() > 15
