# shellcheck shell=bash disable=SC1091,SC2154 # guest, box, now, siw, node are set above this when it is copied; the rest is read from the box
# The guest's side of softroce_vm.sh and softroce_uml.sh: process 1, on the host's own file tree, read-only.
# Makes the places that must be writable, brings rxe up, runs the command of the box, hands back its exit status, powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
power_off() {
  sync
  if [[ $guest == uml ]]; then echo o >/proc/sysrq-trigger; else echo b >/proc/sysrq-trigger; fi
  while :; do sleep 1; done
}

# Where things go in: the host's tree as it was (for what the new /tmp and /run hide), and the writable directories.
if [[ $guest == uml ]]; then   # the virtual machine's initramfs has done it
  mount -t proc proc /proc
  mount -t sysfs sys /sys
  mount -t devtmpfs dev /dev 2>/dev/null   # the kernel may have
else
  date -s "@$now" >/dev/null
fi
mkdir -p /dev/pts /dev/shm
ln -sfn /proc/self/fd /dev/fd
for i in 0,stdin 1,stdout 2,stderr; do ln -sf "/proc/self/fd/${i%,*}" "/dev/${i#*,}"; done
mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/host /run/box /run/rw /run/lock
mount --bind / /run/host
mapfile -t rw <"$box/rw"
for i in "${!rw[@]}"; do
  mkdir -p "/run/rw/$i"
  if [[ $guest == uml ]]; then mount -t hostfs rw "/run/rw/$i" -o "${rw[$i]}"
  else mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=mmap "rw$i" "/run/rw/$i"; fi
done
for file in command environment show cpuinfo merged; do [[ ! -e $box/$file ]] || cp "$box/$file" /run/box; done
for place in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmp "$place"; done
mkdir -p /tmp/home
while read -r directory; do mkdir -p "$directory" && mount --bind "/run/host$directory" "$directory"; done <"/run/box/show"
for i in "${!rw[@]}"; do mkdir -p "${rw[$i]}" 2>/dev/null; mount --bind "/run/rw/$i" "${rw[$i]}"; done

# Output goes through pipes of this guest, so that a program may open /dev/stdout again, and to the host without a terminal.
if [[ $guest == uml ]]; then
  mount --bind /run/box/cpuinfo /proc/cpuinfo   # perftest reads the clock rate there; User Mode Linux' own file lacks it
  mkdir /run/rc && mount -t hostfs rc /run/rc -o "$box"
  out=/dev/tty1 err=/dev/tty2 rc=/run/rc/rc
  for tty in "$out" "$err"; do stty -F "$tty" raw -echo; done
else
  for port in /sys/class/virtio-ports/*; do printf -v "$(<"$port/name")" /dev/%s "${port##*/}"; done
fi
mkfifo /run/out /run/err
cat /run/out >"$out" & readers=("$!")
cat /run/err >"$err" & readers+=("$!")
exec >/run/out 2>/run/err
[[ ! -e /run/box/merged ]] || exec 2>&1

# network_up CARD ADDRESS4 ADDRESS6
network_up() {
  ip address add "$2" dev "$1"
  ip -6 address add "$3" dev "$1" nodad
  ip link set "$1" up
}

# The device, on a card that leads nowhere, or on the wire between two nodes. Those have a second network beside it.
hostname "softroce$node"
ulimit -l unlimited
ulimit -n 65536
ip link set lo up
if [[ -z $node ]]; then
  netdev=d0
  ip link add d0 mtu 4200 type dummy
  network_up d0 192.168.77.1/24 fd77::1/64
else
  netdev=wire0
  for card in /sys/class/net/eth*; do
    case $(<"$card/address") in
      52:54:00:00:78:*) ip link set "${card##*/}" name wire0 ;;
      52:54:00:00:79:*) ip link set "${card##*/}" name admin0 ;;
    esac
  done
  network_up wire0 "192.168.78.$node/24" "fd78::$node/64"
  network_up admin0 "192.168.79.$node/24" "fd79::$node/64"
fi
rdma link add rxe0 type rxe netdev "$netdev" || echo "rxe0 could not be made: the command runs without it" >&2
[[ -z $siw ]] || rdma link add siw0 type siw netdev "$netdev"

status=0
(
  export RDMAXFER_GUEST=$guest
  unset box file guest now siw node netdev card rw i place directory port readers out err rc tty
  . /run/box/environment
  export HOME=/tmp/home TMPDIR=/tmp
  . /run/box/command
  "${command[@]}"
) </dev/null || status=$?

# What the command left running must not keep its output open.
exec >/dev/null 2>&1
for process in /proc/[0-9]*; do
  process=${process#/proc/}
  [[ $process == 1 || " ${readers[*]} " == *" $process "* ]] || kill -KILL "$process"
done
wait "${readers[@]}"
echo "$status" >"$rc"
# A node stays up until the other one is done, too: the host then ends both.
while [[ -n $node ]]; do sleep 60; done
power_off
