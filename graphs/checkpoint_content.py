"""What tells one checkpoint from another of equal shapes: a digest of sampled bytes.

A fine-tune has the config, the headers and the sizes of its base; only its tensors' bytes differ.
Reading them all would take longer than loading, so every header counts, every small tensor whole,
and of a larger one windows from its first byte to its last: about a thousandth of all bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from graphs.safetensors_dir import (
    BadShard,
    CheckpointError,
    read_header,
    shard_files,
    tensors_of,
)

SCHEME = "sampled 1"  # raised whenever other bytes are taken
WHOLE_BYTES = 16 << 10  # a tensor up to this size counts whole
WINDOW_BYTES = 4 << 10
STRIDE_BYTES = 4 << 20  # of a large tensor, one window for so many bytes; three at least
_LENGTH_BYTES = 8


def content_digest(path: Path) -> str:
    """64 hex digits, the same wherever the checkpoint lies and whenever it was copied there.

    A change of some bytes inside a large tensor may fall between its windows; one that goes over
    the tensor, as training does, cannot.

    Raises:
        CheckpointError: files that are missing, or not safetensors.
    """
    from concurrent.futures import ThreadPoolExecutor  # where files are as they were: not needed

    files = shard_files(path)
    sha = hashlib.sha256(SCHEME.encode())
    with ThreadPoolExecutor(max(1, min(len(files), 16))) as pool:
        try:
            for file, digest in zip(
                files, pool.map(lambda f: _shard_digest(path / f), files), strict=True
            ):
                sha.update(f"\n{file} {digest}".encode())
        except BadShard as e:
            remedy = "download the directory again, whole"
            raise CheckpointError(path, [str(e)], remedy) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return sha.hexdigest()


def _shard_digest(file: Path) -> str:
    header, size = read_header(file)
    sha = hashlib.sha256(header)
    begin = _LENGTH_BYTES + len(header)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise BadShard(f"{file.name}: expected a readable file, got: {e.strerror}") from None
    try:
        for _, tensor in tensors_of(file.name, header, size):
            for at, count in windows(tensor.nbytes):
                sha.update(os.pread(fd, count, begin + at))
            begin += tensor.nbytes
    except OSError as e:
        raise BadShard(f"{file.name}: expected a readable file, got: {e.strerror}") from None
    finally:
        os.close(fd)
    return sha.hexdigest()


def windows(nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what counts of a tensor of `nbytes`: its beginning and end always."""
    if nbytes <= WHOLE_BYTES:
        yield 0, nbytes
        return
    count = max(3, -(-nbytes // STRIDE_BYTES))
    last = nbytes - WINDOW_BYTES
    for i in range(count):
        yield last * i // (count - 1), WINDOW_BYTES
