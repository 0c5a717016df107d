#!/usr/bin/env python3
"""Makes pictures to shrink, and a task for each: generate.py [HOW MANY]

    images/0001.png …   the pictures, each different
    tasks.jsonl         {"in": "images/0001.png", "out": "thumbs/0001.png", "size": 64}
"""

import json
import os
import sys

import png

WIDTH, HEIGHT = 192, 144


def picture(path, n):
    """Draws two gradients and a disc whose place and colour depend on n."""
    cx, cy, r = 40 + n * 37 % 112, 40 + n * 53 % 64, 12 + n % 24
    colour = bytes((n * 67 % 256, n * 31 % 256, n * 101 % 256))
    rows = []
    for y in range(HEIGHT):
        row = bytearray(WIDTH * 3)
        row[0::3] = bytes(range(WIDTH))
        row[1::3] = bytes([y + n & 255]) * WIDTH
        row[2::3] = bytes(range(WIDTH - 1, -1, -1))
        if abs(y - cy) <= r:
            half = int((r * r - (y - cy) ** 2) ** 0.5)
            row[(cx - half) * 3 : (cx + half) * 3] = colour * (2 * half)
        rows.append(row)
    png.write(path, WIDTH, HEIGHT, rows)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    os.makedirs("images", exist_ok=True)
    os.makedirs("thumbs", exist_ok=True)
    with open("tasks.jsonl", "w") as tasks:
        for n in range(1, count + 1):
            name = f"{n:04}.png"
            picture("images/" + name, n)
            task = {"in": "images/" + name, "out": "thumbs/" + name, "size": 64}
            tasks.write(json.dumps(task) + "\n")
    print(f"{count} pictures in images/, {count} tasks in tasks.jsonl")


main()
