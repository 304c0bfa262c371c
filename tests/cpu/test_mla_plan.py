"""The device plan of flashinfer's MLA: its lists, and attention done by following them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from graphs.attention import FlashinferAttention
from graphs.calls import NoLauncher
from graphs.devices import bind_views
from graphs.flashinfer_mla import FlashinferMla
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.planned_mla import MAX_SMS
from graphs.presets import PRESETS
from kernels.triton.launch import JitLauncher
from kernels.triton.mla_decode import merge
from kernels.triton.mla_plan import ITEM_ARRAYS, PlanLayout, mla_plan, mla_plan_ref
from runtime.config import RuntimeConfig
from runtime.selection import choose

LAUNCH = JitLauncher()
UNWRITTEN = -7
MAX_PAGES = 40


@dataclass
class _Step:
    row: torch.Tensor
    length: torch.Tensor
    layout: PlanLayout
    cut: int

    def plan(self, *, ref: bool = False) -> torch.Tensor:
        ws = torch.full((self.layout.words,), UNWRITTEN, dtype=torch.int32)
        kw = {"max_pages": MAX_PAGES, "cut": self.cut, "layout": self.layout, "ws": ws}
        if ref:
            mla_plan_ref(self.row, self.length, **kw)
        else:
            mla_plan(LAUNCH, self.row, self.length, **kw)
        return ws

    def items(self, ws: torch.Tensor) -> list[list[dict[str, int]]]:
        """The work of each cluster, read as flashinfer's kernel reads it."""
        lay = self.layout
        bounds = ws[lay.work_indptr : lay.work_indptr + lay.num_clusters + 1].tolist()
        assert bounds[0] == 0
        assert bounds == sorted(bounds)
        assert bounds[-1] <= lay.capacity
        return [
            [{n: int(ws[lay.array(n) + slot]) for n in ITEM_ARRAYS} for slot in range(a, b)]
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]


def _step(
    tokens: int, splits: int, cut: int, *, heads: int = 128, sms: int = 132, kind: str = "random"
) -> _Step:
    generator = torch.Generator().manual_seed(tokens)
    length = torch.randint(0, splits * cut + 1, (tokens,), generator=generator, dtype=torch.int32)
    if kind == "random":
        length[torch.rand(tokens, generator=generator) < 0.2] = 0
    else:
        length[:] = {"full": splits * cut, "empty": 0}[kind]
    row = torch.randint(0, 9, (tokens,), generator=generator, dtype=torch.int32)
    row[length == 0] = -1
    return _Step(row, length, PlanLayout(tokens, splits, heads, sms), cut)


CASES = [
    _step(1, 4, 1024),
    _step(2, 3, 64, sms=7, heads=64),
    _step(33, 8, 512),
    _step(64, 2, 1024, kind="full"),
    _step(40, 4, 512, kind="empty"),
    _step(130, 4, 1024, heads=16),
    _step(800, 4, 1024),
]


@pytest.mark.parametrize("step", CASES, ids=lambda s: f"{s.layout.tokens}x{s.layout.splits}")
def test_plan_matches_its_oracle(step: _Step) -> None:
    assert torch.equal(step.plan(), step.plan(ref=True))


@pytest.mark.parametrize("step", CASES, ids=lambda s: f"{s.layout.tokens}x{s.layout.splits}")
def test_every_split_is_listed_once(step: _Step) -> None:
    lay, cut = step.layout, step.cut
    listed = []
    for item in (i for cluster in step.items(step.plan(ref=True)) for i in cluster):
        t, split = item["q_indptr"], item["kv_start"] // cut
        length = int(step.length[t])
        listed.append((t, split))
        parts = -(-length // cut)
        assert item == {
            "q_indptr": t,
            "kv_indptr": int(step.row[t]) * MAX_PAGES,
            "partial_indptr": -1 if parts == 1 else (t * lay.splits + split) * lay.num_heads,
            "q_len": 1,
            "kv_len": length,
            "q_start": 0,
            "kv_start": split * cut,
            "kv_end": min(length, (split + 1) * cut),
        }
    lengths = enumerate(step.length.tolist())
    assert sorted(listed) == [(t, s) for t, n in lengths for s in range(-(-n // cut))]


def test_work_is_shared_evenly() -> None:
    step = _step(300, 4, 1024)
    clusters = step.items(step.plan(ref=True))
    counts = [len(c) for c in clusters]
    tiles = [sum(-(-(i["kv_end"] - i["kv_start"]) // 64) for i in c) for c in clusters]
    assert max(counts) - min(counts) <= 1
    assert max(tiles) <= 1.15 * sum(tiles) / len(tiles)


def test_merge_lists_are_empty() -> None:
    step = CASES[2]
    lay, ws = step.layout, step.plan()
    assert (ws[lay.merge : lay.merge + lay.num_sms] == 0).all()
    info = lay.plan_info(1234)
    assert len(info) == 18
    assert info[:2] == [2, 66]
    assert info[5:10] == [lay.merge * 4] * 5
    assert info[16:] == [0, 1234]
    assert all(offset % 16 == 0 for offset in info[2:16])


def test_attention_by_the_plan_is_attention() -> None:
    """Do what flashinfer's kernel does with the lists, then merge; it must be a plain softmax."""
    torch.manual_seed(0)
    heads, dim, page, cut, splits = 3, 24, 16, 64, 3
    length = torch.tensor([0, 1, 64, 65, 130, 192, 100], dtype=torch.int32)
    row = torch.tensor([-1, 2, 0, 1, 3, 2, 3], dtype=torch.int32)
    step = _Step(row, length, PlanLayout(7, splits, heads, 5), cut)
    table = torch.randperm(4 * MAX_PAGES).view(4, MAX_PAGES)
    kv, q = torch.randn(4 * MAX_PAGES * page, dim), torch.randn(7, heads, dim)

    def keys(pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        at = torch.arange(begin, end)
        return kv[pages[at // page] * page + at % page]

    out = torch.full((7, heads, dim), float("nan"))
    part_o = torch.full((7 * splits * heads, dim), float("nan"), dtype=torch.bfloat16)
    part_lse = torch.full((7 * splits * heads,), float("nan"))
    for item in (i for cluster in step.items(step.plan()) for i in cluster):
        k = keys(table.flatten()[item["kv_indptr"] :], item["kv_start"], item["kv_end"])
        score = q[item["q_indptr"]] @ k.T
        o, part = torch.softmax(score, -1) @ k, item["partial_indptr"]
        if part < 0:
            out[item["q_indptr"]] = o
        else:
            part_o[part : part + heads] = o
            part_lse[part : part + heads] = torch.logsumexp(score, -1) / 0.6931471805599453
    shape = (7, splits, heads)
    merge(LAUNCH, length, part_o.view(*shape, dim), part_lse.view(shape), cut=cut, out=out)
    for t, n in enumerate(length.tolist()):
        k = keys(table[row[t]], 0, n)
        want = torch.softmax(q[t] @ k.T, -1) @ k if n else torch.zeros(heads, dim)
        torch.testing.assert_close(out[t], want, rtol=2**-7, atol=2**-6)


def test_workspace_holds_the_plan_of_any_chip() -> None:
    for heads in (16, 128):
        buffers = {name: shape for name, shape, _ in FlashinferMla.workspace(100, heads, 4)}
        assert buffers["part_o"] == (100, 4, heads, 512)
        for sms in (78, 114, 132, MAX_SMS):
            assert PlanLayout(100, 4, heads, sms).words <= buffers["mla_plan"][0]


@pytest.mark.parametrize("splits", [1, 4])
def test_on_meta_tensors_only_our_kernels_are_launched(splits: int) -> None:
    """And the merge only where a row can have two splits."""
    launched: list[str] = []

    class Lister:
        num_sms = 132
        pdl = 0

        def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kw: Any) -> None:
            launched.append(kernel.fn.__name__)

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    i32 = torch.int32
    mla = FlashinferMla(num_heads=128, page_size=64, softmax_scale=1.0, cut=1024)
    buffers = {
        name: meta(*shape, dtype=getattr(torch, dtype))
        for name, shape, dtype in FlashinferMla.workspace(8, 128, splits)
    }
    table, length, part_o = meta(8, 64, dtype=i32), meta(8, dtype=i32), buffers["part_o"]
    mla.plan(Lister(), length, length, page_table=table, ws=buffers["mla_plan"], part_o=part_o)
    mla.run(
        *(Lister(), meta(8, 128, 576), meta(640, 576), table, length),
        ws=buffers["mla_plan"],
        part_o=part_o,
        part_lse=buffers["part_lse"],
        out=meta(8, 128, 512),
    )
    assert launched == ["_mla_plan", *(["_merge"] if splits > 1 else [])]


@pytest.mark.parametrize(
    ("rows", "cut", "left"),
    [
        *((8, cut, cut < 4096) for cut in (4096, 2048, 1024, 512, 128)),
        *((16, cut, 512 < cut < 4096) for cut in (4096, 2048, 1024, 512, 128)),
        (1, 64, False),
    ],
)
def test_a_few_splits_are_left_to_who_reads_them(rows: int, cut: int, left: bool) -> None:
    """One split is none; more than `absorb_v` merges are merged by a kernel of their own."""
    launched: list[str] = []

    class Lister(NoLauncher):
        num_sms = 132

        def __call__(self, kernel: Any, *_: Any, **__: Any) -> None:
            launched.append(kernel.fn.__name__)

    chosen = {"model": "deepseek-v3", "layers": 1, "attention": "auto"}
    chosen |= {"bs": rows, "ladder": str(rows)}
    selection = choose(RuntimeConfig.of(**chosen), compile_only=True)
    step = replace(selection.step, attention="flashinfer", cut=cut)
    views = bind_views(None, replace(selection, step=step).layout, torch.device("meta"))
    attention = FlashinferAttention(selection.model, step, Ops(Lister()))
    parts = attention.run(views, views["kv.0"])
    assert (parts is not None) == left
    assert launched == ([] if left or cut == 4096 else ["_merge"])
    if parts is not None:
        assert (parts.o.shape[1], parts.cut) == (4096 // cut, cut)


def test_more_heads_than_a_query_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 … 128, got 129"):
        PlanLayout(1, 1, 129, 132)
    with pytest.raises(ValueError, match="cuts in multiples of 64, got 128 and 96"):
        FlashinferMla(num_heads=128, page_size=64, softmax_scale=1.0, cut=96)


@pytest.mark.parametrize(
    ("preset", "override", "reason"),
    [
        ("tiny", {}, "a latent of 512 and a rotary part of 64"),
        ("deepseek-v3", {"num_attention_heads": 256}, "at most 128 heads a token, not 256"),
        ("deepseek-v3", {"dtype": "float16"}, "bfloat16, not float16"),
    ],
)
def test_a_model_that_does_not_fit_is_told_why(
    preset: str, override: dict[str, Any], reason: str
) -> None:
    model = ModelConfig.from_hf(PRESETS[preset], overrides=override)
    usable, why = FlashinferMla.available(model)
    assert not usable
    assert reason in why
