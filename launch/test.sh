#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them: format, lint, types, then pytest.
# usage: launch/test.sh [--whole] [pytest arguments]
#   --whole: those marked "long" too, one test in nineteen and two thirds of the time, as
#   continuous integration does; where files are named, theirs run too. -m "" runs besides what is
#   marked "slow", as CI does once a week with -m slow.
set -euo pipefail
marks="not slow and not long"
if [[ ${1:-} == --whole ]]; then
  marks="not slow"
  shift
elif [[ "$*" == *tests/* ]]; then
  marks="not slow"
fi
cd "$(dirname "$0")/.."
source launch/env.sh test
bin="$VENV/bin"
export PATH="$bin:$PATH" # the tests call tools that are installed there
# What Python compiles is kept, or every worker and every command of a test would compile it again;
# for all tests it is compiled here, on the core that ruff and mypy leave idle.
unset PYTHONDONTWRITEBYTECODE
if [[ "$*" != *tests/* ]]; then
  "$bin/python" -m pytest -q --collect-only -m "" >/dev/null 2>&1 &
  trap 'kill $! 2>/dev/null || true' EXIT # it ends too where ruff or mypy finds a fault
fi
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
wait
# Three workers fill two cores, of which two leave one idle for a tenth of the time; each grows to
# some 4 GiB.
memory=$(awk '/^MemTotal/ {print $2}' /proc/meminfo 2>/dev/null || true)
workers=$((${memory:-0} > 14000000 ? 3 : 2))
# A worker that dies (XLA ends its process) ends the suite, which would wait for it for ever else.
exec "$bin/python" -m pytest -q -n "${TEST_PROCESSES:-$workers}" --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0 -m "$marks" --durations=10 "$@"
