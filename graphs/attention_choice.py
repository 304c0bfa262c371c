"""Decode attention as a choice: which kernel, and where a row's KV is cut.

Both change the order of additions, so a runtime has one of each, for every key and rank. Bits
depend on the choice; times on the lengths and on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from graphs.calls import Call
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.timing import clearly_faster
from kernels.triton.mla_decode import num_splits

CUTS = (128, 256, 512, 1024, 2048, 4096, 8192)
MAX_SPLITS = 64


@dataclass(frozen=True)
class AttentionCut:
    """One kernel of decode attention with one cut.

    Attributes:
        backend: "triton", "flashinfer" or "hopper".
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
        kind = FlashinferMla if self.backend == "flashinfer" else HopperMla
        mla = kind(
            num_heads=heads,
            page_size=call["page_size"],
            softmax_scale=call["softmax_scale"],
            cut=self.cut,
        )
        made = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
            for name, shape, dtype in kind.workspace(tokens, heads, splits)
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
        and (cut < 2 * whole or cut == CUTS[3])
    ]


def run_every_cut(ops: Ops, model: ModelConfig, call: Call) -> None:
    """Launch (or, on `meta` tensors, list) a recorded `mla_decode` in every way there is."""
    assert ops.launch is not None
    longest = call.args[2].shape[1] * call["page_size"]
    backends = ["triton"]
    if ops.launch.arch == "sm_90" and not FlashinferMla.unfit(model):
        backends.append("flashinfer")
    if ops.launch.arch == "sm_90" and not HopperMla.unfit_here(model, call["page_size"]):
        backends.append("hopper")
    for backend in backends:
        for cut in cuts_for(longest, call["page_size"]):
            AttentionCut(backend, cut).bind(ops, model, call)()


def points_for(max_rows: int, max_seq_len: int) -> list[tuple[int, int]]:
    """(rows, context) at which choices are compared; they do not follow the ladder, for two
    runtimes of one size are to give the same bits."""
    longest = max_seq_len - 1
    counts = sorted({rows for rows in (1, 8, 32, 64) if rows < max_rows} | {min(64, max_rows)})
    found = [(rows, min(2000, longest)) for rows in counts]
    if longest > 8192:
        found += [(1, min(longest, 131072)), (min(8, max_rows), min(longest, 32768))]
    return found


def choose_attention(
    found: Sequence[AttentionCut],
    points: Sequence[tuple[int, int]],
    measure: Callable[[AttentionCut, int, int], float],
) -> tuple[AttentionCut, dict[str, list[float]]]:
    """The choice that serves all points best: the first one, unless another is clearly faster on
    average and nowhere slower.

    Args:
        measure: (choice, rows, context) → microseconds.
    Returns:
        The choice, and the times of each by `str`, in the order of the points.
    """
    times = {str(c): [measure(c, rows, context) for rows, context in points] for c in found}
    default = times[str(found[0])]
    faster = [c for c in found[1:] if clearly_faster(times[str(c)], default)]

    def over_default(choice: AttentionCut) -> float:
        return fmean(us / own for us, own in zip(times[str(choice)], default, strict=True))

    return min(faster, key=over_default, default=found[0]), times
