#!/usr/bin/env bash
# Sets up and runs lint, format and type checks, builds the docs, then runs all tests on the CPU: about half an hour on two
# cores, at most 75 minutes.
#
#   bash launch/test.sh [--fast] [options of pytest]
#
#   --fast              only tests that neither start processes nor take seconds: three minutes
#                       without any option, the coverage of controller/, moe/ and zero/ is printed first
#   MOCTE_TEST_WORKERS  test files that run at the same time                      (default: 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=$#
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
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict  # with --quiet no warning would count
# Before the tests, while the compiler has the machine's memory for itself.
[ ${#fast[@]} -gt 0 ] || python -m mocte_ds.dist.cpu_op cpu_adam fused_adam
if [ "$options" = 0 ]; then
  echo "tests: coverage of controller/, moe/ and zero/ by the fast tests"
  python -m pytest -m fast --cov --cov-report=term tests/controller tests/engine tests/moe tests/zero
fi
echo "tests: pytest"
# INT lets pytest print what hung and its closing line; a group that does not end is killed.
exec timeout --signal=INT --kill-after=30 4500 python -m pytest -n "${MOCTE_TEST_WORKERS:-2}" --dist loadfile \
  --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
