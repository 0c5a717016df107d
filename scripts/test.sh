#!/usr/bin/env bash
# Everything CI runs, in sections with their times. It stops at the first that
# fails and says which.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

section=start began=$SECONDS
step() {
	section=$1 began=$SECONDS
	shift
	printf '\n==== %s (at %ds): %s\n' "$section" "$SECONDS" "$*"
	"$@"
	printf '==== %s: passed in %ds\n' "$section" $((SECONDS - began))
}
trap 'code=$?; [ $code -eq 0 ] || printf "\n==== %s: FAILED with exit code %d after %ds (whole run: %ds)\n" "$section" $code $((SECONDS - began)) $SECONDS' EXIT

tools() {
	scripts/need.sh go cc node npm python3
	go version
	printf 'node %s, %s, %s cores, user %s, HOME=%s, GOFLAGS=%s\n' \
		"$(node --version)" "$(python3 --version)" "$(nproc)" "$(id -un 2>/dev/null || id -u)" "${HOME-}" "${GOFLAGS-}"
}
modules() {
	local try
	for try in 1 2 3; do
		go mod download && return 0
		sleep $((try * 3))
	done
	return 1
}

step 'tools' tools
step 'modules' modules
step 'build' go build -o bin/ ./...
step 'program' scripts/build.sh
step 'vet' go vet ./...
step 'lint' scripts/lint.sh
step 'tests' go test -race -count=1 -p 2 -timeout 15m ./...
step 'crash campaign' bin/campaign -short -bin bin/remuda
step 'pool faults' bin/poolfaults -short
printf '\n==== all passed in %ds\n' "$SECONDS"
