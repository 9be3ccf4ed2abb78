"""One check's answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: what was looked at.
        good: whether it will do; None for what is only told.
        text: what was found.
        remedy: what to do when it will not do.
    """

    name: str
    good: bool | None
    text: str
    remedy: str = ""
