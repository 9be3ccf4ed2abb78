"""Orientation of a stored picture, turned and mirrored: eight ways, told by a matrix and not by an angle.

Source: ISO/IEC 14496-12, 8.3.2 (track header). The matrix a b u / c d v / x y w, as nine 32-bit numbers, takes the
point (p, q) of the stored picture, q downwards, to (a p + c q + x, b p + d q + y) of the shown one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type

# Rotations counterclockwise as (a, b, c, d), their signs.
ROTATIONS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 90, (-1, 0, 0, -1): 180, (0, 1, -1, 0): 270}


@dataclass(frozen=True)
class Orientation:
    """The way from the stored picture to the shown one.

    Attributes:
        mirrored: left and right are exchanged first.
        rotation: then it is turned by so many degrees counterclockwise: 0, 90, 180 or 270.
        exact: False where the matrix says something else, and this is the nearest to it.
    """

    mirrored: bool = False
    rotation: int = 0
    exact: bool = True


def orientation(frame: av.VideoFrame) -> Orientation:
    """Read it from the side data of a decoded frame."""
    # Called a mapping there, it iterates over its values.
    found = cast(Iterable[SideData], frame.side_data)
    content = next((bytes(data) for data in found if data.type == Type.DISPLAYMATRIX), b"")
    numbers = np.frombuffer(content, np.int32)
    return from_matrix(numbers[[0, 1, 3, 4]].astype(float)) if len(numbers) == 9 else Orientation()


def from_matrix(matrix: np.ndarray) -> Orientation:
    """The orientation nearest to a matrix (a, b, c, d)."""
    largest = float(np.abs(matrix).max())
    if not largest:
        return Orientation(exact=False)
    a, b, c, d = matrix / largest
    mirrored = bool(a * d < b * c)
    # Mirroring first changes the sign of what is done to p.
    turn = np.array([-a, -b, c, d] if mirrored else [a, b, c, d])
    best = max(ROTATIONS, key=lambda rotation: float(turn @ np.array(rotation)))
    exact = bool(np.allclose(turn, best, atol=0.02))
    return Orientation(mirrored, ROTATIONS[best], exact)


def upright(plane: np.ndarray, *, mirrored: bool, rotation: int) -> np.ndarray:
    """A stored plane (H, W) as it is shown, in its own memory."""
    turned = np.rot90(plane[:, ::-1] if mirrored else plane, rotation // 90)
    return np.array(turned, order="C")
