#!/usr/bin/env bash
# Creates .venv with a set of packages known to work together; called by make, safe to repeat.
# VRM_ACCELERATOR=cpu|cuda overrides the automatic choice, which is kept by later calls. VRM_DEV=0 leaves out what only
# tests and linters need.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
  echo "install: $("$python" --version) found, Python 3.11 or 3.12 is needed. Name one with PYTHON=python3.12 make ..." >&2
  exit 1
}

accelerator=${VRM_ACCELERATOR:-$(cat .venv/.accelerator 2>/dev/null || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu; })}
echo "install: $("$python" --version), $accelerator build, into .venv"
# The two builds of torch have one version: an installer would take either for the other.
[ "$(cat .venv/.accelerator 2>/dev/null || echo "$accelerator")" = "$accelerator" ] || rm -rf .venv
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.8"

# pip's local wheel folders, where a machine has them, are uv's too.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
install() { .venv/bin/uv pip install --quiet --python .venv/bin/python --constraints install/constraints.txt "$@"; }

case $accelerator in
  cpu)
    # The CPU build of torch lies in a local wheel folder or else on PyTorch's own index.
    backend=()
    install --dry-run "torch==2.13.0+cpu" 2>/dev/null || backend=(--torch-backend cpu)
    torch="torch==2.13.0+cpu" ;;
  cuda) backend=(--torch-backend auto) torch="torch==2.13.0" ;;
  *) echo "install: VRM_ACCELERATOR=$accelerator is neither cpu nor cuda" >&2; exit 1 ;;
esac

# torch first: DeepSpeed reads it while it builds.
install "${backend[@]}" "$torch" setuptools wheel ninja packaging py-cpuinfo hjson
DS_BUILD_OPS=0 install "${backend[@]}" --no-build-isolation-package deepspeed --override install/overrides-"$accelerator".txt \
  --editable ".[$accelerator$([ "${VRM_DEV:-1}" = 0 ] || echo ,dev)]"
# Peers of which the tests need a file or two: their own requirements serve models, or need a GPU.
[ "${VRM_DEV:-1}" = 0 ] || install --no-deps "fschat==0.2.36" "openrlhf==0.11.2"
# Loggers of the extras `wandb`, `mlflow` and `trackio`, which tests run offline; seconds. Their bounds on cachetools,
# certifi and pillow exclude the versions of install/constraints.txt, and nothing that the loggers call here differs.
[ "${VRM_DEV:-1}" = 0 ] || install --no-deps "wandb==0.31.0" "cwevals==0.0.1b1" "distro==1.9.0" \
  "mlflow-skinny==3.17.2" "databricks-sdk==0.162.0" "GitPython==3.2.1" "gitdb==4.0.12" "smmap==5.0.3" \
  "importlib_metadata==9.1.0" "zipp==4.1.2" "sqlparse==0.6.1" \
  "trackio==0.43.0" "gradio_client==2.7.2" "orjson==3.13.0" "brotli==1.2.1"
# The first import of a module writes its bytecode for all later imports, unless PYTHONDONTWRITEBYTECODE is set.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python install/compile_bytecode.py "$accelerator" 2>/dev/null || {
  echo "install: the packages are there but do not import; run .venv/bin/python -c 'import vllm, deepspeed' to see why" >&2
  exit 1
}
echo "$accelerator" > .venv/.accelerator
touch .venv/.installed
