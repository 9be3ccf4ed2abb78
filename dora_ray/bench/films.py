"""Test films, encoded once, cached, and looped without re-encoding.

A decoder cannot distinguish a loop from new content, so a long film costs only the encoding of its first seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av

from dora_ray import files
from dora_ray.clips.contents import StoredContents
from dora_ray.config import Config
from dora_ray.store import datasets, indexes
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import StoredVideo
from dora_ray.training.inputs import Inputs, frame_format, make_plan
from dora_ray.video.decoders import DecodedFrame, get_decoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.synthetic import make_video

# Fast encoders and their options; None: those of `make_video`.
ENCODERS: dict[str, tuple[str, dict[str, str] | None]] = {
    "h264": ("libx264", None),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30"}),
    "av1": ("libsvtav1", {"preset": "12", "crf": "35"}),
}


def cache_folder() -> Path:
    """Return the folder that keeps films between measurements."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "dora-ray", "bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def film(
    *,
    width: int,
    height: int,
    frames_per_second: int,
    seconds: int,
    group_size: int,
    loops: int = 1,
    codec: str = "h264",
) -> str:
    """Return the path of a film of `loops` times the same `seconds`, encoding it if missing; see ENCODERS."""
    encoder, options = ENCODERS[codec]
    name = f"{width}x{height}-{frames_per_second}-{seconds}s-gop{group_size}" + ("" if codec == "h264" else f"-{codec}")
    once = cache_folder() / f"{name}.mp4"
    if not once.exists():
        partial = once.with_suffix(f".{os.getpid()}.mp4")
        make_video(
            partial,
            width=width,
            height=height,
            num_frames=seconds * frames_per_second,
            frames_per_second=frames_per_second,
            seed=0,
            codec=encoder,
            group_size=group_size,
            options=options,
        )
        partial.replace(once)
    if loops == 1:
        return str(once)
    looped = cache_folder() / f"{name}-x{loops}.mp4"
    if not looped.exists():
        partial = looped.with_suffix(f".{os.getpid()}.mp4")
        _loop(once, partial, loops)
        partial.replace(looped)
    return str(looped)


def _loop(source: Path, target: Path, loops: int) -> None:
    """Copy the packets `loops` times, with increasing timestamps."""
    with av.open(str(target), "w") as writer:
        copy = None
        for turn in range(loops):
            with av.open(str(source)) as reader:
                stream = reader.streams.video[0]
                if copy is None:
                    copy = writer.add_stream_from_template(stream)
                shift = turn * (stream.duration or 0)
                for packet in reader.demux(stream):
                    if packet.pts is not None and packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copy
                        writer.mux(packet)


def decode_frames(index: VideoIndex, config: Config) -> list[DecodedFrame]:
    """Return the kept frames of a video, decoded and scaled."""
    wanted = index.pts[index.kept_frames(config.data.frames_per_second)].tolist()
    return list(get_decoder(config.data.decoder).decode(index, wanted, short_side=config.data.short_side))


def write_store(index: VideoIndex, frames: Sequence[DecodedFrame], config: Config, store: str) -> StoredVideo:
    """Write frames to a new store in this process, without Ray, and open it."""
    data = config.data
    form = frame_format(data)
    uri = frame_store.dataset_uri(store, index.video_id, form)
    files.write_bytes(files.join(store, index.video_id, indexes.INDEX_NAME), index.to_bytes())
    datasets.create_dataset(uri)
    rows = [datasets.frame_row(frame, segment=0, jpeg_quality=data.jpeg_quality) for frame in frames]
    datasets.commit(uri, datasets.write_rows(uri, rows))
    (video,) = frame_store.open_videos([index], store=store, form=form)
    return video


def film_inputs(config: Config, path: str, store: str) -> Inputs:
    """Return the plan and contents of a run over one film, written to a new store."""
    index = index_video(path)
    video = write_store(index, decode_frames(index, config), config, store)
    plan = make_plan(config, [video])
    return Inputs(plan, StoredContents(plan, [video]))
