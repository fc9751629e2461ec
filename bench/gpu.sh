#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes: tests, figures, and a profile of the kernels, figures of whole
# stories; with --train, sprites too. What is done is kept if the rest is cut short.
# Needs torch, triton, safetensors, tokenizers, numpy, einops and pytest; installs nothing and uses no network.
#
#     bash bench/gpu.sh [--train MINUTES] [RESULTS_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
train=0
if [ "${1:-}" = --train ]; then
    train=$2
    shift 2
fi
results=${1:-bench/results}
mkdir -p "$results"

# The package, assembled from its three folders without installing anything.
site=$(mktemp -d)
mkdir "$site/consistory"
ln -s "$PWD"/consistory/* "$PWD/kernels" "$PWD/weights" "$site/consistory/"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

echo "=== kernel tests"
parallel=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8")  # compiling takes the time
timeout 150 "$python" -P -m pytest $parallel -p no:cacheprovider tests/test_kernels_*.py 2>&1 | tee "$results/tests.log" | tail -n 30
echo "=== kernels against their peers"
timeout 220 "$python" bench/kernels.py --device cuda --rounds 8 --out "$results" 2>&1 | tee "$results/kernels.log"
echo "=== whole stories at SDXL's size, random weights"
timeout 120 "$python" bench/story.py --time --device cuda --dtype float16 --images 3 --out "$results/story-gpu.json" 2>&1 |
    tee "$results/story.log"
echo "=== attention: blocks, options, and what the profiler counts"
timeout 80 "$python" bench/kernels.py --tiles --device cuda --rounds 8 --out "$results" 2>&1 | tee "$results/tiles.log"
if command -v ncu >/dev/null; then
    timeout 60 ncu --clock-control none -k regex:attend_kernel -c 4 --section SchedulerStats --section Occupancy --metrics \
        sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active \
        "$python" bench/kernels.py --profile --device cuda >"$results/profile.log" 2>&1
    grep -E "attend_kernel|pct_of_peak|Eligible|Occupancy" "$results/profile.log"
fi
if [ "$train" != 0 ]; then
    echo "=== sprites, $train minutes"
    work=$(mktemp -d)
    "$python" -P -m consistory.weights.sprites.train restore --work "$work"
    "$python" -P -m consistory.weights.sprites.train unet --work "$work" --minutes "$train" --batch 512 --rate 1e-3
    "$python" -P -m consistory.weights.sprites.train export --work "$work" --checkpoint "$results/checkpoint"
fi
