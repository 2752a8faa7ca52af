#!/usr/bin/env bash
# Passes the tests: makes .venv if there is none, installs with the dev extra, checks style and types, runs pytest.
#   scripts/test.sh [--all] [PYTEST ARGUMENTS]     without --all the tests marked slow are left out
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv '[dev]'
tier=(-m "not slow")
if [ "${1:-}" = --all ]; then
    tier=()
    shift
fi
ruff check .
ruff format --check .
mypy
python -m pytest "${tier[@]}" "$@"
