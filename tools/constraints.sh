#!/usr/bin/env bash
# Writes the releases that .venv holds into constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
releases=$(.venv/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$//')
cat >constraints.txt <<END
# The releases that the tests run with (Python $version, $(uname -s)), written by \`make constraints\`.
# torch has no local suffix, so that its CPU build and its CUDA builds both satisfy the line.
$releases
END
