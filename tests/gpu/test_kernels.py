"""Each kernel family on the device at DeepSeek-V3's shapes: against its oracle, then in a graph.

Inputs are made on the CPU, where the oracle runs. The same launch is then captured, its inputs are
overwritten in place, and the replay must give the bits of an eager launch on the new inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.triton import (
    activation,
    grouped,
    linear,
    mla_absorb,
    mla_decode,
    mla_plan,
    mla_prep,
    mla_query,
    norm,
    random_init,
    router,
    routing,
    sample,
    settle,
)
from kernels.triton.launch import Launcher
from kernels.triton.tiles import sum_parts
from tests.row_state import Device, random_steps

DEVICE = "cuda"
BF16, F32, FP8, I32 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32
# DeepSeek-V3; the vocabulary is an eighth of its own.
HIDDEN, HEADS, Q_LORA, NOPE, ROPE, VALUE, LATENT = 7168, 128, 1536, 128, 64, 128, 512
EXPERTS, GROUPS, KEPT, TOP_K, INTER, VOCAB = 256, 8, 4, 8, 2048, 16160
LOCAL_EXPERTS, PAGE, CUT = 5, 64, 1024
TOKENS = (1, 5, 40)
PADDED = 2  # this token of a step is padding

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        make: arguments by name, from a seed and a number of tokens; tensors on the CPU.
        outputs: name -> largest difference, relative to the value and to the root mean square; 0 is
            equal. e4m3 outputs may differ by one step in one element of fifty.
    """

    kernel: Callable[..., None]
    ref: Callable[..., None]
    make: Callable[[int, int], Arguments]
    outputs: dict[str, float]


def randn(seed: int, *shape: int, dtype: torch.dtype = BF16, std: float = 1.0) -> torch.Tensor:
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def ids(seed: int, high: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, dtype=I32)


def fp8_rows(seed: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(rows, -(-cols // 128), generator=generator) + 0.5
    return randn(seed, rows, cols, dtype=FP8), scale


@functools.cache  # hundreds of megabytes, never written
def weight(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return randn(5, *shape, dtype=dtype, std=shape[-1] ** -0.5)


@functools.cache
def fp8_weight(seed: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = (torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) + 0.5) / cols**0.5
    return randn(seed, rows, cols, dtype=FP8), scale


def tok_row(tokens: int) -> torch.Tensor:
    rows = torch.arange(tokens, dtype=I32)
    rows[PADDED : PADDED + 1] = -1
    return rows


def quantised(tokens: int, width: int) -> Arguments:
    return {
        "out_q": torch.zeros(tokens, width).to(FP8),
        "out_scale": torch.zeros(tokens, -(-width // 128)),
    }


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# ------------------------------------------------------------------ arguments


def embed(seed: int, tokens: int) -> Arguments:
    tok_id = ids(seed, 1000, tokens)
    tok_id[PADDED : PADDED + 1] = -1
    table, poison = randn(1, 1000, HIDDEN), torch.zeros(1, dtype=I32)
    return {"tok_id": tok_id, "table": table, "poison": poison, "out": zeros(tokens, HIDDEN)}


def add_rmsnorm(seed: int, tokens: int) -> Arguments:
    x, delta = randn(seed, tokens, HIDDEN), randn(seed + 1, tokens, HIDDEN)
    out = {"out": zeros(tokens, HIDDEN), **quantised(tokens, HIDDEN)}
    return {"x": x, "delta": delta, "weight": randn(3, HIDDEN), "eps": 1e-6, **out}


def gather(seed: int, tokens: int) -> Arguments:
    x, delta = randn(seed, tokens + 3, HIDDEN), randn(seed + 1, tokens + 3, HIDDEN)
    index = torch.arange(tokens, dtype=I32).flip(0)
    index[PADDED : PADDED + 1] = -1
    more = {"weight": randn(3, HIDDEN), "eps": 1e-6, "out": zeros(tokens, HIDDEN)}
    return {"x": x, "delta": delta, "index": index, **more}


def quantize(seed: int, tokens: int) -> Arguments:
    return {"x": randn(seed, tokens, HIDDEN), **quantised(tokens, HIDDEN)}


def silu_mul(seed: int, tokens: int) -> Arguments:
    gate_up = randn(seed, tokens, 2 * INTER)
    return {"gate_up": gate_up, "out": zeros(tokens, INTER), **quantised(tokens, INTER)}


def plain_linear(n: int, k: int, dtype: torch.dtype) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        return {
            "x": randn(seed, tokens, k),
            "w": weight(n, k, dtype=dtype),
            "out": zeros(tokens, n, dtype=F32),
            "workspace": zeros(
                max(1, linear.linear_workspace_elems(tokens, n, k, elem_bytes=dtype.itemsize)),
                dtype=F32,
            ),
        }

    return make


def fp8_linear(n: int, k: int) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        xq, xs = fp8_rows(seed, tokens, k)
        w, ws = fp8_weight(5, n, k)
        elems = linear.linear_workspace_elems(tokens, n, k, elem_bytes=1)
        more = {"out": zeros(tokens, n), "workspace": zeros(max(1, elems), dtype=F32)}
        return {"xq": xq, "xs": xs, "w": w, "ws": ws, **more}

    return make


def prep(seed: int, tokens: int) -> Arguments:
    slots = torch.arange(tokens, dtype=torch.int64) * 3 + 70
    return {
        "qkv": randn(seed, tokens, Q_LORA + LATENT + ROPE),
        "tok_row": tok_row(tokens),
        "tok_pos": ids(seed, 500, tokens),
        "kv_slot": slots,
        "rope_table": randn(2, 500, ROPE, dtype=F32),
        "q_norm_weight": randn(3, Q_LORA),
        "kv_norm_weight": randn(4, LATENT),
        "eps": 1e-6,
        "kv_start": Q_LORA,
        "interleave": True,
        "kv_cache": zeros(256, LATENT + ROPE),
        "out": zeros(tokens, Q_LORA),
        **quantised(tokens, Q_LORA),
    }


def absorb_q(seed: int, tokens: int) -> Arguments:
    return {
        "q": randn(seed, tokens, HEADS * (NOPE + ROPE)),
        "w_uk": randn(3, HEADS, NOPE, LATENT, std=NOPE**-0.5),
        "tok_pos": ids(seed, 500, tokens),
        "tok_row": tok_row(tokens),
        "rope_table": randn(2, 500, ROPE, dtype=F32),
        "interleave": True,
        "out": zeros(tokens, HEADS, LATENT + ROPE),
    }


def latent_query(seed: int, tokens: int) -> Arguments:
    xq, xs = fp8_rows(seed, tokens, Q_LORA)
    w, ws = fp8_weight(7, HEADS * (NOPE + ROPE), Q_LORA)
    rest = {k: v for k, v in absorb_q(seed, tokens).items() if k != "q"}
    return {"xq": xq, "xs": xs, "w": w, "ws": ws, **rest}


def norm_of_parts(seed: int, tokens: int) -> Arguments:
    return add_rmsnorm(seed, tokens) | {"delta": randn(seed, 3, tokens, HIDDEN, dtype=F32)}


def norm_of_experts(seed: int, tokens: int) -> Arguments:
    # The same for every seed: a replay overwrites tensors, not the tuple of them.
    ids, weights = torch.ones(tokens, 3, dtype=I32), randn(11, tokens, 3, dtype=F32)
    ids[PADDED : PADDED + 1] = -1
    delta = randn(seed, 3 * tokens, HIDDEN)
    return add_rmsnorm(seed, tokens) | {"delta": delta, "choices": (ids, weights)}


def absorb_v(seed: int, tokens: int) -> Arguments:
    o_latent, kv_len = randn(seed, tokens, HEADS, LATENT), ids(seed, 500, tokens) + 1
    kv_len[PADDED : PADDED + 1] = 0
    o_latent[kv_len == 0] = float("nan")
    w_uv = randn(3, HEADS, VALUE, LATENT, std=LATENT**-0.5)
    out = zeros(tokens, HEADS * VALUE)
    return {"o_latent": o_latent, "kv_len": kv_len, "w_uv": w_uv, "out": out}


def decode(seed: int, tokens: int) -> Arguments:
    """Lengths around pages and splits; two pages of every row are shared by nobody."""
    lengths = torch.tensor([1, 63, 0, 64, 65, 1023, 1024, 1025, 2100])[:tokens].to(I32)
    tokens, width = len(lengths), LATENT + ROPE
    pages = -(-2112 // PAGE)
    order = torch.randperm(tokens * pages, generator=torch.Generator().manual_seed(seed))
    splits = mla_decode.num_splits(pages * PAGE, CUT)
    return {
        "q": randn(seed, tokens, HEADS, width, std=0.5),
        "kv_cache": randn(seed + 1, (tokens * pages + 1) * PAGE, width, std=0.5),
        "page_table": (order + 1).to(I32).view(tokens, pages),
        "tok_row": torch.where(lengths > 0, torch.arange(tokens), -1).to(I32),
        "kv_len": lengths.clone(),
        "page_size": PAGE,
        "softmax_scale": (NOPE + ROPE) ** -0.5,
        "cut": CUT,
        "out": zeros(tokens, HEADS, LATENT),
        "part_o": zeros(tokens, splits, HEADS, LATENT, dtype=F32),
        "part_lse": zeros(tokens, splits, HEADS, dtype=F32),
    }


def plan(seed: int, tokens: int) -> Arguments:
    layout = mla_plan.PlanLayout(tokens, 3, HEADS, 132)
    kv_len = ids(seed, 3 * CUT, tokens)
    return {
        "tok_row": torch.where(kv_len > 0, torch.arange(tokens), -1).to(I32),
        "kv_len": kv_len,
        "max_pages": 3 * CUT // PAGE,
        "cut": CUT,
        "layout": layout,
        "ws": torch.zeros(layout.words, dtype=I32),
    }


def route(seed: int, tokens: int) -> Arguments:
    return {
        "logits": randn(seed, tokens, EXPERTS, dtype=F32),
        "bias": randn(3, EXPERTS, dtype=F32, std=0.1),
        "tok_row": tok_row(tokens),
        "num_groups": GROUPS,
        "topk_groups": KEPT,
        "top_k": TOP_K,
        "normalize": True,
        "scaling": 2.5,
        "out_ids": zeros(tokens, TOP_K, dtype=I32),
        "out_weights": zeros(tokens, TOP_K, dtype=F32),
    }


def align(seed: int, tokens: int) -> Arguments:
    chosen = ids(seed, EXPERTS, tokens, TOP_K)
    chosen[PADDED : PADDED + 1] = -1
    # What lies behind the listed pairs is not written; both start from the same.
    return {
        "ids": chosen,
        "expert_start": 0,
        "offsets": zeros(EXPERTS + 1, dtype=I32),
        "pairs": zeros(tokens * TOP_K, dtype=I32),
    }


def route_of_parts(seed: int, tokens: int) -> Arguments:
    parts = router.router_parts(EXPERTS, HIDDEN)
    # Sixteenths, so that every order of additions gives the same sum.
    logits = (randn(seed, parts, tokens, EXPERTS, dtype=F32, std=0.3) * 16).round() / 16
    return route(seed, tokens) | {"logits": logits}


def combine(seed: int, tokens: int) -> Arguments:
    chosen = ids(seed, EXPERTS, tokens, TOP_K)
    chosen[PADDED : PADDED + 1] = -1
    return {
        "y": randn(seed, tokens * TOP_K, HIDDEN),
        "ids": chosen,
        "weights": randn(seed, tokens, TOP_K, dtype=F32),
        "shared": randn(seed + 1, tokens, HIDDEN),
        "out": zeros(tokens, HIDDEN),
    }


def listed(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and pairs of a random routing to the local experts; some get none."""
    chosen = align(seed, tokens)
    chosen["ids"] %= LOCAL_EXPERTS - 1
    chosen["ids"][PADDED : PADDED + 1] = -1
    chosen["offsets"] = zeros(LOCAL_EXPERTS + 1, dtype=I32)
    routing.align_ref(**chosen)
    return chosen["offsets"], chosen["pairs"]


def gate_up(fp8: bool) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        offsets, pairs = listed(seed, tokens)
        common = {"offsets": offsets, "pairs": pairs, "top_k": TOP_K}
        count = tokens * TOP_K
        if not fp8:
            w = weight(LOCAL_EXPERTS, 2 * INTER, HIDDEN)
            x = {"x": randn(seed, tokens, HIDDEN), "x_scale": None, "w": w, "w_scale": None}
            return x | common | {"out": zeros(count, INTER), "out_scale": None}
        x, x_scale = fp8_rows(seed, tokens, HIDDEN)
        w, w_scale = fp8_weight(5, LOCAL_EXPERTS * 2 * INTER, HIDDEN)
        w = w.view(LOCAL_EXPERTS, 2 * INTER, HIDDEN)
        w_scale = w_scale.view(LOCAL_EXPERTS, -1, HIDDEN // 128)
        out = quantised(count, INTER)
        given = {"x": x, "x_scale": x_scale, "w": w, "w_scale": w_scale}
        return given | common | {"out": out["out_q"], "out_scale": out["out_scale"]}

    return make


def down(fp8: bool) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        offsets, pairs = listed(seed, tokens)
        count = tokens * TOP_K
        common = {"offsets": offsets, "pairs": pairs, "out": zeros(count, HIDDEN)}
        if not fp8:
            w = weight(LOCAL_EXPERTS, HIDDEN, INTER)
            given = {"h": randn(seed, count, INTER), "h_scale": None, "w": w, "w_scale": None}
            return given | common
        h, h_scale = fp8_rows(seed, count, INTER)
        w, w_scale = fp8_weight(5, LOCAL_EXPERTS * HIDDEN, INTER)
        w = w.view(LOCAL_EXPERTS, HIDDEN, INTER)
        w_scale = w_scale.view(LOCAL_EXPERTS, HIDDEN // 128, -1)
        return {"h": h, "h_scale": h_scale, "w": w, "w_scale": w_scale} | common

    return make


def greedy(seed: int, tokens: int) -> Arguments:
    logits = randn(seed, tokens, VOCAB, dtype=F32, std=4.0)
    if tokens > 3:
        logits[3, 17] = float("nan")
    sampled = torch.arange(tokens, dtype=I32)
    sampled[PADDED : PADDED + 1] = -1
    parts = {
        name: zeros(tokens, sample.num_chunks(VOCAB), dtype=dtype)
        for name, dtype in (("part_max", F32), ("part_arg", I32), ("part_sum", F32))
    }
    out = {"out_token": zeros(tokens, dtype=I32), "out_logprob": zeros(tokens, dtype=F32)}
    return {"logits": logits, "sample_tok": sampled, **parts, **out}


def fill(dtype: torch.dtype) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        return {"out": zeros(tokens, HIDDEN, dtype=dtype), "seed": 7, "scale": 0.5, "offset": 3}

    return make


CASES: dict[str, Case] = {
    "embed": Case(norm.embed, norm.embed_ref, embed, {"out": 0}),
    "add_rmsnorm": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, add_rmsnorm,
        {"x": 0, "out": 2**-7, "out_scale": 2**-7, "out_q": 2**-3},
    ),
    "gather_add_rmsnorm": Case(
        norm.gather_add_rmsnorm, norm.gather_add_rmsnorm_ref, gather, {"out": 2**-7}
    ),
    "norm_of_parts": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, norm_of_parts,
        {"x": 2**-7, "out": 2**-6, "out_scale": 2**-6, "out_q": 2**-3},
    ),
    "norm_of_experts": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, norm_of_experts,
        {"x": 2**-7, "out": 2**-6, "out_scale": 2**-6, "out_q": 2**-3},
    ),
    # The query is rounded to bf16 between the two products.
    "latent_query": Case(
        mla_query.latent_query, mla_query.latent_query_ref, latent_query, {"out": 2**-6}
    ),
    "quantize": Case(
        activation.quantize, activation.quantize_ref, quantize,
        {"out_scale": 1e-6, "out_q": 2**-3},
    ),
    "silu_mul": Case(
        activation.silu_mul, activation.silu_mul_ref, silu_mul,
        {"out": 2**-7, "out_scale": 1e-5, "out_q": 2**-3},
    ),
    "linear": Case(
        linear.linear, linear.linear_ref, plain_linear(VOCAB, HIDDEN, BF16), {"out": 1e-3}
    ),
    "linear_router": Case(
        linear.linear, linear.linear_ref, plain_linear(EXPERTS, HIDDEN, F32), {"out": 1e-5}
    ),
    "linear_fp8_qkv_a": Case(
        linear.linear_fp8, linear.linear_fp8_ref,
        fp8_linear(Q_LORA + LATENT + ROPE, HIDDEN), {"out": 2**-7},
    ),
    "linear_fp8_q_b": Case(
        linear.linear_fp8, linear.linear_fp8_ref,
        fp8_linear(HEADS * (NOPE + ROPE), Q_LORA), {"out": 2**-7},
    ),
    "mla_prep": Case(
        mla_prep.mla_prep, mla_prep.mla_prep_ref, prep,
        {"kv_cache": 2**-7, "out": 2**-7, "out_scale": 2**-7, "out_q": 2**-3},
    ),
    "absorb_q": Case(mla_absorb.absorb_q, mla_absorb.absorb_q_ref, absorb_q, {"out": 2**-7}),
    "absorb_v": Case(mla_absorb.absorb_v, mla_absorb.absorb_v_ref, absorb_v, {"out": 2**-7}),
    # Probabilities are rounded to bf16 before they meet the values.
    "mla_decode": Case(mla_decode.mla_decode, mla_decode.mla_decode_ref, decode, {"out": 2**-6}),
    "mla_plan": Case(mla_plan.mla_plan, mla_plan.mla_plan_ref, plan, {"ws": 0}),
    "route": Case(routing.route, routing.route_ref, route, {"out_ids": 0, "out_weights": 1e-5}),
    "route_of_parts": Case(
        routing.route, routing.route_ref, route_of_parts, {"out_ids": 0, "out_weights": 1e-5}
    ),
    "align": Case(routing.align, routing.align_ref, align, {"offsets": 0, "pairs": 0}),
    "combine": Case(routing.combine, routing.combine_ref, combine, {"out": 2**-7}),
    "grouped_gate_up": Case(
        grouped.grouped_gate_up, grouped.grouped_gate_up_ref, gate_up(False), {"out": 2**-7}
    ),
    "grouped_gate_up_fp8": Case(
        grouped.grouped_gate_up, grouped.grouped_gate_up_ref, gate_up(True),
        {"out_scale": 1e-3, "out": 2**-3},
    ),
    "grouped_down": Case(
        grouped.grouped_down, grouped.grouped_down_ref, down(False), {"out": 2**-7}
    ),
    "grouped_down_fp8": Case(
        grouped.grouped_down, grouped.grouped_down_ref, down(True), {"out": 2**-7}
    ),
    "greedy": Case(sample.greedy, sample.greedy_ref, greedy, {"out_token": 0, "out_logprob": 1e-5}),
    "fill_random": Case(
        random_init.fill_random, random_init.fill_random_ref, fill(BF16), {"out": 0}
    ),
    "fill_random_fp8": Case(
        random_init.fill_random, random_init.fill_random_ref, fill(FP8), {"out": 0}
    ),
}  # fmt: skip
# Of these the first token's result is compared between steps of every size.
BY_TOKEN = (
    *("linear", "linear_router", "linear_fp8_qkv_a", "linear_fp8_q_b"),
    *("absorb_q", "absorb_v", "latent_query"),
)


# ------------------------------------------------------------------ running a case


def on_device(arguments: Arguments) -> Arguments:
    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    return {k: move(v) for k, v in arguments.items()}


def copied(case: Case, arguments: Arguments) -> Arguments:
    """With outputs of their own."""
    return arguments | {name: arguments[name].clone() for name in case.outputs}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, step: float) -> None:
    got = got.cpu()
    if step == 0:
        assert torch.equal(bits(got), bits(want)), name
        return
    a, b = got.float(), want.float()
    assert torch.equal(a.isnan(), b.isnan()), name
    a, b = a.nan_to_num(), b.nan_to_num()
    if got.dtype == FP8:
        assert (a != b).float().mean() <= 0.02, name
    limit = step * (b.abs() + b.square().mean().sqrt()) + 1e-30
    worst = ((a - b).abs() / limit).max()
    assert worst <= 1, f"{name}: {float(worst):.2f} times the limit"


def run(case: Case, launch: Launcher, arguments: Arguments) -> Arguments:
    arguments = on_device(arguments)
    case.kernel(launch, **arguments)
    return arguments


class Captured:
    """A launch in a graph over arguments that stay where they are."""

    def __init__(self, case: Case, launch: Launcher, arguments: Arguments) -> None:
        self.arguments = on_device(arguments)
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            case.kernel(launch, **self.arguments)  # whatever is lazy happens here
        self.stream.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            case.kernel(launch, **self.arguments)

    def replay(self, arguments: Arguments) -> Arguments:
        """Overwrite all arguments in place, outputs included, and replay."""
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                self.arguments[name].copy_(value)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.graph.replay()
        self.stream.synchronize()
        return self.arguments


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_its_oracle_and_replays(name: str, tokens: int, launcher: Launcher) -> None:
    case = CASES[name]
    first, second = case.make(0, tokens), case.make(100, tokens)
    want = copied(case, first)
    case.ref(**want)
    got = run(case, launcher, first)
    for output, step in case.outputs.items():
        assert_close(output, got[output], want[output], step)

    want = run(case, launcher, copied(case, second))
    replayed = Captured(case, launcher, first).replay(second)
    for output in case.outputs:
        assert torch.equal(bits(replayed[output]), bits(want[output])), f"{output} after a replay"


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_tokens_bits_do_not_depend_on_how_many_there_are(name: str, launcher: Launcher) -> None:
    case, whole = CASES[name], CASES[name].make(0, 130)
    by_token = [k for k, v in whole.items() if isinstance(v, torch.Tensor) and len(v) == 130]
    want = run(case, launcher, copied(case, whole))["out"].cpu()
    for tokens in (1, 2, 8, 15, 16, 17, 33, 64, 65, 129):
        some = whole | {k: whole[k][:tokens].contiguous() for k in by_token}
        got = run(case, launcher, copied(case, some))["out"].cpu()
        assert torch.equal(bits(got), bits(want[:tokens].clone())), f"{tokens} tokens"


class Experts:
    """Lists, gate_up and down as a step launches them, over buffers that stay where they are."""

    def __init__(self, experts: int, top_k: int, tokens: int) -> None:
        made, rows = {"device": DEVICE}, tokens * top_k
        self.top_k = top_k
        self.x = torch.zeros(tokens, HIDDEN, **made).to(FP8)
        self.x_scale = torch.ones(tokens, HIDDEN // 128, **made)
        self.ids = torch.zeros(tokens, top_k, dtype=I32, **made)
        self.gate_up = torch.randn(experts, 2 * INTER, HIDDEN, **made).to(FP8)
        self.down = torch.randn(experts, HIDDEN, INTER, **made).to(FP8)
        self.scales = [
            torch.rand(experts, n // 128, k // 128, **made) / k**0.5
            for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER))
        ]
        self.h = torch.zeros(rows, INTER, **made).to(FP8)
        self.h_scale = torch.zeros(rows, INTER // 128, **made)
        self.y = torch.zeros(rows, HIDDEN, dtype=BF16, **made)
        self.lists = {"offsets": torch.zeros(experts + 1, dtype=I32, **made)}
        self.lists["pairs"] = torch.zeros(rows, dtype=I32, **made)
        self.ready = torch.zeros(experts, dtype=I32, **made)

    def run(self, launch: Launcher, plans: tuple[grouped.GroupedPlan, ...]) -> None:
        routing.align(launch, self.ids, expert_start=0, ready=self.ready, **self.lists)
        common = {**self.lists, "top_k": self.top_k, "ready": self.ready}
        grouped.grouped_gate_up(
            launch, self.x, self.x_scale, self.gate_up, self.scales[0],
            **common, out=self.h, out_scale=self.h_scale, plan=plans[0],
        )  # fmt: skip
        grouped.grouped_down(
            launch, self.h, self.h_scale, self.down, self.scales[1],
            **common, out=self.y, plan=plans[1],
        )  # fmt: skip


@pytest.mark.parametrize(("experts", "tokens"), [(12, 32), (3, 64), (24, 4)])
def test_down_may_begin_before_gate_up_has_ended(
    experts: int, tokens: int, launcher: Launcher
) -> None:
    torch.manual_seed(0)
    layer = Experts(experts, 3, tokens)
    plain = (grouped.GroupedPlan(), grouped.GroupedPlan())
    chained = (grouped.GroupedPlan(chain=1), grouped.GroupedPlan(chain=5, prefetch=1))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        layer.run(launcher, plain)
        layer.run(launcher, chained)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(8):  # one behind the other: counters of the one before are still full
                layer.h.view(torch.uint8).fill_(0xFF)  # NaN
                layer.run(launcher, chained)
    for seed in range(20):
        torch.manual_seed(seed)
        layer.x.copy_(torch.randn(tokens, HIDDEN, device=DEVICE).to(FP8))
        layer.ids.copy_(torch.randint(-1, experts - seed % 2, layer.ids.shape, dtype=I32))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            layer.run(launcher, plain)
            want = layer.y.clone()
            layer.y.fill_(float("nan"))
            graph.replay()
        stream.synchronize()
        used = layer.lists["pairs"][: int(layer.lists["offsets"][-1])].long()
        assert torch.equal(bits(layer.y[used]), bits(want[used])), f"seed {seed}"


O_PROJECTION = (HIDDEN, HEADS * VALUE)
LINEAR_PLANS = [
    linear.LinearPlan(64, 4, unroll=2),
    linear.LinearPlan(128, 2, per_sm=3),
]


@pytest.mark.parametrize("plan", LINEAR_PLANS, ids=str)
def test_a_plan_gives_every_token_its_bits(plan: linear.LinearPlan, launcher: Launcher) -> None:
    whole = fp8_linear(*O_PROJECTION)(0, 130)
    wanted = torch.empty(130, HIDDEN, dtype=BF16)
    linear.linear_fp8_ref(whole["xq"], whole["xs"], whole["w"], whole["ws"], out=wanted)
    seen = []
    for tokens in (130, 1, 2, 15, 17, 33, 64, 65, 129):
        some = {"xq": whole["xq"][:tokens], "xs": whole["xs"][:tokens].contiguous()}
        parts = torch.full((plan.splits, tokens, HIDDEN), float("nan"))
        some |= {"w": whole["w"], "ws": whole["ws"], "out": parts}
        case = Case(linear.linear_fp8, linear.linear_fp8_ref, lambda *_: {}, {"out": 0})
        seen.append(run(case, launcher, some | {"plan": plan})["out"].cpu())
        assert torch.equal(bits(seen[-1]), bits(seen[0][:, :tokens])), f"{tokens} tokens"
    assert_close("out", sum_parts(seen[0], BF16), wanted, 2**-7)
    same = linear.LinearPlan(128, plan.splits)
    other = run(case, launcher, some | {"plan": same, "out": torch.zeros_like(parts)})
    assert torch.equal(bits(other["out"]), bits(seen[-1]))


@pytest.mark.parametrize(("n", "k"), sorted(linear.MEASURED_FEW))
def test_the_plan_for_few_tokens_gives_the_bits_of_that_for_many(
    n: int, k: int, launcher: Launcher
) -> None:
    torch.manual_seed(0)
    made, few = {"device": DEVICE}, linear.FEW_TOKENS
    w, x = torch.randn(n, k, **made).to(FP8), torch.randn(130, k, **made).to(FP8)
    ws, xs = torch.rand(n // 128, k // 128, **made) / k**0.5, torch.rand(130, k // 128, **made)

    def run(tokens: int) -> torch.Tensor:
        out = torch.full((tokens, n), float("nan"), dtype=BF16, **made)
        linear.linear_fp8(
            launcher, x[:tokens], xs[:tokens], w, ws, out=out, workspace=torch.empty(1, **made)
        )
        return out

    whole = run(130)
    assert not whole.isnan().any()
    for tokens in (1, 8, 16, few - 1, few, few + 1, 64, 65, 129):
        assert torch.equal(bits(run(tokens)), bits(whole[:tokens])), f"{tokens} tokens"


@pytest.mark.parametrize("experts", [32, 64, 256, 384])
def test_the_router_loses_nothing_and_goes_by_the_token_alone(
    experts: int, launcher: Launcher
) -> None:
    x, w = randn(0, 130, HIDDEN).to(DEVICE), weight(experts, HIDDEN, dtype=F32).to(DEVICE)

    def run(tokens: int, plan: router.RouterPlan | None = None) -> torch.Tensor:
        parts = router.router_parts(experts, HIDDEN)
        out = torch.full((parts, tokens, experts), float("nan"), device=DEVICE)
        router.router(launcher, x[:tokens], w, out=out, plan=plan)
        return out

    whole = run(130)
    exact = x.double() @ w.double().T
    error = (whole.double().sum(0) - exact).norm() / exact.norm()
    # Tensor cores cut sums off where fp32 rounds them: 3e-7, against 1e-7 of IEEE additions.
    assert error < 6e-7, f"{float(error):.1e}"
    for tokens in (1, 2, 8, 15, 16, 17, 32, 33, 64, 65, 129):
        assert torch.equal(bits(run(tokens)), bits(whole[:, :tokens])), f"{tokens} tokens"
    default = router.router_plan(experts, HIDDEN)
    for warps, block_n in ((8, default.block_n), (4, 16), (4, 32)):
        if (block_n < 64) == (default.block_n < 64):
            plan = router.RouterPlan(block_n, default.block_k, warps)
            assert torch.equal(bits(run(33, plan)), bits(whole[:, :33])), plan


@pytest.mark.parametrize(("experts", "groups", "kept"), [(32, 8, 4), (256, 8, 4), (384, 1, 1)])
def test_a_tokens_choice_goes_by_the_token_alone(
    experts: int, groups: int, kept: int, launcher: Launcher
) -> None:
    parts = randn(0, 56, 130, experts, dtype=F32, std=0.1).to(DEVICE)
    bias = randn(1, experts, dtype=F32, std=0.1).to(DEVICE)

    def run(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = {"dtype": I32, "device": DEVICE}
        ids = torch.zeros(tokens, 9, **made)
        weights = torch.zeros(tokens, 9, device=DEVICE)
        routing.route(
            launcher,
            parts[:, :tokens].contiguous(),
            bias,
            torch.arange(tokens, **made),
            **{"num_groups": groups, "topk_groups": kept, "top_k": 8, "normalize": True},
            scaling=2.5,
            shared_id=experts,
            out_ids=ids,
            out_weights=weights,
        )
        return ids, weights

    whole = run(130)
    for tokens in (1, 2, 15, 16, 31, 32, 33, 64, 65, 129):
        for got, want in zip(run(tokens), whole, strict=True):
            assert torch.equal(bits(got), bits(want[:tokens])), f"{tokens} tokens"


# ------------------------------------------------------------------ the row state


@pytest.mark.parametrize("seed", range(8))
def test_steps_of_the_row_state_are_the_oracles(seed: int, launcher: Launcher) -> None:
    dumps = []
    for device in (Device(12, 5), Device(12, 5, launcher, DEVICE)):
        random_steps(device, seed)
        dumps.append(device.dump())
    for name, tensor in dumps[0].items():
        assert torch.equal(bits(dumps[1][name]), bits(tensor)), name
    begin, end = device.ring[0, 2:6].clone().view(torch.int64).tolist()
    assert 0 < begin <= end


def test_stamps_rise(launcher: Launcher) -> None:
    stamps = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    for i in range(8):
        settle.stamp(launcher, stamps, i)
    torch.cuda.synchronize()
    times = stamps.tolist()
    assert times == sorted(times)
    assert times[0] > 0
