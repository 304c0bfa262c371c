"""Weights asked into L2 ahead of time: what, by whom, and every byte once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphs.ahead import AHEAD_PLAN, MIB, NOTHING_AHEAD, AheadPlan, AskAhead
from graphs.calls import Call, NoLauncher, RecordingOps
from graphs.devices import bind_views
from graphs.ops import Ops
from kernels.triton import norm
from kernels.triton.ahead import REQUEST, Asking, _requests
from kernels.triton.launch import JitLauncher
from kernels.triton.overlap import MODES
from runtime.assemble import listed_transport, make_step
from runtime.config import RuntimeConfig
from runtime.selection import choose

THREADS = 32
# Of every kernel another number of MiB.
EVERY_ASKER = AheadPlan(**{f.name: (i + 1) << 20 for i, f in enumerate(fields(AheadPlan))})


@triton.jit
def _list_requests(
    which,  # int32 [programs, THREADS]
    at,  # int32 [programs, THREADS]
    size,  # int32 [programs, THREADS]
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THREADS: tl.constexpr,
):
    program = tl.program_id(0)
    is_first, offset, nbytes = _requests(program, tl.num_programs(0), FIRST, SECOND, THREADS)
    place = program * THREADS + tl.arange(0, THREADS)
    tl.store(which + place, is_first.to(tl.int32))
    tl.store(at + place, offset)
    tl.store(size + place, nbytes)


@pytest.mark.parametrize("programs", [1, 3, 64])
@pytest.mark.parametrize(
    ("first", "second"),
    [(16, 0), (REQUEST, 0), (REQUEST + 16, 48), (5 * REQUEST - 32, 4 * REQUEST), (0, 7 * REQUEST)],
)
def test_every_byte_is_asked_for_once(programs: int, first: int, second: int) -> None:
    found = [torch.zeros(programs, THREADS, dtype=torch.int32) for _ in range(3)]
    JitLauncher()(_list_requests, (programs,), *found, FIRST=first, SECOND=second, THREADS=THREADS)
    asked: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for is_first, begin, nbytes in torch.stack(found, -1).view(-1, 3).tolist():
        assert nbytes % 16 == 0 or nbytes == 0
        asked[bool(is_first)].update(range(begin, begin + nbytes, 16))
    for is_first, want in ((True, first), (False, second)):
        assert asked[is_first] == Counter(range(0, want, 16))


def test_requests_go_out_in_the_order_of_need() -> None:
    found = [torch.zeros(2, THREADS, dtype=torch.int32) for _ in range(3)]
    sizes = {"FIRST": 3 * REQUEST, "SECOND": 2 * REQUEST}
    JitLauncher()(_list_requests, (2,), *found, **sizes, THREADS=THREADS)
    which, at, _ = (f[:, :3].tolist() for f in found)
    assert which == [[1, 1, 0], [1, 0, 0]]
    assert at == [[0, 2 * REQUEST, REQUEST], [REQUEST, 0, 2 * REQUEST]]


def _asking(*ahead: torch.Tensor, pdl: str = "late", **more: Any) -> Asking:
    return Asking.of(JitLauncher(pdl=MODES[pdl]), ahead, torch.zeros(1), **more)


def test_a_launch_that_asks_gets_programs_past_its_grid() -> None:
    a, b = torch.zeros(100, dtype=torch.uint8), torch.zeros(8, dtype=torch.bfloat16)
    assert _asking(a, b).constexprs == {"FIRST": 96, "SECOND": 16, "ASKING": 64}
    assert _asking(a, lines=32).programs == 2
    assert _asking(a, own=True).constexprs == {"FIRST": 96, "SECOND": 0, "ASKING": 0}
    nothing = {"FIRST": 0, "SECOND": 0, "ASKING": 0}
    assert _asking(a, pdl="off").constexprs == nothing
    assert _asking(a[:0], a[:15]).constexprs == nothing


def test_what_cannot_be_asked_for_is_refused() -> None:
    rows = torch.zeros(64, 64)
    for bad in (rows[:, :32], rows.view(-1)[1:]):
        with pytest.raises(ValueError, match="contiguous and 16-byte aligned, got strides"):
            _asking(bad)
    with pytest.raises(ValueError, match="at most 2 tensors, got 3"):
        _asking(rows, rows, rows)
    for size in (-16, 8, 51 << 20):
        with pytest.raises(ValueError, match="prep_q_b: expected 0 … 52428800 bytes in multiples"):
            AheadPlan(prep_q_b=size)


def test_each_goes_on_where_the_one_before_stopped() -> None:
    weight = torch.arange(100, dtype=torch.int16)
    ahead = AskAhead(AheadPlan(norm_gate_up=64, route_gate_up=96, align_gate_up=80))
    got = [ahead.by(asker, gate_up=weight.view(10, 10)) for asker in ("norm", "route", "align")]
    assert [s.tolist() for spans in got for s in spans] == [
        list(range(32)), list(range(32, 80)), list(range(80, 100)),
    ]  # fmt: skip
    assert ahead.by("align", gate_up=weight) == []


def test_a_kernel_gives_the_same_with_and_without() -> None:
    """Where kernels do not overlap nothing is asked for: the interpreter could not."""
    x, weight = torch.randn(3, 256), torch.randn(256)
    outs = [torch.empty_like(x), torch.empty_like(x)]
    for out, ahead in zip(outs, ((), (torch.zeros(64),)), strict=True):
        norm.add_rmsnorm(JitLauncher(), x, None, weight, eps=1e-6, out=out, ahead=ahead)
    assert torch.equal(*outs)


@dataclass(frozen=True)
class Line:
    """One operation of a step: the weights that it reads, and (weight, begin, MiB) it asks for."""

    op: str
    reads: set[str]
    asks: list[tuple[str, float, float]]


def _step(plan: AheadPlan, **options: Any) -> list[Line]:
    """The operations of a step of DeepSeek-V3, one dense layer and one with experts."""
    common = {"model": "deepseek-v3", "layers": 2, "overrides": ("first_k_dense_replace=1",)}
    rows = {"bs": 8 * options.get("ep_size", 1), "ladder": "8"}
    chosen = RuntimeConfig.of(**(common | rows | options))
    selection = choose(chosen, compile_only=True)
    launcher = NoLauncher()
    views = bind_views(None, selection.layout, torch.device("meta"))
    names = {_storage(view): name.removeprefix("layers.") for name, view in views.items()}
    lines: list[Line] = []

    def hook(call: Call) -> None:
        reads = {names.get(_storage(t), "") for _, t in call.tensors()}
        asks = [
            (names[_storage(s)], s.storage_offset() * s.element_size() / MIB, s.nbytes / MIB)
            for s in call.kwargs.get("ahead", ())
        ]
        lines.append(Line(call.op, reads, asks))

    transport = listed_transport(selection, launcher, views)
    ops = RecordingOps(Ops(launcher), hook)
    step = make_step(selection, ops, views, transport, ahead=plan)
    step.run(selection.ladder.keys[0])
    return lines


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def test_who_asks_for_what() -> None:
    size = {f.name: i + 1 for i, f in enumerate(fields(AheadPlan))}
    shared = 256 * 4096 * 7168 / MIB  # the last of 257 experts
    first = size["norm_gate_up"]
    second = first + size["route_gate_up"]
    asked = [(line.op, line.asks) for line in _step(EVERY_ASKER) if line.asks]

    def attention(layer: int) -> list[tuple[str, list[tuple[str, float, float]]]]:
        q_b, w_uk, w_uv, o = (f"{layer}.{leaf}" for leaf in ("q_b", "w_uk", "w_uv", "o"))
        merged = size["query_o"]
        return [
            ("add_rmsnorm", [(f"{layer}.qkv_a", 0, size["norm_qkv_a"])]),
            ("mla_prep", [(q_b, 0, size["prep_q_b"]), (w_uk, 0, size["prep_w_uk"])]),
            ("latent_query", [(w_uv, 0, size["query_w_uv"]), (o, 0, merged)]),
            (
                "mla_decode",
                [
                    (w_uv, size["query_w_uv"], size["merge_w_uv"]),
                    (o, merged, size["merge_o"]),
                ],
            ),
            ("absorb_v", [(o, merged + size["merge_o"], size["absorb_o"])]),
        ]

    assert asked == [
        *attention(0),
        ("add_rmsnorm", [("0.gate_up", 0, size["norm_gate_up"])]),
        *attention(1),
        (
            "add_rmsnorm",
            [
                ("1.router", 0, 7),  # it has no more
                ("1.all_gate_up", shared, size["norm_gate_up"]),
            ],
        ),
        ("route", [("1.all_gate_up", shared + first, size["route_gate_up"])]),
        ("align", [("1.all_gate_up", shared + second, 28 - second)]),
        ("gather_add_rmsnorm", [("head", 0, size["norm_head"])]),
    ]


RANKS = {"ep_size": 4, "transport": "rdep"}


@pytest.mark.parametrize("options", [{}, {"max_seq_len": 128}, RANKS])
def test_what_is_asked_for_is_read_behind_it(options: dict[str, Any]) -> None:
    lines = _step(AHEAD_PLAN, **options)
    asked = [(i, name) for i, line in enumerate(lines) for name, _, _ in line.asks]
    assert asked
    for i, name in asked:
        reading = [j for j, line in enumerate(lines) if name in line.reads]
        assert len(reading) == 1, name
        assert i < reading[0], f"{lines[i].op} asks for {name} after it was read"


def test_without_a_merge_attention_asks_for_nothing() -> None:
    asks = {line.op: line.asks for line in _step(EVERY_ASKER, max_seq_len=128) if line.asks}
    assert "mla_decode" not in asks
    assert [name for name, _, _ in asks["absorb_v"]] == ["1.o"]


def test_a_shared_expert_that_runs_beside_is_not_asked_for() -> None:
    lines = _step(EVERY_ASKER, **RANKS)
    assert not [name for line in lines for name, _, _ in line.asks if name == "1.all_gate_up"]
    assert [line.asks for line in lines if line.op in ("route", "align")] == [[], []]


def test_nothing_is_asked_for_where_kernels_do_not_overlap() -> None:
    assert not [line for line in _step(EVERY_ASKER, pdl="off") if line.asks]
    assert not [line for line in _step(NOTHING_AHEAD) if line.asks]
