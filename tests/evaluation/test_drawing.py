from __future__ import annotations

import av
import numpy as np
import pytest

from dora_ray.evaluation import drawing


def test_heat_colors_rise_in_lightness_and_clip():
    colors = drawing.heat_colors(np.linspace(0, 1, 21))
    lightness = colors @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) > 0).all()
    assert colors[0].tolist() == [68, 1, 84]
    assert colors[-1].tolist() == [253, 231, 37]
    assert (drawing.heat_colors(np.array([-1.0, 2.0])) == colors[[0, -1]]).all()


def test_every_object_has_its_own_color():
    colors = [drawing.object_color(index) for index in range(16)]
    assert len(set(colors)) == 16
    assert all(0 <= channel <= 255 for color in colors for channel in color)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 13), (2, 3)])
def test_enlarged_patches_keep_their_places(height, width):
    cells = np.arange(6).reshape(2, 3)
    large = drawing.enlarge(cells, height=height, width=width)
    assert large.shape == (height, width)
    assert large[0, 0] == 0
    assert large[-1, -1] == 5
    assert set(large.ravel()) == set(range(6))
    assert (np.diff(large, axis=0) >= 0).all()
    assert (np.diff(large, axis=1) >= 0).all()


def test_an_overlay_colors_each_object_and_dims_the_rest():
    frame = np.full((40, 60, 3), 200, np.uint8)
    masks = np.zeros((2, 2, 3))
    masks[0, 0, 0] = masks[1, 1, 2] = 1
    drawn = drawing.overlay(frame, masks, strength=1.0)
    assert (drawn[:20, :20] == drawing.object_color(0)).all()
    assert (drawn[20:, 40:] == drawing.object_color(1)).all()
    assert (drawn[20:, :20] == 90).all()


def test_overlapping_objects_share_their_patch_in_stripes():
    masks = np.ones((3, 1, 1))
    drawn = drawing.overlay(np.zeros((90, 90, 3), np.uint8), masks, strength=1.0)
    shares = [(drawn[2:-2, 2:-2] == drawing.object_color(index)).all(axis=-1).mean() for index in range(3)]
    assert min(shares) > 0.3
    assert sum(shares) == pytest.approx(1.0)


def test_an_outline_is_the_border_of_a_mask_inside_the_picture():
    mask = np.zeros((5, 6), bool)
    mask[:3, :3] = True
    expected = np.zeros((5, 6), bool)
    expected[2, :3] = expected[:3, 2] = True
    assert (drawing.outline(mask) == expected).all()


def test_a_grid_places_its_cells_and_grows_with_them():
    red, blue = (np.full((20, 30, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    options = {"titles": ["a", "b"], "heading": ["A heading", "and more"], "notes": ["a note"], "scale": ("0", "most")}
    image = np.asarray(drawing.grid([drawing.Row("row", drawing.INK, [red, None])], **options))
    taller = np.asarray(
        drawing.grid([drawing.Row("row", drawing.INK, cells) for cells in ([red, None], [None, blue])], **options)
    )
    assert taller.shape[0] == image.shape[0] + 20 + drawing.GAP
    (red_rows, red_columns), (blue_rows, blue_columns) = (
        np.nonzero((taller == color).all(axis=-1)) for color in (red[0, 0], blue[0, 0])
    )
    assert len(red_rows) == len(blue_rows) == 600
    assert blue_rows.min() == red_rows.min() + 20 + drawing.GAP
    assert blue_columns.min() == red_columns.min() + 30 + drawing.GAP


def test_a_grid_has_one_color_bar_below_everything_from_the_least_color_to_the_most():
    cell = np.zeros((20, 30, 3), np.uint8)
    rows = [drawing.Row("row", drawing.INK, [cell])] * 2
    image = drawing.grid(rows, titles=["a"], heading=["A heading"], notes=["a note"], scale=("0", "most"))
    least, most = (tuple(drawing.heat_colors(np.array(value)).tolist()) for value in (0.0, 1.0))
    found = [np.argwhere((np.asarray(image) == color).all(axis=-1)) for color in (least, most)]
    assert len(found[0]) > 0, "the least color is there"
    assert len(found[1]) > 0, "the most is there"
    assert found[0][:, 1].max() < found[1][:, 1].min()
    assert set(found[0][:, 0]) == set(found[1][:, 0]), "in one bar"
    assert found[0][:, 0].min() > image.height - 3 * drawing.LINE


def test_a_movie_keeps_its_frames_and_rate(tmp_path):
    levels = [20, 90, 160, 230]
    drawing.write_movie(
        tmp_path / "a.mp4", [np.full((33, 51, 3), level, np.uint8) for level in levels], frames_per_second=10
    )
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == (
            "h264",
            "yuv420p",
            10.0,
        )
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 50, 3)] * 4
    assert [abs(float(frame.mean()) - level) < 4 for frame, level in zip(frames, levels, strict=True)] == [True] * 4
