#!/usr/bin/env bash
# Tests and measures on a GPU: bash bench/gpu_round.sh [tests|bench|more], by default all three.
# `tests` runs the GPU's tests, a few of them under compute-sanitizer too (under 4 minutes); `bench`
# measures what the documents show (about 5 minutes), `more` other cases (about 10). PYTHON=...
# names a Python that has tvmf_ext. Results go to bench/results/GPU; this puts them into a document:
#   python -m bench --suite gpu --load bench/results/GPU/bench.json --document
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
part=${1:-all}
[[ $part =~ ^(all|tests|bench|more)$ ]] ||
  { echo "gpu_round: got $part, wanted tests, bench or more" >&2; exit 2; }
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr ' ' '-')
[ -n "$gpu" ] || { echo "gpu_round: nvidia-smi finds no GPU" >&2; exit 2; }
out=bench/results/$gpu
mkdir -p "$out"
failed=0

# step NAME SECONDS COMMAND...: runs a command for at most so many seconds, writes its output to
# NAME.txt and shows the end of it.
step() {
  local name=$1 seconds=$2 rc=0
  shift 2
  timeout -k 10 "$seconds" "$@" >"$out/$name.txt" 2>&1 || rc=$?
  echo "exit status $rc" >>"$out/$name.txt"
  printf '\n== %s (at %d s)\n%s\n' "$name" "$SECONDS" "$(tail -n 25 "$out/$name.txt")"
  return "$rc"
}

{
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  "$python" -m tvmf_ext
} | tee "$out/about.txt"

if [[ $part =~ ^(all|tests)$ ]]; then
  # A test spends most of its time in the oracle and in Python, so workers share the GPU if
  # pytest-xdist is installed.
  workers=()
  "$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  OMP_NUM_THREADS=2 step tests 240 "$python" -m pytest -q -m cuda --tb=short --durations=10 \
    "${workers[@]}" tests &
  pids=($!)

  # The sanitizers are slow, so they see a few tests: a ragged problem of every mix of dtypes, and a
  # bad label. They watch our kernels alone (kns=tvmf). initcheck would report every value that a
  # kernel of torch wrote, so its tests are those that have none.
  few="between_copies or test_every_mix and cross_entropy and 70 or bad_label_is_nan or ieee or tf32"
  declare -A which=([memcheck]=$few [racecheck]=$few [initcheck]=between_copies)
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      # With torch's allocator an access beyond a buffer stays inside a larger block and is not
      # noticed, so every buffer gets an allocation of its own.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 step "$tool" 200 compute-sanitizer \
        --tool "$tool" --error-exitcode 9 --kernel-regex kns=tvmf \
        "$python" -m pytest -q -x -m cuda tests/cuda/test_gpu.py -k "${which[$tool]}" &
      pids+=($!)
    done
  else
    echo "gpu_round: compute-sanitizer is not on PATH, so its three steps are left out" >&2
    failed=1
  fi
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
fi

if [[ $part =~ ^(all|bench)$ ]]; then
  step bench 240 "$python" -m bench --suite gpu --json "$out/bench.json" --plot "$out/bench.png" ||
    failed=1
  step end-to-end 120 "$python" -m bench.end_to_end --device cuda --seconds 10 \
    --json "$out/end-to-end.json" || failed=1
  step scaling 120 "$python" -m bench.scaling --device cuda --seconds 0.5 \
    --json "$out/scaling.json" --plot "$out/scaling.png" || failed=1
  step kernels 60 "$python" -m bench.kernel_times --json "$out/kernels.json" || failed=1
  for shape in "256 1000 512" "256 8142 2048" "1024 1000000 512"; do
    # shellcheck disable=SC2086  (a shape is three words)
    "$python" -m tvmf_ext plan $shape --dtype bfloat16 --weight-dtype float32 --gpu cuda
    echo
  done >"$out/plans.txt"
fi

if [[ $part =~ ^(all|more)$ ]]; then
  step bench-more 540 "$python" -m bench --suite gpu-more --json "$out/bench-more.json" || failed=1
  step bench-float32 60 "$python" -m bench --device cuda --dtype float32 --seconds 2 \
    --shape 256 8142 2048 --json "$out/bench-float32.json" || failed=1
fi
echo "gpu_round: $SECONDS s, results in $out"
exit "$failed"
