#!/usr/bin/env bash
# Passes the tests: makes .venv if there is none, installs with the dev extra, checks style and types, runs pytest.
#   scripts/test.sh [--all] [PYTEST ARGUMENTS]     without --all the tests marked slow are left out
#   scripts/test.sh --titan03 [PYTEST ARGUMENTS]   the same for torchtitan 0.3, in .venv-titan03: its types, and all tests
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

side_by_side() { # [FILES AND OPTIONS] -- [FILES AND OPTIONS]: two processes, a core each, since launches leave cores idle.
    local failed=0 first=()
    while [ "$1" != -- ]; do first+=("$1"); shift; done
    log=$(mktemp)
    OMP_NUM_THREADS=1 python -m pytest -m "not alone" "${first[@]}" > "$log" 2>&1 &
    trap 'jobs -pr | xargs -r kill; rm -f "$log"' EXIT
    OMP_NUM_THREADS=1 python -m pytest -m "not alone" "${@:2}" || failed=1
    wait $! || failed=1
    cat "$log"
    return $failed
}

if [ "${1:-}" = --titan03 ]; then
    install_into_venv '[test,titan03]' .venv-titan03 constraints-titan03.txt
    mypy lora_converter/{titans,titan03,toml03}/*.py
    if [ $# -gt 1 ]; then
        OMP_NUM_THREADS=1 exec python -m pytest "${@:2}"
    fi
    half=(tests/titan03/test_{experts,native,chat}03.py)
    side_by_side "${half[@]}" -- tests/titan03 tests/unit "${half[@]/#/--ignore=}"
    exit
fi
install_into_venv '[dev]'
ruff check .
ruff format --check .
mypy
if [ "$*" = --all ]; then
    failed=0 chat=(tests/integration/test_chat*.py)
    side_by_side tests/distributed tests/numerics tests/unit "${chat[@]}" -- tests/integration --ignore-glob "*/test_chat*" || failed=1
    python -m pytest -m alone || failed=1 # these measure times
    exit $failed
elif [ "${1:-}" = --all ]; then
    python -m pytest "${@:2}"
else
    python -m pytest -m "not slow" "$@"
fi
