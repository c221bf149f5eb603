#!/usr/bin/env bash
# Lint, types and tests: bash scripts/test.sh [arguments for pytest]. From any folder; installs into .venv first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install dev

ruff check .
ruff format --check .
mypy
pytest "$@"
