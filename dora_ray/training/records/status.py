"""Status of a run, read from its files alone, whether it is alive or dead, local or in an object store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dora_ray import files
from dora_ray.errors import ConfigError
from dora_ray.training.records.heartbeat import is_dead
from dora_ray.training.records.journal import CONFIG, MISSING_FRAMES, STATUS, read_events, read_metrics, read_status

# A run writes at every logged step and when workers stop or start. It was most likely killed if it has been silent for
# this long, and for this many times the interval between its last lines.
SILENT_SECONDS, SILENT_LINES = 300.0, 10.0
# States that only a live process can leave.
UNFINISHED = ("starting", "running", "waiting")
FROM_METRICS = ("step", "world_size", "clips_per_second", "loss")


def summarize(run: str) -> dict[str, Any]:
    """Summarize a run, most important facts first; unknown ones are left out.

    Returns:
        run, state (from status.json: starting, running, done, failed, ...; "dead" in place of an unfinished state if
        the launching process is gone, "silent" in place of "running" if nothing was written for long), step, steps,
        world_size, clips_per_second, loss, attempt, last_checkpoint, last_checkpoint_step, last_checkpoint_seconds (its
        age), failures, resizes, restarts, recovery_seconds (of each restart), steps_lost, missing_frames (of incomplete
        videos), written_seconds (since the last write), error, message.

    Raises:
        ConfigError: the folder holds no run, or its status.json is damaged.
    """
    path = files.absolute(run)
    status = _read_status(path)
    events, metrics, now = read_events(path), read_metrics(path), time.time()
    heard = max([0.0, *(float(line["time"]) for line in [status, *events[-1:], *metrics[-1:]] if "time" in line)])
    silence = now - heard if heard else None
    last = {name: metrics[-1].get(name) for name in FROM_METRICS} if metrics else {}
    known = {**last, **{name: value for name, value in status.items() if value is not None}}
    if known.get("state", "starting") in UNFINISHED:
        if is_dead(path):
            known["state"] = "dead"
        elif known.get("state") == "running" and silence is not None and silence > _patience(metrics):
            known["state"] = "silent"
    facts = {
        "run": path,
        "state": known.pop("state", "starting"),
        **{name: known.get(name) for name in ("step", "steps", *FROM_METRICS[1:], "attempt")},
        **_checkpoint(events, known.get("last_checkpoint"), now),
        **_interruptions(events),
        "missing_frames": missing_frames(events) or None,
        "written_seconds": round(silence, 1) if silence is not None else None,
        **{name: known.get(name) for name in ("error", "message")},
    }
    return {name: value for name, value in facts.items() if value is not None}


def _read_status(path: str) -> dict[str, Any]:
    names = files.list_names(path)
    if STATUS not in names and CONFIG not in names:
        raise ConfigError(
            f"{path} has neither {STATUS} nor {CONFIG}, so it is not a run's folder. Give the run's --out folder, or a "
            "folder below runs/"
        )
    try:
        return read_status(path)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{files.join(path, STATUS)} is damaged ({error}): the run writes it again at its next step"
        ) from error


def _patience(metrics: Sequence[dict[str, Any]]) -> float:
    """Return the longest silence, in seconds, that is normal for this run."""
    between = [metrics[-1]["time"] - metrics[-2]["time"]] if len(metrics) > 1 else []
    return max([SILENT_SECONDS, *(SILENT_LINES * float(seconds) for seconds in between)])


def _checkpoint(events: Sequence[dict[str, Any]], name: str | None, now: float) -> dict[str, Any]:
    """Return the last checkpoint, from its event or, if that line is lost, from the status."""
    written = [line for line in events if line["event"] == "checkpoint"]
    if not written:
        return {"last_checkpoint": name}
    last = written[-1]
    return {
        "last_checkpoint": last.get("name", name),
        "last_checkpoint_step": last["step"],
        "last_checkpoint_seconds": round(now - last["time"], 1),
    }


def missing_frames(events: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each of the run's videos with missing frames."""
    found = {line["video"]: line["missing"] for line in events if line["event"] == MISSING_FRAMES}
    return [f"{video}: {missing}" for video, missing in found.items()]


def _interruptions(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    recovered = [line for line in events if line["event"] == "recovered"]
    return {
        "failures": sum(line["event"] == "failure" for line in events),
        "resizes": sum(line["event"] == "resize" for line in events),
        "restarts": max(0, sum(line["event"] == "start" for line in events) - 1),
        "recovery_seconds": [line["seconds"] for line in recovered],
        "steps_lost": sum(line["steps_lost"] for line in recovered),
    }
