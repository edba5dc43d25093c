#!/usr/bin/env bash
# N processes of one run on this machine, over TCP on localhost: what a pod does, in small.
#
#   launch/local.sh N [--devices=D] [--dry_run] -- --config=configs/demo.py --workdir=DIR
#
# Each process has D CPU devices (default 1). A process that fails stops the others; the status is
# the first bad one. When train was asked to stop and has saved (75), the run is started again, up
# to RESTARTS times (default 0). PORT: of process 0 (default: a free one). PYTHON: default python3.
set -euo pipefail

usage() { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "local.sh: $*" >&2; exit 2; }

[[ $# -gt 0 ]] || { usage; exit 2; }
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
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "--devices=$devices; it must be a whole number above 0"
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

pids=()
stop_all() { [[ ${#pids[@]} -eq 0 ]] || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop_all TERM INT

start() {
  local id port status=0 one ended
  if ((dry_run)); then port=${PORT:-12355}; else port=${PORT:-$(free_port)}; fi
  pids=()
  for ((id = 0; id < count; id++)); do
    local line=("$python" -m coca_jax.train "--coordinator=localhost:$port"
      "--num_processes=$count" "--process_id=$id" "$@")
    if ((dry_run)); then
      printf '%q ' "${line[@]}"
      printf '\n'
    else
      "${line[@]}" &
      pids+=($!)
    fi
  done
  # The first process that ends badly stops the rest, which would wait for it for ever.
  while ((${#pids[@]} > 0)); do
    ended="" one=0
    wait -n -p ended "${pids[@]}" || one=$?
    [[ -n ${ended:-} ]] || continue # a signal to this script woke it: go on waiting
    for id in "${!pids[@]}"; do
      [[ ${pids[id]} != "$ended" ]] || unset "pids[id]"
    done
    if ((one != 0 && status == 0)); then
      status=$one
      ((status == 75)) || stop_all
    fi
  done
  return "$status"
}

status=0
for ((try = 0; try <= ${RESTARTS:-0}; try++)); do
  status=0
  start "$@" || status=$?
  ((status == 75)) || break
done
exit "$status"
