#!/usr/bin/env bash
# Runs every fuzz target of the module for FUZZTIME, one after another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${FUZZTIME:-60s}
n=0
while IFS=: read -r file _ rest; do
	target=$(sed 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/' <<<"$rest")
	echo "== $target in $(dirname "$file") for $time"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "./$(dirname "$file")"
	n=$((n + 1))
done < <(grep -rn --include='*_test.go' '^func Fuzz' . | sed 's|^\./||' | sort)
echo "$n fuzz targets, no finding"
