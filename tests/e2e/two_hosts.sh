#!/usr/bin/env bash
# A run on two hosts: two network namespaces, each with an ssh server of its own, and launch/multi_node.sh between them.
#
#   bash tests/e2e/two_hosts.sh RUN.yaml FOLDER     # a run file of at least 12 steps; FOLDER is for what the runs write
#
# Trains, stops by Ctrl-C, resumes, starts twice in one folder, kills a rank, cuts the link; says `ok: ...` for each, `skipped: ...` with exit code 77
# where namespaces or an ssh server are not to be had, and ends with exit code 1 at the first thing that is wrong.
# shellcheck disable=SC2317  functions that trap and eval call
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
run=$(realpath "$1") work=$(realpath "$2")
cd "$root"

skip() { echo "skipped: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
for program in ip ssh ssh-keygen; do command -v "$program" >/dev/null || skip "there is no $program"; done
sshd=$(command -v sshd || echo /usr/sbin/sshd)
[ -x "$sshd" ] || skip "there is no sshd (on Debian: apt-get install openssh-server)"

name=mocte$$ addresses=(10.213.77.1 10.213.77.2)
clean_up() {
  local host pid
  for host in a b; do
    for pid in $(cat "$work/sshd-$host.pid" 2>/dev/null); do kill "$pid" 2>/dev/null || true; done
    ip netns delete "$name$host" 2>/dev/null || true
  done
}
trap clean_up EXIT
ip netns add "${name}a" 2>/dev/null || skip "network namespaces cannot be made here"
ip netns add "${name}b"
ip link add veth0 netns "${name}a" type veth peer name veth0 netns "${name}b" || skip "no pairs of network devices here"

mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$work/key"
ssh-keygen -q -t ed25519 -N '' -f "$work/hostkey"
cp "$work/key.pub" "$work/authorized"
chmod 700 "$work"
for number in 0 1; do
  host=$([ "$number" = 0 ] && echo a || echo b)
  ip -n "$name$host" link set lo up
  ip -n "$name$host" address add "${addresses[$number]}/24" dev veth0
  ip -n "$name$host" link set veth0 up
  cat >"$work/sshd-$host.conf" <<CONF
Port 22
ListenAddress ${addresses[$number]}
HostKey $work/hostkey
AuthorizedKeysFile $work/authorized
PidFile $work/sshd-$host.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
CONF
  ip netns exec "$name$host" "$sshd" -f "$work/sshd-$host.conf" -E "$work/sshd-$host.log" || skip "sshd does not start"
done
for _ in $(seq 50); do [ -s "$work/sshd-a.pid" ] && [ -s "$work/sshd-b.pid" ] && break; sleep 0.1; done
printf '%s slots=1\n' "${addresses[@]}" >"$work/hostfile"

ssh_options="-i $work/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=$work/known -o LogLevel=ERROR"
# Starts the launcher on the first host; its process id is in $launcher, what it prints in FOLDER/NAME.log.
start() {
  local log=$work/$1.log
  shift
  HOSTFILE=$work/hostfile MASTER_PORT=${port:-29517} OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu \
    LAUNCHER_OPTIONS="--silence 9 --grace 60 --interface veth0" SSH_OPTIONS=$ssh_options \
    ip netns exec "${name}a" bash launch/multi_node.sh "$run" "$@" >"$log" 2>&1 &
  launcher=$!
}
steps() { if [ -f "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi; }
wait_for_step() {
  local until=$((SECONDS + 150))
  while [ "$(steps "$1")" -lt "$2" ]; do
    kill -0 "$launcher" 2>/dev/null || fail "the run ended before step $2" "$3"
    [ $SECONDS -lt $until ] || fail "step $2 of $1 was not reached" "$3"
    sleep 0.1
  done
}
fail() {
  echo "wrong: $1"
  tail -n 30 "$work/$2.log" || true
  exit 1
}
# Waits for the launcher's end: seconds at most, wanted exit code (or `any failure`), log.
ended() {
  local until=$((SECONDS + $1)) code=0
  while kill -0 "$launcher" 2>/dev/null; do
    [ $SECONDS -lt $until ] || fail "the launcher has not ended after $1 s" "$3"
    sleep 0.2
  done
  wait "$launcher" || code=$?
  if [ "$2" = failure ]; then [ $code -ne 0 ] || fail "exit code 0" "$3"
  else [ $code = "$2" ] || fail "exit code $code, not $2" "$3"; fi
}
# No rank of a run folder is left on any host, at the latest after some seconds.
nobody() {
  local until=$((SECONDS + $2))
  while pgrep -f "pretrain.py .*--out $1" >/dev/null; do
    [ $SECONDS -lt $until ] || fail "processes are left: $(pgrep -af "pretrain.py .*--out $1")" "$3"
    sleep 0.2
  done
}
losses() { python - "$1" <<'PY'
import json, sys
rows = {row["step"]: row["loss"] for row in map(json.loads, open(f"{sys.argv[1]}/metrics.jsonl"))}
print([rows[step] for step in sorted(rows)])
PY
}
PATH=$(dirname "$(command -v python)"):$PATH

start whole --out "$work/whole"
ended 200 0 whole
echo "ok: trained on two hosts, $(steps "$work/whole") steps"

start stopped --out "$work/stopped"
wait_for_step "$work/stopped" 4 stopped
kill -INT "$launcher"
ended 30 130 stopped
nobody "$work/stopped" 1 stopped
reached=$(steps "$work/stopped")
[ "$(cat "$work/stopped/checkpoints/latest")" = "step$reached" ] || fail "no checkpoint of step $reached" stopped
echo "ok: Ctrl-C saved step $reached and left no process"

start resumed --out "$work/stopped"
ended 200 0 resumed
[ "$(losses "$work/stopped")" = "$(losses "$work/whole")" ] || fail "the resumed run has other losses" resumed
echo "ok: resumed bitwise"

start live --out "$work/live" --set training.steps=100000
wait_for_step "$work/live" 3 live
first=$launcher
port=29518 start second --out "$work/live" --set training.steps=100000
ended 150 failure second
grep -q "another process runs in .*/live: process [0-9]* on " "$work/second.log" || fail "the holder is not named" second
launcher=$first
wait_for_step "$work/live" $(($(steps "$work/live") + 1)) live
kill -INT "$launcher"
ended 30 130 live
nobody "$work/live" 1 live
echo "ok: a second start in the folder of a live run was refused, its holder named, and the run went on"

start killed --out "$work/killed"
wait_for_step "$work/killed" 3 killed
pid=$(pgrep -f "pretrain.py .*--out $work/killed" | while read -r one; do
  tr '\0' '\n' <"/proc/$one/environ" | grep -qx RANK=1 && echo "$one" && break; done | head -n 1)
kill -KILL "$pid"
ended 60 failure killed
nobody "$work/killed" 1 killed
grep -q "error: host ${addresses[1]} failed" "$work/killed.log" || fail "the host is not named" killed
echo "ok: a killed rank ended both hosts, and its host is named"

start cut --out "$work/cut"
wait_for_step "$work/cut" 3 cut
ip -n "${name}b" link set veth0 down
ended 120 failure cut
nobody "$work/cut" 90 cut
grep -q "error: host ${addresses[1]} was lost" "$work/cut.log" || fail "the lost host is not named" cut
echo "ok: a cut link ended both hosts, and the lost host is named"
