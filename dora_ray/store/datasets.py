"""Lance datasets of frames: write, commit, look up, and read rows by number.

A row is a frame:
    segment int32, pts int64 (ticks), jpeg large_binary, width int16, height int16, signature (cuts.SIGNATURE_BYTES)
An undecodable frame has a row, too, with null jpeg and signature, so that it is never attempted again. Whole segments
are appended by atomic commits, and readers pin a version, so a dataset can grow while it is read.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from dora_ray.video.decoders import DecodedFrame
from dora_ray.video.index import DECODING_RULES

# Ray forks only to exec its daemons at once, which is safe; Lance warns at every fork of a process that imported it.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

OPEN_DATASETS = 64
# Metadata key of the decoding rules that filled a dataset; absent means the first rules.
RULES = "dora_ray.decoding_rules"
# Start of Lance's message for a missing dataset; every other failure to open one is a ValueError, too.
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


class Dataset(Protocol):
    """Source of rows: a StoredVideo or a ComingVideo."""

    @property
    def path(self) -> str:
        """Path or URI of the video file."""

    @property
    def uri(self) -> str:
        """URI of the Lance dataset."""

    @property
    def identity(self) -> str:
        """Hash of the file names of the pinned version; empty if no version is pinned."""

    @property
    def cache(self) -> str | None:
        """Folder to which the dataset is copied before it is read; None: read in place."""


def has_frames(uri: str) -> bool:
    """Return whether the dataset holds at least one decoded frame."""
    return count_frames(uri)[0] > 0


def count_frames(uri: str) -> tuple[int, int]:
    """Return the numbers of decoded and of undecodable frames of a dataset."""
    dataset = latest(uri)
    if dataset is None:
        return 0, 0
    readable = int(dataset.count_rows("signature IS NOT NULL"))
    return readable, int(dataset.count_rows()) - readable


def fetch(uri: str, identity: str, cache: str | None) -> None:
    """Create this node's copy of a dataset if one is configured and missing; block until it is complete."""
    if cache:
        with suppress(OSError, ValueError):  # reading reports the problem
            _local_copy(uri, identity, cache)


def read_rows(video: Dataset, version: int, rows: np.ndarray) -> list[np.ndarray]:
    """Return the pictures of the given rows of one version of a video's dataset, in order: (H, W, 3) uint8 RGB each.

    Raises:
        VideoError: the store was changed or removed, or a picture is damaged.
    """
    try:
        pictures = take_pictures(video, version, rows)
        return [simplejpeg.decode_jpeg(np.frombuffer(buffer, np.uint8), "RGB") for buffer in pictures]
    except ValueError as error:
        raise VideoError(
            f"{video.uri}: holds a damaged picture ({error}); remove this folder and ingest again"
        ) from error


def create_dataset(uri: str) -> None:
    """Create an empty dataset unless one exists."""
    if latest(uri) is None:
        try:
            schema = SCHEMA.with_metadata({RULES: str(DECODING_RULES)})
            lance.write_dataset(schema.empty_table(), uri, mode="create")
        except OSError as error:
            # A concurrent ingest may have created it between the check and the write.
            if latest(uri) is None:
                reason = f"cannot be written ({_reason(error)}); check disk space and rights, or set data.store"
                raise failure(uri, error, reason) from error


def frame_row(frame: DecodedFrame, *, segment: int, jpeg_quality: int) -> dict[str, object]:
    """Return the dataset row of a decoded frame."""
    return {
        "segment": segment,
        "pts": frame.pts,
        "jpeg": simplejpeg.encode_jpeg_yuv_planes(frame.y, frame.u, frame.v, jpeg_quality),
        "width": frame.width,
        "height": frame.height,
        "signature": cuts.signature(frame.y, frame.u, frame.v),
    }


def missing_row(pts: int, *, segment: int, width: int, height: int) -> dict[str, object]:
    """Return the dataset row of an undecodable frame."""
    return {"segment": segment, "pts": pts, "jpeg": None, "width": width, "height": height, "signature": None}


def write_rows(uri: str, rows: Sequence[dict[str, object]]) -> list[str]:
    """Write rows as data files that readers cannot see before `commit`; return the files' descriptions."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with _written(uri):
        return [json.dumps(fragment.to_json()) for fragment in write_fragments(table, uri, mode="append")]


def discard(uri: str, fragments: Sequence[str]) -> None:
    """Remove written rows that will not be committed."""
    for fragment in fragments:
        for file in json.loads(fragment)["files"]:
            with suppress(OSError):
                files.remove(files.join(uri, "data", file["path"]))


def commit(uri: str, fragments: Sequence[str]) -> None:
    """Commit written rows to the dataset as one new version."""
    added = [FragmentMetadata.from_json(fragment) for fragment in fragments]
    with _written(uri):
        version = lance.dataset(uri).version
        lance.LanceDataset.commit(uri, lance.LanceOperation.Append(added), read_version=version)


@contextmanager
def _written(uri: str) -> Iterator[None]:
    """Convert Lance's write errors (full disk, permissions, network) to VideoError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({_reason(error)}); check disk space, permissions and network, and start again"
        raise failure(uri, error, reason) from error


def latest(uri: str) -> lance.LanceDataset | None:
    """Open the newest version of a dataset; None if there is no dataset.

    Raises:
        VideoError: the dataset cannot be opened.
    """
    try:
        return lance.dataset(uri)
    except (OSError, ValueError) as error:
        if str(error).startswith(NO_DATASET):
            return None
        reason = f"the store cannot be read ({_reason(error)}); check its address and permissions"
        raise failure(uri, error, reason) from error


def columns(dataset: lance.LanceDataset, names: list[str]) -> pa.Table:
    """Read columns of all rows.

    Raises:
        VideoError: the dataset is damaged.
    """
    try:
        return dataset.to_table(columns=names)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        reason = f"the store is damaged ({_reason(error)}); remove this folder and ingest again"
        raise failure(dataset.uri, error, reason) from error


def failure(uri: str, error: Exception, reason: str) -> VideoError:
    """Convert a Lance error to a VideoError: name a refusal by the storage, else give `reason`."""
    return VideoError(f"{uri}: {refusal(uri, error) or reason}")


def _reason(error: Exception) -> str:
    """Return the first sentence of a Lance error, without its source location."""
    return " ".join(str(error).partition(", /")[0].split())[:200]


# Cached, so that a process attempts a failing copy only once.
_local_copy = functools.lru_cache(maxsize=OPEN_DATASETS)(local_copy)


@functools.lru_cache(maxsize=OPEN_DATASETS)
def _pinned(uri: str, version: int, identity: str, cache: str | None) -> lance.LanceDataset:
    return lance.dataset(_local_copy(uri, identity, cache) if cache else uri, version=version)


def take_pictures(video: Dataset, version: int, rows: np.ndarray) -> list[pa.Buffer]:
    """Read the JPEG files of the given rows of one version of a dataset, in order. Raises as `take_column`."""
    return [value.as_buffer() for value in take_column(video, version, rows, "jpeg")]


def take_column(video: Dataset, version: int, rows: np.ndarray, name: str) -> pa.ChunkedArray:
    """Read one column of the given rows of one version of a dataset, in order.

    Raises:
        VideoError: the dataset was changed or removed.
    """
    try:
        dataset = _pinned(video.uri, version, video.identity, video.cache)
        column = dataset.take(rows.tolist(), columns=[name])[name]
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({_reason(error)}); ingest {video.path} again"
        raise failure(video.uri, error, reason) from error
    if len(column) != len(rows):  # Lance skips rows that do not exist
        raise VideoError(
            f"{video.uri}: {len(rows) - len(column)} of {len(rows)} rows are gone; ingest {video.path} again"
        )
    return column
