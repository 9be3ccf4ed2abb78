"""Commands as jobs: the command line, the log, and the exit status, with a fake client."""

from __future__ import annotations

import argparse
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from dora_ray.cluster import jobs
from dora_ray.commands.submit import Log
from dora_ray.errors import ClusterError, ConfigError


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train", "tiny", "--out", "s3://b/run"], ["train", "tiny", "--out", "s3://b/run", "--resume"]),
        (["train", "tiny", "--out=s3://b/run"], ["train", "tiny", "--out=s3://b/run", "--resume"]),
        (["train", "tiny", "--out", "s3://b/r", "--overwrite"], ["train", "tiny", "--out", "s3://b/r", "--overwrite"]),
        (["train", "tiny", "--resume", "--out", "s3://b/r"], ["train", "tiny", "--resume", "--out", "s3://b/r"]),
        (["train", "tiny"], ["train", "tiny", "--out", "~/dora-ray/runs/job", "--resume"]),
        (["train", "tiny", "--dry-run"], ["train", "tiny", "--dry-run"]),
        (["bench", "step", "--quick"], ["bench", "step", "--quick"]),
    ],
)
def test_a_training_can_be_submitted_again(words, command):
    assert jobs.prepare_command(words, name="job") == ["dora-ray", *command]


def test_a_folder_of_the_cluster_alone_is_warned_of(caplog):
    jobs.prepare_command(["train", "tiny", "--out", "runs/a"], name="job")
    assert "All of them must share it" in caplog.text
    caplog.clear()
    jobs.prepare_command(["train", "tiny", "--out", "s3://b/a"], name="job")
    assert caplog.text == ""


class Client:
    """Fake jobs API with one job; each tail is a connection, which ends where it says."""

    def __init__(self, tails: list[str | Exception], status: str, code: int | None) -> None:
        self.tails, self.status, self.code = tails, status, code

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        tail = self.tails.pop(0)
        if isinstance(tail, Exception):
            raise tail
        for part in tail.split("|"):
            if part == "!":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield part

    def get_job_info(self, name: str) -> Any:
        ended = not self.tails
        status = type("Status", (str,), {"is_terminal": lambda _: ended})(self.status)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="no such image")


def jobs_with(client: Client) -> jobs.Jobs:
    found = object.__new__(jobs.Jobs)
    found.address, found._client = "http://127.0.0.1:8265", client
    return found


def test_a_log_is_shown_once_though_the_connection_breaks(monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0)
    client = Client(["one\n|tw|!", OSError("tunnel closed"), "one\n|two\n|three\n"], "SUCCEEDED", 0)
    shown: list[str] = []
    assert jobs_with(client).follow("job", shown.append) == 0
    assert "".join(shown) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("status", "code", "ends"),
    [("SUCCEEDED", 0, 0), ("FAILED", 5, 5), ("FAILED", 130, 130), ("FAILED", -9, 137), ("STOPPED", None, 1)],
)
def test_the_status_is_the_commands(status, code, ends):
    assert jobs_with(Client([""], status, code)).follow("job", print) == ends


def test_a_head_that_stays_away_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0)
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0)
    with pytest.raises(ClusterError, match="submit the same command to a new cluster"):
        jobs_with(Client([OSError("gone")] * 1000, "RUNNING", None)).follow("job", print)


def test_a_head_whose_agent_still_starts_is_asked_again(monkeypatch, tmp_path):
    answers = [RuntimeError("Request failed with status code 500: No available agent to submit job"), "walk"]
    asked = []

    class Starting:
        def submit_job(self, **job):
            asked.append(job["submission_id"])
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer

    found = jobs.Jobs.__new__(jobs.Jobs)
    found.address, found._client = "http://127.0.0.1:1", Starting()
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0.0)
    found.submit(["dora-ray", "doctor"], name="walk", working_dir=str(tmp_path))
    assert asked == ["walk", "walk"]
    answers[:] = [RuntimeError("No available agent")]
    monkeypatch.setattr(jobs, "LOST_SECONDS", -1.0)
    with pytest.raises(ClusterError, match="No available agent"):
        found.submit(["dora-ray", "doctor"], name="walk", working_dir=str(tmp_path))


def test_a_home_folder_is_not_uploaded(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="not a project folder"):
        jobs_with(Client([], "", None)).submit(["dora-ray"], name="job", working_dir="~")


def test_on_a_terminal_progress_stays_on_one_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "run begins\ntrain: 10/400 steps (2%), loss 3.1\ntrain: 20/400 steps (5%), loss 3.0\ndone\n"
    for screen, lines in ((Terminal(), 3), (io.StringIO(), 4)):
        monkeypatch.setattr("sys.stdout", screen)
        log = Log()
        for start in range(0, len(text), 7):
            log.show(text[start : start + 7])
        assert screen.getvalue().count("\n") == lines - isinstance(screen, Terminal)
        assert screen.getvalue().endswith("done\n")


def test_its_own_options_may_stand_anywhere():
    from dora_ray.cli import _parse
    from dora_ray.commands.arguments import submit_options

    for line in ("submit --address u train tiny --out o", "submit train tiny --out o --address u"):
        options = _parse(line.split())
        again = submit_options(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        options, words = again.parse_known_args(options.words, options)
        assert (options.address, words, options.no_wait) == ("u", ["train", "tiny", "--out", "o"], False)
