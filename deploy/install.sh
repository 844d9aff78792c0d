#!/bin/sh
# Installs burstgate into a virtual environment of its own, as the image has it: exact versions with their hashes, the
# data plane compiled (a C compiler is needed; HATCH_BUILD_HOOKS_ENABLE=0 leaves it as it is), no pip in the result.
#
#   install.sh dependencies DIR   what requirements.lock names
#   install.sh package DIR        burstgate itself, from the checkout that this file is in
#
# Two steps, so that an image keeps the first one's layer when only the code has changed.
set -eu
usage() { echo "usage: install.sh dependencies|package DIR" >&2; exit 2; }
[ $# -eq 2 ] || usage
root=$(cd "$(dirname "$0")/.." && pwd)
python="$2/bin/python"
pip() { "${PYTHON:-python3}" -m pip --disable-pip-version-check --python "$python" "$@"; }

case $1 in
dependencies)
    "${PYTHON:-python3}" -m venv --without-pip "$2"
    pip install --quiet --only-binary :all: --require-hashes -r "$root/requirements.lock"
    ;;
package)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Of the locked development tools those that build: the backend, the compiler and what these two need.
    awk '/^[a-z]/ { keep = /^(ast-serialize|hatchling|librt|mypy|mypy-extensions|packaging|pathspec|pluggy|setuptools|trove-classifiers|types-pyyaml|typing-extensions)==/ } keep' \
        "$root/requirements-dev.lock" >"$work/tools.lock"
    pip install --quiet --no-deps --require-hashes --target "$work/tools" -r "$work/tools.lock"
    PYTHONPATH="$work/tools" HATCH_BUILD_HOOKS_ENABLE="${HATCH_BUILD_HOOKS_ENABLE-1}" \
        pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$root"
    pip install --quiet --no-deps --no-index "$work"/burstgate-*.whl
    ;;
*) usage ;;
esac
