# Images of every node: `make image` builds dora-ray:VERSION-cpu and dora-ray:VERSION-cuda.
#
# The heavy layer, what dora-ray needs, changes with requirements.lock alone; dora-ray itself is a layer of a megabyte on top.
# The same steps are scripts/image.sh, which the tests run. The CUDA image needs the driver of its machine and nothing else of CUDA:
# torch's wheels bring it.
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# rsync and ssh are what `ray up` reaches containers with, procps what its commands look for processes with, git stays out.
# Debian removes old versions from its archive, so a pinned one would break the build within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client procps rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /dora --uid 1000 ray \
    && install -d -o ray -g ray /dora/venv /mnt/nvme
USER 1000
WORKDIR /dora
ENV PATH=/dora/venv/bin:$PATH PYTHON=/usr/local/bin/python3.11 PYTHONUNBUFFERED=1

FROM base AS cpu-packages
# PyTorch's index of CPU wheels; without it the image works too, and carries CUDA's libraries along.
ARG TORCH_INDEX=""
COPY --chown=ray:ray pyproject.toml requirements.lock src/
COPY --chown=ray:ray scripts/image.sh src/scripts/
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX" src/scripts/image.sh packages /dora/venv

FROM base AS cuda-packages
COPY --chown=ray:ray pyproject.toml requirements.lock src/
COPY --chown=ray:ray scripts/image.sh src/scripts/
RUN src/scripts/image.sh packages /dora/venv

FROM cpu-packages AS cpu
COPY --chown=ray:ray README.md LICENSE NOTICE THIRD_PARTY_NOTICES.md src/
COPY --chown=ray:ray dora_ray src/dora_ray
RUN src/scripts/image.sh project /dora/venv
CMD ["dora-ray", "doctor"]

FROM cuda-packages AS cuda
COPY --chown=ray:ray README.md LICENSE NOTICE THIRD_PARTY_NOTICES.md src/
COPY --chown=ray:ray dora_ray src/dora_ray
RUN src/scripts/image.sh project /dora/venv
CMD ["dora-ray", "doctor"]
