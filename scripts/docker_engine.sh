#!/usr/bin/env bash
# A Docker engine for the image tests, where the machine has none.
#
#   docker_engine.sh run COMMAND…   with the engine that answers, else with one of its own, gone again when the command ends
#   docker_engine.sh start DIR      install and start it under DIR, make the stand-in base; prints `export` lines for the caller
#   docker_engine.sh stop DIR       end what start began, by its process id, and remove DIR
#
# With an engine of its own the command finds DOCKER (the client), DOCKER_HOST and BASE. The stand-in base is a plain Debian with
# python3: tests build the real Dockerfile on it where no registry can be reached.
set -euo pipefail

BASE=finetune-base:bookworm
CLIENT=/usr/bin/docker # a newer client elsewhere on PATH may come without buildx, and then cannot build

say() { echo "docker_engine: $*" >&2; }

install_engine() {
    if [ "$(id -u)" != 0 ] || [ ! -e /etc/apt/sources.list.d/debian.sources ]; then
        say "no Docker engine answers, and only root on Debian can start one here: install and start Docker, or set DOCKER_HOST"
        exit 3
    fi
    for program in "$CLIENT" dockerd iptables mmdebstrap; do
        command -v "$program" >/dev/null && continue
        "$(dirname -- "${BASH_SOURCE[0]}")/apt_install.sh" docker.io iptables mmdebstrap
        return
    done
}

start_engine() {
    mkdir -p "$DIR/root" "$DIR/exec"
    # plain redirections and setsid: the engine outlives this script and holds none of its pipes open
    setsid dockerd --data-root "$DIR/root" --exec-root "$DIR/exec" -H "$DOCKER_HOST" -p "$DIR/docker.pid" \
        --storage-driver overlay2 </dev/null >"$DIR/log" 2>&1 &
    for _ in $(seq 120); do
        if "$CLIENT" info >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    tail -5 "$DIR/log" >&2
    say "the engine did not answer within 60 s"
    exit 3
}

# The mirror is the machine's own, read when the script runs, so that no address stands in this tree.
sources() {
    awk '
        function flush() { if (uris) for (i = 1; i <= split(suites, s, " "); i++) print "deb", uris, s[i], components; uris = "" }
        /^URIs:/ { uris = $2 }
        /^Suites:/ { sub(/^Suites: */, ""); suites = $0 }
        /^Components:/ { sub(/^Components: */, ""); components = $0 }
        /^$/ { flush() }
        END { flush() }
    ' /etc/apt/sources.list.d/debian.sources
}

make_base() {
    if "$CLIENT" image inspect "$BASE" >/dev/null 2>&1; then return; fi
    # shellcheck disable=SC1091 # the machine's own file
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    sources | SOURCE_DATE_EPOCH=1700000000 mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
        --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$DIR/base.tar" -
    "$CLIENT" import "$DIR/base.tar" "$BASE" >/dev/null
}

stop_engine() {
    pid=$(cat "$DIR/docker.pid" 2>/dev/null || true)
    if [ -n "$pid" ] && kill "$pid" 2>/dev/null; then
        while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done # it unmounts its layers first
    fi
    umount "$DIR"/exec/netns/* 2>/dev/null || true # it leaves one where a container had --network host
    rm -rf "$DIR"
}

start() { # DIR
    mkdir -p "$1"
    DIR=$(cd "$1" && pwd)
    export DOCKER=$CLIENT DOCKER_HOST="unix://$DIR/docker.sock" DOCKER_BUILDKIT=1 BASE
    install_engine
    "$CLIENT" info >/dev/null 2>&1 || start_engine
    make_base
}

run() { # COMMAND…
    if "${DOCKER:-docker}" info >/dev/null 2>&1; then exec "$@"; fi
    DIR=$(mktemp -d -t finetune-engine-XXXXXX)
    # whatever happens from here on: nothing runs on, and the disk is free again
    trap stop_engine EXIT
    start "$DIR"
    # in a process group of its own, since bash acts on a signal only when no command in front keeps it waiting
    set -m
    "$@" &
    child=$! status=0
    trap 'kill -TERM -- "-$child"' TERM HUP
    trap 'kill -INT -- "-$child"' INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done # a signal ends the first wait early
    return "$status"
}

usage() {
    say "usage: docker_engine.sh run COMMAND… | start DIR | stop DIR"
    exit 2
}

[ $# -ge 2 ] || usage
case $1 in
    run) shift && run "$@" ;;
    start)
        start "$2"
        echo "export DOCKER=$DOCKER DOCKER_HOST=$DOCKER_HOST DOCKER_BUILDKIT=1 BASE=$BASE"
        ;;
    stop) DIR=$2 && stop_engine ;;
    *) usage ;;
esac
