"""The ten videos of the Walking Tours data set (arXiv 2310.08584), and their download.

They belong to their authors. The data set lists them as CC BY; the license, title and channel given by the site are
saved beside each file. All network access is in `_download`, which no test runs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_ray.errors import ConfigError, VideoError

LICENSE = "CC BY (as the data set's authors list it; the site's own statement is saved with the file)"
FASTEST_CODEC = "av01"
# Preferred codec for each decoder, in yt-dlp's terms: decord's FFmpeg has no AV1.
PREFERRED_CODECS = {"pyav": FASTEST_CODEC, "decord": "vp9", "torchcodec": FASTEST_CODEC}
FACTS = ("id", "title", "channel", "license", "duration", "webpage_url", "width", "height", "fps", "vcodec")


@dataclass(frozen=True)
class Tour:
    """One video; `seconds` is approximate, the exact value is saved at download."""

    name: str
    video_id: str
    seconds: int

    @property
    def address(self) -> str:
        """URL of the video."""
        return f"https://www.youtube.com/watch?v={self.video_id}"


def _minutes(hours: int, minutes: int) -> int:
    return (hours * 60 + minutes) * 60


TOURS = (
    Tour("amsterdam", "E07rTPgIvn0", _minutes(1, 22)),
    Tour("bangkok", "hUGcHvN4mME", _minutes(2, 55)),
    Tour("chiang-mai", "jyxIRzlkO_g", _minutes(1, 7)),
    Tour("istanbul", "mA9lYWyXMYU", _minutes(1, 8)),
    Tour("kuala-lumpur", "yLTycPjm0nk", _minutes(1, 12)),
    Tour("singapore", "aUJl46bEWYo", _minutes(1, 36)),
    Tour("stockholm", "Jr9x-RB4E1U", _minutes(1, 5)),
    Tour("venice", "fGX0Te6pFvk", _minutes(1, 50)),
    Tour("wildlife", "Q0ML5oAjX_w", _minutes(0, 59)),
    Tour("zurich", "_NmYvuEILw4", _minutes(1, 5)),
)


def find_tours(names: Sequence[str]) -> list[Tour]:
    """Return the tours with these names, in order; all ten if none is given.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {tour.name: tour for tour in TOURS}
    words = [name.lower().replace("_", "-").replace(" ", "-") for name in names]
    for name, word in zip(names, words, strict=True):
        if word not in known:
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise ConfigError(f"no walking tour is called {name!r}: {hint}")
    return [known[word] for word in dict.fromkeys(words)] or list(TOURS)


def fetch_tours(
    tours: Sequence[Tour],
    *,
    out: str | Path,
    height: int,
    decoder: str = "pyav",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Download the videos without sound, continuing earlier downloads and skipping finished ones.

    Args:
        tours: the tours to download.
        out: folder, created if missing.
        height: maximum number of lines; each height has its own files. The site offers 2160 lines only in AV1 or VP9;
            H.264 ends at 1080.
        decoder: decoder that will read the files. AV1 is preferred, since it decodes about twice as fast as VP9, unless
            the decoder cannot read it.
        progress: called with the tour's name, the bytes so far, and the total (0 if unknown).

    Returns:
        The files, each with its metadata in a .json beside it.

    Raises:
        ConfigError: yt-dlp is not installed.
        VideoError: a video cannot be downloaded.
    """
    library = _library()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    codec = PREFERRED_CODECS[decoder]
    return [_fetch(library, tour, folder, height, codec, progress) for tour in tours]


def download_options(
    folder: Path, name: str, height: int, codec: str, hook: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    """Return yt-dlp's options: video only, most lines up to `height`, most frames a second, then `codec`.

    Other codecs follow in the site's order, but none that ranks above `codec`.
    """
    return {
        "format": "bestvideo",
        "format_sort": [f"res:{height}", "fps", f"vcodec:{codec}"],
        # A continued download appends to the file of its name, which must hold the same pictures.
        "outtmpl": {"default": str(folder / f"{_stem(name, height, codec)}.%(ext)s")},
        "continuedl": True,
        "retries": 10,
        "fragment_retries": 10,
        "quiet": True,
        "noprogress": True,
        "progress_hooks": [hook] if hook else [],
    }


def _stem(name: str, height: int, codec: str) -> str:
    """Return the file name without suffix, distinct for each codec."""
    return f"{name}-{height}" if codec == FASTEST_CODEC else f"{name}-{height}-{codec}"


def _fetch(
    library: Any,
    tour: Tour,
    folder: Path,
    height: int,
    codec: str,
    progress: Callable[[str, int, int], None] | None,
) -> Path:
    facts_path = folder / f"{_stem(tour.name, height, codec)}.json"
    done = _finished(facts_path)
    if done is not None:
        return done

    def hook(state: dict[str, Any]) -> None:
        if progress is not None:
            total = state.get("total_bytes") or state.get("total_bytes_estimate") or 0
            progress(tour.name, int(state.get("downloaded_bytes") or 0), int(total))

    info = _download(library, tour, download_options(folder, tour.name, height, codec, hook))
    path = Path(info["requested_downloads"][0]["filepath"])
    facts = {"file": path.name, **{key: info.get(key) for key in FACTS}}
    facts_path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def _finished(facts_path: Path) -> Path | None:
    """Return the video if its metadata, written last, exists."""
    if not facts_path.exists():
        return None
    path = facts_path.with_name(json.loads(facts_path.read_text(encoding="utf-8"))["file"])
    return path if path.exists() else None


def _download(library: Any, tour: Tour, options: Mapping[str, Any]) -> dict[str, Any]:
    """Download one video; the only function that uses the network."""
    try:
        with library.YoutubeDL(dict(options)) as client:
            info: dict[str, Any] = client.extract_info(tour.address, download=True)
            return info
    except library.utils.DownloadError as error:
        raise VideoError(
            f"{tour.name} ({tour.address}) cannot be fetched: {error}; try again to continue, update"
            " yt-dlp (sites change), or download the file yourself and name it in data.videos"
        ) from error


def _library() -> Any:
    try:
        import yt_dlp
    except ImportError as error:
        raise ConfigError("downloading needs yt-dlp, which is not installed: pip install 'dora-ray[fetch]'") from error
    return yt_dlp
