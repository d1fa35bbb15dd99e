# shellcheck shell=bash
# What the scripts beside this file share: where things are, which ports they use, and how to wait.

set -euo pipefail
umask 077
export LC_ALL=C.UTF-8 # numbers and messages read alike everywhere

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
local_dir=$root/.local
log_dir=$local_dir/log
program=$(basename "$0")

# The fleet's services, in the order in which they're started.
mapfile -t services < <(grep -v '^#' "$root/deploy/services")

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "$program" "$*" >&2
  exit 1
}

# Runs the calling script again under the checkout's lock, so that two of them never start or stop the same thing at
# once. `-o` closes the descriptor in the child: the servers that it starts don't inherit the lock.
serialised() {
  mkdir -p "$log_dir"
  [ -O "$local_dir" ] || die "$local_dir belongs to another user: remove it as that user, or work as that user"
  [ -n "${MURMURATION_LOCKED:-}" ] && return
  export MURMURATION_LOCKED=1
  exec flock -o -w 600 "$local_dir/lock" "$0" "$@"
}

# Every port that this checkout uses is its usual one plus the shift, which is remembered: two checkouts run side by
# side with, say, MURMURATION_PORT_SHIFT=2000 given once to the second.
ports() {
  local remembered=0
  [ ! -s "$local_dir/port-shift" ] || remembered=$(<"$local_dir/port-shift")
  port_shift=${MURMURATION_PORT_SHIFT:-$remembered}
  [[ $port_shift =~ ^[0-9]{1,5}$ ]] && ((10#$port_shift <= 13000)) ||
    die "MURMURATION_PORT_SHIFT is '$port_shift': want a number from 0 to 13000"
  port_shift=$((10#$port_shift))
  postgres_port=$((17432 + port_shift))
  amqp_port=$((17672 + port_shift))
  dist_port=$((17673 + port_shift))
  epmd_port=$((17674 + port_shift))
  management_port=$((17675 + port_shift))
  stream_port=$((17676 + port_shift))
  supervisor_port=$((17677 + port_shift))
  health_port=$((17700 + port_shift))
  gateway_port=$((7777 + port_shift))
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
silent() { ! listening "$1"; }

free_port() { # PORT WHAT-FOR
  # Whoever has it may be about to end.
  await 3 silent "$1" ||
    die "port $1 ($2) is taken by another program: stop that, or move all ports with MURMURATION_PORT_SHIFT=2000"
}

# Waits until a command succeeds; false when it hasn't within so many seconds.
await() { # SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# A secret made once and kept.
secret() { # FILE
  [ -s "$1" ] || head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$1"
  cat "$1"
}

# Where a service finds its servers, as the role and the user that are its own, which `fleetctl rights apply` makes.
service_env() { # SERVICE
  local user=murmuration_${1//-/_} password
  mkdir -p "$local_dir/services"
  password=$(secret "$local_dir/services/$1.password")
  printf 'MURMURATION__DATABASE__URL=postgres://%s:%s@127.0.0.1:%s/murmuration\n' "$user" "$password" "$postgres_port"
  # The gateway knows no broker.
  [ "$1" = api-gateway ] || printf 'MURMURATION__BROKER__URL=amqp://%s:%s@127.0.0.1:%s/%%2f\n' "$user" "$password" "$amqp_port"
}

# Processes that these scripts start carry this checkout in their environment, so that a stale file with a process id that
# something else has got meanwhile is told from ours.
export MURMURATION_LOCAL=$local_dir

own_process() { # PID
  tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qxF "MURMURATION_LOCAL=$local_dir"
}
gone() { ! own_process "$1"; } # PID

# Prints the process id in FILE if it is a running process of this checkout.
own_pid() { # FILE
  local pid
  [ -s "$1" ] && pid=$(<"$1") && [[ $pid =~ ^[0-9]+$ ]] && own_process "$pid" && printf '%s\n' "$pid"
}

# Asks the process in FILE to end, and insists when it doesn't. (It may remove the file before it has ended.)
end() { # FILE SECONDS
  local pid
  if pid=$(own_pid "$1"); then
    kill -TERM "$pid"
    if ! await "$2" gone "$pid"; then
      say "$program: process $pid didn't end within $2 s, killing it"
      kill -KILL "$pid" 2>/dev/null || true
      await 10 gone "$pid" || die "process $pid can't be ended"
    fi
  fi
  rm -f "$1"
}

# What went wrong is in the log: shows its end with the error.
die_with_log() { # MESSAGE FILE...
  local message=$1 file
  shift
  for file in "$@"; do
    [ ! -s "$file" ] || { printf -- '--- the end of %s\n' "$file" && tail -n 60 -- "$file"; } >&2
  done
  die "$message"
}
