"""Our own MLA kernel for Hopper: against its oracle, in any company, and replayed in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from graphs.hopper_mla import HopperMla
from graphs.planned_mla import LATENT_DIM, PlannedMla, no_hopper
from kernels.triton.mla_decode import mla_decode_ref, num_splits
from tests.gpu.conftest import Load
from tests.gpu.models import LADDERS
from tests.serving import alone, make_requests, serve

if TYPE_CHECKING:
    from graphs.aot import AotLauncher

PAGE, WIDTH = 64, 576
SCALE = 0.1352337788608801
LENGTHS = {
    "one token": (64, [1]),
    "around a page": (1024, [63, 64, 65]),
    "tails": (1024, [1, 63, 127, 128, 129, 1000, 0, 2000]),
    "around a cut": (1024, [2049, 1025, 1024, 1023, 0, 2048]),
    "many splits": (256, [4000, 255, 257]),
    "a row over all of the chip": (64, [2049]),
    "a block a split": (64, [63, 64, 65, 1, 0, 700]),
    "two blocks a split": (128, [2000, 128, 129, 257, 1, 192, 63, 0, 512]),
    "more items than SMs": (512, [64 * (i % 9) + 7 * i + 1 for i in range(150)]),
}


@dataclass
class _Rows:
    """Rows of KV in shuffled pages, NaN wherever no token is."""

    mla: HopperMla
    length: torch.Tensor
    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    buffers: dict[str, torch.Tensor]
    out: torch.Tensor

    @classmethod
    def make(cls, lengths: list[int], cut: int, heads: int = 128, *, sharp: float = 1.0) -> _Rows:
        generator = torch.Generator("cuda").manual_seed(sum(lengths))
        used = [-(-n // PAGE) for n in lengths]
        pages = torch.randperm(sum(used), generator=generator, device="cuda") + 1
        table = torch.zeros((len(lengths), max(used)), dtype=torch.int32, device="cuda")
        cache = torch.full(((sum(used) + 1) * PAGE, WIDTH), float("nan"), device="cuda")
        at = 0
        for row, (n, count) in enumerate(zip(lengths, used, strict=True)):
            table[row, :count] = pages[at : at + count]
            slots = pages[at : at + count, None] * PAGE + torch.arange(PAGE, device="cuda")
            cache[slots.flatten()[:n]] = torch.randn((n, WIDTH), generator=generator, device="cuda")
            at += count
        q = torch.randn((len(lengths), heads, WIDTH), generator=generator, device="cuda") * sharp
        splits = num_splits(max(used) * PAGE, cut)
        buffers = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
            for name, shape, dtype in PlannedMla.workspace(len(lengths), heads, splits)
        }
        mla = HopperMla(num_heads=heads, page_size=PAGE, softmax_scale=SCALE, cut=cut)
        out = torch.full((len(lengths), heads, LATENT_DIM), float("nan"), device="cuda").bfloat16()
        length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        return cls(mla, length, q.bfloat16(), cache.bfloat16(), table, buffers, out)

    def run(self, launch: AotLauncher) -> torch.Tensor:
        rows = torch.arange(len(self.length), dtype=torch.int32, device="cuda")
        ws, part_o = self.buffers["mla_plan"], self.buffers["part_o"]
        self.mla.plan(launch, rows, self.length, page_table=self.table, ws=ws, part_o=part_o)
        self.mla.run(
            *(launch, self.q, self.cache, self.table, self.length),
            ws=ws,
            part_o=part_o,
            part_lse=self.buffers["part_lse"],
            out=self.out,
        )
        return self.out

    def expected(self) -> torch.Tensor:
        out = torch.zeros(self.out.shape)
        part_o, part_lse = self.buffers["part_o"].cpu().float(), self.buffers["part_lse"].cpu()
        mla_decode_ref(
            self.q.cpu().float(),
            self.cache.cpu().float(),
            self.table.cpu(),
            torch.arange(len(self.length), dtype=torch.int32),
            self.length.cpu(),
            page_size=PAGE,
            softmax_scale=SCALE,
            cut=self.mla.cut,
            out=out,
            part_o=part_o,
            part_lse=part_lse,
        )
        return out

    def alone(self, row: int) -> _Rows:
        """The same row in a step of its own."""
        some = slice(row, row + 1)
        heads, splits = self.q.shape[1], self.buffers["part_o"].shape[1]
        buffers = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
            for name, shape, dtype in PlannedMla.workspace(1, heads, splits)
        }
        table, q = self.table[some].contiguous(), self.q[some].contiguous()
        out = torch.empty_like(self.out[some])
        return _Rows(self.mla, self.length[some].clone(), q, self.cache, table, buffers, out)


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if reason := no_hopper("our own MLA"):
        pytest.skip(reason)


def _compare(rows: _Rows, got: torch.Tensor) -> None:
    live = (rows.length > 0).cpu()
    torch.testing.assert_close(got.cpu().float()[live], rows.expected()[live], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", LENGTHS)
def test_attention_matches_its_oracle(name: str, launcher: AotLauncher) -> None:
    cut, lengths = LENGTHS[name]
    rows = _Rows.make(lengths, cut)
    _compare(rows, rows.run(launcher))


def test_attention_takes_64_heads(launcher: AotLauncher) -> None:
    rows = _Rows.make([1, 700, 64, 2049], 1024, heads=64)
    _compare(rows, rows.run(launcher))


def test_attention_follows_a_maximum_that_keeps_rising(launcher: AotLauncher) -> None:
    rows = _Rows.make([1500, 800], 2048, sharp=4.0)
    for row, n in enumerate(rows.length.tolist()):
        at = torch.arange(n, device="cuda")
        slots = rows.table[row, at // PAGE].long() * PAGE + at % PAGE
        rows.cache[slots] *= torch.linspace(0.1, 2.0, n, device="cuda")[:, None].bfloat16()
    _compare(rows, rows.run(launcher))


@pytest.mark.parametrize("name", ["tails", "around a cut", "more items than SMs"])
def test_a_rows_bits_do_not_depend_on_its_company(name: str, launcher: AotLauncher) -> None:
    cut, lengths = LENGTHS[name]
    rows = _Rows.make(lengths, cut)
    together = rows.run(launcher).clone()
    for row in [i for i, n in enumerate(lengths) if n][:12]:
        assert torch.equal(rows.alone(row).run(launcher)[0], together[row]), row


def test_a_graph_follows_the_lengths(launcher: AotLauncher) -> None:
    rows = _Rows.make([2000, 1500, 64, 700], 1024)
    rows.run(launcher)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        rows.run(launcher)
    for lengths in ([2000, 1500, 64, 700], [1, 1025, 0, 65], [1999, 3, 17, 699]):
        rows.length.copy_(torch.tensor(lengths, dtype=torch.int32))
        rows.out.fill_(float("nan"))
        graph.replay()
        replayed = rows.out.clone()
        _compare(rows, replayed)
        assert torch.equal(rows.run(launcher), replayed)


def test_a_captured_step_is_proved_and_compiles_nothing(load: Load) -> None:
    with load("wide", attention="hopper", verify=True, proof_replays=20) as runtime:
        assert runtime.config.attention == "hopper"
        assert runtime.engine.launcher is not None
        assert runtime.engine.launcher.num_compiled == 0
        assert all(proof.replays == 21 for proof in runtime.engine.proofs.values())


@pytest.mark.parametrize("max_seq_len", [4096, 1280, 256])
def test_a_requests_bits_do_not_depend_on_company_or_ladder(max_seq_len: int, load: Load) -> None:
    """With more splits than every key merges alike, with a few, and where no row has a second."""
    rng = np.random.default_rng(5)
    lengths = (1, 37, 64, 200, 100, *([1500] if max_seq_len > 1500 else []))
    requests = make_requests(rng, lengths, 2048, (24,))
    want: list[str] = []
    for ladder in LADDERS[:2]:
        options = {"ladder": ladder, "max_seq_len": max_seq_len, "prefix_cache": False}
        with load("wide", attention="hopper", **options) as runtime:
            want = want or [a.bits for a in alone(runtime, requests)]
            assert [a.bits for a in serve(runtime, requests)] == want
            assert [a.bits for a in serve(runtime, requests[::-1])][::-1] == want
