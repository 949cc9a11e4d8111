# shellcheck shell=bash disable=SC2154 # checkout is set by common.sh
# The virtual environment that demo.sh, test.sh and check.sh work in. Sourced after common.sh.

venv=$checkout/.venv

# install_requirements APT-PACKAGE...: what it takes to build the package and to run it on verbs, from the distribution.
install_requirements() {
  need_packages \
    --apt libc6-dev python3 python3-dev python3-venv python3-pyverbs libibverbs-dev ibverbs-providers rdma-core iproute2 "$@" \
    --dnf gcc gcc-c++ python3 python3-devel python3-pip python3-pyverbs rdma-core-devel libibverbs rdma-core iproute
}

# make_venv EXTRA: $venv, by the Python that can import pyverbs, with the checkout and this extra of it installed.
# The distribution's pyverbs has no counterpart that pip could install: hence --system-site-packages.
make_venv() {
  local python log
  python=$(find_pyverbs_python) ||
    die "no Python 3.10 or newer here can import pyverbs. It comes with the distribution (package python3-pyverbs) and works with the distribution's own python3 only; this distribution's is too old, or RDMAXFER_PYTHON names another one"
  if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -c 'import pyverbs.device, pip' >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv --system-site-packages "$venv"
  fi
  say "installing rdmaxfer[$1] into ${venv#"$checkout"/}"
  log=$(mktemp)
  # Left to pip's own configuration; no input, since nobody may be there to answer.
  if ! "$venv/bin/python" -m pip install --no-input --quiet "${checkout}[$1]" >"$log" 2>&1 </dev/null; then
    tail -n 30 "$log" >&2
    rm -f "$log"
    die "pip could not install rdmaxfer[$1] (see above)"
  fi
  rm -f "$log"
  "$venv/bin/python" -m compileall -q "$venv/lib" >/dev/null 2>&1 || true   # the guests can't write bytecode, and are slow to make it
}
