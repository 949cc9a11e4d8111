#!/usr/bin/env bash
# help
# Measures rdmaxfer against linux-rdma's perftest and pyzmq, and writes docs/performance.md with its plots.
#
#   scripts/bench.sh [--rounds N]    alternating rounds of each comparison (default 5)
#
# All of it runs in a User Mode Linux guest with Soft-RoCE (scripts/softroce_uml.sh), where Python has this machine's speed, but
# system calls cost a hundred times as much. It takes about 20 minutes. Leave the machine alone meanwhile: figures of a busy machine
# mean nothing. What was measured is kept in build/bench.
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

rounds=5
while (($#)); do
  case $1 in
    -h | --help) show_help; exit ;;
    --rounds) rounds=$2; shift 2 ;;
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
} >"$results/about.txt"

say "hand-over between processes, by fabric"
guest "$python" "$checkout/bench/handover.py" --fabrics shm tcp verbs --rounds "$rounds" --json "$results/handover.json"
guest "$python" "$checkout/bench/handover.py" --fabrics shm tcp verbs --rounds "$rounds" --spin 0.001 --json "$results/spinning.json"
say "one to many, handshakes, idle receivers, importing"
guest "$python" "$checkout/bench/figures.py" --rounds "$rounds" --json "$results/figures.json"
say "TCP against pyzmq"
guest "$python" "$checkout/bench/vs_pyzmq.py" --rounds "$rounds" --json "$results/pyzmq.json"
say "verbs against perftest"
guest "$python" "$checkout/bench/vs_perftest.py" --rounds "$rounds" --json "$results/perftest.json"
"$python" "$checkout/bench/render.py" "$results" "$checkout/docs"
say "docs/performance.md is written"
