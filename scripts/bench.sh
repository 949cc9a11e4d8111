#!/usr/bin/env bash
# help
# Measures rdmaxfer against linux-rdma's perftest, pyzmq and other transfer engines, and writes docs/performance.md with its plots.
#
#   scripts/bench.sh [--rounds N]    alternating rounds of each comparison (default 5)
#   scripts/bench.sh --no-engines    without DLSlime, Mooncake and NIXL, which are 700 MB to install, in build/engines
#
# All of it runs in a User Mode Linux guest with Soft-RoCE (scripts/softroce_uml.sh), where Python has this machine's speed, but
# system calls cost a hundred times as much. It takes about half an hour. Leave the machine alone meanwhile: figures of a busy machine
# mean nothing. What was measured is kept in build/bench.
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

rounds=5 engines=yes
while (($#)); do
  case $1 in
    -h | --help) show_help; exit ;;
    --rounds) rounds=$2; shift 2 ;;
    --no-engines) engines=; shift ;;
    *) die "unknown argument: $1 (see --help)" ;;
  esac
done

install_requirements gcc
need_packages --apt perftest --dnf perftest
"$here/softroce_uml.sh" tools
"$here/softroce_uml.sh" build
make_venv bench
results=$checkout/build/bench
mkdir -p "$results"
cd "$results"

guest() { "$here/softroce_uml.sh" --rw "$results" --timeout 3600 -- "$@"; }
python=$venv/bin/python
{
  echo "$(nproc) CPUs, $(sed -n 's/^model name[^:]*: //p;' /proc/cpuinfo | head -1), kernel $(uname -r)"
  guest uname -sr | sed 's/^/guest: /'
  dpkg-query -W -f='perftest ${Version}\n' perftest 2>/dev/null || rpm -q perftest
  dpkg-query -W -f='libibverbs ${Version}\n' libibverbs1 2>/dev/null || rpm -q libibverbs
  git -C "$checkout" log -1 --format='commit %h' 2>/dev/null || true
} >"$results/about.txt"

# engine NAME REQUIREMENT: a Python of its own for an engine. They bring versions of libraries that nobody else should get.
engine() {
  local home=$checkout/build/engines/$1
  [ -e "$home/made" ] && return
  say "installing $2 into build/engines/$1"
  rm -rf "$home"
  "$python" -m venv "$home"
  "$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps numpy "$2"
  touch "$home/made"
}
if [ -n "$engines" ]; then
  # What bench/vs_peers.py says of them: the versions are those that it was written for.
  need_packages --apt libnuma1 libcurl4 liburing2 --dnf numactl-libs libcurl liburing
  engine dlslime dlslime==0.1.23
  engine mooncake mooncake-transfer-engine-non-cuda==0.3.13.post1
  engine nixl nixl-cu12==1.5.1
  echo '{"cpu:0": [["rxe0"], []]}' >"$checkout/build/engines/mooncake/topology.json"
  drivers=$checkout/build/engines/nixl/drivers
  mkdir -p "$drivers"
  ln -sf "$checkout"/build/engines/nixl/lib/python3*/site-packages/nixl_cu12.libs/libibverbs-*.so* "$drivers/libibverbs.so.1"
  cp -f /usr/lib*/*/libibverbs/librxe-rdmav*.so /usr/lib*/libibverbs/librxe-rdmav*.so "$drivers" 2>/dev/null || true
fi

say "what takes no device, on this machine itself"
"$python" "$checkout/bench/figures.py" --no-device --rounds "$rounds" --json "$results/host_figures.json"
"$python" "$checkout/bench/handover.py" --spin 0.001 --rounds "$rounds" --json "$results/host_handover.json"
"$python" "$checkout/bench/vs_pyzmq.py" --rounds "$rounds" --json "$results/host_pyzmq.json"
say "hand-over between processes, by fabric"
guest "$python" "$checkout/bench/handover.py" --fabrics shm tcp verbs --rounds "$rounds" --json "$results/handover.json"
guest "$python" "$checkout/bench/handover.py" --fabrics shm tcp verbs --rounds "$rounds" --spin 0.001 --json "$results/spinning.json"
say "one to many, handshakes, idle receivers, memory"
guest "$python" "$checkout/bench/figures.py" --rounds "$rounds" --json "$results/figures.json"
say "TCP against pyzmq"
guest "$python" "$checkout/bench/vs_pyzmq.py" --rounds "$rounds" --json "$results/pyzmq.json"
say "verbs against perftest"
guest "$python" "$checkout/bench/vs_perftest.py" --rounds "$rounds" --json "$results/perftest.json"
rm -f "$results/peers.json"
if [ -n "$engines" ]; then
  say "verbs against other transfer engines"
  guest "$python" "$checkout/bench/vs_peers.py" --peers "$checkout/build/engines" --rounds "$rounds" --json "$results/peers.json"
fi
"$python" "$checkout/bench/render.py" "$results" "$checkout/docs"
say "docs/performance.md is written"
