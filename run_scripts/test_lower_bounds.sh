#!/usr/bin/env bash
# The quick tests with the lowest versions that pyproject.toml declares, in the virtual environment .venv-min (7 GB):
#   bash run_scripts/test_lower_bounds.sh
# Arguments go to pytest.
set -euo pipefail
venv=.venv-min
constraints=constraints-min.txt
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
"$python" -m pip freeze --exclude-editable | grep -iE "^(torch|transformers|timm|numpy)=="
OMP_NUM_THREADS=1 "$python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile -m "not slow" "$@"
