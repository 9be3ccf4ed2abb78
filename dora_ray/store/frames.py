"""Frame store: every kept frame of a video, downscaled and JPEG-coded, addressed by (video, presentation time).

    <store>/<name>-<digest>/index.npz                  the video's index (video.VideoIndex)
    <store>/<name>-<digest>/f6-s512-q85.lance          one Lance dataset per video and format (store.datasets)

The digest is a hash of the video's content, so a changed file gets another folder.

F readable stored frames of a video, H and W their height and width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lance
import numpy as np

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.store import cuts
from dora_ray.store.datasets import RULES, SCHEMA, columns, latest, take_column, take_pictures
from dora_ray.store.indexes import load_index
from dora_ray.video.decoders import scaled_size
from dora_ray.video.index import DECODING_RULES, VideoIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameFormat:
    """Format of a video's kept frames.

    Attributes:
        frames_per_second: kept frames per second of video.
        short_side: short side of a kept frame, pixels.
        jpeg_quality: 1 to 100.
    """

    frames_per_second: float
    short_side: int
    jpeg_quality: int

    @property
    def name(self) -> str:
        """Name of the dataset in the video's folder."""
        return f"f{self.frames_per_second:g}-s{self.short_side}-q{self.jpeg_quality}.lance"

    def kept(self, index: VideoIndex) -> np.ndarray:
        """Return the (F,) int64 ticks of a video's kept frames, ascending."""
        ticks: np.ndarray = index.pts[index.kept_frames(self.frames_per_second)]
        return ticks


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """Readable stored frames of one video, at one pinned version of its dataset.

    Attributes:
        path: the video file.
        uri: its Lance dataset.
        version: version of the dataset that `rows` belong to.
        identity: hash of that version's file names; the version alone is ambiguous, since a recreated dataset counts
            from 1 again.
        times: (F,) float64 true presentation times in seconds from the video's first frame, ascending.
        rows: (F,) int64 dataset rows of the frames.
        cuts: (F,) bool, True where a frame starts a new shot (never the first frame).
        width: width of every stored frame, pixels.
        height: height of every stored frame, pixels.
        missing: number of kept frames that could not be decoded; they leave holes in `times`.
        digest: hash of the video's content.
        cache: folder on every node to which the dataset is copied before it is read; None: read in place.
    """

    video_id: str
    path: str
    uri: str
    version: int
    identity: str
    times: np.ndarray
    rows: np.ndarray
    cuts: np.ndarray
    width: int
    height: int
    missing: int
    digest: str
    cache: str | None = None

    def __len__(self) -> int:
        return len(self.times)

    @property
    def edges(self) -> np.ndarray:
        """(2,) first frame and F: a stored video is one segment."""
        return np.array([0, len(self)])


@dataclass(frozen=True, eq=False)
class ComingVideo:
    """Kept frames of one video, known from its index while its dataset is still being filled.

    Attributes:
        path: the video file.
        uri: its Lance dataset.
        pts: (F,) int64 ticks of all kept frames, ascending.
        times: (F,) float64 seconds of all kept frames from the first frame.
        edges: (K + 1,) first frame of every segment of the ingest, followed by F.
        width: width of a kept frame, pixels.
        height: height of a kept frame, pixels.
        digest: hash of the video's content.
    """

    video_id: str
    path: str
    uri: str
    pts: np.ndarray
    times: np.ndarray
    edges: np.ndarray
    width: int
    height: int
    digest: str
    identity: str = ""
    cache: str | None = None

    @property
    def cuts(self) -> np.ndarray:
        """(F,) all False: cuts are found later, in the stored frames."""
        return np.zeros(len(self.pts), bool)


def coming_video(index: VideoIndex, *, store: str, form: FrameFormat, segment_seconds: float) -> ComingVideo:
    """Describe a video that is being ingested, split into the segments of its ingest."""
    pts = form.kept(index)
    starts = [segment.start_pts for segment in index.segments(segment_seconds)]
    edges = np.unique([0, *np.searchsorted(pts, starts[1:]), len(pts)])
    width, height = scaled_size(index.width, index.height, form.short_side)
    uri = dataset_uri(store, index.video_id, form)
    return ComingVideo(index.video_id, index.path, uri, pts, index.seconds(pts), edges, width, height, index.digest)


@dataclass(frozen=True, eq=False)
class Stored:
    """Newest version of the dataset of a video that is being ingested.

    Attributes:
        version: version of the dataset; 0 if there is none yet.
        tried: (F,) True where a frame has a row, with or without a picture.
        rows: (F,) int64 row of each frame's picture; -1 where there is none.
        signatures: (F, cuts.SIGNATURE_BYTES) uint8; zeros where there is no picture.
    """

    version: int
    tried: np.ndarray
    rows: np.ndarray
    signatures: np.ndarray


def look_up(video: ComingVideo) -> Stored:
    """Read what the store currently holds of a video.

    Raises:
        VideoError: the store cannot be read.
    """
    count = len(video.pts)
    tried, rows = np.zeros(count, bool), np.full(count, -1)
    signatures = np.zeros((count, cuts.SIGNATURE_BYTES), np.uint8)
    dataset = latest(video.uri)
    if dataset is None:
        return Stored(0, tried, rows, signatures)
    table = columns(dataset, ["pts", "signature"])
    pts = table["pts"].to_numpy()
    places = np.minimum(np.searchsorted(video.pts, pts), count - 1)
    ours = video.pts[places] == pts
    tried[places[ours]] = True
    # If one of two concurrent ingests stored a frame and the other gave it up, the picture wins.
    pictured = np.flatnonzero(ours & table["signature"].is_valid().to_numpy())
    rows[places[pictured]] = pictured
    coded = table["signature"].take(pictured).to_pylist()
    signatures[places[pictured]] = np.frombuffer(b"".join(coded), np.uint8).reshape(-1, cuts.SIGNATURE_BYTES)
    return Stored(int(dataset.version), tried, rows, signatures)


def dataset_uri(store: str, video_id: str, form: FrameFormat) -> str:
    """Return the URI of the dataset of a video's frames in one format."""
    return files.join(store, video_id, form.name)


def open_videos(
    videos: Sequence[str | VideoIndex], *, store: str, form: FrameFormat, cache: str | None = None
) -> list[StoredVideo]:
    """Return the stored frames of each video, in the order given; `cache` is as in StoredVideo.

    Raises:
        VideoError: a video is not completely stored in this format, or none of its frames could be decoded.
    """
    indexes = [v if isinstance(v, VideoIndex) else load_index(v, store=store) for v in videos]
    return [replace(_open_video(index, store, form), cache=cache) for index in indexes]


def unstored_frames(index: VideoIndex, uri: str, form: FrameFormat) -> np.ndarray:
    """Return the ticks of the kept frames without a row in the dataset at `uri`, ascending.

    Raises:
        VideoError: the dataset was filled by older decoding rules that are wrong for this file.
    """
    dataset = latest(uri)
    _check_rules(index, dataset)
    stored = columns(dataset, ["pts"])["pts"].to_numpy() if dataset else np.empty(0, np.int64)
    return np.setdiff1d(form.kept(index), stored)


def read_signatures(video: StoredVideo) -> np.ndarray:
    """Return the (F, cuts.SIGNATURE_BYTES) uint8 signatures of the stored frames, for shot cuts and lightness.

    Raises:
        VideoError: the store was changed or removed.
    """
    column = take_column(video, video.version, video.rows, "signature")
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(video), cuts.SIGNATURE_BYTES)


def read_jpegs(video: StoredVideo, frames: Sequence[int]) -> list[bytes]:
    """Return the JPEG files of the stored frames numbered `frames` (0 <= n < F), in that order.

    Raises:
        VideoError: the store was changed or removed.
    """
    return [
        buffer.to_pybytes() for buffer in take_pictures(video, video.version, video.rows[np.asarray(frames, np.int64)])
    ]


def _check_rules(index: VideoIndex, dataset: lance.LanceDataset | None) -> None:
    """Refuse frames that were stored by decoding rules that are wrong for this kind of file."""
    if dataset is None:
        return
    rules = int((dataset.schema.metadata or {}).get(RULES.encode(), b"1"))
    if rules < index.rules:
        raise VideoError(
            f"{dataset.uri}: was stored with decoding rules {rules} (now {DECODING_RULES}), which omit or"
            f" misplace frames of files such as {index.path}; remove this folder, and run dora-ray data ingest again"
        )
    if rules < DECODING_RULES:
        logger.warning(
            "%s: was stored with older decoding rules (%d; now %d), which treat files such as this one the same way;"
            " to be sure, remove this folder and run dora-ray data ingest again",
            dataset.uri,
            rules,
            DECODING_RULES,
        )


def _open_video(index: VideoIndex, store: str, form: FrameFormat) -> StoredVideo:
    uri = dataset_uri(store, index.video_id, form)
    dataset = latest(uri)
    _check_rules(index, dataset)
    wanted = form.kept(index)
    table = columns(dataset, ["pts", "signature"]) if dataset else SCHEMA.empty_table()
    # If one of two concurrent ingests stored a frame and the other gave it up, the first picture wins.
    readable = table["signature"].is_valid().to_numpy()
    order = np.argsort(~readable, kind="stable")
    pts, places = np.unique(table["pts"].to_numpy()[order], return_index=True)
    rows = order[places]
    lacking = len(np.setdiff1d(wanted, pts))
    if lacking or dataset is None:
        raise VideoError(
            f"{index.path}: {lacking} of {len(wanted)} frames are missing from the store {store} at {Path(uri).stem};"
            " run: dora-ray data ingest, with the same data.* settings"
        )
    chosen = np.isin(pts, wanted) & readable[rows]
    if not chosen.any():
        raise VideoError(
            f"{index.path}: none of its {len(wanted)} frames could be decoded; get the file again or leave it out"
        )
    pts, rows = pts[chosen], rows[chosen]
    signatures = np.frombuffer(b"".join(table["signature"].take(rows).to_pylist()), np.uint8)
    width, height = scaled_size(index.width, index.height, form.short_side)
    return StoredVideo(
        video_id=index.video_id,
        path=index.path,
        uri=uri,
        version=dataset.version,
        identity=_identity(dataset),
        times=index.seconds(pts),
        rows=rows.astype(np.int64),
        cuts=cuts.find_cuts(signatures.reshape(len(pts), cuts.SIGNATURE_BYTES)),
        width=width,
        height=height,
        missing=len(wanted) - len(pts),
        digest=index.digest,
    )


def _identity(dataset: lance.LanceDataset) -> str:
    names = [file.path for fragment in dataset.get_fragments() for file in fragment.data_files()]
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
