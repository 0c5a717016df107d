#!/usr/bin/env bash
# need.sh TOOL…: makes sure that tools are there; as root on Debian or Ubuntu
# it installs what is missing, else it says what to install.
set -euo pipefail

missing=()
for tool in "$@"; do
	case $tool in
	go)
		if ! command -v go >/dev/null; then
			echo "need: go (1.26 or newer) is not in PATH; install it from your distribution or go.dev/dl" >&2
			exit 1
		fi
		;;
	cc) command -v gcc >/dev/null || command -v cc >/dev/null || missing+=(gcc libc6-dev) ;;
	node) command -v node >/dev/null || missing+=(nodejs) ;;
	# The system's one too: tests run it as a user who cannot reach others.
	python3) { python3 -c '' && /usr/bin/python3 -c ''; } >/dev/null 2>&1 || missing+=(python3) ;;
	supervisord) command -v supervisord >/dev/null || missing+=(supervisor) ;;
	*) command -v "$tool" >/dev/null || missing+=("$tool") ;;
	esac
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "need: please install: ${missing[*]} (Debian and Ubuntu: sudo apt-get install ${missing[*]})" >&2
	exit 1
fi
echo "need: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
for try in 1 2 3; do
	if apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
		exit 0
	fi
	echo "need: apt-get failed, try $try of 3" >&2
	sleep $((try * 3))
done
echo "need: could not install ${missing[*]}" >&2
exit 1
