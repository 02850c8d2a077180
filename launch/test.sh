#!/usr/bin/env bash
# Sets up and runs lint, format and type checks, builds the docs, then runs all tests on the CPU: about half an hour on two
# cores, at most 75 minutes.
#
#   bash launch/test.sh [--fast] [options of pytest]
#
#   --fast              only the tests that start no process: some minutes
#   MOCTE_TEST_WORKERS  test files that run at the same time                      (default: 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=()
if [ "${1:-}" = --fast ]; then
  fast=(-m fast)
  shift
fi
. launch/setup.sh

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
echo "checks: ruff check"
ruff check .
echo "checks: ruff format"
ruff format --check .
echo "checks: mypy"
mypy
echo "checks: mkdocs"
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet --strict
# Before the tests, while the compiler has the machine's memory for itself.
[ ${#fast[@]} -gt 0 ] || python -m mocte_ds.dist.cpu_op cpu_adam fused_adam
echo "tests: pytest"
# INT lets pytest print what hung and its closing line; a group that does not end is killed.
exec timeout --signal=INT --kill-after=30 4500 python -m pytest -n "${MOCTE_TEST_WORKERS:-2}" --dist loadfile \
  --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
