#!/usr/bin/env bash
# Several processes on this machine, by hand:
#
#   launch/local.sh 2 synthetic --parallel.data 2                    # two GPUs, one per process
#   JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 \
#     launch/local.sh 2 synthetic --batch-size 256 --parallel.data 2 --parallel.expert 2   # four simulated CPU devices
#
# Arguments after the count are those of experiments/train.py. PYTHON names another interpreter, PORT another port.
# Ends with the first exit code that is not 0, after all processes have ended.
set -euo pipefail
count=${1:?usage: launch/local.sh COUNT PRESET [OPTIONS]}
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
port=${PORT:-$((20000 + $$ % 20000))}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
  # On a machine with GPUs process i gets the i-th; elsewhere the variable means nothing.
  CUDA_VISIBLE_DEVICES=$i "$python" experiments/train.py "$@" \
    --processes.count "$count" --processes.index "$i" --processes.coordinator "localhost:$port" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || { ended=$?; [ "$code" != 0 ] || code=$ended; }
done
exit "$code"
