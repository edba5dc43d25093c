#!/usr/bin/env bash
# Makes (once) the virtual environment VENV with coca_jax and the given extras in it.
# usage: source launch/env.sh EXTRAS     '' for none: left out, bash gives the caller's own arguments.
# PYTHON picks the interpreter (3.11 to 3.13).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv}"
extras="${1:+[$1]}"
stamp="$VENV/.installed-${1:-plain}"
if [ ! -e "$stamp" ] || [ "$root/setup.py" -nt "$stamp" ]; then
  "${PYTHON:-python3}" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"coca_jax needs Python 3.11 to 3.13, not {sys.version.split()[0]}: set PYTHON=...")
PY
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  "$VENV/bin/python" -m pip install --quiet --editable "$root$extras"
  touch "$stamp"
fi
