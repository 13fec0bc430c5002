#!/usr/bin/env bash
# Runs on a machine with a GPU what needs one: the tests marked cuda, then benchmarks at published shapes. Eight minutes
# at most, no network. The figures stand in benchmarks/results/gpu-NAME.json.
set -euo pipefail

readonly TEST_SECONDS=200 BENCHMARK_SECONDS=270 BUDGET_SECONDS=225

usage() {
  cat <<'TEXT'
usage: tools/gpu_check.sh [--name NAME] [--python PATH] [--output FILE] [--dry-run]

  --name NAME    of the figures, benchmarks/results/gpu-NAME.json; without it the name of the GPU
  --python PATH  the interpreter (.venv/bin/python where there is one, else python3)
  --output FILE  where the figures go instead
  --dry-run      tiny shapes on the CPU: shows that everything would run; needs --output

Nothing is downloaded. For a machine without network make the wheels on one with it, same Python and platform:

  pip download --dest wheels torch --index-url https://download.pytorch.org/whl/cu130   # triton comes along
  pip wheel --wheel-dir wheels --find-links wheels . --group dev                        # pip 25.1 or later

and on the machine with the GPU, in a copy of this repository:

  python3 -m venv .venv
  .venv/bin/pip install --no-index --find-links wheels vllm-omni --group dev
  tools/gpu_check.sh

There a C compiler and Python's headers must be installed (gcc, python3-dev): triton needs them.
flash-attn is optional: built for that torch and GPU, its wheel goes into the same folder.
TEXT
}

fail() {
  printf 'gpu_check: %s\n' "$1" >&2
  exit 2
}

value_of() { # option, arguments left
  [[ $# -ge 2 ]] || fail "$1: got nothing, expected a value"
  printf '%s' "$2"
}

name="" python="" output="" device=cuda
dry_run=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name) name=$(value_of "$@"); shift 2 ;;
    --python) python=$(value_of "$@"); shift 2 ;;
    --output) output=$(value_of "$@"); shift 2 ;;
    --dry-run) device=cpu; dry_run=(--dry-run); shift ;;
    --help | -h) usage; exit 0 ;;
    *) fail "got $1, expected an option; see --help" ;;
  esac
done

[[ $name =~ ^[A-Za-z0-9._-]*$ ]] || fail "--name: got '$name', expected letters, digits, dots and dashes"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z $python ]]; then
  python=python3
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
[[ -n $output || $device == cuda ]] || fail "--dry-run: the figures are none; say with --output where they go"
export PYTHONPATH="$root" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

"$python" -c 'import torch, transformers, diffusers, pytest' || fail "packages are missing; --help says which to carry"
if [[ $device == cuda ]]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch sees no CUDA device (is this a CPU build?); --help says which wheels to carry"
  if [[ -z $name ]]; then
    name=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
  fi
fi
[[ -n $output ]] || output=$root/benchmarks/results/gpu-$name.json
[[ $output == /* ]] || output=$PWD/$output

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
status=0

tests=(tests/layers tests/worker tests/engine/ar/test_ar_graphs_cuda.py tests/entrypoints/test_cuda_pipelines.py)
tests+=(tests/models/qwen3_tts/test_captured_talker_cuda.py tests/executor/process/test_device_tensors_cuda.py)
options=(-m cuda --device "$device" "--junitxml=$work/tests.xml" -p no:cacheprovider)
[[ $device == cuda ]] || options+=(-k "sdpa or words or test_audio or wait")
# several processes where pytest-xdist is: each waits for kernels that are compiled on one core
processes=$(($(nproc) / 2 < 8 ? $(nproc) / 2 : 8))
if ((processes > 1)) && "$python" -c 'import xdist' 2>/dev/null; then
  options+=(-n "$processes")
fi
timeout --kill-after=10 "$TEST_SECONDS" "$python" -m pytest "${options[@]}" "${tests[@]}" || status=1

timeout --kill-after=10 "$BENCHMARK_SECONDS" "$python" -m benchmarks.gpu ${dry_run[@]+"${dry_run[@]}"} \
  --json "$output" --tests "$work/tests.xml" --budget "$BUDGET_SECONDS" || status=1

printf 'gpu_check: %s, figures in %s\n' "$([[ $status == 0 ]] && echo 'all well' || echo 'something failed')" "$output"
exit "$status"
