"""Weights in: a Hugging Face checkpoint into the packed tensors.

A checkpoint is judged whole before it is read (`graphs.checkpoint_plan`), then read tensor by
tensor in pieces of bounded size, and every value is checked to be finite. Nothing is quantised or
left out unreported. Presets have seeded random weights instead (`graphs.random_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from graphs.checkpoint_plan import FP8, LoadPlan, plan_load
from graphs.fp8_blocks import dequantise_blocks, quantise_blocks
from graphs.hf_layout import Kind, Part, padded_rows
from graphs.model_config import FP8_BLOCK, ModelConfig
from graphs.model_source import ModelSource, model_digest, resolve_model
from graphs.random_weights import random_weights
from graphs.safetensors_dir import CheckpointDir, CheckpointError, Stored, open_checkpoint
from graphs.weights import check_views, is_per_rank, local_experts
from kernels.triton.weight_tiles import TILE_ROWS, put_rows

__all__ = [
    "CheckpointError",
    "LoadReport",
    "ModelSource",
    "load_checkpoint",
    "model_digest",
    "random_weights",
    "resolve_model",
]

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        num_tensors: read for this rank, scales not counted.
        bytes_read: from disk.
        left_out: reason -> tensors of the checkpoint that were not read.
        quantised: tensors that were not FP8 in the checkpoint and are now.
    """

    num_tensors: int
    bytes_read: int
    left_out: dict[str, tuple[str, ...]]
    quantised: tuple[str, ...]


def load_checkpoint(
    path: str | Path,
    cfg: ModelConfig,
    views: Mapping[str, torch.Tensor],
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
    replicated: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill the packed tensors from a directory of safetensors.

    Args:
        views: every tensor of `weight_table(cfg, ep_size=ep_size)`, on any device; others in the
            mapping are left alone.
        ep_rank: which experts to read; everything else is the same on every rank.
        replicated: read that too; else the experts alone.
        progress: called with (bytes read, bytes to read) after each tensor.
    Raises:
        CheckpointError: the directory is damaged, its tensors are not this model's, or one of
            them holds NaN or infinity. `views` may then be partly filled.
        ValueError: views or ranks that do not fit `cfg`.
    Host memory: a few pieces of 64 MiB, or the largest kv_b_proj in float32.
    """
    first = first_local_expert(cfg, ep_rank, ep_size)
    check_views(cfg, views, ep_size=ep_size)
    checkpoint = open_checkpoint(Path(path))
    plan = plan_load(checkpoint, cfg)
    parts = [
        (part, stored)
        for part, stored in local_parts(plan, first, local_experts(cfg, ep_size))
        if replicated or part.expert is not None or is_per_rank(cfg, part.target)
    ]
    todo = [_bytes_of(part, stored, checkpoint) for part, stored in parts]
    total, done = sum(todo), 0
    for name, begin, end in padded_rows(cfg) if replicated else ():
        views[name][begin:end].view(torch.uint8).zero_()
    with ExitStack() as files:
        loader = Loader(checkpoint, cfg, views, first, files, ep_rank)
        for (part, stored), nbytes in zip(parts, todo, strict=True):
            loader.load(part, stored)
            done += nbytes
            if progress is not None:
                progress(done, total)
        if replicated:
            loader.check_tied_head()
    read = {part.source for part, _ in parts}
    quantised = tuple(name for name in plan.quantised if name in read)
    return LoadReport(len(parts), total, plan.left_out, quantised)


def first_local_expert(cfg: ModelConfig, ep_rank: int, ep_size: int) -> int:
    """The first expert of a rank.

    Raises:
        ValueError: no such rank, or experts that do not divide.
    """
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank: expected 0 … {ep_size - 1}, got {ep_rank}")
    return ep_rank * local_experts(cfg, ep_size)


def local_parts(plan: LoadPlan, first: int, num_local: int) -> list[tuple[Part, Stored]]:
    """What of the plan a rank reads: everything but other ranks' experts."""
    return [
        (part, stored)
        for part, stored in plan.parts
        if part.expert is None or first <= part.expert < first + num_local
    ]


def _bytes_of(part: Part, stored: Stored, checkpoint: CheckpointDir) -> int:
    nbytes = stored.nbytes
    if stored.dtype == FP8:
        nbytes += checkpoint.tensors[part.scale_source].nbytes
    return nbytes // max(1, part.num_fused)


class Loader:
    """Copies one part at a time; files stay open (they are memory maps) until the stack closes.

    Args:
        views: the packed tensors.
        first_expert: of this rank.
        rank: whose part of the head is loaded, where ranks share it.
    """

    _remedy = "download the file again"  # where the values are at fault

    def __init__(
        self,
        checkpoint: CheckpointDir,
        cfg: ModelConfig,
        views: Mapping[str, torch.Tensor],
        first_expert: int,
        files: ExitStack,
        rank: int = 0,
    ) -> None:
        self._checkpoint, self._cfg, self._views = checkpoint, cfg, views
        self._first_expert, self._rank = first_expert, rank
        self._files = files
        self._open: dict[str, Any] = {}

    def load(self, part: Part, stored: Stored) -> None:
        """Fill the rows that `part` names."""
        if part.kind is Kind.KV_B:
            self._load_kv_b(part, stored)
            return
        target = self._slab(part, part.target)
        if is_per_rank(self._cfg, part.target) and part.expert is None:
            self._load_head(part, stored, target)
            return
        if self._cfg.is_fp8 and part.kind is Kind.LINEAR:
            scale = self._slab(part, f"{part.target}_scale")
            self._load_fp8(part, stored, target, scale)
            return
        for begin, x in self._pieces(part.source, stored, part.slab, target.device):
            put_rows(target, part.row + begin, self._cast(x, target.dtype, part.source, stored))

    def check(self, part: Part, stored: Stored) -> int:
        """Read the part as `load` would, and write nothing; the sum of its bits.

        Raises:
            CheckpointError: a value is not finite, or cannot be read.
        """
        name = f"{part.target}w_uk" if part.kind is Kind.KV_B else part.target
        target, bits = self._views[name], 0
        for _, x in self._pieces(part.source, stored, part.slab, target.device):
            bits += _sum_of_bits(x)
            if target.dtype is torch.float16 and not _all_finite(x.to(target.dtype)):
                raise self._too_large(part.source, stored)
        if stored.dtype == FP8:
            bits += _sum_of_bits(self._scales(part, target.device))
        return bits

    def check_tied_head(self) -> None:
        """A model whose head is its embedding may store the head too, if it is the same.

        Raises:
            CheckpointError: it is not.
        """
        head = self._checkpoint.tensors.get("lm_head.weight")
        if head is None or not self._cfg.tie_word_embeddings:
            return
        embed = self._views["embed"]
        incoming = self._checkpoint.tensors.get("model.embed_tokens.weight")
        problem = "expected model.embed_tokens.weight, to which config.json ties it, got other "
        if head.shape != tuple(embed.shape):
            raise self._error("lm_head.weight", head, f"{problem}shape {list(head.shape)}")
        for begin, x in self._pieces("lm_head.weight", head, None, embed.device):
            rows = embed[begin : begin + len(x)]
            if incoming is not None:
                at = slice(begin, begin + len(x))
                rows = self._read("model.embed_tokens.weight", incoming, at).to(rows)
            if not torch.equal(x.to(embed.dtype), rows):
                raise self._error("lm_head.weight", head, f"{problem}values", _UNTIE)

    def _load_fp8(
        self, part: Part, stored: Stored, target: torch.Tensor, scale: torch.Tensor
    ) -> None:
        quantised_here = stored.dtype != FP8
        for begin, x in self._pieces(part.source, stored, part.slab, target.device):
            if quantised_here:
                x, blocks = quantise_blocks(x)
                at = part.scale_row + begin // FP8_BLOCK
                scale[at : at + len(blocks)].copy_(blocks)
            put_rows(target, part.row + begin, x)
        if not quantised_here:
            blocks = self._scales(part, target.device)
            scale[part.scale_row : part.scale_row + len(blocks)].copy_(blocks)

    def _load_head(self, part: Part, stored: Stored, target: torch.Tensor) -> None:
        """This rank's rows, and zeros in what is left of the last tile and past it."""
        wanted = self._cfg.head_range(self._rank)
        target.zero_()
        for begin, x in self._pieces(part.source, stored, None, target.device, wanted):
            rows = self._cast(x, target.dtype, part.source, stored)
            short = -len(rows) % TILE_ROWS
            rows = torch.nn.functional.pad(rows, (0, 0, 0, short))
            put_rows(target, begin - wanted.start, rows)

    def _load_kv_b(self, part: Part, stored: Stored) -> None:
        w_uk, w_uv = self._views[f"{part.target}w_uk"], self._views[f"{part.target}w_uv"]
        whole = torch.cat([x for _, x in self._pieces(part.source, stored, part.slab, w_uk.device)])
        if stored.dtype == FP8:
            whole = dequantise_blocks(whole, self._scales(part, w_uk.device))
        heads = whole.view(self._cfg.num_heads, -1, self._cfg.kv_lora_rank)
        nope = self._cfg.qk_nope_head_dim
        w_uk.copy_(self._cast(heads[:, :nope], w_uk.dtype, part.source, stored))
        w_uv.copy_(self._cast(heads[:, nope:], w_uv.dtype, part.source, stored))

    def _scales(self, part: Part, device: torch.device) -> torch.Tensor:
        stored = self._checkpoint.tensors[part.scale_source]
        pieces = self._pieces(part.scale_source, stored, part.slab, device)
        return torch.cat([x for _, x in pieces]).float()

    def _slab(self, part: Part, name: str) -> torch.Tensor:
        target = self._views[name]
        return target if part.expert is None else target[part.expert - self._first_expert]

    def _pieces(
        self,
        name: str,
        stored: Stored,
        slab: int | None,
        device: torch.device,
        wanted: range | None = None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a tensor or its `slab`, all or those that are `wanted`: whole scale
        blocks, finite, on `device`."""
        shape = stored.shape if slab is None else stored.shape[1:]
        item_bytes = stored.nbytes // math.prod(stored.shape)
        row_bytes = item_bytes * math.prod(shape[1:])
        step = max(FP8_BLOCK, _PIECE_BYTES // row_bytes // FP8_BLOCK * FP8_BLOCK)
        wanted = range(shape[0]) if wanted is None else wanted
        for begin in range(wanted.start, wanted.stop, step):
            rows = slice(begin, min(begin + step, wanted.stop))
            x = self._read(name, stored, rows if slab is None else (slab, rows)).to(device)
            if not _all_finite(x):
                raise self._error(name, stored, _where_not_finite(x, begin))
            yield begin, x

    def _read(self, name: str, stored: Stored, at: Any) -> torch.Tensor:
        try:
            if stored.file not in self._open:
                file = safe_open(str(self._checkpoint.path / stored.file), framework="pt")
                self._open[stored.file] = self._files.enter_context(file)
            rows: torch.Tensor = self._open[stored.file].get_slice(name)[at]
        except (SafetensorError, OSError) as error:
            raise self._error(name, stored, f"expected readable data, got: {error}") from error
        return rows

    def _cast(self, x: torch.Tensor, dtype: torch.dtype, name: str, stored: Stored) -> torch.Tensor:
        x = x.to(dtype)
        if dtype is torch.float16 and not _all_finite(x):
            raise self._too_large(name, stored)
        return x

    def _too_large(self, name: str, stored: Stored) -> CheckpointError:
        problem = "expected values that fit float16, got larger ones"
        return self._error(name, stored, problem, "run with --override dtype=bfloat16")

    def _error(self, name: str, stored: Stored, problem: str, remedy: str = "") -> CheckpointError:
        problems = [f"{stored.file}: {name}: {problem}"]
        return CheckpointError(self._checkpoint.path, problems, remedy or self._remedy)


_UNTIE = "run with --override tie_word_embeddings=false"


def _sum_of_bits(x: torch.Tensor) -> int:
    """All values as whole numbers of their size, added up."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.contiguous().view(whole).sum(dtype=torch.int64))


def _all_finite(x: torch.Tensor) -> bool:
    if x.dtype is torch.float8_e4m3fn:
        # e4m3 has no infinity and two NaNs, 0x7f and 0xff: the largest signed and unsigned bytes.
        signed, unsigned = x.view(torch.int8).max(), x.view(torch.uint8).max()
        return not bool((signed == 0x7F) | (unsigned == 0xFF))
    low, high = torch.aminmax(x)  # both are NaN if any value is
    return bool(low.isfinite() & high.isfinite())


def _where_not_finite(x: torch.Tensor, begin: int) -> str:
    bad = (~x.float().isfinite()).nonzero()
    first = bad[0].tolist()
    first[0] += begin
    return f"expected finite values, got NaN or infinity, {len(bad)} here, the first at {first}"
