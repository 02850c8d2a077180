#!/usr/bin/env bash
# A run under a real SLURM on this machine: launch/slurm.sbatch, its time limit, a killed rank, and what is left at the end.
#
#   bash tests/e2e/slurm.sh RUN.yaml FOLDER     # a run file; FOLDER is for SLURM's files and what the run writes
#
# Starts daemons of its own (munged, slurmctld, slurmd) with files in FOLDER alone, and ends them. Says `ok: ...` for each
# thing, `skipped: ...` with exit code 77 where SLURM is not to be had, and ends with exit code 1 at the first thing that is
# wrong. Takes some 7 minutes, most of them the job's time limit and SLURM's pause before a job that was requeued.
# On Debian: apt-get install slurmctld slurmd slurm-client munge
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
run=$(realpath "$1") work=$(realpath "$2")
cd "$root"

skip() { echo "skipped: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "SLURM's daemons need root"
for program in munged slurmctld slurmd sbatch scontrol; do
  command -v $program >/dev/null || skip "there is no $program (on Debian: apt-get install slurmctld slurmd slurm-client munge)"
done

clean_up() {
  local name pid
  for name in slurmd slurmctld munged; do
    pid=$(cat "$work/$name.pid" 2>/dev/null) && kill "$pid" 2>/dev/null || true
  done
}
trap clean_up EXIT
mkdir -p "$work/state" "$work/spool" "$work/run"
dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 700 "$work" "$work/run"
chmod 600 "$work/munge.key"
host=$(hostname -s)
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
PATH=$(dirname "$(command -v python)"):$PATH
cat >"$work/slurm.conf" <<CONF
ClusterName=mocte
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/run/munge.socket,cred_expire=30
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
MailProg=/bin/true
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=10 State=UP
CONF
export SLURM_CONF=$work/slurm.conf
munged --force --key-file "$work/munge.key" --socket "$work/run/munge.socket" --pid-file "$work/munged.pid" \
  --log-file "$work/munged.log" --seed-file "$work/munge.seed" || skip "munged does not start"
slurmctld -f "$SLURM_CONF" || skip "slurmctld does not start"
slurmd -f "$SLURM_CONF" -N "$host" || skip "slurmd does not start"
for _ in $(seq 100); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 0.2; done
sinfo -h -o %T | grep -q idle || skip "SLURM has no idle node: $(tail -n 3 "$work/slurmd.log")"

out=$work/out
fail() {
  echo "wrong: $1"
  scontrol show job "$job" || true
  tail -n 40 "$work/job.log" || true
  scancel "$job" || true
  exit 1
}
fact() { scontrol -o show job "$job" | tr ' ' '\n' | sed -n "s/^$1=//p"; }
# Waits up to seconds for a shell expression; what it is.
wait_for() {
  local until=$((SECONDS + $1))
  until eval "$2"; do
    [ $SECONDS -lt $until ] || fail "after $1 s not: $3"
    sleep 0.5
  done
}
steps() { if [ -f "$out/metrics.jsonl" ]; then wc -l <"$out/metrics.jsonl"; else echo 0; fi; }
events() { grep -c "\"event\": \"$1\"" "$out/events.jsonl" 2>/dev/null || true; }

job=$(OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu sbatch --parsable --time 3 --signal TERM@60 --nodes 1 --ntasks-per-node 2 \
  --cpus-per-task 1 --gpus-per-node 0 --output "$work/job.log" launch/slurm.sbatch "$run" --out "$out" \
  --set training.steps=1000000 --set training.checkpoint_every=1000)
wait_for 150 '[ "$(steps)" -ge 5 ]' "five steps of training"
echo "ok: a job of two tasks trains"

wait_for 240 '[ "$(events stop)" -ge 1 ]' "SIGTERM before the time limit stops the run"
wait_for 60 '[ "$(fact Restarts)" = 1 ]' "the job is back in the queue"
saved=$(cat "$out/checkpoints/latest")
[ "$saved" = "step$(steps)" ] || fail "no checkpoint of the last step, $(steps): $saved"
echo "ok: before the time limit the run saved $saved and the job went back into the queue"

wait_for 240 '[ "$(events resume)" -ge 1 ] && [ "$(steps)" -gt "${saved#step}" ]' "the job resumes"
python - "$out" <<'PY' || fail "steps are missing or double"
import json, sys
rows = [json.loads(line)["step"] for line in open(f"{sys.argv[1]}/metrics.jsonl")]
sys.exit(rows != list(range(1, len(rows) + 1)))
PY
echo "ok: the job resumed from $saved, and every step is there once"

restarts=$(fact Restarts)
pid=$(pgrep -f "pretrain.py .*--out $out" | while read -r one; do
  tr '\0' '\n' <"/proc/$one/environ" | grep -qx RANK=1 && echo "$one" && break; done | head -n 1)
kill -KILL "$pid"
wait_for 120 '[ "$(fact Restarts)" = $((restarts + 1)) ]' "a killed rank puts the job back into the queue"
echo "ok: a killed rank put the job back into the queue"

scancel "$job"
wait_for 60 '! pgrep -f "pretrain.py .*--out $out" >/dev/null' "no process is left"
echo "ok: scancel left no process"
