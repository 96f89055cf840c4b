# One image for the head and the workers of a cluster; without a command it prints what the tiny recipe would do.
#
#   docker build --tag vrm:cpu .
#   docker build --tag vrm:cuda --build-arg ACCELERATOR=cuda .
#   docker run --rm vrm:cpu vrm run paper_qwen3_8b --dry-run
#
# The layer of packages is built again only when what they are chosen by changes, not with every line of the project.
ARG ACCELERATOR=cpu

FROM python:3.11-slim-bookworm AS cpu

# DeepSpeed compiles its optimiser for offloaded states at first use, which needs the CUDA toolkit.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda

FROM ${ACCELERATOR} AS vrm
ARG ACCELERATOR
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# g++ and ninja for what DeepSpeed compiles at first use, wget for the probes of KubeRay.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends g++ ninja-build wget \
  && { command -v python3 || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; } \
  && rm -rf /var/lib/apt/lists/* \
  && { id --user ubuntu && userdel --remove ubuntu || true; } \
  && useradd --create-home --uid 1000 ray \
  && install --directory --owner=ray --group=ray /app
USER 1000:1000
WORKDIR /app
COPY --chown=ray:ray pyproject.toml README.md LICENSE ./
COPY --chown=ray:ray install install
RUN VRM_ACCELERATOR="$ACCELERATOR" VRM_DEV=0 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 bash install/install.sh
COPY --chown=ray:ray pipeline pipeline
COPY --chown=ray:ray actors actors
COPY --chown=ray:ray cluster cluster
COPY --chown=ray:ray jobs jobs
COPY --chown=ray:ray vrm vrm
# The packages were installed before the project was there, so its folder is named here.
ENV PATH=/app/.venv/bin:$PATH PYTHONPATH=/app
CMD ["vrm", "run", "tiny", "--dry-run"]
