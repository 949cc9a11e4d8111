# shellcheck shell=bash disable=SC2154 # program, box, limit, engine_args are set by the scripts that source this
# The host's side of "softroce_vm.sh --nodes 2": two machines, which see each other on two networks. Sourced after guest.sh.

# run_nodes: boots the machines, waits until the commands of both have ended, and then ends both: a machine that went at once
# would be a dead host to the other one. Ends the script with the exit status of the command that failed first.
run_nodes() {
  local node now status first=0 waiting=(1 2) end=$((SECONDS + limit))
  engines=() readers=()
  trap close_nodes EXIT
  for node in 1 2; do start_node "$node"; done
  while ((${#waiting[@]})); do
    if ((SECONDS >= end)); then
      say "node ${waiting[0]}'s command did not end within $limit s: stopped (a longer limit: --timeout)"
      break
    fi
    sleep 0.2
    now=("${waiting[@]}")
    waiting=()
    for node in "${now[@]}"; do
      if [[ -s $box/$node/rc ]]; then
        status=$(tr -dc 0-9 <"$box/$node/rc")
        [[ $status == 0 ]] || say "node $node's command ended with exit status $status"
      elif kill -0 "${engines[node]}" 2>/dev/null; then
        waiting+=("$node")
        continue
      else
        show_end_of_node "$node"
        status=1
      fi
      ((first)) || first=$status
    done
  done
  if ((${#waiting[@]} && first == 0)); then first=124; fi
  exit "$first"
}

start_node() {
  local top=$box box=$box/$1 own=$1 peer=$((3 - $1)) card name
  mkdir "$box"
  fill_box vm "$1"
  {
    printf 'export RDMAXFER_NODE=%s RDMAXFER_ADDRESS=192.168.78.%s RDMAXFER_PEER=192.168.78.%s\n' "$own" "$own" "$peer"
    printf 'export RDMAXFER_ADMIN_ADDRESS=192.168.79.%s RDMAXFER_ADMIN_PEER=192.168.79.%s\n' "$own" "$peer"
  } >>"$box/environment"
  make_initramfs
  machine_arguments
  for card in 78,wire 79,admin; do
    name=${card#*,}
    # Relative names: the path of a socket may have 107 characters only. Datagrams, because all of QEMU 7.2 stands still when a
    # stream is full, and it is soon after the other machine's card went down.
    engine_args+=(-netdev "dgram,id=$name,local.type=unix,local.path=$name$own,remote.type=unix,remote.path=$name$peer"
      -device "virtio-net-pci,netdev=$name,romfile=,mac=52:54:00:00:${card%,*}:0$own")
  done
  sed -u "s/^/node $own: /" "$box/out" & readers+=("$!")
  sed -u "s/^/node $own: /" "$box/err" >&2 & readers+=("$!")
  (cd "$top" && exec "${engine_args[@]}" </dev/null >>"$box/log" 2>&1 3<>"$box/out" 4<>"$box/err") &
  engines[own]=$!
}

show_end_of_node() {
  tail -n 40 "$box/$1/log" >&2
  [[ ! -s $box/$1/console ]] || tail -n 40 "$box/$1/console" | tr -d '\r' >&2
  say "node $1 ended before its command did; its last messages are above"
}

close_nodes() {
  local node
  for node in "${!engines[@]}"; do
    kill -KILL "${engines[node]}" 2>/dev/null || true
    wait "${engines[node]}" 2>/dev/null || true
    : <>"$box/$node/out" <>"$box/$node/err"   # an engine that never opened them would leave the readers waiting
  done
  wait "${readers[@]}" || true
  close_box
}
