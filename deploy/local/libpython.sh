#!/bin/sh
# Fetches Debian's shared Python 3.11 library into an environment, without installing anything on the system.
# Triton's Python backend is linked against it, and Debian's python3.11 comes without. Usage: libpython.sh VENV
set -eu
target="$1/share/lingqu/lib"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "libpython3.11.so was not found: install your system's shared Python 3.11 library" >&2
    exit 0      # lingqu up says the same when it comes to it; everything else works
fi
mkdir -p "$target"
cd "$work"
if ! apt-get download -qq libpython3.11 2>/dev/null; then
    [ "$(id -u)" != 0 ] || { apt-get update -qq && apt-get download -qq libpython3.11; } || true
fi
set -- libpython3.11_*.deb
if [ ! -f "$1" ]; then
    echo "libpython3.11 could not be fetched: run apt-get install libpython3.11 as root" >&2
    exit 0
fi
dpkg-deb -x "$1" tree
cd "$OLDPWD"
cp "$work"/tree/usr/lib/*/libpython3.11.so.1.0 "$target/"
