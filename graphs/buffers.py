"""The static buffers of a step: what exists, where it lies, and the views one key takes of it.

Everything here is a pure function of (model, parallelism, rows, pages, ladder), so two ranks, two
processes or a compile-only machine lay out the same arena. A key sees prefixes of the shared
scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from barriers.allgather import AllGather
from barriers.transport import TransportConfig
from capture_cache.layout import ArenaLayout, Entry
from graphs.flashinfer_mla import FlashinferMla
from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.weights import ITEM_BYTES, shared_joins, stored_table, weight_table
from kernels.triton.linear import linear_plan, linear_workspace_elems
from kernels.triton.mla_decode import num_splits
from kernels.triton.mla_query import fuses_query
from kernels.triton.sample import num_chunks
from kernels.triton.state import RING_SLOTS, MailboxLayout, RingLayout

MAX_STOPS = 16
STAMPS = 4096


@dataclass(frozen=True)
class StepConfig:
    """Sizes a runtime is compiled for, per rank.

    Attributes:
        max_rows: concurrent requests of this rank (`bs / ep_size`).
        max_seq_len: tokens, prompt and output together.
        page_size: tokens a KV page.
        num_pages: KV pages of this rank, the null page included.
        cut: KV tokens a split of decode attention takes; fixes the reduction order.
        ep_size, ep_rank: expert parallelism.
        attention: "flashinfer" or "triton".
        transport: how tokens reach the experts of other ranks; a name of `barriers.transport`.
        pdl: how kernels overlap; a key of `kernels.triton.overlap.MODES`.
        prefetch: ask L2 for the weights of later kernels while the memory is idle.
    """

    max_rows: int
    max_seq_len: int
    num_pages: int
    page_size: int = 64
    cut: int = 1024
    ep_size: int = 1
    ep_rank: int = 0
    attention: str = "triton"
    transport: str = "local"
    pdl: str = "off"
    prefetch: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_seq_len", "page_size", "cut", "ep_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.page_size & (self.page_size - 1) or self.cut % self.page_size:
            raise ValueError(
                f"page_size must be a power of two that divides the attention cut {self.cut}, "
                f"got {self.page_size}"
            )
        if self.num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (the null page and one more), got {self.num_pages}"
            )

    @property
    def max_pages(self) -> int:
        """Pages of one row's table."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def splits(self) -> int:
        return num_splits(self.max_pages * self.page_size, self.cut)


def default_cut(max_seq_len: int) -> int:
    """Attention cut in tokens: 1024, and longer where more than 16 splits would be needed."""
    cut = 1024
    while cut * 16 < max_seq_len:
        cut *= 2
    return cut


def arena_layout(cfg: ModelConfig, step: StepConfig, ladder: Ladder) -> ArenaLayout:
    """The whole arena of one rank."""
    return ArenaLayout.build(
        [
            *_weights(cfg, step),
            *_rows(step, ladder),
            *_kv(cfg, step),
            *_scratch(cfg, step, ladder.max_tokens, ladder.max_rows, ladder.max_tokens),
            *_exchange(cfg, step, ladder.max_tokens),
            *_ring(step, ladder),
        ]
    )


def scratch_bytes(cfg: ModelConfig, step: StepConfig, key: GraphKey) -> int:
    """Bytes of scratch that a ladder ending at `key` would need."""
    return sum(e.nbytes for e in _scratch(cfg, step, key.tokens, key.rows, key.tokens))


def kv_bytes_per_token(cfg: ModelConfig) -> int:
    """Bytes of KV cache one token takes over all layers."""
    itemsize = torch.empty((), dtype=getattr(torch, cfg.act_dtype)).element_size()
    return cfg.num_layers * cfg.latent_dim * itemsize


def transport_config(cfg: ModelConfig, step: StepConfig, capacity: int) -> TransportConfig:
    """What the expert-parallel transport of this rank is made for.

    Args:
        capacity: tokens of the largest key, the same on every rank.
    """
    return TransportConfig(
        rank=step.ep_rank,
        world=step.ep_size,
        capacity=capacity,
        hidden=cfg.hidden_size,
        num_experts=cfg.num_experts + shared_joins(cfg, step.transport),
        top_k=choices(cfg, step),
        act_dtype=cfg.act_dtype,
        fp8=cfg.is_fp8,
    )


def choices(cfg: ModelConfig, step: StepConfig) -> int:
    """Experts a token goes to: those it is routed to, and the shared one where that joins them."""
    return cfg.experts_per_token + shared_joins(cfg, step.transport)


def query_fuses(cfg: ModelConfig) -> bool:
    """Whether one kernel takes the compressed query to the latent space (`latent_query`)."""
    act_bytes = torch.empty((), dtype=getattr(torch, cfg.act_dtype)).element_size()
    return cfg.q_lora_rank is not None and fuses_query(
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.kv_lora_rank,
        fp8=cfg.is_fp8,
        act_bytes=act_bytes,
    )


def mailbox_layout(step: StepConfig, ladder: Ladder) -> MailboxLayout:
    return MailboxLayout(step.max_rows, ladder.max_tokens, MAX_STOPS)


def _weights(cfg: ModelConfig, step: StepConfig) -> Iterator[Entry]:
    table = stored_table(cfg, ep_size=step.ep_size, transport=step.transport)
    for name, spec in table.items():
        yield Entry("weights", name, spec.shape, spec.dtype)
    yield Entry("weights", "rope_table", (step.max_seq_len, cfg.qk_rope_head_dim), "float32")


def _rows(step: StepConfig, ladder: Ladder) -> Iterator[Entry]:
    rows = step.max_rows
    for name in ("phase", "seq_len", "last_token", "limit"):
        yield Entry("rows", name, (rows,), "int32")
    yield Entry("rows", "stop_ids", (rows, MAX_STOPS), "int32")
    yield Entry("rows", "page_table", (rows, step.max_pages), "int32")
    yield Entry("rows", "step", (1,), "int64")
    yield Entry("rows", "begin_ns", (1,), "int64")
    yield Entry("rows", "fault", (1,), "int32")
    yield Entry("rows", "poison", (1,), "int32")
    yield Entry("rows", "stamps", (STAMPS,), "int64")


def _kv(cfg: ModelConfig, step: StepConfig) -> Iterator[Entry]:
    slots = step.num_pages * step.page_size
    for layer in range(cfg.num_layers):
        yield Entry("kv", f"kv.{layer}", (slots, cfg.latent_dim), cfg.act_dtype)


def _ring(step: StepConfig, ladder: Ladder) -> Iterator[Entry]:
    yield Entry("ring", "mailbox", (2, mailbox_layout(step, ladder).words), "int32")
    yield Entry("ring", "ring", (RING_SLOTS, RingLayout(step.max_rows).words), "int32")
    yield Entry("ring", "ring_step", (RING_SLOTS,), "int64")


def _exchange(cfg: ModelConfig, step: StepConfig, capacity: int) -> Iterator[Entry]:
    """Buffers of the expert-parallel transport that lie in this rank's arena."""
    if cfg.first_k_dense_replace < cfg.num_layers and step.transport == "allgather":
        for buffer in AllGather.buffers(transport_config(cfg, step, capacity)):
            yield Entry(*buffer)


def _scratch(
    cfg: ModelConfig, step: StepConfig, tokens: int, rows: int, capacity: int
) -> Iterator[Entry]:
    act, fp8 = cfg.act_dtype, cfg.is_fp8
    hidden, heads, latent = cfg.hidden_size, cfg.num_heads, cfg.latent_dim
    q_dim = heads * cfg.qk_head_dim
    o_dim = heads * cfg.v_head_dim

    def entry(name: str, shape: tuple[int, ...], dtype: str) -> Entry:
        return Entry("scratch", name, shape, dtype)

    def activation(name: str, count: int, width: int, plain: bool = True) -> Iterator[Entry]:
        """An activation as the next matrix product wants it: plain, or quantised by 1x128."""
        if plain or not fp8:
            yield entry(name, (count, width), act)
        if fp8:
            yield entry(f"{name}_q", (count, width), "float8_e4m3fn")
            yield entry(f"{name}_s", (count, -(-width // 128)), "float32")

    def product(name: str, width: int, depth: int) -> Entry:
        """A product by [width, depth] weights; its K splits are added up by whoever reads it."""
        elem_bytes = 1 if fp8 else ITEM_BYTES[act]
        splits = linear_plan(width, depth, elem_bytes=elem_bytes).splits
        if splits == 1:
            return entry(name, (tokens, width), act)
        return entry(name, (splits, tokens, width), "float32")

    for name in ("tok_row", "tok_pos", "tok_id", "kv_len"):
        yield entry(name, (tokens,), "int32")
    yield entry("kv_slot", (tokens,), "int64")
    for name in ("sample_tok", "sample_row", "out_token"):
        yield entry(name, (rows,), "int32")
    yield entry("out_logprob", (rows,), "float32")
    yield entry("x", (tokens, hidden), act)
    yield from activation("norm", tokens, hidden)
    if cfg.q_lora_rank is None:
        yield entry("qkv", (tokens, cfg.q_part_padded + latent), act)
    else:
        yield product("qkv", cfg.q_part_padded + latent, hidden)
        yield from activation("q_norm", tokens, cfg.q_lora_rank, plain=False)
        if not query_fuses(cfg):
            yield entry("q", (tokens, q_dim), act)
    yield entry("q_latent", (tokens, heads, latent), act)
    yield entry("o_latent", (tokens, heads, cfg.kv_lora_rank), act)
    if step.attention == "flashinfer":
        for name, shape, dtype in FlashinferMla.workspace(tokens, heads, step.splits):
            yield entry(name, shape, dtype)
    else:
        yield entry("part_o", (tokens, step.splits, heads, cfg.kv_lora_rank), "float32")
        yield entry("part_lse", (tokens, step.splits, heads), "float32")
    # A head that is whole groups of 128 is quantised where it is made.
    yield from activation("o", tokens, o_dim, plain=cfg.v_head_dim % 128 != 0)
    yield product("o_out", hidden, o_dim)
    yield entry("delta", (tokens, hidden), act)
    if cfg.first_k_dense_replace > 0:
        yield product("dense_out", hidden, cfg.intermediate_size)
    received = tokens if step.ep_size == 1 else step.ep_size * capacity
    yield from _mlp_scratch(cfg, step, tokens, received, activation, entry)
    yield entry("final", (rows, hidden), act)
    yield entry("logits", (rows, cfg.vocab_size), "float32")
    for name, dtype in (("part_max", "float32"), ("part_arg", "int32"), ("part_sum", "float32")):
        yield entry(name, (rows, num_chunks(cfg.vocab_size)), dtype)
    yield entry("workspace", (max(1, _workspace_elems(cfg, step, tokens, rows)),), "float32")


def _mlp_scratch(
    cfg: ModelConfig,
    step: StepConfig,
    tokens: int,
    received: int,
    activation: Callable[..., Iterator[Entry]],
    entry: Callable[[str, tuple[int, ...], str], Entry],
) -> Iterator[Entry]:
    def mlp(name: str, width: int) -> Iterator[Entry]:
        yield entry(f"{name}_gate_up", (tokens, 2 * cfg.padded(width)), cfg.act_dtype)
        yield from activation(f"{name}_h", tokens, width, plain=False)

    if cfg.first_k_dense_replace > 0:
        yield from mlp("dense", cfg.intermediate_size)
    if cfg.first_k_dense_replace >= cfg.num_layers:
        return
    joins, top_k = shared_joins(cfg, step.transport), choices(cfg, step)
    pairs = received * top_k
    # Left in the router's K splits for the choice to add up.
    parts = linear_plan(cfg.num_experts, cfg.hidden_size, elem_bytes=4).splits
    shape = (tokens, cfg.num_experts)
    yield entry("router_logits", shape if parts == 1 else (parts, *shape), "float32")
    yield entry("topk_ids", (tokens, top_k), "int32")
    yield entry("topk_weights", (tokens, top_k), "float32")
    yield entry("offsets", (cfg.num_experts // step.ep_size + joins + 1,), "int32")
    yield entry("pairs", (pairs,), "int32")
    yield from activation("expert_h", pairs, cfg.moe_intermediate_size, plain=False)
    yield entry("expert_y", (pairs, cfg.hidden_size), cfg.act_dtype)
    if cfg.num_shared_experts and not joins:
        yield from mlp("shared", cfg.shared_intermediate_size)
        yield entry("shared_out", (tokens, cfg.hidden_size), cfg.act_dtype)


def workspace_per_token(cfg: ModelConfig, step: StepConfig) -> int:
    """fp32 words of workspace that there are for each step token, at every key."""
    elems = [1]
    for name, spec in weight_table(cfg, ep_size=step.ep_size).items():
        if len(spec.shape) == 2 and not name.endswith("_scale") and name not in ("head", "embed"):
            n, k = spec.shape
            elems.append(linear_workspace_elems(1, n, k, elem_bytes=spec.nbytes // (n * k)))
    return max(elems)


def _workspace_elems(cfg: ModelConfig, step: StepConfig, tokens: int, rows: int) -> int:
    """fp32 words that the widest split matrix product of a step needs."""
    elems = [0]
    for name, spec in weight_table(cfg, ep_size=step.ep_size).items():
        if len(spec.shape) == 2 and not name.endswith("_scale"):
            count = rows if name in ("head", "embed") else tokens
            n, k = spec.shape
            elems.append(linear_workspace_elems(count, n, k, elem_bytes=spec.nbytes // (n * k)))
    return max(elems)


class StaticBuffers:
    """The bound arena: every tensor a graph may touch, by name.

    A graph remembers the addresses it was captured with. `rebind` is the only way to move a buffer;
    it makes every graph that has seen the old address refuse to replay.
    """

    def __init__(
        self, cfg: ModelConfig, step: StepConfig, ladder: Ladder, views: Mapping[str, torch.Tensor]
    ) -> None:
        self._cfg, self._step, self._capacity = cfg, step, ladder.max_tokens
        self._tensors = dict(views)
        self.mailbox_layout = mailbox_layout(step, ladder)
        self.generation = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def rebind(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` in the place of a buffer.

        Raises:
            ValueError: unknown name, or another shape or dtype.
        """
        old = self._tensors.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            raise ValueError(
                f"buffer {name!r}: expected {_describe(old)}, got {_describe(tensor)}; "
                "a static buffer keeps its shape and dtype"
            )
        self._tensors[name] = tensor
        self.generation += 1

    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self._tensors.items()}

    def scratch_names(self, key: GraphKey) -> list[str]:
        return [e.name for e in self._scratch_of(key)]

    def _scratch_of(self, key: GraphKey) -> Iterator[Entry]:
        return _scratch(self._cfg, self._step, key.tokens, key.rows, self._capacity)

    def for_key(self, key: GraphKey) -> dict[str, torch.Tensor]:
        """All buffers, scratch cut down to the prefixes that `key` uses."""
        views = dict(self._tensors)
        for e in self._scratch_of(key):
            views[e.name] = self._tensors[e.name].flatten()[: math.prod(e.shape)].view(e.shape)
        return views


def _describe(tensor: torch.Tensor | None) -> str:
    return "no such buffer" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
