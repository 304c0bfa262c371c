"""A bundle's `golden/…` files: canned states and what one step makes of them.

Layout: `capture_cache.bundle`.
"""

from __future__ import annotations

import struct

import numpy as np

from capture_cache.bundle import SCHEMA, Golden
from capture_cache.bundle_checks import (
    HEADER_BYTES,
    corrupt,
    expect_all,
    expect_equal,
    header_fields,
)

_GOLDEN = struct.Struct("<8s6I32s")
_MAGIC_GOLDEN = b"LSGOLD01"


def encode_golden(golden: Golden) -> bytes:
    """The bytes of a golden step."""
    requests, prompt = golden.ids.shape
    header = _GOLDEN.pack(
        _MAGIC_GOLDEN,
        *(SCHEMA, golden.tokens, golden.rows, requests, prompt, 0),
        bytes.fromhex(golden.digest),
    )
    return header + golden.ids.astype("<i4").tobytes()


def decode_golden(data: bytes, shown: str = "golden") -> Golden:
    """Raises CorruptBundle: not exactly what `encode_golden` writes."""
    head = header_fields(_GOLDEN, data, _MAGIC_GOLDEN, shown)
    _, tokens, rows, requests, prompt, reserved, digest = head
    expect_equal(shown, "length", HEADER_BYTES + 4 * requests * prompt, len(data))
    expect_equal(shown, "reserved words", 0, reserved)
    if not (1 <= requests <= rows <= tokens and prompt >= 1 and requests * prompt <= tokens):
        raise corrupt(
            shown,
            f"expected requests that fit {tokens} tokens and {rows} rows, got {requests} of "
            f"{prompt} tokens",
        )
    ids = np.frombuffer(data, "<i4", requests * prompt, HEADER_BYTES).reshape(requests, prompt)
    expect_all(shown, "token id", ids.ravel() >= 0, "at least 0")
    return Golden(tokens, rows, ids, digest.hex())
