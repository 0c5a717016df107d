#!/usr/bin/env python3
"""A program for one picture: thumb.py FROM TO [SIZE]"""

import sys

import png

width, height = png.shrink(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64)
print(f"{sys.argv[2]} {width}x{height}")
