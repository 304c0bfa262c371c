"""The sizes a runtime is compiled for; no tensors, so the player knows them without torch."""

from __future__ import annotations

from dataclasses import dataclass

from graphs.keys import Ladder
from kernels.triton.state import MailboxLayout

MAX_STOPS = 16


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
        overlap: the shared expert runs beside the exchange and the routed experts.
        logits_rows: requests that may have their logits returned at the same time.
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
    overlap: bool = False
    logits_rows: int = 8

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_seq_len", "page_size", "cut", "ep_size", "logits_rows"):
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
        return -(-self.max_pages * self.page_size // self.cut)


def default_cut(max_seq_len: int) -> int:
    """Attention cut in tokens: 1024, and longer where more than 16 splits would be needed."""
    cut = 1024
    while cut * 16 < max_seq_len:
        cut *= 2
    return cut


def mailbox_layout(step: StepConfig, ladder: Ladder) -> MailboxLayout:
    return MailboxLayout(step.max_rows, ladder.max_tokens, MAX_STOPS)
