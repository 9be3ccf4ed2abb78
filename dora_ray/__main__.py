"""Run the command line: `python -m dora_ray` equals `dora-ray`."""

import sys

from dora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
