#!/usr/bin/env bash
# Lint, types and tests: bash scripts/test.sh [arguments for pytest]. From any folder; installs into .venv first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the models of the tests are too small for more

ruff check .
ruff format --check .
mypy
pytest --numprocesses auto --dist worksteal "$@"
