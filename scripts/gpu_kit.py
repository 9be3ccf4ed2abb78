"""Pack folders on this machine into the clips file for scripts/gpu_check.py; called by `make gpu-kit`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dora_ray.bench.gpu.pack import MB, pack
from dora_ray.errors import DoRAError


def main() -> int:
    """Read the folders and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="train/CLASS/* and test/CLASS/*")
    parser.add_argument("--davis", type=Path, required=True, metavar="DIR", help="laid out as DAVIS 2016")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--limit-mb", type=float, default=30.0, metavar="MB", help="most megabytes (30)")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        kit = pack(
            videos=options.videos,
            images=options.images,
            sequences=options.davis,
            out=options.out,
            limit_mb=options.limit_mb,
        )
    except DoRAError as error:
        sys.exit(f"gpu_kit: {error}")
    print(
        f"{options.out}: {options.out.stat().st_size / MB:.1f} MB, {len(kit.videos)} stretches of video with "
        f"{sum(len(video.times) for video in kit.videos)} frames, {len(kit.train.images)} + {len(kit.test.images)} "
        f"images, {len(kit.sequences)} sequences"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
