"""Rejection of measurements that a busy machine made too uneven."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

TOO_NOISY = "too noisy"
# On an idle machine the median of five rounds is a few per cent above the fastest.
MOST_NOISE = 0.25
# A setting, despite its name.
KEEP_SHARE = "packed_keep_share"


def noise(seconds: Sequence[float]) -> float:
    """Return by how much the median round exceeds the fastest, as a share of the fastest."""
    return statistics.median(seconds) / min(seconds) - 1.0


def noisy_paths(seconds: Mapping[str, Sequence[float]]) -> set[str]:
    """Return the names of paths timed too unevenly to be compared."""
    return {name for name, values in seconds.items() if noise(values) > MOST_NOISE}


def refuse(result: Mapping[str, Any], noisy: Collection[str]) -> dict[str, Any]:
    """Replace meaningless comparisons by "too noisy".

    A speed-up or a share compares "ours" with another path. It is meaningless if either was timed unevenly, or if a
    share is not between 0 and 1.

    Args:
        result: figures by name. `NAME_speedup` compares with path NAME, `speedup` with "reference".
        noisy: paths timed unevenly.
    """
    return {name: TOO_NOISY if _is_refused(name, value, noisy) else value for name, value in result.items()}


def _is_refused(name: str, value: Any, noisy: Collection[str]) -> bool:
    if name.endswith("speedup"):
        return bool({"ours", name.removesuffix("speedup").rstrip("_") or "reference"} & set(noisy))
    if "matmul_share" in name and any(path.startswith("products") for path in noisy):
        return True
    if name != KEEP_SHARE and (name.endswith("_share") or "_share_" in name):
        return "ours" in noisy or not 0.0 <= value <= 1.0
    return name == "checkpoint_slowdown_seconds" and ("ours" in noisy or value < 0.0)
