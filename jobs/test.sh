#!/usr/bin/env bash
# Set up, check style and types, and run the tests; arguments go to pytest:
#   bash jobs/test.sh
#   bash jobs/test.sh -m 'not ray and not engine and not slow'
#   bash jobs/test.sh -m 'slow or not slow'   # with what takes longer than a minute, as CI does
#   TREERPO_VENV=.venv-gpu bash jobs/test.sh -m gpu   # on an NVIDIA GPU: without one it fails
set -euo pipefail
extras=cpu,dev previous=
for word in "$@"; do
    if [[ $previous == -m && $word =~ (^|[^[:alnum:]])gpu && ! $word =~ not\ +gpu ]]; then
        extras=gpu,dev
    fi
    previous=$word
done
if [[ $extras == gpu* ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "error: -m gpu asks for an NVIDIA GPU, and nvidia-smi finds none here" >&2
    exit 1
fi
source "$(dirname "$0")/setup.sh" "$extras"
export RAY_AUTH_MODE=disabled HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
lint-imports
# Types are checked beside the tests, which have waits; what is wrong with them is told at the end.
findings=$(mktemp)
trap 'rm -f "$findings"' EXIT
mypy >"$findings" 2>&1 & types=$!
status=0
# A file stays in one process, for what its tests share; the order is that of tests/conftest.py.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" || status=$?
if ! wait "$types"; then
    cat "$findings" >&2
    status=1
fi
exit "$status"
