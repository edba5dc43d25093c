#!/usr/bin/env bash
# Installs coca_jax in .venv, trains configs/demo.py on this machine, evaluates, writes a report.
# usage: launch/demo.sh [WORKDIR] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=runs/demo
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$1
  shift
fi
echo "demo: setting up the environment" >&2
source launch/env.sh ""
"$VENV/bin/python" -m coca_jax.train --config=configs/demo.py --workdir="$workdir" "$@"
"$VENV/bin/python" -c \
  'import sys; from coca_jax.data import synthetic_source; synthetic_source.write_folder(sys.argv[1], 12)' \
  "$workdir/images"
"$VENV/bin/python" -m coca_jax caption --checkpoint="$workdir" --out="$workdir/captions.jsonl" \
  "$workdir/images"
echo "demo: report in $workdir/report.html, scores in $workdir/eval.json," \
  "captions in $workdir/captions.jsonl"
