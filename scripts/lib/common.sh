# shellcheck shell=bash disable=SC2034 # much of this is used by the scripts that source this file
# What the scripts share: messages, the distribution, packages, Python, RDMA devices. Sourced, never run.

program=$(basename "$0")
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf '%s: %s\n' "$program" "$*" >&2; }
die() { say "$*"; exit 1; }

# The text between "# help" and "# end of help" at the top of the calling script.
show_help() { sed -n '/^# help$/,/^# end of help$/{/help$/d; s/^# \{0,1\}//; p;}' "$0"; }

# A literal form of the arguments that bash, and mostly anybody, can read back.
quoted() { local text; printf -v text '%q ' "$@"; printf '%s' "${text% }"; }

cache_dir() { printf '%s\n' "${RDMAXFER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rdmaxfer}"; }

# --- the distribution ------------------------------------------------------------------------------------------------

# Sets os_id, os_version (major), os_name and os_family (debian, ubuntu, fedora, el or unknown) from an os-release file.
detect_os() {
  local file=${1:-/etc/os-release} fields
  [[ -r $file ]] || file=/usr/lib/os-release
  mapfile -t fields < <(
    # shellcheck disable=SC1090
    [[ ! -r $file ]] || . "$file"
    printf '%s\n' "${ID:-unknown}" "${VERSION_ID:-0}" "${PRETTY_NAME:-${ID:-an unknown distribution}}" "${ID_LIKE:-}"
  )
  os_id=${fields[0]} os_version=${fields[1]%%.*} os_name=${fields[2]}
  case " ${fields[0]} ${fields[3]} " in
    *" ubuntu "*) os_family=ubuntu ;;
    *" debian "*) os_family=debian ;;
    *" rhel "* | *" centos "* | *" rocky "* | *" almalinux "*) os_family=el ;;
    *" fedora "*) os_family=fedora ;;
    *) os_family=unknown ;;
  esac
}

# --- packages --------------------------------------------------------------------------------------------------------

# Runs a command as root, or fails if nobody can be root here without being asked for a password.
as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo -n "$@"; fi
}
can_be_root() { [[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null; }

# Debian's package state is asked for by name: "dpkg -s" also succeeds for what was removed but not purged.
package_installed() {
  if command -v dpkg-query >/dev/null; then
    # shellcheck disable=SC2016 # dpkg's own variable
    [[ $(dpkg-query -W -f '${Status}' "$1" 2>/dev/null) == *" installed" ]]
  else
    rpm -q --quiet --whatprovides "$1"
  fi
}

apt_update() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 update >/dev/null </dev/null; }

# True if the lists of packages are missing or older than a day.
apt_lists_stale() {
  [[ -z $(find /var/lib/apt/lists -maxdepth 1 -type f -name '*_*' -mmin -1440 -print -quit 2>/dev/null) ]]
}

apt_install() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
    install --no-install-recommends "$@" </dev/null
}

# need_packages --apt NAME... --dnf NAME...: installs what is missing; where it can't, says the line to run and ends.
need_packages() {
  local kind='' manager='' missing=() log
  if command -v apt-get >/dev/null; then manager=apt; elif command -v dnf >/dev/null; then manager=dnf; fi
  [[ -n $manager ]] || die "neither apt-get nor dnf is here: install by hand what these packages hold: $*"
  for word in "$@"; do
    case $word in
      --apt) kind=apt ;;
      --dnf) kind=dnf ;;
      *) if [[ $kind == "$manager" ]] && ! package_installed "$word"; then missing+=("$word"); fi ;;
    esac
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  local line="apt-get install --no-install-recommends ${missing[*]}"
  [[ $manager == apt ]] || line="dnf install ${missing[*]}"
  can_be_root || die "these packages are missing and only root can install them. Run:  sudo $line"
  say "installing ${missing[*]}"
  log=$(mktemp)
  if install_now "$manager" "${missing[@]}" >"$log" 2>&1; then rm -f "$log"; return 0; fi
  tail -n 20 "$log" >&2
  rm -f "$log"
  die "the packages could not be installed (see above). When that is mended, run:  $line"
}

install_now() {
  local manager=$1
  shift
  if [[ $manager == dnf ]]; then
    as_root dnf -y -q install "$@" </dev/null
    return
  fi
  if apt_lists_stale; then apt_update || true; fi
  apt_install "$@" || { apt_update && apt_install "$@"; }   # a list of last week names versions that are gone
}

# --- Python ----------------------------------------------------------------------------------------------------------

# Prints the first Python >= 3.10 that can import pyverbs: a distribution builds its pyverbs for its own Python only,
# which need not be the first one on PATH (pyenv, conda, a virtual environment).
find_pyverbs_python() {
  local python
  for python in "${RDMAXFER_PYTHON:-}" /usr/bin/python3 /usr/bin/python3.{10..16} python3 python3.{10..16}; do
    if [[ -n $python ]] && "$python" -c 'import sys, pyverbs.device; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      command -v "$python"
      return
    fi
  done
  return 1
}

# --- RDMA devices ----------------------------------------------------------------------------------------------------

# Prints the name of the first RDMA device with an active port.
active_device() {
  local state
  for state in "${SYSFS_INFINIBAND:-/sys/class/infiniband}"/*/ports/*/state; do
    [[ -r $state && $(<"$state") == *ACTIVE* ]] || continue
    [[ -c /dev/infiniband/uverbs0 || -n $(ls /dev/infiniband/uverbs* 2>/dev/null) ]] || continue
    state=${state%/ports/*}
    printf '%s\n' "${state##*/}"
    return
  done
  return 1
}
