"""Data shared by all trials of a sweep: films, labeled photographs, the frame store; each made or checked once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence

from dora_ray import files
from dora_ray.config import Config, load_config
from dora_ray.errors import ConfigError
from dora_ray.store.ingest import IngestProgress
from dora_ray.training.beginning import with_resolved_init
from dora_ray.training.inputs import check_videos, ingest_videos
from dora_ray.training.paths import PATH_KEYS, absolute_paths, with_absolute_paths
from dora_ray.tuning.space import SweepSpec
from dora_ray.video.sources import find_videos
from dora_ray.video.synthetic import make_photo_classes
from dora_ray.video.tour_files import FACTS, FILM, make_tour

# Shorter held-out films give too few clips: their noise would exceed the effects of interest.
HELD_OUT_SECONDS = 80.0
logger = logging.getLogger(__name__)


def place(base: Config, spec: SweepSpec, folder: str) -> Config:
    """Return the configuration with the sweep's own store, tours and labeled images unless it names others."""
    texts = _tours(base, spec, folder) if spec.tour else []
    if base.data.store is None:
        texts.append(f"data.store={json.dumps(files.join(folder, 'store'))}")
    if spec.photographs and base.evaluation.images is None:
        if files.is_remote(folder):
            raise ConfigError(
                f"photographs cannot be written to {folder}: "
                "name a labeled folder with evaluation.images, or a local --out"
            )
        texts.append(f"evaluation.images={json.dumps(_images(folder))}")
    return with_absolute_paths(load_config(base, *texts))


def with_absolute_values(spec: SweepSpec) -> SweepSpec:
    """Return the sweep with absolute paths in its space: Ray Tune runs each trial in another working directory."""
    space = {
        key: {kind: absolute_paths(values) for kind, values in axis.items()} if key in PATH_KEYS else axis
        for key, axis in spec.space.items()
    }
    return spec.model_copy(update={"space": space})


def _tours(base: Config, spec: SweepSpec, folder: str) -> list[str]:
    """Return the overrides that select the sweep's tours, except for keys that the file sets itself."""
    if files.is_remote(folder):
        raise ConfigError(
            f"tours cannot be written to {folder}: name data.videos and evaluation.tour, or a local --out"
        )
    named = {text.partition("=")[0].strip() for text in spec.overrides}
    seen, other = (path for path, _, _ in tours(spec, folder))
    places = {"data.videos": [files.join(seen, FILM)], "evaluation.tour": other, "evaluation.video": other}
    return [f"{key}={json.dumps(value)}" for key, value in places.items() if key not in named]


def tours(spec: SweepSpec, folder: str) -> list[tuple[str, float, int]]:
    """Return (folder, seconds, seed) of the training film and of the held-out film; empty without `tour`."""
    if spec.tour is None:
        return []
    digest = hashlib.sha256(spec.tour.model_dump_json().encode()).hexdigest()[:6]
    wanted = (("seen", spec.tour.seconds, 0), ("held-out", max(HELD_OUT_SECONDS, spec.tour.seconds / 4), 1))
    return [(files.join(folder, "tours", f"{name}-{digest}"), s, spec.tour.seed + more) for name, s, more in wanted]


def make_tours(spec: SweepSpec, folder: str) -> None:
    """Render the sweep's films, each once."""
    for path, seconds, seed in tours(spec, folder):
        tour = spec.tour
        assert tour is not None
        if files.exists(files.join(path, FACTS)):
            continue
        files.remove(path)  # incomplete: rendering was interrupted
        logger.info("rendering %s: %g s of %d x %d pixels", path, seconds, tour.width, tour.height)
        make_tour(
            path,
            width=tour.width,
            height=tour.height,
            num_frames=round(seconds * tour.frames_per_second),
            frames_per_second=tour.frames_per_second,
            num_objects=tour.num_objects,
            seed=seed,
        )


def _images(folder: str) -> str:
    return files.join(folder, "images")


def make_images(base: Config, folder: str) -> None:
    """Write the demo's labeled photographs if the trials are evaluated on them."""
    if base.evaluation.images == _images(folder) and not files.exists(_images(folder)):
        make_photo_classes(_images(folder), seed=0)


def distinct_data(configs: Sequence[Config]) -> list[Config]:
    """Return one configuration for each distinct combination of data and clip settings."""
    return list({(config.data.model_dump_json(), config.clip.model_dump_json()): config for config in configs}.values())


def find_films(configs: Sequence[Config], spec: SweepSpec, folder: str) -> None:
    """Raise VideoError if a video is missing, before anything is written; the sweep's own films are rendered later."""
    own = {files.join(path, FILM) for path, _, _ in tours(spec, folder)}
    for config in configs:
        if not own & set(config.data.videos):
            find_videos(config.data.videos)


def check_given_weights(configs: Sequence[Config], folder: str) -> None:
    """Raise CheckpointError if `model.init` cannot be loaded or does not fit; each distinct network is checked once."""
    distinct = {(c.model.model_dump_json(), c.crops.global_size, c.head.model_dump_json()): c for c in configs}
    for config in distinct.values():
        with_resolved_init(config, folder, resume=False, overwrite=False)


def check_indexes(configs: Sequence[Config]) -> None:
    """Index every video once for all trials; raise VideoError if one cannot be read or all are too short."""
    for config in configs:
        check_videos(config, store=config.data.store)


def ingest_all(configs: Sequence[Config], on_ingest: Callable[[IngestProgress], None] | None = None) -> None:
    """Ingest the videos into the store once for all trials, before the first one starts."""
    for config in configs:
        assert config.data.store is not None
        ingest_videos(config, config.data.store, on_ingest)
