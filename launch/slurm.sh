#!/usr/bin/env bash
# A training run on GPU nodes under SLURM: one process a GPU, requeued when preempted.
#
#   launch/slurm.sh [--dry_run] -- --config=coca_large --workdir=/shared/run
#
# --dry_run prints the batch script and submits nothing. Settings come from the environment:
#   NODES      number of nodes (default 1)       GPUS       per node (default 8)
#   CPUS       cores per GPU (default 8)         TIME       limit, default 24:00:00
#   PARTITION  default: the cluster's            ACCOUNT    default: yours
#   VENV       the environment (default: .venv beside this code), made once on a disk that all nodes
#              share, by `VENV=/shared/venv launch/install.sh cuda`
#   SETUP      in its place, a line that makes python3 the right one, as 'module load coca'
#   RESTARTS   of a run that failed (default 3)  PAUSE      seconds before each (default 10)
#   GRACE      seconds that the other processes have when the first has ended (default 300)
#
# SLURM sends SIGTERM five minutes before the limit and on preemption; train then saves and exits
# with 75, and the job is put back in the queue. A run that failed starts again in the job that it
# has, by the table in docs/scaling.md. The workdir must be on a disk that all nodes share, or gs://.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
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
cpus=${CPUS:-8}
grace=${GRACE:-300}
limit=${TIME:-24:00:00}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/restarts.sh"
whole 1 NODES "$nodes"
whole 1 GPUS "$gpus"
whole 1 CPUS "$cpus"
whole 1 GRACE "$grace" # of 0, srun makes for ever
[[ $limit =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ || $limit == UNLIMITED ]] ||
  fail "TIME=$limit; give HOURS:MINUTES:SECONDS, DAYS-HOURS, minutes, or UNLIMITED"
[[ -n $(workdir_of "$@") ]] || fail "give --workdir=DIR behind --, on a disk that all nodes share"
if [[ -n ${SETUP:-} ]]; then
  python=python3
else
  python=${VENV:-$root/.venv}/bin/python
  [[ $python == /* ]] || python=$PWD/$python
  ((dry_run)) || [[ -x $python ]] ||
    fail "no $python: make it with \`VENV=... launch/install.sh cuda\`, or set SETUP"
fi
if ((!dry_run)) && ! command -v sbatch >/dev/null; then
  fail "sbatch is not installed here; --dry_run shows the batch script"
fi
printf -v train '%q ' "$python" -m coca_jax.train "$@"

script() {
  cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=coca_jax
#SBATCH --nodes=${nodes}
#SBATCH --ntasks-per-node=${gpus}
#SBATCH --gpus-per-node=${gpus}
#SBATCH --cpus-per-task=${cpus}
#SBATCH --time=${limit}
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
SBATCH
  [[ -z ${PARTITION:-} ]] || echo "#SBATCH --partition=${PARTITION}"
  [[ -z ${ACCOUNT:-} ]] || echo "#SBATCH --account=${ACCOUNT}"
  cat <<SBATCH
trap : TERM # preemption reaches this script too, which must live to see train's status
cd $(printf '%q' "$PWD")
${SETUP:-}
set -uo pipefail # not before SETUP: what conda and modules run reads variables that nobody has set
export PYTHONPATH=$(printf '%q' "$root")\${PYTHONPATH:+:\$PYTHONPATH}
RESTARTS=$RESTARTS PAUSE=$PAUSE STEADY=$STEADY
source $(printf '%q' "$root/launch/restarts.sh")
while true; do
  # jax.distributed reads the SLURM_* variables of every task by itself.
  srun --cpus-per-task=${cpus} --kill-on-bad-exit=0 --wait=${grace} ${train% }
  status=\$?
  starts_again "\$status" || exit "\$status"
  if [[ \$status == 75 ]]; then
    scontrol requeue "\$SLURM_JOB_ID" || exit 75
    exit 0
  fi
done
SBATCH
}

if ((dry_run)); then
  script
else
  script | sbatch
fi
