"""Baseline JPEG to pixels, enough for the small photographs of the tests, so that they need no imaging library."""

import numpy as np

ZIGZAG = sorted(((y, x) for y in range(8) for x in range(8)), key=lambda p: (sum(p), p[0] if sum(p) % 2 else p[1]))
COSINES = np.array([[(0.5 if k else 0.125**0.5) * np.cos((2 * x + 1) * k * np.pi / 16) for x in range(8)] for k in range(8)])


def decode(data):
    """RGB pixels (height, width, 3) in 0..255 of the bytes of a baseline JPEG with Huffman codes and no restart intervals."""
    tables, huffman, parts, place = {}, {}, [], 2
    while True:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + size]
        place += 2 + size
        if marker == 0xDB:
            for start in range(0, len(body), 65):
                tables[body[start] & 15] = list(body[start + 1 : start + 65])
        elif marker == 0xC4:
            while body:
                counts, body_rest = body[1:17], body[17:]
                huffman[body[0]] = _codes(counts, body_rest[: sum(counts)])
                body = body_rest[sum(counts) :]
        elif marker == 0xC0:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            parts = [{"id": body[i], "across": body[i + 1] >> 4, "down": body[i + 1] & 15, "table": body[i + 2]} for i in range(6, len(body), 3)]
        elif marker == 0xDA:
            for i in range(body[0]):
                part = next(p for p in parts if p["id"] == body[1 + 2 * i])
                part["dc"], part["ac"] = body[2 + 2 * i] >> 4, 16 + (body[2 + 2 * i] & 15)
            return _scan(data[place:-2].replace(b"\xff\x00", b"\xff"), parts, tables, huffman, height, width)
        else:
            assert marker >= 0xE0, f"marker {marker:x} is not baseline"


def _codes(counts, symbols):
    made, code, taken = {}, 0, 0
    for length, count in enumerate(counts, 1):
        for symbol in symbols[taken : taken + count]:
            made[length, code] = symbol
            code += 1
        taken += count
        code <<= 1
    return made


def _scan(stream, parts, tables, huffman, height, width):
    bits, place = int.from_bytes(stream, "big"), 8 * len(stream)

    def take(count):
        nonlocal place
        place -= count
        return (bits >> place) & ((1 << count) - 1) if place >= 0 else (1 << count) - 1

    def symbol(table):
        code = 0
        for length in range(1, 17):
            code = code << 1 | take(1)
            if (length, code) in table:
                return table[length, code]
        raise ValueError("no such code")

    def signed(count):
        value = take(count) if count else 0
        return value if not count or value >> (count - 1) else value - (1 << count) + 1

    most_across, most_down = max(p["across"] for p in parts), max(p["down"] for p in parts)
    rows, columns = -(-height // (8 * most_down)), -(-width // (8 * most_across))
    for part in parts:
        part["plane"], part["last"] = np.zeros((rows * 8 * part["down"], columns * 8 * part["across"])), 0
    for row in range(rows):
        for column in range(columns):
            for part in parts:
                for y in range(part["down"]):
                    for x in range(part["across"]):
                        block, at = np.zeros((8, 8)), 1
                        part["last"] += signed(symbol(huffman[part["dc"]]))
                        block[0, 0] = part["last"] * tables[part["table"]][0]
                        while at < 64:
                            run, size = divmod(symbol(huffman[part["ac"]]), 16)
                            if not size and run != 15:
                                break
                            at += run
                            if size:
                                block[ZIGZAG[at]] = signed(size) * tables[part["table"]][at]
                            at += 1
                        top, left = 8 * (row * part["down"] + y), 8 * (column * part["across"] + x)
                        part["plane"][top : top + 8, left : left + 8] = COSINES.T @ block @ COSINES
    planes = [np.kron(p["plane"], np.ones((most_down // p["down"], most_across // p["across"])))[:height, :width] for p in parts]
    light, blue, red = planes[0] + 128, planes[1], planes[2]
    return np.clip(np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], 2).round(), 0, 255)
