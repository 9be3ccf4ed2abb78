"""One part of the check in its own process, started by `check.run_part`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dora_ray.bench.gpu.figures import Figures


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    figures = Figures(options.out / f"{options.part}.jsonl")
    if options.part == "tests":
        from dora_ray.bench.gpu import part_tests

        part_tests.run(figures, root=options.root, rehearse=options.rehearse)
    elif options.part == "step":
        from dora_ray.bench.gpu import part_step

        part_step.run(figures, rehearse=options.rehearse)
    elif options.part == "profile":
        from dora_ray.bench.gpu import part_profile

        part_profile.run(figures, folder=options.out, rehearse=options.rehearse)
    else:
        from dora_ray.bench.gpu import part_learning

        part_learning.run(figures, clips=options.clips, seconds=options.seconds, rehearse=options.rehearse)


if __name__ == "__main__":
    main()
