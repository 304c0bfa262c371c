"""A Hugging Face directory on disk: which tensors it has, where, of what shape and type.

Reads `config.json`, the index and the shards' headers, never a tensor, so everything that is wrong
with a directory is known, and named in one error, before the first byte of weights moves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from capture_cache.dataclass import dataclass

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# safetensors' type names that a checkpoint of ours may hold -> (torch's name, bytes)
DTYPES = {
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
}
_LENGTH_BYTES = 8  # little-endian header length at the start of a safetensors file
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 16
_SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    Attributes:
        problems: one sentence each: file, tensor, expected, got.
    """

    def __init__(self, path: Path, problems: Iterable[str], remedy: str) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"checkpoint {path}: {self.problems[0]}; {remedy}")
            return
        lines = [f"  {p}" for p in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  … and {len(self.problems) - _SHOWN} more")
        first = f"checkpoint {path}: {len(self.problems)} problems"
        super().__init__("\n".join([first, *lines, f"  {remedy}"]))


@dataclass(frozen=True)
class Stored:
    """One tensor in a shard; `dtype` is torch's name where we know the type, else safetensors'."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class CheckpointDir:
    """The tensors of a directory by name, in the order they are stored, and its identity.

    Attributes:
        listing: the file that says which tensors there are: the index, or the one shard.
    """

    path: Path
    listing: str
    tensors: dict[str, Stored]
    digest: str


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        CheckpointError: not a directory, no `config.json`, or not a JSON object.
    """
    if not path.is_dir():
        kind = "a file" if path.is_file() else "nothing there"
        raise CheckpointError(
            path, [f"expected a directory, got {kind}"], "give the Hugging Face model directory"
        )
    return read_json(path, CONFIG_FILE, "copy it from the model's repository")


def open_checkpoint(path: Path) -> CheckpointDir:
    """Read the index and every shard's header.

    Raises:
        CheckpointError: files that are missing, cut short, not safetensors, or in disagreement with
            the index.
    """
    read_config(path)
    index = _read_index(path)
    files = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
    sha = _directory_hash(path)
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for file in files:
        try:
            header, size = read_header(path / file)
            stored = dict(tensors_of(file, header, size))
        except BadShard as error:
            problems.append(f"{file}: {error}")
            continue
        _hash_shard(sha, file, size, header)
        if index is not None:
            problems += _index_problems(file, stored, index)
        tensors |= {n: t for n, t in stored.items() if index is None or index.get(n) == file}
    if problems:
        raise CheckpointError(path, problems, "download the directory again, whole")
    listing = SINGLE_FILE if index is None else INDEX_FILE
    return CheckpointDir(path, listing, tensors, sha.hexdigest())


def checkpoint_digest(path: Path) -> str:
    """The digest that `open_checkpoint` gives, without judging a single tensor: much faster.

    Raises:
        CheckpointError: files that are missing, or whose header cannot be read.
    """
    sha = _directory_hash(path)
    for file in shard_files(path):
        try:
            header, size = read_header(path / file)
        except BadShard as error:
            problem = f"{file}: {error}"
            raise CheckpointError(path, [problem], "download the directory again, whole") from None
        _hash_shard(sha, file, size, header)
    return sha.hexdigest()


def config_digest(path: Path) -> str:
    """What stands for `checkpoint_digest` where there is a config and no weights."""
    return hashlib.sha256(b"config alone\n" + _bytes(path, CONFIG_FILE)).hexdigest()


def shard_files(path: Path) -> list[str]:
    """Names of the files that hold the weights, sorted.

    Raises:
        CheckpointError: no config, or no list of files.
    """
    read_config(path)
    if _listing(path) == SINGLE_FILE:
        return [SINGLE_FILE]
    # A large model's index has a hundred thousand lines that name a hundred files.
    text = _bytes(path, INDEX_FILE)
    found = set(re.findall(rb'"([^"/]+\.safetensors)"', text))
    if not found or b"\\" in text:  # spelled with escapes
        return sorted(set((_read_index(path) or {}).values()))
    return sorted(name.decode(errors="replace") for name in found)


class BadShard(ValueError):
    """What is wrong with one file."""


def read_json(path: Path, file: str, remedy: str) -> dict[str, Any]:
    """One JSON object of the directory; CheckpointError with `remedy` if it is not one."""
    try:
        value = json.loads((path / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, [f"{file}: expected a file, got nothing"], remedy) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, [f"{file}: expected JSON, got: {error}"], remedy) from None
    if not isinstance(value, dict):
        got = type(value).__name__
        raise CheckpointError(path, [f"{file}: expected a JSON object, got {got}"], remedy)
    return value


def _directory_hash(path: Path) -> hashlib._Hash:
    sha = hashlib.sha256(_bytes(path, CONFIG_FILE))
    if _listing(path) == INDEX_FILE:
        sha.update(_bytes(path, INDEX_FILE))
    return sha


def _bytes(path: Path, file: str) -> bytes:
    try:
        return (path / file).read_bytes()
    except OSError as e:
        problem = f"{file}: expected a readable file, got: {e.strerror}"
        raise CheckpointError(path, [problem], "download it again") from None


def has_weights(path: Path) -> bool:
    """Whether a directory says anything of weights: one shard or an index, sound or not."""
    return os.path.lexists(path / SINGLE_FILE) or os.path.lexists(path / INDEX_FILE)


def _listing(path: Path) -> str:
    """The file that says which tensors there are. Raises CheckpointError: there is none."""
    single, index = (os.path.lexists(path / f) for f in (SINGLE_FILE, INDEX_FILE))
    if single and index:
        problem = f"expected {SINGLE_FILE} or {INDEX_FILE}, got both"
        raise CheckpointError(path, [problem], "remove the one that is not this model's")
    if not single and not index:
        others = sorted(p.name for p in path.glob("*.bin")) or sorted(
            p.name for p in path.glob("*.safetensors")
        )
        got = ", ".join(others[:3]) or "no weights"
        problem = f"expected {INDEX_FILE} or {SINGLE_FILE}, got {got}"
        remedy = (
            "download the weights too, or save the model with save_pretrained; where packed ones "
            "lie elsewhere, give them with --weights"
        )
        raise CheckpointError(path, [problem], remedy)
    file = SINGLE_FILE if single else INDEX_FILE
    if not (path / file).exists():
        problem = f"{file}: expected a file, got a link to {os.readlink(path / file)}, not there"
        raise CheckpointError(path, [problem], "download the file that it links to again")
    if not (path / file).is_file():
        problem = f"{file}: expected a file, got a directory or device"
        raise CheckpointError(path, [problem], "remove it, and download the file")
    return file


def _hash_shard(sha: hashlib._Hash, file: str, size: int, header: bytes) -> None:
    sha.update(f"\n{file}\n{size}\n".encode() + header)


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> file; None for a directory of one file without an index."""
    if _listing(path) == SINGLE_FILE:
        return None
    index = read_json(path, INDEX_FILE, "download the index again").get("weight_map")
    if not isinstance(index, dict) or not all(_is_file_name(f) for f in index.values()):
        problem = f"{INDEX_FILE}: expected weight_map, an object of tensor name: file name"
        raise CheckpointError(path, [problem], "download the index again")
    return index


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and Path(value).name == value


def _index_problems(file: str, stored: dict[str, Stored], index: dict[str, str]) -> Iterator[str]:
    for name in stored:
        if index.get(name) != file:
            listed = f"listed in {index[name]}" if name in index else "not listed"
            yield f"{file}: {name}: expected what {INDEX_FILE} lists, got a tensor {listed}"
    for name, listed in index.items():
        if listed == file and name not in stored:
            yield f"{file}: {name}: expected here by {INDEX_FILE}, got no such tensor in the file"


def read_header(file: Path) -> tuple[bytes, int]:
    """The raw JSON header and the file's size in bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length_field = stream.read(_LENGTH_BYTES)
            if len(length_field) < _LENGTH_BYTES:
                raise BadShard(f"expected a safetensors file, got {size} bytes")
            (length,) = struct.unpack("<Q", length_field)
            if length > _MAX_HEADER_BYTES:
                raise BadShard(f"expected a safetensors file, got a header of {length} bytes")
            header = stream.read(length)
    except FileNotFoundError:
        raise BadShard("expected a file, got nothing") from None
    except OSError as error:
        raise BadShard(f"expected a readable file, got: {error.strerror}") from None
    if len(header) < length:
        raise BadShard(
            f"cut short: expected a header of {length} bytes, got a file of {size} bytes"
        )
    return header, size


def _described(name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...], str]:
    """(begin, end, name, shape, type) of one entry; integers only, none below zero."""
    begin, end = entry["data_offsets"]
    shape, kind = entry["shape"], entry["dtype"]
    whole = isinstance(shape, list) and isinstance(kind, str) and len(shape) <= _MAX_DIMS
    if not whole or any(type(n) is not int or not 0 <= n < 1 << 63 for n in (begin, end, *shape)):
        raise ValueError(f"{name:.80}: expected a shape, offsets and a type, got {entry!r:.80}")
    return begin, end, name, tuple(shape), kind


def tensors_of(file: str, header: bytes, size: int) -> Iterator[tuple[str, Stored]]:
    """The header's entries in storage order, their offsets checked against the file's size.

    Raises:
        BadShard: not a header, or not one of a file of `size` bytes.
    """
    try:
        entries = json.loads(header)
        described = [_described(n, e) for n, e in entries.items() if n != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadShard(f"expected a safetensors header, got: {error!r:.200}") from None
    at = 0
    for begin, end, name, shape, kind in sorted(described):
        dtype, item_bytes = DTYPES.get(kind, (kind, 0))
        right_size = not item_bytes or end - begin == math.prod(shape) * item_bytes
        if begin != at or end < begin or not right_size:
            raise BadShard(
                f"{name:.200}: expected {list(shape[:8])} {dtype:.20} at byte {at}, got bytes "
                f"{begin} to {end}"
            )
        at = end
        yield name, Stored(file, shape, dtype, end - begin)
    expected = _LENGTH_BYTES + len(header) + at
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise BadShard(f"{what}: expected {expected} bytes, got {size}")
