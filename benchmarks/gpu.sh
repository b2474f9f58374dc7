#!/usr/bin/env bash
# The tests marked gpu, then scvi-tools and ours in alternation on a GPU; ends within ten minutes.
#
#   benchmarks/gpu.sh         needs a CUDA device
#   benchmarks/gpu.sh --cpu   the same lines on a CPU with tiny data, to see that they run
#
# PYTHON: with pyro_multivi and its extra test (default: python3). PYRO_MULTIVI_PEER_PYTHON: with scvi-tools; without it
# ours runs alone. OUT: folder of the results (default: benchmarks/results).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}

accelerator=gpu cases=(small multiome) rounds=2
case "${1:-}" in
    "") ;;
    --cpu) accelerator=cpu cases=(tiny) rounds=1 ;;
    *) echo "gpu.sh: '$1' is not an option; --cpu is" >&2; exit 2 ;;
esac

if [ "$accelerator" = gpu ]; then
    "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' || {
        echo "gpu.sh: torch of $python sees no CUDA device; for a dry run give --cpu" >&2
        exit 1
    }
fi

mkdir -p "$out"
# Both limits together leave a minute for starting. A failed test does not keep the figures from us.
timeout 200 "$python" -m pytest -m gpu -rs --durations=5 -p no:cacheprovider tests/test_gpu.py \
    tests/distributions/kernels/test_gradients.py | tee "$out/gpu_tests.txt"
tests=$?
timeout 340 "$python" benchmarks/run.py --accelerator "$accelerator" --case "${cases[@]}" --rounds "$rounds" \
    --precision fp32 --precision bf16 --timeout 90 --out "$out/$accelerator.md" "$out/$accelerator.json"
figures=$?
echo "gpu.sh: tests exited with $tests, the benchmark with $figures; results are in $out"
[ "$tests" -eq 0 ] && [ "$figures" -eq 0 ]
