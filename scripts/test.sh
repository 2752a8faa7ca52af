#!/usr/bin/env bash
# Passes the tests: makes .venv if there is none, installs with the dev extra, checks style and types, runs pytest.
#   scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv '[dev]'
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
