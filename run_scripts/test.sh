#!/usr/bin/env bash
# From a bare clone to a passed test suite: ruff, mypy, import-linter, pytest.
#   bash run_scripts/test.sh                 everything
#   bash run_scripts/test.sh --quick         without the tests marked slow: about two minutes on two cores
#   bash run_scripts/test.sh -k captioning   further arguments go to pytest
set -euo pipefail
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not slow" "$@"
fi
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== mypy"
"$python" -m mypy
echo "== import-linter"
"$venv/bin/lint-imports"
echo "== pytest"
OMP_NUM_THREADS=1 "$python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
