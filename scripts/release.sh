#!/usr/bin/env bash
# help
# Makes what is released: a source archive, and a wheel that pip installs on Linux machines of this architecture without a compiler,
# whatever their Python (3.10 or newer) and with or without RDMA. The version is that of pyproject.toml.
#
#   scripts/release.sh [DIR]     into DIR, or build/dist
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

case ${1:-} in
  -h | --help) show_help; exit ;;
  -*) die "unknown argument: $1 (see --help)" ;;
esac
# shellcheck disable=SC2154 # checkout and venv are set by what was sourced
into=$(realpath -m "${1:-$checkout/build/dist}")

install_requirements gcc
make_venv release
"$venv/bin/python" "$here/lib/release.py" "$into"
say "made:" "$into"/rdmaxfer-*
