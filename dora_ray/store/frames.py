"""The frame store: every kept frame of a video, downscaled and JPEG-coded, found by (video, presentation time).

    <store>/<name>-<digest>/index.npz                  the video's index (video.VideoIndex)
    <store>/<name>-<digest>/f6-s512-q85.lance          one Lance dataset for each video and format (store.datasets)

The digest is of the video's content, so a changed file gets another folder.

F stored frames of a video that can be read, H and W their height and width.
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
    """Format of the frames that are kept of a video.

    Attributes:
        frames_per_second: kept frames for each second of video.
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
        """(F,) int64 ticks of the frames of a video that are kept, ascending."""
        ticks: np.ndarray = index.pts[index.kept_frames(self.frames_per_second)]
        return ticks


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """One video's readable frames in a store, at one pinned version of its dataset.

    Attributes:
        path: the video file; uri, version: its Lance dataset, and the version that `rows` belong to.
        identity: of that version's files: a dataset that was removed and made again counts its versions from 1 again.
        times: (F,) float64 seconds from the video's first frame, ascending: the true times of the frames.
        rows: (F,) int64 their rows.
        cuts: (F,) bool, True where a frame starts a new shot (the first frame does not count).
        width, height: of every stored frame, pixels.
        missing: kept frames that could not be decoded; they leave holes in `times`.
        digest: of the video's content.
        cache: folder on every node that the dataset is copied into before it is read; None: it is read where it is.
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
        """(2,) a stored video is read as a whole."""
        return np.array([0, len(self)])


@dataclass(frozen=True, eq=False)
class ComingVideo:
    """One video's kept frames, known from its index while its dataset is still being filled.

    Attributes:
        path: the video file; uri: its Lance dataset.
        pts: (F,) int64 ticks of all kept frames, ascending; times: (F,) float64 their seconds from the first frame.
        edges: (K + 1,) first frame of every segment of the ingest, and F.
        width, height: of a kept frame, pixels.
        digest: of the video's content.
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
        """(F,) all False: where shots begin is found in what is stored."""
        return np.zeros(len(self.pts), bool)


def coming_video(index: VideoIndex, *, store: str, form: FrameFormat, segment_seconds: float) -> ComingVideo:
    """Describe a video that is being brought into the store, cut into segments as its ingest cuts it."""
    pts = form.kept(index)
    starts = [segment.start_pts for segment in index.segments(segment_seconds)]
    edges = np.unique([0, *np.searchsorted(pts, starts[1:]), len(pts)])
    width, height = scaled_size(index.width, index.height, form.short_side)
    uri = dataset_uri(store, index.video_id, form)
    return ComingVideo(index.video_id, index.path, uri, pts, index.seconds(pts), edges, width, height, index.digest)


@dataclass(frozen=True, eq=False)
class Stored:
    """Contents of a dataset's newest version, for a coming video.

    Attributes:
        version: of the dataset; 0 where there is none yet.
        tried: (F,) True where a frame has a row, with a picture or without.
        rows: (F,) int64 row of each frame's picture; -1 where there is none.
        signatures: (F, cuts.SIGNATURE_BYTES) uint8; zeros where there is no picture.
    """

    version: int
    tried: np.ndarray
    rows: np.ndarray
    signatures: np.ndarray


def look_up(video: ComingVideo) -> Stored:
    """Read what the store holds of a video by now.

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
    # Of two ingests side by side one may have stored a frame and the other given it up: a picture counts.
    pictured = np.flatnonzero(ours & table["signature"].is_valid().to_numpy())
    rows[places[pictured]] = pictured
    coded = table["signature"].take(pictured).to_pylist()
    signatures[places[pictured]] = np.frombuffer(b"".join(coded), np.uint8).reshape(-1, cuts.SIGNATURE_BYTES)
    return Stored(int(dataset.version), tried, rows, signatures)


def dataset_uri(store: str, video_id: str, form: FrameFormat) -> str:
    """Address of the dataset of a video's frames in one format."""
    return files.join(store, video_id, form.name)


def open_videos(
    videos: Sequence[str | VideoIndex], *, store: str, form: FrameFormat, cache: str | None = None
) -> list[StoredVideo]:
    """The stored frames of each video, in the order given; `cache` is as in StoredVideo.

    Raises:
        VideoError: a video is not, or not wholly, in the store at this setting, or none of its frames could be decoded.
    """
    indexes = [v if isinstance(v, VideoIndex) else load_index(v, store=store) for v in videos]
    return [replace(_open_video(index, store, form), cache=cache) for index in indexes]


def unstored_frames(index: VideoIndex, uri: str, form: FrameFormat) -> np.ndarray:
    """Ticks of the kept frames that the dataset at `uri` has no row for, ascending.

    Raises:
        VideoError: the dataset holds frames that older rules of decoding showed wrong.
    """
    dataset = latest(uri)
    _check_rules(index, dataset)
    stored = columns(dataset, ["pts"])["pts"].to_numpy() if dataset else np.empty(0, np.int64)
    return np.setdiff1d(form.kept(index), stored)


def read_signatures(video: StoredVideo) -> np.ndarray:
    """(F, cuts.SIGNATURE_BYTES) uint8: what is kept of every stored frame for finding cuts and measuring light.

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
    """Frames that were stored by rules that showed this kind of file wrong are not trained on."""
    if dataset is None:
        return
    rules = int((dataset.schema.metadata or {}).get(RULES.encode(), b"1"))
    if rules < index.rules:
        raise VideoError(
            f"{dataset.uri}: was stored by rules of decoding (number {rules}; now {DECODING_RULES}) that leave out or"
            f" misplace frames of files such as {index.path}; remove that folder, and run dora-ray data ingest again"
        )
    if rules < DECODING_RULES:
        logger.warning(
            "%s: was stored by older rules of decoding (number %d; now %d), which read files such as this one alike;"
            " to be sure of it, remove that folder and run dora-ray data ingest again",
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
    # Of two ingests side by side one may have stored a frame and the other given it up: the first picture counts.
    readable = table["signature"].is_valid().to_numpy()
    order = np.argsort(~readable, kind="stable")
    pts, places = np.unique(table["pts"].to_numpy()[order], return_index=True)
    rows = order[places]
    lacking = len(np.setdiff1d(wanted, pts))
    if lacking or dataset is None:
        raise VideoError(
            f"{index.path}: {lacking} of {len(wanted)} frames are not in the store {store} at {Path(uri).stem};"
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
