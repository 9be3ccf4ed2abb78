"""Everything that a GPU has to answer, in one command of ten minutes; see CONTRIBUTING.md.

Runs from a checkout that is not installed, where there are torch, torchvision, timm, NumPy, safetensors, PyYAML and
pytest. pydantic, what it needs, and timm may come along as wheels, in .gpu-kit/wheels: one is used where its package is
missing or older.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".gpu-kit" / "wheels"


def main() -> int:
    """Put the checkout and the required wheels on the path of this process and its children, and run the check."""
    sys.path.insert(0, str(ROOT))
    needed = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if is_needed(wheel)]
    if not needed and has("pydantic") is None:
        sys.exit(f"pydantic is not installed, and there are no wheels in {WHEELS}: run `make gpu-kit` where pip works")
    with tempfile.TemporaryDirectory() as folder:
        for wheel in needed:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        sys.path.insert(1, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        return check()


def is_needed(wheel: Path) -> bool:
    """Return whether a wheel's package is missing or older than the wheel."""
    name, number = wheel.name.split("-")[:2]
    found = has(name)
    return found is None or found < numbers(number)


def has(package: str) -> tuple[int, ...] | None:
    """Return the version of an installed package; None if it is missing."""
    try:
        return numbers(version(package))
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def check() -> int:
    """Run the check."""
    from dora_ray.bench.gpu.check import main as run

    return run(sys.argv[1:], root=ROOT)


if __name__ == "__main__":
    sys.exit(main())
