"""The sizes a runtime is compiled for; no tensors, so the player knows them without torch."""

from __future__ import annotations

from capture_cache.dataclass import dataclass
from graphs.keys import Ladder
from kernels.triton.state import MailboxLayout

MAX_STOPS = 16
FULL_CHIP = 64  # work items of attention that fill a chip: a power of two just below 132 / 2
ROW_TOKENS = 2048 + 128  # KV tokens of the rows that the default cut is made for
MIN_CUT, CUT_STEP = 128, 64  # of the default; attention walks a split in tiles of 64
FEW_SPLITS, LONE_SPLITS = 16, 32  # of a token, at most: among many rows, and of a row alone


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
        attention: "flashinfer", "hopper" or "triton".
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


def default_cut(max_rows: int, max_seq_len: int, page_size: int = 64) -> int:
    """Attention cut in tokens: a function of what a runtime is compiled for, never of a step.

    Attention runs a (token, split) of 128 heads on two SMs, so 66 fill a Hopper chip. Of our own
    kernel a full chip takes 15.0 us for splits of 256 tokens, 34.8 for 1024 and 62.4 for 2048: some
    8 us, and 1.7 more for each 64 tokens (h200_attention_kernel.json). So the best cut gives every
    pair of SMs one split: at most 64 splits in all, of rows as long as ROW_TOKENS, of as many
    tokens as that needs. Fewer leave SMs without work, more make some pay the 8 us again.

    Measured in whole steps on an H200 with rows of 2000 tokens, attention's part of a layer in us
    (h200_few_rows.json; a trial, in which `absorb_v` started beside attention): 1 row at cuts of
    256, 128 and 64: 83.8, 82.9, 83.1; 8 rows at 320 and 192: 92.9, 98.7. From half of MIN_CUT on
    the merge takes what a row alone gains by more splits.

    ROW_TOKENS is a prompt of 2048 tokens and some of its answer: at half of 2048 a row of 2049
    would bring 32 rows a third split each; 64 tokens more in a split take 1.7 us. Rows that grow
    past it pay all the same.

    Room for the splits of every step token is kept, prompts' included (16 of 128 heads are 2 MiB in
    bf16), so there are limits to them: rows that may be too long are cut at a power of two.

    Args:
        max_rows: concurrent requests of a rank.
        max_seq_len: tokens.
        page_size: tokens; a power of two, which the cut is a multiple of.
    """
    splits = max(1, FULL_CHIP // max_rows)
    step = max(CUT_STEP, page_size)
    cut = max(MIN_CUT, -(-ROW_TOKENS // (splits * step)) * step)
    most = max(FEW_SPLITS, LONE_SPLITS // max_rows)
    if cut * most >= max_seq_len:
        return cut
    cut = max(MIN_CUT, page_size)
    while cut * most < max_seq_len:
        cut *= 2
    return cut


def mailbox_layout(step: StepConfig, ladder: Ladder) -> MailboxLayout:
    return MailboxLayout(step.max_rows, ladder.max_tokens, MAX_STOPS)
