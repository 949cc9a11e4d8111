#!/usr/bin/env bash
# help
# Runs a command where there is a real RDMA device: on the distribution's own kernel, in a small QEMU virtual machine.
#
#   scripts/softroce_vm.sh [options] -- COMMAND [ARGUMENT...]
#   scripts/softroce_vm.sh prepare          install and download what is needed, run nothing ("tools": only install)
#
# RDMA moves data between programs without the kernel's network stack. Linux has a driver, Soft-RoCE (rdma_rxe), which does
# that on any network card, even on none; but containers and many CI machines can't load drivers. The virtual machine
# can: it boots in seconds, sees this machine's files, and has the device rxe0 ready on 192.168.77.1 and fd77::1.
# No root is needed once the packages are there, and nothing of the host's own kernel is touched.
#
#   --cpus N        processors (2)
#   --memory SIZE   memory, like 2G (2G)
#   --timeout S     stop after S seconds (1800) with exit status 124
#   --rw DIR        let the command write into DIR (may be given again)
#   --nodes 2       two virtual machines on one wire, see below
#
# In the guest all files of this machine are there read-only, at the same paths; /tmp (and $HOME, in it) is empty and
# writable. The command's output and exit status are passed on. PATH, LANG, CI, VIRTUAL_ENV and all of RDMAXFER_*,
# PYTHON* and PYTEST_* are set there as they are here.
#
#   scripts/softroce_vm.sh -- ibv_devinfo -d rxe0
#   scripts/softroce_vm.sh --rw results -- .venv/bin/pytest -m rdma --junitxml=results/vm.xml
#
# With --nodes 2 there are two machines, each with rxe0 on a network card (wire0) at its end of one wire, so that packets
# really travel between two kernels, and can be lost: `tc qdisc add dev wire0 root netem loss 2%`. The command runs on both.
# Each line of its output begins with "node 1: " or "node 2: "; the exit status is that of the one that failed first. A node
# stays up until the command of the other one has ended, too; --timeout, --cpus, --memory and --rw hold for each.
#
#   RDMAXFER_NODE            1 or 2
#   RDMAXFER_ADDRESS         on the wire: 192.168.78.1 or .2 (also fd78::1 or ::2)
#   RDMAXFER_PEER            ... of the other node
#   RDMAXFER_ADMIN_ADDRESS   on a second network (admin0) without rxe, for talking about the wire while that is cut: 192.168.79.1
#   RDMAXFER_ADMIN_PEER      or .2 (also fd79::1 or ::2)
#
#   scripts/softroce_vm.sh --nodes 2 -- bash -c '
#     if ((RDMAXFER_NODE == 1)); then .venv/bin/rdmaxfer recv tcp://$RDMAXFER_ADDRESS:7471 --once --verify
#     else .venv/bin/rdmaxfer send tcp://$RDMAXFER_PEER:7471 --pattern 640x480 --count 10; fi'
#
# Without hardware virtualization (KVM) the processor is emulated: programs run 20 to 50 times slower, which is enough to
# prove that something works, not how fast. scripts/softroce_uml.sh is as fast as the host, on a kernel it builds.
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/guest.sh
. "$here/lib/guest.sh"
# shellcheck source=scripts/lib/nodes.sh
. "$here/lib/nodes.sh"

cache=$(cache_dir)/vm
# What the guest's kernel must load, in this order; what a kernel has built in, or lacks of the optional ones, is passed over.
modules=(virtio_mmio virtio_pci virtio_console virtio_rng virtio_net 9pnet_virtio 9p dummy crc32_generic rdma_rxe)
optional=(ib_uverbs rdma_ucm veth sch_netem nf_tables vivid)

install_tools() {
  [[ $(uname -m) == x86_64 ]] || die "only x86-64 machines are supported"
  need_packages --apt qemu-system-x86 busybox-static kmod xz-utils zstd iproute2 rdma-core ibverbs-providers ibverbs-utils \
    --dnf qemu-system-x86-core busybox kmod xz zstd cpio iproute rdma-core libibverbs libibverbs-utils
  qemu=$(command -v qemu-system-x86_64 || true)
  [[ -n $qemu ]] || die "qemu-system-x86_64 is not on PATH though its package is installed"
  "$qemu" -device help 2>&1 | grep -q '"virtio-9p-device"' ||
    die "this QEMU can't share directories (virtio-9p): Red Hat's own qemu-kvm is built without. Use Soft-RoCE of the host (scripts/setup_softroce.sh up), or run this script in a Debian container."
}

# --- the kernel ------------------------------------------------------------------------------------------------------

# Prints "VMLINUZ ROOT VERSION" of the newest kernel under a root that has rxe. ROOT holds lib/modules.
kernel_under() {
  local root=$1 version image
  for version in $(find "$root/lib/modules/" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null | sort -rV); do
    [[ -n $(find "$root/lib/modules/$version/" -name 'rdma_rxe.ko*' -print -quit) ]] || continue
    for image in "$root/boot/vmlinuz-$version" "$root/lib/modules/$version/vmlinuz"; do
      [[ -r $image ]] || continue   # Ubuntu's are readable by root only
      printf '%s %s %s\n' "$image" "$root" "$version"
      return
    done
  done
  return 1
}

download_kernel() {
  local into=$1 name wanted=() file
  detect_os /etc/os-release
  case $os_family in
    debian) name='linux-image-amd64' ;;
    ubuntu) name=linux-image-generic ;;
    fedora) name='kernel-core' ;;
    el) die "this distribution's kernel is used by the host itself: scripts/setup_softroce.sh up" ;;
    *) die "no kernel with Soft-RoCE under /boot, and which package holds one for $os_name is not known here. Install a kernel with the module rdma_rxe, or try scripts/softroce_uml.sh" ;;
  esac
  say "downloading $os_name's kernel ($name) into $cache; it is not installed"
  mkdir -p "$into/packages"
  cd "$into/packages"
  if [[ $os_family == fedora ]]; then
    dnf -q download "${name}" kernel-modules-core kernel-modules kernel-modules-extra --arch x86_64 >&2 ||
      die "dnf download failed; is dnf-plugins-core installed?"
    for file in ./*.rpm; do (cd "$into" && rpm2cpio "packages/$file" | cpio -idm --quiet); done
  else
    real_kernel() { apt-cache depends "$name" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1; }
    image=$(real_kernel)
    if [[ -z $image ]] || apt_lists_stale; then
      if can_be_root; then apt_update || true; fi
      image=$(real_kernel)
    fi
    [[ -n $image ]] || die "apt knows no $name. Run  sudo apt-get update  and try again"
    version=${image#linux-image-}
    wanted=("$image")
    [[ $os_family == debian ]] || wanted+=("linux-modules-$version" "linux-modules-extra-$version")
    for name in "${wanted[@]}"; do
      apt-get -q -o APT::Sandbox::User=root download "$name" >/dev/null 2>"$into/error" </dev/null ||
        [[ $name == linux-modules-extra-* ]] || { cat "$into/error" >&2; die "$name could not be downloaded. Run  sudo apt-get update  and try again"; }
    done
    for file in ./*.deb; do
      dpkg-deb --fsys-tarfile "$file" | tar -x -C "$into" --wildcards --no-same-owner './boot/vmlinuz*' './lib/modules/*' './usr/lib/modules/*' 2>/dev/null || true
    done
  fi
  cd "$OLDPWD"
  [[ -e $into/lib ]] || ln -s usr/lib "$into/lib"
  kernel_under "$into" >/dev/null || die "the kernel of $os_name that was downloaded has no module rdma_rxe"
}

decompress() {   # by the first bytes of a file
  case $(head -c 6 "$1" | od -An -tx1 | tr -d ' \n') in
    fd377a585a00) xz -dc --single-stream "$1" ;;
    28b52ffd*) zstd -qdc "$1" ;;
    1f8b*) gzip -dc "$1" ;;
    04224d18* | 02214c18*) lz4 -dc "$1" ;;
    *) cat "$1" ;;
  esac
}

# A compressed kernel takes an emulated processor seconds to unpack, and the machine below boots the bare one directly.
# Where the payload lies: the kernel's Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
bare_kernel() {
  local image=$1 target=$2 sectors offset length
  number() { od -An -j "$1" -N "$2" -t "u$2" "$image" | tr -d ' '; }
  sectors=$(number $((0x1f1)) 1) offset=$(number $((0x248)) 4) length=$(number $((0x24c)) 4)
  tail -c +$(((sectors + 1) * 512 + offset + 1)) "$image" | head -c $((length - 4)) >"$target.packed" || true
  decompress "$target.packed" >"$target" 2>/dev/null || true   # gzip misses its last four bytes, which are a length
  rm "$target.packed"
  [[ $(head -c 4 "$target" | tail -c 3) == ELF ]] || cp "$image" "$target"
}

# Leaves a directory in $kernel: vmlinux, version, and the modules, unpacked and numbered in loading order.
prepare_kernel() {
  local key found image root version work name path number=100
  key=$(printf '%s\n' "${modules[@]}" "${optional[@]}" | cksum | cut -d' ' -f1)
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock 9
  if found=$(kernel_under /); then
    read -r image root version <<<"$found"
    kernel=$cache/host-$version-$key
  else
    kernel=$cache/package-$key
  fi
  if [[ ! -f $kernel/version ]]; then
    work=$cache/work
    rm -rf "$work" "$kernel"
    mkdir -p "$work" "$kernel"
    if [[ -z $found ]]; then
      download_kernel "$work"
      read -r image root version <<<"$(kernel_under "$work")"
      depmod -b "$root" "$version"
    fi
    bare_kernel "$image" "$kernel/vmlinux"
    for name in "${modules[@]}" "${optional[@]}"; do
      while read -r action path _; do
        [[ $action == insmod && -f $path ]] || continue
        path=$(realpath "$path")
        name=$(basename "$path")
        name=${name%%.ko*}.ko
        compgen -G "$kernel/*-$name" >/dev/null && continue
        number=$((number + 1))
        decompress "$path" >"$kernel/$number-$name"
      done < <(modprobe -d "$root" -S "$version" --show-depends "$name" 2>/dev/null || true)
    done
    compgen -G "$kernel/*-rdma_rxe.ko" >/dev/null || die "the module rdma_rxe of $version could not be unpacked"
    rm -rf "$work"
    echo "$version" >"$kernel/version"
  fi
  flock -u 9
}

# The first process: busybox loads the modules and hands over to the box's init on the host's tree.
make_initramfs() {
  local work=$box/initramfs
  mkdir -p "$work"/{bin,proc,sys,dev,root,modules}
  cp "$(command -v busybox)" "$work/bin/busybox"
  cp "$kernel"/*.ko "$work/modules/"
  cat >"$work/init" <<INIT
#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
  case \$module in *-dummy.ko) busybox insmod \$module numdummies=0;; *) busybox insmod \$module;; esac
done
busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose host /root || busybox reboot -f
for directory in proc sys dev; do busybox mount -o move /\$directory /root/\$directory; done
exec busybox switch_root /root /bin/bash $(quoted "$box/init")
INIT
  chmod +x "$work/init"
  (cd "$work" && find . | busybox cpio -o -H newc 2>/dev/null) >"$box/initrd"
}

# --- the machine -----------------------------------------------------------------------------------------------------

# A machine with few devices. Not QEMU's "microvm", which is a little faster: it has neither HPET nor PM timer, so on a busy
# host the guest's clock goes wrong while it boots, and one boot in five hangs.
machine() {
  printf '%s\0' "$qemu" -M pc -nodefaults -no-user-config -display none -no-reboot -m "$memory" -smp "$cpus" "$@" \
    -kernel "$kernel/vmlinux" -initrd "$box/initrd" -serial "file:$box/console"
}
append="console=ttyS0 quiet loglevel=4 panic=-1 reboot=t tsc=nowatchdog mitigations=off random.trust_cpu=on"

# KVM that is there but does not work (nested, switched off) hangs for ever: it is used only after a guest came up with it.
# The answer is kept until the next boot of the host.
kvm_works() {
  local answer=$cache/kvm engine_args
  grep -qwE 'vmx|svm' /proc/cpuinfo && [[ -r /dev/kvm && -w /dev/kvm ]] || return 1
  answer=$cache/kvm-$(</proc/sys/kernel/random/boot_id)
  if [[ ! -f $answer ]]; then
    rm -f "$cache"/kvm-*
    mapfile -d '' -t engine_args < <(machine -accel kvm -cpu host)
    # No shared directory: a guest that works finds none and reboots, which ends QEMU.
    if timeout -k 1 15 "${engine_args[@]}" -append "$append" </dev/null >/dev/null 2>&1; then echo yes; else echo no; fi >"$answer"
  fi
  [[ $(<"$answer") == yes ]]
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help; exit; fi
memory=2G
if [[ ${1:-} == tools ]]; then install_tools; exit; fi
if [[ ${1:-} == prepare ]]; then
  install_tools
  prepare_kernel
  say "ready: kernel $(<"$kernel/version")"
  exit
fi
nodes=1
parse_guest_options "$@"
install_tools
if [[ $nodes == 2 ]]; then
  "$qemu" -netdev help 2>&1 | grep -qx dgram || die "--nodes 2 needs QEMU 7.2 or newer (-netdev dgram), and this is older"
fi
prepare_kernel
open_box "$cache"

# Emulated, a processor without fast string copies and carry-less multiplication is the fastest for rxe: QEMU does those
# instructions byte by byte. It has what numpy's wheels ask for (x86-64-v2).
processor=(-accel 'tcg,thread=multi,tb-size=512' -cpu Nehalem)
if kvm_works; then processor=(-accel kvm -cpu host); fi

# Sets engine_args from the box: all of a machine but its network.
machine_arguments() {
  mapfile -d '' -t engine_args < <(machine "${processor[@]}")
  share host / ,readonly=on
  for i in "${!rw[@]}"; do share "rw$i" "${rw[$i]}" ''; done
  engine_args+=(-device virtio-rng-pci -device virtio-serial-pci)
  for port in out err; do
    ln "$box/$port" "$box/port-$port.out"
    mkfifo "$box/port-$port.in"
    engine_args+=(-chardev "pipe,id=$port,path=$box/port-$port" -device "virtserialport,chardev=$port,name=$port")
  done
  engine_args+=(-chardev "file,id=rc,path=$box/rc" -device 'virtserialport,chardev=rc,name=rc')
  engine_args+=(-append "$append")
}
share() {
  engine_args+=(-fsdev "local,id=$1,path=${2//,/,,},security_model=none,multidevs=remap$3" -device "virtio-9p-pci,fsdev=$1,mount_tag=$1")
}

if [[ $nodes == 2 ]]; then run_nodes; fi
fill_box vm
make_initramfs
machine_arguments
guest_run "${engine_args[@]}"
