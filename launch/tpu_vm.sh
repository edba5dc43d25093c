#!/usr/bin/env bash
# A training run on a Cloud TPU VM slice (v4, v5e, v5p, v6e): create, install, run on all workers,
# resume after preemption, delete.
#
#   launch/tpu_vm.sh create|install|run|status|delete [--dry_run] [-- TRAIN_FLAGS]
#   launch/tpu_vm.sh all [--dry_run] -- --config=configs/coca_2b.py --workdir=/mnt/bucket/run
#
# Settings come from the environment:
#   NAME      of the slice (required)              ZONE      us-central2-b, ... (required)
#   TYPE      accelerator type, v5litepod-256, v4-4096, v5p-512, v6e-256 (required)
#   RUNTIME   TPU software version (default by TYPE)
#   PROJECT   Google Cloud project (default: gcloud's)
#   SPOT=1    spot capacity: cheaper, may be taken away
#   QUEUED=0  create at once instead of queueing for capacity
#   TRIES     how often `all` starts again after a preemption (default 100)
#
# The workdir must be on Cloud Storage: every worker writes its part of a checkpoint there, and the
# run goes on from it on the next slice. train exits with 75 when it was asked to stop and has saved.
set -euo pipefail

usage() { sed -n '2,19p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

[[ $# -gt 0 ]] || { usage; exit 2; }
command=$1
shift
dry_run=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1; train's own flags stand after --" ;;
  esac
  shift
done
train_flags=("$@")

[[ -n ${NAME:-} ]] || fail "set NAME, the name of the slice"
[[ -n ${ZONE:-} ]] || fail "set ZONE, for example us-central2-b"
place=(--zone="$ZONE")
[[ -z ${PROJECT:-} ]] || place+=(--project="$PROJECT")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

default_runtime() {
  case ${TYPE:-} in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "set TYPE, for example v5litepod-256 (is '${TYPE:-}')" ;;
  esac
}

create() {
  local runtime spot=()
  runtime=${RUNTIME:-$(default_runtime)}
  if [[ ${QUEUED:-1} == 1 ]]; then
    [[ ${SPOT:-0} != 1 ]] || spot=(--spot)
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version="$runtime" "${spot[@]}" "${place[@]}"
    wait_until_ready
  else
    [[ ${SPOT:-0} != 1 ]] || spot=(--spot)
    run gcloud compute tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" \
      --version="$runtime" "${spot[@]}" "${place[@]}"
  fi
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" --format='value(state)' 2>/dev/null ||
    echo MISSING
}

wait_until_ready() {
  if ((dry_run)); then
    echo "# wait until the slice is READY"
    return
  fi
  until [[ $(state) == READY ]]; do
    local queued
    queued=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
      --format='value(state.state)')
    case $queued in
      FAILED | SUSPENDED) fail "the queued resource is $queued; delete it and create again" ;;
    esac
    echo "waiting for capacity: $queued" >&2
    sleep 30
  done
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

install() {
  local archive=coca_jax.tar.gz
  run tar -C "$root" --exclude=.git --exclude=data -czf "/tmp/$archive" .
  run gcloud compute tpus tpu-vm scp "/tmp/$archive" "$NAME:" "${place[@]}" --worker=all
  on_all_workers "mkdir -p coca_jax && tar -C coca_jax -xzf $archive && cd coca_jax && \
python3 -m pip install --quiet -e '.[tpu]'"
}

train() {
  local flags
  [[ ${#train_flags[@]} -gt 0 ]] || fail "give train's flags after --"
  printf -v flags '%q ' "${train_flags[@]}"
  on_all_workers "cd coca_jax && python3 -m coca_jax.train ${flags% }"
}

delete() {
  if [[ ${QUEUED:-1} == 1 ]]; then
    run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet
  fi
}

# Creates, installs and trains; after a preemption does so again, and train resumes by itself.
everything() {
  local try status
  for ((try = 1; try <= ${TRIES:-100}; try++)); do
    create
    install
    status=0
    train || status=$?
    ((status != 0)) || { delete; return 0; }
    # 75: saved and asked to stop. Otherwise it was a preemption only if the slice is gone.
    if ((status != 75)) && [[ $(state) == READY ]]; then
      fail "training failed with status $status; the slice still stands for a look"
    fi
    echo "preempted (try $try): starting again" >&2
    delete || true
  done
  fail "gave up after $((try - 1)) preemptions"
}

case $command in
  create) create ;;
  install) install ;;
  run) train ;;
  status) run gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" ;;
  delete) delete ;;
  all) everything ;;
  *) usage; exit 2 ;;
esac
