"""Files that start clusters: Ray's own checks, KubeRay's published fields, closed ports, no secrets, least rights."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.kuberay_schema import RAY_CLUSTER, RAY_JOB

ROOT = Path(__file__).parents[1]
CLOUDS = [ROOT / "cluster.yaml", ROOT / "clusters" / "gcp.yaml"]
RAY_UP = [*CLOUDS, ROOT / "clusters" / "local.yaml"]
KUBERNETES = sorted((ROOT / "clusters").glob("kuberay-*.yaml"))
POLICIES = sorted((ROOT / "clusters").glob("*-policy.json"))
ROLES = sorted((ROOT / "clusters").glob("gcp-*-role.json"))
EVERYTHING = [*RAY_UP, *KUBERNETES, *POLICIES, *ROLES, ROOT / "clusters" / "aws-trust.json"]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> Any:
    (found,) = (one for one in documents(path) if one["kind"] == kind)
    return found


def ray_clusters() -> list[Any]:
    return [
        of_kind(ROOT / "clusters" / "kuberay-cluster.yaml", "RayCluster")["spec"],
        of_kind(ROOT / "clusters" / "kuberay-job.yaml", "RayJob")["spec"]["rayClusterSpec"],
    ]


def name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_accepts_it(path):
    prepared = prepare_config(copy.deepcopy(yaml.safe_load(path.read_text())))
    validate_config(prepared)


@pytest.mark.parametrize("path", CLOUDS, ids=name)
def test_the_clouds_have_the_same_tiers(path):
    cluster = yaml.safe_load(path.read_text())
    nodes = cluster["available_node_types"]
    assert set(nodes) == {"head", "decode", "train"}
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert cluster["head_node_type"] == "head"
    for role, node in nodes.items():
        assert node["labels"]["role"] == role
        assert node.get("min_workers", 0) == 0
    assert cluster["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_every_ray_has_a_token_and_no_public_door(path):
    cluster = yaml.safe_load(path.read_text())
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in cluster[key]]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line.partition("ray start")[0] for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    if path in CLOUDS:
        assert cluster["provider"]["use_internal_ips"] is True
        watchers = [line for line in cluster["worker_start_ray_commands"] if "-m dora_ray.spot" in line]
        assert len(watchers) == 1
        assert "RAY_AUTH_MODE=token" in watchers[0]
    for node in cluster.get("available_node_types", {}).values():
        assert "accessConfigs" not in json.dumps(node), "an access configuration is a public address on Google Cloud"


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_what_is_to_be_edited_is_one_block_at_the_top(path):
    """Placeholders, and machines' own values, are written there alone; the rest refers to them."""
    text = path.read_text()
    before, _, rest = text.partition("\nmetadata:\n")
    block, _, after = rest.partition("\ncluster_name:")
    assert all(line.startswith("#") or not line for line in before.splitlines())
    assert not re.search(r"EDIT|REGISTRY|10\.0\.0\.", after)
    for anchor in re.findall(r"&(\w+)", block):
        assert re.search(rf"\*{anchor}\b", after), f"{anchor} is edited and used nowhere"


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_nothing_is_open_to_the_world_and_nothing_secret_is_written_down(path):
    text = path.read_text()
    for pattern in (r"0\.0\.0\.0", r"::/0", r"NodePort", r"LoadBalancer", r"privileged: true", r"hostNetwork: true"):
        assert not re.search(pattern, text), pattern
    for secret in (r"AKIA[0-9A-Z]{16}", r"BEGIN [A-Z ]*PRIVATE KEY", r"\b[0-9a-f]{40,}\b", r"(?i)password\s*[:=]\s*\S"):
        assert not re.search(secret, text), secret


@pytest.mark.parametrize("spec", ray_clusters(), ids=["cluster", "job"])
def test_kuberay_knows_every_field(spec):
    jsonschema.validate(spec, RAY_CLUSTER)
    assert spec["rayVersion"] == "2.60.0"


@pytest.mark.parametrize(
    "wrong",
    [{"rayVersions": "2"}, {"rayVersion": 2.6}, {"authOptions": {"mode": "tokens"}}, {"workerGroupSpecs": [{}]}],
    ids=str,
)
def test_the_schema_refuses_what_is_wrong(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(ray_clusters()[0] | wrong, RAY_CLUSTER)


@pytest.mark.parametrize("spec", ray_clusters(), ids=["cluster", "job"])
def test_kubernetes_is_as_closed(spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["resources"] == {"CPU": "0"}
    assert [group["labels"]["role"] for group in spec["workerGroupSpecs"]] == ["decode", "train"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert "-m dora_ray.spot" in json.dumps(container["lifecycle"]["preStop"])
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("path", KUBERNETES, ids=name)
def test_a_policy_closes_the_pods_that_there_are(path):
    policy = of_kind(path, "NetworkPolicy")["spec"]
    cluster = ray_clusters()["job" in path.name]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for group in groups:
        assert policy["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["ingress"])


def test_the_jobs_cluster_is_the_cluster():
    """Two files, one cluster: what differs is the pods' label."""
    cluster, job = (json.dumps(spec) for spec in ray_clusters())
    assert job.replace('"app": "dora-job"', '"app": "dora"') == cluster
    spec = of_kind(ROOT / "clusters" / "kuberay-job.yaml", "RayJob")["spec"]
    jsonschema.validate(spec, RAY_JOB)
    assert "--resume" in spec["entrypoint"], "each retry is a new cluster, which goes on from storage"
    assert spec["backoffLimit"] > 0


@pytest.mark.parametrize("path", POLICIES, ids=name)
def test_aws_policies_allow_little(path):
    policy = json.loads(path.read_text())
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions), statement["Sid"]
        if statement["Resource"] == "*":
            assert all(re.match(r"ec2:Describe|ecr:GetAuthorizationToken", action) for action in actions)
    text = path.read_text()
    assert "BUCKET" in text
    if "worker" in path.name:
        assert not re.search(r"ec2:|iam:", text)
    else:
        (passing,) = (one for one in policy["Statement"] if one["Action"] == "iam:PassRole")
        assert passing["Resource"].endswith("role/dora-worker")


def test_the_roles_are_taken_by_machines_alone():
    (statement,) = json.loads((ROOT / "clusters" / "aws-trust.json").read_text())["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


# NVIDIA's table of the oldest driver by CUDA's major version.
OLDEST_DRIVER = {"12": 525, "13": 580}


def test_gpu_nodes_have_a_driver_that_torch_can_use():
    """Ray's own choice on AWS is an Ubuntu 18.04, so that the machine's image has to be named."""
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+)", (ROOT / "requirements.lock").read_text(), flags=re.M)[1]
    aws, gcp = (yaml.safe_load(path.read_text())["available_node_types"] for path in CLOUDS)
    assert all(node["node_config"]["ImageId"] for node in aws.values())
    (disk,) = gcp["train"]["node_config"]["disks"]
    driver = re.search(r"-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])[1]
    assert int(driver) >= OLDEST_DRIVER[cuda]
    assert f"{OLDEST_DRIVER[cuda]} or newer" in CLOUDS[0].read_text(), "whoever chooses an image is told"


@pytest.mark.parametrize("path", CLOUDS, ids=name)
@pytest.mark.parametrize("has_docker", [True, False])
def test_a_fresh_machine_can_pull_the_images(path, has_docker, tmp_path):
    """Its first commands, run where the programs that they call write down that they were called."""
    tools, said = tmp_path / "tools", tmp_path / "said"
    tools.mkdir()
    for tool in ("sudo", "aws", "gcloud", "chmod", *(["docker"] if has_docker else [])):
        (tools / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> {said}\n')
        (tools / tool).chmod(0o755)
    commands = yaml.safe_load(path.read_text())["initialization_commands"]
    (tools / "id").symlink_to(shutil.which("id"))
    for command in commands:
        subprocess.run(["/bin/bash", "-c", command], env={"PATH": str(tools), "HOME": str(tmp_path)}, check=has_docker)
    lines = said.read_text().splitlines()
    assert any(line.startswith("sudo chgrp ") and line.endswith(" /var/run/docker.sock") for line in lines)
    installs = [line for line in lines if "install -y -qq docker.io" in line]
    if path.name == "gcp.yaml":
        assert bool(installs) is not has_docker, lines
        assert any(line.startswith("gcloud auth configure-docker ") for line in lines)
    elif has_docker:
        assert any(line.startswith("docker login --username AWS --password-stdin REGISTRY") for line in lines)


@pytest.mark.parametrize("path", ROLES, ids=name)
def test_google_roles_allow_little(path):
    role = json.loads(path.read_text())
    assert not any("*" in permission or "setIamPolicy" in permission for permission in role["includedPermissions"])
    if "worker" in path.name:
        assert all(permission.startswith("storage.") for permission in role["includedPermissions"])
