#!/usr/bin/env bash
# Installs the code that this script lies in, in a virtual environment, as an ordinary user.
#
#   launch/install.sh [EXTRAS]     tpu, cuda, cuda13, or several: tpu,gcs,seqio; none for a CPU
#
# Settings come from the environment:
#   VENV            the environment (default: .venv beside the code)
#   PYTHON          interpreter (default python3). Where it is not 3.11 to 3.13, uv gets one;
#   PYTHON_VERSION  which one (default 3.12)
#   PIP_FLAGS       more arguments of `pip install`, as --no-deps or --find-links=DIR
#
# Run again, it does nothing unless setup.py has changed or VENV does not run this code. An
# environment runs the code of one folder, the last that was installed in it. uv is used where it is
# installed; where it is needed and is not, pip brings it, into VENV-uv.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
say() { echo "install.sh: $*" >&2; }
fail() { say "$@"; exit 2; }

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  *[!a-z0-9,-]*) fail "'$1' is not a list of extras, as tpu or tpu,gcs" ;;
esac
[[ $# -le 1 ]] || fail "one list of extras, with commas between them, not '$*'"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
read -r -a pip_flags <<<"${PIP_FLAGS:-}"
stamp=$venv/.installed-${extras:-plain}

# The stamp says whose extras are here, Python itself whose code: another clone may have come after.
runs_this_code() {
  "$venv/bin/python" -I - "$root" 2>/dev/null <<'PY'
import importlib.util
import os
import sys

spec = importlib.util.find_spec("coca_jax")
found = os.path.realpath(os.path.dirname(spec.origin)) if spec and spec.origin else None
sys.exit(found != os.path.realpath(os.path.join(sys.argv[1], "coca_jax")))
PY
}
if [[ -e $stamp && ! $root/setup.py -nt $stamp && $(<"$stamp") == "$root" ]] && runs_this_code; then
  exit 0
fi
begin=$SECONDS

python_fits() { # 3.11 to 3.13?
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Sets `uv` to a uv that is there, or to one that pip brings. pip's --target is the only way that
# works without root on systems that keep pip from their Python and have no module venv.
find_uv() {
  uv=$(command -v uv || true)
  [[ -z $uv && -x $venv-uv/bin/uv ]] && uv=$venv-uv/bin/uv
  [[ -z $uv ]] || return 0
  say "getting uv with pip"
  mkdir -p "$(dirname "$venv")"
  if "$python" -m venv "$venv-uv" >/dev/null 2>&1; then
    "$venv-uv/bin/python" -m pip install --quiet uv || fail "pip could not install uv"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install --quiet --target "$venv-uv" uv || fail "pip could not install uv"
  else
    fail "neither uv nor a Python with pip is here; install one of them, or set PYTHON"
  fi
  uv=$venv-uv/bin/uv
}

make_environment() {
  local fits=0
  [[ ! -e $venv || -e $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
    fail "VENV=$venv is there and is no virtual environment; name another folder"
  python_fits "$python" && fits=1
  if ((fits)) && ! command -v uv >/dev/null && "$python" -m venv --clear "$venv" >/dev/null 2>&1; then
    return
  fi
  if ((fits)); then
    version=$("$python" -c 'import sys; print(sys.executable)')
  else
    say "$python is not Python 3.11 to 3.13; uv looks for Python $version, or gets it"
  fi
  find_uv
  "$uv" venv --quiet --clear --python "$version" "$venv" || fail "uv could not make $venv"
  "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true # for people; uv does without pip
}

if ! python_fits "$venv/bin/python"; then
  say "making the environment $venv"
  make_environment
fi
before=$(cat "$stamp" 2>/dev/null || true)
[[ -z $before || $before == "$root" ]] ||
  say "$venv ran the code in $before; now it runs that in $root"
say "installing coca_jax${extras:+[$extras]}, some minutes the first time"
target=$root${extras:+[$extras]}
if uv=$(command -v uv) || { uv=$venv-uv/bin/uv && [[ -x $uv ]]; }; then
  "$uv" pip install --quiet --python "$venv/bin/python" ${pip_flags[@]+"${pip_flags[@]}"} \
    --editable "$target"
else
  # setuptools warns of every editable install that keeps other folders of the code out of sys.path.
  export PYTHONWARNINGS="ignore:Editable installation${PYTHONWARNINGS:+,$PYTHONWARNINGS}"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
  "$venv/bin/python" -m pip install --quiet ${pip_flags[@]+"${pip_flags[@]}"} --editable "$target"
fi
"$venv/bin/python" - "$extras" <<'PY'
import importlib.metadata
import sys

there = importlib.metadata.metadata("coca_jax").get_all("Provides-Extra") or []
unknown = [name for name in sys.argv[1].split(",") if name and name not in there]
if unknown:
    print(f"install.sh: no extra {unknown[0]!r}; there are {', '.join(sorted(there))}", file=sys.stderr)
    sys.exit(2)
PY
echo "$root" >"$stamp"
say "ready after $((SECONDS - begin)) s: $venv/bin/python"
