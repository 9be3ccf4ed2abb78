"""Labeled tours: a walk past photographs, with moving objects whose masks are exact to the pixel.

Every picture is a pure function of (seed, frame number). Between frames, only reproducible caches are kept, so an
hour's film needs no more memory than a minute's, and any frame can be drawn alone.

H, W height and width of a picture, pixels. World pixels are picture pixels at zoom 1; x runs along the walk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dora_ray.video.cutouts import Cutout, Photographs

Affine = np.ndarray  # (2, 3): maps pixels of the target to those of the source
_PANEL, _FEATHER = 1.6, 0.25  # of the width: distance of scenes, and width of the blend between two
_ROOM = 1.5  # height of the world, in pictures
_PARALLAX, _POSTS_APART = 1.6, 2.4  # posts are nearer to the camera than the scenes; distance in widths
_WORLD, _CAMERA, _OBJECT, _POST = range(4)  # purpose of a random number


@dataclass(frozen=True)
class ObjectInView:
    """Object visible in a picture.

    Attributes:
        instance: number in the film, from 1; unique to the object.
        name: name of its class.
        pixels: pixels of its mask in the picture.
        hidden: share of it covered by other things; truncated: the picture's edge cuts it.
        box: left, top, right, bottom of the mask, pixels, right and bottom excluded.
    """

    instance: int
    name: str
    pixels: int
    hidden: float
    truncated: bool
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class TourFrame:
    """Picture and ground truth: picture (H, W, 3) uint8 RGB, instances (H, W) int32, 0 outside objects."""

    picture: np.ndarray
    instances: np.ndarray
    objects: tuple[ObjectInView, ...]


@dataclass(frozen=True, eq=False)
class Tour:
    """Film drawn frame by frame.

    Attributes:
        width: pixels; height: pixels.
        frames_per_second: constant.
        seed: the same seed gives the same film.
        num_objects: simultaneous objects; each is followed by another once it has left.
        photographs: source material of the film.
        light_drift: strength of the slow changes of light and color; 0: none.
    """

    width: int
    height: int
    frames_per_second: float
    seed: int
    num_objects: int
    photographs: Photographs
    light_drift: float = 1.0

    def frame(self, number: int) -> TourFrame:
        """Draw one frame."""
        seconds = number / self.frames_per_second
        camera = self._camera(seconds)
        base = int(camera[0, 2] // self._panel_width)
        place = camera.copy()
        place[0, 2] -= (base - 1) * self._panel_width
        picture = _warp(self._world(base), (self.width, self.height), place, Image.Resampling.BILINEAR)
        instances = np.zeros((self.height, self.width), np.int32)
        drawn: list[tuple[int, Cutout, int, bool]] = []
        for slot in range(self.num_objects):
            drawn += self._draw_object(slot, seconds, camera, picture, instances)
        self._draw_posts(seconds, picture, instances)
        lit = picture.point(self._light(seconds)) if self.light_drift else picture
        return TourFrame(np.asarray(lit).copy(), instances, tuple(_visible(instances, drawn)))

    @property
    def _panel_width(self) -> int:
        return round(_PANEL * self.width)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    @functools.cached_property
    def _waves(self) -> np.ndarray:
        """(12, 2) phases and relative speeds of all oscillations."""
        rng = self._rng(_CAMERA)
        return np.stack([rng.uniform(0, 2 * np.pi, 12), rng.uniform(0.8, 1.25, 12)], axis=1)

    def _wave(self, which: int, seconds: float, period: float) -> float:
        phase, speed = self._waves[which]
        return float(np.sin(2 * np.pi * seconds * speed / period + phase))

    def _path(self, seconds: float) -> tuple[float, float]:
        """Return the walker's position in world pixels: forward at varying speed, slightly up and down."""
        x = 0.16 * self.width * (seconds + 1.5 * self._wave(0, seconds, 17.0)) + 4 * self.width
        return x, self.height * (_ROOM / 2 + 0.03 * self._wave(1, seconds, 11.0))

    def _camera(self, seconds: float) -> Affine:
        """Return the map from picture to world pixels: path, zoom, a step's bounce, shake of position and angle."""
        x, y = self._path(seconds)
        zoom = 1.1 * np.exp(0.12 * self._wave(2, seconds, 13.0))
        shake = 0.008 * self.height
        x += shake * (self._wave(3, seconds, 1.7) + self._wave(4, seconds, 0.6))
        y += shake * (self._wave(5, seconds, 1.1) + 1.5 * self._wave(6, seconds, 0.55))
        angle = np.radians(1.2) * self._wave(7, seconds, 2.3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
        middle = np.array([self.width, self.height]) / 2
        return np.column_stack([turn, np.array([x, y]) - turn @ middle])

    def _light(self, seconds: float) -> list[int]:
        """Return the lookup table of the three channels, 768 values."""
        level = np.arange(256) / 255
        gamma = np.exp(0.25 * self.light_drift * self._wave(8, seconds, 41.0))
        tints = [1 + 0.1 * self.light_drift * self._wave(9 + channel, seconds, 29.0) for channel in range(3)]
        table = np.concatenate([np.clip(255 * tint * level**gamma, 0, 255) for tint in tints])
        return [int(value) for value in np.rint(table)]

    @functools.cached_property
    def _world(self) -> functools._lru_cache_wrapper[Image.Image]:
        return functools.lru_cache(maxsize=2)(self._compose_world)

    def _compose_world(self, base: int) -> Image.Image:
        """Return the world from panel `base - 1` to `base + 1`, with neighbors blended."""
        step, feather = self._panel_width, round(_FEATHER * self.width)
        strip = Image.new("RGB", (3 * step + feather, round(_ROOM * self.height)))
        ramp = np.minimum(np.arange(step + feather) / feather, 1)
        fade = Image.fromarray(np.broadcast_to(np.rint(255 * ramp).astype(np.uint8), (strip.height, len(ramp))).copy())
        for place, number in enumerate((base - 1, base, base + 1)):
            strip.paste(self._panel(number, step + feather), (place * step, 0), fade if place else None)
        return strip

    def _panel(self, number: int, width: int) -> Image.Image:
        """Return one scene of the walk: a random part of a photograph, possibly mirrored, in random light."""
        rng = self._rng(_WORLD, number)
        scene = self.photographs.scenes[int(rng.integers(len(self.photographs.scenes)))]
        size = (width, round(_ROOM * self.height))
        most = min(scene.width / size[0], scene.height / size[1])
        taken = np.array(size) * most * rng.uniform(0.5, 1.0)
        left, top = rng.uniform(0, 1, 2) * (np.array(scene.size) - taken)
        part = scene.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + taken[0], top + taken[1]))
        if rng.integers(2):
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _tinted(part, rng)

    @functools.cached_property
    def _cast(self) -> functools._lru_cache_wrapper[_Actor]:
        return functools.lru_cache(maxsize=2 * self.num_objects)(self._make_actor)

    def _make_actor(self, slot: int, generation: int) -> _Actor:
        rng = self._rng(_OBJECT, slot, generation)
        cutout = self.photographs.cutouts[int(rng.integers(len(self.photographs.cutouts)))]
        reach = rng.uniform(0.3, 0.6) * self.height
        scale = reach / max(cutout.picture.size) * min(1.5, max(cutout.picture.size) / min(cutout.picture.size))
        size = (max(4, round(cutout.picture.width * scale)), max(4, round(cutout.picture.height * scale)))
        picture, mask = cutout.picture.resize(size, Image.Resampling.BICUBIC), cutout.mask.resize(size)
        if rng.integers(2):
            picture, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (picture, mask))
        direction = 1 if rng.integers(2) else -1
        span = 0.55 * self.width + size[0] / 2
        heights = rng.uniform(-0.22, 0.25, 2) * self.height
        growth, bounce = rng.uniform(-0.22, 0.22), rng.uniform(0.5, 1.2)
        drawn = Cutout(cutout.name, picture, mask)
        return _Actor(drawn, (-direction * span, direction * span), tuple(heights), growth, bounce)

    def _draw_object(
        self, slot: int, seconds: float, camera: Affine, picture: Image.Image, instances: np.ndarray
    ) -> list[tuple[int, Cutout, int, bool]]:
        """Draw the slot's current object; return its instance, cutout, pixels and whether the edge cuts it."""
        rng = self._rng(_OBJECT, slot)
        period, phase = rng.uniform(7, 13), rng.uniform(0, 1)
        generation, progress = divmod(seconds / period + phase, 1.0)
        actor = self._cast(slot, int(generation))
        instance = 1 + slot + self.num_objects * int(generation)
        x, y = self._path(seconds)
        middle = actor.place(progress, seconds) + np.array([x, y])
        placed = _placement(actor, progress, seconds, middle, camera)
        pixels, cut = _paste(actor.cutout, placed, picture, instances, instance)
        return [(instance, actor.cutout, pixels, cut)] if pixels else []

    def _draw_posts(self, seconds: float, picture: Image.Image, instances: np.ndarray) -> None:
        """Draw the posts that pass between the camera and everything else."""
        apart = _POSTS_APART * self.width
        x = _PARALLAX * self._path(seconds)[0]
        for number in (int(x // apart), int(x // apart) + 1):
            rng = self._rng(_POST, number)
            width = max(2, round(rng.uniform(0.04, 0.09) * self.width))
            left = round((number + rng.uniform(-0.3, 0.3)) * apart - x + self.width / 2)
            if -width < left < self.width:
                picture.paste(self._post(number, width), (left, 0))
                instances[:, max(left, 0) : left + width] = 0

    def _post(self, number: int, width: int) -> Image.Image:
        rng = self._rng(_POST, number, 1)
        scene = self.photographs.scenes[int(rng.integers(len(self.photographs.scenes)))]
        left = rng.uniform(0, 0.9) * scene.width
        box = (left, 0, left + 0.1 * scene.width, scene.height)
        return _tinted(scene.resize((width, self.height), Image.Resampling.BICUBIC, box=box), rng)


@dataclass(frozen=True, eq=False)
class _Actor:
    """Object on its way across the picture."""

    cutout: Cutout
    across: tuple[float, float]
    heights: Sequence[float]
    growth: float
    bounce: float

    def place(self, progress: float, seconds: float) -> np.ndarray:
        """Return its center in pixels relative to the walker's position."""
        x = self.across[0] + (self.across[1] - self.across[0]) * progress
        y = self.heights[0] + (self.heights[1] - self.heights[0]) * progress
        return np.array([x, y + 0.03 * self.cutout.picture.height * np.sin(2 * np.pi * seconds / self.bounce)])


def _placement(actor: _Actor, progress: float, seconds: float, middle: np.ndarray, camera: Affine) -> Affine:
    """Return the map from picture to cutout pixels: camera, then the object's size, sway and place."""
    size = np.exp(actor.growth * (2 * progress - 1))
    angle = np.radians(5) * np.sin(2 * np.pi * seconds / (2 * actor.bounce))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / size
    center = np.array(actor.cutout.picture.size) / 2
    return np.column_stack([turn @ camera[:, :2], turn @ (camera[:, 2] - middle) + center])


def _paste(
    cutout: Cutout, placed: Affine, picture: Image.Image, instances: np.ndarray, instance: int
) -> tuple[int, bool]:
    """Draw the cutout with hard edges, so that its mask is exact; return its pixels and whether the edge cuts it."""
    inverse = np.linalg.inv(placed[:, :2])
    corners = np.array([(x, y) for x in (0, cutout.picture.width) for y in (0, cutout.picture.height)])
    seen = (corners - placed[:, 2]) @ inverse.T
    low, high = np.floor(seen.min(axis=0)).astype(int), np.ceil(seen.max(axis=0)).astype(int)
    shifted = np.column_stack([placed[:, :2], placed[:, 2] + placed[:, :2] @ low])
    size = tuple((high - low).tolist())
    mask = _warp(cutout.mask, size, shifted, Image.Resampling.NEAREST)
    left, top = (max(0, -side) for side in low.tolist())
    whole = np.asarray(mask) > 127
    inside = whole[top : max(0, picture.height - int(low[1])), left : max(0, picture.width - int(low[0]))]
    pixels = int(inside.sum())
    if pixels:
        exact = Image.fromarray(whole * np.uint8(255))
        picture.paste(_warp(cutout.picture, size, shifted, Image.Resampling.BILINEAR), tuple(low.tolist()), exact)
        y, x = max(0, int(low[1])), max(0, int(low[0]))
        instances[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = instance
    return pixels, pixels < int(whole.sum())


def _visible(instances: np.ndarray, drawn: Sequence[tuple[int, Cutout, int, bool]]) -> list[ObjectInView]:
    """Return the objects still visible when everything is drawn."""
    found = []
    for instance, cutout, pixels, cut in drawn:
        mask = instances == instance
        left = int(np.count_nonzero(mask))
        if left:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            found.append(ObjectInView(instance, cutout.name, left, 1 - left / pixels, cut, box))
    return found


def _warp(source: Image.Image, size: tuple[int, int], affine: Affine, resampling: Image.Resampling) -> Image.Image:
    return source.transform(size, Image.Transform.AFFINE, affine.flatten().tolist(), resampling)


def _tinted(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scale each channel, so that average color does not identify a photograph."""
    gains = rng.uniform(0.75, 1.25, 3)
    table = np.concatenate([np.clip(np.arange(256) * gain, 0, 255) for gain in gains])
    return picture.point(np.rint(table).astype(int).tolist())
