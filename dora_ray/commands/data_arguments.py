"""Arguments of `dora-ray data`."""

from __future__ import annotations

import argparse

from dora_ray.commands.arguments import Commands, add_json, command


def add_data(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `data` and its subcommands."""
    parser = commands.add_parser(
        "data", help="index, ingest, fetch or make videos", description="Index, ingest, fetch or make videos."
    )
    parts = parser.add_subparsers(metavar="WHAT", required=True)
    index = command(
        parts, "index", "index videos in one pass, without decoding them", handler="data.run_index", spill="videos"
    )
    index.add_argument("videos", nargs="+", metavar="VIDEO", help="files, folders, globs, or URIs")
    index.add_argument("--store", metavar="DIR", help="keep the indexes in this frame store")
    add_json(index)
    ingest = command(
        parts,
        "ingest",
        "decode videos once into a frame store; resumes after an interruption",
        handler="data.run_ingest",
        spill="words",
    )
    ingest.add_argument(
        "words",
        nargs="+",
        metavar="VIDEO | data.key=value",
        help="files, folders, globs or URIs, and settings of `data`",
    )
    ingest.add_argument("--store", metavar="DIR", required=True, help="folder or URI of the frame store")
    ingest.add_argument(
        "--recipe", default="paper", metavar="RECIPE | FILE.yaml", help="source of the `data` settings (paper)"
    )
    _add_analyze(parts)
    _add_fetch(parts)
    _add_synth(parts)


def _add_analyze(parts: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        parts,
        "analyze",
        "print lightness over time and shot changes of ingested videos, without decoding them again",
        handler="data.run_analyze",
        spill="words",
    )
    parser.add_argument("words", nargs="+", metavar="VIDEO | data.key=value", help="videos and settings as at ingest")
    parser.add_argument("--store", metavar="DIR", required=True, help="folder or URI of the frame store")
    parser.add_argument("--recipe", default="paper", metavar="RECIPE | FILE.yaml", help="as at ingest (paper)")
    parser.add_argument(
        "--interval", type=float, default=60.0, metavar="SECONDS", help="interval for averages of lightness (60)"
    )
    add_json(parser)


def _add_fetch(parts: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        parts, "fetch", "download the Walking Tours videos (extra: fetch)", handler="data.run_fetch", spill="names"
    )
    parser.add_argument("dataset", choices=("walking-tours",), help="ten videos of 1 to 3 hours, 3840x2160, 60 fps")
    parser.add_argument("names", nargs="*", metavar="NAME", help="tour such as venice (default: all ten)")
    parser.add_argument("--out", metavar="DIR", default="walking-tours", help="target folder (walking-tours)")
    parser.add_argument(
        "--height",
        type=int,
        default=2160,
        metavar="LINES",
        help="maximum height in lines (2160); H.264 is available up to 1080",
    )
    parser.add_argument(
        "--decoder",
        choices=("pyav", "decord", "torchcodec"),
        default="pyav",
        help="data.decoder that will read the files (pyav). AV1 is preferred to VP9, which takes twice as long to"
        " decode, except for decord, which cannot decode AV1",
    )
    parser.add_argument("--list", action="store_true", help="list the videos, without network access")


def _add_format(parser: argparse.ArgumentParser, *, seconds: int) -> None:
    """Add the options of a synthetic film: length, size, frame rate."""
    parser.add_argument("--seconds", type=float, default=float(seconds), metavar="N", help=f"length ({seconds})")
    parser.add_argument("--size", type=_size, default=(640, 360), metavar="WxH", help="pixels (640x360)")
    parser.add_argument("--fps", type=float, default=30.0, metavar="N", help="frames per second (30)")


def _add_synth(parts: Commands[argparse.ArgumentParser]) -> None:
    synth = parts.add_parser(
        "synth", help="make a video or labeled images to try things on", description="Make data to try things on."
    )
    kinds = synth.add_subparsers(metavar="KIND", required=True)
    video = command(
        kinds,
        "video",
        "a video of moving objects with the frame number drawn in every frame",
        handler="data.run_synth_video",
    )
    video.add_argument("out", metavar="FILE.mp4")
    _add_format(video, seconds=10)
    video.add_argument("--cuts", type=float, nargs="*", default=[], metavar="SECONDS", help="start times of new scenes")
    video.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same pictures (0)")
    tour = command(
        kinds,
        "tour",
        "a walk along photographs with moving objects, with their masks, boxes and classes (extra: demo)",
        handler="data.run_synth_tour",
    )
    tour.add_argument("out", metavar="DIR")
    _add_format(tour, seconds=60)
    tour.add_argument("--objects", type=int, default=4, metavar="N", help="objects visible at a time (4)")
    tour.add_argument("--labels", type=float, default=2.0, metavar="N", help="labeled frames per second (2)")
    tour.add_argument(
        "--photographs",
        metavar="DIR",
        help="your own pictures: those with transparency become objects, of the class named by their folder; the others"
        " become scenery (default: pictures from scikit-image and scikit-learn)",
    )
    tour.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same tour (0)")
    photos = command(
        kinds, "photos", "crops of ten photographs as labeled images (extra: demo)", handler="data.run_synth_photos"
    )
    photos.add_argument("out", metavar="DIR")
    photos.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same crops (0)")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x360")
    return int(width), int(height)
