#!/usr/bin/env bash
# On a machine with a GPU, in one command: what it is, the GPU tests, then the benches beside their peers.
#   bash scripts/gpu_check.sh [machine] [tests] [kernel] [decode] [train] [sanitize]
#     no name: all but the last, which runs small shapes under compute-sanitizer, of CUDA's toolkit
# OUT     folder of the logs and JSON files; unset: runs/gpu_check
# PYTHON  the interpreter, with torch, triton and pytest in it; unset: python3. Nothing is installed.
# PEERS   a folder that holds mamba_ssm and causal_conv1d; unset: Python's path may have them, and a
#         row says where one is missing.
# TESTS KERNEL DECODE TRAIN    more arguments for pytest, bench/kernel.py, decode.py and train.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-runs/gpu_check}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PEERS:+:$PEERS}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=()

part() { # part NAME SECONDS command...: runs it with a time limit, into $out/NAME.log as well
    local name=$1 limit=$2
    shift 2
    printf '==> %s: %s\n' "$name" "$*"
    timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

describe() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader
    "$python" -c 'import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
    "$python" -m hybridzoo.cli doctor
}
export -f describe
export python

for name in "${@:-all}"; do
    case $name in
        all | machine | tests | kernel | decode | train | sanitize) ;;
        *)
            echo "gpu_check.sh: $name is no part; they are machine, tests, kernel, decode, train and sanitize." >&2
            exit 2
            ;;
    esac
done
is_asked() { [[ " ${asked:-all} " == *" all "* || " $asked " == *" $1 "* ]]; }
asked="$*"

# the words of these are arguments, apart by spaces
read -r -a tests <<<"${TESTS:-}"
read -r -a kernel <<<"${KERNEL:-}"
read -r -a decode <<<"${DECODE:-}"
read -r -a train <<<"${TRAIN:-}"
if is_asked machine; then part machine 120 bash -euo pipefail -c describe; fi
if is_asked tests; then
    # where pytest-xdist is, eight processes; of one thread each, as what is right is found on the CPU
    if "$python" -c 'import xdist' 2>/dev/null; then many=(-n 8); else many=(); fi
    OMP_NUM_THREADS=1 part tests 900 "$python" -m pytest -m gpu -q -rfE -p no:cacheprovider \
        ${many[@]+"${many[@]}"} "${tests[@]:-tests}"
fi
if is_asked kernel; then
    part kernel 300 "$python" scripts/bench/kernel.py --out "$out/kernel.json" ${kernel[@]+"${kernel[@]}"}
fi
if is_asked decode; then
    part decode 300 "$python" scripts/bench/decode.py --out "$out/decode.json" ${decode[@]+"${decode[@]}"}
fi
if is_asked train; then
    part train 560 "$python" scripts/bench/train.py --out "$out/train.json" ${train[@]+"${train[@]}"}
fi
if [[ " $asked " == *" sanitize "* ]]; then
    sanitize() { # sanitize TOOL argument...: the kernels alone, not what torch runs besides
        local tool=$1
        shift
        part "$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no \
            --kernel-name kns=selective_scan --kernel-name kns=_kernel \
            "$python" -m tests.kernels.sanitized "$@"
    }
    # the compiler, which a sanitizer would watch too, and slow down
    part compiled 200 "$python" -m tests.kernels.sanitized
    part compiled-every-lane 200 "$python" -m tests.kernels.sanitized every-lane
    sanitize memcheck
    sanitize racecheck every-lane
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu_check.sh: failed: ${failed[*]}; see $out" >&2
    exit 1
fi
