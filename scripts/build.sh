#!/usr/bin/env bash
# Builds the program as it is meant to be used, into bin/remuda or the file
# named: static, since a C library costs two milliseconds at each start.
set -euo pipefail
out=$(realpath -m "${1:-bin/remuda}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CGO_ENABLED=0 exec go build -buildvcs=false -trimpath -ldflags='-s -w' -o "$out" ./cmd/remuda
