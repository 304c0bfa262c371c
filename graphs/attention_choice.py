"""Decode attention as a choice: which kernel, and where a row's KV is cut.

Both change the order of additions, so a runtime has one of each, for every key and rank. Bits
depend on the choice; times on the lengths and on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphs.calls import Call
from graphs.flashinfer_mla import FlashinferMla
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from kernels.triton.mla_decode import num_splits

CUTS = (256, 512, 1024, 2048, 4096, 8192)
MAX_SPLITS = 64


@dataclass(frozen=True)
class AttentionCut:
    """One kernel of decode attention with one cut.

    Attributes:
        backend: "triton" or "flashinfer".
        cut: KV tokens of a split.
    """

    backend: str
    cut: int

    def __str__(self) -> str:
        return f"{self.backend} cut {self.cut}"

    @classmethod
    def parse(cls, text: str) -> AttentionCut:
        """Read what `str` gives.

        Raises:
            ValueError: not of that form.
        """
        parts = text.split(" ")
        if len(parts) != 3 or parts[1] != "cut" or not parts[2].isdigit():
            raise ValueError(f"expected attention such as 'triton cut 1024', got {text!r}")
        return cls(parts[0], int(parts[2]))

    def bind(self, ops: Ops, model: ModelConfig, call: Call) -> Callable[[], None]:
        """The launch of a recorded `mla_decode` through this choice, its plan already made.

        Args:
            call: gives the query, the cache, the pages and the lengths.
        """
        assert ops.launch is not None, "the CPU twin has one attention"
        launch = ops.launch
        q, cache, page_table, tok_row, kv_len = call.args
        out = call.kwargs["out"]
        splits = num_splits(page_table.shape[1] * call["page_size"], self.cut)
        tokens, heads, dc = out.shape
        if self.backend == "triton":
            part_o = q.new_empty((tokens, splits, heads, dc), dtype=torch.float32)
            part_lse = q.new_empty((tokens, splits, heads), dtype=torch.float32)
            changed = call.replaced({"cut": self.cut, "part_o": part_o, "part_lse": part_lse})
            return lambda: ops.mla_decode(*changed.args, **changed.kwargs)
        mla = FlashinferMla(
            num_heads=heads,
            page_size=call["page_size"],
            softmax_scale=call["softmax_scale"],
            cut=self.cut,
        )
        made = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
            for name, shape, dtype in FlashinferMla.workspace(tokens, heads, splits)
        }
        mla.plan(
            launch,
            tok_row,
            kv_len,
            page_table=page_table,
            ws=made["mla_plan"],
            part_o=made["part_o"],
        )
        return lambda: mla.run(
            launch,
            q,
            cache,
            page_table,
            kv_len,
            ws=made["mla_plan"],
            part_o=made["part_o"],
            part_lse=made["part_lse"],
            out=out,
        )


def cuts_for(max_seq_len: int, page_size: int) -> list[int]:
    """Cuts worth trying for rows of at most so many tokens."""
    whole = -(-max_seq_len // page_size) * page_size
    return [
        cut
        for cut in CUTS
        if cut % page_size == 0
        and num_splits(whole, cut) <= MAX_SPLITS
        and (cut < 2 * whole or cut == CUTS[2])
    ]


def run_every_cut(ops: Ops, model: ModelConfig, call: Call) -> None:
    """Launch (or, on `meta` tensors, list) a recorded `mla_decode` in every way there is."""
    assert ops.launch is not None
    longest = call.args[2].shape[1] * call["page_size"]
    backends = ["triton"]
    if ops.launch.arch == "sm_90" and not FlashinferMla.unfit(model):
        backends.append("flashinfer")
    for backend in backends:
        for cut in cuts_for(longest, call["page_size"]):
            AttentionCut(backend, cut).bind(ops, model, call)()
