#!/bin/sh
# Make a virtual environment with the wanted extra and the Debian programs that demo and tests use.
# usage: bootstrap.sh PYTHON VENV demo|dev|bench
set -eu
python=$1 venv=$2 extra=$3
root=$(dirname "$(dirname "$(readlink -f "$0")")")

say() { printf '%s\n' "$*" >&2; }

# Debian packages: installed when we are root, named when we are not.
want() {
    program=$1 package=$2
    command -v "$program" >/dev/null 2>&1 && return 0
    [ -x "/usr/sbin/$program" ] && return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing the Debian package $package"
        export DEBIAN_FRONTEND=noninteractive
        [ -n "${updated:-}" ] || { apt-get update -qq >&2 || say "apt-get update failed"; updated=1; }
        apt-get install -y -qq --no-install-recommends "$package" >/dev/null || say "could not install $package"
    else
        say "$program is missing: apt-get install $package (some steps will be skipped and say so)"
    fi
}

[ -n "$python" ] || { say "Python 3.11 or newer is needed: apt-get install python3 python3-venv"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "$python is $("$python" -V 2>&1); Python 3.11 or newer is needed"; exit 1; }
want mosquitto mosquitto
want curl curl
[ "$extra" != dev ] || want strace strace

if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        say "installing the Debian package python3-venv"
        apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        say "python3-venv is missing: apt-get install python3-venv"; exit 1
    fi
fi
# One that was interrupted has a Python and no pip: it is made again.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || { say "creating $venv"; "$python" -m venv --clear "$venv"; }
say "installing inferd[$extra] into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" \
    --editable "$root[$extra]"
