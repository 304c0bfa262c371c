"""The sealed index of packed weights: tensors, the shards that they lie in, sizes and hashes.

Layout of the directory: `capture_cache.packed`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture_cache.errors import CorruptBundle, OtherVersion
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ENTRY_ALIGNMENT, ITEM_BYTES
from capture_cache.manifest import FileRecord, seal, unseal

INDEX = "weights.json"
SHARED = "shared.safetensors"
KIND = "packed weights"
FORMAT = 3
# Of earlier formats, what this one changed.
_WHY = {1: "which does not say which checkpoint it was made from", 2: "which has no tiles"}
DATA_ALIGNMENT = 4096
PIECE_BYTES = 64 << 20  # of a shard that one sha256 covers
MAX_RANKS = 1024
REMEDY = "pack again (python -m runtime.pack, with --force where --out names the directory)"
# The layout's dtype → safetensors' name
DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
}
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_SMALL = re.compile(r"[a-z][a-z0-9_]*\.(json|model|jinja|txt)")
_HEX16 = re.compile(r"([0-9a-f]{16})+")
_HEX64 = re.compile(r"([0-9a-f]{64})+")
_MAX_ELEMENTS = 1 << 50


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the table.

    Attributes:
        shape, dtype: of one rank's part.
        expert: each rank has its own; else all share one.
        sums: `checksum.sum64` of its padded bytes: one, or one per rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    expert: bool
    sums: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def padded(self) -> int:
        return -(-self.nbytes // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


@dataclass(frozen=True)
class Shard:
    """One safetensors file as it must be: `header` is its beginning, to the first byte of data."""

    name: str
    header: bytes
    offsets: Mapping[str, int]  # tensor → offset in the file
    nbytes: int

    @property
    def num_pieces(self) -> int:
        return -(-self.nbytes // PIECE_BYTES)


def shard_names(ep_size: int) -> list[str]:
    """The shards of packed weights: the shared one, then one a rank."""
    return [SHARED, *(f"experts-{r:03}-of-{ep_size:03}.safetensors" for r in range(ep_size))]


def plan_shards(
    tensors: Sequence[PackedTensor], ep_size: int, identity: Fingerprint
) -> dict[str, Shard]:
    """The shards by name, a pure function of the table."""
    shards = {}
    for rank, name in enumerate(shard_names(ep_size), start=-1):
        chosen = [t for t in tensors if t.expert == (rank >= 0)]
        if not chosen and rank >= 0:
            continue  # no experts at all
        about = {"format": KIND, "identity": identity.digest, "shard": name}
        shards[name] = _plan_shard(name, chosen, about)
    return shards


def _plan_shard(name: str, tensors: Sequence[PackedTensor], about: Mapping[str, str]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": dict(about)}
    offsets, at = {}, 0
    for i, tensor in enumerate(tensors):
        offsets[tensor.name] = at
        end = at + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at += tensor.padded
        if at > end:
            pad = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
            entries[f"pad.{i}"] = pad
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, header, {k: v + len(header) for k, v in offsets.items()}, len(header) + at)


@dataclass(frozen=True)
class Index:
    """What packed weights say of themselves.

    Attributes:
        identity: what the weights are: source, conversion, ep_size; see `runtime.weights`.
        made_from: (file, bytes, mtime in ns) of the checkpoint's shards when it was read.
        origin: the directory where they were; empty for a preset.
        content: digest of their sampled bytes (`graphs.checkpoint_content`); empty for a preset.
        pieces: shard → sha256 of every `PIECE_BYTES` of it, in hex, joined.
        small: copies of the model's small files.
        stored_dtype: type of the checkpoint's embedding, for a config that names none.
    """

    identity: Fingerprint
    ep_size: int
    tensors: tuple[PackedTensor, ...]
    made_from: tuple[tuple[str, int, int], ...]
    pieces: Mapping[str, str]
    small: Mapping[str, FileRecord]
    stored_dtype: str | None = None
    origin: str = ""
    content: str = ""

    def shards(self) -> dict[str, Shard]:
        return plan_shards(self.tensors, self.ep_size, self.identity)

    def to_bytes(self) -> bytes:
        return seal(
            {
                "kind": KIND,
                "format": FORMAT,
                "identity": self.identity.to_json(),
                "ep_size": self.ep_size,
                "tensors": [
                    [
                        t.name,
                        "x".join(map(str, t.shape)),
                        t.dtype,
                        t.expert,
                        "".join(f"{s:016x}" for s in t.sums),
                    ]
                    for t in self.tensors
                ],
                "made_from": [list(row) for row in self.made_from],
                "pieces": dict(self.pieces),
                "small": {
                    n: {"bytes": r.nbytes, "sha256": r.sha256} for n, r in self.small.items()
                },
                "stored_dtype": self.stored_dtype,
                "origin": self.origin,
                "content": self.content,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, shown: Path) -> Index:
        """Read a sealed index, trusting none of it.

        Raises:
            OtherVersion: of another format.
            CorruptBundle: not sealed, of another kind, or with a field that makes no sense.
        """
        record = unseal(data, shown)
        if record.get("kind") == KIND and type(record.get("format")) is int:
            _check_format(int(record["format"]), shown)
        if record.get("kind") != KIND or record.get("format") != FORMAT:
            got = f"{record.get('kind')!r:.40} format {record.get('format')!r:.20}"
            raise CorruptBundle(f"{shown}: expected {KIND} of format {FORMAT}, got {got}; {REMEDY}")
        try:
            return cls._parsed(record)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CorruptBundle(f"{shown}: malformed index: {e!s:.200}; {REMEDY}") from e

    @classmethod
    def _parsed(cls, record: Mapping[str, Any]) -> Index:
        ep_size = _integer(record["ep_size"], 1, MAX_RANKS)
        tensors = tuple(_tensor(row, ep_size) for row in record["tensors"])
        if len({t.name for t in tensors}) != len(tensors) or not tensors:
            raise ValueError("expected unique tensors, at least one")
        index = cls(
            Fingerprint.from_json(record["identity"]),
            ep_size,
            tensors,
            tuple((_text(f), _integer(n, 0), _integer(t, 0)) for f, n, t in record["made_from"]),
            {_text(k): _text(v) for k, v in record["pieces"].items()},
            {
                _text(n): FileRecord(_integer(r["bytes"], 0, 1 << 30), _text(r["sha256"]))
                for n, r in record["small"].items()
            },
            None if record["stored_dtype"] is None else _text(record["stored_dtype"]),
            _text(record["origin"]),
            _text(record["content"]),
        )
        if index.content and not re.fullmatch("[0-9a-f]{64}", index.content):
            raise ValueError(f"content: expected 64 hex digits or none, got {index.content!r:.80}")
        shards = index.shards()
        if index.pieces.keys() != shards.keys():
            raise ValueError(f"expected the shards {sorted(shards)}, got {sorted(index.pieces)}")
        for name, shard in shards.items():
            hashes = index.pieces[name]
            if not _HEX64.fullmatch(hashes) or len(hashes) != 64 * shard.num_pieces:
                raise ValueError(f"{name}: expected {shard.num_pieces} sha256")
        for name, small in index.small.items():
            if not _SMALL.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", small.sha256):
                raise ValueError(f"small file {name!r}: expected a plain name and a sha256")
        return index


def _check_format(got: int, shown: Path) -> None:
    if got != FORMAT:
        why = f", {_WHY[got]}" if got in _WHY else ""
        raise OtherVersion(
            f"{shown}: expected {KIND} of format {FORMAT}, got format {got} of another version"
            f"{why}; {REMEDY}"
        )


def _tensor(row: Any, ep_size: int) -> PackedTensor:
    name, shape, dtype, expert, sums = row
    dims = tuple(int(d) for d in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if not _NAME.fullmatch(name) or dtype not in DTYPES or not isinstance(expert, bool):
        raise ValueError(f"tensor {name!r}: expected a plain name, a known dtype, a bool")
    if not dims or not all(dims) or math.prod(dims) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name}: expected a shape, got {shape!r:.80}")
    if not _HEX16.fullmatch(sums) or len(sums) != 16 * (ep_size if expert else 1):
        raise ValueError(f"tensor {name}: expected its sums, got {sums!r:.80}")
    values = tuple(int(sums[i : i + 16], 16) for i in range(0, len(sums), 16))
    return PackedTensor(name, dims, dtype, expert, values)


def _integer(value: Any, least: int, most: int = 1 << 63) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"expected an integer from {least} to {most}, got {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected text, got {value!r:.40}")
    return value
