"""Arguments of `dora-ray data`."""

from __future__ import annotations

import argparse

from dora_ray.commands.arguments import Commands, add_json, command


def add_data(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `data` and its parts."""
    parser = commands.add_parser(
        "data", help="look at, ingest, fetch, or make videos", description="Look at, ingest, fetch, or make videos."
    )
    parts = parser.add_subparsers(metavar="WHAT", required=True)
    index = command(
        parts, "index", "look at videos in one pass, without decoding them", handler="data.run_index", spill="videos"
    )
    index.add_argument("videos", nargs="+", metavar="VIDEO", help="files, folders, globs, or URIs")
    index.add_argument("--store", metavar="DIR", help="keep the indexes in this frame store")
    add_json(index)
    ingest = command(
        parts,
        "ingest",
        "decode videos once, into a frame store; goes on where it was interrupted",
        handler="data.run_ingest",
        spill="words",
    )
    ingest.add_argument(
        "words",
        nargs="+",
        metavar="VIDEO | data.key=value",
        help="files, folders, globs, or URIs, then settings of `data`",
    )
    ingest.add_argument("--store", metavar="DIR", required=True, help="folder or URI of the frame store")
    ingest.add_argument(
        "--recipe", default="paper", metavar="RECIPE | FILE.yaml", help="whose `data` settings to use; not given: paper"
    )
    _add_analyze(parts)
    _add_fetch(parts)
    _add_synth(parts)


def _add_analyze(parts: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        parts,
        "analyze",
        "light over time and shot changes of ingested videos; nothing is decoded again",
        handler="data.run_analyze",
        spill="words",
    )
    parser.add_argument("words", nargs="+", metavar="VIDEO | data.key=value", help="as they were ingested")
    parser.add_argument("--store", metavar="DIR", required=True, help="folder or URI of the frame store")
    parser.add_argument("--recipe", default="paper", metavar="RECIPE | FILE.yaml", help="as at the ingest (paper)")
    parser.add_argument("--interval", type=float, default=60.0, metavar="SECONDS", help="light is averaged over (60)")
    add_json(parser)


def _add_fetch(parts: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        parts, "fetch", "download the Walking Tours videos (extra: fetch)", handler="data.run_fetch", spill="names"
    )
    parser.add_argument("dataset", choices=("walking-tours",), help="ten videos of 1 to 3 hours, 3840x2160, 60 fps")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as venice; not given: all ten")
    parser.add_argument("--out", metavar="DIR", default="walking-tours", help="folder (walking-tours)")
    parser.add_argument(
        "--height",
        type=int,
        default=2160,
        metavar="LINES",
        help="at most so many (2160); H.264 ends at 1080 there",
    )
    parser.add_argument(
        "--decoder",
        choices=("pyav", "decord", "torchcodec"),
        default="pyav",
        help="the data.decoder that the files are for (pyav): AV1 is asked for before VP9, which takes twice as long to"
        " decode, but for decord, which has no AV1",
    )
    parser.add_argument("--list", action="store_true", help="name the videos, without the network")


def _add_format(parser: argparse.ArgumentParser, *, seconds: int) -> None:
    """Add the options of a film that is made: its length, which has a default, its size and its rate."""
    parser.add_argument("--seconds", type=float, default=float(seconds), metavar="N", help=f"length ({seconds})")
    parser.add_argument("--size", type=_size, default=(640, 360), metavar="WxH", help="pixels (640x360)")
    parser.add_argument("--fps", type=float, default=30.0, metavar="N", help="frames a second (30)")


def _add_synth(parts: Commands[argparse.ArgumentParser]) -> None:
    synth = parts.add_parser(
        "synth", help="make a video or labeled images to try things on", description="Make data to try things on."
    )
    kinds = synth.add_subparsers(metavar="KIND", required=True)
    video = command(
        kinds,
        "video",
        "a video of moving objects, its frame number painted in every frame",
        handler="data.run_synth_video",
    )
    video.add_argument("out", metavar="FILE.mp4")
    _add_format(video, seconds=10)
    video.add_argument("--cuts", type=float, nargs="*", default=[], metavar="SECONDS", help="when another scene starts")
    video.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same pictures (0)")
    tour = command(
        kinds,
        "tour",
        "a walk along photographs with moving objects, their masks, boxes and classes beside it (extra: demo)",
        handler="data.run_synth_tour",
    )
    tour.add_argument("out", metavar="DIR")
    _add_format(tour, seconds=60)
    tour.add_argument("--objects", type=int, default=4, metavar="N", help="objects at a time (4)")
    tour.add_argument("--labels", type=float, default=2.0, metavar="N", help="labeled frames a second (2)")
    tour.add_argument(
        "--photographs",
        metavar="DIR",
        help="your own pictures: transparent ones are objects, of the class that their folder names, others are walked"
        " along; not given: those that scikit-image and scikit-learn ship",
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
