#!/usr/bin/env bash
# The steps of the images, so that they can also be run, and are tested, where there is no container engine:
#
#   scripts/image.sh packages PREFIX      a virtual environment with what dora-ray needs, pinned by requirements.lock
#   scripts/image.sh project PREFIX       dora-ray itself, and a look at whether it works
#
# PYTHON is the interpreter (python3.11). pip's own variables hold: with PIP_EXTRA_INDEX_URL, PyTorch's index of CPU wheels, torch
# comes without the five gigabytes of CUDA that the ordinary index's wheels bring along.
set -euo pipefail
cd "$(dirname "$0")/.."

# What pyproject.toml asks for at run time, with the extras that clusters need; boto3 is what Ray starts AWS nodes with.
requirements() {
    "$1" - <<'PROGRAM'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *extras["s3"], "boto3", "setuptools"]))
PROGRAM
}

packages() {
    local prefix="$1" wanted
    test -x "$prefix/bin/python" || "${PYTHON:-python3.11}" -m venv "$prefix"
    wanted=$(mktemp)
    requirements "$prefix/bin/python" > "$wanted"
    "$prefix/bin/python" -m pip install --no-input --no-cache-dir --disable-pip-version-check -c requirements.lock -r "$wanted"
    rm "$wanted"
}

project() {
    local prefix="$1" work
    work=$(mktemp -d)  # a build leaves folders beside its source
    cp -r pyproject.toml README.md LICENSE NOTICE THIRD_PARTY_NOTICES.md dora_ray "$work"
    "$prefix/bin/python" -m pip install --no-input --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation "$work"
    rm -r "$work"
    "$prefix/bin/dora-ray" --version
    "$prefix/bin/dora-ray" config tiny > /dev/null
    "$prefix/bin/python" -c 'import av, lance, ray, simplejpeg, torch; print("torch", torch.__version__, "ray", ray.__version__)'
}

"$@"
