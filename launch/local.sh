#!/usr/bin/env bash
# N processes of one run on this machine, over TCP on localhost: what a pod does, in small.
#
#   launch/local.sh N [--devices=D] [--dry_run] -- --config=configs/demo.py --workdir=DIR
#
# Each process has D CPU devices (default 1). When the first process ends, the others must end within
# a bound; the status of the run is the first bad one, and docs/scaling.md says which statuses start
# it again. One Ctrl-C asks every process once to save and stop, a second one ends them at once.
#
# Settings come from the environment:
#   RESTARTS  restarts of a run that failed (default 3)    PAUSE  seconds before each (default 10)
#   GRACE     seconds for the others to end, or to save, before they are killed (default 120)
#   ABORT     the same after one has failed, when nothing can be saved (default 10)
#   PORT      of process 0 (default: a free one)           PYTHON  default python3
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
fail() { echo "local.sh: $*" >&2; exit 2; }

[[ $# -gt 0 ]] || { usage; exit 2; }
if [[ $1 == -h || $1 == --help ]]; then usage; exit 0; fi
[[ $1 =~ ^[1-9][0-9]*$ ]] || fail "the first argument is the number of processes, not '$1'"
count=$1
shift
devices=1
dry_run=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --devices=*) devices=${1#--devices=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1; train's own flags stand after --" ;;
  esac
  shift
done
[[ $# -gt 0 ]] || fail "give train's flags after --"
python=${PYTHON:-python3}
grace=${GRACE:-120}
abort=${ABORT:-10}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/restarts.sh"
whole 1 --devices "$devices"
whole 0 GRACE "$grace"
whole 0 ABORT "$abort"
[[ -z ${PORT:-} ]] || whole 1 PORT "$PORT"

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# A session of its own keeps a terminal's Ctrl-C from a process, so that it gets each request once,
# from this script; bash would also have it ignore SIGINT.
own_session='import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])'

pids=()
timer=""
asked=0
starting=0

tell() { # SIGNAL: to every process that is left
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

bound() { # SECONDS until what is left is killed, in place of an earlier bound
  unbound
  sleep "$1" &
  timer=$!
}

unbound() {
  [[ -n $timer ]] || return 0
  kill "$timer" 2>/dev/null || true
  wait "$timer" 2>/dev/null || true
  timer=""
}

# shellcheck disable=SC2329 # called by the trap
stop() { # the first request lets train save, the second does not
  asked=$((asked + 1))
  ((starting)) || pass_on
}
trap stop INT TERM HUP
trap '' PIPE # nobody reads standard error any more: the run goes on

say() { echo "local.sh: $*" >&2 || true; }

pass_on() {
  if ((${#pids[@]} == 0)); then
    return 0 # between two starts
  elif ((asked == 1)); then
    say "asking ${#pids[@]} process(es) to save and stop, for up to $grace s; once more ends them at once"
    tell TERM
    bound "$grace"
  else
    tell INT
    bound "$abort"
  fi
}

start() {
  local id port line
  if ((dry_run)); then port=${PORT:-12355}; else port=${PORT:-$(free_port)}; fi
  pids=()
  starting=1 # a signal that comes before all are known is passed on when they are
  for ((id = 0; id < count; id++)); do
    line=("$python" -m coca_jax.train "--coordinator=localhost:$port"
      "--num_processes=$count" "--process_id=$id" "$@")
    if ((dry_run)); then
      printf '%s=%q ' JAX_PLATFORMS "$JAX_PLATFORMS" XLA_FLAGS "$XLA_FLAGS" PYTHONPATH "$PYTHONPATH"
      printf '%q ' "${line[@]}"
      printf '\n'
    else
      "$python" -ISc "$own_session" "${line[@]}" &
      pids+=($!)
    fi
  done
  starting=0
  ((asked == 0)) || pass_on
}

# Waits for the next end of a process or of the timer and sets `ended` to its number, `one` to its
# status; `ended` is empty where a signal to this script came instead.
next_end() {
  local pid
  ended="" one=0
  # Of several that end in one instant, `wait -n` of bash 5 gives one and forgets the others.
  for pid in "${pids[@]}" ${timer:+"$timer"}; do
    if ! kill -0 "$pid" 2>/dev/null; then
      ended=$pid
      wait "$pid" 2>/dev/null || one=$?
      return 0
    fi
  done
  # bash would tell of each process that a signal ended
  wait -n -p ended "${pids[@]}" ${timer:+"$timer"} 2>/dev/null || one=$?
}

# Waits until all have ended and sets `status`, the first bad one. Whatever ended first, the others
# cannot go on without it: a process stopped or deaf to SIGTERM must not hold the run for ever.
watch() {
  local ended one id failed=0
  status=0
  while ((${#pids[@]} > 0)); do
    next_end
    if [[ -z ${ended:-} ]]; then continue; fi # a signal to this script woke it: go on waiting
    if [[ $ended == "$timer" ]]; then
      timer=""
      say "killing ${#pids[@]} process(es) that did not end"
      for id in "${pids[@]}"; do kill -KILL -- "-$id" 2>/dev/null || true; done
      continue
    fi
    for id in "${!pids[@]}"; do
      [[ ${pids[id]} != "$ended" ]] || unset "pids[id]"
    done
    ((one == 0 || status != 0)) || status=$one
    if ((failed || ${#pids[@]} == 0)); then
      continue
    elif ((one != 0 && one != 75 && asked == 0)); then
      failed=1
      say "a process ended with status $one: the other ${#pids[@]} must end within $abort s"
      # All find the same bad input; asked to stop, train would say that the run can go on.
      ((one == 2)) || tell TERM
      bound "$abort"
    elif [[ -z $timer ]]; then
      bound "$grace"
    fi
  done
  unbound
}

if ((dry_run)); then
  start "$@"
  exit 0
fi
status=0
while true; do
  start "$@"
  watch
  ((asked == 0)) || break
  starts_again "$status" || break
  ((asked == 0)) || break
done
if ((asked == 1 && status == 143)); then
  status=75 # our SIGTERM came before train could answer it: nothing was lost
elif ((asked > 1 && status != 0 && status != 75)); then
  status=130
fi
exit "$status"
