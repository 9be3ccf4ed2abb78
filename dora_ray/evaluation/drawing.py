"""Drawing with Pillow and NumPy: heat maps, mask overlays, labeled grids, short H.264 movies.

Legend: K objects, h x w patches of a map, H x W pixels.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (255, 255, 255)
INK = (30, 30, 34)
GAP = 6
MARGIN = 16
LINE = 20
FONT_SIZE = 15
STRIPE = 7
BAR_WIDTH = 240
_PALETTE = ((235, 70, 60), (40, 170, 90), (60, 120, 245), (245, 180, 30), (190, 80, 215), (30, 195, 210))
# Dark violet to yellow with monotonic lightness: readable in gray print and with color blindness.
_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def object_color(index: int) -> tuple[int, int, int]:
    """Return the color of object `index`: from a fixed palette, then hues a golden angle apart."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.75, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Map numbers in [0, 1] (...), clipped, to colors (..., 3) uint8."""
    position = np.clip(values, 0.0, 1.0) * (len(_HEAT) - 1)
    channels = [np.interp(position, np.arange(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarge(cells: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Enlarge (h, w) or (h, w, 3) to (H, W) or (H, W, 3) by nearest neighbor, so that patches stay visible."""
    rows = np.arange(height) * cells.shape[0] // height
    columns = np.arange(width) * cells.shape[1] // width
    large: np.ndarray = cells[rows[:, None], columns[None, :]]
    return large


def overlay(frame: np.ndarray, masks: np.ndarray, *, strength: float) -> np.ndarray:
    """Draw objects in color over a frame with a dimmed background; overlaps are striped, so that each object shows.

    Args:
        frame: (H, W, 3) uint8.
        masks: (K, h, w) in [0, 1].
        strength: Weight of the objects' color; the rest is the frame's.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = frame.shape[:2]
    large = np.stack([enlarge(mask, height=height, width=width) for mask in masks]).astype(np.float64)
    colors = np.array([object_color(index) for index in range(len(masks))], dtype=np.float64)
    chosen = _striped_choice(large > 0)
    covered = np.take_along_axis(large, chosen[None], axis=0)[0][..., None]
    tinted = (1 - strength) * frame + strength * colors[chosen]
    drawn = covered * tinted + (1 - covered) * 0.45 * frame
    for mask, color in zip(large, colors, strict=True):
        drawn[outline(mask > 0.5)] = color
    pixels: np.ndarray = drawn.round().astype(np.uint8)
    return pixels


def _striped_choice(covering: np.ndarray) -> np.ndarray:
    """Choose for each pixel (H, W) one of the objects that cover it (K, H, W), alternating in diagonal stripes."""
    rows, columns = np.indices(covering.shape[1:])
    turn = (rows + columns) // STRIPE % np.maximum(covering.sum(axis=0), 1)
    chosen: np.ndarray = (covering & (covering.cumsum(axis=0) == turn + 1)).argmax(axis=0)
    return chosen


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask (H, W) bool with a neighbor outside it; the image border does not count."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    border: np.ndarray = mask & ~inner
    return border


def resize(frame: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Resize a frame (H', W', 3) uint8, antialiased."""
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Row:
    """Row of a grid: label, label color, cells; None leaves a cell empty."""

    label: str
    color: tuple[int, int, int]
    cells: Sequence[np.ndarray | None]


def grid(
    rows: Sequence[Row], *, titles: Sequence[str], heading: Sequence[str], notes: Sequence[str], scale: tuple[str, str]
) -> Image.Image:
    """Draw a grid of equal cells with column titles, row labels and one color bar.

    Args:
        rows: Rows with cells (H, W, 3) uint8.
        titles: Column titles.
        heading: Lines above the grid, the first one larger.
        notes: Lines below the grid.
        scale: Labels of the two ends of the `heat_colors` bar, which is drawn below the notes.
    """
    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 5)
    height, width = next(cell for row in rows for cell in row.cells if cell is not None).shape[:2]
    left = MARGIN + max(int(font.getlength(line)) for row in rows for line in row.label.split("\n")) + 2 * GAP
    top = MARGIN + LINE * len(heading) + 4 * GAP + LINE
    right = left + len(titles) * (width + GAP)
    bar = BAR_WIDTH + 2 * GAP + sum(int(font.getlength(word)) for word in scale)
    text = max(bar, *(int(font.getlength(line)) for line in (*heading, *notes))) + 2 * MARGIN + 60
    bottom = top + len(rows) * (height + GAP) + GAP + LINE * len(notes)
    size = (max(right + MARGIN, text), bottom + GAP + LINE + MARGIN)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(heading):
        draw.text(
            (MARGIN, MARGIN - 4 + (LINE * number + GAP if number else 0)),
            line,
            fill=INK,
            font=font if number else large,
        )
    for column, title in enumerate(titles):
        draw.text((left + column * (width + GAP) + width / 2, top - 6), title, fill=INK, font=font, anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * (height + GAP)
        draw.multiline_text((MARGIN, y + height / 2), row.label, fill=row.color, font=font, anchor="lm")
        for column, cell in enumerate(row.cells):
            if cell is not None:
                canvas.paste(Image.fromarray(cell), (left + column * (width + GAP), y))
    for number, line in enumerate(notes):
        y = top + len(rows) * (height + GAP) + GAP + LINE * number
        draw.text((MARGIN, y), line, fill=INK, font=font)
    _color_bar(canvas, bottom + GAP, scale)
    return canvas


def _color_bar(canvas: Image.Image, top: int, scale: tuple[str, str]) -> None:
    """Draw a bar of `heat_colors` with labels at both ends."""
    font, draw = ImageFont.load_default(FONT_SIZE), ImageDraw.Draw(canvas)
    left = MARGIN + int(font.getlength(scale[0])) + GAP
    colors = heat_colors(np.linspace(0, 1, BAR_WIDTH))
    canvas.paste(Image.fromarray(np.repeat(colors[None], LINE - 4, axis=0)), (left, top + 2))
    draw.text((MARGIN, top + LINE / 2), scale[0], fill=INK, font=font, anchor="lm")
    draw.text((left + BAR_WIDTH + GAP, top + LINE / 2), scale[1], fill=INK, font=font, anchor="lm")


def write_movie(path: str | os.PathLike[str], frames: Sequence[np.ndarray], *, frames_per_second: float) -> None:
    """Write frames (H, W, 3) uint8 as an H.264 file for browsers; an odd last row or column is cut off."""
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    rate = Fraction(frames_per_second).limit_denominator(1000)
    with av.open(os.fspath(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
