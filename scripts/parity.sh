#!/usr/bin/env bash
# Trains one job under every layout, 1 to 8 CPU ranks, on text and on conversations, and prints the largest relative
# differences to one rank.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv '[dev]'
LORA_PARITY=all python -m pytest -q tests/distributed/test_parity.py tests/distributed/test_chat_layouts.py
cat outputs/parity.md
