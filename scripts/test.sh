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
#   device  tests/device, on a real device of this machine where there is one; else in
#   uml     ... a User Mode Linux guest with Soft-RoCE, at this machine's speed (scripts/softroce_uml.sh)
#   faults  tests/faults, on that device, or in another such guest
#   vm      those of both marked "smoke", on the distribution's own kernel in a virtual machine (scripts/softroce_vm.sh), and
#   nodes   ... tests/nodes on two of them, on a wire that loses packets; neither where there is a real device
#   torch   tests/tensors, with the distribution's PyTorch and numpy, on a device or in a User Mode Linux guest. Not of itself: PyTorch
#           brings 120 packages (150 MB) to the system. CI=1 in the environment, or STAGES, asks for it
#
# They mostly wait: uml, faults and all the others go on side by side where there are 2 processors and 12 GB of memory. What a
# stage prints is then shown when it has ended.
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
elif active_device >/dev/null; then stages=(host shm tcp "${browser[@]}" device faults)
elif [[ -n $soak ]]; then stages=(host uml faults nodes)
else stages=(host shm tcp "${browser[@]}" uml faults vm nodes); fi
if [[ -z ${STAGES:-} && -z $soak && -n ${CI:-} ]]; then stages+=(torch); fi
has_stage() { [[ " ${stages[*]} " == *" $1 "* ]]; }
in_uml() { case $1 in uml) ;; faults | torch) ! active_device >/dev/null ;; *) false ;; esac; }

results=$(mktemp -d)
background=()   # process groups
clean_up() {
  local group
  for group in "${background[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
  wait
  rm -rf "$results"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# in_background COMMAND...: in a process group of its own, which clean_up ends as a whole.
in_background() {
  set -m
  { set +m; "$@"; } </dev/null &
  set +m
  background+=("$!")
}

# make_kernel KIND WORD: leaves in KIND.made, for await_kernel, how it went.
make_kernel() {
  local status=0
  "$here/softroce_$1.sh" "$2" || status=$?
  echo "$status" >"$results/$1.new"
  mv "$results/$1.new" "$results/$1.made"
}
await_kernel() {
  local by=$((SECONDS + 3600))
  until [[ -e $results/$1.made ]] || ((SECONDS > by)); do sleep 1; done
  [[ -e $results/$1.made && $(<"$results/$1.made") == 0 ]] || { say "the kernel of the guest is not there (see above)"; return 1; }
}

# Packages first and one after the other: apt has one lock. What only downloads and compiles then goes on beside pip.
install_requirements gcc g++   # g++: an example
if has_stage uml || has_stage device; then need_packages --apt nftables iptables ufw --dnf nftables iptables-nft ufw; fi   # firewalls that are to be found
for stage in "${stages[@]}"; do
  if in_uml "$stage"; then
    "$here/softroce_uml.sh" tools
    in_background make_kernel uml build
    break
  fi
done
if has_stage browser && ! command -v chromium google-chrome >/dev/null; then need_packages --apt chromium --dnf chromium; fi
if has_stage vm || has_stage nodes; then
  need_packages --apt nftables perftest --dnf nftables perftest   # guests have no network to install it from
  "$here/softroce_vm.sh" tools
  in_background make_kernel vm prepare
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
fabric_tests=("$checkout/tests/device" "$checkout"/tests/faults/test_{resume,killed,dead_peers,interrupts}.py)
host_tests=("$checkout/tests/unit" "$checkout/tests/fuzz" "$checkout/tests/local")

# What is selected, and the seconds that a guest may take.
only='' uml_s=3600 vm_s=900
if [[ -n $soak ]]; then
  export RDMAXFER_SOAK=1
  only=' and (soak or counted)' uml_s=36000 vm_s=36000
fi

# on_device STAGE COMMAND...: on the device of this machine, or in a User Mode Linux guest.
on_device() {
  local stage=$1
  shift
  if ! in_uml "$stage"; then RDMAXFER_TEST_DEVICE=1 "$@"; return; fi
  await_kernel uml || return
  RDMAXFER_TEST_DEVICE=1 "$here/softroce_uml.sh" --rw "$results" --timeout "$uml_s" -- "$@"
}

run_stage() {
  local junit="--junitxml=$results/$1.xml"
  case $1 in
    host) "${pytest[@]}" "${host_tests[@]}" -m "not rdma$only" "$junit" "${arguments[@]}" ;;
    shm | tcp) RDMAXFER_FABRIC=$1 "${pytest[@]}" "${fabric_tests[@]}" -m "fabric$only" "$junit" "${arguments[@]}" ;;
    browser) "${pytest[@]}" "$checkout/tests/browser" "$junit" "${arguments[@]}" ;;
    device | uml) on_device "$1" "${pytest[@]}" "$checkout/tests/device" -m "rdma$only" "$junit" "${arguments[@]}" ;;
    faults) on_device faults "${pytest[@]}" "$checkout/tests/faults" -m "rdma$only" "$junit" "${arguments[@]}" ;;
    vm)
      await_kernel vm || return
      # Emulated, everything takes 20 to 50 times as long: no test is to be called stuck for that.
      RDMAXFER_TEST_DEVICE=1 "$here/softroce_vm.sh" --rw "$results" --timeout "$vm_s" -- \
        "${pytest[@]}" "$checkout/tests/device" "$checkout/tests/faults" -m "rdma and smoke$only" -o timeout=600 "$junit" "${arguments[@]}" ;;
    nodes)
      await_kernel vm || return
      # Two CPUs each, though one is faster here: Linux 6.1's rxe can keep one busy for ever, and then nothing else runs on it.
      "$here/softroce_vm.sh" --nodes 2 --cpus 2 --rw "$results" --timeout 1200 -- \
        bash "$checkout/tests/nodes/run.sh" "$venv/bin/python" \
        "${pytest[@]}" "$checkout/tests/nodes" -m nodes -o timeout=300 "$junit" "${arguments[@]}" ;;
    torch) on_device torch "$torch_venv/bin/pytest" "${pytest[@]:1}" "$checkout/tests/tensors" -m "rdma$only" "$junit" "${arguments[@]}" ;;
    *) say "no stage is called $1"; return 2 ;;
  esac
}

# run_lane STAGE...: one stage after the other; of each, its exit status and seconds are left in a file.
run_lane() {
  local stage start status
  for stage in "$@"; do
    start=$SECONDS status=0
    if [[ -n $side_by_side ]]; then
      run_stage "$stage" >"$results/$stage.log" 2>&1 || status=$?
    else
      printf '\n===== %s =====\n' "$stage"
      run_stage "$stage" || status=$?
    fi
    echo "$status $((SECONDS - start))" >"$results/$stage.new"
    mv "$results/$stage.new" "$results/$stage.ended"
  done
}

# What stages that go on side by side have printed, as they end, and now and then how far they are.
show_lanes() {
  local remaining=("${stages[@]}") now stage line next=$((SECONDS + 60)) running=1
  while ((${#remaining[@]} && running)); do
    sleep 1
    running=$(jobs -rp | wc -l)   # before the files are looked at
    now=("${remaining[@]}") remaining=() line=
    for stage in "${now[@]}"; do
      if [[ -e $results/$stage.ended ]]; then
        printf '\n===== %s =====\n' "$stage"
        cat "$results/$stage.log"
        continue
      fi
      remaining+=("$stage")
      [[ ! -e $results/$stage.log ]] || line+=" $stage $(grep -aoE '\[ *[0-9]+%\]' "$results/$stage.log" | tail -n 1 || true)"
    done
    if ((SECONDS >= next && ${#remaining[@]})); then
      say "after $SECONDS s:$line"
      next=$((SECONDS + 60))
    fi
  done
  for stage in "${remaining[@]}"; do
    say "$stage did not run to its end: something else has stopped it"
    echo "143 0" >"$results/$stage.ended"
  done
}

# outcome FILE: of a junit file prints "RAN FAILED SKIPPED", and a line for each test that failed. RAN counts what was not skipped.
outcome() {
  "$venv/bin/python" - "$1" <<'PY'
import sys, xml.etree.ElementTree as tree
try:
    cases = list(tree.parse(sys.argv[1]).iter("testcase"))
except (OSError, tree.ParseError):
    cases = []
skipped = sum(case.find("skipped") is not None for case in cases)
reasons = [(case, next((each for each in case if each.tag in ("failure", "error")), None)) for case in cases]
failed = [(case, reason) for case, reason in reasons if reason is not None]
print(len(cases) - skipped, len(failed), skipped)
for case, reason in failed:
    why = " ".join(reason.get("message", "").split())[:200]
    print(f"  {case.get('classname')}::{case.get('name')}: {why}")
PY
}

# Each in a guest of its own, and each takes as long as all others together. (torch takes seconds.)
alone=() others=()
for stage in "${stages[@]}"; do
  if [[ $stage != torch ]] && in_uml "$stage"; then alone+=("$stage"); else others+=("$stage"); fi
done
side_by_side=
if ((${#alone[@]} && ${#stages[@]} > 1 && $(nproc) > 1 && $(awk '/^MemAvailable/ {print $2}' /proc/meminfo) > 12000000)); then side_by_side=1; fi
if [[ -n $side_by_side ]]; then
  for stage in "${alone[@]}"; do in_background run_lane "$stage"; done
  in_background run_lane "${others[@]}"
  show_lanes
else
  run_lane "${stages[@]}"
fi

failed=() summary=()
for stage in "${stages[@]}"; do
  read -r status seconds <"$results/$stage.ended"
  mapfile -t told <<<"$(outcome "$results/$stage.xml")"
  read -r ran bad skipped <<<"${told[0]}"
  verdict=passed
  if ((status != 0)); then verdict="FAILED (exit status $status)"; fi
  if ((ran == 0)); then verdict="FAILED: no test ran"; fi
  [[ $verdict == passed ]] || failed+=("$stage")
  kind="tests"
  case $stage in host | shm | tcp | browser) ;; *) kind="rdma tests" ;; esac
  summary+=("$(printf '%-7s %4d %-10s ran, %d failed, %d skipped, %d s: %s' "$stage" "$ran" "$kind" "$bad" "$skipped" "$seconds" "$verdict")" "${told[@]:1}")
done

printf '\n===== summary =====\n'
printf '%s\n' "${summary[@]}"
if ((${#failed[@]})); then
  printf '===== FAILED: %s =====\n' "${failed[*]}"
  exit 1
fi
printf '===== all stages passed in %d s =====\n' "$SECONDS"
