#!/usr/bin/env bash
# Makes the virtual environment that every make target runs in, from the hash locks alone.
#
#   bootstrap.sh main      what the program needs
#   bootstrap.sh dev       that, and the tools of make test and make lint
#   bootstrap.sh uv ARG…   run uv, with the package index that pip uses on this machine
#
# VENV    the folder, .venv unless set; beside it VENV.uv holds uv where the machine has none, and VENV.lock is a lock
# PYTHON  a Python 3.11 to 3.13 to build on; unset: the best one found, else one that uv downloads
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

VENV=$(realpath -ms -- "${VENV:-.venv}")
HOME=${HOME:-/tmp}
LOCK=docker/requirements.txt
# Nobody who rents a machine can change its driver: one that is too old for CUDA 13 gets the lock for CUDA 12.8.
NEEDED=$(sed -n 's/^DRIVERS = {13: \([0-9]*\).*/\1/p' finetune/machine/preflight.py)
{ read -r driver </sys/module/nvidia/version; } 2>/dev/null && [ "${driver%%.*}" -lt "$NEEDED" ] && LOCK=docker/requirements-cu128.txt
SPACE=$((6 * 1024 * 1024)) # KiB: the environment takes 5.4 GiB
VERSION='import sys; print("%d.%d" % sys.version_info[:2])'
# With Python.h first: triton compiles against it on a GPU. The real path, since a venv or a shim may go away.
PROBE='import bz2, ctypes, lzma, os, ssl, sys, sysconfig
assert (3, 11) <= sys.version_info[:2] <= (3, 13) and sys.implementation.name == "cpython"
assert not sysconfig.get_config_var("Py_GIL_DISABLED")
print(int(os.path.exists(sysconfig.get_path("include") + "/Python.h")), sys._base_executable)'

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  - %s\n' "$@" >&2
    exit 3
}

# The stamp of a level: the Python of the environment and the digest of what was installed. Written last.
stamp() { # LEVEL
    local version locks=("$LOCK")
    [ "$1" = main ] || locks+=(docker/requirements-dev.txt)
    version=$("$VENV/bin/python" -ISc "$VERSION" 2>/dev/null) || return
    printf '%s %s\n' "$version" "$(cat "${locks[@]}" | sha256sum)"
}

ready() { # LEVEL
    local wanted
    wanted=$(stamp "$1") && [ "$(cat "$VENV/.stamp-$1" 2>/dev/null)" = "$wanted" ]
}

# Every Python worth a try, best first. Names that do not exist simply fail their probe.
pythons() {
    printf '%s\n' ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.11 python3 python \
        "${CONDA_PREFIX:-/opt/conda}"/bin/python /root/miniconda3/bin/python /opt/conda/bin/python \
        "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge}/{,envs/*/}bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python \
        "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*/bin/python \
        /usr/bin/python3 /usr/local/bin/python3
}

find_python() { # prints the path; each candidate is run, since a pyenv shim may be there and fail
    local candidate answer spare=''
    while read -r candidate; do
        answer=$(timeout 20 "$candidate" -Ic "$PROBE" </dev/null 2>/dev/null) || continue
        case "$candidate:$answer" in
        "${PYTHON:-none}":* | *:1\ *) echo "${answer#* }" && return ;;
        *) spare=${spare:-${answer#* }} ;;
        esac
    done < <(pythons)
    [ -n "$spare" ] && echo "$spare"
}

find_pip() { # sets PIP_PYTHON to a Python of any version whose pip works
    [ -z "${PIP_PYTHON:-}" ] || return 0
    while read -r PIP_PYTHON; do
        timeout 20 "$PIP_PYTHON" -c 'import pip, sys; assert sys.version_info >= (3, 8)' </dev/null >/dev/null 2>&1 && return
    done < <(pythons)
    PIP_PYTHON='' && return 1
}

# uv reads no pip.conf: hand on what pip was told (a mirror, a proxy, a certificate), unless uv was told something itself.
index_settings() {
    local section line name value
    local -A pip=()
    if find_pip; then
        for section in global install :env:; do # the later wins, as in pip
            while read -r line; do
                [[ $line == "$section".*=* ]] || continue
                name=${line%%=*} value=${line#*=}
                value=${value:1:-1} # pip prints Python strings
                value=${value//\\n/ } pip[${name##*.}]=${value# }
            done < <("$PIP_PYTHON" -m pip config list 2>/dev/null)
        done
    fi
    hand_on() { # VALUE VARIABLE…: the first variable gets the value, unless one of them is set
        local name
        for name in "${@:2}"; do [ -z "${!name+set}" ] || return 0; done
        [ -z "$1" ] || export "$2=$1"
    }
    hand_on "${pip[index-url]:-}" UV_DEFAULT_INDEX UV_INDEX_URL
    hand_on "${pip[extra-index-url]:-}" UV_INDEX UV_EXTRA_INDEX_URL
    hand_on "${pip[trusted-host]:-}" UV_INSECURE_HOST
    hand_on "${pip[cert]:-}" SSL_CERT_FILE
    hand_on "${pip[proxy]:-}" ALL_PROXY
    hand_on "${pip[find-links]+${pip[find-links]// /,}}" UV_FIND_LINKS
    case ${pip[no-index]:-} in 1 | [Tt]rue | yes | on) export UV_NO_INDEX=1 ;; esac
    # The hashes decide what is installed, so any index may serve it; uv's own rule stops at the first that knows the name.
    export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
}

find_uv() { # sets UV
    local version
    for UV in uv "$VENV.uv/bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
        version=$("$UV" --version 2>/dev/null) || continue # a shim may be there and fail
        version=${version#uv } version=${version%% *}
        [ "$(printf '%s\n' 0.5.0 "$version" | sort -V | head -n 1)" = 0.5.0 ] && return
    done
    find_pip || die "neither uv nor a Python with pip is here, and one of them is needed. Do one of:" \
        "install pip, for example: apt-get install python3-pip" \
        "install uv and put it on PATH" \
        "set PYTHON to a Python that has pip: make PYTHON=/path/to/python …"
    say "fetching uv with $PIP_PYTHON -m pip"
    rm -rf "$VENV.uv" "$VENV.uv.new"
    # A user's settings that do not go with --target are undone for this one command.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore "$PIP_PYTHON" -m pip install \
        --quiet --target "$VENV.uv.new" --no-deps --only-binary=:all: --require-hashes -r docker/uv.txt ||
        die "pip could not fetch uv (see above). Check the network, the proxy, and pip's index: $PIP_PYTHON -m pip config list"
    mv "$VENV.uv.new" "$VENV.uv"
    UV=$VENV.uv/bin/uv
}

check_space() { # what is in uv's cache is linked, not copied, where the file system is the same
    local cache place used=0 free need
    cache=$("$UV" cache dir 2>/dev/null) || return 0
    mkdir -p "$cache" 2>/dev/null || {
        cache=$VENV.cache && say "uv's cache cannot be written and goes to $cache"
        mkdir -p "$cache" && export UV_CACHE_DIR=$cache
    }
    used=$(du -sk "$cache" 2>/dev/null | cut -f 1)
    for place in "$cache" "$(dirname -- "$VENV")"; do
        need=$((SPACE - used))
        if [ "$(stat -c %d "$place")" != "$(stat -c %d "$cache")" ]; then
            need=$SPACE && export UV_LINK_MODE=${UV_LINK_MODE:-copy} # no hard links across file systems
        fi
        free=$(df -k --output=avail -- "$place" | tail -n 1)
        [ "$free" -ge "$need" ] || die "$place has $((free / 1024)) MiB free, and $((need / 1024)) MiB are needed. Do one of:" \
            "free some space there" "put the environment on a larger disk: make VENV=/large/disk/venv …" \
            "put uv's cache on a larger disk: export UV_CACHE_DIR=/large/disk/uv"
    done
}

make_venv() {
    local python version=''
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ ! -e "$VENV/.begun" ] && [ -n "$(ls -A -- "$VENV")" ]; then
        die "VENV=$VENV is a folder with other things in it; give one that does not exist"
    fi
    version=$("$VENV/bin/python" -ISc "$VERSION" 2>/dev/null) || true
    # Without a stamp an installation was cut off, and no one knows where; with another Python nothing in it fits.
    if [ -n "$version" ] && [[ $(cat "$VENV/.stamp-main" 2>/dev/null) == "$version "* ]]; then
        return
    fi
    rm -rf -- "$VENV"
    mkdir -p -- "$VENV" && : >"$VENV/.begun" # so that a next run, after a kill right here, knows the folder as its own
    if python=$(find_python); then
        say "making $VENV with $python ($("$python" -c "$VERSION"))"
        [ -z "${PYTHON:-}" ] || timeout 20 "$PYTHON" -Ic "$PROBE" >/dev/null 2>&1 || say "PYTHON=$PYTHON is not a whole Python 3.11 to 3.13: passed over"
    else
        say "no Python 3.11 to 3.13 found here: asking uv for one"
        python=3.12
    fi
    "$UV" venv --quiet --no-project --allow-existing --python "$python" -- "$VENV" || die "no Python 3.11 to 3.13 is here, and uv could not bring one (see above). Do one of:" \
        "install one: conda create -y -n py312 python=3.12, or pyenv install 3.12, or apt-get install python3.12 (python3 on Debian 12)" \
        "point to one: make PYTHON=/path/to/python3.12 …" \
        "let uv download one: unset UV_PYTHON_DOWNLOADS and UV_OFFLINE, and set UV_PYTHON_INSTALL_MIRROR where its default is out of reach"
}

install() { # LEVEL
    local locks=("$LOCK") begun=$SECONDS
    [ "$1" = main ] || locks+=(docker/requirements-dev.txt)
    find_uv
    index_settings
    ready main || check_space
    make_venv
    rm -f -- "$VENV"/.stamp-*
    say "installing ${locks[*]} into $VENV; the first time 3 GB are downloaded"
    "$UV" pip sync --python "$VENV/bin/python" --require-hashes --no-build "${locks[@]}" || die "the installation failed (see above); make goes on with it when called again. Where it was the" \
        "network: set UV_DEFAULT_INDEX, or pip's index-url, to a package index within reach, and HTTPS_PROXY to a proxy if there is one" \
        "lack of a network, after an earlier installation: UV_OFFLINE=1 make … takes everything from uv's cache" \
        "certificate: set SSL_CERT_FILE" \
        "disk: make VENV=/large/disk/venv …, and UV_CACHE_DIR=/large/disk/uv"
    stamp main >"$VENV/.stamp-main"
    [ "$1" = main ] || stamp "$1" >"$VENV/.stamp-$1"
    say "ready after $((SECONDS - begun)) s"
}

case ${1:-} in
main | dev)
    ! ready "$1" || exit 0
    case $(uname -sm) in
    "Linux x86_64") ;;
    *) die "the locks are for Linux on x86-64, and this is $(uname -sm): use the container image there" ;;
    esac
    if ! { mkdir -p -- "$(dirname -- "$VENV")" && exec 9>"$VENV.lock"; } 2>/dev/null; then
        die "the environment cannot be made at $VENV, which cannot be written: make VENV=/writable/folder/venv …"
    fi
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another make is installing: waiting for it"
        flock 9
    fi
    ready "$1" || install "$1"
    ;;
uv)
    shift
    find_uv
    index_settings
    exec "$UV" "$@"
    ;;
*)
    die "usage: bootstrap.sh main | dev | uv ARG…"
    ;;
esac
