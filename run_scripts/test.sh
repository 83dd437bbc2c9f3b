#!/usr/bin/env bash
# From a bare clone to a passed test suite. Arguments go to pytest, e.g.: bash run_scripts/test.sh -k captioning
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== pytest"
OMP_NUM_THREADS=1 "$python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
