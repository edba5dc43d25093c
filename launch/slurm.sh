#!/usr/bin/env bash
# A training run on GPU nodes under SLURM: one process a GPU, requeued when preempted.
#
#   launch/slurm.sh [--dry_run] -- --config=configs/coca_large.py --workdir=/shared/run
#
# --dry_run prints the batch script and submits nothing. Settings come from the environment:
#   NODES      number of nodes (default 1)       GPUS       per node (default 8)
#   CPUS       cores per GPU (default 8)         TIME       limit, default 24:00:00
#   PARTITION  default: the cluster's            ACCOUNT    default: yours
#   SETUP      a line that activates the environment, as 'source ~/venv/bin/activate'
#
# SLURM sends SIGTERM five minutes before the limit and on preemption; train then saves and exits
# with 75, and the job is put back in the queue. The workdir must be on a shared file system.
set -euo pipefail

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "slurm.sh: $*" >&2; exit 2; }

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
nodes=${NODES:-1}
gpus=${GPUS:-8}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NODES=$nodes; it must be a whole number above 0"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$gpus; it must be a whole number above 0"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
printf -v flags '%q ' "$@"

script() {
  cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=coca_jax
#SBATCH --nodes=${nodes}
#SBATCH --ntasks-per-node=${gpus}
#SBATCH --gpus-per-node=${gpus}
#SBATCH --cpus-per-task=${CPUS:-8}
#SBATCH --time=${TIME:-24:00:00}
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
SBATCH
  [[ -z ${PARTITION:-} ]] || echo "#SBATCH --partition=${PARTITION}"
  [[ -z ${ACCOUNT:-} ]] || echo "#SBATCH --account=${ACCOUNT}"
  cat <<SBATCH
set -uo pipefail
cd $(printf '%q' "$root")
${SETUP:-}
# jax.distributed reads the SLURM_* variables of every task by itself.
srun --kill-on-bad-exit=0 python3 -m coca_jax.train ${flags% }
status=\$?
if [[ \$status == 75 ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
  exit 0
fi
exit "\$status"
SBATCH
}

if ((dry_run)); then
  script
else
  script | sbatch
fi
