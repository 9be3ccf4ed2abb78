"""What each command of the command line does: one call of the API, and what it prints.

Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_ray import files
from dora_ray.errors import ConfigError, DoRAError

if TYPE_CHECKING:
    from dora_ray.config import Config
    from dora_ray.data.ingest import IngestProgress
    from dora_ray.progress import Progress

OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*=")
# A run writes its status at every logged step; after this long without news it has most likely been killed.
SILENT_SECONDS = 300.0


def write(text: str) -> None:
    """To standard output, with a line end."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def write_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, aligned."""
    width = max((len(name) for name in facts), default=0)
    write("\n".join(f"{name:<{width}}  {_plain(value)}" for name, value in facts.items()))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)


def _write_json(path: str | None, content: Any) -> None:
    if path is not None:
        try:
            files.write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and overrides of the form key=value."""
    overrides = [word for word in words if OVERRIDE.match(word)]
    return [word for word in words if word not in overrides], overrides


def _load(words: Sequence[str]) -> Config | None:
    """The configuration that a command's words name; None when they name none."""
    from dora_ray.config import load_config

    names, overrides = _split(words)
    if len(names) > 1:
        raise ConfigError(
            f"{len(names)} recipes or files were given ({', '.join(names)}): "
            "give one, and changes to it as section.key=value"
        )
    if not names and overrides:
        raise ConfigError(
            f"{overrides[0]} changes a configuration, but none was named: "
            "begin with a recipe (paper, released, tiny) or a YAML file"
        )
    return load_config(names[0], *overrides) if names else None


class Stages:
    """Progress of one stage after the other: the first update of the next one closes the last."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._title = ""
        self._progress: Progress | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def at(self, title: str, unit: str) -> Progress:
        """The progress of a stage, which begins if it has not."""
        from dora_ray.progress import Progress

        if self._progress is None or title != self._title:
            self._stack.close()
            self._progress = self._stack.enter_context(Progress(title, unit=unit))
            self._title = title
        return self._progress

    def ingest(self, state: IngestProgress) -> None:
        """Of an ingest."""
        rate = state.done_frames / state.seconds if state.seconds else None
        self.at("ingest", "segments").update(
            step=state.done_segments, total=state.segments, frames_per_second=rate, missing=state.missing or None
        )

    def train(self, num_steps: int) -> Callable[[dict[str, Any]], None]:
        """Of a training, from its lines of metrics."""

        def update(line: dict[str, Any]) -> None:
            wait, seconds = line.get("data_wait_seconds"), line.get("step_seconds")
            self.at("train", "steps").update(
                step=line["step"],
                total=num_steps,
                loss=line.get("loss"),
                clips_per_second=line.get("clips_per_second"),
                data_wait=wait / seconds if wait is not None and seconds else None,
                knn=line.get("knn"),
            )

        return update


def run_train(options: argparse.Namespace) -> None:
    """Train, or say what training would do."""
    from dora_ray.config import load_config
    from dora_ray.training.launch import dry_run, saved_config, train

    names, overrides = _split(options.words)
    if options.resume and not names:
        if options.out is None:
            raise ConfigError("--resume needs the run to go on with: --out DIR")
        config = load_config(saved_config(files.absolute(options.out)), *overrides)
    else:
        found = _load(options.words)
        if found is None:
            raise ConfigError(
                "no configuration was given: name a recipe (paper, released, tiny) or a YAML file, "
                "such as `dora-ray train tiny`"
            )
        config = found
    if options.dry_run:
        write(dry_run(config, out=options.out, resume=options.resume, overwrite=options.overwrite))
        return
    with Stages() as stages:
        run = train(
            config,
            out=options.out,
            resume=options.resume,
            overwrite=options.overwrite,
            on_metrics=stages.train(config.optim.steps),
            on_ingest=stages.ingest,
        )
    shown = ("step", "loss", "object_agreement", "local_agreement", "knn", "clips_per_second")
    write_facts(
        {"run": run.path, "checkpoint": run.checkpoint}
        | {name: run.metrics[name] for name in shown if name in run.metrics}
    )
    write(f"\nNext: dora-ray report {run.path}; dora-ray export {run.path} --out DIR; dora-ray show {run.path} VIDEO")


def run_sweep(options: argparse.Namespace) -> None:
    """Run a sweep and print its best point."""
    from dora_ray.tuning.report import answer
    from dora_ray.tuning.space import expand, load_sweep
    from dora_ray.tuning.sweep import sweep

    spec = load_sweep(options.file, *options.overrides)
    total = len(expand(spec))
    ended: list[str] = []
    with Stages() as stages:

        def on_trial(name: str, status: str) -> None:
            ended.append(name)
            stages.at("sweep", "trials").update(step=len(ended), total=total, last=f"{name} {status}")

        result = sweep(options.file, *options.overrides, out=options.out, resume=options.resume, on_trial=on_trial)
    counts = {status: sum(row.status == status for row in result.results) for status in ("done", "stopped", "failed")}
    tally = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    write_facts(
        {
            "sweep": result.path,
            "trials": tally,
            "table": files.join(result.path, "results.csv"),
            "report": files.join(result.path, "report.html"),
        }
    )
    write("\n" + answer(result.results, spec))


def run_eval(options: argparse.Namespace) -> None:
    """Evaluate an encoder and print the results."""
    from dora_ray.config_source import parse_override
    from dora_ray.evaluation import evaluate

    settings = dict(parse_override(word) for word in options.options)
    result = evaluate(options.checkpoint, options.task, data=options.data, **settings)
    _write_json(options.json, result)
    write_facts(
        {"task": result["task"], "checkpoint": result["checkpoint"], "data": result["data"], **result["results"]}
    )


def run_data_index(options: argparse.Namespace) -> None:
    """Print what one pass over each video tells."""
    from dora_ray.data.store import load_index
    from dora_ray.data.video import find_videos, index_video

    rows: list[dict[str, Any]] = []
    for path in find_videos(options.videos):
        index = load_index(path, store=options.store) if options.store else index_video(path)
        facts = {
            "video": index.path,
            "codec": index.codec,
            "size": f"{index.width}x{index.height}",
            "rotation": index.rotation,
            "color": index.pixel_format,
            "frames": len(index.pts),
            "key_frames": len(index.key_pts),
            "frames_per_second": round(float(index.average_rate), 3),
            "seconds": round(float(index.real_seconds), 3),
            "declared_seconds": round(float(index.declared_seconds), 3),
            "warnings": list(index.warnings),
        }
        if rows:
            write("")
        write_facts(facts)
        rows.append(facts)
    _write_json(options.json, rows)


def run_data_ingest(options: argparse.Namespace) -> None:
    """Bring videos into a frame store."""
    from dora_ray.config import load_config
    from dora_ray.data.ingest import ingest
    from dora_ray.training.cluster import connect

    videos, overrides = _split(options.words)
    if not videos:
        raise ConfigError("no video was given: name files, folders, globs or URIs")
    config = load_config(options.recipe, *overrides)
    data = config.data
    with Stages() as stages, connect(config):
        stored = ingest(
            videos,
            store=options.store,
            decoder=data.decoder,
            frames_per_second=data.frames_per_second,
            short_side=data.short_side,
            jpeg_quality=data.jpeg_quality,
            segment_seconds=data.segment_seconds,
            progress=stages.ingest,
        )
    write_facts(
        {"store": files.absolute(options.store)} | {video.path: f"{len(video.times)} frames" for video in stored}
    )


def run_synth_video(options: argparse.Namespace) -> None:
    """Make a video."""
    from dora_ray.data.synthetic import make_video

    width, height = options.size
    if width % 2 or height % 2 or width < 80 or height < 2:
        raise ConfigError(f"--size {width}x{height}: both must be even, and the width at least 80")
    num_frames = round(options.seconds * options.fps)
    if not 2 <= num_frames <= 65536:
        raise ConfigError(
            f"--seconds {options.seconds:g} --fps {options.fps:g} are {num_frames} frames: 2 to 65536 can be made"
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


def run_synth_photos(options: argparse.Namespace) -> None:
    """Make labeled images."""
    from dora_ray.data.synthetic import make_photo_classes

    _refuse_existing(options.out)
    names = make_photo_classes(options.out, seed=options.seed)
    write_facts({"folder": options.out, "classes": names})


def _refuse_existing(path: str) -> None:
    if Path(path).exists():
        raise ConfigError(f"{path} exists already: give another name")


def run_show(options: argparse.Namespace) -> None:
    """Draw what a teacher sees."""
    from dora_ray.evaluation.pictures import show

    out = options.out or _pictures_of(options.checkpoint)
    chosen = {"num_clips": options.clips, "seed": options.seed}
    result = show(
        options.checkpoint,
        options.video,
        out=out,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    write("\n".join([*result["pictures"], *result["movies"]]))


def _pictures_of(checkpoint: str) -> str:
    """Where the report of the checkpoint's run looks for pictures; for any other folder, `pictures` here."""
    if "checkpoints" in files.list_names(checkpoint) and not files.is_remote(checkpoint):
        return files.join(checkpoint, "pictures")
    return "pictures"


def run_export(options: argparse.Namespace) -> None:
    """Export an encoder."""
    from dora_ray.weights import export

    write(str(export(options.checkpoint, options.out)))


def run_report(options: argparse.Namespace) -> None:
    """Write a report."""
    from dora_ray.tuning.report import report

    write(str(report(options.path)))


def run_config(options: argparse.Namespace) -> None:
    """Print a configuration with its meanings, or the schema."""
    from dora_ray.config import Config

    if options.schema:
        write(json.dumps(Config.model_json_schema(), indent=2))
        return
    config = _load(options.words or ["paper"])
    assert config is not None
    write("\n".join(_explained(config)))


def _explained(config: Config) -> Iterable[str]:
    """YAML that `load_config` reads back, each key under a comment with its meaning."""
    for section, values in config.model_dump(mode="json").items():
        part = getattr(config, section)
        yield f"{section}:  # {(type(part).__doc__ or '').strip()}"
        for key, value in values.items():
            meaning = type(part).model_fields[key].description or ""
            yield f"  {key}: {json.dumps(value)}  # {' '.join(meaning.split())}"


def run_bench(options: argparse.Namespace) -> None:
    """Measure, and print what was measured."""
    from importlib import import_module

    result = import_module(f"dora_ray.bench.{options.what}").run(quick=options.quick)
    _write_json(options.json, result)
    write_facts(result)


def run_status(options: argparse.Namespace) -> None:
    """Print a run's status.json, and say so when nothing has been heard for long."""
    path = files.join(options.run, "status.json")
    if not files.exists(path):
        raise ConfigError(
            f"{options.run} has no status.json: it is not a run's folder, or its workers have not started yet"
        )
    try:
        status = dict(json.loads(files.read_text(path)))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): the run writes it again at its next step") from error
    age = time.time() - float(status.pop("time", time.time()))
    _write_json(options.json, status)
    write_facts(
        {
            "run": files.absolute(options.run),
            **{name: value for name, value in status.items() if value is not None},
            "written": f"{age:.0f} s ago",
        }
    )
    if status.get("state") == "running" and age > SILENT_SECONDS:
        write(
            f"\nNothing has been heard for {age:.0f} s: the run was probably killed. "
            f"Go on with: dora-ray train --resume --out {options.run}"
        )


def run_doctor(options: argparse.Namespace) -> None:
    """Check this machine."""
    from dora_ray.doctor import examine

    findings = examine()
    marks = {True: "ok     ", False: "PROBLEM", None: "-      "}
    write("\n".join(f"{marks[finding.good]}  {finding.name:<14} {finding.text}" for finding in findings))
    wrong = [finding for finding in findings if finding.good is False]
    if wrong:
        write("\n" + "\n".join(f"{finding.name}: {finding.remedy}" for finding in wrong))
        raise DoRAError(
            f"{len(wrong)} problem{'s' * (len(wrong) > 1)} found: {', '.join(finding.name for finding in wrong)}"
        )
