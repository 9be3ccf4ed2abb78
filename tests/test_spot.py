"""The spot watcher: against servers that speak as the clouds do, and against a real Ray cluster of two nodes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dora_ray import spot
from dora_ray.errors import ClusterError


class Metadata(BaseHTTPRequestHandler):
    """The two clouds' metadata services, and a URL of one's own; `server.notice` is what they announce."""

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        if self.path != "/latest/api/token" or not seconds or not 1 <= int(seconds) <= 21600:
            self._answer(400)
            return
        self.server.token = f"token-{time.monotonic_ns()}"
        self._answer(200, self.server.token)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/latest/meta-data/spot/instance-action":
            self._aws()
        elif self.path == "/computeMetadata/v1/instance/preempted":
            allowed = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if allowed else 403, "TRUE" if self.server.notice else "FALSE")
        elif self.path == "/mine" and self.server.notice is not None:
            self._answer(200, self.server.notice)
        else:
            self._answer(404)

    def _aws(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != self.server.token:
            self._answer(401)
        elif self.server.notice is None:
            self._answer(404)
        else:
            self._answer(200, self.server.notice)

    def _answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.token, server.notice, server.asked = "none yet", None, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_aws_announces_the_time(metadata):
    look = spot.aws(metadata.url)
    assert look() is None
    deadline = int(time.time()) + 120
    when = datetime.fromtimestamp(deadline, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata.notice = json.dumps({"action": "terminate", "time": when})
    assert look() == spot.Notice(deadline)


def test_aws_token_is_renewed_when_it_is_refused(metadata):
    look = spot.aws(metadata.url)
    assert look() is None
    metadata.token = "another one"
    assert look() is None
    assert metadata.token != "another one"


def test_gcp_announces_thirty_seconds(metadata):
    look = spot.gcp(metadata.url)
    assert look() is None
    metadata.notice = "TRUE"
    notice = look()
    assert notice is not None
    assert notice.deadline - time.time() == pytest.approx(30, abs=3)


@pytest.mark.parametrize(("text", "seconds"), [("", 30), ("45.5\n", 45.5), ("0", 0)])
def test_a_file_and_a_url_announce_seconds(metadata, tmp_path, text, seconds):
    for look in (spot.from_url(f"{metadata.url}/mine"), spot.from_file(str(tmp_path / "notice"))):
        assert look() is None
    (tmp_path / "notice").write_text(text)
    metadata.notice = text
    for look in (spot.from_url(f"{metadata.url}/mine"), spot.from_file(str(tmp_path / "notice"))):
        notice = look()
        assert notice is not None
        assert notice.deadline - time.time() == pytest.approx(seconds, abs=3)


def test_no_proxy_is_asked_about_this_machine(metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert spot.gcp(metadata.url)() is None
    assert metadata.asked


def test_only_a_notice_ends_the_watch(metadata, caplog):
    """A provider that is not there, and one that talks nonsense, have announced nothing; both are told once."""
    answers = iter([ValueError("?"), OSError("unreachable"), None, json.JSONDecodeError("?", "", 0), spot.Notice(5.0)])

    def look() -> spot.Notice | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING):
        assert spot.wait_for_notice(look, poll_seconds=0) == spot.Notice(5.0)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("provider", ["aws", "gcp", "from_url"])
def test_an_unreachable_provider_raises_what_the_watch_survives(provider):
    with pytest.raises(OSError, match="refused"):
        getattr(spot, provider)("http://127.0.0.1:9")()


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "{}"])
def test_a_notice_that_says_nonsense_is_none(tmp_path, text):
    (tmp_path / "notice").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        spot.from_file(str(tmp_path / "notice"))()


def test_draining_is_tried_until_the_deadline(monkeypatch, caplog):
    """Ray's control plane may be away for a moment, just then."""
    calls = []

    def refuse_twice(address: str, node_id: str, *, seconds: float, reason: str) -> None:
        calls.append(seconds)
        if len(calls) < 3:
            raise ClusterError("no answer")

    monkeypatch.setattr(spot, "drain", refuse_twice)
    monkeypatch.setattr(spot, "RETRY_SECONDS", 0.01)
    spot.drain_until_accepted("head:1", "abc", spot.Notice(time.time() + 60))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(ClusterError, match="no answer"):
        spot.drain_until_accepted("head:1", "abc", spot.Notice(time.time() - 1))
    assert len(calls) == 1


def test_the_watcher_is_light():
    """It runs on every node all the time: neither torch nor ray before there is a notice."""
    program = "import sys, dora_ray.spot; sys.exit(str([n for n in ('torch', 'ray', 'numpy') if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_a_source_is_needed_where_none_is_known():
    with pytest.raises(SystemExit) as caught:
        spot.main(["--provider", "file", "--address", "head:1"])
    assert caught.value.code == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_notice_drains_this_node_and_no_other(tmp_path):

    from dora_ray.chaos.nodes import LocalNodes

    with LocalNodes(2) as nodes:
        mine, other = nodes.node_ids()
        words = ["--provider", "file", "--source", str(tmp_path / "notice"), "--poll-seconds", "0.2"]
        watcher = subprocess.Popen(
            [sys.executable, "-m", "dora_ray.spot", *words, "--address", nodes.address, "--node-id", mine],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            time.sleep(3)
            assert watcher.poll() is None, "no notice, no end"
            assert nodes.draining() == {}
            (tmp_path / "notice").write_text("100")
            _, said = watcher.communicate(timeout=60)
        finally:
            watcher.kill()
        assert watcher.returncode == 0, said
        assert "drained: this node will be terminated in" in said
        # An idle node ends itself once it is drained, so it may be gone already.
        assert mine in nodes.draining() or mine not in nodes.node_ids(alive=True)
        assert other not in nodes.draining()
        assert other in nodes.node_ids(alive=True)
        with pytest.raises(ClusterError, match="give --node-id"):  # the head is at the same address
            spot.find_node(nodes.address)


@pytest.mark.ray
def test_what_is_no_id_of_a_node_is_refused():
    """Ray accepts it and drains nothing."""
    with pytest.raises(ClusterError, match="56 hexadecimal digits"):
        spot.drain("127.0.0.1:9", "not hexadecimal", seconds=1, reason="test")


def test_nobody_answers_at_the_address():
    with pytest.raises(ClusterError, match="does not answer: nothing listens there"):
        spot.drain("127.0.0.1:9", "ab" * 28, seconds=1, reason="test")
