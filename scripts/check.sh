#!/usr/bin/env bash
# help
# Checks the sources without running them: ruff (lint and format), mypy --strict on the package as it is installed,
# the C core and the examples in C and C++ by the compiler with all warnings as errors, the shell scripts by shellcheck, and the documentation by making it a site.
#
#   scripts/check.sh
#
# Missing packages are installed (as root or by sudo; else the line to run is printed); ruff and mypy come
# with the extra "dev" into .venv. All checks run, whatever fails; the exit status is 0 only if nothing did.
# end of help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=scripts/lib/venv.sh
. "$here/lib/venv.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help; exit; fi

install_requirements gcc g++
command -v shellcheck >/dev/null || need_packages --apt shellcheck --dnf ShellCheck
make_venv dev
cd "$checkout"

failed=()
check() {
  local name=$1
  shift
  printf '%-12s' "$name"
  if "$@"; then :; else failed+=("$name"); fi
}

# On the installed package: only there is cm/ what it is called, rdmaxfer.cm.
types() { (cd / && "$venv/bin/python" -m mypy --strict --config-file "$checkout/pyproject.toml" --cache-dir "$checkout/.mypy_cache" -p rdmaxfer); }

c_core() {
  local source status=0
  for source in rdmaxfer/_native/*.c bench/*.c; do
    cc -std=c11 -Wall -Wextra -Werror -fsyntax-only "$source" || status=1
  done
  for source in examples/*.c; do   # gnu11, as cc has it: POSIX functions
    cc -std=gnu11 -Wall -Wextra -Werror -fsyntax-only -Irdmaxfer/include "$source" || status=1
  done
  for source in examples/*.cpp; do
    c++ -std=c++17 -Wall -Wextra -Werror -fsyntax-only -Irdmaxfer/include "$source" || status=1
  done
  cc -std=c99 -pedantic -Wall -Wextra -Werror -fsyntax-only -x c rdmaxfer/include/rdmaxfer.h || status=1
  ((status)) || echo "no warnings"
  return "$status"
}

shell_scripts() { shellcheck -x "${scripts[@]}" && echo "no warnings in ${#scripts[@]} files"; }
scripts=(.ci/run scripts/*.sh scripts/lib/*.sh tests/nodes/*.sh)

site() { NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet && echo "no warnings"; }

check "ruff" "$venv/bin/python" -m ruff check --output-format concise .
check "format" "$venv/bin/python" -m ruff format --check .
check "mypy" types
check "C" c_core
check "shellcheck" shell_scripts
check "docs" site

if ((${#failed[@]})); then
  echo "check.sh: FAILED: ${failed[*]}"
  exit 1
fi
echo "check.sh: all checks passed"
