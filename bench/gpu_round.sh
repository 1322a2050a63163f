#!/usr/bin/env bash
# What there is to learn on a GPU: the tests of the real device, what the sanitizers say of a few of
# them (`tests`, under 4 minutes), the benchmarks of the documents (`bench`, meant for 5), and others
# (`more`, meant for 10). Results go to bench/results/; `--load` puts them into the documents:
#   python -m bench --suite gpu --load bench/results/GPU/bench.json --readme
#   bash bench/gpu_round.sh [tests|bench|more]  all by default; PYTHON=... has tvmf_ext installed
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

# Runs a step for at most so many seconds, its output to a file, and shows the end of it.
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
  # Most of a test is the oracle's and Python's time: workers share the GPU where xdist is there.
  workers=()
  "$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  OMP_NUM_THREADS=2 step tests 240 "$python" -m pytest -q -m cuda --tb=short --durations=10 \
    "${workers[@]}" tests &
  pids=($!)

  # The tools are slow, and look at our kernels alone: a ragged problem of every mix of dtypes, and
  # a bad label. A write of torch's own kernels is not seen, so that initcheck has tests without.
  few="between_copies or test_every_mix and cross_entropy and 70 or bad_label_is_nan or ieee or tf32"
  declare -A which=([memcheck]=$few [racecheck]=$few [initcheck]=between_copies)
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      # Torch's allocator hides a buffer's end in a larger block; without it each has its own.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 step "$tool" 200 compute-sanitizer \
        --tool "$tool" --error-exitcode 9 --kernel-regex kns=tvmf \
        "$python" -m pytest -q -x -m cuda tests/cuda/test_gpu.py -k "${which[$tool]}" &
      pids+=($!)
    done
  else
    echo "gpu_round: no compute-sanitizer on PATH, its three steps are left out" >&2
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
  step kernels 60 "$python" -m bench.kernels --json "$out/kernels.json" || failed=1
  for shape in "256 1000 512" "256 8142 2048" "1024 1000000 512"; do
    # shellcheck disable=SC2086  (three numbers)
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
