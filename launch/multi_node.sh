#!/usr/bin/env bash
# Pre-trains on several hosts: the same run file as on one, started and stopped over ssh.
#
#   bash launch/multi_node.sh launch/runs/gpt-750m.yaml [options of launch/pretrain.py]
#
# Needed: this folder at the same path on every host (a shared file system), set up once (bash launch/setup.sh), and ssh
# without a password from this host to all of them. Ctrl-C or SIGTERM here reaches the ranks of all hosts: they save and
# end. A host that fails or is lost ends the run on all others.
#   HOSTFILE           hosts and their numbers of GPUs                       (default: launch/hostfile)
#   MASTER_PORT        port of the first host                                (default: 29500)
#   SSH_OPTIONS        options of ssh, e.g. "-p 2222 -i KEY"
#   LAUNCHER_OPTIONS   more options of the launcher, e.g. "--interface eth0 --restarts 3" (all of them:
#                      python -m mocte_ds.hosts.launcher --help)
# Environment variables of NCCL, gloo, DeepSpeed, Hugging Face and OMP_NUM_THREADS travel to all hosts; further ones go
# into the file .deepspeed_env, NAME=VALUE a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:?"usage: bash launch/multi_node.sh RUN.yaml [options of launch/pretrain.py]"}
shift
[ -f "$run" ] || {
  echo "error: there is no run file $run." >&2
  exit 2
}
if [ -d .venv ]; then
  export PATH=$PWD/.venv/bin:$PATH
fi
# shellcheck disable=SC2086  several words on purpose
exec python -m mocte_ds.hosts.launcher --hostfile "${HOSTFILE:-launch/hostfile}" \
  --master_port "${MASTER_PORT:-29500}" --ssh "${SSH_OPTIONS:-}" ${LAUNCHER_OPTIONS:-} -- launch/pretrain.py --run "$run" "$@"
