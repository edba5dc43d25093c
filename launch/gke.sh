#!/usr/bin/env bash
# A training run on a GKE cluster with TPU or GPU nodes, as one JobSet (0.11 or newer). A preempted
# slice is made again by JobSet, and train resumes from its workdir.
#
#   launch/gke.sh [--dry_run] -- --config=coca_2b --workdir=gs://BUCKET/run
#
# --dry_run prints the manifest and sends nothing. Settings come from the environment:
#   NAME         of the JobSet (required)
#   IMAGE        the container image (required); build and push it with
#                docker build -f launch/Dockerfile --build-arg EXTRAS=tpu,gcs,seqio -t IMAGE .
#   ACCELERATOR  node label, tpu-v5-lite-podslice, tpu-v4-podslice, tpu-v5p-slice, tpu-v6e-slice,
#                tpu7x, or nvidia-h100-80gb, ... (required)
#   TOPOLOGY     of a TPU slice: 16x16, 8x16x16, ... (required with a TPU)
#   CHIPS        TPU chips of one host (default 4)   SLICES  number of TPU slices (default 1)
#   NODES        GPU nodes (default 1)               GPUS    of one node (default 8)
#   RESTARTS     of a run that failed (default 3)    NAMESPACE  default: default
#   SERVICE_ACCOUNT  one that may write to the bucket (default: default)
#
# --workdir=/mnt/BUCKET/run mounts that bucket at /mnt/BUCKET with the Cloud Storage FUSE driver, and
# data may be read from there too; gs:// needs no mount. Statuses restart a run by the table in
# docs/scaling.md: 75 and disruptions always, 2 and 130 never, others RESTARTS times.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
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
# Of a pod's name, at most 63 characters, JobSet takes -workers-N-NNNN and more of its own.
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME=$NAME; it must be at most 40 small letters, digits and -, as coca-2b"
[[ -n ${IMAGE:-} ]] || fail "set IMAGE, the container image that launch/Dockerfile makes"
[[ -n ${ACCELERATOR:-} ]] || fail "set ACCELERATOR, for example tpu-v5-lite-podslice"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/restarts.sh"

quote() { # a YAML double-quoted string
  local text=${1//\\/\\\\}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//\"/\\\"}"
}

replicas=1
processes=""
if [[ $ACCELERATOR == nvidia-* ]]; then
  hosts=${NODES:-1} chips=${GPUS:-8} resource=nvidia.com/gpu
  whole 1 NODES "$hosts"
  whole 1 GPUS "$chips"
  # A TPU's processes find each other by themselves; these learn it from the names of JobSet.
  processes=", $(quote "--coordinator=$NAME-workers-0-0.$NAME:8476"), $(quote "--num_processes=$hosts")"
  processes+=", \"--process_id=\$(JOB_COMPLETION_INDEX)\""
  ((hosts > 1)) || processes=""
else
  [[ $ACCELERATOR == tpu* ]] ||
    fail "ACCELERATOR=$ACCELERATOR; it is a node label, as tpu-v5-lite-podslice or nvidia-h100-80gb"
  [[ ${TOPOLOGY:-} =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "set TOPOLOGY, for example 16x16"
  chips=${CHIPS:-4} replicas=${SLICES:-1} resource=google.com/tpu
  whole 1 CHIPS "$chips"
  whole 1 SLICES "$replicas"
  total=1
  for side in ${TOPOLOGY//x/ }; do total=$((total * side)); done
  ((total % chips == 0)) || fail "CHIPS=$chips does not divide the $total chips of $TOPOLOGY"
  hosts=$((total / chips))
fi

arguments=$processes
workdir=$(workdir_of "$@")
for flag in "$@"; do
  arguments+=", $(quote "${flag//\$(/\$\$(}")" # Kubernetes would replace $(NAME)
done
bucket=""
case $workdir in
  gs://* | s3://*) ;;
  /mnt/?*/?*)
    bucket=${workdir#/mnt/}
    bucket=${bucket%%/*}
    ;;
  *) fail "--workdir=$workdir; a pod's own disk ends with it: give gs://BUCKET/run or /mnt/BUCKET/run" ;;
esac

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quote "$NAME")
  namespace: $(quote "${NAMESPACE:-default}")
YAML
  [[ $resource == nvidia* ]] || cat <<YAML
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
YAML
  cat <<YAML
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS}
    rules:
    - name: never
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ["exit code (2|130) "]
    - name: always
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: ${replicas}
    template:
      spec:
        parallelism: ${hosts}
        completions: ${hosts}
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2, 75, 130, 143]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
YAML
  [[ -z $bucket ]] || cat <<YAML
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
YAML
  cat <<YAML
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300  # time to finish a step and save
            serviceAccountName: $(quote "${SERVICE_ACCOUNT:-default}")
            nodeSelector:
YAML
  if [[ $resource == nvidia* ]]; then
    echo "              cloud.google.com/gke-accelerator: $(quote "$ACCELERATOR")"
  else
    echo "              cloud.google.com/gke-tpu-accelerator: $(quote "$ACCELERATOR")"
    echo "              cloud.google.com/gke-tpu-topology: $(quote "$TOPOLOGY")"
  fi
  cat <<YAML
            containers:
            - name: train
              image: $(quote "$IMAGE")
              command: ["python3", "-m", "coca_jax.train"${arguments}]
              ports:
              - containerPort: 8080
              - containerPort: 8471
              - containerPort: 8476
              - containerPort: 8482
              resources:
                requests: {${resource}: ${chips}}
                limits: {${resource}: ${chips}}
              volumeMounts:
              - {name: memory, mountPath: /dev/shm}
YAML
  [[ -z $bucket ]] || echo "              - {name: bucket, mountPath: $(quote "/mnt/$bucket")}"
  cat <<YAML
            volumes:
            - {name: memory, emptyDir: {medium: Memory}}
YAML
  [[ -z $bucket ]] || cat <<YAML
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $(quote "$bucket"), mountOptions: implicit-dirs}
YAML
}

if ((dry_run)); then
  manifest
else
  command -v kubectl >/dev/null || fail "kubectl is not installed; --dry_run shows the manifest"
  manifest | kubectl apply -f -
fi
