"""Everything that a GPU has to answer, in one command of ten minutes; see CONTRIBUTING.md.

Runs from a checkout that is not installed, where there are torch, torchvision, timm, NumPy, safetensors, PyYAML and
pytest. pydantic and what it needs may come along as wheels, in .gpu-kit/wheels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".gpu-kit" / "wheels"


def main() -> int:
    """Put the checkout, and the wheels where they are needed, on the path of this process and its children."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("pydantic") is not None:
        return check()
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        sys.exit(f"pydantic is not installed, and there are no wheels in {WHEELS}: run `make gpu-kit` where pip works")
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        # Last, so that it hides nothing that is installed.
        sys.path.append(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
        return check()


def check() -> int:
    """Run the check."""
    from dora_ray.bench.gpu.check import main as run

    return run(sys.argv[1:], root=ROOT)


if __name__ == "__main__":
    sys.exit(main())
