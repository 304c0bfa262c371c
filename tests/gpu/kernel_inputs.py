"""Arguments of each kernel at DeepSeek-V3 sizes, by a seed and a number of tokens; on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kernels.triton import expert_lists, linear_plan, mla_decode, mla_plan, router, sample, stream
from tests.tiles import as_tiles

DEVICE = "cuda"
BF16, F32, FP8, I32 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32
# DeepSeek-V3; the vocabulary is an eighth of its own.
HIDDEN, HEADS, Q_LORA, NOPE, ROPE, VALUE, LATENT = 7168, 128, 1536, 128, 64, 128, 512
EXPERTS, GROUPS, KEPT, TOP_K, INTER, VOCAB = 256, 8, 4, 8, 2048, 16160
LOCAL_EXPERTS, PAGE, CUT = 5, 64, 1024
TOKENS = (1, 5, 40)
PADDED = 2  # this token of a step is padding

Arguments = dict[str, Any]


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
def fp8_weight(
    seed: int, rows: int, cols: int, *, tiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = (torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) + 0.5) / cols**0.5
    w = randn(seed, rows, cols, dtype=FP8)
    return as_tiles(w) if tiled else w, scale


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
                max(1, linear_plan.linear_workspace_elems(tokens, n, k, elem_bytes=dtype.itemsize)),
                dtype=F32,
            ),
        }

    return make


def fp8_linear(n: int, k: int, *, tiled: bool = False) -> Callable[[int, int], Arguments]:
    def make(seed: int, tokens: int) -> Arguments:
        xq, xs = fp8_rows(seed, tokens, k)
        w, ws = fp8_weight(5, n, k, tiled=tiled)
        elems = linear_plan.linear_workspace_elems(tokens, n, k, elem_bytes=1)
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
    expert_lists.align_ref(**chosen)
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
        w, w_scale = fp8_weight(5, LOCAL_EXPERTS * 2 * INTER, HIDDEN, tiled=True)
        w = w.view(LOCAL_EXPERTS, -1, *w.shape[1:])
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
        w, w_scale = fp8_weight(5, LOCAL_EXPERTS * HIDDEN, INTER, tiled=True)
        w = w.view(LOCAL_EXPERTS, -1, *w.shape[1:])
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


def words(seed: int, tokens: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    size = (tokens * stream.BLOCK,)
    drawn = torch.randint(-(2**31), 2**31, size, generator=generator)
    return {"words": drawn.to(torch.int32), "out": zeros(5, dtype=torch.int32)}
