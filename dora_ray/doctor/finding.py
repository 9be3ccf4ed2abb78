"""Result of one check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: subject of the check.
        good: whether it passed; None for information only.
        text: what was found.
        remedy: what to do if it failed.
    """

    name: str
    good: bool | None
    text: str
    remedy: str = ""
