"""The file `program` of a bundle: what all of its graphs share. Layout: `capture_cache.bundle`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from capture_cache.bundle import (
    MAX_PARAM_BYTES,
    PROGRAM_FILE,
    SCHEMA,
    Function,
    Module,
    Program,
    Symbol,
)
from capture_cache.bundle_checks import HEADER_BYTES, corrupt, expect_equal, header_fields

_PROGRAM = struct.Struct("<8s6IQ24x")
_MODULE = struct.Struct("<32sQ")
_FUNCTION = struct.Struct("<4I2i2I")
_PARAM = struct.Struct("<2I")
_SYMBOL = struct.Struct("<2IQ")
_MAGIC_PROGRAM = b"LSPROGR1"


def encode_program(program: Program) -> bytes:
    """Raises ValueError: a name with a zero in it, or a number that does not fit its field."""
    names, at = bytearray(), []
    for name in [f.name for f in program.functions] + [s.name for s in program.symbols]:
        at.append(len(names))
        names += _text(name)
    functions, params = bytearray(), bytearray()
    try:
        for f, name_at in zip(program.functions, at, strict=False):
            flags = (f.max_dynamic_shared, f.carveout, f.nonportable_cluster, f.prefer_shared)
            first = len(params) // _PARAM.size
            functions += _FUNCTION.pack(f.module, name_at, first, len(f.params), *flags)
            params += b"".join(_PARAM.pack(*p) for p in f.params)
        symbols = b"".join(
            _SYMBOL.pack(name_at, s.host, s.nbytes)
            for s, name_at in zip(program.symbols, at[len(program.functions) :], strict=True)
        )
        modules = b"".join(_MODULE.pack(bytes.fromhex(m.sha256), m.nbytes) for m in program.modules)
    except struct.error as e:
        raise ValueError(f"the program does not fit its format: {e}") from e
    body = modules + functions + params + symbols + names
    counts = (len(program.modules), len(program.functions), len(params) // _PARAM.size)
    header = _PROGRAM.pack(
        _MAGIC_PROGRAM,
        *(SCHEMA, *counts, len(program.symbols), len(names), HEADER_BYTES + len(body)),
    )
    return header + body


def decode_program(data: bytes, shown: str = PROGRAM_FILE) -> Program:
    """Raises CorruptBundle: not exactly what `encode_program` writes."""
    head = header_fields(_PROGRAM, data, _MAGIC_PROGRAM, shown)
    _, num_modules, num_functions, num_params, num_symbols, names_bytes, total = head
    at = HEADER_BYTES
    sizes = (
        num_modules * _MODULE.size,
        num_functions * _FUNCTION.size,
        num_params * _PARAM.size,
        num_symbols * _SYMBOL.size,
        names_bytes,
    )
    expect_equal(shown, "length", at + sum(sizes), len(data))
    expect_equal(shown, "total bytes", total, len(data))
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    modules = tuple(Module(sha.hex(), nbytes) for sha, nbytes in _MODULE.iter_unpack(parts[0]))
    params = list(_PARAM.iter_unpack(parts[2]))
    raw_functions = list(_FUNCTION.iter_unpack(parts[1]))
    raw_symbols = list(_SYMBOL.iter_unpack(parts[3]))
    names = _names(parts[4], [f[1] for f in raw_functions] + [s[0] for s in raw_symbols], shown)
    functions, first = [], 0
    for raw, name in zip(raw_functions, names, strict=False):
        functions.append(_function(raw, name, first, params, num_modules, shown))
        first += raw[3]
    expect_equal(shown, "parameters used", first, num_params)
    symbols = []
    for (_, host, nbytes), name in zip(raw_symbols, names[num_functions:], strict=True):
        if host > 1:
            raise corrupt(shown, f"symbol {name!r}: expected host 0 or 1, got {host}")
        symbols.append(Symbol(name, nbytes, bool(host)))
    for what, found in (("module", modules), ("symbol", [s.name for s in symbols])):
        if len(set(found)) != len(found):
            raise corrupt(shown, f"expected each {what} once, got a repeated one")
    return Program(modules, tuple(functions), tuple(symbols))


def _function(
    raw: tuple[int, ...],
    name: str,
    first: int,
    params: Sequence[tuple[int, ...]],
    num_modules: int,
    shown: str,
) -> Function:
    module, _, first_param, count, dynamic, carveout, nonportable, prefer = raw
    who = f"function {name!r}"
    if module >= num_modules:
        raise corrupt(shown, f"{who}: expected a module below {num_modules}, got {module}")
    expect_equal(shown, f"{who}: first parameter", first, first_param)
    if first + count > len(params):
        raise corrupt(shown, f"{who}: expected {len(params)} parameters in all, got more")
    if not (-1 <= dynamic < 1 << 20 and -1 <= carveout <= 100 and nonportable < 2 and prefer < 2):
        raise corrupt(
            shown, f"{who}: attributes out of range: {dynamic, carveout, nonportable, prefer}"
        )
    end, own = 0, []
    for offset, nbytes in params[first : first + count]:
        if offset < end or not 1 <= nbytes <= MAX_PARAM_BYTES - offset:
            raise corrupt(shown, f"{who}: parameter of {nbytes} bytes at {offset} after {end}")
        end = offset + nbytes
        own.append((offset, nbytes))
    return Function(module, name, tuple(own), dynamic, carveout, bool(nonportable), bool(prefer))


def _text(name: str) -> bytes:
    raw = name.encode()
    if not raw or b"\0" in raw:
        raise ValueError(f"a name must not be empty or hold a zero, got {name!r}")
    return raw + b"\0"


def _names(blob: bytes, offsets: Sequence[int], shown: str) -> list[str]:
    """The names at `offsets`, which must be all of the blob, in order."""
    names, at = [], 0
    for offset in offsets:
        end = blob.find(b"\0", at)
        if offset != at or end <= at:
            raise corrupt(shown, f"names: expected one at {at}, got {offset} and its end at {end}")
        try:
            names.append(blob[at:end].decode())
        except UnicodeDecodeError as e:
            raise corrupt(shown, f"names: expected UTF-8 at {at}, got {e}") from e
        at = end + 1
    expect_equal(shown, "bytes of names", at, len(blob))
    return names
