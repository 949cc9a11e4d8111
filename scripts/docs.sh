#!/usr/bin/env bash
# help
# Makes the documentation a site, in build/site: open build/site/index.html. And docs/man/rdmaxfer.1, the manual page, of what
# `rdmaxfer --help` and its commands say.
#
#   scripts/docs.sh            build both; anything that is not right, such as a link that leads nowhere, is an error
#   scripts/docs.sh --serve    show it at http://127.0.0.1:8000/, and again whenever a page changes
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

serve=
case ${1:-} in
  -h | --help) show_help; exit ;;
  --serve) serve=1 ;;
  "") ;;
  *) die "unknown argument: $1 (see --help)" ;;
esac

install_requirements gcc
make_venv docs
cd "$checkout"
export NO_MKDOCS_2_WARNING=1
if [[ -n $serve ]]; then exec "$venv/bin/mkdocs" serve; fi
manual=docs/man/rdmaxfer.1
COLUMNS=80 "$venv/bin/argparse-manpage" --module rdmaxfer.cli.app --function make_parser --prog rdmaxfer --project-name rdmaxfer \
  --manual-title "rdmaxfer" --description "numpy frames between processes by RDMA" --format single-commands-section \
  >"$manual.new"
mv "$manual.new" "$manual"
"$venv/bin/mkdocs" build --strict --quiet
say "built: $checkout/build/site/index.html and $manual"
