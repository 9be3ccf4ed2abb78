"""Orientation of a stored picture: eight combinations of rotation and mirroring, given by a matrix.

Source: ISO/IEC 14496-12, 8.3.2 (track header). The matrix a b u / c d v / x y w, as nine 32-bit numbers, maps the point
(p, q) of the stored picture, q downwards, to (a p + c q + x, b p + d q + y) of the displayed one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type

# Counterclockwise rotations as the signs of (a, b, c, d).
ROTATIONS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 90, (-1, 0, 0, -1): 180, (0, 1, -1, 0): 270}


@dataclass(frozen=True)
class Orientation:
    """Transform from the stored picture to the displayed one.

    Attributes:
        mirrored: left and right are exchanged first.
        rotation: degrees of the following counterclockwise rotation: 0, 90, 180 or 270.
        exact: False if the matrix differs, and this is the nearest orientation.
    """

    mirrored: bool = False
    rotation: int = 0
    exact: bool = True


def orientation(frame: av.VideoFrame) -> Orientation:
    """Read the orientation from a decoded frame's side data."""
    # PyAV types it as a mapping, but it iterates over its values.
    found = cast(Iterable[SideData], frame.side_data)
    content = next((bytes(data) for data in found if data.type == Type.DISPLAYMATRIX), b"")
    numbers = np.frombuffer(content, np.int32)
    return from_matrix(numbers[[0, 1, 3, 4]].astype(float)) if len(numbers) == 9 else Orientation()


def from_matrix(matrix: np.ndarray) -> Orientation:
    """Return the orientation nearest to a matrix (a, b, c, d)."""
    largest = float(np.abs(matrix).max())
    if not largest:
        return Orientation(exact=False)
    a, b, c, d = matrix / largest
    mirrored = bool(a * d < b * c)
    # Mirroring first flips the sign of p's coefficients.
    turn = np.array([-a, -b, c, d] if mirrored else [a, b, c, d])
    best = max(ROTATIONS, key=lambda rotation: float(turn @ np.array(rotation)))
    exact = bool(np.allclose(turn, best, atol=0.02))
    return Orientation(mirrored, ROTATIONS[best], exact)


def upright(plane: np.ndarray, *, mirrored: bool, rotation: int) -> np.ndarray:
    """Return a stored plane (H, W) as displayed, in its own memory."""
    turned = np.rot90(plane[:, ::-1] if mirrored else plane, rotation // 90)
    return np.array(turned, order="C")
