#!/usr/bin/env bash
# Build the image, and put its SBOM beside it.
#
#   scripts/image.sh                 CUDA 13.0
#   CUDA=12.8 scripts/image.sh       CUDA 12.8, for older drivers (finetune/machine/preflight.py: DRIVERS)
#
# From the environment:
#   IMAGE          the tag
#   BASE           another base image, such as the same one from a registry nearby: BASE=REGISTRY/nvidia/cuda:13.0.1-base-ubuntu24.04
#   PIP_INDEX_URL  the package index, such as a mirror nearby; PIP_CONFIG_FILE: a pip.conf that names it. Hashes decide what is
#                  installed, and the image keeps neither.
#   SSL_CERT_FILE or PIP_CERT   a CA bundle, where a proxy needs one
#   APT_SNAPSHOT   Debian packages of a day (docs/adr/0102)
#   DIST           the folder for the SBOM        NO_CACHE=1   build from nothing
# shellcheck disable=SC2154 # image_arguments.sh sets what is used and not assigned here
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
# shellcheck disable=SC1091
. scripts/image_arguments.sh

"$docker" build -t "$IMAGE" -f docker/Dockerfile ${NO_CACHE:+--no-cache} "${arguments[@]}" "${secrets[@]}" .
mkdir -p "$DIST"
"$docker" run --rm --pull never --network none "$IMAGE" cat /app/sbom.cdx.json >"$DIST/sbom-cuda$CUDA.cdx.json"
echo "$IMAGE is built at revision $REVISION; its SBOM: $DIST/sbom-cuda$CUDA.cdx.json" >&2
