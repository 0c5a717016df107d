#!/usr/bin/env bash
# Runs golangci-lint at LINT_VERSION, built from source into bin/ once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${LINT_VERSION:?}
lint=bin/golangci-lint

if ! [ -x $lint ] || ! $lint version 2>/dev/null | grep -qF "${version#v}"; then
	mkdir -p bin
	ok=
	for try in 1 2 3; do
		echo "building golangci-lint $version"
		if GOBIN=$PWD/bin go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version"; then
			ok=1
			break
		fi
		sleep $((try * 3))
	done
	if [ -z "$ok" ]; then
		echo "golangci-lint $version could not be built (see above)" >&2
		exit 1
	fi
fi
$lint run --timeout 10m ./...
echo "no finding"
