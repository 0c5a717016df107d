"""As much of PNG as pictures of 8-bit RGB need. Standard library only."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write(path, width, height, rows):
    """Writes rows, each width * 3 bytes, as a PNG file."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    raw = b"".join(b"\0" + bytes(row) for row in rows)
    with open(path, "wb") as f:
        f.write(SIGNATURE)
        f.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
        f.write(chunk(b"IDAT", zlib.compress(raw, 6)))
        f.write(chunk(b"IEND", b""))


def read(path):
    """Returns width, height and the rows of a PNG file."""
    with open(path, "rb") as f:
        data = f.read()
    if not data.startswith(SIGNATURE):
        raise ValueError(f"{path} is not a PNG file")
    at, packed, width, height = len(SIGNATURE), b"", 0, 0
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        at += size + 12
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            if (depth, colour, interlace) != (8, 2, 0):
                raise ValueError(f"{path}: only 8-bit RGB without interlacing is read")
        elif kind == b"IDAT":
            packed += body
    raw, line = zlib.decompress(packed), width * 3
    if len(raw) != height * (line + 1):
        raise ValueError(f"{path} is cut short")
    rows, above = [], bytearray(line)
    for y in range(height):
        start = y * (line + 1)
        row = bytearray(raw[start + 1 : start + 1 + line])
        unfilter(raw[start], row, above)
        rows.append(row)
        above = row
    return width, height, rows


def unfilter(kind, row, above):
    """Undoes the filter of a row in place."""
    if kind == 0:
        return
    for i in range(len(row)):
        left = row[i - 3] if i >= 3 else 0
        up, corner = above[i], above[i - 3] if i >= 3 else 0
        if kind == 1:
            add = left
        elif kind == 2:
            add = up
        elif kind == 3:
            add = (left + up) // 2
        elif kind == 4:
            p = left + up - corner
            a, b, c = abs(p - left), abs(p - up), abs(p - corner)
            add = left if a <= b and a <= c else up if b <= c else corner
        else:
            raise ValueError("unknown filter")
        row[i] = (row[i] + add) & 255


def shrink(source, target, size):
    """Writes a thumbnail that fits into size by size; returns its measures."""
    width, height, rows = read(source)
    step = max(1, -(-max(width, height) // size))  # pixels that become one
    small = []
    for y in range(0, height - step + 1, step):
        out = bytearray()
        for x in range(0, (width - step + 1) * 3, step * 3):
            for c in range(3):
                total = sum(sum(rows[y + dy][x + c : x + c + step * 3 : 3]) for dy in range(step))
                out.append(total // (step * step))
        small.append(out)
    write(target, width // step, len(small), small)
    return width // step, len(small)
