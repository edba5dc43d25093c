#!/usr/bin/env bash
# Makes (once) the virtual environment VENV with coca_jax and the given extras in it.
# usage: source launch/env.sh EXTRAS     '' for none: left out, bash gives the caller's own arguments.
# Settings are those of launch/install.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export VENV="${VENV:-$root/.venv}"
bash "$root/launch/install.sh" "${1:-}"
