#!/usr/bin/env bash
# What a newcomer runs: builds Remuda, starts the quickstart and shows it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/need.sh go node python3
echo "Building bin/remuda …"
scripts/build.sh
file=examples/quickstart/remuda.yaml

# A port that something else holds is passed over, unless PORT names one.
taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
if [ -z "${PORT-}" ] && ! bin/remuda pid web 2>/dev/null | grep -q '^[1-9]'; then
	for PORT in $(seq 8425 8445); do
		taken "$PORT" || break
		echo "Port $PORT is in use; trying the next."
	done
	export PORT
fi
bin/remuda up -f "$file" # ends with the table of what runs

farewell() {
	cat <<END

The daemon and its programs go on running. From here:
  bin/remuda list                what runs
  bin/remuda logs                its output
  bin/remuda down -f $file
                                 stop and remove the quickstart
  bin/remuda kill                stop everything, the daemon too
END
}

port=${PORT:-8425}
printf '\nTry: curl http://127.0.0.1:%s/\n' "$port"
if [ -t 0 ] && [ -t 1 ]; then
	echo "Following the logs; ctrl-C ends that and nothing else."
	echo
	trap : INT
	bin/remuda logs || true
	trap - INT
else
	bin/remuda logs --nostream --lines 3
fi
farewell
