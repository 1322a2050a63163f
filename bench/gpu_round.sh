#!/usr/bin/env bash
# What there is to learn on a GPU: the tests of the real device, what the sanitizers say of a few of
# them (`tests`, under 8 minutes), and the benchmarks (`bench`, meant for 10). Results go to
# bench/results/.
#   bash bench/gpu_round.sh [tests|bench]      both by default; PYTHON=... has tvmf_ext installed
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
part=${1:-all}
[[ $part =~ ^(all|tests|bench)$ ]] ||
  { echo "gpu_round: got $part, wanted tests or bench" >&2; exit 2; }
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr ' ' '-')
[ -n "$gpu" ] || { echo "gpu_round: nvidia-smi finds no GPU" >&2; exit 2; }
out=bench/results/$gpu
mkdir -p "$out"
failed=0

# Runs a step for at most so many seconds, its output to a file as well.
step() {
  local name=$1 seconds=$2
  shift 2
  printf '\n== %s (%d s)\n' "$name" "$SECONDS"
  timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 25
  local rc=${PIPESTATUS[0]}
  echo "exit status $rc" | tee -a "$out/$name.txt"
  [ "$rc" -eq 0 ] || failed=1
}

{
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  "$python" -m tvmf_ext
} | tee "$out/about.txt"

if [ "$part" != bench ]; then
  step tests 240 "$python" -m pytest -q -m cuda --durations=10 tests

  # One small and ragged problem of every dtype, and a bad label: the tools are slow.
  few="test_every_mix_of_dtypes and 70 or test_whole_and_ragged_tiles and 129 or test_a_bad_label"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      # Torch's allocator hides a buffer's end in a larger block; without it each has its own.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 75 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --kernel-regex kns=tvmf \
        "$python" -m pytest -q -x -m cuda tests/test_cuda.py -k "$few"
    done
  else
    echo "gpu_round: no compute-sanitizer on PATH, its three steps are left out" >&2
    failed=1
  fi
fi

if [ "$part" != tests ]; then
  step bench 480 "$python" -m bench --suite gpu --json "$out/bench.json" --plot "$out/bench.png"
  step bench-float32 60 "$python" -m bench --device cuda --dtype float32 --seconds 2 \
    --shape 256 8142 2048 --json "$out/bench-float32.json"
  step end-to-end 120 "$python" -m bench.end_to_end --device cuda --seconds 10 \
    --json "$out/end-to-end.json"
  step scaling 120 "$python" -m bench.scaling --device cuda --seconds 0.5 \
    --json "$out/scaling.json" --plot "$out/scaling.png"
  for shape in "256 1000 512" "256 8142 2048" "1024 1000000 512"; do
    # shellcheck disable=SC2086  (three numbers)
    "$python" -m tvmf_ext plan $shape --dtype bfloat16 --weight-dtype float32 --gpu cuda
    echo
  done >"$out/plans.txt"
fi
echo "gpu_round: $SECONDS s, results in $out"
exit "$failed"
