#!/usr/bin/env bash
# Everything that wants a GPU, on a bare machine with one and no network: the native core, the GPU tests, the kernels' own
# speeds, throughput and latency of four sizes. Within nine minutes; prints as it goes, so a run that is cut off leaves what it had.
#
#   bench/gpu_suite.sh [FOLDER_OF_WHEELS] [FOLDER_OF_RESULTS]        (defaults: .whl, bench/results/gpu)
#
# Needs python3 with torch, triton, transformers, setuptools and pytest, a C compiler, and wheels of cffi, pycparser and highspy;
# installs these wheels and this checkout (editable) into that python3.
set -u -o pipefail
cd "$(dirname "$0")/.."
wheels=${1:-.whl}
results=${2:-bench/results/gpu}
mkdir -p "$results"
exec > >(tee "$results/suite.log") 2>&1
started=$SECONDS
failed=0

step() { # name, seconds it may take, command
    local name=$1 limit=$2
    shift 2
    local left=$((530 - (SECONDS - started)))
    if ((left < 10)); then
        echo "== $name: no time left"
        return
    fi
    ((limit > left)) && limit=$left
    local from=$SECONDS
    echo "== $name (at $((SECONDS - started)) s, up to $limit s)"
    timeout "$limit" "$@"
    local status=$?
    echo "== $name: exit $status after $((SECONDS - from)) s"
    ((status == 0)) || failed=1
}

export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
step wheels 60 python3 -m pip install -q --no-index --no-deps --no-compile "$wheels"/*.whl
step install 90 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
step tests 150 python3 -m pytest -q --no-header -p no:cacheprovider tests/test_kernels.py tests/test_gpu.py -k gpu
step kernels 60 python3 -m bench.kernels --csv "$results/kernels.csv"
for model in smollm2-135m qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b; do
    step "latency $model" 40 python3 -m bench.latency --model $model --csv "$results/latency-$model.csv"
    step "throughput $model" 75 python3 -m bench.throughput --model $model --csv "$results/throughput-$model.csv"
done
echo "== all: $((SECONDS - started)) s"
exit $failed
