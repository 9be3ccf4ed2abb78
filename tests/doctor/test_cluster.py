"""Doctor's findings about a cluster's nodes, from invented facts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dora_ray.cluster.nodes import NodeFacts
from dora_ray.doctor import cluster
from dora_ray.doctor.finding import Finding

GIB = 2**30


def node(name: str, **facts: object) -> NodeFacts:
    usual: dict[str, object] = {
        "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1"},
        "shm_bytes": 8 * GIB,
        "object_store_bytes": 2 * GIB,
        "free_bytes": {"/tmp": 50 * GIB},
    }
    return NodeFacts(name, **{**usual, **facts})


def checks(*nodes: NodeFacts) -> dict[str, Finding]:
    return {finding.name: finding for finding in cluster.compare(nodes)}


def test_equal_nodes_have_no_problem():
    found = checks(node("head 10.0.0.1"), node("decode 10.0.0.2"))
    assert not [finding for finding in found.values() if finding.good is False]
    assert "ray 2.60.0" in found["versions"].text


@pytest.mark.parametrize(
    ("name", "facts", "says"),
    [
        (
            "versions",
            {"versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}},
            "2.13.0 on decode 10.0.0.2",
        ),
        ("versions", {"versions": {"python": "3.11.7", "ray": "2.60.0", "torch": None}}, "none on decode 10.0.0.2"),
        ("GPUs", {"gpu_files": 4}, "decode 10.0.0.2: 4 GPUs, torch uses none"),
        ("object store", {"shm_bytes": GIB // 16}, "/dev/shm 0.1 GiB, object store 2.0 GiB"),
        ("disks", {"free_bytes": {"/tmp": GIB}}, "decode 10.0.0.2: 1.0 GiB at /tmp"),
        ("storage", {"unreachable": {"/mnt/walk.mp4": "there is no such file"}}, "decode 10.0.0.2: /mnt/walk.mp4"),
        ("clocks", {"clock_seconds": -40.0}, "decode 10.0.0.2: -40.0 s"),
        ("nodes", {"problem": "no answer within 120 s"}, "decode 10.0.0.2: no answer"),
    ],
)
def test_the_node_that_differs_is_named_with_what_to_do(name, facts, says):
    found = checks(node("head 10.0.0.1"), node("decode 10.0.0.2", **facts))
    assert found[name].good is False
    assert says in found[name].text
    assert found[name].remedy
    others = [finding.name for finding in found.values() if finding.good is False and finding.name != name]
    assert others == []


def test_a_clock_is_not_blamed_for_a_slow_answer():
    assert checks(node("head", clock_seconds=3.0, clock_error=2.0))["clocks"].good


def test_two_versions_of_nccl_do_not_go_together():
    found = checks(*(node(f"train {n}", gpus=("H100",), gpu_files=1, nccl=f"2.2{n}.0") for n in (7, 8)))
    assert found["GPUs"].good is False
    assert "2.27.0, 2.28.0" in found["GPUs"].text


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize(("status", "good"), [(401, True), (403, True), (200, False)])
def test_the_dashboard_has_to_ask_for_the_token(server, status, good):
    server.status = status
    found = cluster._dashboard(f"127.0.0.1:{server.server_port}")
    assert found.good is good
    assert str(status) in found.text


def test_a_dashboard_on_the_network_is_a_problem(monkeypatch):
    monkeypatch.setattr(cluster, "_ask", lambda url: 401)
    found = cluster._dashboard("10.0.0.1:8265")
    assert found.good is False
    assert "--dashboard-host=127.0.0.1" in found.remedy
