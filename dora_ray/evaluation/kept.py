"""Keep evaluations with the run whose encoder they are of: a line of JSON each, in its evaluations.jsonl."""

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
_RUN_MARK = "config.yaml"  # what makes a folder a run's


def run_of(checkpoint: str) -> str | None:
    """Return the folder of the run that a resolved checkpoint belongs to; None for an export or other weights."""
    path = PurePosixPath(checkpoint)
    if path.parent.name != CHECKPOINTS:
        return None
    run = checkpoint.removesuffix(f"/{CHECKPOINTS}/{path.name}")
    return run if files.exists(files.join(run, _RUN_MARK)) else None


def keep(evaluation: dict[str, Any]) -> str | None:
    """Add an evaluation to its run's file; a run that cannot be written is only warned of.

    Args:
        evaluation: As `evaluate` returns it.

    Returns:
        The file; None where there is no run, or it cannot be written.
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
        logger.warning("the evaluation is not kept: %s cannot be written (%s)", path, error.strerror or error)
        return None
    return path


def read_evaluations(run: str) -> list[dict[str, Any]]:
    """Return a run's evaluations, oldest first; lines that were cut off are left out."""
    path = files.join(run, EVALUATIONS)
    found = []
    for line in files.read_text(path).splitlines() if files.exists(path) else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            logger.warning("%s holds a line that was cut off; it is left out", path)
    return found
