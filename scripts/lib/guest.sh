# shellcheck shell=bash disable=SC2154 # program and checkout are set by common.sh
# What softroce_vm.sh and softroce_uml.sh share on the host's side: a "box" (a directory of this run) that tells the guest
# what to do, and the way its output and exit status come back. Sourced after common.sh.

# Sets cpus, memory, limit, rw and command from a command line, and nodes if the caller has set it; the caller handles its own
# words first.
parse_guest_options() {
  cpus=2 limit=1800 rw=()
  while [[ $# -gt 0 ]]; do
    case $1 in
      --cpus | --memory | --mem | --timeout | --rw | --nodes) [[ $# -ge 2 ]] || die "$1 needs a value (see --help)" ;;
    esac
    case $1 in
      --cpus) cpus=$2 && shift ;;
      --memory | --mem) memory=$2 && shift ;;
      --timeout) limit=${2%s} && shift ;;
      --rw)
        [[ -d $2 ]] || die "--rw $2: no such directory"
        rw+=("$(realpath "$2")") && shift ;;
      --nodes)
        [[ -n ${nodes:-} ]] || die "--nodes: only scripts/softroce_vm.sh can have two"
        nodes=$2 && shift ;;
      --) shift && break ;;
      -*) die "unknown option $1 (see --help)" ;;
      *) die "put -- before the command:  $program -- $(quoted "$@")" ;;
    esac
    shift
  done
  command=("$@")
  [[ $cpus =~ ^[1-9][0-9]*$ ]] || die "--cpus takes a number, not $cpus"
  [[ $memory =~ ^[1-9][0-9]*[MG]$ ]] || die "--memory takes a size like 2G or 512M, not $memory"
  [[ $limit =~ ^[1-9][0-9]*$ ]] || die "--timeout takes a number of seconds, not $limit"
  [[ ${nodes:-1} =~ ^[12]$ ]] || die "--nodes takes 1 or 2, not $nodes"
  [[ ${#command[@]} -gt 0 ]] || die "no command: write it after --, as in  $program -- ibv_devinfo"
}

# Directories that the guest's fresh /tmp, /run and /dev/shm would hide, but which the command needs.
needed_directories() {
  local entry
  printf '%s\n' "$checkout" "$PWD" ${VIRTUAL_ENV:+"$VIRTUAL_ENV"}
  local -a entries
  IFS=: read -r -a entries <<<"$PATH"
  for entry in "${entries[@]}"; do [[ $entry != /* || ! -d $entry ]] || printf '%s\n' "$entry"; done
}

# fill_box KIND [NODE]: fills the box of a guest of this kind (vm, uml): the command, its environment, the directories to show
# and to make writable. NODE is the number of one of several.
fill_box() {
  local name
  { printf 'cd %q\n' "$PWD"; printf 'command=(%s)\n' "$(quoted "${command[@]}")"; } >"$box/command"
  {
    for name in $(compgen -e); do
      case $name in
        PATH | CI | TZ | TERM | LANG | LC_* | RDMAXFER_* | PYTHON* | PYTEST_* | VIRTUAL_ENV | COLUMNS | NO_COLOR | FORCE_COLOR)
          printf 'export %s=%q\n' "$name" "${!name}" ;;
      esac
    done
  } >"$box/environment"
  needed_directories | grep -E '^(/tmp|/var/tmp|/run|/dev/shm)/' | sort -u >"$box/show" || true
  if [[ ${#rw[@]} -gt 0 ]]; then printf '%s\n' "${rw[@]}"; fi >"$box/rw"
  sed 's/\bumip\b//' /proc/cpuinfo >"$box/cpuinfo"
  if [[ /dev/stdout -ef /dev/stderr ]]; then touch "$box/merged"; fi   # one stream keeps the order of lines
  {
    printf '#!/bin/bash\nguest=%q box=%q now=%q siw=%q node=%q\n' "$1" "$box" "$EPOCHSECONDS" "${SIW:-}" "${2:-}"
    cat "$checkout/scripts/lib/guest-init.sh"
  } >"$box/init"
  chmod +x "$box/init"
  mkfifo "$box/out" "$box/err" "$box/never"
}

# guest_run ENGINE...: runs the engine (which writes to the FIFOs $box/out and $box/err, open as 3 and 4, and leaves the
# command's exit status in $box/rc) until the limit. Ends the script with the command's exit status.
guest_run() {
  local status=0 readers
  cat "$box/out" & readers=("$!")
  cat "$box/err" >&2 & readers+=("$!")
  "$@" </dev/null >>"$box/log" 2>&1 3<>"$box/out" 4<>"$box/err" &
  engine=$!
  (   # a builtin waits: nothing is left behind when this is killed
    trap - EXIT
    read -r -t "$limit" <>"$box/never" || { : >"$box/expired" && kill -KILL "$engine"; }
  ) 2>/dev/null & watcher=$!
  wait "$engine" 2>/dev/null || status=$?
  engine=''
  : <>"$box/out" <>"$box/err"   # an engine that never opened them would leave the readers waiting
  wait "${readers[@]}" || true
  if [[ -s $box/rc ]]; then exit "$(tr -dc 0-9 <"$box/rc")"; fi
  if [[ -e $box/expired ]]; then
    say "the command did not end within $limit s: stopped (a longer limit: --timeout)"
    exit 124
  fi
  tail -n 40 "$box/log" >&2
  [[ ! -s $box/console ]] || tail -n 40 "$box/console" | tr -d '\r' >&2
  die "the guest ended (status $status) before the command did; its last messages are above"
}

# The box, and everything that runs for it, goes when the script ends, however it ends.
open_box() {
  engine='' watcher=''
  mkdir -p "$1"
  box=$(mktemp -d "$1/run.XXXXXX")
  trap close_box EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}
close_box() {
  if [[ -n $engine ]]; then
    kill -KILL "$engine" 2>/dev/null || true   # User Mode Linux' other processes go with its first
    wait "$engine" 2>/dev/null || true
  fi
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  rm -rf "$box"
}
