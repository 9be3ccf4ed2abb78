"""Reports of plans: counts, warnings, prices, and files of figures."""

from __future__ import annotations

import json
from importlib.resources import files as package_files

import pytest

import dora_ray
from dora_ray.cli import main
from dora_ray.config_source import recipe_names
from dora_ray.errors import ConfigError
from dora_ray.planning.figures import load_figures, rates_of_bench
from dora_ray.planning.model import Rates
from dora_ray.planning.workload import flop_of_slot, parse_film, workload_of
from tests.conftest import BIKES, SMALL

TOUR = "6600s,3840x2160,60,vp9"


@pytest.fixture
def plan(capsys, tmp_path):
    """Run `dora-ray plan`; return its exit status, its output, and its JSON."""

    def call(*words: str) -> tuple[int, str, dict]:
        out = tmp_path / "plan.json"
        status = main(["plan", *words, "--json", str(out)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err, json.loads(out.read_text()) if out.exists() else {}

    return call


def test_a_tour_on_eight_gpus(plan):
    status, said, found = plan("paper", "--film", TOUR, "--gpus", "8", "--cpus", "32", "--node-memory", "512")
    assert status == 0
    assert found["kept_frames"] == 39600
    assert found["epochs"] == pytest.approx(309_000 * 128 / 39600)
    assert [row["workers_asked"] for row in found["rows"]] == [1, 8, 64, 64, 1024, 1024]
    assert found["warnings"] == []
    assert "NOT MEASURED: bus_bytes, network_bytes" in said, "nobody measured a network for these figures"
    assert "network_bytes 1.25e+09\n    assumed, not measured: " in said
    assert "gpu_tflop 110\n    measured by scripts/gpu_check.py on an NVIDIA H100" in said
    assert "machines    8 GPUs, 8 a node; 32 cores for reading in all;" in said
    assert "no interruptions" in said
    assert "not given" not in said
    assert "8 x 16" in said
    assert "1,016 idle, there are 8 slots" in said


def test_defaulted_options_are_named(plan):
    said = plan("paper", "--film", TOUR, "--gpus", "8", "--interruptions", "0.5")[1]
    assert "--cpus and --node-memory not given: this machine's were taken" in said
    assert "0.5 interruptions a node and hour, which take 0.1% of the time" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "-1"], "--gpus -1 must be at least 0"),
        (["--cpus", "0"], "--cpus 0.0 must be above 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0 must be at least 1"),
        (["--node-memory", "-4"], "--node-memory -4.0 must be above 0"),
        (["--interruptions", "-0.1"], "--interruptions -0.1 must be at least 0"),
        (["--announced", "2"], "--announced 2.0 is a share"),
        (["--price-file", "/nothing.yaml"], "--price-file /nothing.yaml cannot be read: No such file or directory"),
    ],
)
def test_impossible_numbers_and_files_are_refused(plan, words, says):
    status, said, _ = plan("paper", "--film", TOUR, *words)
    assert status == 2
    assert says in said


def test_without_a_film_both_ways_to_give_one_are_told(plan):
    status, said, _ = plan("paper")
    assert status == 2
    assert "data.videos=[walk.mp4]" in said
    assert "--film 6600s" in said


def test_without_a_recipe_all_are_named(plan):
    said = plan("--film", TOUR)[1]
    assert all(name in said for name in recipe_names())


def test_too_little_memory_is_a_warning(plan):
    _, said, found = plan("paper", f"data.videos=[{BIKES}]", "clip.stride_seconds=0.5", "--node-memory", "23.5")
    assert any("need 25.1 GiB, and it has 23.5 GiB" in text for text in found["warnings"]), found["warnings"]
    assert any("epochs of 10 s of video" in text for text in found["warnings"])
    assert said.count("WARNING") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "8", "--gpu-memory", "8"], "GiB of its GPU, and that has 8.0 GiB"),
        (["--gpus", "64"], "56 of 64 GPUs idle: a step has optim.slots=8 slots"),
        (["--gpus", "3"], "8 slots on 3 workers take 3 rounds"),
        (["--gpus", "8", "--gpus-per-node", "1", "--interruptions", "100"], "the run never finishes"),
    ],
)
def test_waste_is_a_warning(plan, words, says):
    assert any(says in text for text in plan("paper", "--film", TOUR, "--node-memory", "999", *words)[2]["warnings"])


def test_idle_machines_cost_money(plan, tmp_path):
    (tmp_path / "prices.yaml").write_text("currency: EUR\ngpu_hour: 2.0\ncpu_hour: 0.05\nstorage_gb_month: 0.02\n")
    words = ["paper", "--film", TOUR, "--cpus", "32", "--price-file", str(tmp_path / "prices.yaml"), "--gpus"]
    _, said, found = plan(*words, "16")
    asked = found["asked"]
    machines = (16 * 2.0 + 32 * 0.05) * asked["hours"]
    assert asked["cost"] == pytest.approx(machines, rel=0.01)
    assert "EUR" in said
    (tmp_path / "prices.yaml").write_text("gpu: 2.0\n")
    assert main([*["plan"], *words, "8"]) == 2


@pytest.mark.parametrize("spec", ["6600", "6600s,3840x2160,60", "6600s,4k,60,vp9"])
def test_a_film_is_written_in_one_way(spec):
    with pytest.raises(ConfigError, match="6600s,3840x2160,60,vp9"):
        parse_film(spec)


def test_products_are_counted_as_the_bench_records_them():
    """The closed form equals the count of every matrix product in one step of a small network."""
    import torch

    from dora_ray.bench.products import record
    from dora_ray.bench.timed import ALONE, Timed
    from dora_ray.method.dora import slot_forward

    config = dora_ray.load_config("tiny", *SMALL, *ALONE, "model.depth=6", "model.width=96")
    timed = Timed(config, torch.device("cpu"))
    recorded = record(lambda: timed.step(config, slot_forward)).flops
    assert flop_of_slot(config) == pytest.approx(recorded, rel=0.15)


def test_every_shipped_figure_says_where_it_is_from():
    shipped = json.loads(package_files("dora_ray.planning").joinpath("figures.json").read_text())
    assert list(shipped) == list(Rates.__dataclass_fields__)
    for name, entry in shipped.items():
        assert entry["from"].startswith(("measured ", "assumed, not measured: ")), name


def test_own_benchmarks_replace_the_shipped_figures(tmp_path):
    before = load_figures()
    data = {
        "store_clips_per_core_second": 100.0,
        "ingest_frames_per_core_second": 50.0,
        "jpeg_ms_a_kept_frame": 1.0,
        "write_ms_a_kept_frame": 0.5,
        "stored_bytes_a_clip": 8 * 910 * 512,
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "step.json").write_text(json.dumps({"tflop_per_second": 300.0, "device": "NVIDIA H100"}))
    after = load_figures([str(tmp_path / "data.json"), str(tmp_path / "step.json")])
    assert after.rates.gpu_tflop == 300.0
    assert "NVIDIA H100" in after.origins["gpu_tflop"]
    assert after.rates.stored_bytes_a_pixel == 1.0
    assert after.rates.decoded_pixels["h264"] == 50 * 3840 * 2160
    assert after.rates.decoded_pixels["vp9"] == before.rates.decoded_pixels["vp9"]
    assert rates_of_bench({"tflop_per_second": 0.2, "device": "cpu, 4 threads"}, before.rates) == {"core_tflop": 0.05}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="bench data --json"):
        load_figures([str(tmp_path / "other.json")])


def test_counts_of_a_recipe():
    work = workload_of(dora_ray.load_config("paper"), [parse_film(TOUR)])
    assert work.stored_pixels == round(512 * 512 * 16 / 9)
    assert work.clip_bytes == 8 * 300 * 300 * 3
    assert 0.5 < work.tflop_per_clip < 1.5


def test_a_dry_run_is_short_warns_and_writes_nothing(capsys, tmp_path):
    words = ["train", "tiny", *SMALL, f"data.videos=[{BIKES}]", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 15
    assert f"run         {tmp_path / 'run'}" in said
    assert "bikes.mp4 (640x272, h264, 10.0 s)" in said
    assert "workers     in this process, without GPUs" in said
    assert "WARNING" not in said
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "optim.steps=600000"]) == 0
    assert "80,000 epochs of 10 s of video" in capsys.readouterr().out
