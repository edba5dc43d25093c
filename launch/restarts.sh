#!/usr/bin/env bash
# What a launcher does when train has ended, by its exit status: the table in docs/scaling.md.
# usage: source launch/restarts.sh; starts_again STATUS && ...
#
# Settings come from the environment:
#   RESTARTS  how often a run that failed is started again, in all (default 3)
#   PAUSE     seconds to wait before that (default 10)
#   STEADY    seconds of running after which a failure counts as the first one again (default 3600)
RESTARTS=${RESTARTS:-3}
PAUSE=${PAUSE:-10}
STEADY=${STEADY:-3600}
failures=0
started=$SECONDS

# Ends the launcher with status 2 unless VALUE is a whole number from LEAST (0 or 1) on.
whole() { # LEAST NAME VALUE
  local least="0 or more"
  [[ $1 == 0 ]] || least="above 0"
  [[ $3 =~ ^(0|[1-9][0-9]*)$ && ($1 == 0 || $3 != 0) ]] || {
    echo "${0##*/}: $2=$3; it must be a whole number $least" >&2
    exit 2
  }
}

for setting in RESTARTS PAUSE STEADY; do whole 0 "$setting" "${!setting}"; done

# The value of --workdir among train's flags, as --workdir=DIR or --workdir DIR, the last one where there
# are several; nothing where they have none.
workdir_of() {
  local value=""
  while [[ $# -gt 0 ]]; do
    case $1 in
      --workdir=*) value=${1#--workdir=} ;;
      --workdir) value=${2:-} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# Succeeds when a run that ended with STATUS is to be started again, and says why on standard error.
starts_again() {
  local ran=$((SECONDS - started))
  started=$SECONDS
  case $1 in
    0) return 1 ;; # done
    2) # bad input: it would fail again
      echo "train found bad input (status 2): not started again" >&2
      return 1
      ;;
    130) return 1 ;; # a second Ctrl-C
    143) # SIGTERM before train could answer it, in the first instants: nothing was lost
      echo "train was asked to stop before it began (status 143): starting it again" >&2
      return 0
      ;;
    75) # the platform asked it to stop, and it has saved
      echo "train was asked to stop and has saved (status 75): starting it again" >&2
      return 0
      ;;
  esac
  ((ran < STEADY)) || failures=0
  failures=$((failures + 1))
  if ((failures > RESTARTS)); then
    echo "train failed (status $1), $failures time(s) with this one: giving up (RESTARTS=$RESTARTS)" >&2
    return 1
  fi
  echo "train failed (status $1): starting it again in $PAUSE s ($failures of $RESTARTS)" >&2
  sleep "$PAUSE" & # waited for in this way, a signal to the launcher is answered at once
  wait "$!" || true
  started=$SECONDS
}
