#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes: kernel tests, kernel bench, story bench; with --train, sprites too.
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
timeout 180 "$python" -P -m pytest $parallel -p no:cacheprovider tests/test_kernels_*.py 2>&1 | tee "$results/tests.log" | tail -n 30
echo "=== whole stories at SDXL's size, random weights"
timeout 150 "$python" bench/story.py --time --device cuda --dtype float16 --images 3 --out bench/results/story-gpu.json 2>&1 |
    tee "$results/story.log"
echo "=== kernels against their peers"
timeout 240 "$python" bench/kernels.py --device cuda --rounds 8 2>&1 | tee "$results/kernels.log"
[ "$results" -ef bench/results ] || cp bench/results/*.json bench/results/*.png "$results/" 2>/dev/null
if [ "$train" != 0 ]; then
    echo "=== sprites, $train minutes"
    work=$(mktemp -d)
    "$python" -P -m consistory.weights.sprites.train restore --work "$work"
    "$python" -P -m consistory.weights.sprites.train unet --work "$work" --minutes "$train" --batch 512 --rate 1e-3
    "$python" -P -m consistory.weights.sprites.train export --work "$work" --checkpoint "$results/checkpoint"
fi
