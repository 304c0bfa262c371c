"""The static buffers of a step: what exists, where it lies, and the views one key takes of it.

Everything here is a pure function of (model, parallelism, rows, pages, ladder), so two ranks, two
processes or a compile-only machine lay out the same arena. A key sees prefixes of the shared
scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from barriers.allgather import AllGather
from barriers.deepep import DeepEpLowLatency, DeepEpNormal
from barriers.transport import BufferSpec, TransportConfig, received_shape
from barriers.vocabulary import VocabularyConfig
from barriers.vocabulary_allgather import VocabularyAllGather
from capture_cache.layout import ArenaLayout, Entry
from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.planned_mla import PlannedMla
from graphs.step_config import MAX_STOPS, StepConfig, mailbox_layout
from graphs.weights import ITEM_BYTES, shared_joins, stored_table, weight_table
from kernels.triton.draw_pipeline import row_tensors, scratch_tensors
from kernels.triton.linear_plan import linear_plan, linear_workspace_elems
from kernels.triton.mla_query import fuses_query
from kernels.triton.router import router_parts
from kernels.triton.sample import num_chunks
from kernels.triton.state import (
    INT_PARAMS,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    MAX_TOP,
    PARAMS,
    REAL_PARAMS,
    RING_SLOTS,
    RingLayout,
    mask_words,
    param_pitch,
)

# Transports whose buffers lie in the arena; those of rdep are peer memory.
IN_ARENA: dict[str, Callable[[TransportConfig], Iterator[BufferSpec]]] = {
    "allgather": AllGather.buffers,
    "deepep": DeepEpLowLatency.buffers,
    "deepep-normal": DeepEpNormal.buffers,
}
STAMPS = 4096


def arena_layout(cfg: ModelConfig, step: StepConfig, ladder: Ladder) -> ArenaLayout:
    """The whole arena of one rank."""
    return ArenaLayout.build(
        [
            *_weights(cfg, step),
            *_rows(cfg, step),
            *_kv(cfg, step),
            *_scratch(cfg, step, ladder.max_tokens, ladder.max_rows, ladder.max_tokens),
            *_exchange(cfg, step, ladder.max_tokens),
            *_shared_head(cfg, step, ladder.max_rows),
            *_ring(cfg, step, ladder),
        ]
    )


def attention_scratch(cfg: ModelConfig, step: StepConfig, tokens: int) -> Iterator[Entry]:
    """The buffers between the absorbed query and the product by W_O, of so many step tokens."""
    names = ("q_latent", "o_latent", "mla_plan", "part_o", "part_lse", "o", "o_q", "o_s")
    return (e for e in _scratch(cfg, step, tokens, 1, tokens) if e.name in names)


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


def vocabulary_config(cfg: ModelConfig, step: StepConfig, rows: int) -> VocabularyConfig | None:
    """How ranks share the head; None where each has it whole.

    Args:
        rows: of the largest key, the same on every rank.
    """
    if cfg.head_shards == 1:
        return None
    return VocabularyConfig(
        rank=step.ep_rank,
        world=cfg.head_shards,
        capacity=rows,
        hidden=cfg.hidden_size,
        vocab=cfg.vocab_size,
        act_dtype=cfg.act_dtype,
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


def _weights(cfg: ModelConfig, step: StepConfig) -> Iterator[Entry]:
    table = stored_table(cfg, ep_size=step.ep_size, transport=step.transport)
    for name, spec in table.items():
        yield Entry("weights", name, spec.shape, spec.dtype)
    yield Entry("weights", "rope_table", (step.max_seq_len, cfg.qk_rope_head_dim), "float32")


def _rows(cfg: ModelConfig, step: StepConfig) -> Iterator[Entry]:
    rows = step.max_rows
    for name in ("phase", "seq_len", "last_token", "limit"):
        yield Entry("rows", name, (rows,), "int32")
    yield Entry("rows", "stop_ids", (rows, MAX_STOPS), "int32")
    yield Entry("rows", "page_table", (rows, step.max_pages), "int32")
    yield Entry("rows", "row_params", (PARAMS, param_pitch(rows)), "int32")
    yield Entry("rows", "deadline_ns", (rows,), "int64")
    sequences = MAX_STOP_SEQUENCES * MAX_STOP_LENGTH
    yield Entry("rows", "stop_sequences", (rows, sequences), "int32")
    yield Entry("rows", "tail", (rows, MAX_STOP_LENGTH), "int32")
    yield Entry("rows", "mask_step", (rows,), "int32")
    yield Entry("rows", "token_mask", (rows, mask_words(cfg.vocab_size)), "int32")
    for name, (shape, dtype) in row_tensors(rows, cfg.vocab_size).items():
        if name not in (*INT_PARAMS, *REAL_PARAMS, "stop_ids"):
            yield Entry("rows", name, shape, dtype)
    yield Entry("rows", "step", (1,), "int64")
    yield Entry("rows", "begin_ns", (1,), "int64")
    yield Entry("rows", "fault", (1,), "int32")
    yield Entry("rows", "pending", (RingLayout(rows).words,), "int32")
    yield Entry("rows", "poison", (1,), "int32")
    yield Entry("rows", "stamps", (STAMPS,), "int64")


def _kv(cfg: ModelConfig, step: StepConfig) -> Iterator[Entry]:
    slots = step.num_pages * step.page_size
    for layer in range(cfg.num_layers):
        yield Entry("kv", f"kv.{layer}", (slots, cfg.latent_dim), cfg.act_dtype)


def _ring(cfg: ModelConfig, step: StepConfig, ladder: Ladder) -> Iterator[Entry]:
    rows, vocab = step.max_rows, cfg.vocab_size
    yield Entry("ring", "mailbox", (2, mailbox_layout(step, ladder).words), "int32")
    yield Entry("ring", "ring", (RING_SLOTS, RingLayout(step.max_rows).words), "int32")
    yield Entry("ring", "ring_step", (RING_SLOTS,), "int64")
    yield Entry("ring", "ring_top", (RING_SLOTS, rows, 2, MAX_TOP), "int32")
    yield Entry("ring", "ring_logits", (2, step.logits_rows, vocab), "float32")
    yield Entry("ring", "forced_tokens", (rows, step.max_seq_len), "int32")
    yield Entry("ring", "masks", (2, rows, mask_words(vocab)), "int32")


def _exchange(cfg: ModelConfig, step: StepConfig, capacity: int) -> Iterator[Entry]:
    """Buffers of the expert-parallel transport that lie in this rank's arena."""
    if cfg.first_k_dense_replace < cfg.num_layers and step.transport in IN_ARENA:
        for buffer in IN_ARENA[step.transport](transport_config(cfg, step, capacity)):
            yield Entry(*buffer)


def _shared_head(cfg: ModelConfig, step: StepConfig, rows: int) -> Iterator[Entry]:
    """Buffers of a shared head that lie in this rank's arena; those of rdep are peer memory."""
    config = vocabulary_config(cfg, step, rows)
    if config is not None and step.transport == "allgather":
        for buffer in VocabularyAllGather.buffers(config):
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
    for name in ("sample_tok", "sample_row", "sample_pos", "out_token"):
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
    if step.attention != "triton":
        for name, shape, dtype in PlannedMla.workspace(tokens, heads, step.splits):
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
    yield from _mlp_scratch(cfg, step, tokens, capacity, activation, entry)
    yield entry("final", (rows, hidden), act)
    yield entry("logits", (rows, cfg.vocab_size), "float32")
    for name, dtype in (("part_max", "float32"), ("part_arg", "int32"), ("part_sum", "float32")):
        yield entry(name, (rows, num_chunks(cfg.vocab_size)), dtype)
    for name, (shape, dtype) in scratch_tensors(rows, cfg.vocab_size).items():
        yield entry(name, shape, dtype)
    yield entry("workspace", (max(1, _workspace_elems(cfg, step, tokens, rows)),), "float32")


def _mlp_scratch(
    cfg: ModelConfig,
    step: StepConfig,
    tokens: int,
    capacity: int,
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
    sizes = transport_config(cfg, step, capacity)
    pairs = math.prod(received_shape(step.transport, sizes, tokens))
    joins, top_k = shared_joins(cfg, step.transport), choices(cfg, step)
    parts = router_parts(cfg.num_experts, cfg.hidden_size)
    yield entry("router_logits", (parts, tokens, cfg.num_experts), "float32")
    yield entry("topk_ids", (tokens, top_k), "int32")
    yield entry("topk_weights", (tokens, top_k), "float32")
    yield entry("offsets", (cfg.num_experts // step.ep_size + joins + 1,), "int32")
    yield entry("ready", (cfg.num_experts // step.ep_size + joins,), "int32")
    yield entry("pairs", (pairs,), "int32")
    yield from activation("expert_h", pairs, cfg.moe_intermediate_size, plain=False)
    yield entry("expert_y", (pairs, cfg.hidden_size), cfg.act_dtype)
    if cfg.num_shared_experts and not joins:
        yield from mlp("shared", cfg.shared_intermediate_size)
        yield entry("shared_out", (tokens, cfg.hidden_size), cfg.act_dtype)
        if step.overlap:
            elems = _workspace_elems(cfg, step, tokens, rows=0, only=".shared_")
            yield entry("shared_workspace", (max(1, elems),), "float32")


def workspace_per_token(cfg: ModelConfig, step: StepConfig) -> int:
    """fp32 words of workspace that there are for each step token, at every key."""
    return max(1, _workspace_elems(cfg, step, 1, rows=0))


def _workspace_elems(
    cfg: ModelConfig, step: StepConfig, tokens: int, rows: int, only: str = ""
) -> int:
    """fp32 words that the widest split product needs, of those with `only` in their names."""
    elems = [0]
    for name, spec in weight_table(cfg, ep_size=step.ep_size).items():
        # The router leaves its parts to the choice of experts.
        plain = not name.endswith(("_scale", ".router"))
        if only in name and len(spec.extents) == 2 and plain:
            count = rows * cfg.head_shards if name in ("head", "embed") else tokens
            n, k = spec.extents
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
        """All buffers, scratch cut down to the prefixes that `key` uses, and each row parameter."""
        views = dict(self._tensors) | param_views(self["row_params"], self._step.max_rows)
        for e in self._scratch_of(key):
            views[e.name] = self._tensors[e.name].flatten()[: math.prod(e.shape)].view(e.shape)
        return views


def param_views(row_params: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """The parameters of all rows under the names that sampling knows them by, [rows] each."""
    reals = row_params.view(torch.float32)
    ints = {name: row_params[line, :rows] for name, line in INT_PARAMS.items()}
    return ints | {name: reals[line, :rows] for name, line in REAL_PARAMS.items()}


def _describe(tensor: torch.Tensor | None) -> str:
    return "no such buffer" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
