#!/usr/bin/env bash
# Runs train on one worker of a slice, for tpu_vm.sh: in a session of its own, so that it outlives
# the connection that started it.
#
#   launch/worker.sh run FLAGS   starts train, or joins one that runs with the same flags; shows its
#                                log until it ends, and ends with its status
#   launch/worker.sh stop        asks it to save and stop, and waits for it
#   launch/worker.sh idle        fails while train runs
#
# Its log, flags, process number and status lie in .worker beside the code. VENV: as in install.sh.
set -euo pipefail

fail() { echo "worker.sh: $*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$root/.worker
python=${VENV:-$root/.venv}/bin/python
mkdir -p "$here"

running() { # is the process of that number still ours? It may end while this looks.
  [[ -s $here/pid ]] && kill -0 "$(cat "$here/pid")" 2>/dev/null &&
    grep -qs coca_jax.train "/proc/$(cat "$here/pid")/cmdline"
}

ended() { # waits until the parent of train has left its status, for up to 5 s: it may be killed too
  for _ in {1..50}; do
    [[ ! -e $here/status ]] || return 0
    sleep 0.1
  done
  return 1
}

leave() { # VALUE NAME: a file that is there is whole
  echo "$1" >"$here/$2.new"
  mv "$here/$2.new" "$here/$2"
}

# Becomes the parent of train, which leaves its status behind.
keep() {
  local status=0
  "$python" -m coca_jax.train "$@" >"$here/log" 2>&1 </dev/null &
  leave "$!" pid
  wait "$!" || status=$?
  leave "$status" status
}

run() {
  local flags lines=20
  printf -v flags '%q ' "$@"
  if running; then
    [[ $(cat "$here/flags") == "$flags" ]] ||
      fail "train runs here with other flags: $(cat "$here/flags"); stop it first"
  else
    [[ -x $python ]] || fail "no $python; install first"
    lines=+1
    rm -f "$here/pid" "$here/status"
    echo "$flags" >"$here/flags"
    : >"$here/log"
    cd "$root" # recipes are named by configs/NAME.py
    setsid bash "$root/launch/worker.sh" keep "$@" >>"$here/log" 2>&1 </dev/null &
    for _ in {1..600}; do
      [[ ! -s $here/pid ]] || break
      sleep 0.1
    done
    [[ -s $here/pid ]] ||
      fail "train has not started within 60 s ($(tail -n 1 "$here/log")); run this again"
  fi
  tail -n "$lines" --pid="$(cat "$here/pid")" -f "$here/log"
  ended || exit 137 # its parent was killed with it
  exit "$(cat "$here/status")"
}

stop() {
  running || { echo "train is not running"; return; }
  kill -TERM "$(cat "$here/pid")"
  while running; do sleep 0.2; done
  ended || { echo "train has stopped, and nothing left its status"; return; }
  echo "train has stopped with status $(cat "$here/status")"
}

command=${1:-}
[[ $# -eq 0 ]] || shift
case $command in
  run) run "$@" ;;
  stop) stop ;;
  idle) ! running || fail "train runs here; stop it first" ;;
  keep) keep "$@" ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
