"""`python -m dora_ray` is `dora-ray`."""

import sys

from dora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
