"""Router, alignment of pairs to experts, and the weighted sum, kernel against oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.triton import expert_lists, expert_sum, routing
from kernels.triton.launch import JitLauncher, Launcher
from tests.cpu.test_kernels_linear import compile_for_both, compiled, meta

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
NAN = float("nan")
LAUNCH = JitLauncher()

# experts, groups, kept groups, top_k: V3, K2, Moonlight, odd groups, groups of two and of one, all
ROUTERS = [
    (256, 8, 4, 8),
    (384, 1, 1, 8),
    (64, 1, 1, 6),
    (60, 6, 3, 5),
    (12, 6, 4, 8),
    (7, 7, 3, 2),
    (5, 1, 1, 5),
]


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _route(
    fn: Any,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    router: tuple[int, int, int, int],
    tok_row: torch.Tensor | None = None,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, top_k = logits.shape[-2], router[3]
    ids = torch.full((rows, top_k), 99, dtype=I32)
    weights = torch.full((rows, top_k), 99.0)
    fn(
        logits,
        bias,
        torch.arange(rows, dtype=I32) if tok_row is None else tok_row,
        num_groups=router[1],
        topk_groups=router[2],
        top_k=top_k,
        normalize=normalize,
        scaling=2.5,
        out_ids=ids,
        out_weights=weights,
    )
    return ids, weights


def _kernel(*args: Any, **kwargs: Any) -> None:
    routing.route(LAUNCH, *args, **kwargs)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_route(router: tuple[int, int, int, int], normalize: bool, with_bias: bool) -> None:
    logits = _rand(4, router[0] + 3)[:, : router[0]]
    bias = _rand(router[0], seed=1) if with_bias else None
    tok_row = torch.tensor([5, -1, 0, 2], dtype=I32)
    ids, weights = _route(_kernel, logits, bias, router, tok_row, normalize)
    want_ids, want_weights = _route(routing.route_ref, logits, bias, router, tok_row, normalize)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-7)
    assert (ids[1] == -1).all()
    assert (weights[1] == 0).all()


# transformers takes two choices a group, so it has no groups of one.
@pytest.mark.parametrize("router", [r for r in ROUTERS if r[0] > r[1]], ids=str)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_route_ref_is_the_published_one(router: tuple[int, int, int, int], shift: float) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=router[0],
        n_group=router[1],
        topk_group=router[2],
        num_experts_per_tok=router[3],
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    oracle = DeepseekV3TopkRouter(config)
    oracle.weight.data = _rand(router[0], 16, seed=1)
    oracle.e_score_correction_bias = _rand(router[0], seed=2) + shift  # choices may be negative
    with torch.no_grad():
        logits, want_weights, want_ids = oracle(_rand(64, 16))
    ids, weights = _route(routing.route_ref, logits, oracle.e_score_correction_bias, router)
    order, want_order = ids.argsort(1), want_ids.argsort(1)
    assert torch.equal(ids.gather(1, order).long(), want_ids.gather(1, want_order))
    torch.testing.assert_close(weights.gather(1, order), want_weights.gather(1, want_order))


@pytest.mark.parametrize("fn", [_kernel, routing.route_ref])
def test_route_ties_go_to_the_lower_index(fn: Any) -> None:
    logits = torch.zeros(2, 16)
    logits[1, [15, 9, 8]] = 40.0  # all saturate to a score of 1
    ids, weights = _route(fn, logits, None, (16, 4, 2, 4))
    assert ids.tolist() == [[0, 1, 2, 3], [8, 9, 15, 10]]
    torch.testing.assert_close(weights[0], torch.full((4,), 2.5 / 4))


@pytest.mark.parametrize("fn", [_kernel, routing.route_ref])
@pytest.mark.parametrize("router", [(256, 8, 4, 8), (60, 6, 3, 5), (5, 1, 1, 5)], ids=str)
def test_route_of_nan_stays_in_range(fn: Any, router: tuple[int, int, int, int]) -> None:
    clean = _rand(6, router[0])
    logits = clean.clone()
    logits[1] = NAN
    logits[2, router[0] - 1] = NAN
    logits[3] = float("inf")
    logits[4] = float("-inf")
    ids, weights = _route(fn, logits, None, router)
    assert ((ids >= 0) & (ids < router[0])).all()
    assert all(len(set(row.tolist())) == router[3] for row in ids)
    assert weights[[1, 2]].isnan().all()
    assert not weights[[0, 3, 4, 5]].isnan().any()
    assert not _route(fn, logits, None, router, normalize=False)[1][2].isfinite().all()
    for got, alone in zip((ids, weights), _route(fn, clean, None, router), strict=True):
        assert torch.equal(got[[0, 5]], alone[[0, 5]])


@pytest.mark.parametrize("fn", [_kernel, routing.route_ref])
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000])  # either sign
def test_route_of_a_nan_choice_takes_it_first(fn: Any, bits: int) -> None:
    bias = torch.zeros(16)
    bias[9] = torch.tensor(bits, dtype=I32).view(F32)
    assert bias[9].isnan()
    ids, _ = _route(fn, _rand(3, 16), bias, (16, 4, 2, 4))
    assert (ids[:, 0] == 9).all()


@pytest.mark.parametrize("fn", [_kernel, routing.route_ref])
def test_every_real_token_also_goes_to_the_shared_expert(fn: Any) -> None:
    logits, row = _rand(4, 16), torch.tensor([0, -1, 1, 2], dtype=I32)
    options = {"num_groups": 4, "topk_groups": 2, "normalize": True, "scaling": 2.5, "top_k": 4}
    ids, weights = torch.zeros(4, 4, dtype=I32), torch.zeros(4, 4)
    fn(logits, None, row, **options, out_ids=ids, out_weights=weights)
    more, scaled = torch.zeros(4, 5, dtype=I32), torch.zeros(4, 5)
    fn(logits, None, row, **options, shared_id=16, out_ids=more, out_weights=scaled)
    assert torch.equal(more[:, :4], ids)
    assert torch.equal(scaled[:, :4], weights)
    assert more[:, 4].tolist() == [16, -1, 16, 16]
    assert scaled[:, 4].tolist() == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"out_ids must be \[4, 5\]"):
        fn(logits, None, row, **options, shared_id=16, out_ids=ids, out_weights=weights)


def test_route_rows_are_independent() -> None:
    logits, bias, router = _rand(5, 64), _rand(64), (64, 8, 3, 6)
    ids, weights = _route(_kernel, logits, bias, router)
    for t in range(5):
        one_ids, one_weights = _route(_kernel, logits[t : t + 1], bias, router)
        assert torch.equal(ids[t], one_ids[0])
        assert torch.equal(weights[t], one_weights[0])


@pytest.mark.parametrize("parts", [1, 2, 7, 112])
@pytest.mark.parametrize("router", [(32, 8, 4, 8), (60, 6, 3, 5), (300, 1, 1, 8)], ids=str)
def test_route_adds_up_what_the_router_left_in_parts(
    parts: int, router: tuple[int, int, int, int]
) -> None:
    # Eighths: every order of additions gives the same sum.
    split = (_rand(parts, 5, router[0]) * 8).round() / 8
    bias, row = _rand(router[0], seed=1), torch.tensor([0, 1, -1, 3, 4], dtype=I32)
    want = _route(_kernel, split.sum(0), bias, router, row)
    for fn in (_kernel, routing.route_ref):
        ids, weights = _route(fn, split, bias, router, row)
        assert torch.equal(ids, want[0])
        torch.testing.assert_close(weights, want[1], rtol=1e-5, atol=1e-7)
    for t in (0, 4):  # whatever the tokens beside it
        alone = _route(_kernel, split[:, t : t + 1].contiguous(), bias, router)
        assert torch.equal(alone[0][0], want[0][t])
        assert torch.equal(alone[1][0], _route(_kernel, split, bias, router)[1][t])


@pytest.mark.parametrize(
    ("router", "match"),
    [((10, 3, 1, 1), "must divide"), ((8, 4, 5, 1), "must divide"), ((8, 4, 2, 5), "1 to 4")],
)
def test_route_refuses_impossible_counts(router: tuple[int, int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _route(_kernel, _rand(1, router[0]), None, router)


def _align(fn: Any, ids: torch.Tensor, start: int, local: int) -> tuple[list[int], torch.Tensor]:
    offsets = torch.full((local + 1,), -7, dtype=I32)
    pairs = torch.full((ids.numel() + 3,), -7, dtype=I32)
    ready = torch.full((local + 1,), 5, dtype=I32)
    fn(ids, expert_start=start, offsets=offsets, pairs=pairs, ready=ready[:-1])
    assert ready.tolist() == [0] * local + [5]
    return offsets.tolist(), pairs


def _align_kernel(*args: Any, **kwargs: Any) -> None:
    expert_lists.align(LAUNCH, *args, **kwargs)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "start", "local"),
    [(1, 1, 4, 0, 4), (1, 8, 16, 4, 4), (16, 8, 32, 0, 32), (43, 3, 9, 3, 6), (300, 8, 5, 1, 3)],
)
def test_align(tokens: int, top_k: int, experts: int, start: int, local: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=g, dtype=I32)
    offsets, pairs = _align(_align_kernel, ids, start, local)
    want_offsets, want_pairs = _align(expert_lists.align_ref, ids, start, local)
    assert offsets == want_offsets
    assert torch.equal(pairs, want_pairs)
    flat = ids.flatten()
    for e in range(local):
        mine = pairs[offsets[e] : offsets[e + 1]].tolist()
        assert mine == (flat == start + e).nonzero().flatten().tolist()
    assert (pairs[offsets[-1] :] == -7).all()


@pytest.mark.parametrize("fn", [_align_kernel, expert_lists.align_ref])
def test_align_one_expert_gets_all_or_nobody_any(fn: Any) -> None:
    ids = torch.full((40, 8), 2, dtype=I32)
    offsets, pairs = _align(fn, ids, 0, 4)
    assert offsets == [0, 0, 0, 320, 320]
    assert pairs[:320].tolist() == list(range(320))
    offsets, pairs = _align(fn, torch.full((40, 8), -1, dtype=I32), 0, 4)
    assert offsets == [0] * 5
    assert (pairs == -7).all()


def _combine_kernel(*args: Any, **kwargs: Any) -> None:
    expert_sum.combine(LAUNCH, *args, **kwargs)


@pytest.mark.parametrize("width", [1, 511, 512, 513])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("with_shared", [False, True])
def test_combine(width: int, dtype: torch.dtype, with_shared: bool) -> None:
    ids = torch.tensor([[4, -1, 2], [-1, -1, -1], [0, 1, 2]], dtype=I32)
    y, weights = _rand(9, width).to(dtype), _rand(3, 3)
    y[ids.flatten() < 0] = NAN  # never read
    weights[1] = NAN
    shared = _rand(3, width, seed=3).to(dtype) if with_shared else None
    wide = torch.full((3, width + 2), 7.0, dtype=dtype)
    want = torch.empty(3, width, dtype=dtype)
    _combine_kernel(y, ids, weights, shared, out=wide[:, :width])
    expert_sum.combine_ref(y, ids, weights, shared, out=want)
    # The interpreter truncates to bf16 where the hardware rounds: one step.
    step = {F32: 1e-5, F16: 2**-10, BF16: 2**-7}[dtype]
    torch.testing.assert_close(wide[:, :width], want, rtol=step, atol=1e-6)
    assert (wide[:, width:] == 7).all()
    assert torch.equal(want[1], torch.zeros(width).to(dtype) if shared is None else shared[1])


def test_combine_rounds_once() -> None:
    y = torch.tensor([[1.0], [2.0**-9], [2.0**-9]]).to(BF16)
    out = torch.empty(1, 1, dtype=BF16)
    ids, weights = torch.zeros(1, 3, dtype=I32), torch.ones(1, 3)
    shared = torch.tensor([[2.0**-8]]).to(BF16)
    for fn in (_combine_kernel, expert_sum.combine_ref):
        fn(y, ids, weights, shared, out=out)
        assert out.item() == 1 + 2.0**-7  # each addend alone would have been rounded away


def test_combine_rows_are_independent() -> None:
    ids = torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(0), dtype=I32)
    y, weights, shared = _rand(20, 70), _rand(5, 4), _rand(5, 70)
    out, one = torch.empty(5, 70), torch.empty(1, 70)
    _combine_kernel(y, ids, weights, shared, out=out)
    for t in range(5):
        at = slice(t, t + 1)
        _combine_kernel(y[4 * t : 4 * t + 4], ids[at], weights[at], shared[at], out=one)
        assert torch.equal(out[at], one)


def test_wrong_shapes_are_named() -> None:
    ids = torch.zeros(2, 4, dtype=I32)
    with pytest.raises(ValueError, match="pairs hold 8"):
        expert_lists.align(LAUNCH, ids, expert_start=0, offsets=ids[0], pairs=ids[0])
    with pytest.raises(ValueError, match=r"\(8, 5\)"):
        expert_sum.combine(LAUNCH, _rand(7, 5), ids, _rand(2, 4), None, out=_rand(2, 5))


def test_real_shapes_compile_without_spills() -> None:
    built = compiled("tests.cpu.test_kernels_routing")
    assert {b["arch"] for b in built} == {90, 100}
    # On sm_100 two registers go to memory; the kernels are tuned for sm_90.
    stack = {90: 0, 100: 16}
    assert not [b for b in built if b["stack_bytes"] > stack[b["arch"]]]


def _real_shapes(launch: Launcher) -> None:
    """Of one rank with 32 experts and a shared one, of all ranks, and of Kimi-K2."""
    for experts, groups, kept, rows in (
        *((32, 8, 4, t) for t in (1, 32, 64, 128)),
        *((256, 8, 4, t) for t in (1, 8, 128)),
        (384, 1, 1, 32),
    ):
        routing.route(
            launch,
            meta(56, rows, experts),
            meta(experts),
            meta(rows, dtype=I32),
            **{"num_groups": groups, "topk_groups": kept, "top_k": 8},
            **{"normalize": True, "scaling": 2.5, "shared_id": experts},
            out_ids=meta(rows, 9, dtype=I32),
            out_weights=meta(rows, 9),
        )


if __name__ == "__main__":
    compile_for_both(_real_shapes)
