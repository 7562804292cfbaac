#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with one and no network: the native core, the GPU tests, the kernels' own
# speeds, throughput and latency of four sizes. Within nine minutes; prints as it goes, so a run that is cut off leaves what it had.
#
#   bench/gpu_suite.sh [FOLDER_OF_WHEELS] [FOLDER_OF_RESULTS]        (defaults: .whl, bench/results/gpu)
#
# Needs python3 with torch, triton, transformers, setuptools, wheel and pytest, a C compiler, and wheels of cffi, pycparser,
# highspy and sqlalchemy. Installs into a folder of its own, not into that python3. Seven files of results at most.
set -u -o pipefail
cd "$(dirname "$0")/.."
wheels=${1:-.whl}
results=${2:-bench/results/gpu}
mkdir -p "$results"
site=$(mktemp -d)
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
    timeout -s INT -k 10 "$limit" "$@" # interrupted, pytest still prints what failed so far
    local status=$?
    echo "== $name: exit $status after $((SECONDS - from)) s"
    ((status == 0)) || failed=1
}

# The installed package must win over the folder of the same name here, which lacks kernels/ and the native core.
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH="$site:$PWD" TOKENIZERS_PARALLELISM=true
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
step wheels 40 python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
step install 60 python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$site" .
rm -rf build
python3 -c "import p2l_engine.kernels, p2l_engine._native; print(p2l_engine.__file__)" || { echo "== no package to test"; exit 1; }
pytest=(python3 -m pytest -rfE --tb=short --no-header -p no:cacheprovider --import-mode=importlib)
step "tests of the kernels" 100 "${pytest[@]}" tests/test_kernels.py -k gpu
step throughput 230 python3 -m bench.throughput --model smollm2-135m qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b --peer-count 2000 \
    --rounds 2 --csv "$results/throughput.csv"
step latency 60 python3 -m bench.latency --model smollm2-135m qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b \
    --calls 100 --callers 1 8 64 --csv "$results/latency.csv"
step "tests of the engine" 60 "${pytest[@]}" tests/test_gpu.py
step kernels 40 python3 -m bench.kernels --csv "$results/kernels.csv"
rm -rf "$site"
echo "== all: $((SECONDS - started)) s, exit $failed"
exec >&- 2>&-
wait
exit $failed
