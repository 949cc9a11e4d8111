#!/usr/bin/env bash
# help
# Shows rdmaxfer at work: photographs, pushed from one process into another by RDMA, and the proof that they arrived whole.
#
#   scripts/demo.sh [arguments of "rdmaxfer demo"]
#
# It needs nothing prepared. On Debian, Ubuntu and Fedora it installs what is missing (as root or by sudo; else it
# prints the line to run), makes a virtual environment in .venv, and installs rdmaxfer there. An RDMA device of this
# machine is used when there is one; if not, a small virtual machine with a software device is started
# (scripts/softroce_vm.sh), whose processor is emulated where there is no KVM: slow, but the same kernel driver.
#
# One of the pictures that arrived is kept as build/demo/received.jpg.
#
#   RDMAXFER_PYTHON=...   the Python to use (it must be able to import pyverbs)
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help; exit; fi

# Not in the checkout: it would be on Python's path, and so the package as it is not installed. Files named stay the same.
arguments=()
for argument in "$@"; do
  [[ ! -e $argument ]] || argument=$(realpath "$argument")
  arguments+=("$argument")
done
# The picture that arrived is kept here; of what the virtual machine writes elsewhere, nothing is.
pictures=$checkout/build/demo
mkdir -p "$pictures"
if [[ " $* " != *" --save"* ]]; then arguments+=(--save "$pictures/received.jpg"); fi

device=$(active_device || true)
install_requirements gcc
preparing=''
if [[ -z $device ]]; then
  "$here/softroce_vm.sh" tools
  "$here/softroce_vm.sh" prepare & preparing=$!   # the kernel is downloaded while pip works
fi
make_venv demo
cd "$venv"
if [[ -n $device ]]; then
  say "using the RDMA device $device of this machine"
  exec "$venv/bin/rdmaxfer" demo "${arguments[@]}"
fi
wait "$preparing" || die "the virtual machine could not be prepared (see above)"
say "no RDMA device here: starting a virtual machine that has one (Soft-RoCE)"
exec "$here/softroce_vm.sh" --rw "$pictures" -- "$venv/bin/rdmaxfer" demo "${arguments[@]}"
