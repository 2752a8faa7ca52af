#!/usr/bin/env bash
# Trains one job under every layout, 1 to 8 CPU ranks, on text and on conversations, and prints the largest relative
# differences to one rank.
#   scripts/parity.sh [--titan03]     with --titan03 on torchtitan 0.3, under both of its backends, with its methods
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
if [ "${1:-}" = --titan03 ]; then
    install_into_venv '[test,titan03]' .venv-titan03 constraints-titan03.txt
    LORA_PARITY=all exec python -m pytest -q -rP --show-capture=stdout tests/titan03/test_{parity,methods}03.py -k run_of_one_rank
fi
install_into_venv '[dev]'
LORA_PARITY=all python -m pytest -q tests/distributed/test_parity.py tests/distributed/test_chat_layouts.py
cat outputs/parity.md
