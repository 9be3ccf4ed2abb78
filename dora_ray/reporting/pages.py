"""Write report.html of a run or sweep: a single self-contained file that opens anywhere, offline."""

from __future__ import annotations

import os
from pathlib import Path

from dora_ray import files
from dora_ray.errors import ConfigError
from dora_ray.reporting.run_page import run_page
from dora_ray.reporting.summary import summarize
from dora_ray.reporting.sweep_page import sweep_page
from dora_ray.tuning.results import read_csv

PAGE = "report.html"


def report(path: str | os.PathLike[str]) -> Path:
    """Write report.html into the folder of a run or sweep; for a sweep also report.md and a page for each trial.

    Args:
        path: local folder or URI.

    Returns:
        Path of report.html.

    Raises:
        ConfigError: the folder is neither a run nor a sweep.
    """
    folder = files.absolute(path)
    if files.exists(files.join(folder, "sweep.yaml")):
        _write_trials(folder)
        html = sweep_page(folder)
        files.write_text(files.join(folder, "report.md"), summarize(folder))
    elif files.exists(files.join(folder, "config.yaml")) or files.exists(files.join(folder, "metrics.jsonl")):
        html = run_page(folder)
    else:
        found = ", ".join(files.list_names(folder)[:6]) or "nothing"
        raise ConfigError(
            f"{folder} is neither a run nor a sweep: it holds {found}. "
            "Give a folder written by `dora-ray train` or `dora-ray sweep`."
        )
    target = files.join(folder, PAGE)
    files.write_text(target, html)
    return Path(target)


def _write_trials(folder: str) -> None:
    """Write the missing pages of ended trials."""
    table = files.join(folder, "results.csv")
    for row in read_csv(table) if files.exists(table) else []:
        run = files.join(folder, row.path)
        names = files.list_names(run) if row.status != "missing" else []
        if "metrics.jsonl" in names and PAGE not in names:
            files.write_text(files.join(run, PAGE), run_page(run))
