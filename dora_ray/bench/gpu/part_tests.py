"""Part a: the tests marked gpu, with the outcome of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dora_ray.bench.gpu.figures import MOST_CHARACTERS, Figures

# The compiling one takes longest and runs last.
FILES = ("test_method.py", "test_step.py", "test_views.py", "test_graph.py", "test_compile.py")
# A rehearsal skips the largest networks.
SMALL = "equals_the_loop and not large or collective"


class _Recorder:
    """Pytest plugin that records the outcome of every test."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a test's outcome after its call, or after a setup that skips or fails it."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            name = report.nodeid.partition("::")[2]
            value = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.skipped:
                value["reason"] = str(report.longrepr[2])
            elif report.failed:
                value["reason"] = report.longreprtext[-MOST_CHARACTERS:]
            self._figures.put(f"{Path(report.nodeid.partition('::')[0]).stem}.{name}", value)


def run(figures: Figures, *, root: Path, rehearse: bool) -> None:
    """Run the tests.

    Raises:
        RuntimeError: the tests could not be collected.
    """
    if rehearse:
        os.environ["GPU_TESTS_DEVICE"] = "cpu"
    words = ["-m", "gpu", "-p", "no:cacheprovider", "-q", *(["-k", SMALL] if rehearse else [])]
    # The project's settings need pytest plugins that are not installed here.
    settings = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=", "--rootdir", str(root)]
    code = pytest.main(
        [*words, *settings, *(str(root / "tests" / "gpu" / name) for name in FILES)], plugins=[_Recorder(figures)]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}: see the log")
