#!/usr/bin/env bash
# Makes .venv at the top of the repository, or reuses it, and installs hybridzoo in it (editable).
#   bash scripts/install.sh [EXTRA]      EXTRA: an extra of pyproject.toml, such as dev
# HYBRIDZOO_TORCH  pip's words for torch, such as "torch --index-url https://download.pytorch.org/whl/cpu".
#                  Unset: a torch that is already there stays; else torch==2.13.0.
# PYTHON           the interpreter that makes .venv; unset: the first of python3, python3.1x that is >= 3.11.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
venv_python=.venv/bin/python

step() { # step "what" command...: says what, runs it, and names it when it fails
    local what=$1
    shift
    printf '==> %s\n' "$what"
    "$@" || {
        printf 'install.sh: this step failed: %s\n    %s\n' "$what" "$*" >&2
        exit 1
    }
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has_torch() { "$1" -c 'import torch' 2>/dev/null; }

find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "install.sh: none of ${candidates[*]} is a Python >= 3.11." \
        "Install one, or name it: PYTHON=/path/to/python3" >&2
    exit 1
}

if [ -e .venv ] && ! is_new_enough "$venv_python"; then
    echo "install.sh: .venv has no working Python >= 3.11. Remove .venv, then run this again." >&2
    exit 1
fi
if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    options=()
    # a torch that came with the machine (a GPU image, say) is the one that fits its driver
    if [ -z "${HYBRIDZOO_TORCH:-}" ] && has_torch "$python"; then options=(--system-site-packages); fi
    step "making .venv with $("$python" --version)" "$python" -m venv ${options[@]+"${options[@]}"} .venv
fi

# torch first and alone: asked for by another package's range, pip may take a larger build of it
if [ -n "${HYBRIDZOO_TORCH:-}" ] || ! has_torch "$venv_python"; then
    read -r -a torch <<<"${HYBRIDZOO_TORCH:-torch==2.13.0}"
    step "installing ${torch[*]} (the largest download: some minutes)" \
        "$venv_python" -m pip install -qq "${torch[@]}"
fi

# a torch with CUDA wants the compiler of csrc for that CUDA. To one without, dev brings what compiles every
# kernel all the same: Triton as the kernels were measured with it, whose interpreter the tests know
cuda=$("$venv_python" -c 'import torch; print((torch.version.cuda or "").partition(".")[0])')
compilers=()
if [ -n "$cuda" ]; then
    extra=${extra:+$extra,}cuda
    compilers=("cuda-bindings==$cuda.*")
elif [ "$extra" = dev ] && [ "$(uname)" = Linux ]; then
    compilers=("triton==3.6.*")
fi

# compat: a path, not an import hook, so that the clone's own folder does not hide the package from a
# Python that runs beside it.
# nothing is installed again while what decides it is the same
key=$({ pwd; "$venv_python" --version; echo "${compilers[*]-}"; cat pyproject.toml setup.py; } | "$venv_python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=.venv/hybridzoo-${extra:-core}.stamp
if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    step "installing hybridzoo${extra:+[$extra]} and what it needs" \
        "$venv_python" -m pip install -qq --config-settings editable_mode=compat \
        --editable ".${extra:+[$extra]}" ${compilers[@]+"${compilers[@]}"}
    printf '%s\n' "$key" >"$stamp"
fi
