#!/usr/bin/env bash
# Makes .venv with everything that mocte-ds needs, and the CPU op that DeepSpeed compiles. Sourced by quickstart.sh and
# test.sh; run on its own it only sets up. Where nothing changed since the last time, it does nothing.
#
#   PYTHON            Python 3.11 or newer to use                                (default: the first one found)
#   MOCTE_TORCH       words for pip in place of torch==2.13.0, where the package index keeps its CPU builds elsewhere
#   MOCTE_SKIP_SETUP  1: install nothing, use the python that is active (containers, clusters with modules)

MOCTE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MOCTE_VENV=$MOCTE_ROOT/.venv
VENV_MARK=.made-by-mocte-ds
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$MOCTE_ROOT/.cache/torch_extensions}

setup_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

has_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# One line while pip works; its output goes to a log that an error shows the end of.
quiet_pip() {
  local log=$MOCTE_ROOT/.cache/pip.log
  if ! "$MOCTE_VENV/bin/python" -m pip install --progress-bar off --disable-pip-version-check "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    setup_fail "pip install $* failed (whole output: $log). Mend the cause (network, free space, package index) and" \
      "start again. MOCTE_TORCH='torch==2.13.0 --index-url URL' gives pip other words for torch."
  fi
}

# What tells a .venv that this script made: nothing else is ever removed.
venv_mark() {
  local text="made by launch/setup.sh of mocte-ds"
  printf '%s\n%s\n' "$text" "$(printf '%s' "$text" | cksum)"
}

remove_venv() {
  [ -e "$MOCTE_VENV" ] || [ -L "$MOCTE_VENV" ] || return 0
  if [ -L "$MOCTE_VENV" ] || ! { venv_mark | cmp -s - "$MOCTE_VENV/$VENV_MARK"; }; then
    # An empty folder is nobody's loss.
    rmdir "$MOCTE_VENV" 2>/dev/null && return 0
    setup_fail "$MOCTE_VENV $1, and this script has not made it, so it is left alone. Remove it yourself, or set" \
      "MOCTE_SKIP_SETUP=1 to use the python that is active."
  fi
  rm -rf "$MOCTE_VENV"
}

install_packages() {
  local python=$1 stamp=$2
  # A .venv that was moved has scripts which point to the old place.
  if [ -f "$stamp" ] && ! grep -qxF "$MOCTE_ROOT" "$stamp"; then remove_venv "was moved here"; fi
  if [ ! -x "$MOCTE_VENV/bin/python" ] || ! "$MOCTE_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    remove_venv "has no python with pip"
    echo "set-up: making .venv with $("$python" --version)"
    # Before the rest: what a kill leaves is ours too.
    mkdir -p "$MOCTE_VENV" && venv_mark >"$MOCTE_VENV/$VENV_MARK"
    "$python" -m venv "$MOCTE_VENV" >"$MOCTE_ROOT/.cache/venv.log" 2>&1 ||
      setup_fail "$python -m venv failed: $(tail -n 3 "$MOCTE_ROOT/.cache/venv.log" | tr '\n' ' ')" \
        "(on Debian and Ubuntu: apt-get install python3-venv)."
  fi
  if [ -n "${MOCTE_TORCH:-}" ]; then
    echo "set-up: installing $MOCTE_TORCH"
    # shellcheck disable=SC2086  several words on purpose
    quiet_pip $MOCTE_TORCH
  elif ! has_gpu; then
    echo "set-up: installing torch==2.13.0 (no GPU found; should this fetch gigabytes of CUDA, see MOCTE_TORCH in README.md)"
    quiet_pip torch==2.13.0
  fi
  echo "set-up: installing mocte-ds and what it needs (some minutes the first time)"
  quiet_pip -e "$MOCTE_ROOT[all,dev]"
}

mocte_setup() {
  local python wanted stamp=$MOCTE_VENV/.mocte-setup
  mkdir -p "$MOCTE_ROOT/.cache"
  if [ "${MOCTE_SKIP_SETUP:-0}" != 1 ]; then
    python=$(find_python) || setup_fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11."
    wanted="$("$python" --version) ${MOCTE_TORCH:-} $(cksum <"$MOCTE_ROOT/setup.py")"$'\n'"$MOCTE_ROOT"
    (
      # Two set-ups at once would spoil each other's .venv.
      if command -v flock >/dev/null 2>&1; then flock 9; fi
      if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        install_packages "$python" "$stamp"
        # Built for the packages before; only what was built by us.
        "$MOCTE_VENV/bin/python" -m mocte_ds.ownership --keep-others "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm"
        printf '%s\n' "$wanted" >"$stamp"
      fi
    ) 9>"$MOCTE_ROOT/.cache/setup.lock" || exit $?
    export PATH=$MOCTE_VENV/bin:$PATH VIRTUAL_ENV=$MOCTE_VENV
  fi
  command -v "${CXX:-g++}" >/dev/null 2>&1 ||
    setup_fail "no C++ compiler (g++), which DeepSpeed needs on a CPU (on Debian and Ubuntu: apt-get install g++)."
  python -m mocte_ds.dist.cpu_op || exit $?
}

mocte_setup
