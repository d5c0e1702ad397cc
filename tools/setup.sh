#!/bin/sh
# Makes the virtual environment and installs Milonga into it, editable, with the versions of constraints.txt.
#
#   sh tools/setup.sh VENV [EXTRAS]      EXTRAS as in pyproject.toml: dev, docs, bench, ...
#
# PYTHON       the interpreter to use (otherwise python3, then python3.13, python3.12, python3.11)
# TORCH_INDEX  a package index to take torch from, for example a CPU-only one (otherwise whatever pip is configured with)
#
# What cannot work ends with one line (what, where, what to do) and exit code 2.
set -eu

venv=${1:?usage: sh tools/setup.sh VENV [EXTRAS]}
extras=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)

stop() {
    echo "setup: $*" >&2
    exit 2
}

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || true; }

# Sets `python` to the first supported interpreter that can make environments.
find_python() {
    seen=''
    without_venv=''
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11
    fi
    for candidate in "$@"; do
        version=$(version_of "$candidate")
        [ -n "$version" ] || continue
        seen="$seen${seen:+, }$candidate ($version)"
        "$candidate" -c "$supported" 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            return
        fi
        without_venv=${without_venv:-"$candidate (Python $version)"}
    done
    if [ -n "$without_venv" ]; then
        stop "$without_venv has no venv module; install it (on Debian and Ubuntu the package python3-venv), then run make again"
    fi
    stop "no supported Python: 3.11, 3.12 or 3.13 is needed, found: ${seen:-none}; install one, or name it: make PYTHON=/path/to/python3"
}

if [ -e "$venv" ] && ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    # left behind by an installation that was interrupted before pip was there
    [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] || stop "$venv exists and is no environment; move it away, or choose another: make VENV=other"
    echo "setup: $venv is unfinished, making it again" >&2
    rm -rf "$venv"
fi
if [ -e "$venv" ]; then
    "$venv/bin/python" -c "$supported" || stop "$venv holds Python $(version_of "$venv/bin/python"), not 3.11 to 3.13; remove $venv and run make again"
else
    find_python
    echo "setup: making $venv with $python (Python $version)" >&2
    "$python" -m venv "$venv" || stop "$python could not make $venv; see the lines above, remove $venv and run make again"
fi

quiet=--quiet
if [ -t 2 ]; then quiet=''; fi
pip_install() {
    # shellcheck disable=SC2086  # $quiet is one flag or none
    "$venv/bin/python" -m pip install --disable-pip-version-check $quiet --constraint "$root/constraints.txt" "$@" 1>&2 ||
        stop "pip could not install into $venv; see the lines above, then run make again"
}

echo "setup: installing the pinned packages into $venv; the first time takes some minutes, PyTorch being the largest" >&2
if [ -n "${TORCH_INDEX:-}" ]; then
    pip_install --index-url "$TORCH_INDEX" torch
fi
pip_install hatchling
pip_install --no-build-isolation --editable "$root${extras:+[$extras]}"
echo "setup: done" >&2
