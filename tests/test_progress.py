"""The two displays: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import types

import pytest
from rich.console import Console

from dora_ray.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=160)


@pytest.fixture
def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dora_ray.progress")


def test_terminal_shows_a_bar_and_logs_nothing(terminal, clock, caplog):
    with Progress("train", unit="steps", console=terminal, clock=clock) as progress:
        progress.update(step=10, total=3000, loss=5.25)
        clock.now += 20
        progress.update(step=20, total=3000, loss=5.125, clips_per_second=1234.56, data_wait=0.034)
    shown = terminal.file.getvalue()
    assert "train" in shown
    assert "━" in shown
    assert "20/3,000 steps (1%), loss 5.1250, 1,234.6 clips/s, data wait 3%, ETA 1:39:20" in shown
    assert caplog.messages == []


def test_a_notebook_has_one_line_that_changes(monkeypatch, clock, caplog):
    shown: list[str] = []

    class Handle:
        def update(self, data, *, raw):
            shown.append(data["text/plain"])

    display = types.SimpleNamespace(display=lambda data, *, raw, display_id: Handle())
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    with Progress("train", unit="steps", console=notebook, clock=clock) as progress:
        progress.say("starting 2 workers")
        clock.now += 1
        progress.update(step=10, total=20)
    assert shown == ["train: starting 2 workers", "train: 10/20 steps (50%)"]
    assert notebook.file.getvalue() == ""
    assert caplog.messages == []


def test_words_are_shown_at_once_where_nothing_can_be_counted(terminal, pipe, clock, caplog):
    for console in (terminal, pipe):
        with Progress("train", unit="steps", console=console, clock=clock) as progress:
            progress.say("starting 2 workers")
            progress.say("starting 2 workers")
            progress.say("reading the first clips")
    assert "starting 2 workers" in terminal.file.getvalue()
    assert caplog.messages == ["train: starting 2 workers", "train: reading the first clips"]


def test_terminal_is_redrawn_at_most_ten_times_a_second_and_at_the_end(terminal, clock):
    with Progress("train", unit="steps", console=terminal, clock=clock) as progress:
        progress.update(step=1, total=9)
        for step in range(2, 9):
            clock.now += 0.01
            progress.update(step=step, total=9)
        drawn = terminal.file.getvalue()
        assert "1/9" in drawn
        assert "8/9" not in drawn
    assert "8/9" in terminal.file.getvalue()


def fail_at_step_two(console: Console, error: BaseException) -> None:
    with Progress("train", unit="steps", console=console) as progress:
        progress.update(step=1, total=9)
        progress.update(step=2, total=9)
        raise error


def test_terminal_restores_its_cursor_after_an_error(terminal):
    with pytest.raises(KeyboardInterrupt):
        fail_at_step_two(terminal, KeyboardInterrupt())
    shown = terminal.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_unknown_total_has_neither_share_nor_remaining_time(terminal, clock):
    with Progress("ingest", unit="segments", console=terminal, clock=clock) as progress:
        progress.update(step=10, total=None)
        clock.now += 1
        progress.update(step=20, total=None, frames_per_second=88.0)
    shown = terminal.file.getvalue()
    assert "20 segments, 88.0 frames/s" in shown
    assert "ETA" not in shown


def test_square_brackets_are_not_taken_for_markup(terminal):
    with Progress("[train]", unit="steps", console=terminal) as progress:
        progress.update(step=1, total=2, clip="[red]")
    assert "[train]" in terminal.file.getvalue()
    assert "clip [red]" in terminal.file.getvalue()


def test_pipe_logs_at_most_every_ten_seconds_and_the_last_state(pipe, clock, caplog):
    with Progress("train", unit="steps", console=pipe, clock=clock) as progress:
        for step in range(1, 26):
            progress.update(step=step, total=100, loss=float(step))
            clock.now += 1
        assert [message.split("/")[0] for message in caplog.messages] == ["train: 1", "train: 11", "train: 21"]
    assert caplog.messages[-1] == "train: 25/100 steps (25%), loss 25.0000, ETA 0:01:15"
    assert len(caplog.messages) == 4
    assert pipe.file.getvalue() == ""


def test_pipe_does_not_repeat_the_last_line(pipe, clock, caplog):
    with Progress("train", unit="steps", console=pipe, clock=clock) as progress:
        progress.update(step=1, total=1)
    assert caplog.messages == ["train: 1/1 steps (100%)"]


def test_pipe_logs_the_last_state_when_the_job_fails(pipe, caplog):
    with pytest.raises(OSError, match="disk"):
        fail_at_step_two(pipe, OSError("disk"))
    assert caplog.messages[-1].startswith("train: 2/9")


def test_dumb_terminal_gets_log_lines(monkeypatch, caplog):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress("train", unit="steps", console=console) as progress:
        progress.update(step=1, total=2)
    assert caplog.messages == ["train: 1/2 steps (50%)"]
    assert console.file.getvalue() == ""


def test_nothing_is_shown_without_an_update(pipe, caplog):
    with Progress("train", unit="steps", console=pipe):
        pass
    assert caplog.messages == []


def test_remaining_time_counts_from_the_step_resumed_at(pipe, clock, caplog):
    with Progress("train", unit="steps", console=pipe, clock=clock) as progress:
        progress.update(step=1000, total=1100)
        clock.now += 10
        progress.update(step=1010, total=1100)
    assert caplog.messages[-1].endswith("ETA 0:01:30")


def test_remaining_time_starts_anew_after_a_step_back(pipe, clock, caplog):
    with Progress("train", unit="steps", console=pipe, clock=clock) as progress:
        progress.update(step=50, total=100)
        clock.now += 500
        progress.update(step=40, total=100)
        clock.now += 10
        progress.update(step=50, total=100)
    assert caplog.messages[1] == "train: 40/100 steps (40%)"
    assert caplog.messages[2].endswith("ETA 0:00:50")


def test_remaining_time_follows_the_recent_speed(pipe, clock, caplog):
    with Progress("train", unit="steps", console=pipe, clock=clock) as progress:
        progress.update(step=0, total=1000)
        clock.now += 10_000
        for step in range(1, 201):
            clock.now += 1
            progress.update(step=step, total=1000)
    assert caplog.messages[-1].endswith("ETA 0:13:20")


def test_other_fields_are_named_and_empty_ones_left_out(pipe, caplog):
    with Progress("ingest", unit="segments", console=pipe) as progress:
        progress.update(step=0, total=0, loss=None, bad_segments=2, mask_area=0.123456, video="a.mp4")
    assert caplog.messages == ["ingest: 0/0 segments, bad segments 2, mask area 0.1235, video a.mp4"]


def test_import_is_light():
    code = "import sys, dora_ray.progress; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
