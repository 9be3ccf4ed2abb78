"""Shot cuts, and the signature kept of every stored frame to detect them.

A signature has 64 + 256 + 64 + 64 bytes: a joint color histogram (4 x 4 x 4 bins of y, u, v; each byte is 255 times the
square root of the bin's share, so that a dot product is the Bhattacharyya coefficient), and area-averaged thumbnails of
y (16 x 16), u and v (8 x 8).

F frames, H and W a picture's height and width.
"""

from __future__ import annotations

import functools

import numpy as np

HISTOGRAM = 64
THUMB = 16
SIGNATURE_BYTES = HISTOGRAM + THUMB * THUMB + 2 * (THUMB // 2) ** 2
# Chosen on real and synthetic footage; tests/store/test_cuts.py lists the cuts to find and the motion to ignore.
NEIGHBORS = 4
FLOOR = 0.4
RATIO = 2.5


def signature(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> bytes:
    """Return the signature (SIGNATURE_BYTES bytes) of a picture: y (H, W), u and v (H / 2, W / 2), uint8."""
    bins = (y[::2, ::2] >> 2 & 0b110000) | (u >> 4 & 0b1100) | (v >> 6)
    share = np.bincount(bins.ravel(), minlength=HISTOGRAM) / bins.size
    histogram = np.rint(255 * np.sqrt(share)).astype(np.uint8)
    half = THUMB // 2
    return b"".join(part.tobytes() for part in (histogram, _thumb(y, THUMB), _thumb(u, half), _thumb(v, half)))


def unpack(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return unit histograms (F, 64) and thumbnails (F, 384) in 0..1, float32, from (F, SIGNATURE_BYTES) uint8."""
    histograms = signatures[:, :HISTOGRAM].astype(np.float32)
    histograms /= np.maximum(np.linalg.norm(histograms, axis=1, keepdims=True), 1.0)
    return histograms, signatures[:, HISTOGRAM:].astype(np.float32) / 255


def lightness(signatures: np.ndarray) -> np.ndarray:
    """Return the (F,) mean of the y plane, 0 black to 1 white, from (F, SIGNATURE_BYTES) uint8."""
    means: np.ndarray = signatures[:, HISTOGRAM : HISTOGRAM + THUMB * THUMB].mean(1) / 255
    return means


def distances(signatures: np.ndarray) -> np.ndarray:
    """Return each frame's (F,) distance to the previous frame, 0 identical to 1; the first is 0.

    The mean of two measures that fail in different cases: the histograms' Hellinger distance (insensitive to motion,
    sensitive to light) and one minus the thumbnails' correlation (insensitive to light, sensitive to motion).
    """
    result = np.zeros(len(signatures))
    if len(signatures) > 1:
        histograms, thumbs = unpack(signatures)
        hellinger = np.sqrt(np.clip(1 - (histograms[1:] * histograms[:-1]).sum(1), 0, 1))
        thumbs = thumbs - thumbs.mean(1, keepdims=True)
        thumbs /= np.maximum(np.linalg.norm(thumbs, axis=1, keepdims=True), 1e-3)
        structure = np.clip(1 - (thumbs[1:] * thumbs[:-1]).sum(1), 0, 1)
        result[1:] = (hellinger + structure) / 2
    return result


def find_cuts(signatures: np.ndarray) -> np.ndarray:
    """Return (F,) bool from (F, SIGNATURE_BYTES) uint8, True where a frame starts a new shot (never the first frame).

    A frame is a cut if its distance to the previous frame exceeds FLOOR, exceeds RATIO times the median distance of the
    NEIGHBORS frames on each side (the local effect of motion alone), and is the largest within one frame of it.
    """
    distance = distances(signatures)
    num_frames = len(distance)
    if num_frames < 2:
        return np.zeros(num_frames, bool)
    padded = np.pad(distance[1:], NEIGHBORS, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBORS + 1)
    others = np.delete(windows, NEIGHBORS, axis=1)
    others = np.where(np.isnan(others).all(1, keepdims=True), 0.0, others)
    usual = np.nanmedian(others, axis=1)
    nearby = np.nan_to_num(windows[:, NEIGHBORS - 1 : NEIGHBORS + 2]).max(1)
    own = distance[1:]
    return np.concatenate([[False], (own > FLOOR) & (own > RATIO * usual) & (own >= nearby)])


def _thumb(plane: np.ndarray, size: int) -> np.ndarray:
    """Return (size, size) uint8 area means of (H, W); rows and columns repeat where there are fewer than `size`."""
    height, width = plane.shape
    rows, columns = _bins(height, size), _bins(width, size)
    sums = rows @ plane.astype(np.float32) @ columns.T
    means: np.ndarray = np.rint(sums / (rows.sum(1)[:, None] * columns.sum(1))).astype(np.uint8)
    return means


@functools.lru_cache(maxsize=32)
def _bins(length: int, size: int) -> np.ndarray:
    """Return (size, length) float32: 1 where a pixel belongs to a bin. Every bin has at least one pixel."""
    starts = np.arange(size) * length // size
    stops = np.maximum(np.arange(1, size + 1) * length // size, starts + 1)
    pixel = np.arange(length)
    return ((pixel >= starts[:, None]) & (pixel < stops[:, None])).astype(np.float32)
