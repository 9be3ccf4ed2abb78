"""Print requirements.lock: the exact installed versions of the requirements in pyproject.toml.

Follows the requirements of dora-ray and of the extras that CI uses, so that packages installed by hand are left out.
Run it with `make lock`.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("demo", "dev", "optuna", "s3")
# Packages with wheels for one platform only. On others pip follows torch's own metadata.
X86_LINUX = "platform_machine == 'x86_64' and sys_platform == 'linux'"
PLATFORM_BOUND = ("nvidia-", "cuda-", "triton", "decord")
HEADER = "# Exact versions that CI runs, without addresses. Written by `make lock`; the ranges are in pyproject.toml."


def wanted(requirement: Requirement, extras: set[str]) -> bool:
    """Return whether the requirement's marker holds on this machine for any of the extras."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})


def closure(roots: list[Requirement]) -> set[str]:
    """Return the canonical names of all transitive requirements, extras included."""
    seen: dict[str, set[str]] = {}
    stack = list(roots)
    while stack:
        requirement = stack.pop()
        name, extras = canonicalize_name(requirement.name), set(requirement.extras)
        if name in seen and extras <= seen[name]:
            continue
        seen[name] = seen.get(name, set()) | extras
        needed = (Requirement(text) for text in requires(name) or ())
        stack.extend(item for item in needed if wanted(item, seen[name]))
    return set(seen)


def line(name: str) -> str:
    """Return one line of the lock file."""
    found = distribution(name)
    pin = f"{canonicalize_name(found.metadata['Name'])}=={found.version.split('+')[0]}"
    return f"{pin} ; {X86_LINUX}" if name.startswith(PLATFORM_BOUND) else pin


def main() -> None:
    """Print the lock file."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    texts = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in EXTRAS:
        texts += project["project"]["optional-dependencies"][extra]
    roots = [requirement for requirement in map(Requirement, texts) if wanted(requirement, set())]
    print(HEADER)
    for name in sorted(closure(roots)):
        print(line(name))


if __name__ == "__main__":
    main()
