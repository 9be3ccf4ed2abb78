"""Labeled tour on disk: the film, and its ground truth in the layouts of DAVIS 2017 and Pascal VOC.

    OUT/film.mp4
    OUT/davis/JPEGImages/480p/tour-000/00000.jpg       and Annotations/480p/tour-000/00000.png: a palette index for
    OUT/davis/ImageSets/2017/val.txt                   each object of the sequence, 0 elsewhere
    OUT/voc/JPEGImages/000000.jpg                      and Annotations/000000.xml: a box and a class for each object
    OUT/voc/ImageSets/Main/trainval.txt
    OUT/tour.json                                      settings; the objects and frames of each sequence

The pictures are saved before the film is compressed, so masks match them to the pixel. DAVIS's tools expect the folder
480p whatever the pictures' size.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import simplejpeg
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.video.cutouts import Photographs, packaged_photographs
from dora_ray.video.synthetic import encode_video
from dora_ray.video.tours import ObjectInView, Tour, TourFrame

FILM, FACTS = "film.mp4", "tour.json"
JPEG_QUALITY = 95
# Object ids of a sequence: the palette without the background and DAVIS's 255, which means "not scored".
MOST_IDS = 254
DIFFICULT_BELOW = 0.25  # visible share of an object
Progress = Callable[[int, int], None]


def make_tour(
    out: str | Path,
    *,
    width: int,
    height: int,
    num_frames: int,
    frames_per_second: float,
    seed: int,
    num_objects: int = 4,
    labels_per_second: float = 2.0,
    sequence_seconds: float = 10.0,
    photographs: Photographs | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a labeled tour, frame by frame.

    Args:
        out: folder, created if missing.
        width: pixels, even.
        height: pixels, even.
        num_frames: frames of the film.
        frames_per_second: rate of the film.
        seed: the same seed gives the same pictures and masks.
        num_objects: number of simultaneous objects.
        labels_per_second: labeled frames a second, rounded to every n-th frame.
        sequence_seconds: length of a DAVIS sequence.
        photographs: source material of the tour; None: packaged photographs.
        progress: called with the number of finished frames and the total.

    Returns:
        The film's path.

    Raises:
        ConfigError: an odd or very small size, too few frames, or missing photographs.
    """
    if width % 2 or height % 2 or min(width, height) < 32:
        raise ConfigError(f"a tour of {width}x{height} pixels: both sides must be even, and at least 32")
    if num_frames < 2 or num_objects < 1 or min(frames_per_second, labels_per_second, sequence_seconds) <= 0:
        raise ConfigError(
            f"a tour of {num_frames} frames at {frames_per_second:g} a second, {num_objects} objects, labels at "
            f"{labels_per_second:g} a second, sequences of {sequence_seconds:g} s: it needs 2 frames, 1 object, and "
            "rates and lengths above 0"
        )
    tour = Tour(width, height, frames_per_second, seed, num_objects, photographs or packaged_photographs())
    label_every = max(1, round(frames_per_second / labels_per_second))
    labels = _Labels(Path(out), label_every, max(1, round(sequence_seconds * frames_per_second / label_every)))
    film = encode_video(
        Path(out, FILM),
        _drawn(tour, num_frames, labels, progress),
        frames_per_second=frames_per_second,
        codec="libx264",
        group_size=max(1, round(2 * frames_per_second)),
        options={"preset": "veryfast", "crf": "18"},
    )
    settings = {
        "width": width,
        "height": height,
        "frames_per_second": frames_per_second,
        "num_frames": num_frames,
        "seed": seed,
        "num_objects": num_objects,
        "label_every": label_every,
        "classes": tour.photographs.classes,
    }
    Path(out, FACTS).write_text(json.dumps(settings | {"sequences": labels.sequences}, indent=1))
    return film


def _drawn(tour: Tour, num_frames: int, labels: _Labels, progress: Progress | None) -> Iterator[np.ndarray]:
    for number in range(num_frames):
        frame = tour.frame(number)
        if number % labels.every == 0:
            labels.write(number, frame)
        yield frame.picture
        if progress is not None:
            progress(number + 1, num_frames)


class _Labels:
    """Writes labeled frames as they come; remembers each sequence's objects, but no frames."""

    def __init__(self, out: Path, every: int, frames_per_sequence: int) -> None:
        self.every = every
        self.sequences: list[dict[str, Any]] = []
        self._frames_per_sequence = frames_per_sequence
        self._davis, self._voc = out / "davis", out / "voc"
        self._val = self._davis / "ImageSets" / "2017" / "val.txt"
        self._trainval = self._voc / "ImageSets" / "Main" / "trainval.txt"
        folders = [self._val.parent, self._trainval.parent, self._voc / "JPEGImages", self._voc / "Annotations"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for listed in (self._val, self._trainval):
            listed.write_text("")

    def write(self, number: int, frame: TourFrame) -> None:
        """Write one labeled frame in both layouts."""
        position = number // self.every
        if position % self._frames_per_sequence == 0:
            self._begin_sequence(number)
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(frame.picture), quality=JPEG_QUALITY)
        self._write_davis(position % self._frames_per_sequence, jpeg, frame)
        self._write_voc(f"{number:06d}", jpeg, frame)

    def _begin_sequence(self, number: int) -> None:
        name = f"tour-{len(self.sequences):03d}"
        self.sequences.append({"name": name, "first_frame": number, "num_frames": 0, "objects": []})
        for kind in ("JPEGImages", "Annotations"):
            (self._davis / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
        with self._val.open("a") as listed:
            listed.write(name + "\n")

    def _write_davis(self, position: int, jpeg: bytes, frame: TourFrame) -> None:
        """Write picture and mask; an object new to the sequence gets the next id."""
        sequence = self.sequences[-1]
        sequence["num_frames"] += 1
        ids = {known["instance"]: known["id"] for known in sequence["objects"]}
        table = np.zeros(1 + max([0, *(entry.instance for entry in frame.objects)]), np.uint8)
        for entry in frame.objects:
            if entry.instance not in ids:
                ids[entry.instance] = len(ids) + 1
                known = {"id": ids[entry.instance], "instance": entry.instance, "class": entry.name}
                sequence["objects"].append(known)
            if ids[entry.instance] > MOST_IDS:
                raise ConfigError(
                    f"{sequence['name']} has more than {MOST_IDS} objects: take shorter sequences or fewer objects"
                )
            table[entry.instance] = ids[entry.instance]
        name = f"480p/{sequence['name']}/{position:05d}"
        (self._davis / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg)
        (self._davis / "Annotations" / f"{name}.png").write_bytes(palette_png(table[frame.instances]))

    def _write_voc(self, name: str, jpeg: bytes, frame: TourFrame) -> None:
        (self._voc / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg)
        (self._voc / "Annotations" / f"{name}.xml").write_bytes(voc_annotation(f"{name}.jpg", frame))
        with self._trainval.open("a") as listed:
            listed.write(name + "\n")


def palette_png(ids: np.ndarray) -> bytes:
    """Encode ids (H, W) uint8 as a PNG with VOC's palette, the mask format of DAVIS 2017."""
    image = Image.fromarray(ids)
    image.putpalette(voc_palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def voc_palette() -> list[int]:
    """Return 256 colors, 768 values: bit 3 j + c of an id is bit 7 - j of its color c."""
    return [
        sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for number in range(256)
        for channel in range(3)
    ]


def voc_annotation(filename: str, frame: TourFrame) -> bytes:
    """Return a frame's VOC XML, which counts pixels from 1 and includes a box's last one."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = filename
    size = ElementTree.SubElement(root, "size")
    for side, value in zip(("height", "width", "depth"), frame.picture.shape, strict=True):
        ElementTree.SubElement(size, side).text = str(value)
    for entry in frame.objects:
        _add_object(root, entry)
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def _add_object(root: ElementTree.Element, entry: ObjectInView) -> None:
    node = ElementTree.SubElement(root, "object")
    left, top, right, bottom = entry.box
    facts = {
        "name": entry.name,
        "instance": entry.instance,
        "truncated": int(entry.truncated),
        "occluded": int(entry.hidden > 0),
        "difficult": int(1 - entry.hidden < DIFFICULT_BELOW),
    }
    for name, value in facts.items():
        ElementTree.SubElement(node, name).text = str(value)
    box = ElementTree.SubElement(node, "bndbox")
    for name, value in {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}.items():
        ElementTree.SubElement(box, name).text = str(value)
