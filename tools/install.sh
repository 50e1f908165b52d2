#!/usr/bin/env bash
# Puts the project into .venv: tools/install.sh [base|test|dev]. `make install` calls it.
# PYTHON names another interpreter; pip reads its own settings (PIP_EXTRA_INDEX_URL, ...).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-base}
venv=.venv
log=$venv/install.log
min_free_mib=3072  # the environment takes 2.4 GB with the CPU build of torch

fail() {
    printf 'install failed: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

version_of() { # prints 3.11.7, or nothing if "$1" is no working Python
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true
}

is_enough() { # whether version "$1" is 3.11 or newer
    local major=${1%%.*} rest=${1#*.}
    [ "$major" -gt 3 ] || { [ "$major" -eq 3 ] && [ "${rest%%.*}" -ge 11 ]; }
}

find_python() { # sets python, python_version
    local candidate found=""
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        python=$(command -v "$candidate" || true)
        python_version=$([ -z "$python" ] || version_of "$python")
        [ -n "$python_version" ] || continue
        if is_enough "$python_version"; then return; fi
        found="$found${found:+, }$python_version ($python)"
    done
    fail "Python 3.11 or newer is needed, but found ${found:-none}${PYTHON:+ with PYTHON=$PYTHON}." \
        "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), then run the" \
        "command again; make PYTHON=/path/to/python3.11 ... names one that is not on the PATH."
}

free_mib() { df -Pk . | awk 'NR == 2 { print int($4 / 1024) }'; }

make_venv() {
    if [ -e "$venv/bin/python" ]; then
        local version
        version=$(version_of "$venv/bin/python")
        if [ -n "$version" ] && is_enough "$version"; then return; fi
        fail "$venv holds ${version:-a Python that does not run}, but 3.11 or newer is needed." \
            "Remove it (rm -r $venv) and run the command again."
    fi
    find_python
    local free
    free=$(free_mib)
    if [ "$free" -lt "$min_free_mib" ]; then
        fail "$PWD has $free MiB free, but the environment needs $min_free_mib MiB." \
            "Free some, or clone the repository to another disk, and run the command again."
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        fail "$python ($python_version) has no venv module." \
            "Debian, Ubuntu: apt install python${python_version%.*}-venv; then run the command again."
    fi
    "$python" -m venv "$venv" || fail "$python -m venv $venv did not work; see above."
}

renew_pip() { # the pip that Python 3.11 brings takes twice as long to choose; it does, if need be
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile \
        --retries 0 'pip>=25' >"$log" 2>&1 || true
}

pip_install() { # --no-compile: few modules are ever imported, and Python compiles these then
    local target=.
    [ "$extra" = base ] || target=".[$extra]"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile \
        -c constraints.txt -e "$target" >>"$log" 2>&1
}

try_imports() { # this also compiles what every command needs, whatever the environment says
    local python="env -u PYTHONDONTWRITEBYTECODE $venv/bin/python" others
    $python -c 'import mlflow, optuna, ray' >>"$log" 2>&1 &
    others=$!
    $python -c 'import comp; comp.load_model, comp.prune' >>"$log" 2>&1 && wait "$others"
}

explain_pip_failure() {
    tail -n 15 "$log" >&2
    if grep -q 'No space left on device' "$log"; then
        fail "the disk is full ($(free_mib) MiB free in $PWD)." \
            "The environment takes 2.4 GB there with the CPU build of torch and 6 GB with the CUDA" \
            "build that PyPI has for Linux; pip unpacks into ${TMPDIR:-/tmp} (TMPDIR names another place)." \
            "Free some, then run the command again."
    fi
    if grep -q -E 'NewConnectionError|NameResolutionError|Temporary failure|Could not fetch|timed out' \
        "$log"; then
        fail "the package index was not reached." \
            "Check the network or pip's index settings (pip config list), then run the command again."
    fi
    fail "pip could not install the packages of pyproject.toml; its whole output is in $log." \
        "Mend what it names, then run the command again."
}

make_venv
echo "installing into $venv (the first time: 2.4 to 6 GB, minutes; log in $log)"
SECONDS=0
renew_pip
pip_install || explain_pip_failure
try_imports || fail "the packages are installed, but do not work; $log ends with the reason:" \
    "$(tail -n 1 "$log")"
case $extra in # an environment for the tests is also one for using the package
    dev) touch "$venv/.installed-base" "$venv/.installed-test" "$venv/.installed-dev" ;;
    test) touch "$venv/.installed-base" "$venv/.installed-test" ;;
    *) touch "$venv/.installed-base" ;;
esac
echo "installed in $SECONDS s"
