#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them: format, lint, types, then pytest.
# usage: launch/test.sh [pytest arguments]     -m "" runs the slow ones too
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh test
bin="$VENV/bin"
export PATH="$bin:$PATH" # the tests call tools that are installed there
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
# A worker that dies (XLA ends its process) ends the suite, which would wait for it for ever else.
exec "$bin/python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0 -m "not slow" --durations=10 "$@"
