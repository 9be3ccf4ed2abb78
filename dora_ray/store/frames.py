"""The frame store: every kept frame of a video, downscaled and JPEG-coded, found by (video, presentation time).

    <store>/<name>-<digest>/index.npz                  the video's index (video.VideoIndex)
    <store>/<name>-<digest>/f6-s512-q85.lance          one Lance dataset for each video and setting

The digest is of the video's content, so a changed file gets another folder. A row is a frame:
    segment int32, pts int64 (ticks), jpeg large_binary, width int16, height int16, signature (cuts.SIGNATURE_BYTES)
A frame that cannot be decoded has its row too, with null in jpeg and signature: what was tried is never tried again.
Whole segments are appended by atomic commits, and readers pin a version, so a store can grow while it is read.

F stored frames of a video that can be read, H and W their height and width.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import lance
import numpy as np
import pyarrow as pa
import simplejpeg
from lance.fragment import FragmentMetadata, write_fragments

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.remote import refusal
from dora_ray.store import cuts
from dora_ray.store.cache import local_copy
from dora_ray.video.decoders import DecodedFrame, scaled_size
from dora_ray.video.index import DECODING_RULES, VideoIndex, index_video
from dora_ray.video.sources import file_stamp

# Ray forks only to exec its daemons at once, which is safe; lance warns at every fork of a process that imported it.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

logger = logging.getLogger(__name__)

INDEX_NAME = "index.npz"
OPEN_DATASETS = 64
# Where a dataset says which rules of decoding it is filled by; without a word, by the first ones.
RULES = "dora_ray.decoding_rules"
# How Lance says that there is none; whatever else keeps it from opening one is a ValueError too.
NO_DATASET = "Dataset at path"
SCHEMA = pa.schema(
    [
        ("segment", pa.int32()),
        ("pts", pa.int64()),
        ("jpeg", pa.large_binary()),
        ("width", pa.int16()),
        ("height", pa.int16()),
        ("signature", pa.binary(cuts.SIGNATURE_BYTES)),
    ]
)


@dataclass(frozen=True)
class FrameFormat:
    """What is kept of a video.

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
    """What the newest version of a dataset holds of a coming video.

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
    dataset = _latest(video.uri)
    if dataset is None:
        return Stored(0, tried, rows, signatures)
    table = _columns(dataset, ["pts", "signature"])
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


def load_index(path: str, *, store: str) -> VideoIndex:
    """The index of a video file, from the store when the file is the one that was indexed, else made and stored.

    Raises:
        VideoError: the file cannot be read.
    """
    path = files.absolute(path)
    if known := known_index(path, store=store):
        return known
    index = index_video(path)
    files.write_bytes(files.join(store, index.video_id, INDEX_NAME), index.to_bytes())
    return index


def known_index(path: str, *, store: str) -> VideoIndex | None:
    """The index of a video file that a store has; None where it has none, or the file is another one now."""
    path = files.absolute(path)
    for name in files.list_names(store):
        known = stored_index(store, name) if name[:-8] == VideoIndex.name_of(path) + "-" else None
        if known and known.path == path and _same_file(known):
            return known
    return None


def stored_index(store: str, video_id: str) -> VideoIndex | None:
    """The index in a store, None where there is none that can be read."""
    try:
        return VideoIndex.from_bytes(files.read_bytes(files.join(store, video_id, INDEX_NAME)))
    except (FileNotFoundError, ValueError):
        return None


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
    dataset = _latest(uri)
    _check_rules(index, dataset)
    stored = _columns(dataset, ["pts"])["pts"].to_numpy() if dataset else np.empty(0, np.int64)
    return np.setdiff1d(form.kept(index), stored)


def has_frames(uri: str) -> bool:
    """Whether the dataset holds a frame that could be decoded."""
    return count_frames(uri)[0] > 0


def count_frames(uri: str) -> tuple[int, int]:
    """Frames of a dataset that could be decoded, and those that could not."""
    dataset = _latest(uri)
    if dataset is None:
        return 0, 0
    readable = int(dataset.count_rows("signature IS NOT NULL"))
    return readable, int(dataset.count_rows()) - readable


def fetch(uri: str, identity: str, cache: str | None) -> None:
    """Make this node's copy of a dataset, if it is to have one and has none: as long as that takes."""
    if cache:
        with suppress(OSError, ValueError):  # reading says what is wrong
            _local_copy(uri, identity, cache)


def read_signatures(video: StoredVideo) -> np.ndarray:
    """(F, cuts.SIGNATURE_BYTES) uint8: what is kept of every stored frame for finding cuts and measuring light.

    Raises:
        VideoError: the store was changed or removed.
    """
    column = _take_column(video, video.version, video.rows, "signature")
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(video), cuts.SIGNATURE_BYTES)


class Dataset(Protocol):
    """What rows are read from: a StoredVideo or a ComingVideo."""

    @property
    def path(self) -> str:
        """The video file."""

    @property
    def uri(self) -> str:
        """The Lance dataset."""

    @property
    def identity(self) -> str:
        """Name of its files, where it is pinned."""

    @property
    def cache(self) -> str | None:
        """Folder that it is copied into before it is read."""


def read_jpegs(video: StoredVideo, frames: Sequence[int]) -> list[bytes]:
    """Return the JPEG files of the stored frames numbered `frames` (0 <= n < F), in that order.

    Raises:
        VideoError: the store was changed or removed.
    """
    return [buffer.to_pybytes() for buffer in _take(video, video.version, video.rows[np.asarray(frames, np.int64)])]


def read_rows(video: Dataset, version: int, rows: np.ndarray) -> list[np.ndarray]:
    """Return the pictures of rows of a version of a video's dataset, in that order: (H, W, 3) uint8 RGB each.

    Raises:
        VideoError: the store was changed or removed, or a picture is damaged.
    """
    try:
        pictures = _take(video, version, rows)
        return [simplejpeg.decode_jpeg(np.frombuffer(buffer, np.uint8), "RGB") for buffer in pictures]
    except ValueError as error:
        raise VideoError(
            f"{video.uri}: holds a damaged picture ({error}); remove that folder and ingest again"
        ) from error


def create_dataset(uri: str) -> None:
    """Make an empty dataset, unless there is one."""
    if _latest(uri) is None:
        try:
            schema = SCHEMA.with_metadata({RULES: str(DECODING_RULES)})
            lance.write_dataset(schema.empty_table(), uri, mode="create")
        except OSError as error:
            # Another ingest may have made it between the look and the writing.
            if _latest(uri) is None:
                reason = f"cannot be written ({_reason(error)}); check space and rights, or give another data.store"
                raise _failure(uri, error, reason) from error


def frame_row(frame: DecodedFrame, *, segment: int, jpeg_quality: int) -> dict[str, object]:
    """A row of the dataset."""
    return {
        "segment": segment,
        "pts": frame.pts,
        "jpeg": simplejpeg.encode_jpeg_yuv_planes(frame.y, frame.u, frame.v, jpeg_quality),
        "width": frame.width,
        "height": frame.height,
        "signature": cuts.signature(frame.y, frame.u, frame.v),
    }


def missing_row(pts: int, *, segment: int, width: int, height: int) -> dict[str, object]:
    """A row that says: this frame cannot be decoded."""
    return {"segment": segment, "pts": pts, "jpeg": None, "width": width, "height": height, "signature": None}


def write_rows(uri: str, rows: Sequence[dict[str, object]]) -> list[str]:
    """Write rows as data files that no reader sees before `commit`; returns their descriptions."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with _written(uri):
        return [json.dumps(fragment.to_json()) for fragment in write_fragments(table, uri, mode="append")]


def discard(uri: str, fragments: Sequence[str]) -> None:
    """Remove written rows that are never to be committed."""
    for fragment in fragments:
        for file in json.loads(fragment)["files"]:
            with suppress(OSError):
                files.remove(files.join(uri, "data", file["path"]))


def commit(uri: str, fragments: Sequence[str]) -> None:
    """Make written rows part of the dataset, all in one version."""
    added = [FragmentMetadata.from_json(fragment) for fragment in fragments]
    with _written(uri):
        version = lance.dataset(uri).version
        lance.LanceDataset.commit(uri, lance.LanceOperation.Append(added), read_version=version)


def _same_file(index: VideoIndex) -> bool:
    try:
        return file_stamp(index.path) == (index.size_bytes, index.mtime_ns)
    except VideoError:
        return False


@contextmanager
def _written(uri: str) -> Iterator[None]:
    """Lance's errors (a full disk, no rights, no network) as VideoError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({_reason(error)}); check space, rights and network, and start again"
        raise _failure(uri, error, reason) from error


def _latest(uri: str) -> lance.LanceDataset | None:
    try:
        return lance.dataset(uri)
    except (OSError, ValueError) as error:
        if str(error).startswith(NO_DATASET):
            return None
        reason = f"the store cannot be read ({_reason(error)}); check its address and rights"
        raise _failure(uri, error, reason) from error


def _columns(dataset: lance.LanceDataset, names: list[str]) -> pa.Table:
    try:
        return dataset.to_table(columns=names)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        reason = f"the store is damaged ({_reason(error)}); remove that folder and ingest again"
        raise _failure(dataset.uri, error, reason) from error


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


def _failure(uri: str, error: Exception, reason: str) -> VideoError:
    """Lance's error as ours: what the place refuses, where that is it, else the reason given."""
    return VideoError(f"{uri}: {refusal(uri, error) or reason}")


def _reason(error: Exception) -> str:
    """The first sentence of what Lance says, without the place in its source."""
    return " ".join(str(error).partition(", /")[0].split())[:200]


def _open_video(index: VideoIndex, store: str, form: FrameFormat) -> StoredVideo:
    uri = dataset_uri(store, index.video_id, form)
    dataset = _latest(uri)
    _check_rules(index, dataset)
    wanted = form.kept(index)
    table = _columns(dataset, ["pts", "signature"]) if dataset else SCHEMA.empty_table()
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


# Where no copy can be made, a process tries it once.
_local_copy = functools.lru_cache(maxsize=OPEN_DATASETS)(local_copy)


@functools.lru_cache(maxsize=OPEN_DATASETS)
def _pinned(uri: str, version: int, identity: str, cache: str | None) -> lance.LanceDataset:
    return lance.dataset(_local_copy(uri, identity, cache) if cache else uri, version=version)


def _take(video: Dataset, version: int, rows: np.ndarray) -> list[pa.Buffer]:
    return [value.as_buffer() for value in _take_column(video, version, rows, "jpeg")]


def _take_column(video: Dataset, version: int, rows: np.ndarray, name: str) -> pa.ChunkedArray:
    try:
        dataset = _pinned(video.uri, version, video.identity, video.cache)
        column = dataset.take(rows.tolist(), columns=[name])[name]
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({_reason(error)}); ingest {video.path} again"
        raise _failure(video.uri, error, reason) from error
    if len(column) != len(rows):  # Lance leaves out rows that do not exist
        raise VideoError(
            f"{video.uri}: {len(rows) - len(column)} of {len(rows)} rows are gone; ingest {video.path} again"
        )
    return column
