#!/usr/bin/env bash
# help
# Runs a command where there is a real RDMA device, at this machine's own speed: on a User Mode Linux kernel.
#
#   scripts/softroce_uml.sh [options] -- COMMAND [ARGUMENT...]
#   scripts/softroce_uml.sh build           build the kernel (4 to 6 minutes on 2 processors), if not built yet ("tools": only install)
#
# RDMA moves data between programs without the kernel's network stack. Linux has a driver, Soft-RoCE (rdma_rxe), which does
# that on any network card, even on none; but containers and many CI machines can't load drivers. User Mode Linux is
# a Linux kernel that runs as an ordinary program: it starts in a second, sees this machine's files, and has the device
# rxe0 ready on 192.168.77.1 and fd77::1 (with SIW=1 also the Soft-iWARP device siw0). It is built once, from Debian's
# linux-source package, into a cache; that needs Debian or Ubuntu on x86-64. Elsewhere: scripts/softroce_vm.sh.
#
#   --cpus N        processors (2)
#   --memory SIZE   memory, like 4G (4G)
#   --timeout S     stop after S seconds (1800) with exit status 124
#   --rw DIR        let the command write into DIR (may be given again)
#
# In the guest all files of this machine are there read-only, at the same paths; /tmp (and $HOME, in it) is empty and
# writable. The command's output and exit status are passed on. PATH, LANG, CI, VIRTUAL_ENV and all of RDMAXFER_*,
# PYTHON* and PYTEST_* are set there as they are here.
#
#   scripts/softroce_uml.sh -- ibv_devinfo -d rxe0
#   scripts/softroce_uml.sh --rw results -- .venv/bin/pytest -m rdma --junitxml=results/uml.xml
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/guest.sh
. "$here/lib/guest.sh"

cache=$(cache_dir)/uml
kernel=$cache/linux

install_tools() {
  local packages=(iproute2 rdma-core ibverbs-providers ibverbs-utils)
  built || packages+=(build-essential flex bison bc libelf-dev xz-utils python3-minimal)
  need_packages --apt "${packages[@]}" --dnf iproute rdma-core libibverbs libibverbs-utils
}

# --- the kernel ------------------------------------------------------------------------------------------------------

options() {
  printf 'CONFIG_%s=y\n' 64BIT CC_OPTIMIZE_FOR_PERFORMANCE SMP HIGH_RES_TIMERS NO_HZ_IDLE SYSVIPC POSIX_MQUEUE PRINTK \
    MULTIUSER NAMESPACES UTS_NS IPC_NS PID_NS USER_NS NET_NS BINFMT_ELF BINFMT_SCRIPT FHANDLE FUTEX EPOLL SIGNALFD TIMERFD EVENTFD AIO \
    SHMEM MEMBARRIER FILE_LOCKING MCONSOLE MAGIC_SYSRQ INOTIFY_USER STDERR_CONSOLE NULL_CHAN PTY_CHAN TTY_CHAN UNIX98_PTYS HOSTFS PROC_FS CONFIGFS_FS \
    SYSFS TMPFS TMPFS_XATTR DEVTMPFS DEVTMPFS_MOUNT PCI UML_PCI_OVER_VFIO NET PACKET UNIX INET INET_DIAG IPV6 IP_MULTICAST \
    NETDEVICES NET_CORE DUMMY VETH NET_SCHED NET_SCH_NETEM CRYPTO CRYPTO_CRC32 CRYPTO_CRC32C \
    NETFILTER NETFILTER_ADVANCED NF_CONNTRACK NF_TABLES NF_TABLES_INET NF_TABLES_IPV4 NF_TABLES_IPV6 NFT_COMPAT NFT_CT NFT_FIB_INET \
    NFT_FIB_IPV4 NFT_FIB_IPV6 NFT_LOG NFT_LIMIT NFT_REJECT NETFILTER_XTABLES NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_COMMENT \
    NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MATCH_HL NETFILTER_XT_MATCH_LIMIT NETFILTER_XT_MATCH_MULTIPORT NETFILTER_XT_MATCH_STATE \
    NETFILTER_XT_TARGET_LOG NF_LOG_SYSLOG IP_NF_IPTABLES IP6_NF_IPTABLES IP_NF_TARGET_REJECT IP6_NF_TARGET_REJECT IP6_NF_MATCH_RT \
    INFINIBAND INFINIBAND_USER_MAD INFINIBAND_USER_ACCESS INFINIBAND_ADDR_TRANS RDMA_RXE RDMA_SIW
  printf 'CONFIG_KERNEL_STACK_ORDER=4\nCONFIG_NR_CPUS=4\n'
}

# rxe checksums every packet with crc32. This kernel's portable crc32 is ten times slower than its own
# carry-less-multiply one, which User Mode Linux leaves out: put it in.
fast_crc32() {
  python3 - "$1" <<'PY'
import pathlib, sys
crc = pathlib.Path(sys.argv[1], "lib/crc")
make, main = crc / "Makefile", crc / "crc32-main.c"
text = make.read_text()
text = text.replace("crc32-y := crc32-main.o\n", "crc32-y := crc32-main.o\nifeq ($(CONFIG_UML),y)\ncrc32-y += x86/crc32-pclmul.o\nendif\n", 1)
make.write_text(text)
text = main.read_text()
generic = "#else\n#define crc32_le_arch crc32_le_base\n"
fast = """#elif defined(CONFIG_UML)
#include <asm/cpufeature.h>
#include "x86/crc-pclmul-consts.h"
u32 crc32_lsb_pclmul_sse(u32 crc, const u8 *p, size_t len, const void *consts);
static inline u32 crc32_le_arch(u32 crc, const u8 *p, size_t len)
{
	if (len < 16 || !boot_cpu_has(X86_FEATURE_PCLMULQDQ))
		return crc32_le_base(crc, p, len);
	return crc32_lsb_pclmul_sse(crc, p, len, crc32_lsb_0xedb88320_consts.fold_across_128_bits_consts);
}
#define crc32_be_arch crc32_be_base
#define crc32c_arch crc32c_base
"""
if generic not in text:
    sys.exit("crc32-main.c has changed: building with the slow crc32")
main.write_text(text.replace(generic, fast + generic, 1))
PY
}

# What the kernel is made by: when it changes, the kernel is built again.
recipe() { declare -f options fast_crc32 build_kernel; options; }
key() { recipe | sha256sum | cut -c1-16; }
built() { [[ -x $kernel && -f $kernel.key && $(<"$kernel.key") == "$(key)" ]]; }

# The mirror of Debian's packages that apt is configured for: one-line lists, or deb822 with its URIs.
debian_mirror() {
  local mirror
  # shellcheck disable=SC2016 # apt's own variables
  mirror=$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
    sed -n 's#^\(http[^ ]*/debian/\{0,1\}\) .*#\1#p' | head -n 1)
  [[ -n $mirror ]] || mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 | tr -d ' ')
  printf '%s\n' "$mirror"
}

# with_progress WHAT LOG COMMAND...: prints a line now and then while a command runs, so that nobody takes a long step for a hung one.
with_progress() {
  local what=$1 log=$2 status=0 start=$SECONDS
  shift 2
  "$@" >"$log" 2>&1 & job=$!
  trap 'kill "$job" 2>/dev/null; exit 143' INT TERM HUP   # or the compiler would go on alone
  while kill -0 "$job" 2>/dev/null; do
    sleep 1
    (((SECONDS - start) % 20)) || say "$what: $((SECONDS - start)) s$([[ ! -f $cache/build.log ]] || printf ', %s files compiled' "$(grep -c '^  CC ' "$cache/build.log")")"
  done
  wait "$job" || status=$?
  trap - INT TERM HUP
  return "$status"
}

build() {
  ! built || return 0
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock -n 9 || { say "another run builds the kernel: waiting for it"; flock 9; }
  built || build_kernel
  exec 9>&-
}

build_kernel() {
  [[ $(uname -m) == x86_64 ]] || die "only x86-64 machines are supported"
  detect_os /etc/os-release
  [[ $os_family == debian || $os_family == ubuntu ]] ||
    die "$os_name is not supported: the kernel is built from Debian's linux-source package, on Debian or Ubuntu. Use scripts/softroce_vm.sh, or Soft-RoCE of the host (scripts/setup_softroce.sh up)"
  install_tools
  local start=$SECONDS work=$cache/work mirror source tree out missing
  # SMP User Mode Linux needs Linux 6.19 or newer, which is newer than what Debian 12 and 13 came with. The newest one of
  # Debian's backports is read through a package list of our own: apt's lists of this machine stay as they are.
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  [[ -f $keyring ]] || need_packages --apt debian-archive-keyring
  mirror=$(debian_mirror)
  [[ -n $mirror || $os_family == debian ]] || die "no mirror of Debian's packages is configured in /etc/apt, and on $os_name there is none: use scripts/softroce_vm.sh"
  [[ -n $mirror ]] || die "no mirror of Debian's packages found in /etc/apt/sources.list or /etc/apt/sources.list.d"
  rm -rf "$work"
  mkdir -p "$work/lists/partial" "$work/archives/partial"
  echo "deb [signed-by=$keyring] $mirror trixie-backports main" >"$work/list"
  local apt=(-q -o "Dir::Etc::sourcelist=$work/list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work"
    -o "Dir::Cache::archives=$work/archives" -o APT::Sandbox::User=root -o Acquire::Languages=none)
  apt-get "${apt[@]}" update >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; die "the list of Debian's backports could not be read"; }
  source=$(apt-cache "${apt[@]}" search --names-only '^linux-source-[0-9]' | awk '{print $1}' | sort -V | tail -n 1)
  [[ -n $source ]] || die "Debian's backports hold no linux-source package"
  say "building a User Mode Linux kernel from $source, once: 4 to 6 minutes on 2 processors"
  cd "$work"
  apt-get "${apt[@]}" download "$source" >>"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; die "$source could not be downloaded"; }
  # Of the tree, the parts that are never compiled here are left packed: they are two thirds of it.
  # shellcheck disable=SC2016 # $0 is the inner shell's
  with_progress "unpacking" "$work/log" bash -c 'set -o pipefail
    dpkg-deb --fsys-tarfile "$0"_*.deb | tar -xO --wildcards "./usr/src/*.tar.xz" | xz -dcT0 |
    tar -x --wildcards --exclude="*/drivers/gpu/*.[ch]" --exclude="*/drivers/media/*.[ch]" --exclude="*/drivers/net/ethernet/*.[ch]" \
      --exclude="*/drivers/net/wireless/*.[ch]" --exclude="*/drivers/scsi/*.[ch]" --exclude="*/drivers/staging/*.[ch]" --exclude="*/sound/*.[ch]" \
      --exclude="*/Documentation/*.rst" --exclude="*/Documentation/*.yaml" --exclude="*/tools/testing/selftests/*" --exclude="*/tools/perf/*" \
      --exclude="*.dts" --exclude="*.dtsi"' "$source" || { tail -n 20 "$work/log" >&2; die "$source could not be unpacked"; }
  rm -f "$work"/*.deb
  tree=$work/$source out=$work/out
  fast_crc32 "$tree" || true
  sed -i '/^config HZ$/,/default/s/default 100$/default 1000/' "$tree/arch/um/Kconfig"   # a waiting process is run within 1 ms, not 10
  mkdir -p "$out"
  options >"$work/fragment"
  make -C "$tree" ARCH=um SUBARCH=x86_64 O="$out" KCONFIG_ALLCONFIG="$work/fragment" allnoconfig >"$work/config.log" 2>&1 ||
    { tail -n 20 "$work/config.log" >&2; die "the kernel's configuration failed"; }
  missing=$(grep -vxFf "$out/.config" "$work/fragment" || true)
  [[ -z $missing ]] || say "not settable in $source, and left out: ${missing//$'\n'/ }"
  [[ $missing != *RDMA_RXE=* && $missing != *MAGIC_SYSRQ=* ]] || die "$source can't have what is needed under User Mode Linux"
  with_progress "compiling" "$cache/build.log" nice make -C "$tree" ARCH=um SUBARCH=x86_64 O="$out" -j"$(nproc)" linux ||
    { tail -n 20 "$cache/build.log" >&2; die "the kernel did not build (log: $cache/build.log)"; }
  cd "$OLDPWD"
  strip -o "$kernel" "$out/linux"
  key >"$kernel.key"
  rm -rf "$work" "$cache/build.log"
  say "the kernel ($source) is built: $((SECONDS - start)) s"
}

# --- the machine -----------------------------------------------------------------------------------------------------

case ${1:-} in
  -h | --help) show_help && exit ;;
  tools) install_tools && exit ;;
  build) build && exit ;;
esac
memory=4G
parse_guest_options "$@"
build
install_tools
open_box "$cache"
fill_box uml
# shellcheck disable=SC2054 # the kernel's own commas
engine_args=("$kernel" "mem=$memory" "ncpus=$cpus" root=/dev/root rootfstype=hostfs rootflags=/ ro "init=$box/init"
  con=null con0=null,fd:2 con1=null,fd:3 con2=null,fd:4 ssl=null quiet loglevel=4 seccomp=auto)
TMPDIR=/dev/shm guest_run "${engine_args[@]}"
