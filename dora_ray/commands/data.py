"""dora-ray data: index, ingest, analyze, fetch, and synthetic videos and images."""

from __future__ import annotations

import argparse
import functools
import shlex
from pathlib import Path
from typing import Any

from dora_ray import files
from dora_ray.commands.output import write, write_facts, write_json
from dora_ray.commands.words import split
from dora_ray.config_source import VIDEOS
from dora_ray.errors import ConfigError, VideoError
from dora_ray.progress import Stages

# Number of lightness values that fit on a terminal line.
SHOWN_VALUES = 12


def run_index(options: argparse.Namespace) -> None:
    """Index videos, in one pass each, and print their properties."""
    from dora_ray.store.indexes import load_index
    from dora_ray.store.losses import stored_frames
    from dora_ray.video.index import find_videos, index_video
    from dora_ray.video.several import refuse_unreadable

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    paths = find_videos(options.videos)
    for path in paths:
        try:
            index = load_index(path, store=options.store) if options.store else index_video(path)
        except VideoError as error:
            failures.append(str(error))
            continue
        facts = {
            "video": index.path,
            "codec": index.codec,
            "size": f"{index.width}x{index.height}",
            "rotation": index.rotation,
            "mirrored": index.mirrored,
            "color": index.pixel_format,
            "frames": len(index.pts),
            "key_frames": len(index.key_pts),
            "frames_per_second": round(float(index.average_rate), 3),
            "seconds": round(float(index.real_seconds), 3),
            "declared_seconds": round(float(index.declared_seconds), 3),
            "warnings": list(index.warnings),
        }
        if options.store:
            facts["stored"] = stored_frames(files.absolute(options.store), index.video_id)
        if rows:
            write("")
        write_facts(facts)
        rows.append(facts)
    write_json(options.json, rows)
    refuse_unreadable(failures, len(paths), skip_unreadable=False)


def run_ingest(options: argparse.Namespace) -> None:
    """Ingest videos into a frame store."""
    from dora_ray.config import load_config
    from dora_ray.store.losses import losses
    from dora_ray.training.inputs import ingest_videos
    from dora_ray.training.shown import show_ingest
    from dora_ray.training.trainer import connect

    videos, overrides = _videos_of(options, "ingest")
    config = load_config(options.recipe, *overrides)
    named = config.model_copy(update={"data": config.data.model_copy(update={"videos": tuple(videos)})})
    with Stages() as stages, connect(named):
        stored = ingest_videos(named, options.store, functools.partial(show_ingest, stages))
    missing = losses(stored)
    frames = {v.path: f"{len(v)} frames" + (f"; {missing[v.path]}" if v.path in missing else "") for v in stored}
    data = config.data
    kept = f"{data.frames_per_second:g} frames per second, short side {data.short_side}, quality {data.jpeg_quality}"
    again = ["dora-ray", "train", options.recipe, *videos, f"data.store={options.store}", *overrides]
    write_facts({"store": files.absolute(options.store)} | frames | {"kept": f"{kept} (recipe {options.recipe})"})
    write(
        f"\nTrain on these frames: {shlex.join(again)}\nAnother recipe may need other frames: ingest again with "
        "--recipe NAME."
    )


def _videos_of(options: argparse.Namespace, command: str) -> tuple[list[str], list[str]]:
    """Split a command's words into videos and overrides.

    Raises:
        ConfigError: no video is given, or the videos are given as data.videos=.
    """
    videos, overrides = split(options.words)
    given = next((word for word in overrides if word.startswith(f"{VIDEOS}=")), None)
    if given is not None:
        raise ConfigError(
            f"{given} is not accepted here: name the videos as words, such as `dora-ray data {command} a.mp4 b.mp4"
            f" --store {options.store}`"
        )
    if not videos:
        raise ConfigError("no video was given: name files, folders, globs or URIs")
    return videos, overrides


def run_analyze(options: argparse.Namespace) -> None:
    """Print the statistics of ingested videos."""
    from dora_ray.config import load_config
    from dora_ray.store.frames import open_videos
    from dora_ray.store.indexes import load_index
    from dora_ray.store.statistics import analyze
    from dora_ray.training.inputs import frame_format
    from dora_ray.video.index import find_videos
    from dora_ray.video.several import index_all

    videos, overrides = _videos_of(options, "analyze")
    if options.interval <= 0:
        raise ConfigError(f"--interval {options.interval:g}: give a number of seconds above 0")
    data = load_config(options.recipe, *overrides).data
    store = files.absolute(options.store)
    read = functools.partial(load_index, store=store)
    stored = open_videos(
        index_all(find_videos(videos), read, skip_unreadable=data.skip_unreadable),
        store=store,
        form=frame_format(data),
    )
    found = [analyze(video, interval_seconds=options.interval) for video in stored]
    for facts in found:
        light, shots = facts["lightness"], facts["shots"]
        write_facts(
            {name: facts[name] for name in ("video", "seconds", "frames", "missing")}
            | {"lightness": light["mean"], f"lightness per {options.interval:g} s": _few(light["by_interval"])}
            | {f"lightness change between intervals of {options.interval:g} s": light["change"]}
            | {"shot changes": shots["changes"], "shot changes per minute": shots["per_minute"]}
        )
    write_json(options.json, found)


def _few(values: list[float]) -> str:
    """Format the first values of a list, and its length."""
    shown = ", ".join(f"{value:.3f}" for value in values[:SHOWN_VALUES])
    return shown if len(values) <= SHOWN_VALUES else f"{shown}, ... ({len(values)}; all with --json)"


def run_fetch(options: argparse.Namespace) -> None:
    """Download the videos of a data set, or list them."""
    from dora_ray.video.walking_tours import LICENSE, fetch_tours, find_tours

    tours = find_tours(options.names)
    if options.list:
        write("\n".join(f"{t.name:<13} {t.seconds / 3600:.1f} h  {t.address}" for t in tours) + f"\nlicense: {LICENSE}")
        return
    with Stages() as stages:

        def progress(name: str, done: int, total: int) -> None:
            stages.at(f"fetch {name}", "MB").update(step=done // 2**20, total=max(total // 2**20, 1))

        paths = fetch_tours(tours, out=options.out, height=options.height, decoder=options.decoder, progress=progress)
    write("\n".join(map(str, paths)))


def run_synth_video(options: argparse.Namespace) -> None:
    """Write a synthetic video."""
    from dora_ray.video.synthetic import make_video

    width, height = options.size
    if width % 2 or height % 2 or width < 80 or height < 2:
        raise ConfigError(f"--size {width}x{height}: both must be even, and the width at least 80")
    num_frames = round(options.seconds * options.fps)
    if not 2 <= num_frames <= 65536:
        raise ConfigError(
            f"--seconds {options.seconds:g} --fps {options.fps:g} make {num_frames} frames; 2 to 65536 are allowed"
        )
    _refuse_existing(options.out)
    cuts = [round(second * options.fps) for second in options.cuts]
    path = make_video(
        options.out,
        width=width,
        height=height,
        num_frames=num_frames,
        frames_per_second=options.fps,
        seed=options.seed,
        cuts=cuts,
    )
    write(str(path))


def run_synth_tour(options: argparse.Namespace) -> None:
    """Write a labeled tour."""
    from dora_ray.video.cutouts import photographs_of
    from dora_ray.video.tour_files import make_tour

    _refuse_existing(options.out)
    width, height = options.size
    with Stages() as stages:

        def progress(done: int, total: int) -> None:
            stages.at("draw", "frames").update(step=done, total=total)

        film = make_tour(
            options.out,
            width=width,
            height=height,
            num_frames=round(options.seconds * options.fps),
            frames_per_second=options.fps,
            seed=options.seed,
            num_objects=options.objects,
            labels_per_second=options.labels,
            photographs=photographs_of(options.photographs) if options.photographs else None,
            progress=progress,
        )
    write_facts({"film": film, "masks": film.parent / "davis", "boxes": film.parent / "voc"})


def run_synth_photos(options: argparse.Namespace) -> None:
    """Write labeled images."""
    from dora_ray.video.synthetic import make_photo_classes

    _refuse_existing(options.out)
    names = make_photo_classes(options.out, seed=options.seed)
    write_facts({"folder": options.out, "classes": names})


def _refuse_existing(path: str) -> None:
    if Path(path).exists():
        raise ConfigError(f"{path} already exists: give another name")
