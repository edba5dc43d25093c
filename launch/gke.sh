#!/usr/bin/env bash
# A training run on a GKE cluster with TPU node pools, as one JobSet. A preempted slice is restarted
# by JobSet, and train resumes from its workdir.
#
#   launch/gke.sh [--dry_run] -- --config=configs/coca_2b.py --workdir=/mnt/bucket/run
#
# --dry_run prints the manifest and sends nothing. Settings come from the environment:
#   NAME         of the JobSet (required)
#   IMAGE        container image with coca_jax[tpu] installed, code in /app (required)
#   ACCELERATOR  node label, tpu-v5-lite-podslice, tpu-v4-podslice, tpu-v5p-slice, tpu-v6e-slice
#   TOPOLOGY     16x16, 8x16x16, ... (required)
#   CHIPS        chips of one host (default 4)
#   SLICES       number of slices (default 1)   RESTARTS   allowed restarts (default 100)
#   NAMESPACE    default: default               SERVICE_ACCOUNT  for Cloud Storage (default: default)
set -euo pipefail

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "gke.sh: $*" >&2; exit 2; }

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
[[ $# -gt 0 ]] || fail "give train's flags after --"
[[ -n ${NAME:-} ]] || fail "set NAME, the name of the JobSet"
[[ -n ${IMAGE:-} ]] || fail "set IMAGE, a container image with coca_jax[tpu]"
[[ -n ${ACCELERATOR:-} ]] || fail "set ACCELERATOR, for example tpu-v5-lite-podslice"
[[ ${TOPOLOGY:-} =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "set TOPOLOGY, for example 16x16"
chips=${CHIPS:-4}
total=1
for side in ${TOPOLOGY//x/ }; do total=$((total * side)); done
((total % chips == 0)) || fail "CHIPS=$chips does not divide the $total chips of $TOPOLOGY"
hosts=$((total / chips))

quote() { # a YAML double-quoted string
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
arguments=""
for flag in "$@"; do arguments+=", $(quote "$flag")"; done

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${NAME}
  namespace: ${NAMESPACE:-default}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: ${hosts}
        completions: ${hosts}
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300  # time to finish a step and save
            serviceAccountName: ${SERVICE_ACCOUNT:-default}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: ${ACCELERATOR}
              cloud.google.com/gke-tpu-topology: ${TOPOLOGY}
            containers:
            - name: train
              image: ${IMAGE}
              workingDir: /app
              command: ["python3", "-m", "coca_jax.train"${arguments}]
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                requests: {google.com/tpu: ${chips}}
                limits: {google.com/tpu: ${chips}}
YAML
}

if ((dry_run)); then
  manifest
else
  manifest | kubectl apply -f -
fi
