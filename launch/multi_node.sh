#!/usr/bin/env bash
# Pre-trains on several hosts: the same run file as on one, started by DeepSpeed's launcher over ssh (pdsh).
#
#   bash launch/multi_node.sh launch/runs/gpt-750m.yaml [options of launch/pretrain.py]
#
# Needed: this folder at the same path on every host (a shared file system), set up once (bash launch/setup.sh), and ssh
# without a password from this host to all of them.
#   HOSTFILE           hosts and their numbers of GPUs                       (default: launch/hostfile)
#   MASTER_PORT        port of the first host                                (default: 29500)
#   DEEPSPEED_OPTIONS  more options of the deepspeed launcher, e.g. "--include host1@host2 --ssh_port 2222"
# Environment variables that every rank needs (NCCL_* and PYTHON* travel by themselves) go into the file .deepspeed_env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:?"usage: bash launch/multi_node.sh RUN.yaml [options of launch/pretrain.py]"}
shift
hostfile=${HOSTFILE:-launch/hostfile}
[ -f "$hostfile" ] || {
  echo "error: $hostfile is missing; copy launch/hostfile.example and write your hosts into it." >&2
  exit 2
}
[ -f "$run" ] || {
  echo "error: $run is no run file." >&2
  exit 2
}
if [ -d .venv ]; then
  export PATH=$PWD/.venv/bin:$PATH
fi
venv=()
if [ -f .venv/bin/activate ]; then venv=(--venv_script "$PWD/.venv/bin/activate"); fi
# shellcheck disable=SC2086  several words on purpose
exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" ${venv[@]+"${venv[@]}"} \
  ${DEEPSPEED_OPTIONS:-} launch/pretrain.py --run "$run" "$@"
