#!/usr/bin/env bash
# What both nodes of "softroce_vm.sh --nodes 2" run: run.sh PYTHON PYTEST [ARGUMENT...]. Node 1 runs the tests, node 2 the agent.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$1
shift
if [[ $RDMAXFER_NODE == 2 ]]; then exec "$python" "$here/agent.py"; fi
status=0
"$@" || status=$?
: 2>/dev/null >"/dev/tcp/$RDMAXFER_ADMIN_PEER/7999"   # agent.END_PORT
exit "$status"
