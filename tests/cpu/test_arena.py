"""The arena: a layout that is a pure function, and memory that is given back whatever happens."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture_cache.arena import ARENA_BASE, DeviceArena, HostArena
from capture_cache.errors import ArenaError, CudaError, LayoutError
from capture_cache.layout import (
    ITEM_BYTES,
    SECTION_ALIGNMENT,
    SECTIONS,
    ArenaLayout,
    Entry,
    Section,
)
from graphs.devices import bind_views, torch_dtype

GIB = 1 << 30
ENTRIES = [
    Entry("ring", "ring", (4, 8), "int32"),
    Entry("kv", "kv.0", (128, 576), "bfloat16"),
    Entry("weights", "w8", (129, 257), "float8_e4m3fn"),
    Entry("weights", "w8_scale", (2, 3), "float32"),
    Entry("rows", "flags", (7,), "bool"),
    Entry("rows", "step", (), "int64"),
    Entry("rows", "none", (0, 5), "float16"),
]


@st.composite
def entry_lists(draw: Any) -> list[Entry]:
    names = draw(st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=12))
    return [
        Entry(
            draw(st.sampled_from([s.name for s in SECTIONS])),
            name,
            tuple(draw(st.lists(st.integers(0, 300), max_size=3))),
            draw(st.sampled_from(sorted(ITEM_BYTES))),
            draw(st.sampled_from([8, 256, 4096])),
        )
        for name in names
    ]


@given(entry_lists())
def test_layout_properties(entries: list[Entry]) -> None:
    layout = ArenaLayout.build(entries)
    assert {p.entry for p in layout.places} == set(entries)
    for host in (False, True):
        places = [p for p in layout.places if p.host == host]
        order = [s.name for s in SECTIONS]
        assert places == sorted(places, key=lambda p: order.index(p.entry.section))
        for one, two in pairwise(places):
            assert one.offset + one.nbytes <= two.offset
        ends = [p.offset + p.nbytes for p in places]
        assert max(ends, default=0) <= (layout.host_bytes if host else layout.device_bytes)
    for place in layout.places:
        extent = next(e for e in layout.extents if e.section.name == place.entry.section)
        assert place.offset % place.entry.alignment == 0
        assert extent.offset <= place.offset
        assert place.offset + place.nbytes <= extent.offset + extent.nbytes
    for extent in layout.extents:
        assert extent.offset % SECTION_ALIGNMENT == 0
        assert extent.nbytes % SECTION_ALIGNMENT == 0
    assert layout.total == sum(layout.section_bytes.values())


@given(entry_lists())
def test_layout_survives_json_and_is_pure(entries: list[Entry]) -> None:
    layout = ArenaLayout.build(entries)
    stored = json.loads(json.dumps(layout.to_json()))
    assert ArenaLayout.from_json(stored) == layout == ArenaLayout.build(list(entries))
    assert ArenaLayout.from_json(stored).digest == layout.digest


def test_order_of_entries_is_kept_within_a_section() -> None:
    layout = ArenaLayout.build(ENTRIES)
    names = [p.entry.name for p in layout.places]
    assert names == ["w8", "w8_scale", "flags", "step", "none", "kv.0", "ring"]
    assert layout.digest != ArenaLayout.build(ENTRIES[::-1]).digest


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("weights", "w8", (1,), "int8"), "'w8' is given twice"),
        (Entry("weights", "x", (-1,), "int8"), "dimensions must be"),
        (Entry("weights", "x", (2.0,), "int8"), "dimensions must be"),  # type: ignore[arg-type]
        (Entry("weights", "x", (1,), "int4"), "unknown dtype 'int4'"),
        (Entry("cache", "x", (1,), "int8"), "unknown section 'cache'"),
        (Entry("weights", "x", (1,), "int8", 3), "power of two"),
        (Entry("weights", "x", (1,), "int64", 4), "power of two"),
        (Entry("weights", "x", (1,), "int8", 2 * SECTION_ALIGNMENT), "power of two"),
        (Entry("weights", "", (1,), "int8"), "needs a name"),
    ],
)
def test_bad_entries_are_named(entry: Entry, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ArenaLayout.build([*ENTRIES, entry])


def test_sections_must_differ() -> None:
    with pytest.raises(LayoutError, match="not unique"):
        ArenaLayout.build([], [Section("a"), Section("a", host=True)])


@pytest.mark.parametrize("field", ["offset", "bytes", "shape", "section"])
def test_a_changed_table_is_refused(field: str) -> None:
    table = ArenaLayout.build(ENTRIES).to_json()
    wrong = {"offset": 512, "bytes": 1, "shape": [130, 257], "section": "kv"}
    table["entries"][0][field] = wrong[field]
    with pytest.raises(LayoutError, match="capture again"):
        ArenaLayout.from_json(table)


@pytest.mark.parametrize("table", [None, {}, {"sections": 1}, {"sections": [], "entries": [{}]}])
def test_a_malformed_table_is_refused(table: Any) -> None:
    with pytest.raises(LayoutError, match="malformed"):
        ArenaLayout.from_json(table)


# -- host arena -----------------------------------------------------------------------------------


def test_host_arena_views_are_the_memory() -> None:
    layout = ArenaLayout.build(ENTRIES)
    arena = HostArena(layout)
    views = bind_views(arena, layout, "cpu")
    for entry in ENTRIES:
        view, spec = views[entry.name], arena.view_spec(entry.name)
        assert tuple(view.shape) == entry.shape == spec.shape
        assert view.dtype == torch_dtype(entry.dtype)
        assert not view.any()
        if entry.nbytes:
            assert view.data_ptr() == spec.ptr == arena.ptr(entry.name)
            assert spec.ptr % 256 == 0
    views["step"].fill_(7)
    assert arena.bytes_of("step").view(np.int64)[0] == 7
    views["kv.0"].fill_(1.0)
    assert not views["flags"].any()


def test_host_arena_costs_nothing_before_it_is_touched() -> None:
    layout = ArenaLayout.build([Entry("kv", "huge", (1 << 40,), "uint8")])
    arena = HostArena(layout)
    view = bind_views(arena, layout, "cpu")["huge"]
    view[(1 << 39)] = 3
    assert int(view[(1 << 39)]) == 3


def test_host_arena_that_the_system_refuses_is_named() -> None:
    with pytest.raises(ArenaError, match="kv .*lower --num-pages"):
        HostArena(ArenaLayout.build([Entry("kv", "absurd", (1 << 60,), "uint8")]))


def test_closed_and_unknown_are_named() -> None:
    arena = HostArena(ArenaLayout.build(ENTRIES))
    with pytest.raises(ArenaError, match="no entry 'nope'"):
        arena.ptr("nope")
    arena.close()
    arena.close()
    for use in (arena.ptr, arena.view_spec, arena.bytes_of):
        with pytest.raises(ArenaError, match="closed"):
            use("kv.0")


def test_views_outlive_a_closed_host_arena() -> None:
    layout = ArenaLayout.build(ENTRIES)
    arena = HostArena(layout)
    view = bind_views(arena, layout, "cpu")["kv.0"]
    arena.close()
    view.fill_(2.0)
    assert bool((view == 2.0).all())


def test_meta_views_have_the_shapes_of_the_layout() -> None:
    layout = ArenaLayout.build(ENTRIES)
    views = bind_views(None, layout, "meta")
    for entry in ENTRIES:
        view = views[entry.name]
        assert (tuple(view.shape), view.dtype) == (entry.shape, torch_dtype(entry.dtype))
        assert (view.device.type, view.storage_offset()) == ("meta", 0)


def test_views_need_the_arena_of_their_layout_and_device() -> None:
    layout = ArenaLayout.build(ENTRIES)
    arena = HostArena(layout)
    with pytest.raises(ValueError, match="views on cpu, got device cuda"):
        bind_views(arena, layout, "cuda")
    with pytest.raises(ValueError, match="views on meta, got device cpu"):
        bind_views(None, layout, "cpu")
    with pytest.raises(ValueError, match="make a new arena"):
        bind_views(arena, ArenaLayout.build(ENTRIES[:3]), "cpu")


# -- device arena, on a driver that only keeps books ----------------------------------------------


class Books:
    """Stands for the driver: records what is held, and fails the `fail_at`-th call."""

    ordinal = 3

    def __init__(self, free: int = 100 * GIB, fail_at: int = -1, error: str = "ERROR") -> None:
        self.free, self.fail_at, self.error = free, fail_at, error
        self.hinted = True
        self.calls = 0
        self.reserved: dict[int, int] = {}
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.pinned: set[int] = set()

    def _call(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise CudaError(self.error, "a call", "do something")

    @property
    def clean(self) -> bool:
        return not (self.reserved or self.handles or self.mapped or self.pinned)

    def memory_info(self) -> tuple[int, int]:
        return self.free, 2 * self.free

    def granularity(self) -> int:
        return SECTION_ALIGNMENT

    def reserve(self, nbytes: int, hint: int) -> int:
        self._call()
        address = hint if self.hinted else hint + 64 * GIB
        self.reserved[address] = nbytes
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        assert not self.mapped
        assert self.reserved.pop(address) == nbytes

    def create(self, nbytes: int) -> int:
        self._call()
        assert nbytes % SECTION_ALIGNMENT == 0
        self.handles.add(self.calls)
        return self.calls

    def release(self, handle: int) -> None:
        self.handles.remove(handle)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call()
        assert handle in self.handles
        assert all(address >= a + n or a >= address + nbytes for a, n in self.mapped.items())
        self.mapped[address] = nbytes

    def unmap(self, address: int, nbytes: int) -> None:
        assert self.mapped.pop(address) == nbytes

    def host_alloc(self, nbytes: int) -> int:
        self._call()
        self.pinned.add(0x7000)
        return 0x7000

    def host_free(self, address: int) -> None:
        self.pinned.remove(address)


BIG = ArenaLayout.build([*ENTRIES, Entry("kv", "kv.1", (20 * GIB,), "uint8")])


def test_device_arena_maps_every_section_and_gives_all_back() -> None:
    books = Books()
    arena = DeviceArena(BIG, memory=books)
    assert arena.base == ARENA_BASE
    assert sum(books.mapped.values()) == BIG.device_bytes
    assert max(books.mapped.values()) <= 8 * GIB
    assert arena.ptr("kv.1") == ARENA_BASE + BIG.by_name["kv.1"].offset
    assert arena.ptr("ring") == 0x7000 + BIG.by_name["ring"].offset
    arena.close()
    arena.close()
    assert books.clean
    with pytest.raises(ArenaError, match="closed"):
        arena.ptr("kv.1")


def test_whatever_call_fails_everything_is_given_back() -> None:
    whole = Books()
    DeviceArena(BIG, memory=whole)
    assert whole.calls > 10
    for fail_at in range(whole.calls):
        books = Books(fail_at=fail_at)
        with pytest.raises((ArenaError, CudaError)):
            DeviceArena(BIG, memory=books)
        assert books.clean, fail_at


@pytest.mark.parametrize(("free", "fail_at"), [(5 * GIB, -1), (100 * GIB, 6)])
def test_too_little_memory_is_told_by_section(free: int, fail_at: int) -> None:
    books = Books(free, fail_at, "CUDA_ERROR_OUT_OF_MEMORY")
    expected = (
        rf"device 3, {free // GIB}\.0 GiB are free: kv 20\.0 GiB \(lower --num-pages\), .*rows"
    )
    with pytest.raises(ArenaError, match=expected):
        DeviceArena(BIG, memory=books)
    assert books.clean


def test_another_address_is_refused_only_where_it_matters() -> None:
    books = Books()
    books.hinted = False
    with pytest.raises(ArenaError, match="expected the arena at 0x600000000000, got"):
        DeviceArena(BIG, memory=books, exact=True)
    assert books.clean
    arena = DeviceArena(BIG, memory=books)
    assert arena.base == ARENA_BASE + 64 * GIB
    arena.close()
    assert books.clean
