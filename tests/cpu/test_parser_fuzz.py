"""Everything that is read from disk, mutated: a named refusal or a valid value, nothing else.

About 200,000 cases a run, from a new seed each time; a failure prints the seed and the case. A
value that is accepted is written again and must give the bytes that were read, so that no two files
mean the same and nothing in one is ignored.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from capture_cache.archive import export, read_bytes
from capture_cache.bundle_golden import decode_golden, encode_golden
from capture_cache.bundle_graph import decode_graph, encode_graph
from capture_cache.bundle_program import decode_program, encode_program
from capture_cache.checksum import sum64_code
from capture_cache.cubin import kernel_facts
from capture_cache.errors import CompileError, CorruptBundle
from capture_cache.fingerprint import Fingerprint
from capture_cache.kernel import CompiledKernel, TensorMapSpec
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.manifest import Manifest, seal, unseal
from capture_cache.packed_index import INDEX, Index
from capture_cache.store import Store
from graphs.safetensors_dir import BadShard, tensors_of
from runtime.packing import pack
from tests.cpu import bundles
from tests.cpu.mutations import is_json, mutated, mutated_json, mutated_text
from tests.cpu.packs import small_preset

HERE = Path("file")


@dataclass(frozen=True)
class Target:
    """A parser under fuzz.

    Attributes:
        good: what must be accepted.
        make: a new case.
        parse: reads it; an accepted one returns True if it was read exactly.
        refusal: the one error that it may raise.
        cases: in one run.
    """

    good: Any
    make: Callable[[random.Random], Any]
    parse: Callable[[Any], bool]
    refusal: type[Exception]
    cases: int


def _manifest() -> Manifest:
    fingerprint = Fingerprint.of({"driver": "595.20", "gpu": "H200", "sms": 132, "pdl": True})
    entries = [Entry("weights", "w", (3, 5), "bfloat16"), Entry("ring", "r", (4,), "int32")]
    kernels = (("sm_90", "ab" * 32),)
    return Manifest(fingerprint, ArenaLayout.build(entries), {"keys": [1]}, kernels)


def _shard() -> tuple[bytes, int]:
    """A safetensors header and the size of its file."""
    tensors = {"a.weight": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    data = save(tensors, {"format": "pt"})
    return data[8 : 8 + int.from_bytes(data[:8], "little")], len(data)


def _kernel() -> CompiledKernel:
    maps = (TensorMapSpec(2, 2, 3, (64, 64)),)
    params = ("ptr", "i32", "tensormap")
    return CompiledKernel("k", "sm_90", b"code", 4, 1, True, 1024, params, maps, 40, 0, 0)


def _parse_safetensors(case: tuple[bytes, int]) -> bool:
    header, size = case
    total = sum(t.nbytes for _, t in tensors_of("file", header, size))
    return 8 + len(header) + total == size


def _parse_manifest(data: bytes) -> bool:
    manifest = Manifest.from_json(unseal(data, HERE), HERE)
    return Manifest.from_json(unseal(seal(_record(manifest)), HERE), HERE) == manifest


def _record(manifest: Manifest) -> dict[str, Any]:
    files = {n: {"bytes": r.nbytes, "sha256": r.sha256} for n, r in manifest.files.items()}
    return {**manifest.to_json(), "files": files}


def _sealed(record: dict[str, Any]) -> Callable[[random.Random], bytes]:
    """Mutants that are sealed as they should be: what a hash cannot find."""

    def make(draw: random.Random) -> bytes:
        while True:
            changed = mutated_json(record, draw)
            if isinstance(changed, dict) and is_json(changed):
                changed.pop("schema", None)
                return seal(changed)

    return make


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    program, graph = encode_program(bundles.program()), encode_graph(bundles.graph())
    golden = encode_golden(bundles.golden())
    record = _record(_manifest()) | {"files": {"f": {"bytes": 3, "sha256": "0" * 64}}}
    index = (pack(*small_preset("tiny", "fp8"), folder / "p", ep_size=2).path / INDEX).read_bytes()
    index_record = unseal(index, HERE)
    archive = _archive(folder)
    header, size = _shard()
    code = sum64_code("sm_90", None)
    kernel = _kernel()

    def raw(data: bytes) -> Callable[[random.Random], bytes]:
        return lambda draw: mutated(data, draw)

    def text(data: bytes) -> Callable[[random.Random], bytes]:
        return lambda draw: mutated_text(data, draw)

    def same_program(data: bytes) -> bool:
        return encode_program(decode_program(data)) == data

    def same_graph(data: bytes) -> bool:
        return encode_graph(decode_graph(data, bundles.program())) == data

    def same_golden(data: bytes) -> bool:
        return encode_golden(decode_golden(data)) == data

    def same_index(data: bytes) -> bool:
        return Index.from_bytes(Index.from_bytes(data, HERE).to_bytes(), HERE).shards() is not None

    def read_kernel(meta: Any) -> bool:
        return bool(CompiledKernel.from_meta(meta, {"cubin": b"code"}, HERE).meta())

    bad = CorruptBundle
    return {
        "program": Target(program, raw(program), same_program, bad, 40_000),
        "graph": Target(graph, raw(graph), same_graph, bad, 40_000),
        "golden": Target(golden, raw(golden), same_golden, bad, 30_000),
        "record": Target(seal(record), text(seal(record)), _parse_manifest, bad, 20_000),
        "manifest": Target(seal(record), _sealed(record), _parse_manifest, bad, 6_000),
        "index": Target(index, _sealed(index_record), same_index, bad, 6_000),
        "safetensors": Target(
            (header, size),
            lambda draw: (mutated_text(header, draw), size + draw.choice((0, 0, 0, 1, -1))),
            _parse_safetensors,
            BadShard,
            30_000,
        ),
        "archive": Target(archive, raw(archive), lambda d: bool(read_bytes(d, HERE)), bad, 6_000),
        "kernel": Target(
            kernel.meta(),
            lambda draw: mutated_json(json.loads(json.dumps(kernel.meta())), draw),
            read_kernel,
            bad,
            8_000,
        ),
        "code": Target(code, raw(code), lambda d: kernel_facts(d) is not None, CompileError, 6_000),
    }


def _archive(folder: Path) -> bytes:
    store = Store(folder / "store")
    manifest = _manifest()
    store.publish_kernel("sm_90", "ab" * 32, {"name": "k"}, {"cubin": b"code" * 10})
    bundle = store.publish(manifest.fingerprint, manifest, {"graph/t1r1": b"nodes"})
    export(store, bundle.manifest, folder / "a.tar")
    return (folder / "a.tar").read_bytes()


NAMES = (
    *("program", "graph", "golden", "record", "manifest", "index", "safetensors", "archive"),
    *("kernel", "code"),
)


def test_there_are_enough_cases(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES
    assert sum(t.cases for t in targets.values()) >= 100_000


@pytest.mark.parametrize("name", NAMES)
def test_a_mutant_is_refused_by_name_or_is_valid(targets: dict[str, Target], name: str) -> None:
    target = targets[name]
    assert target.parse(target.good)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    refused, longest, begin = 0, 0, time.perf_counter()
    for i in range(target.cases):
        case = target.make(draw)
        try:
            exact = target.parse(case)
        except target.refusal as e:
            refused += 1
            longest = max(longest, len(str(e)))
            continue
        except BaseException as e:
            pytest.fail(f"{name}, seed {seed}, case {i}: {type(e).__name__}: {e}\n{_shown(case)}")
        assert exact, f"{name}, seed {seed}, case {i}: read as something else\n{_shown(case)}"
    seconds = time.perf_counter() - begin
    print(f"{target.cases} cases, {refused} refused, {seconds:.1f} s")
    assert refused > target.cases // 10
    assert longest < 2000, f"seed {seed}: a message of {longest} characters"


def _shown(case: Any) -> str:
    data = case[0] if isinstance(case, tuple) else case
    return base64.b64encode(data).decode() if isinstance(data, bytes) else repr(data)


def _hostile() -> Iterator[bytes]:
    """Texts that break JSON readers: depth, width, numbers, encodings, doubled keys."""
    yield from (b"[" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b"1e400", b"-" * 10)
    yield from (b"\xff\xfe", b"\xef\xbb\xbf{}", b'"\\ud800"', b'{"sha256":"a","sha256":"b"}')
    yield from (b'{"a":{"data_offsets":[1e999,0],"shape":[],"dtype":"F32"}}', b"{}", b"[]", b"null")
    yield from (b'{"a":{"data_offsets":[0,0],"shape":[-1],"dtype":"F32"}}', b'{"a":null}', b"")
    yield b'{"a":{"data_offsets":[0,4],"shape":[1e999],"dtype":"F32"}}'
    yield b'{"a":{"data_offsets":[0,true],"shape":[1],"dtype":"U8"}}'


def test_hostile_texts_are_refused_by_every_reader_of_json() -> None:
    for data in _hostile():
        for read in (
            lambda d: unseal(d, HERE),
            lambda d: Index.from_bytes(d, HERE),
            lambda d: list(tensors_of("file", d, len(d) + 8 + 999)),
        ):
            with pytest.raises((CorruptBundle, BadShard)):
                read(data)
