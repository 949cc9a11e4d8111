#!/usr/bin/env bash
# help
# Gives this machine an RDMA device in software, so that programs for RDMA run without an RDMA network card.
#
#   sudo scripts/setup_softroce.sh up [--netdev DEV] [--name rxe0]
#   sudo scripts/setup_softroce.sh down
#   scripts/setup_softroce.sh status [--name rxe0]
#
# RDMA moves data from one program's memory into another's, on this machine or across a network, without a copy in between.
# It takes special network cards, or Soft-RoCE: a driver of the Linux kernel (rdma_rxe) that does the same over any card.
#
#   up      installs what is missing, loads the driver, adds the device, allows programs to register memory,
#           opens the firewall (UDP port 4791), and moves some data to prove that it works. May be run again at any time.
#           Until the next boot; run it again then.
#   down    takes away what up made, and nothing else
#   status  says what is there; exit status 0: the device is up, 3: it is not
#
#   --netdev DEV   the network card to use, to reach other machines. Without it a network of this machine's own is made
#                  (rxedummy0, 192.168.77.1 and fd77::1), for programs that run on one machine
#   --name NAME    the device's name (rxe0)
#
# Ubuntu, Debian, CentOS Stream, RHEL, Rocky, Alma and Fedora. Where the kernel can't load drivers (containers, many CI
# machines), run your command by scripts/softroce_vm.sh or scripts/softroce_uml.sh: both have the device inside.
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"

# For tests: SETUP_SOFTROCE_DRY_RUN=1 prints the commands for a new machine of the distribution described by
# SETUP_SOFTROCE_OS_RELEASE with the kernel SETUP_SOFTROCE_KERNEL, and changes nothing.
dry=${SETUP_SOFTROCE_DRY_RUN:-}
release=${SETUP_SOFTROCE_KERNEL:-$(uname -r)}
state=/run/rdmaxfer-softroce
limits=/etc/security/limits.d/60-rdmaxfer-memlock.conf
dummy=rxedummy0
CHECK_S=120   # for one RDMA WRITE: an emulated machine may need half a minute to start perftest
elsewhere="Or leave the kernel as it is: scripts/softroce_vm.sh -- COMMAND runs a command in a virtual machine that has the device (scripts/softroce_uml.sh: the same at full speed, on Debian and Ubuntu)."

run() { if [[ $dry ]]; then printf '+ %s\n' "$(quoted "$@")"; else as_root "$@"; fi; }
# What up made is noted, for down.
made() { if [[ ! $dry ]]; then as_root mkdir -p "$state" && printf '%s\n' "$2" | as_root tee "$state/$1" >/dev/null; fi; }
was_made() { [[ -r $state/$1 ]] && cat "$state/$1"; }
have_link() { [[ ! $dry && -d /sys/class/infiniband/$name ]]; }
link_netdev() { rdma link show "$name/1" 2>/dev/null | sed -n 's/.* netdev \([^ ]*\).*/\1/p'; }
have_module() { [[ ! $dry ]] && { [[ -d /sys/module/rdma_rxe ]] || modinfo -k "$release" rdma_rxe >/dev/null 2>&1; }; }

packages() {
  case $os_family in
    debian | ubuntu) printf '%s\n' rdma-core ibverbs-providers ibverbs-utils perftest iproute2 kmod ;;
    el | fedora) printf '%s\n' rdma-core libibverbs libibverbs-utils perftest iproute kmod ;;
  esac
}

# Packages that hold the driver itself, for the running kernel.
module_packages() {
  case $os_family in
    ubuntu) printf '%s\n' "linux-modules-extra-$release" ;;
    el | fedora) printf '%s\n' "kernel-modules-$release" "kernel-modules-extra-$release" ;;
  esac
}

install() {
  local list
  mapfile -t list < <("$1")
  [[ ${#list[@]} -gt 0 ]] || return 0
  if [[ $dry ]]; then
    case $os_family in
      debian | ubuntu) printf '+ apt-get install --no-install-recommends %s\n' "${list[*]}" ;;
      *) printf '+ dnf install %s\n' "${list[*]}" ;;
    esac
    return
  fi
  need_packages --apt "${list[@]}" --dnf "${list[@]}"
}

# Ends with what this distribution lacks and what to do, where it is known before anything is tried.
refuse_hopeless() {
  case $os_family in
    debian)
      [[ $release != *-cloud-* ]] || die "this is Debian's cloud kernel ($release), which is built without Soft-RoCE; the ordinary one has it. Run:  apt-get install linux-image-amd64  then:  apt-get purge 'linux-image-*cloud*'  and reboot. $elsewhere" ;;
    el)
      ((os_version < 10)) || [[ $release == *elrepo* ]] ||
        die "$os_name has no Soft-RoCE: Red Hat removed the driver rdma_rxe from version 10 on. ELRepo's kernel has it (package kernel-ml; reboot into it). Or run your command in a Debian container by scripts/softroce_vm.sh." ;;
    unknown) die "$os_name is not supported: only Ubuntu, Debian, CentOS Stream, RHEL, Rocky, Alma and Fedora are. By hand: install rdma-core and iproute2, then  modprobe rdma_rxe  and  rdma link add rxe0 type rxe netdev DEV" ;;
  esac
}

load_module() {
  ! have_module || { load; return; }
  if [[ ! $dry && ! -d /lib/modules/$release ]]; then
    die "this kernel ($release) has no loadable modules here: it is a container's or a minimal machine's. On a container's host run this script on the host. $elsewhere"
  fi
  # Only tried: which of these packages there are differs by version.
  if [[ $dry ]]; then install module_packages
  elif [[ $os_family != debian ]]; then
    local package
    can_be_root || { mapfile -t list < <(module_packages); die "the driver rdma_rxe is not installed and only root can. Run this script as root, or install ${list[*]}"; }
    while read -r package; do
      have_module && break
      say "installing $package"
      if [[ $os_family == ubuntu ]]; then install_now apt "$package" >/dev/null 2>&1 || true; else install_now dnf "$package" >/dev/null 2>&1 || true; fi
    done < <(module_packages)
    as_root depmod "$release" 2>/dev/null || true
  fi
  if [[ ! $dry ]] && ! have_module; then
    case $os_family in
      debian) die "the kernel $release has no driver rdma_rxe. Run:  apt-get install linux-image-amd64  and reboot. $elsewhere" ;;
      ubuntu) die "there is no package linux-modules-extra-$release with the driver rdma_rxe (a cloud's own kernel?). Run:  apt-get install linux-image-generic linux-modules-extra-generic  and reboot. $elsewhere" ;;
      *) die "no package holds the driver rdma_rxe for the kernel $release; most often a newer kernel has replaced it. Run:  dnf install kernel kernel-modules-extra  and reboot (CentOS Stream and RHEL 9 have it from 9.3 on). $elsewhere" ;;
    esac
  fi
  load
}

load() {
  [[ $dry || ! -d /sys/module/rdma_rxe ]] || return 0
  run modprobe rdma_rxe || die "the driver rdma_rxe was not loaded. If the line above says \"Key was rejected\", the machine's Secure Boot forbids it; if it says \"Operation not permitted\", this is a container. $elsewhere"
  made module rdma_rxe
}

make_dummy() {
  if [[ ! $dry && -d /sys/class/net/$dummy ]]; then return; fi
  run ip link add "$dummy" mtu 4200 type dummy || die "the network $dummy could not be made: the kernel lacks the driver \"dummy\", or this is a container"
  made netdev "$dummy"
  run ip address add 192.168.77.1/24 dev "$dummy"
  run ip -6 address add fd77::1/64 dev "$dummy" nodad || say "no IPv6 here: only 192.168.77.1 is set"
  run ip link set "$dummy" up
}

# An RDMA packet and its headers must fit into one of the network's: 4096 bytes take 4176, 1024 take 1500.
explain_mtu() {
  local mtu path=256 size
  mtu=$(<"/sys/class/net/$netdev/mtu")
  for size in 512 1024 2048 4096; do ((mtu < size + 80)) || path=$size; done
  say "$netdev has MTU $mtu, so RDMA packets carry $path bytes$( ((path == 4096)) || printf '. More is faster, if every machine and switch on the way allows it:  ip link set %s mtu 4200' "$netdev")"
}

raise_memlock() {
  # RDMA memory is locked into RAM; the usual limit for that, 64 KiB to 8 MiB, is less than one ring of frames.
  if [[ $dry ]]; then
    printf '+ write %s\n' "$limits"
    return
  fi
  [[ ! -e $limits ]] || return 0
  if printf '# Made by rdmaxfer: RDMA memory is locked into RAM.\n* - memlock unlimited\nroot - memlock unlimited\n' | as_root tee "$limits" >/dev/null 2>&1; then
    made limits "$limits"
    say "programs may now lock memory without limit: log out and in again for that (now: $(ulimit -l) KiB)"
  else
    say "$limits could not be written; programs may lock $(ulimit -l) KiB of memory (ulimit -l)"
  fi
}

open_firewall() {
  if [[ $dry ]]; then
    case $os_family in
      debian | ubuntu) printf '+ if ufw is active: ufw allow 4791/udp\n' ;;
      *) printf '+ if firewalld is running: firewall-cmd --add-port=4791/udp\n' ;;
    esac
    return
  fi
  if command -v firewall-cmd >/dev/null && as_root firewall-cmd --state >/dev/null 2>&1; then
    as_root firewall-cmd -q --query-port=4791/udp || { as_root firewall-cmd -q --add-port=4791/udp && made firewalld 4791/udp && say "opened UDP port 4791 in firewalld"; }
  elif command -v ufw >/dev/null && as_root ufw status 2>/dev/null | grep -q '^Status: active'; then
    as_root ufw status | grep -q '^4791/udp' || { as_root ufw allow 4791/udp >/dev/null && made ufw 4791/udp && say "opened UDP port 4791 in ufw"; }
  fi
}

# The device's entry for an IPv4 address; for want of one, the first that is not link-local.
gid_index() {
  local gid index value best=0
  for gid in /sys/class/infiniband/"$name"/ports/1/gids/*; do
    index=${gid##*/}
    value=$(cat "$gid" 2>/dev/null) || continue
    case $value in
      0000:0000:0000:0000:0000:ffff:*) printf '%s\n' "$index" && return ;;
      0000:0000:0000:0000:0000:0000:0000:0000 | fe80:*) ;;
      *) best=$index ;;
    esac
  done
  printf '%s\n' "$best"
}

# RDMA WRITEs from this machine to itself, by perftest.
check_write() {
  if [[ $dry ]]; then
    printf '+ ib_write_bw -d %s -s 4096 -n 100 (to itself)\n' "$name"
    return
  fi
  local options server status=0 log attempts=0 end=$((SECONDS + CHECK_S))
  options=(-d "$name" -x "$(gid_index)" -s 4096 -n 100 -F -p 18577)
  log=$(mktemp)
  timeout "$CHECK_S" ib_write_bw "${options[@]}" >"$log" 2>&1 & server=$!
  while :; do   # until the server listens
    sleep 0.2
    status=0 attempts=$((attempts + 1))
    timeout "$CHECK_S" ib_write_bw "${options[@]}" 127.0.0.1 >"$log.client" 2>&1 || status=$?
    if ((status == 0 || SECONDS >= end)) || ! grep -qi 'connect' "$log.client" || ! kill -0 "$server" 2>/dev/null; then break; fi
  done
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  if ((status)); then
    cat "$log" "$log.client" >&2
    rm -f "$log" "$log.client"
    die "$name is there, but an RDMA WRITE to itself failed after $attempts attempts (see above). \"Couldn't allocate MR\" or \"Cannot allocate memory\": ulimit -l is too low, log in again. A retry error: a firewall drops UDP port 4791"
  fi
  rm -f "$log" "$log.client"
  say "checked: RDMA WRITEs through $name arrive"
}

up() {
  refuse_hopeless
  [[ $dry ]] || can_be_root || die "only root can do this. Run:  sudo $0 up"
  install packages
  if have_link; then
    netdev=$(link_netdev)
    say "$name is already there, on $netdev"
  else
    load_module
    if [[ $netdev ]]; then
      [[ $dry || -d /sys/class/net/$netdev ]] || die "there is no network device $netdev; there are: $(cd /sys/class/net && echo *)"
    else
      netdev=$dummy
      make_dummy
    fi
    run rdma link add "$name" type rxe netdev "$netdev" || die "$name could not be added on $netdev (see above). In a container or network namespace: Soft-RoCE wants the machine's first namespace. $elsewhere"
    made link "$name"
  fi
  [[ $dry ]] || [[ $netdev == "$dummy" ]] || explain_mtu
  raise_memlock
  open_firewall
  check_write
  [[ $dry ]] || show_status
}

down() {
  can_be_root || die "only root can do this. Run:  sudo $0 down"
  local what
  [[ -d $state ]] || say "nothing here was made by $program up"
  if what=$(was_made link); then as_root rdma link delete "$what" 2>/dev/null || say "$what was already gone"; fi
  if what=$(was_made netdev); then as_root ip link delete "$what" 2>/dev/null || say "$what was already gone"; fi
  if what=$(was_made module) && [[ -z $(rdma link show 2>/dev/null | grep rxe || true) ]]; then as_root modprobe -r "$what" 2>/dev/null || say "the driver $what is in use and stays"; fi
  if what=$(was_made firewalld); then as_root firewall-cmd -q --remove-port="$what" || true; fi
  if what=$(was_made ufw); then as_root ufw delete allow "$what" >/dev/null || true; fi
  if [[ -e $limits ]]; then as_root rm -f "$limits"; fi   # also one of before the last boot
  as_root rm -rf "$state"
  say "down"
}

show_status() {
  local is_up=3 port=/sys/class/infiniband/$name/ports/1 device=- active=- addresses=- driver="not loaded" mtu=-
  [[ ! -d /sys/module/rdma_rxe ]] || driver="loaded"
  if [[ -d $port ]]; then
    device=$(link_netdev 2>/dev/null || true)
    active=$(<"$port/state")
    [[ $active != *ACTIVE* ]] || is_up=0
    [[ ! -e /sys/class/net/$device/mtu ]] || mtu=$(<"/sys/class/net/$device/mtu")
    addresses=$(ip -o address show dev "$device" 2>/dev/null | awk '{printf "%s ", $4}')
  fi
  printf '%-10s %s\n' driver "rdma_rxe $driver (kernel $release)" device "$name $([[ $is_up == 0 ]] && echo up || echo "not up")" \
    port "$active" network "${device:--}, MTU $mtu" addresses "$addresses" memlock "$(ulimit -l) KiB"
  return "$is_up"
}

action='' name=rxe0 netdev=''
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) show_help && exit ;;
    up | down | status) action=$1 ;;
    --netdev | --name)
      [[ $# -ge 2 && -n $2 ]] || die "$1 needs a value (see --help)"
      if [[ $1 == --name ]]; then name=$2; else netdev=$2; fi
      shift ;;
    *) die "unknown argument $1 (see --help)" ;;
  esac
  shift
done
detect_os "${SETUP_SOFTROCE_OS_RELEASE:-/etc/os-release}"
case $action in
  up) up ;;
  down) down ;;
  status) show_status ;;
  *) show_help >&2 && exit 2 ;;
esac
