"""Rates of the model: shipped ones with their machine, which a user's own benchmarks can replace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from typing import Any

from dora_ray import files
from dora_ray.errors import ConfigError
from dora_ray.planning.model import Rates

# Film and store on which `bench data` measures.
BENCH_PIXELS, BENCH_STORED_PIXELS, BENCH_FRAMES = 3840 * 2160, 910 * 512, 8


@dataclass(frozen=True)
class Figures:
    """Rates, with a sentence on the origin of each; those that were never measured begin with "assumed"."""

    rates: Rates
    origins: dict[str, str]


def load_figures(paths: Sequence[str] = ()) -> Figures:
    """Return the shipped figures, updated from files of `dora-ray bench {data,step} --json`.

    Raises:
        ConfigError: a file has other content.
    """
    shipped = json.loads(package_files("dora_ray.planning").joinpath("figures.json").read_text(encoding="utf-8"))
    figures = Figures(
        Rates(**{name: entry["value"] for name, entry in shipped.items()}),
        {name: entry["from"] for name, entry in shipped.items()},
    )
    for path in paths:
        figures = _with(figures, path)
    return figures


def _with(figures: Figures, path: str) -> Figures:
    try:
        bench: Any = json.loads(files.read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--figures {path} cannot be read: {error}") from error
    changes = rates_of_bench(bench, figures.rates) if isinstance(bench, dict) else {}
    if not changes:
        raise ConfigError(f"--figures {path} is not what `dora-ray bench data --json` or `bench step --json` writes")
    origin = f"{path}, {bench.get('device', 'bench data')}"
    return Figures(replace(figures.rates, **changes), figures.origins | dict.fromkeys(changes, origin))


def rates_of_bench(bench: Mapping[str, Any], before: Rates) -> dict[str, Any]:
    """Return the rates contained in a benchmark's result.

    Args:
        bench: content of its JSON file.
        before: rates that provide codecs which the benchmark did not decode.
    """
    changes: dict[str, Any] = {}
    if "store_clips_per_core_second" in bench:
        decoded = {
            codec: bench[f"{prefix}ingest_frames_per_core_second"] * BENCH_PIXELS
            for codec, prefix in (("h264", ""), ("vp9", "vp9_"), ("av1", "av1_"))
            if f"{prefix}ingest_frames_per_core_second" in bench
        }
        kept = (bench["jpeg_ms_a_kept_frame"] + bench["write_ms_a_kept_frame"]) / 1e3
        changes |= {
            "decoded_pixels": before.decoded_pixels | decoded,
            "kept_pixel_seconds": kept / BENCH_STORED_PIXELS,
            "stored_bytes_a_pixel": bench["stored_bytes_a_clip"] / BENCH_FRAMES / BENCH_STORED_PIXELS,
            "read_pixel_seconds": 1 / bench["store_clips_per_core_second"] / BENCH_FRAMES / BENCH_STORED_PIXELS,
        }
    if "tflop_per_second" in bench:
        device = str(bench["device"])
        if device.startswith("cpu"):
            threads = int(device.removeprefix("cpu, ").partition(" ")[0])
            changes["core_tflop"] = bench["tflop_per_second"] / threads
        else:
            changes["gpu_tflop"] = bench["tflop_per_second"]
    return changes
