"""cluster.yaml: what `ray up` checks before it talks to a cloud, and the promises of its first comment."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from dora_ray import spot
from dora_ray.training.elastic.requests import LEAVE_SECONDS

PATH = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster():
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_it(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    limits = {
        name: (node["min_workers"], node["max_workers"]) for name, node in prepared["available_node_types"].items()
    }
    assert limits["head"] == (0, 0)
    assert sum(most for _, most in limits.values()) <= prepared["max_workers"]


def _set(*path, value):
    def change(config):
        for part in path[:-1]:
            config = config[part]
        config[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("unknown", value=1),
        _set("available_node_types", "train", "labels", value={"role": 1}),
        _set("available_node_types", "train", "resources", value={"CPU": 0.5}),
        _set("available_node_types", "train", "min_workers", value=99),
        _set("head_node_type", value="nowhere"),
        _set("provider", "use_internal_ips", value="yes"),
    ],
)
def test_rays_check_catches_mistakes(cluster, change):
    """The check above is worth something only if it fails on a file that is wrong."""
    change(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(cluster))


def test_the_head_takes_no_work_and_is_never_reclaimed(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_decode_and_training_nodes_are_spot_and_labeled(cluster):
    nodes = cluster["available_node_types"]
    for name in ("decode", "train"):
        assert nodes[name]["labels"]["role"] == name
        assert nodes[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert nodes[name]["min_workers"] == 0
        assert nodes[name]["max_workers"] >= 1


def test_every_ray_process_asks_for_the_token(cluster):
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in cluster[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line.partition("ray start")[0] for line in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_dashboard_listens_on_loopback_only(cluster):
    (head,) = (line for line in cluster["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in PATH.read_text()


def test_a_stopped_job_has_time_to_save(cluster):
    """More than Ray Train's controller waits for the workers. A job's supervisor has the environment of the head."""
    (head,) = (line for line in cluster["head_start_ray_commands"] if "ray start" in line)
    (seconds,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+) ", head.partition("ray start")[0])
    assert int(seconds) > LEAVE_SECONDS + 5


def test_every_spot_node_watches_for_the_notice(cluster, monkeypatch):
    """With the words of the file, but a provider that has given its notice already; and not on the head."""
    (line,) = (line for line in cluster["worker_start_ray_commands"] if "-m dora_ray.spot" in line)
    assert "RAY_AUTH_MODE=token" in line
    assert line.rstrip().endswith("&"), "`ray up` waits for the command's end"
    words = shlex.split(line.partition("-m dora_ray.spot")[2].partition(">")[0])
    seen = []
    monkeypatch.setattr(spot, "wait_for_notice", lambda look, *, poll_seconds: spot.Notice(5.0))
    monkeypatch.setattr(spot, "drain_until_accepted", lambda *arguments: seen.append(arguments))
    assert spot.main(words) == 0
    assert seen == [("$RAY_HEAD_IP:6379", None, spot.Notice(5.0))]
    assert not any("dora_ray.spot" in line for line in cluster["head_start_ray_commands"])


def test_nothing_is_opened_to_the_world(cluster):
    assert cluster["provider"]["use_internal_ips"] is True
    assert "security_group" not in cluster["provider"], "rules there come on top of Ray's own, which opens SSH"
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"], (
            "without its own group, Ray makes one that opens SSH to the world"
        )
        assert node["node_config"]["IamInstanceProfile"], "without it Ray gives the head full rights to EC2 and S3"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
