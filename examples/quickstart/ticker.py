"""Prints a numbered line every two seconds."""
import itertools
import time

for n in itertools.count(1):
    print(f"tick {n}", flush=True)
    time.sleep(2)
