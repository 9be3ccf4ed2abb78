"""A decode node that is lost in the middle of a stream: Ray makes its segments anew, and every slot is what it was.

No task runs on a node without the label, free as its CPUs are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dora_ray.video.synthetic import make_video

# A cluster of several nodes in a process of its own: the other tests' cluster lives in this one.
SCRIPT = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from dora_ray.clips import ray_engine
from dora_ray.clips.stream import local_slots, ray_slots
from tests.clips.test_direct import plan_of

places = Path(sys.argv[2])

def noted(task):
    def run(*arguments):
        (places / ray.get_runtime_context().get_node_id()).touch()
        return task(*arguments)
    return run

ray_engine._decode_task, ray_engine._read_task = noted(ray_engine._decode_task), noted(ray_engine._read_task)
plan = plan_of(sys.argv[1], "data.shuffle_segments=3", "data.stream_segment_seconds=2")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200_000_000})
decoders = [
    cluster.add_node(num_cpus=2, object_store_memory=200_000_000, labels={"role": "decode"}) for _ in range(2)
]
cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
steps, slots = range(40), [0, 1, 2]
options = {"prefetch": 2, "slots_per_task": 1, "cpus_per_task": 1.0, "num_streams": 1, "decode_seconds": 60.0}
digests = []
for batch in ray_slots(plan, steps, slots, **options, node_label="decode"):
    digests.append(batch.digest)
    if len(digests) == 40:
        cluster.remove_node(decoders[0], allow_graceful=False)
keys = iter([(step, slot) for step in steps for slot in slots])
expected = [batch.digest for batch in local_slots(plan, keys, prefetch=2, num_threads=1, decode_seconds=60.0)]
ray.shutdown()
cluster.shutdown()
pinned, used = {node.node_id for node in decoders}, {path.name for path in places.iterdir()}
outcome = "same" if digests == expected else "different"
print(outcome, len(digests), "pinned", len(used & pinned), "elsewhere", len(used - pinned))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_stream_survives_a_lost_decode_node(tmp_path: Path) -> None:
    film = make_video(
        tmp_path / "walk.mp4", width=160, height=96, num_frames=480, frames_per_second=24, seed=1, group_size=24
    )
    places = tmp_path / "places"
    places.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(film), str(places)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip().endswith("same 120 pinned 2 elsewhere 0"), result.stdout + result.stderr
