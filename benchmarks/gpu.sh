#!/usr/bin/env bash
# Checks and measures on one GPU in a few minutes:
#   bash benchmarks/gpu.sh FOLDER               all recorded cases, precisions and compiled layers; then speed and memory
#   bash benchmarks/gpu.sh FOLDER --tiny        tiny sizes on the CPU, to see that it runs
# PYTHON is the interpreter (default: python). Writes FOLDER/{checks.txt,blip2.json,blip2.txt,blip.txt}; the tables are
# also printed. Its exit code is that of the checks.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: $0 FOLDER [--tiny]" >&2 && exit 2; }
out=$1
python=${PYTHON:-python}
blip2=(--device cuda --dtype bf16 --repeats 3)
blip=(--device cuda --dtype bf16 --depth 12 --batch 32 --image-size 384 --repeats 3)
tests=(-m gpu)
if [ "${2:-}" = --tiny ]; then
    blip2=(--device cpu --tiny --tokens 4 --repeats 1)
    blip=(--depth 1 --image-size 32 --batch 2 --repeats 1)
    tests=(-m "not slow" -k "test_case and blip_caption")
fi
mkdir -p "$out"
checks=0
"$python" -m pytest -q -p no:cacheprovider tests/test_reference.py tests/test_gpu.py tests/test_benchmarks.py "${tests[@]}" \
    >"$out/checks.txt" 2>&1 || checks=$?
tail -n 3 "$out/checks.txt"
"$python" benchmarks/throughput.py "${blip2[@]}" --json "$out/blip2.json" | tee "$out/blip2.txt"
"$python" benchmarks/blip.py "${blip[@]}" | tee "$out/blip.txt"
exit "$checks"
