#!/bin/sh
# Says how loaded the machine is, every five seconds.
while :; do
	read -r load _ </proc/loadavg
	echo "load $load"
	sleep 5
done
