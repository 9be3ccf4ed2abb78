"""Shared parts of the pages: templates, pictures, number and time formats, the environment."""

from __future__ import annotations

import base64
import datetime
import functools
import importlib.metadata
import io
import os
import platform
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import jinja2
from PIL import Image

from dora_ray import files

PICTURE_TYPES = {".png", ".jpg", ".jpeg"}
VIDEO_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
# Limits that keep a page small enough to e-mail: picture widths in pixels, and the largest embedded video.
PICTURE_WIDTH, THUMBNAIL_WIDTH, JPEG_QUALITY = 1000, 560, 78
MAX_PICTURES, MAX_VIDEO_BYTES = 12, 900_000
PACKAGES = ("torch", "ray", "timm", "av", "pylance", "numpy")


@dataclass(frozen=True)
class Picture:
    """A picture or short video embedded in a page.

    Attributes:
        uri: data URI of its content.
        alt: alternative text.
        caption: caption below it.
        video: True for a video.
        link: page with more detail; empty without one.
    """

    uri: str
    alt: str
    caption: str
    video: bool = False
    link: str = ""


def render(template: str, **values: Any) -> str:
    """Render a page from a template."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        _templates()
        .get_template(template)
        .render(written=now, version=_version("dora-ray"), environment=describe_machine(), **values)
    )


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("dora_ray.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    return environment


@functools.cache
def describe_machine() -> dict[str, str]:
    """Return the machine, system and package versions; no kernel release, as pages may be shared."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
        "python": platform.python_version(),
        "dora-ray": _version("dora-ray"),
        **{name: version for name, version in versions.items() if version},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def figure(value: Any) -> str:
    """Format a number with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def moment(value: Any) -> str:
    """Format a time (seconds since the epoch or ISO 8601) as date and time of day, UTC."""
    if not isinstance(value, int | float):
        return str(value or "").replace("T", " ").removesuffix("+00:00")
    return f"{datetime.datetime.fromtimestamp(value, datetime.UTC):%Y-%m-%d %H:%M:%S}"


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def read_pictures(folder: str) -> list[Picture]:
    """Return a run's pictures and short videos: of earlier checkpoints (in subfolders), then of the last one."""
    names = files.list_names(folder)
    steps = [name for name in names if name.startswith("step-")]
    kept = [steps[index] for index in sorted({0, len(steps) // 2, len(steps) - 1})] if steps else []
    places = [(f"{step}/{name}", _words(step)) for step in kept for name in files.list_names(files.join(folder, step))]
    places += [(name, "at the last checkpoint" if steps else "") for name in names]
    found = (_read_picture(files.join(folder, *place.split("/")), when) for place, when in places)
    return [picture for picture in found if picture is not None][-MAX_PICTURES:]


def _words(step: str) -> str:
    return f"at step {int(step.removeprefix('step-'))}" if step.removeprefix("step-").isdigit() else f"at {step}"


def _read_picture(path: str, when: str) -> Picture | None:
    kind = PurePosixPath(path).suffix.lower()
    caption = PurePosixPath(path).stem.replace("_", " ").replace("-", " ")
    caption += f", {when}" if when else ""
    if kind in PICTURE_TYPES:
        return Picture(shrink(files.read_bytes(path), PICTURE_WIDTH), f"{_shows(path)} ({caption})", caption)
    if kind not in VIDEO_TYPES:
        return None
    content = files.read_bytes(path)
    if len(content) > MAX_VIDEO_BYTES:
        return None
    uri = f"data:{VIDEO_TYPES[kind]};base64,{base64.b64encode(content).decode()}"
    return Picture(uri, f"The tracked objects over the clip's frames ({caption})", caption, video=True)


def _shows(path: str) -> str:
    clip = "clip" in PurePosixPath(path).stem
    return (
        "Frames of a clip, attention of the heads that discovered the objects, tracked maps and masks"
        if clip
        else ("Picture of the run")
    )


def shrink(content: bytes, width: int) -> str:
    """Return a picture as a JPEG data URI, at most `width` pixels wide."""
    with Image.open(io.BytesIO(content)) as picture:
        rgb = picture.convert("RGB")
    if rgb.width > width:
        rgb = rgb.resize((width, round(rgb.height * width / rgb.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
