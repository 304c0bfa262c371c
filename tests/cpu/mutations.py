"""Seeded mutations of bytes and of JSON, for the fuzz tests of every parser."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# Values at which counts, sizes and offsets go wrong.
WORDS = (0, 1, 2, 7, 8, 63, 64, 65, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 16, (1 << 31) - 1)
WORDS = (*WORDS, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**30, -(10**30), 0.5, 1e308),
    *("", "0", "x", "../x", "/x", "a/b/c", "\0", "é", "\ud800", "0" * 64, "f" * 64, "9" * 5000),
    *([], {}, [[]], [None], [0, 0], {"": 0}, [["a", 1]]),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: flipped bits, overwritten words, cuts, copies, insertions."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(out) + 1) if draw.random() < 0.7 else draw.randrange(64)
        at = min(at, max(0, len(out) - 1))
        kind = draw.randrange(8)
        if kind <= 1 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2 and out:
            out[at] = draw.randrange(256)
        elif kind <= 4:
            size = draw.choice((1, 2, 4, 4, 4, 8, 8))
            word = draw.choice(WORDS) + draw.choice((0, 0, 0, -1, 1, 16))
            at -= at % size
            out[at : at + size] = (word % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 5:
            end = min(len(out), at + draw.choice((1, 4, 8, 64, len(out))))
            del out[at:end]
        elif kind == 6:
            begin = draw.randrange(len(out) + 1)
            part = out[begin : begin + draw.choice((1, 4, 12, 48, 64))]
            out[at : at + len(part) * draw.randrange(2)] = part
        else:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 8, 64)))
    return bytes(out)


def mutated_text(data: bytes, draw: random.Random) -> bytes:
    """As `mutated`, and changes that keep JSON whole more often."""
    if draw.random() < 0.4:
        return mutated(data, draw)
    out = data
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(max(1, len(out)))
        token = draw.choice(
            (
                b"0",
                b"-1",
                b"1e999",
                b"NaN",
                b"Infinity",
                b"null",
                b"{}",
                b"[]",
                b'"',
                b",",
                b"9" * 99,
            )
        )
        out = out[:at] + token + out[at + draw.randrange(3) :]
    return out


def mutated_json(value: Any, draw: random.Random) -> Any:
    """A copy in which one to three nodes are replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder = value
        while True:
            keys: list[Any] = list(holder) if isinstance(holder, dict) else [*range(len(holder))]
            if not keys:
                break
            key = draw.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and draw.random() < 0.85:
                holder = inner
                continue
            _change(holder, key, draw)
            break
    return value


def _change(holder: Any, key: Any, draw: random.Random) -> None:
    kind = draw.randrange(6)
    if kind <= 2:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += draw.choice((-1, 1, 256, -256, 1 << 32))
    elif kind == 4 and isinstance(holder[key], str) and holder[key]:
        text = bytearray(holder[key].encode(errors="replace"))
        text[draw.randrange(len(text))] = draw.randrange(32, 127)
        holder[key] = text.decode(errors="replace")
    elif isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        name = draw.choice(("", "x", "../x", "/etc", "schema", "sha256", "files", str(key) + "x"))
        holder[name] = copy.deepcopy(holder[key])


def is_json(value: Any) -> bool:
    """Whether it can be written at all: a lone surrogate cannot."""
    try:
        json.dumps(value, allow_nan=False).encode()
    except (ValueError, UnicodeError):
        return False
    return True
