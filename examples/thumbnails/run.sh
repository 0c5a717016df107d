#!/bin/sh
# Thumbnails of 240 generated pictures: ./run.sh node|python|exec
# What was interrupted goes on where it stopped when it is called again.
set -eu
cd "$(dirname "$0")"
how=${1-}
: "${REMUDA:=remuda}"
[ -e tasks.jsonl ] || python3 generate.py 240
case $how in
node)
	[ -d node_modules ] || npm ci --no-audit --no-fund --ignore-scripts
	exec "$REMUDA" pool run --progress --joblog jobs-node.log --resume --results results-node.jsonl -- node worker.mjs < tasks.jsonl ;;
python)
	exec "$REMUDA" pool run --progress --joblog jobs-python.log --resume --results results-python.jsonl -- python3 worker.py < tasks.jsonl ;;
exec)
	ls images/*.png | exec "$REMUDA" pool run --progress --joblog jobs-exec.log --resume --exec -- python3 thumb.py {} thumbs/{/} ;;
clean)
	rm -rf images thumbs tasks.jsonl results-*.jsonl jobs-*.log* node_modules ;;
*)
	echo 'usage: ./run.sh node|python|exec|clean' >&2
	exit 2 ;;
esac
