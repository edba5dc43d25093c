#!/usr/bin/env bash
# The name of version 0.1 for `coca-jax ablate`, until 0.3.
# usage: launch/ablations.sh [FOLDER] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=runs/ablations
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  folder=$1
  shift
fi
echo "launch/ablations.sh is now coca-jax ablate examples/ablations.toml --out=$folder;" \
  "the old name works until 0.3" >&2
source launch/env.sh ""
exec "$VENV/bin/python" -m coca_jax ablate examples/ablations.toml --out="$folder" "$@"
