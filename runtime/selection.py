"""What is going to be built, settled before memory is touched: model, sizes, ladder, backends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from barriers.deepep import check_sizes, load_buffer_class, outside_bytes
from barriers.transport import DEEPEP
from barriers.transport import resolve as resolve_transport
from capture_cache.layout import ArenaLayout
from graphs.attention_choice import AttentionCut
from graphs.buffers import arena_layout, kv_bytes_per_token, transport_config
from graphs.checkpoint import ModelSource
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.keys import Ladder
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig, default_cut
from runtime.config import RuntimeConfig
from runtime.model import model_of

# Left for the driver, the graphs themselves and libraries when the KV cache takes what is free.
RESERVED_BYTES = 3 << 30
DEFAULT_PDL = "late"


SHARES_HEAD = ("allgather", "rdep")  # transports over which a head can be shared


@dataclass(frozen=True)
class Selection:
    """What is going to be built, before any memory is touched."""

    source: ModelSource
    model: ModelConfig
    step: StepConfig
    ladder: Ladder
    on_device: bool
    attention_reason: str

    @property
    def layout(self) -> ArenaLayout:
        return arena_layout(self.model, self.step, self.ladder)


def choose(options: RuntimeConfig, *, compile_only: bool = False) -> Selection:
    """Settle model, sizes, ladder and attention.

    Raises:
        ValueError: options that contradict each other or the model.
        DeepEpMissing: the transport needs a package that is not here.
    """
    model, source = model_of(options)
    for token in model.eos_token_ids:
        if not 0 <= token < model.vocab_size:
            raise ValueError(
                f"eos_token_id {token} is outside the vocabulary [0, {model.vocab_size}); correct "
                "the model's config.json or generation_config.json"
            )
    seq_len = options.seq_len(model.max_position)
    world = options.ranks.world
    if not compile_only and options.num_ranks != world:
        raise ValueError(
            f"--ep-size {options.num_ranks}, but this process is one of {world}; start with "
            f"torchrun --nproc-per-node {options.num_ranks}, or leave --ep-size out"
        )
    rows = options.rows_per_rank
    ladder = chosen_ladder(options)
    on_device = compile_only or _on_device(options)
    attention, reason = _attention(options, model, on_device and not compile_only)
    transport = resolve_transport(options.transport, world=options.num_ranks, on_device=on_device)
    if model.head_shards > 1 and (
        transport not in SHARES_HEAD or model.first_k_dense_replace >= model.num_layers
    ):
        raise ValueError(
            f"--head sharded goes with a transport of {', '.join(SHARES_HEAD)} and a model with "
            f"experts, got {transport} and {options.model}; leave it at whole"
        )
    step = StepConfig(
        max_rows=rows,
        max_seq_len=seq_len,
        num_pages=2,
        page_size=options.page_size,
        cut=default_cut(rows, seq_len, options.page_size),
        ep_size=options.num_ranks,
        ep_rank=0 if compile_only else options.ranks.rank,
        attention=attention,
        transport=transport,
        pdl=_pdl(options, on_device, compile_only=compile_only),
        overlap=_overlap(options, model, transport),
        logits_rows=min(rows, options.logits_rows),
    )
    if step.transport in DEEPEP:
        check_sizes(step.transport, transport_config(model, step, ladder.max_tokens))
        if not compile_only:
            load_buffer_class()  # its absence is told before ranks meet and weights are loaded
    pages = options.num_pages
    if pages is None:
        pages = _default_pages(model, step, ladder, on_device and not compile_only)
    step = dataclasses.replace(step, num_pages=pages)
    return Selection(source, model, step, ladder, on_device, reason)


def chosen_ladder(options: RuntimeConfig) -> Ladder:
    """The keys that would be captured; raises ValueError for keys that there cannot be."""
    rows = options.rows_per_rank
    return Ladder.default(rows) if options.ladder is None else Ladder.parse(options.ladder, rows)


def _pdl(options: RuntimeConfig, on_device: bool, *, compile_only: bool) -> str:
    """How kernels overlap: where the chip can, unless asked otherwise."""
    able = _is_sm90(on_device, compile_only=compile_only)
    if options.pdl == "auto":
        return DEFAULT_PDL if able else "off"
    if options.pdl != "off" and not able:
        raise ValueError(
            f"--pdl {options.pdl} needs a CUDA device of compute capability 9.0 or later; leave it "
            "at auto"
        )
    return options.pdl


def with_attention(options: RuntimeConfig, selection: Selection, cut: AttentionCut) -> Selection:
    """The selection with another kernel or cut of attention, and the KV cache that then fits.

    Raises:
        ValueError: a kernel that cannot be used here, or a cut that the pages do not divide.
    """
    model, step = selection.model, selection.step
    if (cut.backend, cut.cut) == (step.attention, step.cut):
        return selection
    if cut.backend in ("flashinfer", "hopper"):
        usable, reason = _planned(cut.backend, model, step.page_size)
        if not usable:
            raise ValueError(f"pinned attention {str(cut)!r} cannot be used here: {reason}")
    elif cut.backend != "triton":
        raise ValueError(f"attention must be flashinfer, hopper or triton, got {str(cut)!r}")
    step = dataclasses.replace(step, attention=cut.backend, cut=cut.cut)
    if options.num_pages is None:
        pages = _default_pages(model, step, selection.ladder, selection.on_device)
        step = dataclasses.replace(step, num_pages=pages)
    reason = f"{cut}, chosen from {selection.attention_reason}"
    return dataclasses.replace(selection, step=step, attention_reason=reason)


def _overlap(options: RuntimeConfig, model: ModelConfig, transport: str) -> bool:
    """Whether a shared expert runs beside an exchange."""
    with_experts = model.first_k_dense_replace < model.num_layers
    able = transport != "local" and with_experts and model.num_shared_experts > 0
    if options.overlap and not able:
        raise ValueError(
            f"--overlap runs a shared expert beside an exchange between ranks, and {options.model} "
            f"with --transport {transport} lacks one of them; leave it out"
        )
    return able if options.overlap is None else options.overlap


def _is_sm90(on_device: bool, *, compile_only: bool) -> bool:
    """Compiling ahead is for sm_90 and later only."""
    return on_device and (compile_only or torch.cuda.get_device_capability() >= (9, 0))


def _on_device(options: RuntimeConfig) -> bool:
    if options.device == "cpu":
        return False
    count = torch.cuda.device_count()
    if options.device == "cuda" and not count:
        raise ValueError(
            "--device cuda: torch sees no CUDA device; use --device cpu for the CPU twin"
        )
    if count and options.local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK {options.local_rank} has no GPU: torch sees {count}; "
            "start one process a GPU"
        )
    if count:
        torch.cuda.set_device(options.local_rank)
    return count > 0


def _attention(options: RuntimeConfig, model: ModelConfig, on_device: bool) -> tuple[str, str]:
    asked = options.attention
    if asked == "triton":
        return "triton", "asked for"
    if not on_device:
        if asked != "auto":
            raise ValueError(f"--attention {asked} needs a CUDA device; leave it at auto")
        return "triton", "not on a device"
    if asked == "auto":
        return _fastest(model, options.page_size)
    usable, reason = _planned(asked, model, options.page_size)
    if not usable:
        raise ValueError(f"--attention {asked} cannot be used here: {reason}")
    return asked, reason


def _fastest(model: ModelConfig, page_size: int) -> tuple[str, str]:
    """The first that this process can run, fastest first, and why none before it."""
    reasons = []
    for backend in ("hopper", "flashinfer"):
        usable, reason = _planned(backend, model, page_size)
        reasons.append(reason)
        if usable:
            return backend, reason
    return "triton", "; ".join(reasons)


def _planned(backend: str, model: ModelConfig, page_size: int) -> tuple[bool, str]:
    """Whether this process can run flashinfer's or our own planned MLA, and the reason."""
    if backend == "flashinfer":
        return FlashinferMla.available(model)
    return HopperMla.available(model, page_size)


def _default_pages(model: ModelConfig, step: StepConfig, ladder: Ladder, on_device: bool) -> int:
    """Every row at full length, or what device memory allows."""
    wanted = step.max_rows * step.max_pages + 1
    if not on_device:
        return wanted
    free, _ = torch.cuda.mem_get_info()
    page_bytes = kv_bytes_per_token(model) * step.page_size
    room = free - arena_layout(model, step, ladder).device_bytes - RESERVED_BYTES
    if step.transport in DEEPEP:
        room -= outside_bytes(step.transport, transport_config(model, step, ladder.max_tokens))
    pages = min(wanted, room // page_bytes)
    if pages < step.max_pages + 1:
        raise ValueError(
            f"device memory: {free / 2**30:.1f} GiB free leaves room for {max(0, pages)} KV pages "
            f"after "
            f"weights and scratch, and one row of max_seq_len needs {step.max_pages + 1}; lower "
            "--max-seq-len, --bs or --layers"
        )
    return int(pages)
