#!/usr/bin/env bash
# The main job, start to end, with no download: see scripts/demo.py. Makes .venv if there is none and installs there.
#   scripts/demo.sh [--quick]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv '[demo]'
exec python scripts/demo.py "$@"
