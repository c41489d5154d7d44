#!/usr/bin/env bash
# Build the image twice, from nothing, and compare. Exit 0: equal. Exit 1: the files that differ are printed.
#
# With buildah: equal image IDs, that is equal bytes in every layer and an equal configuration. (In the OCI format, which
# knows no HEALTHCHECK: in Docker's, buildah records the name of its working container, and that is random.)
# Without it, with Docker, whose older BuildKit writes the time of the build into the layers: equal type, mode, owner, link
# and sha256 of every file. Takes the variables of image.sh; with Docker also FIRST, an image that stands for the first build.
# Needs about 30 GB on the engine's disk, for buildah that of TMPDIR.
# shellcheck disable=SC2154 # image_arguments.sh sets what is used and not assigned here
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
# shellcheck disable=SC1091
. scripts/image_arguments.sh

work=$(mktemp -d)
cleanup() {
    if command -v buildah >/dev/null; then
        for n in 1 2; do
            if [ -d "$work/$n" ]; then store "$n" umount --all >/dev/null; store "$n" rm --all >/dev/null; fi
        done
    fi
    rm -rf "$work"
}
trap cleanup EXIT

store() { # N ARGUMENT…
    local n=$1
    shift
    buildah --root "$work/$n/root" --runroot "$work/$n/run" "$@"
}

# One line a file of the tar that comes in: type, mode, owner, name, link, sha256. Sorted, so that diff can compare.
list() {
    python3 -c '
import hashlib, sys, tarfile
lines = []
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
    for file in tar:
        digest = hashlib.sha256()
        content = tar.extractfile(file) if file.isfile() else None
        while content and (block := content.read(1 << 20)):
            digest.update(block)
        lines.append(f"{file.type.decode()} {file.mode:04o} {file.uid}:{file.gid} {file.name} {file.linkname} {digest.hexdigest()}")
print(*sorted(lines), sep="\n")'
}

with_buildah() { # N
    mkdir "$work/$1"
    if "$docker" image inspect "$BASE" >/dev/null 2>&1; then
        "$docker" save "$BASE" -o "$work/$1/base.tar"
        store "$1" pull -q "docker-archive:$work/$1/base.tar" >/dev/null
        rm "$work/$1/base.tar"
    fi
    store "$1" bud -q --no-cache --format oci --timestamp "$SOURCE_DATE_EPOCH" --iidfile "$work/id$1" -f docker/Dockerfile \
        --ignorefile docker/Dockerfile.dockerignore "${arguments[@]}" "${secrets[@]}" . >"$work/log$1" 2>&1 ||
        { tail -20 "$work/log$1" >&2; exit 1; }
    store "$1" inspect --type image "$(cat "$work/id$1")" >"$work/config$1"
    tar -c -C "$(store "$1" mount "$(store "$1" from --pull-never "$(cat "$work/id$1")")")" . | list >"$work/files$1"
    store "$1" umount --all >/dev/null
    store "$1" rm --all >/dev/null
    store "$1" rmi --all --force >/dev/null # the second build gets the disk of the first
}

with_docker() { # N
    local image=finetune-reproducible:$1 container
    if [ "$1" = 1 ] && [ -n "${FIRST:-}" ]; then
        image=$FIRST
    else
        "$docker" build -q --no-cache -t "$image" -f docker/Dockerfile "${arguments[@]}" "${secrets[@]}" . >/dev/null
    fi
    "$docker" image inspect --format '{{.Id}}' "$image" >"$work/id$1"
    container=$("$docker" create --pull never "$image")
    "$docker" export "$container" | list >"$work/files$1"
    "$docker" rm -v "$container" >/dev/null
    [ "$image" = "${FIRST:-}" ] || "$docker" rmi "$image" >/dev/null
}

how=with_docker
if [ -z "${FIRST:-}" ] && command -v buildah >/dev/null; then
    how=with_buildah
    if [ -z "${CONTAINERS_CONF:-}" ]; then
        export CONTAINERS_CONF=$work/containers.conf
        printf '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n[engine]\nruntime = "runc"\n' >"$CONTAINERS_CONF"
    fi
fi
for n in 1 2; do
    "$how" "$n"
    echo "build $n: $(cat "$work/id$n")  $(wc -l <"$work/files$n") lines of files, sha256 $(sha256sum <"$work/files$n" | cut -c1-64)"
done
if ! diff "$work/files1" "$work/files2"; then
    echo "the two builds differ in the files above" >&2
    exit 1
fi
if [ "$how" = with_buildah ] && ! cmp -s "$work/id1" "$work/id2"; then
    diff "$work/config1" "$work/config2" || true
    echo "all files are equal, but the image IDs are not" >&2
    exit 1
fi
echo "equal: $([ "$how" = with_buildah ] && echo "the same image ID twice" || echo "every file, twice")"
