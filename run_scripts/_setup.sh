# Sourced by the other scripts: a virtual environment in .venv with the package and its tested dependencies.
# Before that they may set: venv (its folder), constraints (the file of pinned versions).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${venv:-.venv}
constraints=${constraints:-constraints.txt}
python=$venv/bin/python
stamp=$venv/installed
wanted=$(cat pyproject.toml setup.py "$constraints" | cksum)
if [ ! -x "$python" ]; then
    echo "== making the virtual environment $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing lavis_lite and its dependencies into $venv (torch is large: a few minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade pip
    "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[test]"
    echo "$wanted" >"$stamp"
fi
