#!/usr/bin/env bash
# All tests, in a virtual environment of their own: bash tools/test.sh [pytest arguments]
set -euo pipefail
export OMP_WAIT_POLICY=passive  # threads that wait by spinning make two programs on two cores many times slower
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -f .venv/bin/activate ] || python3 -m venv .venv
    . .venv/bin/activate
fi
pip install --quiet -r requirements.txt
python tools/offline_models.py
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile "$@"  # two processes of one thread each
