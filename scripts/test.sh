#!/usr/bin/env bash
# Passes the tests: makes .venv if there is none, installs with the dev extra, checks style and types, runs pytest.
#   scripts/test.sh [--all] [PYTEST ARGUMENTS]     without --all the tests marked slow are left out
#   scripts/test.sh --titan03 [PYTEST ARGUMENTS]   the same for torchtitan 0.3, in .venv-titan03: its types, and all tests
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
if [ "${1:-}" = --titan03 ]; then
    install_into_venv '[test,titan03]' .venv-titan03 constraints-titan03.txt
    mypy lora_converter/{titans,titan03,toml03}/*.py
    OMP_NUM_THREADS=1 exec python -m pytest "${@:2}"
fi
install_into_venv '[dev]'

side_by_side() { # Two processes, a core each, since launches leave cores idle; then the tests that measure times.
    local failed=0 chat=(tests/integration/test_chat*.py)
    log=$(mktemp)
    OMP_NUM_THREADS=1 python -m pytest -m "not alone" tests/distributed tests/numerics tests/unit "${chat[@]}" > "$log" 2>&1 &
    trap 'jobs -pr | xargs -r kill; rm -f "$log"' EXIT
    OMP_NUM_THREADS=1 python -m pytest -m "not alone" tests/integration --ignore-glob "*/test_chat*" || failed=1
    wait $! || failed=1
    cat "$log"
    python -m pytest -m alone || failed=1
    return $failed
}

ruff check .
ruff format --check .
mypy
if [ "$*" = --all ]; then
    side_by_side
elif [ "${1:-}" = --all ]; then
    python -m pytest "${@:2}"
else
    python -m pytest -m "not slow" "$@"
fi
