#!/usr/bin/env bash
# Builds the wheel, installs it into empty environments and runs the README's commands there.
# usage: launch/wheel_test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh test
exec "$VENV/bin/python" tests/clean_install.py
