#!/usr/bin/env bash
# A training run on a Cloud TPU VM slice (v4, v5e, v5p, v6e): create, install, run on all workers,
# resume after preemption, delete.
#
#   launch/tpu_vm.sh all [--dry_run] -- --config=coca_2b --workdir=gs://BUCKET/run
#   launch/tpu_vm.sh create|install|run|stop|status|delete [--dry_run] [-- TRAIN_FLAGS]
#
# Settings come from the environment:
#   NAME      of the slice (required)              ZONE      us-central2-b, ... (required)
#   TYPE      accelerator type, v5litepod-256, v4-4096, v5p-512, v6e-256 (required to create)
#   RUNTIME   TPU software version (default by TYPE)
#   PROJECT   Google Cloud project (default: gcloud's)
#   SPOT=1    spot capacity: cheaper, may be taken away
#   QUEUED=0  create at once instead of queueing for capacity
#   EXTRAS    of the package (default tpu,gcs,seqio)
#   RESTARTS  of a run that failed (default 3)     PAUSE     seconds before each (default 10)
#   POLL      seconds between looks at the slice's state (default 30)
#
# The workdir must be in Cloud Storage, as gs://, or mounted on every worker: each writes its part of
# a checkpoint there, and the run goes on from it on the next slice. train outlives the connection:
# after Ctrl-C here, or a line that drops, `run` shows its log again, and `stop` saves and ends it.
# `all` starts it again by the table of exit statuses in docs/scaling.md, and after each preemption;
# given again, it takes the slice of that NAME and TYPE that is there or is waited for.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
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
case $command in
  -h | --help) usage; exit 0 ;;
  run | all) [[ $# -gt 0 ]] || fail "give train's flags after --" ;;
  create | install | stop | status | delete) ;;
  *) fail "no command '$command'; there are all, create, install, run, stop, status, delete" ;;
esac

[[ -n ${NAME:-} ]] || fail "set NAME, the name of the slice"
[[ -n ${ZONE:-} ]] || fail "set ZONE, for example us-central2-b"
place=(--zone="$ZONE")
[[ -z ${PROJECT:-} ]] || place+=(--project="$PROJECT")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/restarts.sh"
POLL=${POLL:-30}
whole 0 POLL "$POLL"
if [[ $command == run || $command == all ]]; then
  workdir=$(workdir_of "${train_flags[@]}")
  [[ $workdir == gs://* || $workdir == /* ]] ||
    fail "--workdir=$workdir; give gs://BUCKET/run, or the full path of a disk that all workers share"
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ((!dry_run)) && ! command -v gcloud >/dev/null; then
  fail "gcloud is not installed; --dry_run shows what would be done"
fi

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

default_runtime() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE is no v4-, v5litepod-, v5p- or v6e-: set RUNTIME for it" ;;
  esac
}

create() {
  local runtime now=MISSING spot=()
  [[ -n ${TYPE:-} ]] || fail "set TYPE, for example v5litepod-256"
  runtime=${RUNTIME:-$(default_runtime)}
  [[ ${SPOT:-0} != 1 ]] || spot=(--spot)
  if [[ ${QUEUED:-1} == 1 ]]; then
    ((dry_run)) || look_at_queue
    while [[ $now == SUSPENDING || $now == DELETING ]]; do
      sleep "$POLL"
      look_at_queue
    done
    case $now in
      FAILED | SUSPENDED) # an earlier request, which comes to nothing any more
        echo "the queued resource is $now: deleting it and asking again" >&2
        delete
        now=MISSING
        ;;
    esac
    [[ $now != MISSING ]] || # else one waits already
      run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"} "${place[@]}"
    wait_until_ready
  else
    run gcloud compute tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" \
      --version="$runtime" ${spot[@]+"${spot[@]}"} "${place[@]}"
  fi
}

# State and type of the slice (tpu-vm) or of the request for it (queued-resources), or MISSING. Fails
# when gcloud cannot tell: a line that is down is no preemption.
state() { # KIND FIELDS
  if gcloud compute tpus "$1" describe "$NAME" "${place[@]}" --format="value($2)" \
    2>"$scratch/error"; then
    return
  elif grep -qiE 'not.?found' "$scratch/error"; then
    echo MISSING
  else
    cat "$scratch/error" >&2
    return 1
  fi
}

# Sets `now` to that state, once gcloud can tell it. Ends the launcher where what has this name is of
# another TYPE: `all` would train on it, and delete it.
look() { # KIND FIELDS
  local line type
  until line=$(state "$@"); do
    echo "gcloud cannot tell the state of $NAME; asking again in $POLL s" >&2
    sleep "$POLL"
  done
  read -r now type <<<"$line" || true
  [[ -z $type || $type == "${TYPE:-$type}" ]] ||
    fail "$NAME is there and is a $type, not TYPE=$TYPE: give another NAME, or \`delete\` it first"
}

look_at_queue() {
  look queued-resources 'state.state,tpu.nodeSpec[0].node.acceleratorType.basename()'
}

is_ready() {
  local now
  look tpu-vm 'state,acceleratorType.basename()'
  [[ $now == READY ]]
}

wait_until_ready() {
  local now
  if ((dry_run)); then
    echo "# wait until the slice is READY"
    return
  fi
  until is_ready; do
    look_at_queue
    case $now in
      FAILED | SUSPENDED | MISSING) fail "the queued resource is $now; the same command asks again" ;;
    esac
    echo "waiting for capacity: $now" >&2
    sleep "$POLL"
  done
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

# Names what makes up the product, each ended by a zero byte: what git knows but for the tests, and
# recipes and code that it does not know yet; never the user's data, runs and environments.
product() {
  cd "$root"
  if git ls-files --error-unmatch setup.py >/dev/null 2>&1; then
    git ls-files -z -- . ':!tests'
    git ls-files -z --others --exclude-standard -- coca_jax configs launch
  else
    find coca_jax configs launch ./*.* LICENSE -type f -not -path '*/__pycache__/*' -print0
  fi | while IFS= read -r -d '' file; do
    [[ ! -e $file ]] || printf '%s\0' "$file" # git lists what was deleted and not committed
  done
}

# Packs once a launch, so that a run goes on with the code that it began with.
pack() {
  archive=$scratch/coca_jax.tar.gz
  [[ -e $archive ]] || product | COPYFILE_DISABLE=1 tar -C "$root" --null -T - -czf "$archive"
}

install() { # JOIN: what a worker does where train runs already: 'exit 0' or 'exit 2'
  pack || return
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:" "${place[@]}" --worker=all || return
  # Only the product's own folders are replaced: a run may lie beside them.
  on_all_workers "set -e; mkdir -p coca_jax; cd coca_jax; \
[ ! -e launch/worker.sh ] || bash launch/worker.sh idle || $1; rm -rf coca_jax configs launch; \
tar -xzf ../coca_jax.tar.gz; bash launch/install.sh $(printf '%q' "${EXTRAS-tpu,gcs,seqio}")"
}

train() {
  local flags
  printf -v flags '%q ' "${train_flags[@]}"
  on_all_workers "cd coca_jax && bash launch/worker.sh run ${flags% }"
}

delete() {
  if [[ ${QUEUED:-1} == 1 ]]; then
    run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet
  fi
}

# Installs and trains; ssh's own failures (255) join the run again while they are no row of quick
# ones, since train goes on without them.
one_life() {
  local status drops=0 begin
  install 'exit 0' || return
  while true; do
    status=0 begin=$SECONDS
    train || status=$?
    ((status == 255)) && ((!dry_run)) && is_ready || return "$status"
    ((SECONDS - begin < 300)) || drops=0
    drops=$((drops + 1))
    ((drops <= 5)) || return "$status"
    echo "the connection to the slice broke; joining the run again" >&2
    sleep "$PAUSE"
  done
}

# Creates, installs and trains until the run is done; after a preemption on a new slice.
everything() {
  local status
  if ((dry_run)) || ! is_ready; then create; fi
  while true; do
    status=0
    one_life || status=$?
    if ((dry_run || status == 0)); then
      delete
      return
    elif is_ready; then
      starts_again "$status" || break
    else
      echo "the slice was taken away: creating it again" >&2
      delete || true
      create
    fi
  done
  echo "tpu_vm.sh: the slice still stands for a look; \`delete\` ends it" >&2
  return "$status"
}

interrupted() {
  echo "tpu_vm.sh: what runs on $NAME goes on; \`run\` shows it, \`stop\` saves and ends it" >&2
  exit 130
}
trap interrupted INT

case $command in
  create) create ;;
  install) install 'exit 2' ;;
  run) train ;;
  stop) on_all_workers "cd coca_jax && bash launch/worker.sh stop" ;;
  status) run gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" ;;
  delete) delete ;;
  all) everything ;;
esac
