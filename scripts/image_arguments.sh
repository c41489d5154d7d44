# shellcheck shell=bash
# Sourced by image.sh and image_reproducible.sh: the same arguments for docker and buildah. Sets `docker`, IMAGE, DIST, REVISION,
# SOURCE_DATE_EPOCH, and the arrays `arguments` and `secrets`.

# The client that can build: BuildKit came into docker.io before `docker buildx`, and a client without either cannot.
docker=${DOCKER:-docker}
# shellcheck disable=SC2034 # used by the scripts that source this file
if [ -z "${DOCKER:-}" ] && ! docker buildx version >/dev/null 2>&1 && [ -x /usr/bin/docker ]; then docker=/usr/bin/docker; fi
export DOCKER_BUILDKIT=1

CUDA=${CUDA:-13.0}
case $CUDA in
    13.0)
        lock=requirements.txt
        base=$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)
        ;;
    12.8)
        lock=requirements-cu128.txt
        base=nvidia/cuda:12.8.1-base-ubuntu24.04@sha256:133c78a0575303be34164d0b90137a042172bdf60696af01a3c424ab402d86e2
        ;;
    *)
        echo "CUDA=$CUDA: there is an image for 13.0 and, for older drivers, one for 12.8" >&2
        exit 2
        ;;
esac
BASE=${BASE:-$base}
IMAGE=${IMAGE:-finetune:cuda$CUDA}
DIST=${DIST:-dist}

VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION=unknown SOURCE='' SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}
if git rev-parse --verify -q HEAD >/dev/null 2>&1; then
    REVISION=$(git rev-parse HEAD)
    if [ -n "$(git status --porcelain)" ]; then REVISION+=-dirty; fi
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
    # an address only: a remote may also be a folder of this machine, or carry a token
    SOURCE=$(git remote get-url origin 2>/dev/null | grep -E '^https?://[^@]+$' || true)
fi

# shellcheck disable=SC2034 # used by the scripts that source this file
arguments=(
    --build-arg "BASE=$BASE" --build-arg "LOCK=$lock" --build-arg "APT_SNAPSHOT=${APT_SNAPSHOT:-}"
    --build-arg "VERSION=$VERSION" --build-arg "REVISION=$REVISION" --build-arg "SOURCE=$SOURCE"
    --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH"
    --build-arg "CREATED=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)"
    --build-arg "LOCK_SHA256=$(sha256sum "docker/$lock" | cut -d' ' -f1)"
)
secrets=()
for file in "${SSL_CERT_FILE:-}" "${PIP_CERT:-}"; do
    if [ -f "$file" ]; then secrets+=(--secret "id=ca,src=$file"); break; fi
done
if [ -n "${PIP_INDEX_URL:-}" ]; then secrets+=(--secret "id=index,env=PIP_INDEX_URL"); fi
if [ -f "${PIP_CONFIG_FILE:-}" ]; then secrets+=(--secret "id=pipconf,src=$PIP_CONFIG_FILE"); fi
