#!/usr/bin/env bash
# help
# Runs all tests, also those that need an RDMA device, on a machine that need not have one.
#
#   scripts/test.sh [--soak] [options of pytest]
#
#   host    tests/unit, tests/fuzz and tests/local: no device
#   shm     tests of what every fabric must do, by shared memory: no device
#   tcp     the same over TCP
#   browser tests/browser: the page of `recv --view` in a real Chromium (not on Ubuntu, which has it as a snap only)
#   device  every test marked "rdma", on a real device of this machine where there is one; else in
#   uml     ... a User Mode Linux guest with Soft-RoCE, at this machine's speed (scripts/softroce_uml.sh), and
#   vm      ... those also marked "smoke" on the distribution's own kernel in a virtual machine (scripts/softroce_vm.sh), and
#   nodes   ... tests/nodes on two of them, on a wire that loses packets
#   torch   tests/tensors, with the distribution's PyTorch and numpy, on a device or in a User Mode Linux guest. Not of itself: PyTorch
#           brings 120 packages (150 MB) to the system. CI=1 in the environment, or STAGES, asks for it
#
# Missing packages are installed (as root or by sudo; else the line to run is printed). The first run builds the User
# Mode Linux kernel, which takes 4 to 6 minutes on 2 processors. A device test that finds no device fails; a stage in which no
# device test ran fails. All stages run, whatever fails; the exit status is 0 only if nothing did.
#
#   --soak                 the long version, which takes half an hour: only the tests that repeat something, as often as it takes to be
#                          sure (tests/soak.py). Not in the virtual machine, unless STAGES asks for it.
#   STAGES="host uml vm"   the stages to run, when not all of them
#   RDMAXFER_FUZZ=1000     how many inputs each target of tests/fuzz gets (100000; with --soak 1000000)
#   RDMAXFER_FUZZ_SEED=7   the seed they are made from (else a new one each time, which is printed with a failure)
#   scripts/test.sh -k handshake
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help; exit; fi

soak=
if [[ ${1:-} == --soak ]]; then soak=1; shift; fi

browser=(browser)
detect_os /etc/os-release
# shellcheck disable=SC2154 # set by detect_os
if [[ $os_family == ubuntu ]] && ! command -v chromium google-chrome >/dev/null; then browser=(); fi
if [[ -n ${STAGES:-} ]]; then read -r -a stages <<<"$STAGES"
elif active_device >/dev/null; then stages=(host shm tcp "${browser[@]}" device)
elif [[ -n $soak ]]; then stages=(host uml nodes)
else stages=(host shm tcp "${browser[@]}" uml vm nodes); fi
if [[ -z ${STAGES:-} && -z $soak && -n ${CI:-} ]]; then stages+=(torch); fi
has_stage() { [[ " ${stages[*]} " == *" $1 "* ]]; }

results=$(mktemp -d)
background=()
clean_up() {
  local job
  for job in "${background[@]}"; do kill "$job" 2>/dev/null || true; done
  rm -rf "$results"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Packages first and one after the other: apt has one lock. What only downloads and compiles then goes on beside pip.
install_requirements gcc g++   # g++: an example
uml_ready='' vm_ready=''
if has_stage uml || has_stage device; then need_packages --apt nftables iptables ufw --dnf nftables iptables-nft ufw; fi   # firewalls that are to be found
need_uml=
if has_stage uml || { has_stage torch && ! active_device >/dev/null; }; then need_uml=1; fi
if [[ -n $need_uml ]]; then
  "$here/softroce_uml.sh" tools
  "$here/softroce_uml.sh" build & uml_ready=$!
  background+=("$uml_ready")
fi
if has_stage browser && ! command -v chromium google-chrome >/dev/null; then need_packages --apt chromium --dnf chromium; fi
if has_stage vm || has_stage nodes; then
  need_packages --apt nftables --dnf nftables
  "$here/softroce_vm.sh" tools
  "$here/softroce_vm.sh" prepare & vm_ready=$!
  background+=("$vm_ready")
fi
extras=test,demo
if has_stage host; then extras+=,fuzz; fi
make_venv "$extras"
torch_venv=$checkout/build/venv-torch
if has_stage torch; then   # after the other one: it is to have packages of its own, not those that come with PyTorch
  need_packages --apt python3-torch --dnf python3-torch
  venv=$torch_venv make_venv test-core
fi

# Guests can't write into the checkout, so nothing tries to; RDMAXFER_TEST_DEVICE makes a missing device a failure.
# Not "python -m pytest" and not in the checkout: both would put it, and so the package as it is not installed, on the path.
pytest=("$venv/bin/pytest" -c "$checkout/pyproject.toml" --rootdir "$checkout" -p no:cacheprovider)
cd "$results"
arguments=("$@")
device_tests=("$checkout/tests/device")
[[ -z $(find "$checkout/tests/faults" -name 'test_*.py' -print -quit 2>/dev/null) ]] || device_tests+=("$checkout/tests/faults")
fabric_tests=("$checkout/tests/device" "$checkout"/tests/faults/test_{resume,killed,dead_peers,interrupts}.py)
host_tests=("$checkout/tests/unit" "$checkout/tests/fuzz")
[[ -z $(find "$checkout/tests/local" -name 'test_*.py' -print -quit 2>/dev/null) ]] || host_tests+=("$checkout/tests/local")

# What is selected, and the seconds that a guest may take.
only='' uml_s=3600 vm_s=900
if [[ -n $soak ]]; then
  export RDMAXFER_SOAK=1
  only=' and (soak or counted)' uml_s=36000 vm_s=36000
fi

run_stage() {
  case $1 in
    host) "${pytest[@]}" "${host_tests[@]}" -m "not rdma$only" --junitxml="$results/host.xml" "${arguments[@]}" ;;
    shm | tcp)
      RDMAXFER_FABRIC=$1 "${pytest[@]}" "${fabric_tests[@]}" -m "fabric$only" --junitxml="$results/$1.xml" "${arguments[@]}" ;;
    browser) "${pytest[@]}" "$checkout/tests/browser" --junitxml="$results/browser.xml" "${arguments[@]}" ;;
    device) RDMAXFER_TEST_DEVICE=1 "${pytest[@]}" "${device_tests[@]}" -m "rdma$only" --junitxml="$results/device.xml" "${arguments[@]}" ;;
    uml)
      wait "$uml_ready" || { say "the User Mode Linux kernel is not there (see above)"; return 1; }
      RDMAXFER_TEST_DEVICE=1 "$here/softroce_uml.sh" --rw "$results" --timeout "$uml_s" -- \
        "${pytest[@]}" "${device_tests[@]}" -m "rdma$only" --junitxml="$results/uml.xml" "${arguments[@]}" ;;
    vm)
      wait "$vm_ready" || { say "the virtual machine's kernel is not there (see above)"; return 1; }
      # Emulated, everything takes 20 to 50 times as long: no test is to be called stuck for that.
      RDMAXFER_TEST_DEVICE=1 "$here/softroce_vm.sh" --rw "$results" --timeout "$vm_s" -- \
        "${pytest[@]}" "${device_tests[@]}" -m "rdma and smoke$only" -o timeout=600 --junitxml="$results/vm.xml" "${arguments[@]}" ;;
    nodes)
      wait "$vm_ready" || { say "the virtual machine's kernel is not there (see above)"; return 1; }
      # Two CPUs each, though one is faster here: Linux 6.1's rxe can keep one busy for ever, and then nothing else runs on it.
      "$here/softroce_vm.sh" --nodes 2 --cpus 2 --rw "$results" --timeout 1200 -- \
        bash "$checkout/tests/nodes/run.sh" "$venv/bin/python" \
        "${pytest[@]}" "$checkout/tests/nodes" -m nodes -o timeout=300 --junitxml="$results/nodes.xml" "${arguments[@]}" ;;
    torch)
      local torch_pytest=("$torch_venv/bin/pytest" "${pytest[@]:1}" "$checkout/tests/tensors" -m "rdma$only" --junitxml="$results/torch.xml" "${arguments[@]}")
      if [[ -z $need_uml ]]; then RDMAXFER_TEST_DEVICE=1 "${torch_pytest[@]}"; return; fi
      wait "$uml_ready" || { say "the User Mode Linux kernel is not there (see above)"; return 1; }
      RDMAXFER_TEST_DEVICE=1 "$here/softroce_uml.sh" --rw "$results" --timeout 900 -- "${torch_pytest[@]}" ;;
    *) say "no stage is called $1"; return 2 ;;
  esac
}

# Prints "RAN FAILED SKIPPED" of a junit file; RAN counts what neither was skipped nor failed before it began.
counts() {
  "$venv/bin/python" - "$1" <<'PY'
import sys, xml.etree.ElementTree as tree
try:
    cases = list(tree.parse(sys.argv[1]).iter("testcase"))
except (OSError, tree.ParseError):
    cases = []
skipped = sum(case.find("skipped") is not None for case in cases)
failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
print(len(cases) - skipped, failed, skipped)
PY
}

failed=() summary=()
for stage in "${stages[@]}"; do
  printf '\n===== %s =====\n' "$stage"
  start=$SECONDS status=0
  run_stage "$stage" || status=$?
  read -r ran bad skipped <<<"$(counts "$results/$stage.xml")"
  verdict=passed
  if ((status != 0)); then verdict="FAILED (exit status $status)"; fi
  if ((ran == 0)); then verdict="FAILED: no test ran"; fi
  [[ $verdict == passed ]] || failed+=("$stage")
  kind="tests"
  case $stage in host | shm | tcp | browser) ;; *) kind="rdma tests" ;; esac
  summary+=("$(printf '%-7s %4d %-10s ran, %d failed, %d skipped, %d s: %s' "$stage" "$ran" "$kind" "$bad" "$skipped" $((SECONDS - start)) "$verdict")")
done

printf '\n===== summary =====\n'
printf '%s\n' "${summary[@]}"
if ((${#failed[@]})); then
  printf '===== FAILED: %s =====\n' "${failed[*]}"
  exit 1
fi
printf '===== all stages passed in %d s =====\n' "$SECONDS"
