#!/usr/bin/env bash
# Debian packages; waits for whoever else uses apt (a machine's own updates run at its start).
#
#   apt_install.sh PACKAGE…            install them
#   apt_install.sh --to DIR PACKAGE…   unpack them below DIR: no service starts, and nothing else of this machine changes
set -euo pipefail

SECONDS=0
LONGEST=600

# DPkg::Lock::Timeout covers the lock of an installation, not that of the lists, with which `update` fails at once.
apt() {
    local said
    while ! said=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=$LONGEST "$@" 2>&1); do
        if [[ $said != *"Could not get lock"* ]] || [ $SECONDS -gt $LONGEST ]; then
            echo "$said" >&2
            echo "apt_install: apt-get $* failed (above)" >&2
            exit 100
        fi
        sleep 2
    done
}

apt update
if [ "$1" = --to ]; then
    mkdir -p "$2"
    cd "$2"
    apt download "${@:3}"
    for package in *.deb; do dpkg -x "$package" .; done
else
    apt install -y --no-install-recommends "$@"
fi
