"""Feature files: Parquet or NumPy .npz.

Legend: M images or frames, D width, N patches of an image.

Parquet columns and .npz arrays: path, seconds (from the video's start; null or NaN for an image), cls (D) after the
final norm; with patches also patches (N x D, row-major), patch_rows and patch_columns, whose product is N. The metadata
`dora_ray` holds the encoder and the preprocessing as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from dora_ray import files
from dora_ray.errors import ConfigError

FORMATS = (".parquet", ".npz")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Features of a batch of pictures of equal size.

    Attributes:
        paths, seconds: M values each.
        cls: (M, D) float32.
        patches: (M, N, D) float32; None if not requested.
        grid: rows and columns of patches.
    """

    paths: list[str]
    seconds: list[float | None]
    cls: np.ndarray
    patches: np.ndarray | None
    grid: tuple[int, int]


def check_target(out: str | os.PathLike[str]) -> str:
    """Return the absolute path of a new feature file.

    Raises:
        ConfigError: the file exists, or has another suffix.
    """
    target = files.absolute(out)
    if not target.endswith(FORMATS):
        raise ConfigError(f"{target}: features are written to FILE.parquet or FILE.npz.")
    if files.exists(target):
        raise ConfigError(f"{target} already exists. Give another name.")
    return target


@contextmanager
def new_file(target: str) -> Iterator[str]:
    """Yield the path of a temporary file; rename it to the target on success."""
    beside = None if files.is_remote(target) else os.path.dirname(target)
    if beside is not None:
        os.makedirs(beside, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".embed.", dir=beside)
    partial = os.path.join(folder, "features")
    try:
        yield partial
        if files.is_remote(target):
            files.write_bytes(target, Path(partial).read_bytes())
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Sink(Protocol):
    """Context manager that writes features batch by batch; exiting finishes the file."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def add(self, rows: Embedded) -> None:
        """Add a batch."""


def open_sink(partial: str, target: str, facts: dict[str, Any]) -> Sink:
    """Open a sink for `partial` in the format given by the target's suffix."""
    return _ParquetSink(partial, facts) if target.endswith(".parquet") else _NumpySink(partial, facts)


class _ParquetSink:
    """Writes one row group per batch."""

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._writer: Any = None

    def __enter__(self) -> _ParquetSink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, rows: Embedded) -> None:
        """Write a batch."""
        import pyarrow as pa
        from pyarrow import parquet

        width = rows.cls.shape[1]
        columns = {
            "path": pa.array(rows.paths, pa.string()),
            "seconds": pa.array(rows.seconds, pa.float64()),
            "cls": pa.FixedSizeListArray.from_arrays(pa.array(rows.cls.ravel()), width),
        }
        if rows.patches is not None:
            count = rows.patches[0].size
            offsets = np.arange(len(rows.paths) + 1, dtype=np.int64) * count
            values = pa.array(rows.patches.ravel())
            columns["patches"] = pa.LargeListArray.from_arrays(pa.array(offsets), values)
            for name, number in zip(("patch_rows", "patch_columns"), rows.grid, strict=True):
                columns[name] = pa.array([number] * len(rows.paths), pa.int32())
        table = pa.table(columns).replace_schema_metadata({"dora_ray": json.dumps(self._facts)})
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)


class _NumpySink:
    """Collects everything in memory and writes it at the end."""

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._rows: list[Embedded] = []

    def __enter__(self) -> _NumpySink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._rows:
            return
        seconds = [np.nan if second is None else second for rows in self._rows for second in rows.seconds]
        arrays = {
            "path": np.array([path for rows in self._rows for path in rows.paths]),
            "seconds": np.array(seconds, np.float64),
            "cls": np.concatenate([rows.cls for rows in self._rows]),
            "dora_ray": np.array(json.dumps(self._facts)),
        }
        if self._rows[0].patches is not None:
            arrays["patches"] = np.concatenate([rows.patches for rows in self._rows if rows.patches is not None])
            for number, name in enumerate(("patch_rows", "patch_columns")):
                arrays[name] = np.full(len(arrays["path"]), self._rows[0].grid[number], np.int32)
        with open(self._path, "wb") as file:
            cast(Any, np.savez)(file, **arrays)

    def add(self, rows: Embedded) -> None:
        """Add a batch.

        Raises:
            ConfigError: its patch grid differs from that of earlier batches.
        """
        if rows.patches is not None and self._rows and rows.grid != self._rows[0].grid:
            raise ConfigError(
                f"{rows.paths[0]} has {rows.grid[0]} x {rows.grid[1]} patches, others have "
                f"{self._rows[0].grid[0]} x {self._rows[0].grid[1]}: write patches of different grids to FILE.parquet."
            )
        self._rows.append(rows)
