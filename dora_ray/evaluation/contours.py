"""DAVIS measures of a mask against ground truth: J (region), F (contour), and their statistics.

Legend: H x W pixels, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal
_RECALL_AT = 0.5
_QUARTERS = 4


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return J, the intersection over union of two (H, W) bool masks; 1 if both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return F, the harmonic mean of the shares of each mask's boundary within 0.8 % of the diagonal of the other's."""
    tolerance = int(np.ceil(BOUNDARY_TOLERANCE * np.hypot(*mask.shape)))
    ours, theirs = boundary(mask), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & dilate(theirs, radius=tolerance)).sum() / ours.sum()
    recall = (theirs & dilate(ours, radius=tolerance)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask (H, W) bool that differ from their right, lower or lower right neighbor."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    changes: np.ndarray = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return changes


def dilate(mask: np.ndarray, *, radius: int) -> np.ndarray:
    """Dilate a mask (H, W) bool by a disk of `radius` pixels."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        reach = int(np.sqrt(radius**2 - dy**2))
        sums = np.pad(np.pad(mask, ((0, 0), (reach, reach))).cumsum(axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        wide = sums[:, 2 * reach + 1 :] > sums[:, :width]
        rows = slice(max(0, dy), height + min(0, dy))
        result[rows] |= wide[max(0, -dy) : height - max(0, dy)]
    return result


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Return mean, recall and decay of one object's J or F over its frames.

    Args:
        values: T numbers in [0, 1], by frame.

    Returns:
        mean; recall, the share of frames above 0.5; decay, the mean of the first quarter minus that of the last, where
        adjacent quarters share their border frames (as in DAVIS).
    """
    numbers = np.asarray(values, np.float64)
    ends = np.round(np.linspace(1, len(numbers), _QUARTERS + 1) + 1e-10).astype(int) - 1
    first, last = numbers[ends[0] : ends[1] + 1], numbers[ends[-2] : ends[-1] + 1]
    return {
        "mean": float(numbers.mean()),
        "recall": float((numbers > _RECALL_AT).mean()),
        "decay": float(first.mean() - last.mean()),
    }
