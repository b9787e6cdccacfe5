#!/usr/bin/env bash
# From a fresh clone to checked and tested, without a GPU.
#   bash scripts/test.sh [--all | --soak] [pytest arguments]
#     no option: under 10 minutes on 2 cores      --all: adds the slow tests      --soak: adds the long counts too
# HYBRIDZOO_TORCH and PYTHON: see scripts/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks="not gpu and not multi_gpu and not network"
case "${1:-}" in
    --all) marks+=" and not soak" && shift ;;
    --soak) shift ;;
    *) marks+=" and not soak and not slow" ;;
esac

bash scripts/install.sh dev

check() {
    echo "==> $*"
    ".venv/bin/python" -m "$@" || {
        echo "test.sh: this check failed: $*" >&2
        exit 1
    }
}
check ruff check .
check ruff format --check .
check mypy

echo "==> pytest -m \"$marks\" $*"
# two processes of one thread each: two cores are used and none is fought over
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 -q -rs -m "$marks" "$@"
