"""Store evaluations in their run's evaluations.jsonl, one line of JSON each."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"
_RUN_MARK = "config.yaml"  # identifies a run's folder


def run_of(checkpoint: str) -> str | None:
    """Return the folder of the run that a resolved checkpoint belongs to; None for an export or other weights."""
    path = PurePosixPath(checkpoint)
    if path.parent.name != CHECKPOINTS:
        return None
    run = checkpoint.removesuffix(f"/{CHECKPOINTS}/{path.name}")
    return run if files.exists(files.join(run, _RUN_MARK)) else None


def keep(evaluation: dict[str, Any]) -> str | None:
    """Append an evaluation to its run's file; log a warning if that fails.

    Args:
        evaluation: Result of `evaluate`.

    Returns:
        The file; None without a run, or if writing failed.
    """
    run = run_of(evaluation["checkpoint"])
    if run is None:
        return None
    path = files.join(run, EVALUATIONS)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        lines = files.LineFile(path)
        lines.append(json.dumps({"time": now, **evaluation}))
        lines.flush()
    except OSError as error:
        logger.warning("the evaluation was not saved: %s cannot be written (%s)", path, error.strerror or error)
        return None
    return path


def read_evaluations(run: str) -> list[dict[str, Any]]:
    """Read a run's evaluations, oldest first; incomplete lines are skipped."""
    path = files.join(run, EVALUATIONS)
    found = []
    for line in files.read_text(path).splitlines() if files.exists(path) else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            logger.warning("%s holds an incomplete line, which is skipped", path)
    return found
